"""The seam of GPUs that map each other's memory: one kernel on few SMs (csrc/cuda/seam.cu).

"multimem" where a switch sums and spreads (NVLink SHARP), "peer" where it does not. So far the kernel was
compiled for GPUs, but run on threads of a CPU only (tests/comm/test_symmetric.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from weaveinf.comm.progress import Job, Waits
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam, share_of
from weaveinf.ops import cuda
from weaveinf.ops.native import fields

ALONE = 16
"""CTAs of a seam with nothing beside it, each on an SM of its own; more gain the published kernel nothing."""

_PATIENCE_S = 120.0
"""How long a kernel waits at most: blocks take milliseconds, a rank's first steps compile kernels."""

_attempts = 0
"""At a rendezvous of torch's, in this process."""

_numbers = count()
"""Of seams."""


class Call(ctypes.Structure):
    """struct Call of seam.cu."""

    _fields_ = [
        ("buffers", ctypes.c_void_p * 8),
        *fields("void_p multicast weight kept"),
        ("epochs", ctypes.c_void_p * 8),
        *fields("void_p failed said, uint64 patience_ns lasts_ns"),
        *fields("int64 partial_at x_at scales_at pads_at residual_at old_residual_at"),
        *fields("int32 rank rows old_rows fresh, float eps offset scale"),
    ]


_ELEMENTS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
_MAX_THREADS = 1024


def defines(
    dtype: torch.dtype, hidden: int, ranks: int, multimem: bool = False, fp8: bool = False
) -> dict[str, Any]:
    """What seam.cu is compiled with."""
    sizes = {"HIDDEN": hidden, "RANKS": ranks, "MAX_THREADS": _MAX_THREADS}
    return {"ELEMENT": _ELEMENTS[dtype], **sizes, "MULTIMEM": int(multimem), "FP8": int(fp8)}


