"""What a selector is: it looks on when keys are written, and chooses what each row may read before it
attends.

A row is served by the rule of its phase, which is a property of its position: below the prompt's length the
prompt's rule holds, from there on the answer's, also when the row is computed again after a preemption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, put
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.comm.seam import Joint, Seam
from weaveinf.ops import select
from weaveinf.ops.attention import Paged, paged_attention

DENSE, ANSWER, PROMPT = 0, 1, 2
"""How a row is served: it reads all, or what is chosen for it alone, or for its chunk of the prompt."""


@dataclass(frozen=True)
class Index:
    """The indexer of a model that has one: how many tokens it lets a row read, the width of its keys, and in
    how many layers it scores."""

    top_k: int
    dim: int
    layers: int


@dataclass(frozen=True)
class Heads:
    """What a selector must know of a model and of this rank's part of it.

    Attributes:
        kv_heads: the KV heads of the whole model that this rank holds; the same one on several ranks where
            these are more.
        rank: which of the ranks this one is.
        fingerprint: of the model (`models.loader.fingerprint`).
        rotary: as `ops.rope.rope_` takes it; None where nobody rotates.
        max_tokens: of a request.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_heads: range
    ranks: int
    max_num_seqs: int
    dtype: torch.dtype
    device: torch.device
    index: Index | None = None
    rank: int = 0
    fingerprint: str = ""
    rotary: Tensor | None = None
    max_tokens: int = 1 << 28

    @property
    def apart(self) -> Heads:
        """The same as if each query head had a KV head of its own."""
        each = self.num_heads // self.ranks
        own = range(self.rank * each, (self.rank + 1) * each)
        return replace(self, num_kv_heads=self.num_heads, kv_heads=own)

    @property
    def replicated(self) -> bool:
        """Whether ranks share KV heads, so that none sees all queries of its own."""
        return self.ranks > self.num_kv_heads


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


Choosing = Generator[Tensor, Tensor, Sequence[Segment]]


class Settings(Protocol):
    """What a user may set of a method; a frozen dataclass, one file with its `Selector`.

    Attributes:
        serves: whether it chooses by keys of "heads" or by those of a model's own "index".
        at_once: positions that attention has before it at a time, at most, where they are numbered anew;
            None: they are not.
    """

    name: ClassVar[str]
    serves: ClassVar[str] = "heads"

    @property
    def budget(self) -> int: ...

    @property
    def at_once(self) -> int | None:
        return None

    def make(self, heads: Heads, page_size: int) -> Selector:
        """ValueError where the model cannot carry it."""
        ...


class Selector:
    """One rank's part of a method (DESIGN section 2); what is not said otherwise reads all.

    Attributes:
        row_align: prompts may be cut at multiples of this only (`cache.blocks.legal_cut`).
        unrotated: whether keys are cached, and queries come to it, as they are before the rotary embedding:
            then all its segments have `chosen`, which rotates both.
        publishes: whether others may take over the pages of requests that it chooses for.
        pools: what it keeps for every token or page.
        host_layers: whose keys and values are in the host's memory, which it fetches them from (`Segment`).
        counts: what it did; all count rows of steps by whether they read all, "rows_dense" or "rows_sparse".
            Who reads them makes them int: what a device counts stays there until then.
    """

    row_align = 1
    unrotated = False
    publishes = True
    pools: Sequence[PoolSpec] = ()
    host_layers = range(0)

    def __init__(self, budgets: Budgets) -> None:
        self.budgets = budgets
        self.counts: Counter[str] = Counter()

    def admit(self, slot: int, budget: int) -> None:
        """A request takes a state slot, with a budget of its own or -1."""
        self.budgets.admit(slot, budget)

    def release(self, slot: int) -> None:
        """The request in a state slot has ended, or will begin anew."""

    def pruned(self, slots: Sequence[int]) -> Sequence[bool] | None:
        """Of these state slots, whether rows of the prompt may be left behind; None: it never does so."""
        return None

    def bind(self, pools: Pools) -> None:
        """Gives it its pools."""

    def begin(self, batch: Batch, most_rows: int) -> None:
        """A step of this whole batch begins; a step has at most so many rows."""
        sparse = int((self.kinds(RowFacts.of(batch, self.budgets)) != DENSE).sum())
        self.counts.update(rows_dense=batch.num_tokens - sparse, rows_sparse=sparse)

    def kinds(self, facts: RowFacts) -> NDArray[np.integer[Any]]:
        """How each row is served; DENSE: it reads all."""
        return np.full_like(facts.position, DENSE)

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """What else than the tokens shaped the page that ends at position `end` (exclusive), of a request of
        such a prompt and budget; b"" where it was computed dense."""
        return b""

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """The batch's keys [rows, Hkv, D] have just been written to the cached ones, `pool`."""

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """Segments of all rows of q [rows, Hq, D], with what each may read of the cache; yields what it votes
        on."""
        yield from ()
        facts = RowFacts.of(batch, self.budgets)
        return segments(batch, facts, self.kinds(facts))


@runtime_checkable
class RowPruner(Protocol):
    """Chooses which rows of the residual go on between layers.

    Attributes:
        boundaries: numbers of blocks of the model's chain before which rows may come and go.
    """

    boundaries: Mapping[int, int]

    def change(self, number: int, x: Tensor, batch: Batch, seam: Seam, joint: Joint) -> tuple[Tensor, Batch]:
        """The rows with which a half goes on into block `number`, normalised by the joint before it, and
        their batch; the seam is left with as many, and their residual. Every rank calls it, and no half
        before all are past the block before."""
        ...


class Budgets:
    """How many tokens the requests in the state slots may read: int32 [max_num_seqs], 0 for all.

    A request may ask for `least` to `most`; what memory is set aside for is the method's own.
    """

    def __init__(self, heads: Heads, least: int, most: int, default: int) -> None:
        self.least, self.most, self.default = least, most, default
        self.of_slot = np.full(heads.max_num_seqs, default, np.int32)

    def admit(self, slot: int, budget: int) -> None:
        """A request takes a slot; budget -1: the method's own."""
        self.of_slot[slot] = self.default if budget < 0 else budget

    def resolved(self, asked: int | None) -> int:
        """The budget of a request that asked for so many. ValueError for what cannot be."""
        if asked is None:
            return self.default
        if asked and not self.least <= asked <= self.most:
            raise ValueError(
                f"selector_budget={asked} must be 0 or {self.least} to {self.most}, the engine's"
            )
        return asked


@dataclass
class RowFacts:
    """Of each row of a batch: its sequence, position, prompt's length and budget (int32 [rows])."""

    seq: NDArray[np.int32]
    position: NDArray[np.int32]
    prompt: NDArray[np.int32]
    budget: NDArray[np.int32]

    @classmethod
    def of(cls, batch: Batch, budgets: Budgets | None) -> RowFacts:
        """Without budgets there is none: 0."""
        batch = batch.host
        seq = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), np.diff(batch.cu_seqlens_q.numpy()))
        budget = budgets.of_slot[batch.state_slot.numpy()][seq] if budgets else np.zeros_like(seq)
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
