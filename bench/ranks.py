"""The seam that these ranks use: whether it is right, then how fast it is, beside an all-reduce and a norm.

    torchrun --nproc-per-node N bench/ranks.py [--hidden 8192] [--rows 64 1024 8192] [--json FILE]

On GPUs or on CPU cores, on one host or several. Every pass is checked against float64 on every rank, and
must leave the same bits on all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from weaveinf.cluster.launch import torchrun_s_store
from weaveinf.comm.choose import make_seam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.commands.overlap import AllReduceSeam
from weaveinf.config import EngineConfig

REPEATS = 20
_MOST_CHECKED = 1000  # rows
START_S = 120.0


def check(ranks: Ranks, seam: Seam, hidden: int, most: int, dtype: torch.dtype) -> int:
    """Passes of odd and even rows, of which some are dropped; how many. RuntimeError where one is wrong."""
    unit = torch.finfo(dtype).eps
    random = torch.Generator().manual_seed(hidden)
    passes = 0

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    most = min(most, _MOST_CHECKED)
    for rows in sorted(n for n in {0, 1, 3, ranks.size, 37, most - 1, most} if n <= most):
        seam.open(rows)
        residual = torch.zeros(rows, hidden, dtype=torch.float64)
        for turn, ctas in enumerate([*seam.ctas, 0, 0]):
            kept = torch.arange(0, len(residual), 2) if turn == 1 and rows > 3 else None
            residual = residual if kept is None else residual[kept]
            weight, parts = 1 + draw(hidden), [draw(len(residual), hidden) for _ in range(ranks.size)]
            out = seam.partial()
            out.fill_(torch.nan)
            out[: len(residual)] = parts[ranks.rank].to(ranks.device)
            joint = Joint(weight.to(ranks.device), 1e-5, 0.5, 0.75)
            seam.start(joint, kept if kept is None else kept.to(ranks.device), ctas)
            x = seam.finish().cpu()
            residual = residual + 0.75 * torch.stack(parts).double().sum(0)
            want = (
                residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 0.5)
            )
            # One rounding of the residual (two where a switch rounds the sum) and one of x, a turn each.
            bound = 3 * (turn + 1) * unit * (1 + want.abs() + weight.abs().max().double())
            digest = hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            right = bool(((x.double() - want).abs() <= bound).all())  # also of what is no number
            if len(set(ranks.agree(digest))) > 1 or not right:
                raise RuntimeError(f"wrong: {rows} rows of {hidden} {dtype}, pass {turn}, {ctas} CTAs")
            passes += 1
    return passes


def microseconds(ranks: Ranks, seam: Seam, rows: int, joint: Joint, ctas: int) -> float:
    """Of a sum, one behind another."""
    seam.open(rows)

    def some(count: int) -> float:
        ranks.votes.sum(torch.zeros(1, device=ranks.device))
        settle(ranks)
        began = time.perf_counter()
        for _ in range(count):
            seam.start(joint, None, ctas)
            seam.finish()
        settle(ranks)
        return (time.perf_counter() - began) * 1e6 / count

    some(3)
    return median(some(REPEATS) for _ in range(5))


def settle(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def measure(ranks: Ranks, hidden: int, most_rows: list[int], dtype: torch.dtype) -> dict[str, Any]:
    most = max(most_rows)
    seam = make_seam(ranks, most, hidden, dtype)
    plain = AllReduceSeam(ranks, most, hidden, dtype)
    say: Callable[..., None] = print if ranks.rank == 0 else lambda *_, **__: None
    passes = check(ranks, seam, hidden, most, dtype)
    say(f"{ranks.size} ranks, seam: {seam.name} ({seam.why}), {dtype}: {passes} passes are right", flush=True)
    joint = Joint(torch.ones(hidden, dtype=dtype, device=ranks.device), 1e-5)
    cells = []
    for rows in most_rows:
        cell: dict[str, Any] = {"rows": rows, "all_reduce_us": microseconds(ranks, plain, rows, joint, 0)}
        cell["seam_us_by_ctas"] = {n: microseconds(ranks, seam, rows, joint, n) for n in seam.ctas}
        cells.append(cell)
        by_ctas = ", ".join(f"{us:.1f} ({n or 'its own'} CTAs)" for n, us in cell["seam_us_by_ctas"].items())
        say(f"{rows} rows: all-reduce and norm {cell['all_reduce_us']:.1f} us, seam {by_ctas}", flush=True)
    seam.close()
    return {"dtype": str(dtype), "seam": seam.name, "why": seam.why, "passes": passes, "cells": cells}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1024, 8192])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    store, rank, size = torchrun_s_store()
    ranks = Ranks.join(rank, size, store, EngineConfig(model=".").torch_device, START_S)
    try:
        dtypes = torch.float32, torch.bfloat16
        found = [measure(ranks, args.hidden, args.rows, dtype) for dtype in dtypes]
        if rank == 0 and args.json:
            about = {"ranks": size, "hidden": args.hidden, "torch": torch.__version__}
            Path(args.json).write_text(json.dumps(about | {"seams": found}, indent=1) + "\n")
        ranks.agree("done")
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
