"""Methods whose KV heads choose tokens of their own for an answer's rows: what FASA and Quest have in
common."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, Memo
from weaveinf.ops import select
from weaveinf.selectors.segments import ANSWER, DENSE, PerRow, RowFacts, Segment, TokensOfHeads
from weaveinf.selectors.selector import Budgets, Choosing, Heads, Selector


class HeadsChoice:
    """What the KV heads of an answer's rows choose, each for itself, by the votes of their queries, `soft`
    ones or sums (`ops.select.votes`): what all layers ask of a segment.

    Candidates are runs of so many tokens, `forced` of them at the beginning and the end chosen in any case.
    """

    def __init__(self, heads: Heads, rows: PerRow, run: int, forced: tuple[int, int], soft: bool) -> None:
        self.rows = rows
        self._heads = heads
        seen, wanted = rows.position // run + 1, rows.budget // run
        self._firsts, self._ends = torch.full_like(seen, forced[0]), seen - forced[1]
        self._seen, self._wanted = (
            x[:, None].expand(-1, len(heads.kv_heads)).flatten().contiguous() for x in (seen, wanted)
        )
        self._width = (rows.longest - 1) // run + 1
        self._capacity = min(int(rows.facts.budget.max()) // run, self._width)
        self._scale, self._soft = heads.head_dim**-0.5, soft

    def choose(
        self, q: Tensor, keys: Tensor, channels: Tensor | None = None
    ) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What is chosen by q [rows, Hq, D] of keys as `ops.select.votes` takes them, and how much it is:
        int32 [rows, Hkv, capacity] and [rows, Hkv]."""
        kv_heads, capacity = len(self._heads.kv_heads), self._capacity
        found = []
        for rows in select.slices(len(q), self._heads.num_kv_heads * self._width):
            where = self.rows.table[rows], self._firsts[rows], self._ends[rows]
            votes = select.votes(q[rows], keys, where, self._width, self._scale, channels, self._soft)
            if self._heads.replicated:  # the queries of a KV head are on several ranks
                ballot = votes.new_zeros(len(votes), self._heads.num_kv_heads, self._width)
                own = slice(self._heads.kv_heads.start, self._heads.kv_heads.stop)
                ballot[:, own] = votes
                votes = (yield ballot)[:, own].contiguous()
            each = slice(rows.start * kv_heads, rows.stop * kv_heads)
            found.append(select.top_k(votes.flatten(0, 1), self._seen[each], self._wanted[each], capacity))
        index, counts = select.joined(found)
        return index.view(-1, kv_heads, capacity), counts.view(-1, kv_heads)


class ByHead(Selector, ABC):
    """See above; of a method with `settings`, whose first `dense_layers` layers read all. Its `candidates`
    and `chosen` say how it chooses."""

    def __init__(self, settings: object, budgets: Budgets, dense_below: int, dense_layers: int) -> None:
        super().__init__(budgets)
        self._said, self._dense_below, self._dense_layers = repr(settings), dense_below, dense_layers
        self._memo = Memo()

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """See `Selector`."""
        dense = budget == 0 or end <= max(prompt, budget, self._dense_below)
        return b"" if dense else f"{self._said} {budget} {prompt}".encode()

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        found: list[tuple[Segment, HeadsChoice | None]] = self._memo.get(batch, self._segments)
        for segment, heads in found:
            segment.chosen = None
            if heads is not None and layer >= self._dense_layers:
                segment.chosen = yield from self.chosen(layer, q[segment.rows], heads)
        return [segment for segment, _ in found]

    def kinds(self, facts: RowFacts) -> NDArray[np.integer[Any]]:
        """See `Selector`."""
        return np.where(facts.answers_beyond(self._dense_below), ANSWER, DENSE)

    def _segments(self, batch: Batch) -> list[tuple[Segment, HeadsChoice | None]]:
        found = self.cut(batch)
        return [(s, None if s.per_row is None else self.candidates(s.per_row)) for s in found]

    @abstractmethod
    def candidates(self, rows: PerRow) -> HeadsChoice:
        """Of what these rows choose."""

    @abstractmethod
    def chosen(self, layer: int, q: Tensor, heads: HeadsChoice) -> Generator[Tensor, Tensor, TokensOfHeads]:
        """What rows q [rows, Hq, D] choose of them."""
