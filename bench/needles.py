"""Accuracy of long-context lookups against the tokens that a selector may read, for every method.

    python bench/needles.py [--lengths 4096 16384 65536 131072] [--budgets 8 16 32 64 ...] [--cases 16]

The model is bench/retrieval_model.py's, which is exact when it reads all. A haystack is filler with pairs of
a key and a value in it; a question is the last three tokens of a prompt, MARK key MARK, and the answer is the
key, then the value. The key is answered by the prompt's last row, the value by an answer's row, to which all
methods apply.

    single   a few lone pairs at all depths, each asked for in turn
    keys     256 pairs, of which some are asked for
    values   keys that come four times, with a value each: the answer's four likeliest tokens must be these
    store    as many pairs as there are keys or room for: at 4096 tokens there is nothing else

All questions about a haystack share its pages, and so do all budgets where the prompt is computed dense. A
budget counts all tokens that a row reads for each KV head, so TokenSelect chooses fewer by its sinks and its
local tokens.

Writes bench/results/needles-DATE.md, .json and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from retrieval_model import DIRECTORY, FILLERS, KEYS, MARK, VALUES, write

from weaveinf import LLM, SamplingParams
from weaveinf.commands.calibrate import QUERIES, calibrate
from weaveinf.config import PAGE_SIZE

RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
SINKS, LOCAL = 1, 3
"""TokenSelect's: few, so that what it chooses decides even where it may read little."""
LEAST = {"quest": 2 * PAGE_SIZE, "fasa": 1, "tokenselect": SINKS + LOCAL + 1}
"""The smallest budget that a method can do with."""
PLANES = 8
"""FASA's: a quarter, as in the paper."""
METHODS: dict[str, dict[str, Any]] = {
    "quest": {},
    "fasa": {"planes": PLANES},
    "tokenselect": {"sinks": SINKS, "local": LOCAL},
}
TABLE = "fasa.json"
MANY_KEYS, MANY_VALUES = 256, 4
QUESTION, ANSWER = 3, 2
"""Tokens behind a haystack."""


@dataclass(frozen=True)
class Question:
    """What is asked for, and the values that are the answer."""

    key: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """Token ids, and what can be asked about them."""

    tokens: list[int]
    questions: list[Question]

    @classmethod
    def of(
        cls, length: int, pairs: Sequence[tuple[int, int]], places: Sequence[int], asked: Sequence[int]
    ) -> Haystack:
        """Filler with each pair at its place (in pairs of tokens, behind the first token), of which the keys
        in `asked` are asked for."""
        tokens = np.random.default_rng(length).integers(FILLERS.start, FILLERS.stop, length)
        of_key: dict[int, list[int]] = {}
        for (key, value), place in zip(pairs, places, strict=True):
            tokens[1 + 2 * place : 3 + 2 * place] = key, value
            of_key.setdefault(key, []).append(value)
        return cls(tokens.tolist(), [Question(key, tuple(of_key[key])) for key in asked])