def threads(hidden: int, dtype: torch.dtype) -> int:
    """THREADS of seam.cu."""
    vectors = hidden * dtype.itemsize // 16
    each = -(-vectors // _MAX_THREADS)
    lanes = -(-vectors // (32 * each)) * 32
    return lanes * max(1, min(_MAX_THREADS // lanes, 8))


@cache
def kernel(
    dtype: torch.dtype, hidden: int, ranks: int, multimem: bool = False, fp8: bool = False
) -> cuda.Kernel:
    """seam.cu for these sizes."""
    return cuda.Kernel("seam", threads(hidden, dtype), **defines(dtype, hidden, ranks, multimem, fp8))


class Operator(NamedTuple):
    """A seam's launch as an operator of torch, which torch.compile knows too: (own memory, a Call's bytes,
    the tensors that it points to, blocks, number of the seam). seams: by their numbers."""

    launch: Callable[[Tensor, Tensor, list[Tensor], int, int], None]
    seams: WeakValueDictionary[int, SymmetricSeam]
    library: Any


@cache
def operator() -> Operator:
    """Made when first wanted: it imports much."""
    seams: WeakValueDictionary[int, SymmetricSeam] = WeakValueDictionary()
    library = torch.library.Library("weaveinf", "DEF")
    library.define("seam(Tensor(a!) memory, Tensor call, Tensor[] held, int blocks, int seam) -> ()")

    def launch(memory: Tensor, call: Tensor, held: list[Tensor], blocks: int, seam: int) -> None:
        seams[seam].kernel(Call.from_address(call.data_ptr()), blocks)

    library.impl("seam", launch, "CompositeExplicitAutograd")
    torch.library.register_fake("weaveinf::seam", lambda *_: None, lib=library)
    return Operator(torch.ops.weaveinf.seam.default, seams, library)


class Memory(NamedTuple):
    """As many bytes of every rank, zero at first, mapped here; multicast: the address of all, or 0."""

    buffers: list[Tensor]
    multicast: int


def allocate(ranks: Ranks, nbytes: int) -> Memory:
    """Symmetric memory of torch; every rank calls it. RuntimeError on all where it is not to be had."""
    global _attempts
    from torch.distributed._symmetric_memory import _SymmetricMemory

    # torch counts the meetings of a process, whoever meets: where one had an engine before and others had
    # not, they would wait for one another until the store's deadline.
    if len(set(ranks.agree(str(_attempts)))) > 1:
        raise RuntimeError("a process among the ranks had other GPU engines before")
    own, said = torch.empty(0), ""
    try:
        own = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, ranks.device)
        own.zero_()
        torch.cuda.synchronize(ranks.device)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    if problems := [words for words in ranks.agree(said) if words]:
        raise RuntimeError(problems[0])
    _attempts += 1
    handle = _SymmetricMemory.rendezvous(own, ranks.symmetric_group())
    buffers = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(ranks.size)]
    buffers[ranks.rank] = own
    all_have_it = all(ranks.agree("multicast" if handle.multicast_ptr else ""))
    return Memory(buffers, handle.multicast_ptr if all_have_it else 0)


class SymmetricSeam(Seam):
    """See `Seam`; for up to `max_rows` rows of `hidden` elements of `dtype`.

    Every rank makes it; all meet (`Ranks.agree`) before the first start, so that all pads are zero. compiled:
    whether seam.cu runs, or on all ranks its peer in Triton. Raises what `allocate` does, or the compiler.
    """

    fused = True
    ctas = (0, 2, 4, 8)

    def __init__(
        self,
        ranks: Ranks,
        max_rows: int,
        hidden: int,
        dtype: torch.dtype,
        allocate: Callable[[Ranks, int], Memory] = allocate,
        compiled: bool = True,
    ) -> None:
        self._ranks, self._hidden, self._dtype = ranks, hidden, dtype
        self._max_rows = max_rows
        row = hidden * dtype.itemsize
        most = -(-max_rows // ranks.size) + 1  # the last row of a residual is nobody's: see `insert`
        parts = dict.fromkeys(("partial", "x"), max_rows * row)
        parts |= dict.fromkeys(("residual", "old_residual"), most * row) | {"pads": ALONE * 8 * 4}
        self._at: dict[str, int] = {}
        size = 0
        for name, nbytes in parts.items():
            self._at[name] = size
            size += -(-nbytes // 256) * 256
        self._memory = memory = allocate(ranks, size)
        switch = compiled and memory.multicast != 0
        self.name = "multimem" if switch else "peer" if compiled else "peer in Triton"
        self.why = "the switch sums" if switch else "the ranks map each other's memory"
        self.kernel: Callable[[Call, int], None]
        if compiled:
            self.kernel = kernel(dtype, hidden, ranks.size, switch)
        else:
            from weaveinf.comm.triton_seam import TritonSeam

            self.kernel = TritonSeam(dtype, hidden, ranks.size, ranks.device)
        self._number = next(_numbers)
        operator().seams[self._number] = self
        # Of this rank alone: the meetings of every block, and who did not come.
        self._counts = torch.zeros(ALONE + 1, dtype=torch.int32, device=ranks.device)
        self._call = self._constants()
        self._rows, self._fresh = 0, True
        self._held: Any = None
        self._job: Job | None = None

    def _constants(self) -> Call:
        call, here, rank = Call(), self._memory, self._ranks.rank
        for r, buffer in enumerate(here.buffers):
            call.buffers[r] = buffer.data_ptr()
        call.epochs[rank] = self._counts.data_ptr()
        call.failed = self._counts[ALONE:].data_ptr()
        call.said = self._ranks.words.data_ptr()
        call.multicast = here.multicast
        call.patience_ns = int(1e9 * min(self._ranks.silence_s, _PATIENCE_S))
        call.partial_at, call.x_at, call.pads_at = (self._at[name] for name in ("partial", "x", "pads"))
        call.rank = rank
        return call

    def _view(self, name: str, rows: int, rank: int | None = None) -> Tensor:
        buffer = self._memory.buffers[self._ranks.rank if rank is None else rank]
        nbytes = rows * self._hidden * self._dtype.itemsize
        return buffer[self._at[name] : self._at[name] + nbytes].view(self._dtype).view(rows, self._hidden)

    def open(self, rows: int) -> None:
        """See `Seam.open`."""
        if rows > self._max_rows:
            raise ValueError(f"{rows} rows in a seam made for {self._max_rows}")
        self._rows, self._fresh, self._job = rows, True, None

    def partial(self) -> Tensor:
        """See `Seam.partial`."""
        return self._view("partial", self._rows)

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`. A stream of its own runs it."""
        if joint.weight.dtype != self._dtype:
            raise ValueError(f"a norm in {joint.weight.dtype} behind sums in {self._dtype}")
        before = self._rows
        if kept is not None:
            kept = kept.contiguous()
            self._rows = len(kept)
            self._at["residual"], self._at["old_residual"] = self._at["old_residual"], self._at["residual"]
        self._submit(joint, kept, before, ctas)
        self._fresh = False

    def _submit(self, joint: Joint | None, kept: Tensor | None, before: int, ctas: int = 0) -> None:
        """Without a joint only a meeting of all ranks."""
        self._ranks.check()
        call = Call.from_buffer_copy(self._call)
        call.residual_at, call.old_residual_at = self._at["residual"], self._at["old_residual"]
        call.old_rows, call.fresh = before, self._fresh
        if joint is not None:
            call.rows, call.weight = self._rows, joint.weight.data_ptr()
            call.eps, call.offset, call.scale = joint.varied
            call.kept = kept.data_ptr() if kept is not None else None

        held = [] if joint is None else [joint.weight] if kept is None else [joint.weight, kept]

        # `memory` lives until the kernel ran, even if the seam is closed meanwhile.
        def run(memory: Memory = self._memory, blocks: int = ctas or ALONE) -> Waits:
            packed = torch.frombuffer(call, dtype=torch.uint8)
            operator().launch(memory.buffers[self._ranks.rank], packed, held, blocks, self._number)
            yield from ()
            return ()

        self._held = held
        self._job = self._ranks.progress.submit(run)

    def finish(self) -> Tensor:
        """See `Seam.finish`."""
        if self._job is not None:
            self._job.wait()
            self.ran = self._job.ran
            self._ranks.check()
        return self._view("x", self._rows)

    def gather(self, rows: Tensor) -> Tensor:
        """See `Seam.gather`. Each rank reads the others' rows."""
        self.finish()
        result = torch.zeros(len(rows), self._hidden, dtype=self._dtype, device=rows.device)
        if self._fresh:
            return result
        for rank in range(self._ranks.size):
            first, last = share_of(self._rows, self._ranks.size, rank)
            theirs = self._view("residual", last - first + 1, rank)
            here = ((rows >= first) & (rows < last)).unsqueeze(1)
            result = torch.where(here, theirs[(rows - first).clamp(0, last - first)], result)
        self._submit(None, None, self._rows)  # nobody goes on and changes what another still reads
        return result

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """See `Seam.insert`. Each rank keeps those of its share; the others land behind it."""
        self.finish()
        first, last = share_of(self._rows, self._ranks.size, self._ranks.rank)
        mine = self._view("residual", last - first + 1)
        if self._fresh:
            mine.zero_()
            self._fresh = False
        own = (rows >= first) & (rows < last)
        mine.index_copy_(0, torch.where(own, rows - first, last - first), values)
        self._submit(None, None, self._rows)  # nobody reads another's before all have theirs

    def close(self) -> None:
        """See `Seam.close`. On a GPU it waits for its own kernels, whose waits have deadlines."""
        if self._memory.buffers and self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._job, self._held = None, None
        self._memory = Memory([], 0)
