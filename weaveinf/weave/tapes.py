"""Decode steps on a CPU as tapes (ops/tape.py): all blocks and seams of a step are one call."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weaveinf.cache.batch import TENSORS, Batch
from weaveinf.comm.aid import WORTH
from weaveinf.comm.segment import check
from weaveinf.ops import native
from weaveinf.ops.tape import Tape
from weaveinf.weave.graphs import Holds, Runs, is_decode

RESIDENT = 128
"""Tapes that are kept at most; the one that was not used for longest goes first."""


class _Kept(NamedTuple):
    tape: Tape
    batch: Batch
    x: Tensor
    held: list[Tensor]


class Tapes:
    """The tapes of a rank; all ranks run the same steps, so all record and replay alike.

    Args:
        step: runs halves, in this thread alone; the normalised rows.
        held: the memory that a step uses beside its batch now, which a tape must keep.

    Attributes:
        replays: whether steps are replayed; not where torch computes a part of them.
    """

    def __init__(self, step: Runs, held: Holds) -> None:
        self._step, self._held = step, held
        self._kept: OrderedDict[tuple[int, int], _Kept] = OrderedDict()
        self._memory: list[Tensor] = []
        self.replays = native.lib is not None

    def takes(self, halves: Sequence[Batch]) -> bool:
        """Whether such a step is replayed: large ones run as they are, since ranks share their products as it
        comes, and so do woven ones."""
        return self.replays and len(halves) == 1 and halves[0].num_seqs < WORTH and is_decode(halves)

    def run(self, halves: Sequence[Batch], ctas: tuple[int, int]) -> Tensor:
        """What the step returns for halves that it `takes`. The first one of a shape is recorded."""
        (batch,) = halves
        rows, blocks = batch.block_table.shape
        key = rows, (blocks - 1).bit_length()
        if (kept := self._kept.get(key)) is None:
            return self._record(key, batch)
        self._kept.move_to_end(key)
        _fill(kept.batch, batch)
        assert native.lib is not None
        check(kept.tape.replay(native.lib.weave_replay), "a seam")
        return kept.x

    def _record(self, key: tuple[int, int], batch: Batch) -> Tensor:
        static = Batch(**{name: torch.empty_like(getattr(batch, name)) for name in TENSORS})
        # Its columns are those of all batches of the key; no sequence reads beyond its own.
        static.block_table = torch.zeros(key[0], 1 << key[1], dtype=torch.int32)
        _fill(static, batch)
        tape, before = Tape(), self._held()
        with tape.recording():
            x = self._step([static], (0, 0))
        memory = self._held()
        if [*map(id, memory)] != [*map(id, self._memory)]:
            self._kept.clear()  # it has grown: what was recorded on less would keep that, too
            self._memory = memory
        self.replays = not tape.foreign
        if self.replays:
            self._kept[key] = _Kept(tape, static, x, before + memory)
            if len(self._kept) > RESIDENT:
                self._kept.popitem(last=False)
        return x


def _fill(into: Batch, batch: Batch) -> None:
    for name in TENSORS:
        given, to = getattr(batch, name), getattr(into, name)
        (to[:, : given.shape[1]] if name == "block_table" else to).copy_(given)
