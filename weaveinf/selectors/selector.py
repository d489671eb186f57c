"""What a selector is: it looks on when keys are written, and chooses what each row may read before it
attends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.comm.seam import Joint, Seam
from weaveinf.selectors.segments import DENSE, RowFacts, Segment, segments


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
        sparse = int((self.kinds(RowFacts.of(batch, self.budgets.of_slot)) != DENSE).sum())
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
        return self.cut(batch)

    def cut(self, batch: Batch) -> list[Segment]:
        """The batch where rows begin to be served otherwise."""
        facts = RowFacts.of(batch, self.budgets.of_slot)
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
            known = f"0 or {self.least} to {self.most}, the engine's"
            raise ValueError(f"selector_budget={asked} must be {known}")
        return asked
