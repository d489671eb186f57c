"""Large pages: with small ones a processor that streams weights spends a part of its time on addresses."""

from __future__ import annotations

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
    """Bytes [nbytes] in large pages, unless the last of them would waste more than an eighth."""
    whole = -(-nbytes // PAGE) * PAGE
    if whole - nbytes > nbytes // 8:
        return torch.empty(nbytes, dtype=torch.uint8)
    where, start = room(whole)
    with suppress(OSError, AttributeError):  # the system need not have any
        where.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(where, dtype=torch.uint8, count=nbytes, offset=start)
