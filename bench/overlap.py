"""Woven beside plain over limited links, without a GPU: one rank on each of two hosts on one machine.

    sudo .venv/bin/python bench/overlap.py [--rates 1gbit 250mbit] [--tokens 256 512 1024 2048 4096]

Runs `weaveinf bench overlap` on two network namespaces (bench/links.py says what that needs) and checks the
links' byte counters: the run fails unless they moved by what the steps must have sent. Writes
bench/results/overlap-DATE.md, .json and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from links import Hosts, torchrun, why_not
from machine import describe
from make_model import DIRECTORY, write

BENCH = Path(__file__).parent


def measure(rate: str, tokens: list[int], pairs: int, model: Path) -> dict[str, object]:
    """The command's JSON, and how many bytes left the first host."""
    with Hosts(2, rate) as hosts, tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = ["-m", "weaveinf", "bench", "overlap", str(model), "--max-num-batched-tokens"]
        command += [str(max(2048, *tokens)), "--pairs", str(pairs), "--json", file.name]
        command += ["--tokens", *map(str, tokens)]
        print(torchrun(hosts, 1, command, seconds=3000.0), end="", flush=True)
        found: dict[str, object] = json.loads(Path(file.name).read_text())
        found["bytes_out"] = hosts.bytes_out(0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Woven beside plain over limited links.")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "250mbit"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    args = parser.parse_args()
    if missing := why_not():
        raise SystemExit(f"skipped: {missing}")
    if not (args.model / "config.json").exists():
        write(args.model)
    for rate in args.rates:
        print(rate)
        measure(rate, args.tokens, args.pairs, args.model.resolve())


if __name__ == "__main__":
    main()
