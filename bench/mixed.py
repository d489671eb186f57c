"""Throughput over limited links of batches that mix prompts and answers, woven beside plain.

    sudo .venv/bin/python bench/mixed.py [--rates 1gbit 250mbit] [--shapes 512,128,32 1024,128,16 2048,128,16]

A shape is the tokens of a prompt, those of its answer and the requests at once. One rank on each of two hosts
on one machine (bench/links.py says what that needs). One engine serves the same load in turns, its planner
asked or not; ratios are medians of those within a turn. Writes bench/results/mixed-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from links import Hosts, torchrun, why_not
from machine import describe
from make_model import DIRECTORY, write

RESULTS = Path(__file__).parent / "results"


def serve(args: argparse.Namespace) -> None:
    """On every rank; rank 0 measures."""
    from weaveinf import LLM, SamplingParams

    with LLM(
        str(args.model),
        max_num_seqs=max(requests for _, _, requests in args.shapes),
        seed=0,
        show_progress=False,
    ) as llm:
        weaver, trace = llm.engine.executor.worker.weaver, llm.engine.trace
        rng = np.random.default_rng(0)
        vocab_size = llm.engine.model_config.vocab_size
        cells = []
        for prompt, answer, requests in args.shapes:
            params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
            seconds: dict[str, list[float]] = {"": [], "plain is measured": []}
            before = dict(trace.steps)
            for turn in range(args.turns + 1):
                for why, times in seconds.items():
                    weaver.why = why  # plans travel with the steps: rank 0's word is enough
                    prompts = rng.integers(0, vocab_size, (requests, prompt)).tolist()
                    began = time.perf_counter()
                    llm.generate(prompts, params, show_progress=False)
                    if turn:
                        times.append(time.perf_counter() - began)
            woven, plain = seconds.values()
            tokens = requests * (prompt + answer)
            cells.append(
                {
                    "prompt_tokens": prompt,
                    "output_tokens": answer,
                    "requests": requests,
                    "plain_tokens_per_s": tokens / median(plain),
                    "woven_tokens_per_s": tokens / median(woven),
                    "gain": median(p / w for p, w in zip(plain, woven, strict=True)),
                    "steps_woven": trace.steps["woven"] - before.get("woven", 0),
                    "steps": sum(trace.steps.values()) - sum(before.values()),
                }
            )
        args.json.write_text(json.dumps(cells))


def measure(rate: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    with Hosts(2, rate) as hosts, tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [__file__, *sys.argv[1:], "--json", file.name]
        torchrun(hosts, 1, command, seconds=7200.0)
        cells: list[dict[str, Any]] = json.loads(Path(file.name).read_text())
    return cells


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| link | requests | prompt + answer | plain tokens/s | woven tokens/s | gain | steps woven |"]
    lines.append("| --- |" + " --- |" * 6)
    for rate, cells in results.items():
        for cell in cells:
            row = [rate, f"{cell['requests']}", f"{cell['prompt_tokens']} + {cell['output_tokens']}"]
            row += [f"{cell[f'{how}_tokens_per_s']:.0f}" for how in ("plain", "woven")]
            row += [f"{cell['gain']:.2f}x", f"{cell['steps_woven']} of {cell['steps']}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int, int]:
    prompt, answer, requests = map(int, text.split(","))
    return prompt, answer, requests


def main() -> None:
    parser = argparse.ArgumentParser(description="Woven beside plain throughput over limited links.")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "250mbit"])
    default = [(512, 128, 32), (1024, 128, 16), (2048, 128, 16)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=default)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        serve(args)
        return
    if missing := why_not():
        raise SystemExit(f"skipped: {missing}")
    if not (args.model / "config.json").exists():
        write(args.model)
    results = {rate: measure(rate, args) for rate in args.rates}
    command = f"python bench/mixed.py {' '.join(sys.argv[1:])}".strip()
    lines = ["# Woven beside plain throughput over limited links", "", table(results), ""]
    lines += ["Steps of both ways, of which half are never woven.", ""]
    lines += ["Machine: " + "; ".join(f"{key}: {value}" for key, value in describe().items()), ""]
    lines += [f"Command: `{command}`", ""]
    (RESULTS / f"mixed-{datetime.date.today().isoformat()}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
