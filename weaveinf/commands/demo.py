"""`weaveinf demo`: two ranks on the small model that comes with the package."""

import argparse
import time
from importlib.resources import files

from weaveinf.commands.report import what_ran
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM

PROMPT = "An object is said to be"
SEED = 0


def run(args: argparse.Namespace) -> None:
    prompt = PROMPT if args.prompt is None else args.prompt
    model = str(files("weaveinf") / "assets" / "demo")
    ranks = 2 if args.tp is None else args.tp
    with LLM(model, tensor_parallel_size=ranks, show_progress=False) as llm:
        llm.engine.encode(prompt)  # loads the tokenizer, which is not to be timed
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        params = SamplingParams(temperature=0.6, top_p=0.9, seed=SEED, max_tokens=120)
        for _, text in llm.stream(prompt, params):
            print(text, end="", flush=True)
        seconds = time.perf_counter() - began
        ran, trace = what_ran(llm), llm.engine.trace
    print(f"\n\n{ran['tp']} ranks, seam: {ran['seam']}, kernels: {ran['kernels']}, {ran['dtype']}")
    medians = {phase: trace.median_ms(phase) for phase in ("prefill", "decode")}
    told = ", ".join(f"{phase} {ms:.2f} ms" for phase, ms in medians.items() if ms is not None)
    rate = sum(trace.steps.values()) / seconds  # each step of one sequence makes one token
    print(f"a step (median): {told}; {rate:.0f} tokens/s")
    print(trace.summary())
