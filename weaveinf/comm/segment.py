"""A segment of POSIX shared memory that all ranks of one host map, and the library of csrc/cpu/shm.cpp (which
works on it) and streams.cpp.

A segment has a name only while the ranks are mapping it: it is unlinked as soon as all have, so whatever
happens later, nothing is left behind. Its pages are reserved when it is made, so that a full /dev/shm is
an error message and not a SIGBUS. Each rank holds a record lock on one byte of the file; the lock's end
tells the others of the rank's end.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaveinf.comm.errors import RankDied
from weaveinf.ops import large
from weaveinf.ops.native import DIRECTORY, fields

SHM = Path("/dev/shm")
MAX_RANKS = 8
PAGE = 4096
LINE = 128
"""Bytes of one rank's counter line (struct Line)."""
BLAMED = 28
"""Where in it the int32 `blamed` lies."""

_FIXED, _COLLAPSE = 0x10, 25
"""mmap's MAP_FIXED and madvise's MADV_COLLAPSE, which Python has no names for."""

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]

Agree = Callable[[str], list[str]]

SILENCE_S = 300.0
"""How long a living peer may stay silent before a wait gives up."""

_P, _I64, _U64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64


class Group(ctypes.Structure):
    """struct Group of shm.cpp: who meets where."""

    _fields_ = fields(
        "void_p lines blame, int64 deadline_ns, uint64 epoch, int32 rank size fd broken crowded"
    )

    def leave(self) -> None:
        """Every later call with it tells of this rank's end, as if it had died."""
        self.broken = 256 + self.rank


_SIGNATURES: dict[str, list[type]] = {
    "weaveinf_look": [_P],
    "weaveinf_meet": [_P, _U64],
    "weaveinf_arrive": [_P],
    "weaveinf_await": [_P, ctypes.c_int],
    "weaveinf_votes_sum": [_P, _P, _P, _I64],
    "weaveinf_channel_send": [_P, _P, _I64],
    "weaveinf_channel_length": [_P, _I64, _P],
    "weaveinf_channel_take": [_P, _P, _I64],
    "weaveinf_streams": [ctypes.c_int, ctypes.c_int],
    "weaveinf_streams_submit": [_P, _P, _P, _P, *[ctypes.c_double] * 3],
    "weaveinf_streams_wait": [_P, _P, _P],
    "weaveinf_streams_run": [_P, _I64, _P],
    "weaveinf_streams_refuse": [_P],
    "weaveinf_streams_free": [_P],
}
_POINTERS = {"weaveinf_streams", "weaveinf_streams_submit"}
"""What returns one."""


def _load() -> tuple[Any, str]:
    path = DIRECTORY / "libweaveinf_shm.so"
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = _P if name in _POINTERS else ctypes.c_int
    except (OSError, AttributeError) as error:
        return None, f"the shared-memory kernels do not load ({error})"
    return library, ""


lib, reason = _load()
"""The library, or None and one line that says why."""

SILENT = 2
"""The kind of result that means: the time is over, and the peers live."""


def check(code: int, doing: str) -> None:
    """Raises what a result of the library means: RankDied, TimeoutError, RuntimeError, ValueError."""
    if code == 0:
        return
    kind, rank = divmod(code, 256)
    if kind == 1:
        raise RankDied(rank, f"its process ended or left the group ({doing})")
    if kind == SILENT:
        raise TimeoutError(f"rank {rank} lives but did not come to {doing} in time")
    if kind == 3:
        raise RuntimeError(f"rank {rank} came to {doing} with another size: the ranks' steps differ")
    raise ValueError("the kept rows must ascend and be rows of this pass")


