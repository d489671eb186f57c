"""Accuracy of long-context lookups against the tokens that a selector may read, for every method.

    python bench/needles.py [--lengths 4096 16384 65536 131072] [--budgets 8 16 32 64 ...] [--cases 16]

The model is bench/retrieval_model.py's, which is exact when it reads all. A haystack is filler with pairs of
a key and a value in it; a question is the last three tokens of a prompt, MARK key MARK, and the answer is the
key, then the value. The key is answered by the prompt's last row, the value by an answer's row, to which all
methods apply. There are three haystacks of each length, and five tasks:

    alone   single     a few lone pairs at all depths, each asked for in turn
    many    keys       pairs among hundreds of others
            values     keys that come four times, with a value each: the four likeliest tokens must be these
            majority   keys that come 32 times, 20 of them with the value that is right, 12 with another
    store   store      as many pairs as there are keys or room for: at 4096 tokens there is nothing else

All questions about a haystack share its pages, and so do all budgets where the prompt is computed dense. A
budget counts all tokens that a row reads for each KV head (for each query head where these have sets of their
own), so TokenSelect chooses fewer by its sinks and its local tokens.

Writes bench/results/needles-DATE.md, .json and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
LEAST = {"quest": 2 * PAGE_SIZE, "fasa": 1, "fasa, query heads": 1, "tokenselect": SINKS + LOCAL + 1}
"""The smallest budget that a method can do with."""
PLANES = 8
"""FASA's: a quarter, as in the paper, whose sets are of query heads."""
METHODS: dict[str, dict[str, Any]] = {
    "quest": {"dense_below": 0},
    "fasa": {"planes": PLANES, "dense_below": 0},
    "fasa, query heads": {"planes": PLANES, "dense_below": 0, "sets": "query_head"},
    "tokenselect": {"sinks": SINKS, "local": LOCAL, "dense_below": 0},
}
TABLE = "fasa.json"
OTHER_KEYS, MANY_VALUES, MAJORITY, MINORITY = 192, 4, 20, 12
QUESTION, ANSWER = 3, 2
"""Tokens behind a haystack."""
Pair = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """What is asked for, and the values that are the answer."""

    task: str
    key: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """Token ids, and what can be asked about them."""

    tokens: list[int]
    questions: list[Question]


def haystack(
    rng: np.random.Generator,
    length: int,
    pairs: Sequence[Pair],
    places: Iterable[int],
    questions: list[Question],
) -> Haystack:
    """Filler with each pair at its place (counted in pairs of tokens, behind the first token)."""
    tokens = rng.integers(FILLERS.start, FILLERS.stop, length)
    for pair, place in zip(pairs, places, strict=True):
        tokens[1 + 2 * place : 3 + 2 * place] = pair
    return Haystack(tokens.tolist(), questions)


