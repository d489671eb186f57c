"""The seam kernel on one GPU by the number of SMs that it has, beside what the memory would allow.

    python bench/seam.py [--json FILE]

One rank alone (sum, residual and norm, nothing sent), beside torch.compile's residual add and norm and this
package's Triton kernel; and eight ranks as rows of one grid, whose traffic is that of the GPU's memory, not
NVLink's: what the rows in flight are good for shows, the speed of a link does not. Medians of graph replays
that go round several sets of buffers, in microseconds. (No GPU has run it yet.)
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.comm.cuda.world import World
from weaveinf.comm.symmetric import kernel
from weaveinf.ops import cuda
from weaveinf.ops.norm import Joint, add_rms_norm

HIDDEN = 8192
ROWS = (64, 256, 1024, 4096, 8192)
BLOCKS = (2, 4, 8, 16, 32)
DTYPE = torch.bfloat16
ROUNDS, COLD_BYTES = 20, 256 << 20


def microseconds(calls: list[Any]) -> float:
    """Of one of the calls, which are captured together, so that the caches hold none of their data."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / len(calls))
    return median(times)


def seam_us(launch: cuda.Kernel, ranks: int, rows: int, blocks: int) -> float:
    """rows: of all ranks together, each of which has its share."""
    row = HIDDEN * DTYPE.itemsize
    sets = max(1, COLD_BYTES // (3 * ranks * rows * row))
    worlds = [World(launch, (DTYPE, HIDDEN, ranks, rows, blocks), "cuda") for _ in range(sets)]
    weight = torch.ones(HIDDEN, dtype=DTYPE, device="cuda")
    for one in worlds:
        one.run([one.draw(rows, HIDDEN) for _ in range(ranks)], weight, fresh=True)
        one.call.fresh = 0
    took = microseconds([lambda one=one: one.launch(one.call, one.blocks, one.size) for one in worlds])
    if any(one.said[0] for one in worlds):
        raise SystemExit(f"a rank was missed: {ranks} ranks, {rows} rows, {blocks} blocks")
    return took


def others_us(rows: int) -> dict[str, float]:
    """Residual add and norm of all rows by others, on the whole GPU."""
    sets = max(1, COLD_BYTES // (3 * rows * HIDDEN * DTYPE.itemsize))
    drawn = [[torch.randn(rows, HIDDEN, device="cuda").to(DTYPE) for _ in range(3)] for _ in range(sets)]
    weight = torch.ones(HIDDEN, dtype=DTYPE, device="cuda")

    @torch.compile(dynamic=False)
    def compiled(sums: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = (sums.float() + residual.float()).to(DTYPE)
        f = total.float()
        return total, (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-5) * weight.float()).to(DTYPE)

    def triton(sums: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        add_rms_norm([sums], residual, Joint(weight, 1e-5), out)

    return {
        "torch.compile": microseconds([partial(compiled, *one[:2]) for one in drawn]),
        "triton": microseconds([partial(triton, *one) for one in drawn]),
    }


def copy_tb_per_s() -> float:
    """What a copy reads and writes."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    whole = properties.multi_processor_count
    copied = copy_tb_per_s()
    found: dict[str, Any] = {"gpu": properties.name, "sms": whole, "torch": torch.__version__}
    found["copy_tb_per_s"] = round(copied, 2)
    found["rows"] = []
    print(f"{properties.name}, {whole} SMs, torch {torch.__version__}, a copy moves {copied:.2f} TB/s")
    for ranks in (1, 8):
        launch, counts = kernel(DTYPE, HIDDEN, ranks), (*BLOCKS, whole) if ranks == 1 else BLOCKS[:4]
        for rows in ROWS:
            # A partial sum of every rank, the residual there and back, x to every rank.
            moved = (2 * ranks + 2) * rows * HIDDEN * DTYPE.itemsize
            cell: dict[str, Any] = {"ranks": ranks, "rows": rows, "floor_us": round(moved / copied / 1e6, 1)}
            cell["us_by_blocks"] = {
                blocks: round(seam_us(launch, ranks, rows, blocks), 1) for blocks in counts
            }
            if ranks == 1:
                cell["others_us"] = {name: round(us, 1) for name, us in others_us(rows).items()}
            found["rows"].append(cell)
            print(cell, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