def pages(size: int) -> int:
    """Bytes, in whole pages."""
    return -(-size // PAGE) * PAGE


def _map(fd: int, size: int, populate: bool) -> tuple[mmap.mmap, int]:
    """The file's mapping, and where in it the file begins: at a large page's boundary, for `enlarge`."""
    room, start = large.room(size)
    place = ctypes.addressof(ctypes.c_char.from_buffer(room)) + start
    flags = mmap.MAP_SHARED | _FIXED | (mmap.MAP_POPULATE if populate else 0)
    if _mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != place:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return room, start


class Segment:
    """One shared mapping. Made by the lowest rank, mapped by the others, of one host.

    The maker passes no name and hands `name` to the others; `unlink()` once all have mapped. A sparse one has
    no pages but those that `reserve` gets it. OSError when it cannot be made or mapped, with the remedy when
    /dev/shm is too small.
    """

    def __init__(self, size: int, rank: int, name: str | None = None, *, sparse: bool = False) -> None:
        self.name = name or f"weaveinf-{secrets.token_hex(8)}"
        self.size = size
        self.rank = rank
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if name is None else 0)
        self.fd = os.open(SHM / self.name, flags, 0o600)
        try:
            if name is None:
                os.ftruncate(self.fd, size)
                if not sparse:
                    self.reserve(0, size)
            self._map, self._start = _map(self.fd, size, populate=not sparse)
            # Of the process, not inherited by a fork, and gone with it. It also goes when the process
            # closes any descriptor of this file, hence one open() a process.
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except BaseException:
            if name is None:
                self.unlink()
            self.close()
            raise
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map, self._start))

    def reserve(self, offset: int, size: int) -> None:
        """Gets pages for a part of it. OSError when /dev/shm is too small."""
        try:
            os.posix_fallocate(self.fd, offset, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            free = os.statvfs(SHM)
            raise OSError(
                errno.ENOSPC,
                f"/dev/shm is too small: {size / 2**20:.1f} MiB needed, "
                f"{free.f_bavail * free.f_frsize / 2**20:.1f} MiB free; enlarge it "
                f"(docker run --shm-size, mount -o remount,size=) or lower the tokens per step",
            ) from None

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the mapping, from `offset` bytes on. It keeps the mapping alive."""
        if (count := prod(shape)) == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._start + offset).view(shape)

    def enlarge(self, offset: int, size: int) -> None:
        """Large pages for a part that is written, where the system can give them."""
        with suppress(OSError):
            self._map.madvise(_COLLAPSE, self._start + offset, size)

    def group(self, offset: int, size: int, silence_s: float, blame: int | None = None) -> Group:
        """The counter lines at `offset`, met by ranks 0 to size-1 of this segment.

        `blame`: address of the lines where these ranks say whose death they saw; at offset 0 by default.
        """
        return Group(
            lines=self.address + offset,
            blame=blame or self.address,
            deadline_ns=int(silence_s * 1e9),
            rank=self.rank,
            size=size,
            fd=self.fd,
            crowded=size > len(os.sched_getaffinity(0)),
        )

    def unlink(self) -> None:
        """Takes the name away, if it is still there."""
        with suppress(FileNotFoundError):
            (SHM / self.name).unlink()

    def close(self) -> None:
        """Tells the peers that this rank is gone. The memory goes with its last view."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def attempt(
    size: int, rank: int, name: str | None = None, sparse: bool = False
) -> tuple[Segment | None, str]:
    """A segment, or why there is none."""
    try:
        return Segment(size, rank, name, sparse=sparse), ""
    except OSError as error:
        return None, error.strerror or str(error)


def share(
    size: int, rank: int, agree: Agree, all_agree: Agree | None = None, sparse: bool = False
) -> Segment:
    """Makes one segment for all ranks of a host (0 to n-1); every rank calls it.

    `agree(words)` gives every rank the words of all ranks of the host, in rank order; `all_agree` those of
    the ranks of all hosts, which make segments of their own. OSError on all ranks when one of them fails.
    """
    agree("")  # all are here: the name lives for milliseconds
    mine, said = None, ""
    try:
        if rank == 0:
            mine, said = attempt(size, 0, None, sparse)
        name = agree(mine.name if mine else "")[0]
        if rank != 0 and name:
            mine, said = attempt(size, rank, name, sparse)
            said = said and f"rank {rank} cannot map the segment of rank 0: {said}"
        failures = [words for words in (all_agree or agree)(said) if words]
        if failures or mine is None:
            raise OSError(errno.EIO, failures[0])
        mine.unlink()
        return mine
    except BaseException:
        if mine is not None:
            mine.unlink()
            mine.close()
        raise
