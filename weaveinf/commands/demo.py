"""`weaveinf demo`: two ranks on the small model that comes with the package."""

from __future__ import annotations

import argparse
import time
from importlib.resources import files

from weaveinf.commands.report import what_ran
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM

PROMPT = "The function returns a list of"


def run(args: argparse.Namespace) -> None:
    prompt = args.prompt or PROMPT
    model = str(files("weaveinf") / "assets" / "demo")
    with LLM(model, tensor_parallel_size=args.tp or 2, show_progress=False) as llm:
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        tokens = 0
        for _, text in llm.stream(prompt, SamplingParams(temperature=0.7, seed=0, max_tokens=120)):
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
