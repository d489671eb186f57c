"""The rows of a batch as selectors serve them: what is known of each, and segments of rows that are served
alike, with what they may read.

A row is served by the rule of its phase, which is a property of its position: below the prompt's length the
prompt's rule holds, from there on the answer's, also when the row is computed again after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, put
from weaveinf.ops import select
from weaveinf.ops.attention import Paged, paged_attention

DENSE, ANSWER, PROMPT = 0, 1, 2
"""How a row is served: it reads all, or what is chosen for it alone, or for its chunk of the prompt."""


@dataclass
class PerRow:
    """Of each row: its position and its request's budget (int32 [rows]), its pages (int32 [rows,
    max_blocks]), its request's state slot (int64 [rows]). longest: tokens that a row has, at most. facts:
    what the host knows of them."""

    position: Tensor
    budget: Tensor
    table: Tensor
    slot: Tensor
    longest: int
    facts: RowFacts


@dataclass
class Segment:
    """Consecutive rows of a batch that are served alike.

    Attributes:
        rows: of the batch.
        cu_seqlens, block_table, positions: as a batch has them, of these rows.
        facts: what the host knows of them.
        per_row: None where all is read.
        chosen: which cached tokens each row may read; None for all.
        mirror: where what is read of keys and values is brought to first, from the host's memory: pages like
            theirs, on the device. None: they are there.
    """

    kind: int
    rows: slice
    cu_seqlens: Tensor
    block_table: Tensor
    positions: Tensor
    facts: RowFacts
    per_row: PerRow | None
    chosen: Chosen | None = None
    mirror: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Attention of these rows of q, into these of out."""
        q, out = q[self.rows], out[self.rows]
        if self.mirror is not None:
            for pool, mirror in zip((keys, values), self.mirror, strict=True):
                if isinstance(self.chosen, TokensOfHeads):
                    select.fetch(pool.flatten(0, 2), self.chosen.places, mirror.flatten(0, 2))
                else:
                    select.fetch(pool.flatten(1), self._pages, mirror.flatten(1))
            keys, values = self.mirror
        if self.chosen is not None:
            self.chosen.attend(q, keys, values, scale, out)
        else:
            paged = Paged(self.block_table, self.cu_seqlens, self.positions)
            paged_attention(q, (keys, values), paged, scale, out=out)

    @cached_property
    def _pages(self) -> Tensor:
        """All pages that are read."""
        assert self.mirror is not None
        seq = self.facts.seq - self.facts.seq[0]
        last = np.flatnonzero(np.diff(seq, append=-1))
        counts = self.facts.position[last] // self.mirror[0].shape[1] + 1
        pages = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        at = put(torch.from_numpy(np.stack([np.repeat(seq[last], counts), pages])), self.positions.device)
        return self.block_table[at[0], at[1]]


class Chosen(Protocol):
    """Which cached tokens rows may read."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None: ...


@dataclass
class TokensOfHeads:
    """Tokens of each row's own, and of each KV head's: see `ops.select.attend_by_head`."""

    places: Tensor
    counts: Tensor

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        select.attend_by_head(q, keys, values, self.places, self.counts, scale, out)


@dataclass
class Tokens:
    """Tokens for all heads, of virtual sequences: see `ops.select.attend`."""

    slots: Tensor
    cu_seqlens: Tensor
    positions: Tensor

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        select.attend(q, keys, values, Paged(self.slots, self.cu_seqlens, self.positions), scale, out)


@dataclass
class RowFacts:
    """Of each row of a batch: its sequence, position, prompt's length and budget (int32 [rows])."""

    seq: NDArray[np.int32]
    position: NDArray[np.int32]
    prompt: NDArray[np.int32]
    budget: NDArray[np.int32]

    @classmethod
    def of(cls, batch: Batch, budgets: NDArray[np.int32] | None) -> RowFacts:
        """budgets: of the state slots; without them there is none: 0."""
        batch = batch.host
        seq = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), np.diff(batch.cu_seqlens_q.numpy()))
        budget = budgets[batch.state_slot.numpy()][seq] if budgets is not None else np.zeros_like(seq)
        return cls(seq, batch.positions.numpy(), batch.num_prompt_tokens.numpy()[seq], budget)

    def answers_beyond(self, dense_below: int) -> NDArray[np.bool_]:
        """Rows of answers that have more cached tokens than their budget, and than `dense_below`."""
        beyond = self.position >= np.maximum(self.budget, dense_below)
        return beyond & (self.position >= self.prompt) & (self.budget > 0)


def segments(batch: Batch, facts: RowFacts, kinds: NDArray[np.integer[Any]]) -> list[Segment]:
    """The batch cut where rows begin to be served otherwise; `kinds`: of each row."""
    edges = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1)).tolist()
    starts, device = batch.host.cu_seqlens_q.numpy(), batch.positions.device
    out = []
    for start, end in pairwise(edges):
        rows, seqs = slice(start, end), slice(int(facts.seq[start]), int(facts.seq[end - 1]) + 1)
        cu = np.clip(starts[seqs.start : seqs.stop + 1] - start, 0, end - start)
        own = RowFacts(facts.seq[rows], facts.position[rows], facts.prompt[rows], facts.budget[rows])
        per_row = None
        if kinds[start] != DENSE:
            seq, budget = (put(torch.from_numpy(x), device) for x in (own.seq, own.budget))
            table, slot = batch.block_table[seq.long()], batch.state_slot[seq.long()].long()
            longest = int(own.position.max()) + 1
            per_row = PerRow(batch.positions[rows], budget, table, slot, longest, own)
        where = (put(torch.from_numpy(cu), device), batch.block_table[seqs], batch.positions[rows])
        out.append(Segment(int(kinds[start]), rows, *where, own, per_row))
    return out
