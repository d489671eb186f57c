"""Plots what `weaveinf bench selectors --json FILE` measured: how many times as fast as dense, by context.

python bench/plot_selectors.py FILE.json [OUT.png]       (matplotlib; default OUT: FILE.png)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def plot(file: Path, out: Path) -> None:
    about = json.loads(file.read_text())
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in about["rows"]:
        method: str = row["method"]
        if method.startswith("dense") or method == "index, flat":
            continue
        against = "the flat index scan" if method == "index, hisa" else "dense"
        what = (
            "512 rows of a prompt" if method.endswith("of a prompt") else f"an answer's row, beside {against}"
        )
        name = method.removesuffix(", 512 of a prompt").removeprefix("index, ")
        panels.setdefault(what, {}).setdefault(name, {})[row["tokens"]] = row["times_dense"]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (what, methods) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in methods.items():
            axes.plot(list(points), list(points.values()), "o-", label=name, markersize=4)
        tokens = sorted({at for points in methods.values() for at in points})
        axes.axhline(1, color="black", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(tokens, [f"{at / 1024:g}K" for at in tokens], fontsize="x-small")
        axes.set_title(what, fontsize="medium")
        axes.legend(fontsize="x-small")
    figure.supxlabel("cached tokens")
    figure.supylabel("times as fast")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot what selectors save.")
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    args = parser.parse_args()
    plot(args.file, args.out or args.file.with_suffix(".png"))


if __name__ == "__main__":
    main()
