"""One GPU does what rank 0 of eight would: weaving beside the same steps whole. No measurement of eight GPUs.

    python bench/emulate.py MODEL [--tokens N ...] [--pairs N] [--json FILE]

MODEL is a directory with a config.json, as those in bench/shapes; weights are random.
Blocks have the true shapes of a rank's shard. A seam runs csrc/cuda/seam.cu for rank 0's rows on N ranks'
buffers, which all lie in this GPU's memory: they are read and written as often as rank 0's own memory would
be by its peers. Then its CTAs wait until the time is over that 8 H100 needed for as many bytes with as many
CTAs, and that the bytes need on the link. That time was published of a seam alone: what a block beside it
costs a real one on the links is not in it. What is computed means nothing: the others' sums are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.comm.symmetric import ALONE, Call, Memory, SymmetricSeam
from weaveinf.config import PAGE_SIZE
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import load_model
from weaveinf.ops import cuda
from weaveinf.weave.plan import Planner
from weaveinf.weave.rehearsal import rehearsal
from weaveinf.weave.run import run as run_chain
from weaveinf.weave.waves import GPUS, GpuCosts

RANKS = 8
# Microseconds of 8 H100 by rows of 16 KiB (arXiv 2505.11329, its artifact's figures 4 and 10).
_ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_MULTIMEM = (16.5, 20.2, 28.1, 43.7, 74.8, 135.9, 257.2, 500.2, 986.0, 1956.6)
_NCCL = (36.0, 54.9, 66.5, 94.7, 137.2, 219.7, 347.6, 646.1, 1232.0, 2402.5)
_FUSED = {
    2: (23.3, 36.8, 61.2, 110.0, 207.8, 403.1, 792.8, 1571.1, 3125.4, 6240.8),
    4: (18.7, 27.2, 42.0, 70.8, 128.0, 240.4, 465.9, 913.8, 1797.9, 3558.4),
    8: (18.3, 23.1, 33.7, 51.3, 86.6, 155.4, 290.8, 561.7, 1103.0, 2184.0),
    16: (17.1, 22.0, 30.1, 45.1, 75.4, 137.1, 258.2, 503.5, 1004.3, 1972.1),
}
_ROW_BYTES = 16384
_LINK = GPUS["h100"].link


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="of the prompts (512)")
    parser.add_argument("--pairs", type=int, default=15, help="rounds, of which medians count (15)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if min(*args.tokens, 2) < 2 or args.pairs < 1:
        parser.error("--tokens must be at least 2, --pairs at least 1")
    if objection := cuda.objection() if torch.cuda.is_available() else "there is none":
        parser.error(f"this runs the seam of a GPU: {objection}")
    bench = Emulation(Path(args.model), RANKS, max(args.tokens), torch.device("cuda", 0))
    cells = []
    for tokens in args.tokens:
        cells.append(bench.cell(tokens, args.pairs))
        print(_TEXT.format(size=RANKS, **cells[-1]), flush=True)
    if args.json:
        about = {"model": args.model, "emulated_ranks": RANKS, "gpu": torch.cuda.get_device_name(0)}
        about |= {"torch": torch.__version__, "pairs": args.pairs, "cells": cells}
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")


_TEXT = (
    "{tokens} tokens, {size} ranks emulated: plain {plain_ms:.2f} ms (over NCCL {nccl_ms:.2f}), fused "
    "{fused_ms:.2f}, woven {woven_ms:.2f} (cut at {cut}, CTAs {ctas}), no communication {no_comm_ms:.2f}; "
    "plain / woven {gain:.2f}x"
)


def published_us(table: Sequence[float], nbytes: float) -> float:
    """Between what was published, in proportion beyond."""
    rows = nbytes / _ROW_BYTES
    return float(np.interp(rows, _ROWS, table)) * max(1.0, rows / _ROWS[-1])


class _PacedKernel:
    """In the place of a seam's kernel: takes as long as on other GPUs, at least."""

    def __init__(self, kernel: Callable[[Call, int], None], size: int, row_bytes: int) -> None:
        self._kernel, self._size, self._row_bytes = kernel, size, row_bytes

    def __call__(self, call: Call, blocks: int) -> None:
        nbytes = call.rows * self._row_bytes
        link = nbytes * (1 + 1 / self._size) / _LINK
        call.lasts_ns = int(1e3 * max(published_us(_FUSED[blocks], nbytes), link))
        self._kernel(call, blocks)


