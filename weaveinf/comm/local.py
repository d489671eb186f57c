"""The seam of a single rank: residual add and RMSNorm, nothing to send."""

import time

import torch
from torch import Tensor

from weaveinf.comm.seam import Joint, Seam
from weaveinf.ops.embedding import zero_
from weaveinf.ops.norm import add_rms_norm


class LocalSeam(Seam):
    """See `Seam`; for up to `max_rows` rows of `hidden` elements of `dtype`."""

    name = "local"
    why = "one rank"

    def __init__(self, max_rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        memory = torch.empty(3, max_rows, hidden, dtype=dtype, device=device)
        self._partial, self._residual, self._x = memory.unbind(0)
        self._rows = 0

    def open(self, rows: int) -> None:
        """See `Seam.open`."""
        if rows > self._x.shape[0]:
            raise ValueError(f"{rows} rows in a seam made for {self._x.shape[0]}")
        self._rows = rows
        zero_(self._residual[:rows])

    def partial(self) -> Tensor:
        """See `Seam.partial`."""
        return self._partial[: self._rows]

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`."""
        began = time.monotonic()
        if kept is not None:
            self._residual[: len(kept)] = self._residual[: self._rows].index_select(0, kept)
            self._rows = len(kept)
        n = self._rows
        add_rms_norm([self._partial[:n]], self._residual[:n], joint, self._x[:n])
        self.ran = began, time.monotonic()

    def finish(self) -> Tensor:
        """See `Seam.finish`."""
        return self._x[: self._rows]

    def gather(self, rows: Tensor) -> Tensor:
        """See `Seam.gather`."""
        return self._residual[: self._rows].index_select(0, rows)

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """See `Seam.insert`."""
        self._residual[: self._rows].index_copy_(0, rows, values)

    def close(self) -> None:
        """See `Seam.close`."""
