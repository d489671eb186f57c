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
from retrieval_model import DIRECTORY, FILLERS, INDEX_TOP_K, KEYS, MARK, VALUES, write

from weaveinf import LLM, SamplingParams
from weaveinf.commands.calibrate import QUERIES, calibrate
from weaveinf.config import PAGE_SIZE

RESULTS = Path(__file__).parent / "results"
SINKS, LOCAL, BLOCK = 1, 3, 16
"""TokenSelect's and HISA's: small, so that what they choose decides even where it may be little."""
PLANES = 8
"""FASA's: a quarter, as in the paper, whose sets are of query heads."""


@dataclass(frozen=True)
class Method:
    """What a method is asked.

    settings: beside its budget. kind: the model. least: the smallest budget it can do with; forced: how much
    of it is not chosen. dense: whether prompts are computed dense, so that budgets share them. longest: the
    longest haystack, in tokens. percents: its budgets, where they are not of tokens.
    """

    settings: dict[str, Any]
    kind: str = "llama"
    least: int = 1
    forced: int = 0
    dense: bool = True
    longest: int = 1 << 20
    percents: tuple[int, ...] = ()


METHODS = {
    "quest": Method({"dense_below": 0}, least=2 * PAGE_SIZE),
    "fasa": Method({"planes": PLANES, "dense_below": 0}),
    "fasa, query heads": Method({"planes": PLANES, "dense_below": 0, "sets": "query_head"}),
    "tokenselect": Method(
        {"sinks": SINKS, "local": LOCAL, "dense_below": 0},
        least=SINKS + LOCAL + 1,
        forced=SINKS + LOCAL,
        dense=False,
    ),
    "hisa": Method({"block": BLOCK, "dense_below": 0}, "indexed", INDEX_TOP_K, dense=False, longest=1 << 16),
    "lazyllm": Method({}, "deep", dense=False, longest=1 << 14, percents=(2, 5, 10, 30, 50, 70)),
}
TABLE = "fasa.json"
STYLES = ("s-", "o-", "v-.", "^--", "D-", "x:")
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


def measure(llm: LLM, name: str, kind: str, length: int, args: argparse.Namespace) -> list[Run]:
    """A method's runs of one haystack; it reads all first, if only for others to share its pages."""
    found, method = make(kind, length, args.cases), METHODS[name]
    budgets = [budget for budget in method.percents or args.budgets if budget >= method.least]
    alike = [other for other in METHODS.values() if other.kind == method.kind and other.dense]
    runs = []
    for budget in [0] * (method.dense or not alike) + budgets:
        began = time.perf_counter()
        right, computed = ask(llm, found, budget - method.forced if budget else 0)
        seconds = time.perf_counter() - began
        runs.append(Run(kind, length, name, budget, right, round(seconds, 2), computed))
        print(f"{kind} {length} {name} {budget}: {right}, {seconds:.1f} s", flush=True)
    return runs


def calibration_text() -> list[int]:
    """A store, and keys of it: what the heads are for."""
    found = make("store", 4096, QUERIES)
    return [*found.tokens, *(question.key for question in found.questions)]


def settings(name: str, budgets: Sequence[int], path: Path) -> dict[str, Any]:
    """What a method's engine is told."""
    method = METHODS[name]
    found = {"name": name.split(",")[0]} | method.settings
    if found["name"] == "hisa":
        return found | {"blocks": max(budgets) // BLOCK}
    if found["name"] == "fasa":
        calibrate(str(path), calibration_text(), path / TABLE)
        found["table"] = str(path / TABLE)
    return found | {"budget": max(method.percents or budgets)}


def run(args: argparse.Namespace) -> list[Run]:
    runs = []
    for name in args.methods:
        method = METHODS[name]
        path = args.model if method.kind == "llama" else args.model / method.kind
        if not (path / "config.json").exists():
            write(path, kind=method.kind)
        lengths = [length for length in args.lengths if length <= method.longest]
        if not lengths:
            continue
        with LLM(
            str(path),
            dtype=args.dtype,
            selector=settings(name, args.budgets, path),
            max_model_len=max(lengths),
            max_num_seqs=32,
            # LazyLLM prunes a prompt that is one step's.
            **({"max_num_batched_tokens": max(lengths)} if method.percents else {}),
            show_progress=False,
        ) as llm:
            for length, kind in product(lengths, args.haystacks):
                runs += measure(llm, name, kind, length, args)
    return runs


Shares = dict[tuple[str, int, str], dict[int, float]]


def shares(runs: Sequence[Run], cases: int) -> Shares:
    """Percent of right answers by task, length and method, of each budget (0: all)."""
    found: Shares = {}
    for one in runs:
        for task, right in one.right.items():
            found.setdefault((task, one.length, one.method), {})[one.budget] = 100 * right / cases
    return dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][0]), *item[0][1:])))


def table(found: Shares, budgets: Sequence[int]) -> str:
    lines = ["| task | tokens | method | all | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * (len(budgets) + 3))
    for (task, length, method), row in found.items():
        if any(budget in row for budget in budgets):
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
        for (name, method), style in zip(METHODS.items(), STYLES, strict=True):
            row = found.get((task, length, name), {})
            read = [budget for budget in row if budget]
            # Of what a stage of LazyLLM reads, so much goes on to the next: three times.
            at = [length * (b / 100) ** 3 for b in read] if method.percents else read
            if read:
                axes.plot(at, [row[b] for b in read], style, label=name, markersize=4)
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
    whole |= {
        "cases": args.cases,
        "methods": {n: asdict(m) for n, m in METHODS.items()},
        "runs": [asdict(one) for one in runs],
    }
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(stem.with_suffix(".png"), found, args.budgets)
    named = {name: method for name, method in METHODS.items() if name in args.methods}
    told = "; ".join(f"{name}: {method.settings}" for name, method in named.items() if method.settings)
    percents = sorted({percent for method in named.values() for percent in method.percents})
    lazy = {key: row for key, row in found.items() if METHODS[key[2]].percents}
    others = {key: row for key, row in found.items() if key not in lazy}
    parts = [
        f"""# Lookups in long contexts: accuracy against the tokens read

Percent of the questions that were answered rightly, by the tokens that an answer's row reads for each KV head
(of `fasa, query heads`, the paper's variant, for each query head; of `hisa`, the tokens of the blocks that it
looks into); bench/needles.py says what the tasks are. {args.cases} questions a cell, {args.dtype}.""",
        table(others, args.budgets),
    ]
    if lazy:
        parts += [
            "LazyLLM, by the percent of the tokens that go on from each of its three stages to the next:",
            table(lazy, percents),
        ]
    parts += [
        f"""Settings beside the budget: {told}. TokenSelect's budgets count its sinks and local tokens; its
prompts and HISA's are sparse too, the others' are dense. Quest reads whole pages, the first and the last
among them. HISA and LazyLLM serve relatives of the model (bench/retrieval_model.py): `all` of HISA is the
indexer alone, which reads {INDEX_TOP_K} tokens. The models are made for it: a match stands out from all else
in its head, so that whoever ranks single tokens well finds it with few. What a trained model loses,
bench/perplexity.py shows on a small one.""",
        f"In all {seconds / 60:.0f} minutes. Machine: {'; '.join(f'{k}: {v}' for k, v in machine.items())}",
        f"Command: `{command}`",
    ]
    text = "\n\n".join(parts) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


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
