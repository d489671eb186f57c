"""The seam of CPU ranks on one host: csrc/cpu/shm.cpp, one pass over shared memory, no sockets."""

import ctypes
import time

import torch
from torch import Tensor

from weaveinf.comm import segment
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam, share_of
from weaveinf.comm.segment import LINE, Group, check, pages, share
from weaveinf.ops import native
from weaveinf.ops.tape import Kernel

_KEPT_VIEWS = 256


class _State(ctypes.Structure):
    """struct Seam of shm.cpp."""

    _fields_ = [
        ("group", Group),
        *native.fields("void_p norm partials residuals x, int64 max_rows hidden rows"),
        *native.fields("int32 dtype item threads side fresh"),
    ]


class SharedSeam(Seam):
    """See `Seam`; for up to `max_rows` rows of `hidden` elements of float32 or bfloat16.

    `start` runs to its end in the calling thread: there are no other cores to hide it under. OSError on all
    ranks when the segment cannot be made on one of them.
    """

    name = "shared memory"
    why = "CPU ranks of one host"
    fused = True

    def __init__(self, ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> None:
        assert native.lib is not None
        self._open = Kernel(segment.lib.weaveinf_seam_open, "Pn")
        self._start = Kernel(segment.lib.weaveinf_seam_start, "2PnP3d")
        self._finish = Kernel(segment.lib.weaveinf_seam_finish, "P")
        self._meet = segment.lib.weaveinf_meet
        size, rank = ranks.size, ranks.rank
        item = dtype.itemsize
        # Planes of the segment, on pages of their own: counters, partials, residuals, x.
        at = [pages(size * LINE)]
        for rows in (size * max_rows, 2 * max_rows, max_rows):
            at.append(at[-1] + pages(rows * hidden * item))
        self.segment = seg = share(at[-1], rank, ranks.agree)
        self._state = _State(
            group=seg.group(0, size, ranks.silence_s, ranks.segment.address if ranks.segment else None),
            norm=native.lib.weave_add_rms_norm.address,
            partials=seg.address + at[0],
            residuals=seg.address + at[1],
            x=seg.address + at[2],
            max_rows=max_rows,
            hidden=hidden,
            dtype=native.DTYPES[dtype],
            item=item,
            threads=torch.get_num_threads(),
        )
        self._address = ctypes.addressof(self._state)
        self._partial = seg.tensor(at[0], (size, max_rows, hidden), dtype)[rank]
        self._residuals = seg.tensor(at[1], (2, max_rows, hidden), dtype).unbind(0)
        self._x = seg.tensor(at[2], (max_rows, hidden), dtype)
        self._views: dict[tuple[int, int], Tensor] = {}
        self._rows = 0
        self._began = 0.0
        self._size, self._rank, self._max_rows = size, rank, max_rows

    def open(self, rows: int) -> None:
        """See `Seam.open`."""
        if rows > self._max_rows:
            raise ValueError(f"{rows} rows in a seam made for {self._max_rows}")
        self._rows = rows
        self._open(self._address, rows)

    def _view(self, which: int, of: Tensor) -> Tensor:
        """The first rows of a buffer; small numbers of rows come again and again: kept are their views."""
        if self._rows > _KEPT_VIEWS:
            return of[: self._rows]
        key = (which, self._rows)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = of[: self._rows]
        return view

    def partial(self) -> Tensor:
        """See `Seam.partial`."""
        return self._view(0, self._partial)

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`."""
        if joint.weight.dtype != self._x.dtype:
            raise ValueError(f"a norm in {joint.weight.dtype} behind sums in {self._x.dtype}")
        self._began = time.monotonic()
        if kept is None:
            where, rows = 0, self._rows
        else:
            kept = kept.contiguous()
            where, rows = kept.data_ptr(), kept.numel()
        check(self._start(self._address, where, rows, joint.weight.data_ptr(), *joint.varied), "a seam")
        self._rows = rows

    def finish(self) -> Tensor:
        """See `Seam.finish`."""
        check(self._finish(self._address), "a seam")
        self.ran = self._began, time.monotonic()
        return self._view(1, self._x)

    def _residual(self) -> Tensor:
        return self._residuals[self._state.side][: self._rows]

    def gather(self, rows: Tensor) -> Tensor:
        """See `Seam.gather`. All rows lie where every rank can read them."""
        if self._state.fresh:
            return self._x.new_zeros(len(rows), self._x.shape[1])
        return self._residual().index_select(0, rows)

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """See `Seam.insert`. Each rank writes its share of the rows, between two meetings."""
        first, last = share_of(self._rows, self._size, self._rank)
        check(self._meet(self._address, len(rows)), "an insertion")
        residual = self._residual()
        if self._state.fresh:
            residual[first:last] = 0
            self._state.fresh = 0
        mine = (rows >= first) & (rows < last)
        residual.index_copy_(0, rows[mine], values[mine])
        check(self._meet(self._address, len(rows)), "an insertion")

    def close(self) -> None:
        """See `Seam.close`."""
        self._state.group.leave()
        self.segment.close()
