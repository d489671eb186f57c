"""What a decode step costs beside the model: scheduling, batch, sampling, results, in microseconds.

    .venv/bin/python bench/step_overhead.py [--steps 400]

Blocks and head are taken out of a tiny model and its logits are given instead; all else is as in every run.
The fastest of some rounds over all cases, since a core's speed may change: processor time of the process,
and wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import describe

from weaveinf import LLM, SamplingParams
from weaveinf.cache.batch import Batch
from weaveinf.weave import weaver

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
CASES = [(name, batch) for name in ("greedy", "temperature 1") for batch in (1, 8, 32)]
ROUNDS = 12


LOGITS = torch.ones(64, CONFIG["vocab_size"])


def without_blocks(chain: object, halves: Sequence[Batch], *_: object) -> torch.Tensor:
    """In the place of weave.run: rows of ones where logits are wanted, which are the logits already."""
    return LOGITS[: len(halves[0].logit_rows)]


def microseconds(llm: LLM, batch: int, params: SamplingParams, seed: int) -> tuple[float, float]:
    """Of one decode step of `batch` sequences: processor time, wall time."""
    prompts = [[seed, i, *range(14)] for i in range(batch)]
    began = time.process_time(), time.perf_counter()
    llm.generate(prompts, params, show_progress=False)
    ended = time.process_time(), time.perf_counter()
    cpu, wall = ((b - a) / params.max_tokens * 1e6 for a, b in zip(began, ended, strict=True))
    return cpu, wall


def main() -> None:
    parser = argparse.ArgumentParser(description="Time an engine step without a model.")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    weaver.run = without_blocks
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(directory, load_format="dummy", dtype="bfloat16", show_progress=False)
    llm.engine.executor.worker.model.head = lambda x: x
    best = dict.fromkeys(CASES, (math.inf, math.inf))
    with llm:
        for seed in range(ROUNDS):
            for name, batch in CASES:
                temperature = 0.0 if name == "greedy" else 1.0
                params = SamplingParams(temperature=temperature, max_tokens=args.steps, ignore_eos=True)
                cpu, wall = microseconds(llm, batch, params, seed)
                had = best[name, batch]
                best[name, batch] = min(had[0], cpu), min(had[1], wall)
    for (name, batch), (cpu, wall) in best.items():
        print(f"{name}, {batch} sequences: {cpu:.0f} us of a processor a step, {wall:.0f} us in all")
    print("machine: " + "; ".join(f"{key}: {value}" for key, value in describe().items()))


if __name__ == "__main__":
    main()
