"""TokenSelect (arXiv 2411.02886): single tokens, by a soft vote of all heads, the same for all of them.

A row reads the first `sinks` tokens, the `budget` tokens of the middle with most votes and its latest `local`
ones. A token's vote is the sum over query heads of softmax(q . k) over the middle (section 4.1; no factor
1/sqrt(d)). Rows of the prompt vote by chunks of CHUNK positions, with the mean of the chunk's queries, on
what lies `local` tokens before the chunk and further back (4.3). An answer's row keeps the choice of the rows
before it as long as its query is like the one that made it (the Selection Cache, 4.2).

Queries vote on the keys of their own KV head, h // group; the authors' code takes h % kv_heads.
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
    PROMPT,
    Budgets,
    Choosing,
    Heads,
    Memo,
    PerRow,
    RowFacts,
    Segment,
    Tokens,
    segments,
)

CHUNK = 512
"""Positions of a prompt that share a choice; chunks begin at multiples of it."""


@dataclass(frozen=True)
class TokenSelect:
    """budget, sinks, local: tokens, see above. threshold: the cosine of two queries from which on a choice is
    kept; above 1 it never is."""

    name: ClassVar[str] = "tokenselect"
    budget: int = 2048
    sinks: int = 128
    local: int = 512
    threshold: float = 0.9

    def make(self, heads: Heads, page_size: int) -> TokenSelector:
        return TokenSelector(self, heads, page_size)


class TokenSelector:
    """See `Selector`."""

    row_align = CHUNK
    pools: tuple[PoolSpec, ...] = ()

    def __init__(self, settings: TokenSelect, heads: Heads, page_size: int) -> None:
        if min(settings.budget, settings.local) < 1 or settings.sinks < 0:
            raise ValueError(
                f"tokenselect wants budget and local of at least 1 and sinks of at least 0, got "
                f"{settings.budget}, {settings.local} and {settings.sinks}"
            )
        self.budgets = Budgets(heads, 1, settings.budget)
        self.hits = self.misses = 0
        self._settings, self._heads, self._page = settings, heads, page_size
        self._forced = settings.sinks + settings.local
        layers, slots = heads.num_layers, heads.max_num_seqs
        width = heads.num_heads // heads.ranks * heads.head_dim
        self._queries = torch.zeros(layers, slots, width)
        self._choices = torch.full((layers, slots, settings.sinks + settings.budget), -1, dtype=torch.int32)
        self._held = torch.full((layers, slots), -1, dtype=torch.int32)
        """The position whose choice a slot holds in a layer; -1: of none."""
        self._memo = Memo()

    def admit(self, slot: int, budget: int) -> None:
        """See `Selector`."""
        self.budgets.admit(slot, budget)
        self._held[:, slot] = -1

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """See `Selector`. A whole chunk of the prompt shapes its pages alike in every prompt that goes on;
        the last one's rows are another mean in another prompt."""
        if budget == 0 or end <= budget + self._forced:
            return b""
        behind = -(-end // CHUNK) * CHUNK  # where the page's chunk ends
        until = -1 if behind <= prompt else prompt
        return repr((self._settings, budget, until)).encode()

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """See `Selector`."""

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        found = self._memo.get(batch, self._segments)
        for segment in found:
            if segment.per_row is not None:
                choose = self._for_answers if segment.kind == ANSWER else self._for_prompts
                segment.chosen = yield from choose(layer, q[segment.rows], pool, segment.per_row)
        return found

    def _segments(self, batch: Batch) -> list[Segment]:
        facts = RowFacts.of(batch, self.budgets)
        asked = np.where(facts.position >= facts.prompt, ANSWER, PROMPT)
        # A chunk's middle ends `local` tokens before it, an answer's row's `local` tokens before its own end.
        seen = np.where(asked == ANSWER, facts.position + 1, facts.position // CHUNK * CHUNK)
        sparse = (facts.budget > 0) & (seen > facts.budget + self._forced)
        return segments(batch, facts, np.where(sparse, asked, DENSE))

    def _middle(
        self, q: Tensor, pool: Tensor, table: Tensor, seen: Tensor, budget: Tensor
    ) -> Generator[Tensor, Tensor, Tensor]:
        """The sinks and the best of the middle for queries [n, Hq, D] that have `seen` tokens (int32 [n]):
        int32 [n, sinks + budget], ascending, -1 behind them."""
        s = self._settings
        firsts, ends = torch.full_like(seen, s.sinks), seen - s.local
        votes = select.votes(q, pool, table, firsts, ends, int(ends.max()), 1.0).sum(1)
        index, _ = select.top_k((yield votes), ends, budget + s.sinks, s.sinks + s.budget)
        return index

    def _for_answers(
        self, layer: int, q: Tensor, pool: Tensor, rows: PerRow
    ) -> Generator[Tensor, Tensor, Tokens]:
        slot, flat = rows.slot, q.flatten(1).float()
        kept = self._queries[layer, slot]
        dot, own, other = yield torch.stack(
            [(flat * kept).sum(1), (flat * flat).sum(1), (kept * kept).sum(1)]
        )
        # A request of several rows is computed again: its choices are dropped.
        again = torch.zeros_like(slot, dtype=torch.bool)
        again[1:] = slot[1:] == slot[:-1]
        again[:-1] |= again[1:].clone()
        hit = dot >= self._settings.threshold * (own * other).sqrt()
        hit &= (self._held[layer, slot] == rows.position - 1) & ~again
        miss = (~hit).nonzero().flatten()
        chosen = self._choices[layer, slot]
        if len(miss):
            seen = rows.position[miss] + 1
            chosen[miss] = yield from self._middle(q[miss], pool, rows.table[miss], seen, rows.budget[miss])
            self._queries[layer, slot[miss]] = flat[miss]
            self._choices[layer, slot[miss]] = chosen[miss]
        self._held[layer, slot] = rows.position.masked_fill(again, -1)
        if layer == 0:
            self.hits += len(hit) - len(miss)
            self.misses += len(miss)
        local = rows.position[:, None] + torch.arange(1 - self._settings.local, 1, dtype=torch.int32)
        index, counts = _packed(torch.cat([chosen, local], 1))
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        return Tokens(select.slots(index, rows.table, self._page), starts, counts - 1)

    def _for_prompts(
        self, layer: int, q: Tensor, pool: Tensor, rows: PerRow
    ) -> Generator[Tensor, Tensor, Tokens]:
        chunk = rows.position // CHUNK * CHUNK
        new = torch.ones_like(chunk, dtype=torch.bool)
        new[1:] = (chunk[1:] != chunk[:-1]) | (rows.slot[1:] != rows.slot[:-1])
        first = new.nonzero().flatten()  # row of each chunk
        starts = torch.cat([first, first.new_tensor([len(q)])])
        means = torch.stack([part.float().mean(0) for part in q.split(starts.diff().tolist())]).to(q.dtype)
        seen, table = chunk[first], rows.table[first]
        chosen = yield from self._middle(means, pool, table, seen, rows.budget[first])
        # Behind the choice: what is local to the chunk, and the chunk up to the row itself.
        local = self._settings.local
        width = local + int(starts.diff().max())
        tail = seen[:, None] + torch.arange(-local, width - local, dtype=torch.int32)
        index, counts = _packed(
            torch.cat([chosen, tail.masked_fill(tail > rows.position[starts[1:] - 1, None], -1)], 1)
        )
        of_row = new.cumsum(0) - 1
        behind = rows.position[starts[1:] - 1][of_row] - rows.position  # rows of the chunk that come later
        where = select.slots(index, table, self._page)
        return Tokens(where, starts.int(), (counts[of_row] - 1 - behind).int())


def _packed(index: Tensor) -> tuple[Tensor, Tensor]:
    """What is chosen first, -1 behind it, and how much it is (int32)."""
    real = index >= 0
    counts = real.sum(1).int()
    if not bool(real.all()):
        index = index.gather(1, torch.argsort((~real).int(), dim=1, stable=True))
    return index, counts
