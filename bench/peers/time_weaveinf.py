"""Times weaveinf: one process, or ranks over its own seam.

    echo "8 128" | .venv/bin/python bench/peers/time_weaveinf.py MODEL [--tp 2]

Prints a JSON line about itself, then one for each cell asked for.
"""

from __future__ import annotations

import time

import torch
from cells import arguments, asked, serve

from weaveinf import LLM, SamplingParams
from weaveinf.commands.report import what_ran


def main() -> None:
    args = arguments("Time weaveinf on the comparison cells.")
    with LLM(args.model, tensor_parallel_size=args.tp, dtype=args.dtype) as llm:

        def run(prompts: list[list[int]], tokens: int) -> list[float]:
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            times = [time.perf_counter()]
            produced = {id_: 0 for prompt in prompts for id_ in llm.engine.add(prompt, params)}
            while len(times) <= tokens:
                for update in llm.engine.step():
                    produced[update.request.id] = len(update.request.output_token_ids)
                    if update.finished:
                        llm.engine.take(update.request.id)
                times += [time.perf_counter()] * (min(produced.values()) + 1 - len(times))
            return times

        ran = what_ran(llm)
        about = {key: ran[key] for key in ("seam", "kernels") if key in ran}
        vocab_size = llm.engine.model_config.vocab_size
        serve(run, vocab_size, asked(), torch=torch.__version__, **about)


if __name__ == "__main__":
    main()
