"""Perplexity of the demo model's answers against the tokens that a selector may read, for every method.

    python bench/perplexity.py [--context 512] [--prompt 256] [--budgets 32 64 128 256] [--windows 24]

The text is what bench/demo_model held out from training. The first `--prompt` tokens of a window are a
prompt, which the prompt's rule serves (dense but for TokenSelect). Each later one is fed as an answer's token
would be, one a step, whatever the model would have said (teacher forcing), and its likelihood is counted. So
the rows that count are decode rows by the method's own rule, with all that goes along (as TokenSelect's cache
of choices), over keys and values that the method has written. `prompt_logprobs` would measure prompts.

A budget counts all tokens that a row reads for each KV head (for each query head where these have sets of
their own), TokenSelect's sinks and local tokens too. Writes bench/results/perplexity-DATE.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from numpy.typing import NDArray

from weaveinf import LLM
from weaveinf.commands.calibrate import calibrate
from weaveinf.config import PAGE_SIZE
from weaveinf.engine.step import Admission, Step, StepOutput

BENCH = Path(__file__).parent
DEMO = BENCH.parent / "weaveinf" / "assets" / "demo"
SINKS, LOCAL = 4, 12
ALWAYS = {"dense_below": 0}
METHODS: dict[str, dict[str, Any]] = {
    "quest": ALWAYS,
    "quest, all layers": ALWAYS | {"dense_layers": 0},
    "fasa": ALWAYS | {"planes": 4},
    "fasa, query heads": ALWAYS | {"planes": 4, "sets": "query_head"},
    "tokenselect": ALWAYS | {"sinks": SINKS, "local": LOCAL},
    "tokenselect, no cache": ALWAYS | {"sinks": SINKS, "local": LOCAL, "threshold": 2.0},
    "tokenselect, compacted": {"sinks": SINKS, "local": LOCAL, "positions": "compacted"},
}
"""FASA's planes are a quarter of a head's, as in the paper, whose sets are of query heads. Quest leaves two
of four layers dense."""
CHUNK = 512
"""Tokens of a prompt in one step: TokenSelect cuts only where its chunks end."""


def held_out(count: int, length: int) -> NDArray[np.int64]:
    """Windows of the text that the demo model has not learnt, evenly spread: int64 [count, length]."""
    sys.path.insert(0, str(BENCH / "demo_model"))
    import corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = [document.text for document in corpus.documents() if document.held_out]
    stream: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.convert_tokens_to_ids(corpus.END)]
    if len(stream) < length:
        raise SystemExit(f"there are {len(stream)} held-out tokens, fewer than a context")
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return np.array([stream[start : start + length] for start in starts])


class Forcing:
    """Windows of a text run through an engine's rank side by side, in steps described here.

    The engine's scheduler feeds back what was sampled; steps made by hand may hold any tokens.
    """

    def __init__(self, llm: LLM, windows: NDArray[np.int64], prompt: int, budget: int) -> None:
        self._worker = llm.engine.executor.worker
        self._windows, self._prompt = windows, prompt
        self._pages = -(-windows.shape[1] // PAGE_SIZE)
        count = len(windows)
        self._admissions = [
            Admission(slot, prompt_logprobs=0, selector_budget=budget) for slot in range(count)
        ]
        self._held = 0
        self._number = 0

    def loss(self) -> float:
        """Mean negative log-likelihood of the tokens behind the prompts, in nats."""
        length = self._windows.shape[1]
        for start in range(0, self._prompt, CHUNK):
            for window in range(len(self._windows)):
                self._run([window], start, min(start + CHUNK, self._prompt), scored=False)
        total = 0.0
        everyone = range(len(self._windows))
        for at in range(self._prompt, length - 1):
            output = self._run(everyone, at, at + 1, scored=True)
            assert output.prompt_logprobs is not None
            for found in output.prompt_logprobs:
                assert found is not None and found[0] is not None
                total -= found[0].logprob
        return total / (len(self._windows) * (length - 1 - self._prompt))

    def _run(self, windows: Sequence[int], start: int, end: int, scored: bool) -> StepOutput:
        """Tokens start to end of some windows; with the likelihood of the token behind each if `scored`."""
        count = len(windows)
        pages = [
            window * self._pages + page
            for window in windows
            for page in range(-(-start // PAGE_SIZE), -(-end // PAGE_SIZE))
        ]
        tokens = self._windows[list(windows)]
        targets = tokens[:, start + 1 : end + 1].ravel() if scored else np.empty(0, np.int64)

        def each(value: int) -> NDArray[np.int32]:
            return np.full(count, value, np.int32)

        step = Step(
            number=self._number,
            admissions=[self._admissions[window] for window in windows] if start == 0 else [],
            state_slot=np.array(windows, np.int32),
            num_computed=each(start),
            num_query=each(end - start),
            num_prompt_tokens=each(self._prompt),
            num_logits=each(end - start if scored else 0),
            num_targets=each(end - start if scored else 0),
            num_new_pages=each(len(pages) // count),
            output_position=each(-1),
            by_reference=np.zeros(count, np.bool_),
            token_ids=tokens[:, start:end].ravel(),
            new_pages=np.array(pages, np.int64),
            targets=targets,
        )
        self._number += 1
        return self._worker.execute(step)


def measure(
    settings: dict[str, Any], windows: NDArray[np.int64], args: argparse.Namespace
) -> dict[int, float]:
    """A method's perplexity by budget, 0 for one that reads all."""
    forced = settings.get("sinks", 0) + settings.get("local", 0)
    found = {}
    with LLM(
        str(DEMO),
        dtype="float32",
        selector=settings | {"budget": max(args.budgets)},
        max_num_seqs=args.windows,
        show_progress=False,
    ) as llm:
        for budget in [0, *args.budgets]:
            loss = Forcing(llm, windows, args.prompt, budget - forced if budget else 0).loss()
            found[budget] = math.exp(loss)
            print(f"{settings}, {budget}: {found[budget]:.3f}", flush=True)
    return found


