"""HISA (arXiv 2603.28458): a model's own indexer (DeepSeek sparse attention, `ops.index`), in two stages.

The indexer scores every cached token to find those that a row reads. Here it scores the means of blocks of
keys first, and tokens only of the best `blocks` blocks; the first block and the row's own always count. A row
with no more tokens than these blocks hold is served as without it. (Its own block is seldom full: where the
blocks hold hardly more than a row reads, some rows read a little less.)

A block's mean is kept with the block's last page, whose hash covers all that came before it, so what requests
share may stay. It is made when the block's last token is written, and read by rows behind it alone: never is
one read that was made of other keys. The row's own block, which may not be full, needs no mean, since it is
read in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, Memo, put
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import index, select
from weaveinf.ops.index import IndexKeys
from weaveinf.selectors.segments import DENSE, PerRow, RowFacts
from weaveinf.selectors.selector import Budgets, Heads, Selector, Settings

POOL = "hisa means"
MOST = 1 << 30
"""Tokens of blocks that are looked into."""
FLAT, STAGED = 1, 2
"""How rows that do not read all are served: all their tokens are scored, or blocks first."""


@dataclass(frozen=True)
class Hisa(Settings):
    """block: tokens whose keys have one mean; blocks: how many of them are looked into. A request's budget
    is of the tokens of whole blocks; 0: no blocks, all tokens are scored. dense_below: cached tokens up to
    which all are scored, as two stages cost more than they save."""

    name: ClassVar[str] = "hisa"
    serves: ClassVar[str] = "index"
    block: int = 128
    blocks: int = 64
    dense_below: int = 12288

    @property
    def budget(self) -> int:
        return self.block * self.blocks

    def make(self, heads: Heads, page_size: int) -> HisaSelector:
        return HisaSelector(self, heads, page_size)


class HisaSelector(Selector):
    """See `Selector`. What it looks at is the indexer's: `write_index` and `choose_among_blocks` are in the
    places of `write` and `choose`."""

    def __init__(self, settings: Hisa, heads: Heads, page_size: int) -> None:
        if heads.index is None:
            raise ValueError(
                "hisa serves a model's own indexer, and this model has none: use a model with sparse "
                "attention (DeepSeek-V3.2, GLM-5) or another selector"
            )
        if settings.block < page_size or settings.block % page_size:
            raise ValueError(f"hisa: block={settings.block} must be a multiple of {page_size}")
        if settings.blocks < 2 or settings.budget > MOST:
            raise ValueError(
                f"hisa: blocks={settings.blocks} must be at least 2, the first one and the last, and at most "
                f"{MOST // settings.block}"
            )
        if settings.budget < heads.index.top_k:
            raise ValueError(
                f"hisa: {settings.blocks} blocks of {settings.block} tokens hold fewer than the "
                f"{heads.index.top_k} that this model's rows read: set blocks to at least "
                f"{-(-heads.index.top_k // settings.block)}"
            )
        least = max(2, -(-heads.index.top_k // settings.block)) * settings.block
        super().__init__(Budgets(heads, least, settings.budget, settings.budget))
        self._settings, self._page, self._top_k = settings, page_size, heads.index.top_k
        self.pools = [PoolSpec(POOL, (heads.index.dim,), heads.dtype, heads.index.layers, "page")]
        self._means: list[Tensor] = []
        self._full = Memo()

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""
        self._means = pools[POOL]

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """See `Selector`: until there are more tokens than the blocks hold, the model alone shaped a page."""
        budget -= budget % self._settings.block
        flat = budget == 0 or end <= max(budget, self._settings.dense_below)
        return b"" if flat else repr((self._settings, budget)).encode()

    def write_index(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        """The batch's keys have just been written to the cached ones: the means of blocks now full."""
        pages: Tensor = self._full.get(batch, self._filled)
        if len(pages):
            slots = pages.unsqueeze(-1) * self._page + torch.arange(self._page, device=pages.device)
            means = self._means[layer]
            means[pages[:, -1]] = keys.at(slots.flatten(1)).mean(1).to(means.dtype)

    def _filled(self, batch: Batch) -> Tensor:
        """The pages of the blocks of which the batch writes the last token: int64 [n, pages of a block]."""
        device, batch = batch.positions.device, batch.host
        positions = batch.positions.numpy()
        ends = (positions + 1) % self._settings.block == 0
        rows = np.flatnonzero(ends & (batch.slot_mapping.numpy() >= 0))
        seqs = np.searchsorted(batch.cu_seqlens_q.numpy(), rows, "right") - 1
        per_block = self._settings.block // self._page
        columns = positions[rows, None] // self._page + np.arange(1 - per_block, 1)
        return put(torch.from_numpy(batch.block_table.numpy()[seqs[:, None], columns]), device).long()

    def kinds(self, facts: RowFacts) -> NDArray[np.integer[Any]]:
        """See `Selector`."""
        budget = facts.budget - facts.budget % self._settings.block
        beyond = facts.position >= np.maximum(budget, self._settings.dense_below)
        return np.where(facts.position < self._top_k, DENSE, np.where((budget > 0) & beyond, STAGED, FLAT))

    def choose_among_blocks(
        self, layer: int, q: Tensor, weights: Tensor, keys: IndexKeys, rows: PerRow
    ) -> tuple[Tensor, Tensor]:
        """As `ops.index.choose`, for rows that have more tokens than their blocks hold: q [rows, H, D],
        weights float32 [rows, H]."""
        block, found = self._settings.block, []
        blocks, counts = self._best_blocks(layer, q, weights, rows)
        offsets = torch.arange(block, dtype=torch.int32, device=q.device)
        for some in select.slices(len(q), blocks.shape[1] * block):
            tokens = (blocks[some].unsqueeze(-1) * block + offsets).flatten(1)
            own, table = rows.position[some], rows.table[some]
            tokens = torch.minimum(tokens, own.unsqueeze(-1))  # none behind the row has a page
            ends = (counts[some] - 1) * block + own % block + 1
            slots = select.places(tokens.unsqueeze(1), table, self._page).squeeze(1)
            mine = q[some], weights[some], keys.single, slots, ends, slots.shape[1], self._top_k
            at, count = index.choose(*mine)
            chosen = tokens.gather(1, at.clamp(min=0).long())
            found.append((chosen.masked_fill(at < 0, -1), count))
        return select.joined(found)

    def _best_blocks(self, layer: int, q: Tensor, weights: Tensor, rows: PerRow) -> tuple[Tensor, Tensor]:
        """Each row's blocks, ascending, -1 behind them, and how many they are; the last is its own."""
        block, found = self._settings.block, []
        own, wanted = rows.position // block, rows.budget // block
        table = rows.table[:, block // self._page - 1 :: block // self._page].contiguous()
        means, width = IndexKeys(self._means[layer].unsqueeze(1)), (rows.longest - 1) // block + 1
        capacity = min(int(rows.facts.budget.max()) // block, width)
        q = q.to(means.values.dtype)  # exact, also of eight bits
        for some in select.slices(len(q), width):
            scores = index.scores(q[some], weights[some], means, table[some], own[some], width)
            scores[:, 0] = torch.inf
            scores.scatter_(1, own[some, None].long(), torch.inf)
            found.append(select.top_k(scores, own[some] + 1, wanted[some], capacity))
        return select.joined(found)