def alone(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    """Lone pairs, one in each of as many equal stretches."""
    keys, values = rng.choice(KEYS, cases, replace=False).tolist(), rng.choice(VALUES, cases).tolist()
    places = ((np.arange(cases) + rng.random(cases)) * ((length - 1) // 2) / cases).astype(int)
    pairs = list(zip(keys, values, strict=True))
    questions = [Question("single", key, (value,)) for key, value in pairs]
    return haystack(rng, length, pairs, places.tolist(), questions)


def many(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    """Keys that come once, of which some are asked for, and keys that come often."""
    keys = iter(rng.choice(KEYS, OTHER_KEYS + 3 * cases, replace=False).tolist())
    pairs: list[Pair] = []
    questions = []
    for i in range(OTHER_KEYS + cases):
        pair = next(keys), int(rng.choice(VALUES))
        pairs.append(pair)
        if i < cases:
            questions.append(Question("keys", pair[0], pair[1:]))
    for _ in range(cases):
        key, values = next(keys), rng.choice(VALUES, MANY_VALUES, replace=False).tolist()
        pairs += [(key, value) for value in values]
        questions.append(Question("values", key, tuple(values)))
    for _ in range(cases):
        key, (first, second) = next(keys), rng.choice(VALUES, 2, replace=False).tolist()
        pairs += [(key, first)] * MAJORITY + [(key, second)] * MINORITY
        questions.append(Question("majority", key, (first,)))
    places = rng.choice((length - 1) // 2, len(pairs), replace=False)
    return haystack(rng, length, pairs, places.tolist(), questions)


def store(rng: np.random.Generator, length: int, cases: int) -> Haystack:
    """Pairs of all keys, or as many as there is room for."""
    room = (length - 1) // 2
    count = min(room, len(KEYS))
    keys, values = rng.choice(KEYS, count, replace=False).tolist(), rng.choice(VALUES, count).tolist()
    pairs = list(zip(keys, values, strict=True))
    questions = [Question("store", key, (value,)) for key, value in pairs[:cases]]
    return haystack(rng, length, pairs, rng.choice(room, count, replace=False).tolist(), questions)


HAYSTACKS: dict[str, Callable[[np.random.Generator, int, int], Haystack]] = {
    "alone": alone,
    "many": many,
    "store": store,
}
TASKS = ("single", "keys", "values", "majority", "store")


def make(kind: str, length: int, cases: int) -> Haystack:
    """A haystack so long that prompt and answer are of `length` tokens together, `cases` questions a task."""
    rng = np.random.default_rng([length, list(HAYSTACKS).index(kind)])
    return HAYSTACKS[kind](rng, length - QUESTION - ANSWER, cases)


@dataclass
class Run:
    """All questions about a haystack under one budget (0: reading all); `right`: how many of each task."""

    haystack: str
    length: int
    method: str
    budget: int
    right: dict[str, int]
    seconds: float
    computed: int
    """Prompt tokens that were not in the cache."""


def requests(found: Haystack, budget: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """A prompt for each question, and what else is to be said."""
    prompts = [[*found.tokens, MARK, question.key, MARK] for question in found.questions]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            logprobs=len(question.values),
            ignore_eos=True,
            selector_budget=budget,
        )
        for question in found.questions
    ]
    return prompts, params


def is_right(question: Question, token_ids: Sequence[int], likeliest: Sequence[int]) -> bool:
    """Whether these tokens, of which the last was one of so many likeliest, are the answer."""
    return token_ids[0] == question.key and set(likeliest) == set(question.values)


def ask(llm: LLM, found: Haystack, budget: int) -> tuple[dict[str, int], int]:
    """How many questions of each task are answered rightly; how many prompt tokens were computed for it."""
    scheduler = llm.engine.scheduler
    before = scheduler.num_prefix_queried - scheduler.num_prefix_hit
    outputs = llm.generate(*requests(found, budget), show_progress=False)
    right = {question.task: 0 for question in found.questions}
    for question, output in zip(found.questions, outputs, strict=True):
        assert output.logprobs is not None
        right[question.task] += is_right(question, output.token_ids, output.logprobs[-1].top_ids)
    return right, scheduler.num_prefix_queried - scheduler.num_prefix_hit - before


def measure(llm: LLM, method: str, kind: str, length: int, args: argparse.Namespace) -> list[Run]:
    """A method's runs of one haystack. One for answers only reads all first; its pages serve all budgets."""
    found = make(kind, length, args.cases)
    forced = SINKS + LOCAL if method == "tokenselect" else 0
    budgets = [budget for budget in args.budgets if budget >= LEAST[method]]
    runs = []
    for budget in [0] * (method != "tokenselect") + budgets:
        began = time.perf_counter()
        right, computed = ask(llm, found, budget - forced if budget else 0)
        seconds = time.perf_counter() - began
        name = method if budget else DENSE
        runs.append(Run(kind, length, name, budget, right, round(seconds, 2), computed))
        print(f"{kind} {length} {method} {budget}: {right}, {seconds:.1f} s", flush=True)
    return runs


def calibration_text() -> list[int]:
    """A store, and keys of it: what the heads are for."""
    found = make("store", 4096, QUERIES)
    return [*found.tokens, *(question.key for question in found.questions)]


def named(method: str) -> dict[str, Any]:
    """A method's settings, but for its budget and its table."""
    return {"name": method.split(",")[0]} | METHODS[method]


def run(args: argparse.Namespace) -> list[Run]:
    if not (args.model / "config.json").exists():
        write(args.model)
    runs = []
    for method in args.methods:
        settings = named(method) | {"budget": max(args.budgets)}
        if settings["name"] == "fasa":
            calibrate(str(args.model), calibration_text(), args.model / TABLE)
            settings["table"] = str(args.model / TABLE)
        with LLM(
            str(args.model),
            dtype=args.dtype,
            selector=settings,
            max_model_len=max(args.lengths),
            max_num_seqs=32,
            show_progress=False,
        ) as llm:
            for length, kind in product(args.lengths, args.haystacks):
                runs += measure(llm, method, kind, length, args)
    return runs


Shares = dict[tuple[str, int, str], dict[int, float]]


def shares(runs: Sequence[Run], cases: int) -> Shares:
    """Percent of right answers by task, length and method, of each budget; the worse of two dense engines."""
    found: Shares = {}
    for one in runs:
        for task, right in one.right.items():
            row = found.setdefault((task, one.length, one.method), {})
            row[one.budget] = min(100 * right / cases, row.get(one.budget, 100.0))
    return dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][0]), *item[0][1:])))