def table(found: dict[str, dict[int, float]], budgets: Sequence[int]) -> str:
    lines = ["| method | all | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- |" + " --- |" * (len(budgets) + 1))
    for method, by_budget in found.items():
        dense = by_budget[0]
        cells = [f"{by_budget[budget]:.2f} ({by_budget[budget] / dense - 1:+.1%})" for budget in budgets]
        lines.append(f"| {method} | {dense:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(found: dict[str, dict[int, float]], args: argparse.Namespace) -> None:
    stem = args.out / f"perplexity-{datetime.date.today().isoformat()}"
    machine = describe()
    scored = args.windows * (args.context - 1 - args.prompt)
    lines = ["# Perplexity of the demo model's answers against the tokens read", ""]
    lines += [table(found, args.budgets), ""]
    lines += [
        f"{args.windows} windows of {args.context} held-out tokens. The first {args.prompt} of each are"
    ]
    lines += [f"its prompt, by the prompt's rule; counted are the {scored} behind them, fed one a step as an"]
    lines += [
        "answer's tokens, each row by the answer's rule over a cache that the method wrote. In brackets:"
    ]
    lines += [
        "against all tokens read. Budgets are of all tokens that a row reads for each KV head, TokenSelect's"
    ]
    lines += ["sinks and local ones too; of `fasa, query heads`, the paper's variant, for each query head."]
    lines += ["The model was trained on contexts of 512 tokens. float32.", ""]
    said = "; ".join(f"{name}: {METHODS[name]}" for name in args.methods if METHODS[name])
    lines += [f"Settings beside the budget: {said}.", ""]
    lines += ["Machine: " + "; ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    command = f"python bench/perplexity.py {shlex.join(sys.argv[1:])}".strip()
    lines += [f"Command: `{command}`", ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    whole = {"command": command, "machine": machine, "methods": METHODS, "perplexity": found}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of answers against the tokens read.")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=BENCH / "results")
    args = parser.parse_args()
    # The window behind the measured ones is what FASA is calibrated on.
    *measured, other = held_out(args.windows + 1, args.context)
    with tempfile.TemporaryDirectory() as folder:
        planes = Path(folder) / "fasa.json"
        calibrate(str(DEMO), other.tolist(), planes)
        found = {}
        for method in args.methods:
            settings = {"name": method.split(",")[0]} | METHODS[method]
            if settings["name"] == "fasa":
                settings["table"] = str(planes)
            found[method] = measure(settings, np.array(measured), args)
    report(found, args)


if __name__ == "__main__":
    main()
