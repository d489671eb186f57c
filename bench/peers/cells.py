"""What every peer is asked to do, and how it says what it measured."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator

CELLS = ((1, 128), (8, 128), (1, 1024))  # (batch, prompt tokens)
DECODE_TOKENS = 32
FIRST_ORDINARY_ID = 3  # below: unknown, begin and end of text


def arguments(description: str) -> argparse.Namespace:
    """MODEL, --tp, --dtype, --repeats; the same for every peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each cell")
    return parser.parse_args()


def measure(
    run: Callable[[list[list[int]], int], list[float]], vocab_size: int, repeats: int
) -> Iterator[dict[str, float]]:
    """Times every cell, on fresh random prompts each time so that no prefix cache helps.

    `run(prompts, tokens)` generates exactly `tokens` tokens for each prompt, greedily and past any end
    of text, and returns `tokens` + 1 times in seconds: when it began, and when the whole batch had its
    first, second, ... token. One untimed run precedes the timed ones.
    """
    source = random.Random(0)
    for batch, length in CELLS:
        prefill, decode = [], []
        for repeat in range(repeats + 1):
            prompts = [
                [source.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(length)] for _ in range(batch)
            ]
            times = run(prompts, 1 + DECODE_TOKENS)
            if repeat > 0:
                prefill.append(times[1] - times[0])
                decode.append((times[-1] - times[1]) / DECODE_TOKENS)
        yield {
            "batch": batch,
            "prompt_tokens": length,
            "decode_tokens": DECODE_TOKENS,
            "prefill_ms": round(1e3 * statistics.median(prefill), 3),
            "decode_ms": round(1e3 * statistics.median(decode), 3),
        }


def report(cell: dict[str, float], **about: object) -> None:
    """Prints one cell as one JSON line, on a line of its own."""
    print("\n" + json.dumps({**about, **cell}), flush=True)
