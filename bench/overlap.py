"""Woven beside plain over limited links, without a GPU: one rank on each of two hosts on one machine.

    sudo .venv/bin/python bench/overlap.py [--rates 1gbit 250mbit] [--tokens 256 512 1024 2048 4096]
        [--decode 8 32 128 512]

Runs `weaveinf bench overlap` on two network namespaces (bench/links.py says what that needs) and checks the
links' byte counters: the run fails unless they moved by what the steps must have sent. Writes
bench/results/overlap-DATE.md, .json and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from links import Hosts, torchrun, why_not
from machine import describe
from make_model import DIRECTORY, write

BENCH = Path(__file__).parent


Cells = list[dict[str, Any]]


def measure(rate: str, args: argparse.Namespace, trace: Path) -> tuple[Cells, Cells]:
    """The command's cells for one rate: prompts, and decode steps."""
    with Hosts(2, rate) as hosts, tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = ["-m", "weaveinf", "bench", "overlap", str(args.model.resolve()), "--json", file.name]
        command += ["--pairs", str(args.pairs), "--trace", str(trace), "--tokens", *map(str, args.tokens)]
        command += ["--decode", *map(str, args.decode)] if args.decode else []
        print(torchrun(hosts, 1, command, seconds=3000.0), end="", flush=True)
        found = json.loads(Path(file.name).read_text())
    cells: Cells = found.get("cells", [found])
    for cell in cells:
        if not 0.98 <= cell["sent_share"] <= 1.1:
            raise SystemExit(f"the link moved {cell['sent_share']:.2f} of the bytes that the steps must send")
    return cells, found.get("decode", [])


def decode_table(results: dict[str, Cells]) -> str:
    """A row for each rate and number of decode rows."""
    lines = ["| link | decode rows | plain ms | woven ms | gain | predicted | verdict |"]
    lines.append("| --- |" + " --- |" * 6)
    for rate, cells in results.items():
        for cell in cells:
            row = [rate, f"{cell['rows']}", f"{cell['plain_ms']:.1f}", f"{cell['woven_ms']:.1f}"]
            row += [f"{cell['gain']:.2f}x", f"{cell['predicted_gain']:.2f}x", cell["why"]]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def table(results: dict[str, Cells]) -> str:
    """A row for each rate and number of tokens."""
    lines = [
        "| link | tokens | plain ms | woven ms | gain | no comm. ms | comm. only ms | hidden | predicted ms |"
    ]
    lines.append("| --- |" + " --- |" * 8)
    for rate, cells in results.items():
        for cell in cells:
            row = [rate, f"{cell['tokens']}", *(f"{cell[k]:.0f}" for k in ("plain_ms", "woven_ms"))]
            row += [f"{cell['gain']:.2f}x", *(f"{cell[k]:.0f}" for k in ("no_comm_ms", "comm_only_ms"))]
            row += [f"{cell['hidden_share']:.0%}", f"{cell['predicted_ms']:.0f}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(file: Path, results: dict[str, Cells]) -> None:
    """Gain by tokens, a line for each rate, beside what could be gained at most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.add_subplot()
    for rate, cells in results.items():
        tokens = [cell["tokens"] for cell in cells]
        (line,) = axes.plot(tokens, [cell["gain"] for cell in cells], "o-", label=f"woven, {rate}")
        most = [cell["plain_ms"] / max(cell["no_comm_ms"], cell["comm_only_ms"]) for cell in cells]
        axes.plot(tokens, most, ":", color=line.get_color(), label=f"all hidden, {rate}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("times as fast as plain")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Woven beside plain over limited links.")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "250mbit"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--decode", type=int, nargs="*", default=[8, 32, 128, 512])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    args = parser.parse_args()
    if missing := why_not():
        raise SystemExit(f"skipped: {missing}")
    if not (args.model / "config.json").exists():
        write(args.model)
    stem = BENCH / "results" / f"overlap-{datetime.date.today().isoformat()}"
    results, decode = {}, {}
    for rate in args.rates:
        print(rate, flush=True)
        results[rate], decode[rate] = measure(rate, args, stem.with_name(f"{stem.name}-{rate}-trace.json"))
    machine = describe()
    command = f"python bench/overlap.py {' '.join(sys.argv[1:])}".strip()
    lines = ["# Woven beside plain over limited links", "", table(results), ""]
    lines += ["Plain: this engine whole, or with one all-reduce and a local norm at every joint, the faster."]
    lines += ["Hidden: of the smaller of what no communication, and what communication alone, would save."]
    lines += ["More than all where two seams under way use the link better than one after another.", ""]
    lines += [decode_table(decode), "", "Woven: cut in the middle; predicted: of the best cut.", ""]
    lines += ["Machine: " + "; ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    lines += [f"Command: `{command}`", ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    whole = {"command": command, "machine": machine, "rates": results, "decode": decode}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(stem.with_suffix(".png"), results)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
