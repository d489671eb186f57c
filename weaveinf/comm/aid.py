"""Ranks of one host help each other: a core that a neighbour uses too is slow for a while, and at the next
seam everyone would wait for it.

A block's last product can be done by anyone who sees its operands. So the weights of such products lie in
memory that the ranks share, as the sums do already; the product is cut into tiles that a counter hands out,
and a rank that has none of its own left takes its peers'. The seam's meeting comes after all tiles: nobody
waits for a helper but there. Who computes a tile does not change its bits.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from weaveinf.comm import segment
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Seam
from weaveinf.comm.segment import PAGE, SHM, Segment, check, pages, share
from weaveinf.comm.shared import SharedSeam
from weaveinf.ops import native
from weaveinf.ops.linear import PackedWeight, Product, panels_product

log = logging.getLogger("weaveinf")

WORTH = 64
"""Rows from which on a product is shared."""

_LEFT = 16 << 20
"""Bytes of /dev/shm that others may want."""

_COUNTERS, _JOBS, _REGIONS = 0, PAGE, 2 * PAGE


class _Job(ctypes.Structure):
    """A rank's product of m rows; `next` counts its tiles that were taken. x and the weight [n, k] lie at
    offsets of the shared segment, out at an offset of a seam's, its rows `stride` elements apart."""

    _fields_ = native.fields("int64 next weight n k x m seam out stride")


def aid(ranks: Ranks, max_rows: int, weights: Sequence[PackedWeight], seams: Sequence[Seam]) -> Aid | None:
    """Moves the weights to shared memory and lets the ranks share their products; every rank calls it.

    None, and nothing changed, where the sums do not lie in shared memory, ranks have no cores of their own,
    the weights are not in the layout of csrc/cpu/gemm.cpp, or /dev/shm has no room for them.
    """
    shared = [seam for seam in seams if isinstance(seam, SharedSeam)]
    if len(shared) < len(seams):
        return None
    panels = [w.stored for w in weights if w.stored is not None]
    able = ranks.size <= len(os.sched_getaffinity(0)) and len(panels) == len(weights) > 0
    room = pages(max_rows * max(w.k for w in weights) * weights[0].dtype.itemsize) if able else 0
    region = room + sum(pages(one.nbytes) for one in panels)
    regions = [int(words) for words in ranks.agree(str(region if able else 0))]
    ends = [_REGIONS + sum(regions[: rank + 1]) for rank in range(ranks.size)]
    free = os.statvfs(SHM)
    fits = 0 not in regions and ends[-1] + _LEFT <= free.f_bavail * free.f_frsize
    if not all(ranks.agree("fits" if fits else "")):
        if 0 not in regions and ranks.rank == 0:
            log.warning(
                "/dev/shm has no room for %.0f MiB of weights: ranks wait for the slowest instead of sharing "
                "its products; enlarge it (docker run --shm-size, mount -o remount,size=)",
                (ends[-1] + _LEFT) / 2**20,
            )
        return None
    memory = share(ends[-1], ranks.rank, ranks.agree, sparse=True)
    return Aid(ranks, memory, ends[ranks.rank] - regions[ranks.rank], room, weights, shared)


class Aid:
    """See `aid`. This rank's region of the memory begins with room for a product's rows of x."""

    def __init__(
        self,
        ranks: Ranks,
        memory: Segment,
        region: int,
        room: int,
        weights: Sequence[PackedWeight],
        seams: Sequence[SharedSeam],
    ) -> None:
        assert native.lib is not None
        self._memory = memory
        memory.reserve(0, _REGIONS)
        memory.reserve(region, room)
        self._seams = [(seam.segment.address, seam.segment.size) for seam in seams]
        self._group = memory.group(
            _COUNTERS, ranks.size, ranks.silence_s, ranks.segment.address if ranks.segment else None
        )
        self._tiles = native.lib.weave_linear_tiles
        self._arrive, self._await = segment.lib.weaveinf_arrive, segment.lib.weaveinf_await
        jobs = memory.address + _JOBS
        self._jobs = [_Job.from_address(jobs + r * ctypes.sizeof(_Job)) for r in range(ranks.size)]
        self._mine = self._jobs[ranks.rank]
        self._peers = [(ranks.rank + i) % ranks.size for i in range(1, ranks.size)]
        self._dtype = weights[0].dtype
        self._x = region
        at = region + room
        for weight in weights:
            assert weight.stored is not None
            memory.reserve(at, weight.stored.nbytes)  # one after another: none lies twice in memory for long
            kept = memory.tensor(at, (weight.stored.nbytes,), torch.uint8)
            weight.stored = kept.copy_(weight.stored)
            weight.product = self._product(weight, at)
            at += pages(kept.nbytes)
        memory.enlarge(region, at - region)

    def _product(self, weight: PackedWeight, at: int) -> Product:
        assert weight.stored is not None
        alone = panels_product(weight.stored, weight.n, weight.k, weight.dtype)

        def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
            place = self._place(out.data_ptr()) if x.shape[0] >= WORTH else None
            if place is None:
                alone(x, bias, out)
            else:
                self._share(weight, at, x, out, *place)

        return product

    def _share(self, weight: PackedWeight, at: int, x: Tensor, out: Tensor, seam: int, place: int) -> None:
        mine, group = self._mine, ctypes.byref(self._group)
        self._memory.tensor(self._x, tuple(x.shape), self._dtype).copy_(x)
        mine.next, mine.weight, mine.n, mine.k, mine.x = 0, at, weight.n, weight.k, self._x
        mine.m, mine.stride = x.shape[0], out.stride(0)
        mine.seam, mine.out = seam, place
        check(self._arrive(group), "a product")
        self._work(mine)
        for rank in self._peers:
            check(self._await(group, rank), "a product")
            self._work(self._jobs[rank])

    def _place(self, address: int) -> tuple[int, int] | None:
        """Which seam's memory it is in, and where; None outside of all: what is no seam's is not shared."""
        for i, (start, size) in enumerate(self._seams):
            if start <= address < start + size:
                return i, address - start
        return None

    def _work(self, job: _Job) -> None:
        """Computes tiles until none is left."""
        memory = self._memory.address
        out = self._seams[job.seam][0] + job.out
        self._tiles(
            *(ctypes.addressof(job), memory + job.weight, job.n, job.k, native.DTYPES[self._dtype]),
            *(memory + job.x, job.m, out, job.stride, torch.get_num_threads()),
        )

    def close(self) -> None:
        """Leaves; waits for nobody."""
        self._group.leave()
        self._memory.close()
