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

from weaveinf.cache.batch import Batch, Memo, put
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import select
from weaveinf.selectors.by_head import ByHead, HeadsChoice
from weaveinf.selectors.segments import PerRow, TokensOfHeads
from weaveinf.selectors.selector import Budgets, Heads, Settings

POOL = "quest bounds"


@dataclass(frozen=True)
class Quest(Settings):
    """budget: cached tokens that an answer's rows read for each KV head, in whole pages; the first
    `dense_layers` layers read all. dense_below: cached tokens up to which all are read, as choosing costs
    more than it saves."""

    name: ClassVar[str] = "quest"
    budget: int = 2048
    dense_layers: int = 2
    dense_below: int = 6144

    def make(self, heads: Heads, page_size: int) -> QuestSelector:
        return QuestSelector(self, heads, page_size)


class QuestSelector(ByHead):
    """See `Selector`."""

    def __init__(self, settings: Quest, heads: Heads, page_size: int) -> None:
        if settings.budget < 2 * page_size:
            raise ValueError(
                f"quest reads its first page and the last: budget={settings.budget} must be at least "
                f"{2 * page_size}"
            )
        budgets = Budgets(heads, 2 * page_size, settings.budget, settings.budget)
        super().__init__(settings, budgets, settings.dense_below, settings.dense_layers)
        self._heads, self._page = heads, page_size
        shape = (len(heads.kv_heads), 2 * heads.head_dim)
        layers = max(0, heads.num_layers - settings.dense_layers)
        self.pools = [PoolSpec(POOL, shape, heads.dtype, layers, "page")]
        self._bounds: list[Tensor] = []
        self._touched = Memo()

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""
        self._bounds = [torch.empty(0)] * self._dense_layers + pools[POOL]

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """See `Selector`. Bounds are made anew of all that a page holds by now, so nothing stays of what was
        there before."""
        if layer >= self._dense_layers:
            select.write_bounds(pool, self._bounds[layer], *self._touched.get(batch, self._pages))

    def _pages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pages that the batch has written to, and how many of their tokens are now there."""
        slots = batch.host.slot_mapping.numpy()
        # The rows of a page are neighbours.
        last = np.flatnonzero(np.append(np.diff(slots // self._page) != 0, True))
        last = last[slots[last] >= 0]
        ends = slots[last]
        found = np.stack([ends // self._page, ends % self._page + 1]).astype(np.int64)
        pages, counts = put(torch.from_numpy(found), batch.positions.device)
        return pages, counts

    def candidates(self, rows: PerRow) -> HeadsChoice:
        """See `ByHead`."""
        return HeadsChoice(self._heads, rows, self._page, (1, 1), False)

    def chosen(self, layer: int, q: Tensor, heads: HeadsChoice) -> Generator[Tensor, Tensor, TokensOfHeads]:
        """See `ByHead`."""
        page, rows = self._page, heads.rows
        bounds = self._bounds[layer].unsqueeze(1)
        index, counts = yield from heads.choose(q, bounds)
        # Of the last page, which is the row's own, only what is not behind the row.
        tokens = (counts - 1) * page + (rows.position % page + 1)[:, None]
        return TokensOfHeads(select.places(index, rows.table, page, page), tokens)
