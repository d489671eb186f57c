"""csrc/cuda/seam.cu's peer policy in Triton, for where cupy is missing: the same call, in the same memory.

A launch of seam.cu is five here, since programs of one Triton launch cannot meet: all ranks meet, each sums,
normalises and spreads its rows, all meet again. So it costs more with few rows. Wider than multimem can be:
any device whose ranks map each other's memory.
"""

import torch
import triton
import triton.language as tl

from weaveinf.comm.symmetric import Call

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _arrive(pads, epochs, failed, rank, RANKS: tl.constexpr):
    """Tells every rank that this one has come once more, unless somebody was missed. One program.

    pads: addresses of the ranks' pads, a word for each rank.
    """
    words = tl.pointer_type(tl.int32)
    if tl.load(failed.to(words)) == 0:
        own = epochs.to(words)
        epoch = tl.load(own) + 1
        tl.store(own, epoch)
        for peer in tl.static_range(RANKS):
            tl.atomic_xchg(tl.load(pads + peer).to(words) + rank, epoch, sem="release", scope="sys")


@triton.jit
def _await(
    pads,
    epochs,
    failed,
    said,
    patience_ns,
    rank,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Until all have come as often, or somebody is missed: then `failed` and `said` get 1 + that rank. One
    program. WORDS: a power of two from RANKS on. Without a CLOCK (in Triton's interpreter) it looks once."""
    words = tl.pointer_type(tl.int32)
    if tl.load(failed.to(words)) == 0:
        epoch = tl.load(epochs.to(words))
        peer = tl.arange(0, WORDS)
        mine = tl.load(pads + rank).to(words) + peer
        left = epoch - tl.atomic_add(mine, 0, mask=peer < RANKS, sem="acquire", scope="sys")
        late = tl.max(tl.where((peer < RANKS) & (left > 0), 1 + peer, 0))
        if CLOCK:
            began = tl.extra.cuda.globaltimer()
            spins = 0
            while late > 0:
                left = epoch - tl.atomic_add(mine, 0, mask=peer < RANKS, sem="acquire", scope="sys")
                late = tl.max(tl.where((peer < RANKS) & (left > 0), 1 + peer, 0))
                spins += 1
                if (late > 0) & (spins % 1024 == 0):  # the host's word is far away
                    stop = tl.load(said.to(words) + 1, volatile=True) != 0
                    if stop | (tl.extra.cuda.globaltimer() - began > patience_ns):
                        tl.store(failed.to(words), late)
                        tl.store(said.to(words), late)
                        late = 0
        if late > 0:
            tl.store(failed.to(words), late)
            tl.store(said.to(words), late)


@triton.jit
def _share(
    buffers,
    failed,
    weight,
    kept,
    places,
    sizes,
    varied,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    FRESH: tl.constexpr,
    KEPT: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """This rank's rows: the sum over the ranks plus the residual, its norm to every rank. Grid: (programs,).

    buffers: addresses of the ranks' memory; places: bytes in it; varied: see `Joint`.
    """
    partial_at, x_at, residual_at, old_residual_at = places
    rank, rows, old_rows, per_program = sizes
    eps, offset, scale = varied
    elements = tl.pointer_type(ELEMENT)
    vector: tl.constexpr = 16 if HIDDEN * ELEMENT.primitive_bitwidth % 128 == 0 else 1
    each, extra = rows // RANKS, rows % RANKS
    first = rank * each + tl.minimum(rank, extra)
    count = each + (rank < extra).to(tl.int32)
    i = tl.arange(0, BLOCK)
    inside = i < HIDDEN
    w = tl.load(tl.multiple_of(weight.to(elements), vector) + i, mask=inside, other=0.0)
    w = w.to(tl.float32) + offset
    own = tl.multiple_of((tl.load(buffers + rank) + residual_at).to(elements), vector)
    for turn in range(per_program):
        row = (turn * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        if (row < count) & (tl.load(failed.to(tl.pointer_type(tl.int32))) == 0):
            total = tl.zeros([BLOCK], tl.float32)
            for peer in tl.static_range(RANKS):
                theirs = tl.multiple_of((tl.load(buffers + peer) + partial_at).to(elements), vector)
                part = theirs + (first + row) * HIDDEN + i
                total += tl.load(part, mask=inside, other=0.0).to(tl.float32)
            f = scale * total
            at = own + row * HIDDEN + i
            if not FRESH:
                old = at
                if KEPT:
                    place = tl.load(kept.to(tl.pointer_type(tl.int64)) + first + row)
                    old_each, old_extra = old_rows // RANKS, old_rows % RANKS
                    border = old_extra * (old_each + 1)
                    few = old_extra + (place - border) // tl.maximum(old_each, 1)
                    owner = tl.where(place < border, place // (old_each + 1), few)
                    place -= owner * old_each + tl.minimum(owner, old_extra)
                    theirs = (tl.load(buffers + owner) + old_residual_at).to(elements)
                    old = tl.multiple_of(theirs, vector) + place * HIDDEN + i
                f += tl.load(old, mask=inside, other=0.0).to(tl.float32)
            rounded = f.to(ELEMENT)
            tl.store(at, rounded, mask=inside)
            f = rounded.to(tl.float32)
            f = f * tl.rsqrt(tl.sum(f * f) / HIDDEN + eps) * w
            for peer in tl.static_range(RANKS):
                theirs = tl.multiple_of((tl.load(buffers + peer) + x_at).to(elements), vector)
                tl.store(theirs + (first + row) * HIDDEN + i, f.to(ELEMENT), mask=inside)


class TritonSeam:
    """Has the place of seam.cu's `Kernel`, for these sizes."""

    def __init__(self, dtype: torch.dtype, hidden: int, ranks: int, device: torch.device) -> None:
        self._element, self._hidden, self._size, self._device = _TYPES[dtype], hidden, ranks, device
        self._addresses: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, call: Call, blocks: int, rows: int = 1) -> None:
        """rows: ranks that run here, from `call.rank` on, each a step of all at a time."""
        here, size = range(call.rank, call.rank + rows), self._size
        if self._addresses is None:
            at = torch.tensor(list(call.buffers)[:size], dtype=torch.int64)
            self._addresses = at.to(self._device), (at + call.pads_at).to(self._device)
        buffers, pads = self._addresses
        clock = isinstance(_await, triton.runtime.JITFunction)  # or it is interpreted
        met = call.failed, call.said, call.patience_ns
        for stage in ("meet", "share", "meet"):
            if stage == "meet":
                for rank in here:
                    _arrive[(1,)](pads, call.epochs[rank], call.failed, rank, RANKS=size, num_warps=1)
                for rank in here:
                    sizes = {"RANKS": size, "WORDS": triton.next_power_of_2(size), "CLOCK": clock}
                    _await[(1,)](pads, call.epochs[rank], *met, rank, **sizes, num_warps=1)
                continue
            for rank in here:
                self._share(call, buffers, rank, blocks)

    def _share(self, call: Call, buffers: torch.Tensor, rank: int, blocks: int) -> None:
        if not call.rows:
            return
        block = triton.next_power_of_2(self._hidden)
        places = call.partial_at, call.x_at, call.residual_at, call.old_residual_at
        per_program = triton.cdiv(triton.cdiv(call.rows, self._size), blocks)
        _share[(blocks,)](
            *(buffers, call.failed, call.weight, call.kept or 0, places),
            *((rank, call.rows, call.old_rows, per_program), (call.eps, call.offset, call.scale)),
            *(self._hidden, block, self._size, bool(call.fresh), call.kept is not None, self._element),
            num_warps=8 if block >= 2048 else 4,
        )
