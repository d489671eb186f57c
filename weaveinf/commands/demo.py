"""`weaveinf demo`: two ranks on the small model that comes with the package."""

from __future__ import annotations

import argparse
import time
from importlib.resources import files

from weaveinf.commands.report import what_ran
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM

PROMPT = "An object is said to be"
SEED = 0


def run(args: argparse.Namespace) -> None:
    prompt = args.prompt or PROMPT
    model = str(files("weaveinf") / "assets" / "demo")
    with LLM(model, tensor_parallel_size=args.tp or 2, show_progress=False) as llm:
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        tokens = 0
        params = SamplingParams(temperature=0.6, top_p=0.9, seed=SEED, max_tokens=120)
        for _, text in llm.stream(prompt, params):
            print(text, end="", flush=True)
            tokens += 1
        seconds = time.perf_counter() - began
        ran, trace = what_ran(llm), llm.engine.trace
    print(f"\n\n{ran['tp']} ranks, seam: {ran['seam']}, kernels: {ran['kernels']}, {ran['dtype']}")
    print(
        f"prefill {trace.median_ms('prefill'):.2f} ms, decode {trace.median_ms('decode'):.2f} ms a "
        f"step (median), {tokens / seconds:.0f} tokens/s"
    )
    print(trace.summary())