def single(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    keys, values = rng.choice(KEYS, cases, replace=False), rng.choice(VALUES, cases)
    room = (length - 1) // 2
    places = (np.arange(cases) + rng.random(cases)) * room / cases
    pairs = list(zip(keys.tolist(), values.tolist(), strict=True))
    return Haystack.of(length, pairs, places.astype(int).tolist(), keys.tolist())


def among(count: int, rng: np.random.Generator, length: int, cases: int) -> Haystack:
    """`count` pairs, if there are so many keys and so much room, of which `cases` are asked for."""
    room = (length - 1) // 2
    count = min(count, room, len(KEYS))
    keys, values = rng.choice(KEYS, count, replace=False), rng.choice(VALUES, count)
    pairs = list(zip(keys.tolist(), values.tolist(), strict=True))
    places = rng.choice(room, count, replace=False).tolist()
    return Haystack.of(length, pairs, places, keys[:cases].tolist())


def many_keys(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    return among(max(MANY_KEYS, cases), rng, length, cases)


def many_values(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    keys = rng.choice(KEYS, cases, replace=False).tolist()
    pairs = [
        (key, value) for key in keys for value in rng.choice(VALUES, MANY_VALUES, replace=False).tolist()
    ]
    places = rng.choice((length - 1) // 2, len(pairs), replace=False).tolist()
    return Haystack.of(length, pairs, places, keys)


def store(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    return among(len(KEYS), rng, length, cases)


TASKS: dict[str, Callable[[np.random.Generator, int, int], Haystack]] = {
    "single": single,
    "keys": many_keys,
    "values": many_values,
    "store": store,
}


def make(task: str, length: int, cases: int) -> Haystack:
    """The haystack of a task, so long that prompt and answer are of `length` tokens together."""
    rng = np.random.default_rng([length, list(TASKS).index(task)])
    return TASKS[task](rng, length - QUESTION - ANSWER, cases)


@dataclass
class Cell:
    """What one method answered about one haystack; `budget` 0: it read all."""

    task: str
    length: int
    method: str
    budget: int
    right: int
    asked: int
    seconds: float
    computed: int
    """Prompt tokens that were not in the cache."""


def requests(haystack: Haystack, budget: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """A prompt for each question, and what else is to be said."""
    prompts = [[*haystack.tokens, MARK, question.key, MARK] for question in haystack.questions]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            logprobs=len(question.values),
            ignore_eos=True,
            selector_budget=budget,
        )
        for question in haystack.questions
    ]
    return prompts, params


def is_right(question: Question, token_ids: Sequence[int], likeliest: Sequence[int]) -> bool:
    """Whether these tokens, of which the last was one of so many likeliest, are the answer."""
    return token_ids[0] == question.key and set(likeliest) == set(question.values)


def ask(llm: LLM, haystack: Haystack, budget: int) -> tuple[int, int]:
    """How many questions are answered rightly, and how many prompt tokens were computed for it."""
    scheduler = llm.engine.scheduler
    before = scheduler.num_prefix_queried - scheduler.num_prefix_hit
    outputs = llm.generate(*requests(haystack, budget), show_progress=False)
    right = 0
    for question, output in zip(haystack.questions, outputs, strict=True):
        assert output.logprobs is not None
        right += is_right(question, output.token_ids, output.logprobs[-1].top_ids)
    return right, scheduler.num_prefix_queried - scheduler.num_prefix_hit - before


def measure(llm: LLM, method: str, task: str, args: argparse.Namespace, length: int) -> list[Cell]:
    """A method's cells of one haystack. One for answers only reads all first; its pages serve all budgets."""
    haystack = make(task, length, args.cases)
    forced = SINKS + LOCAL if method == "tokenselect" else 0
    cells = []
    budgets = [budget for budget in args.budgets if budget >= LEAST[method]]
    for budget in [0] * (method != "tokenselect") + budgets:
        began = time.perf_counter()
        right, computed = ask(llm, haystack, budget - forced if budget else 0)
        seconds = time.perf_counter() - began
        name = method if budget else DENSE
        cells.append(Cell(task, length, name, budget, right, args.cases, seconds, computed))
        print(f"{task} {length} {method} {budget}: {right} of {args.cases}, {seconds:.1f} s", flush=True)
    return cells


def calibration_text() -> list[int]:
    """A store, and keys of it: what the heads are for."""
    found = make("store", 4096, QUERIES)
    return [*found.tokens, *(question.key for question in found.questions)]


def run(args: argparse.Namespace) -> list[Cell]:
    if not (args.model / "config.json").exists():
        write(args.model)
    cells = []
    for method in args.methods:
        settings = {"name": method, "budget": max(args.budgets)} | METHODS[method]
        if method == "fasa":
            table = args.model / TABLE
            if not table.exists():
                calibrate(str(args.model), calibration_text(), table)
            settings["table"] = str(table)
        with LLM(
            str(args.model),
            dtype=args.dtype,
            selector=settings,
            max_model_len=max(args.lengths),
            max_num_seqs=32,
            show_progress=False,
        ) as llm:
            for length, task in product(args.lengths, args.tasks):
                cells += measure(llm, method, task, args, length)
    return cells


def table(cells: Sequence[Cell], budgets: Sequence[int]) -> str:
    """A line for each task, length and method, a column for each budget; a decode-only engine's dense answers
    stand above its own."""
    lines = ["| task | tokens | method | all | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * (len(budgets) + 3))
    rows: dict[tuple[str, int, str], dict[int, str]] = {}
    for cell in cells:
        key = (cell.task, cell.length, cell.method)
        rows.setdefault(key, {})[cell.budget] = f"{100 * cell.right / cell.asked:.0f}"
    order = {task: i for i, task in enumerate(TASKS)}
    for (task, length, method), row in sorted(rows.items(), key=lambda r: (order[r[0][0]], *r[0][1:])):
        shown = [row.get(budget, "") for budget in [0, *budgets]]
        lines.append(f"| {task} | {length} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(file: Path, cells: Sequence[Cell], budgets: Sequence[int]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    tasks = [task for task in TASKS if any(cell.task == task for cell in cells)]
    lengths = sorted({cell.length for cell in cells})
    figure = Figure(figsize=(3 * len(tasks) + 1, 2.2 * len(lengths) + 1), layout="constrained")
    grid = figure.subplots(len(lengths), len(tasks), sharex=True, sharey=True, squeeze=False)
    for (row, length), (column, task) in product(enumerate(lengths), enumerate(tasks)):
        axes = grid[row, column]
        here = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        for method, marker in zip(METHODS, "os^", strict=True):
            points = [(c.budget, 100 * c.right / c.asked) for c in here if c.method == method]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), f"{marker}-", label=method)
        dense = [100 * c.right / c.asked for c in here if c.method == DENSE]
        if dense:
            axes.axhline(min(dense), color="black", linestyle=":", label=DENSE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, map(str, budgets))
        axes.set_ylim(-5, 105)
        axes.set_title(f"{task}, {length // 1024}K")
    figure.supxlabel("tokens read for each KV head")
    figure.supylabel("questions answered rightly, %")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def report(cells: Sequence[Cell], args: argparse.Namespace, seconds: float) -> None:
    stem = args.out / f"needles-{datetime.date.today().isoformat()}"
    machine = describe()
    whole = {"machine": machine, "seconds": round(seconds), "dtype": args.dtype}
    stem.with_suffix(".json").write_text(
        json.dumps(whole | {"methods": METHODS, "cells": [asdict(cell) for cell in cells]}, indent=1) + "\n"
    )
    plot(stem.with_suffix(".png"), cells, args.budgets)
    lines = ["# Lookups in long contexts: accuracy against the tokens read", ""]
    lines += [
        "Of the questions in each cell this many in a hundred were answered rightly, by the tokens that an"
    ]
    lines += [f"answer's row reads for each KV head. {args.cases} questions a cell, {args.dtype}.", ""]
    lines += [table(cells, args.budgets), ""]
    said = "; ".join(f"{name}: {values}" for name, values in METHODS.items() if values)
    lines += [
        f"Settings beside the budget: {said}. TokenSelect's budgets count its sinks and local tokens; its"
    ]
    lines += [
        "prompts are sparse too, the others' are dense (their layer 0, Quest's layer 1 too, always).",
        "",
    ]
    lines += [
        f"In all {seconds / 60:.0f} minutes. Machine: {'; '.join(f'{k}: {v}' for k, v in machine.items())}"
    ]
    lines += ["", f"Command: `python bench/needles.py {' '.join(sys.argv[1:])}".rstrip() + "`", ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of lookups against the tokens read.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8 << i for i in range(8)])
    parser.add_argument("--cases", type=int, default=16, help="questions about each haystack")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    began = time.perf_counter()
    cells = run(args)
    report(cells, args, time.perf_counter() - began)


if __name__ == "__main__":
    main()