def table(found: Shares, budgets: Sequence[int]) -> str:
    lines = ["| task | tokens | method | all | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * (len(budgets) + 3))
    for (task, length, method), row in found.items():
        cells = [f"{row[budget]:.0f}" if budget in row else "" for budget in [0, *budgets]]
        lines.append(f"| {task} | {length} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(file: Path, found: Shares, budgets: Sequence[int]) -> None:
    """A panel for each task and length."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    lengths = sorted({length for _, length, _ in found})
    figure = Figure(figsize=(2.6 * len(tasks) + 1, 1.9 * len(lengths) + 1), layout="constrained")
    grid = figure.subplots(len(lengths), len(tasks), sharex=True, sharey=True, squeeze=False)
    for (i, length), (j, task) in product(enumerate(lengths), enumerate(tasks)):
        axes = grid[i, j]
        for method, style in zip([DENSE, *METHODS], ["k:", "s-", "o-", "v-.", "^--"], strict=True):
            row = found.get((task, length, method), {})
            if method == DENSE and row:
                axes.axhline(row[0], color="black", linestyle=":", label=DENSE)
            elif row:
                axes.plot(list(row), list(row.values()), style, label=method, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, map(str, budgets), fontsize="x-small")
        axes.set_ylim(-5, 105)
        axes.set_title(f"{task}, {length // 1024}K", fontsize="medium")
    figure.supxlabel("tokens read for each KV head")
    figure.supylabel("questions answered rightly, %")
    grid[0, 0].legend(fontsize="x-small")
    figure.savefig(file, dpi=110)


def report(runs: Sequence[Run], args: argparse.Namespace, seconds: float) -> None:
    stem = args.out / f"needles-{datetime.date.today().isoformat()}"
    machine, found = describe(), shares(runs, args.cases)
    command = f"python bench/needles.py {shlex.join(sys.argv[1:])}".strip()
    whole = {"command": command, "machine": machine, "seconds": round(seconds), "dtype": args.dtype}
    whole |= {"cases": args.cases, "methods": METHODS, "runs": [asdict(one) for one in runs]}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(stem.with_suffix(".png"), found, args.budgets)
    settings = "; ".join(f"{name}: {values}" for name, values in METHODS.items() if values)
    lines = ["# Lookups in long contexts: accuracy against the tokens read", ""]
    lines += [
        "Percent of the questions that were answered rightly, by the tokens that an answer's row reads for"
    ]
    lines += ["each KV head (of `fasa, query heads`, the paper's variant, for each query head);"]
    lines += [f"bench/needles.py says what the tasks are. {args.cases} questions a cell, {args.dtype}.", ""]
    lines += [table(found, args.budgets), ""]
    lines += [f"Settings beside the budget: {settings}. TokenSelect's budgets count its sinks and local"]
    lines += [
        "tokens, and its prompts are sparse too; the others' are dense. Quest reads whole pages, the first"
    ]
    lines += [
        "and the last among them. The model is made for it: a match stands out from all else in its head,"
    ]
    lines += [
        "so that whoever ranks single tokens well finds it with few. What a trained model loses, bench/"
    ]
    lines += ["perplexity.py shows on a small one.", ""]
    lines += [
        f"In all {seconds / 60:.0f} minutes. Machine: {'; '.join(f'{k}: {v}' for k, v in machine.items())}"
    ]
    lines += ["", f"Command: `{command}`", ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of lookups against the tokens read.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8 << i for i in range(8)])
    parser.add_argument("--cases", type=int, default=16, help="questions of each task about a haystack")
    parser.add_argument("--haystacks", nargs="+", choices=HAYSTACKS, default=list(HAYSTACKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    began = time.perf_counter()
    runs = run(args)
    report(runs, args, time.perf_counter() - began)


if __name__ == "__main__":
    main()
