"""Large pages: with small ones a processor that streams weights spends a part of its time on addresses."""

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page."""


def room(nbytes: int) -> tuple[mmap.mmap, int]:
    """Addresses for nbytes, and where in them a large page begins that all of them follow. They take no
    memory before they are written."""
    where = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return where, -ctypes.addressof(ctypes.c_char.from_buffer(where)) % PAGE


def memory(nbytes: int) -> Tensor:
    """Bytes [nbytes], in large pages but for an end that would waste more than an eighth of them all."""
    in_large = -(-nbytes // PAGE) * PAGE
    if in_large - nbytes > nbytes // 8:
        in_large = nbytes // PAGE * PAGE
    if not in_large:
        return torch.empty(nbytes, dtype=torch.uint8)
    where, start = room(max(nbytes, in_large))
    with suppress(OSError, AttributeError):  # the system need not have any
        where.madvise(mmap.MADV_HUGEPAGE, start, in_large)
    return torch.frombuffer(where, dtype=torch.uint8, count=nbytes, offset=start)
