"""What every contender is asked to do, and how it says what it measured."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterator

CELLS = ((1, 128), (8, 128), (1, 1024))  # (batch, prompt tokens)
DECODE_TOKENS = 32
FIRST_ORDINARY_ID = 3  # below: unknown, begin and end of text

Run = Callable[[list[list[int]], int], list[float]]


def arguments(description: str) -> argparse.Namespace:
    """MODEL, --tp, --dtype; the same for every contender."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def asked() -> Iterator[tuple[int, int]]:
    """The cells that standard input asks for, a line each: "8 128" is a batch of 8 with 128 prompt tokens."""
    for line in sys.stdin:
        batch, length = map(int, line.split())
        yield batch, length


def serve(run: Run, vocab_size: int, cells: Iterator[tuple[int, int]], **about: object) -> None:
    """Says what it is on standard output, then times each cell it is asked for: one JSON line each.

    `run(prompts, tokens)` generates exactly `tokens` tokens for each prompt, greedily and past any end
    of text, and returns `tokens` + 1 times in seconds: when it began, and when the whole batch had its
    first, second, ... token. Prompts are fresh and random each time, so that no prefix cache helps. An
    untimed run of a few tokens goes first: the contender may have been stopped for a while.
    """
    source = random.Random(0)
    _say(about)
    for batch, length in cells:
        for tokens in (3, 1 + DECODE_TOKENS):
            prompts = [
                [source.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(length)] for _ in range(batch)
            ]
            times = run(prompts, tokens)
        prefill, decode = times[1] - times[0], (times[-1] - times[1]) / DECODE_TOKENS
        _say({"prefill_ms": round(1e3 * prefill, 3), "decode_ms": round(1e3 * decode, 3)})


def _say(what: dict[str, object]) -> None:
    """On a line of its own, whatever a library wrote before it; rank 0 speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print("\n" + json.dumps(what), flush=True)
