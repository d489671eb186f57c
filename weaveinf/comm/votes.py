"""Sums over ranks that a block needs in its middle: small float32 tensors, in rank order."""

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from weaveinf.comm import segment
from weaveinf.comm.segment import Group, Segment, check
from weaveinf.comm.waits import Backend, blamed, wait_for
from weaveinf.ops.native import fields

_CHUNK = 16384
"""Floats of one vote that pass at once; longer votes go in chunks."""


class Votes(Protocol):
    """Sums over ranks. Every rank calls in the same order, from one thread."""

    def sum(self, t: Tensor) -> Tensor:
        """The sum over ranks of a float32 tensor of any shape: added in rank order, the same bits on all
        ranks. RankDied or TimeoutError when a peer does not take part."""

    def start(self, t: Tensor) -> Callable[[], Tensor]:
        """A sum under way, which the result waits for: once, in the order of the starts."""

    def close(self) -> None:
        """Takes part no longer."""


class _State(ctypes.Structure):
    """struct Votes of shm.cpp."""

    _fields_ = [("group", Group), *fields("void_p slots, int64 chunk")]


class SharedVotes:
    """Votes through a segment; `at`: byte offset of the slots, `lines`: of the counter lines."""

    def __init__(self, seg: Segment, at: int, lines: int, size: int, silence_s: float) -> None:
        self._sum = segment.lib.weaveinf_votes_sum
        self._state = _State(seg.group(lines, size, silence_s), seg.address + at, _CHUNK)
        self._address = ctypes.addressof(self._state)
        self._segment = seg

    @staticmethod
    def bytes(size: int) -> int:
        """Bytes of the slots for `size` ranks: two turns."""
        return 2 * size * _CHUNK * 4

    def sum(self, t: Tensor) -> Tensor:
        """See `Votes.sum`."""
        given = t.contiguous()
        out = torch.empty_like(given)
        check(self._sum(self._address, given.data_ptr(), out.data_ptr(), given.numel()), "a vote")
        return out

    def start(self, t: Tensor) -> Callable[[], Tensor]:
        """See `Votes.start`. Memory is so fast that nothing is left under way."""
        total = self.sum(t)
        return lambda: total

    def close(self) -> None:
        """See `Votes.close`."""
        self._state.group.leave()


class GlooVotes:
    """Votes by an all-gather, added up locally; also the votes of a single rank.

    device: where the group's tensors must be; those of votes may be elsewhere.
    """

    def __init__(self, group: Backend, size: int, device: torch.device) -> None:
        self._group = group
        self._size = size
        self._device = device

    def sum(self, t: Tensor) -> Tensor:
        """See `Votes.sum`."""
        return self.start(t)()

    def start(self, t: Tensor) -> Callable[[], Tensor]:
        """See `Votes.start`."""
        if self._group is None or t.numel() == 0:
            return lambda: t
        given = t.contiguous().to(self._device)
        parts = [torch.empty_like(given) for _ in range(self._size)]
        with blamed(None, "a vote"):
            work = self._group.allgather([parts], [given])

        def total() -> Tensor:
            wait_for(work, None, "a vote")
            for part in parts[1:]:
                parts[0].add_(part)
            return parts[0].to(t.device)

        return total

    def close(self) -> None:
        """See `Votes.close`."""
        self._group = None
