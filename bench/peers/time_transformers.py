"""Times Hugging Face transformers: one process with all threads, or `tp_plan="auto"` over gloo.

    echo "8 128" | bench/.venvs/transformers/bin/python bench/peers/time_transformers.py MODEL [--tp 2]

With --tp above 1 the script starts its ranks itself, through torchrun, and shares the cores among them.
Prints a JSON line about itself, then one for each cell asked for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

from cells import arguments, asked, serve


def start_ranks(tp: int) -> None:
    """Becomes torchrun with `tp` ranks of this script; does not return."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // tp))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    # Port 0: the system chooses, so two benchmarks can run side by side.
    launcher += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(tp)]
    os.execv(sys.executable, launcher + sys.argv)


def main() -> None:
    args = arguments("Time transformers on the comparison cells.")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tp != ranks:
        start_ranks(args.tp)

    import torch
    import transformers
    from transformers.distributed import DistributedConfig

    if ranks == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    placement: dict[str, object] = {}
    if ranks > 1:
        placement["distributed_config"] = DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, **placement
    ).eval()
    model.generation_config.eos_token_id = None  # never end early
    model.generation_config.pad_token_id = 0

    class Clock(transformers.StoppingCriteria):
        """Notes when each token of the batch was there; never stops anything."""

        def __init__(self) -> None:
            self.times = [time.perf_counter()]

        def __call__(
            self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object
        ) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    @torch.inference_mode()
    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        input_ids = torch.tensor(prompts)
        clock = Clock()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=tokens,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return clock.times

    def agreed() -> Iterator[tuple[int, int]]:
        """The cells that rank 0 is asked for, on every rank."""
        cells = asked()
        while True:
            told = [next(cells, None) if torch.distributed.get_rank() == 0 else None]
            torch.distributed.broadcast_object_list(told)
            if told[0] is None:
                return
            yield told[0]

    about = {"version": transformers.__version__, "torch": torch.__version__}
    cells = asked() if ranks == 1 else agreed()
    serve(run, model.config.vocab_size, cells, **about)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
