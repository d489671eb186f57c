"""What one step computes, as flat tensors. A range or a subset of a batch's rows is again a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """The tokens (rows) of one step, sequence after sequence.

    Row `i` of sequence `s` satisfies `cu_seqlens_q[s] <= i < cu_seqlens_q[s + 1]`; the rows of one
    sequence ascend in position. T rows, S sequences, L rows whose logits are wanted.

    Attributes:
        input_ids: int64 [T].
        positions: int32 [T], absolute positions within the sequences.
        slot_mapping: int32 [T], the cache slot `page * page_size + offset` of each token; -1 for none.
        cu_seqlens_q: int32 [S + 1].
        seq_lens: int32 [S], cached tokens of each sequence once this step has written its own.
        num_prompt_tokens: int32 [S].
        block_table: int32 [S, max_blocks].
        state_slot: int32 [S], the stable row of each request's state on every rank.
        logit_rows: int64 [L], ascending.
        twin: on a device, the same on the host but for the tokens; of a batch of other rows than those whose
            logits are wanted there is none.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    num_prompt_tokens: Tensor
    block_table: Tensor
    state_slot: Tensor
    logit_rows: Tensor
    twin: Batch | None = field(default=None, init=False)

    @property
    def host(self) -> Batch:
        """What the host may read."""
        return self.twin or self

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def take(self, rows: Tensor) -> Batch:
        """The batch of only these rows (int64, ascending). The sequences stay, if with no rows."""
        if rows.shape[0] == self.num_tokens:
            return self
        at = torch.searchsorted(rows, self.cu_seqlens_q.long()).int()
        if rows is self.logit_rows:  # how many they are need not be read back from a device
            part = self._rows(rows, at, self.seq_lens, torch.arange(rows.shape[0], device=rows.device))
            part.twin = self.twin and self.twin.take(self.twin.logit_rows)
            return part
        wanted = torch.searchsorted(rows, self.logit_rows)
        kept = wanted.clamp(max=max(rows.shape[0] - 1, 0))
        present = rows[kept] == self.logit_rows if rows.shape[0] else wanted < 0
        return self._rows(rows, at, self.seq_lens, wanted[present])

    def split(self, at: int) -> tuple[Batch, Batch]:
        """The rows before `at` and the others, 0 < at < T. The sequences stay, if with no rows.

        Where the cut falls inside a sequence, the second half finds in its context what the first one
        caches, as in chunked prefill: halves run in order. For batches that are still on the host.
        """
        starts = self.cu_seqlens_q
        later = (starts - at).clamp(min=0)
        logits = int(torch.searchsorted(self.logit_rows, at))
        ends = self.seq_lens - later.diff()
        before = self._rows(slice(0, at), starts.clamp(max=at), ends, self.logit_rows[:logits])
        return before, self._rows(slice(at, None), later, self.seq_lens, self.logit_rows[logits:] - at)

    def _rows(
        self, rows: Tensor | slice, cu_seqlens_q: Tensor, seq_lens: Tensor, logit_rows: Tensor
    ) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids[rows],
            positions=self.positions[rows],
            slot_mapping=self.slot_mapping[rows],
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            logit_rows=logit_rows,
        )

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the tokens may be there already."""
        there = Batch(**{name: put(getattr(self, name), device) for name in TENSORS})
        there.twin = replace(self, input_ids=self.positions)
        return there


TENSORS = [one.name for one in fields(Batch) if one.init]
"""The names of a batch's tensors."""


def put(x: Tensor, device: torch.device) -> Tensor:
    """x there; the host does not wait for what a device has still to do."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Memo:
    """What was last found out about a batch: all layers ask for the same. One entry for each half."""

    def __init__(self) -> None:
        self._kept: list[tuple[Batch, Any]] = []

    def get(self, batch: Batch, make: Any) -> Any:
        for known, value in self._kept:
            if known is batch:
                return value
        value = make(batch)
        self._kept = [*self._kept[-3:], (batch, value)]
        return value