class EmulatedSeam(SymmetricSeam):
    """Rank 0's, whose peers are always there already."""

    def __init__(self, ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(ranks, max_rows, hidden, dtype, _alone)
        pads = self._memory.buffers[0][self._at["pads"] :].view(torch.int32)
        pads.fill_(1 << 30)  # as if all had come a billion times
        self._view("x", max_rows).normal_()  # the rows that peers would write: a mixture spreads them
        self.unpaced = self.kernel
        self.kernel = _PacedKernel(self.unpaced, ranks.size, hidden * dtype.itemsize)

    def pause(self, us: float) -> None:
        """A launch without rows that takes so long."""
        call = Call.from_buffer_copy(self._call)
        call.lasts_ns = int(1e3 * us)
        self.unpaced(call, ALONE)


def _alone(ranks: Ranks, nbytes: int) -> Memory:
    buffers = torch.zeros(ranks.size, nbytes, dtype=torch.uint8, device=ranks.device)
    return Memory(list(buffers), 0)


class PacedAllReduce(LocalSeam):
    """An all-reduce of other GPUs' speed, by the kernel of `seam`, then this package's norm of all rows."""

    def __init__(self, table: Sequence[float], seam: EmulatedSeam, max_rows: int, hidden: int) -> None:
        super().__init__(max_rows, hidden, seam.partial().dtype, seam.partial().device)
        self._table, self._seam = table, seam

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`."""
        rows = self.partial()[: len(kept)] if kept is not None else self.partial()
        self._seam.pause(published_us(self._table, rows.nbytes))
        super().start(joint, kept)


@dataclass
class Emulation:
    """Rank 0 of `size` with random weights, for prompts of up to `most` tokens."""

    path: Path
    size: int
    most: int
    device: torch.device

    @torch.inference_mode()
    def __post_init__(self) -> None:
        self.config = config = ModelConfig.from_path(self.path)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_model(self.path, config, 0, self.size, self.device, dtype, load_format="dummy")
        pages = -(-self.most // PAGE_SIZE)
        self.model.bind(Pools(self.model.pool_specs, pages, PAGE_SIZE, self.device))
        self.ranks = Ranks(0, self.size, self.device)
        sizes = self.most, config.hidden_size, dtype
        self.seams = [EmulatedSeam(self.ranks, *sizes) for _ in range(2)]
        self.alone = LocalSeam(*sizes, self.device)
        self.plain = PacedAllReduce(_MULTIMEM, self.seams[0], *sizes[:2])
        self.nccl = PacedAllReduce(_NCCL, self.seams[0], *sizes[:2])
        self.planner = Planner(GpuCosts(config, self.size, GPUS["h200"]))

    @torch.inference_mode()
    def cell(self, tokens: int, pairs: int) -> dict[str, Any]:
        """Medians over `pairs` rounds of all variants of a prompt; on CUDA all are graphs."""
        batch = rehearsal(tokens, 0, self.most, self.config.vocab_size)
        # What the planner would rather run whole is cut in the middle: how much that costs is worth knowing.
        plan = self.planner.plan(tokens, tokens**2 / 2, tokens**2 / 8)
        cut, ctas = (plan.cut, plan.seam_ctas) if plan.cut else (tokens // 2, (8, 8))
        whole, halves = self._there([batch]), self._there(batch.split(cut))
        variants = {
            "plain": self._step(whole, [self.plain]),
            "nccl": self._step(whole, [self.nccl]),
            "fused": self._step(whole, self.seams[:1]),
            "woven": self._step(halves, self.seams, ctas),
            "no_comm": self._step(whole, [self.alone]),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(pairs):
            for name, variant in variants.items():
                times[name].append(self._ms(variant))
        self.ranks.check()
        found: dict[str, Any] = {f"{name}_ms": median(ms) for name, ms in times.items()}
        found |= {"tokens": tokens, "cut": cut, "ctas": "/".join(map(str, ctas)), "planned": plan.why}
        return found | {"gain": found["plain_ms"] / found["woven_ms"]}

    def _there(self, halves: Sequence[Batch]) -> list[Batch]:
        return [half.to(self.device) for half in halves]

    def _step(
        self, halves: Sequence[Batch], seams: Sequence[Seam], ctas: tuple[int, int] = (0, 0)
    ) -> Callable[[], Any]:
        def step() -> Tensor:
            return run_chain(self.model.chain, halves, seams, self.ranks.votes, ctas)

        step()
        if self.device.type != "cuda":
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        return graph.replay

    def _ms(self, step: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            at = time.perf_counter()
            step()
            return (time.perf_counter() - at) * 1e3
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        step()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)


if __name__ == "__main__":
    main()
