"""Quest (arXiv 2406.10774): whole pages, by an upper bound of what a query can score on any of their keys.

A page keeps the least and the largest value of every channel of its keys, lo and hi. A query's bound is
sum_c max(q_c lo_c, q_c hi_c) = max(q, 0) . hi + min(q, 0) . lo: a dot product, so pages are scored like keys.
Each KV head chooses pages of its own, by the sum of its queries' bounds: bounds lie far above what is there,
and a soft vote of them would see only the few highest. The page of the row itself is always read, and the
first one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import select
from weaveinf.selectors.selector import (
    ANSWER,
    DENSE,
    Budgets,
    Choosing,
    Heads,
    HeadsChoice,
    Memo,
    PerRow,
    RowFacts,
    Segment,
    Selector,
    TokensOfHeads,
    segments,
)

POOL = "quest bounds"


@dataclass(frozen=True)
class Quest:
    """budget: cached tokens that an answer's rows read for each KV head, in whole pages; the first
    `dense_layers` layers read all. dense_below: cached tokens up to which all are read, as choosing costs
    more than it saves."""

    name: ClassVar[str] = "quest"
    budget: int = 2048
    dense_layers: int = 2
    dense_below: int = 6144

    def make(self, heads: Heads, page_size: int) -> QuestSelector:
        return QuestSelector(self, heads, page_size)


class QuestSelector(Selector):
    """See `Selector`."""

    def __init__(self, settings: Quest, heads: Heads, page_size: int) -> None:
        if settings.budget < 2 * page_size:
            raise ValueError(
                f"quest reads its first page and the last: budget={settings.budget} must be at least "
                f"{2 * page_size}"
            )
        self.budgets = Budgets(heads, 2 * page_size, settings.budget, settings.budget)
        self._settings, self._heads, self._page = settings, heads, page_size
        shape = (len(heads.kv_heads), 2 * heads.head_dim)
        self.pools = [PoolSpec(POOL, shape, heads.dtype, heads.num_layers, "page")]
        self._bounds: list[Tensor] = []
        self._memo, self._touched = Memo(), Memo()

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""
        self._bounds = pools[POOL]

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """See `Selector`."""
        dense = budget == 0 or end <= max(prompt, budget, self._settings.dense_below)
        return b"" if dense else repr((self._settings, budget, prompt)).encode()

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """See `Selector`. Bounds are made anew of all that a page holds by now, so nothing stays of what was
        there before."""
        if layer >= self._settings.dense_layers:
            select.write_bounds(pool, self._bounds[layer], *self._touched.get(batch, self._pages))

    def _pages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pages that the batch has written to, and how many of their tokens are now there."""
        slots = batch.slot_mapping.numpy()
        # The rows of a page are neighbours.
        last = np.flatnonzero(np.append(np.diff(slots // self._page) != 0, True))
        last = last[slots[last] >= 0]
        ends = slots[last]
        return torch.from_numpy(ends // self._page).long(), torch.from_numpy(ends % self._page + 1).long()

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        found = self._memo.get(batch, self._segments)
        for segment, heads in found:
            segment.chosen = None
            if heads is not None and layer >= self._settings.dense_layers:
                segment.chosen = yield from self._chosen(layer, q[segment.rows], heads)
        return [segment for segment, _ in found]

    def _segments(self, batch: Batch) -> list[tuple[Segment, HeadsChoice | None]]:
        facts = RowFacts.of(batch, self.budgets)
        sparse = facts.answers_beyond(self._settings.dense_below)
        found = segments(batch, facts, np.where(sparse, ANSWER, DENSE))
        return [(s, None if s.per_row is None else self._heads_choice(s.per_row)) for s in found]

    def _heads_choice(self, rows: PerRow) -> HeadsChoice:
        pages = rows.position // self._page + 1
        return HeadsChoice(self._heads, rows, pages, rows.budget // self._page, (1, 1), False)

    def _chosen(self, layer: int, q: Tensor, heads: HeadsChoice) -> Generator[Tensor, Tensor, TokensOfHeads]:
        page, rows = self._page, heads.rows
        bounds = self._bounds[layer].unsqueeze(1)
        index, counts = yield from heads.choose(q, bounds, self._settings.budget // page)
        # Of the last page, which is the row's own, only what is not behind the row.
        tokens = (counts - 1) * page + (rows.position % page + 1)[:, None]
        return TokensOfHeads(select.places(index, rows.table, page, page), tokens)
