"""A cache with known keys for selectors to choose from, on one rank or on several that vote in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.selectors.segments import Segment, Tokens, TokensOfHeads
from weaveinf.selectors.selector import Heads, Selector, Settings

PAGE = 16
HEADS, KV_HEADS, DIM, LAYERS = 8, 4, 32, 3
MODEL = "this model's fingerprint"
CPU = torch.device("cpu")
TURNS = 4e4 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
"""Of each rotary plane for every position."""
STRETCH = 1.25
"""What the rotation multiplies by, as some scalings of it do."""


class Cached:
    """Sequences of `lengths` tokens with random keys, in pages in random order (shared by no two).

    keys: [tokens, KV_HEADS, DIM] of each sequence; queries: [tokens, HEADS, DIM].
    """

    def __init__(
        self, lengths: Sequence[int], prompts: Sequence[int], seed: int = 0, dtype: Any = torch.float32
    ) -> None:
        torch.manual_seed(seed)
        self.lengths, self.prompts, self.dtype = lengths, prompts, dtype
        self.keys = [torch.randn(n, KV_HEADS, DIM).to(dtype) for n in lengths]
        # Neighbours ask alike, as they do in models: some choices are kept, some are not.
        self.queries = [(torch.randn(n, HEADS, DIM) * 0.3).cumsum(0).to(dtype) for n in lengths]
        counts = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(counts) + 2).to(torch.int32)
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        at = 0
        for s, count in enumerate(counts):
            self.table[s, :count] = order[at : at + count]
            at += count
        self.num_pages = len(order)

    def slots(self, s: int) -> Tensor:
        at = torch.arange(self.lengths[s])
        return self.table[s, at // PAGE].long() * PAGE + at % PAGE

    def batch(self, rows: Sequence[tuple[int, int, int]]) -> Batch:
        """Rows (sequence, first position, position behind the last)."""
        counts = [end - first for _, first, end in rows]
        positions = torch.cat([torch.arange(first, end, dtype=torch.int32) for _, first, end in rows])
        return Batch(
            input_ids=torch.zeros(len(positions), dtype=torch.int64),
            positions=positions,
            slot_mapping=torch.cat([self.slots(s)[first:end] for s, first, end in rows]).int(),
            cu_seqlens_q=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            seq_lens=torch.tensor([end for _, _, end in rows], dtype=torch.int32),
            num_prompt_tokens=torch.tensor([self.prompts[s] for s, _, _ in rows], dtype=torch.int32),
            block_table=self.table[[s for s, _, _ in rows]],
            state_slot=torch.tensor([s for s, _, _ in rows], dtype=torch.int32),
            logit_rows=torch.arange(len(positions)),
        )


class Group:
    """`size` ranks' parts of a method over one cache."""

    def __init__(self, cached: Cached, settings: Settings, size: int = 1) -> None:
        self.cached, self.size = cached, size
        self._by_query = getattr(settings, "sets", "") == "query_head"
        self.heads, self.parts, self.pools = [], [], []
        self.segments: list[list[Segment]] = []
        """Of each rank, of the latest choice."""
        self._places: dict[int, dict[int, int]] = {}
        for rank in range(size):
            own = (
                range(rank * KV_HEADS // size, (rank + 1) * KV_HEADS // size)
                if size <= KV_HEADS
                else range(rank * KV_HEADS // size, rank * KV_HEADS // size + 1)
            )
            known = (len(cached.lengths), cached.dtype, CPU)
            model = {"rank": rank, "fingerprint": MODEL, "rotary": rotary(700), "max_tokens": 4096}
            heads = Heads(LAYERS, HEADS, KV_HEADS, DIM, own, size, *known, **model)  # type: ignore[arg-type]
            part = settings.make(heads, PAGE)
            keys = PoolSpec("key", (len(own), DIM), cached.dtype, LAYERS)
            pools = Pools([keys, *part.pools], cached.num_pages, PAGE, CPU)
            for pool in (p for spec in pools.specs for p in pools[spec.name]):
                pool.fill_(torch.nan)  # nothing may be read that was not written
            part.bind(pools)
            self.heads.append(heads)
            self.parts.append(part)
            self.pools.append(pools)

    def places(self, s: int) -> dict[int, int]:
        """Positions of a sequence by their slots."""
        if s not in self._places:
            self._places[s] = {slot: i for i, slot in enumerate(self.cached.slots(s).tolist())}
        return self._places[s]

    def write(self, batch: Batch, layer: int = 2) -> None:
        """The batch's keys come into the cache."""
        rows = [
            self.cached.keys[s][p] for s, p in zip(_sequences(batch), batch.positions.tolist(), strict=True)
        ]
        keys = torch.stack(rows)
        for part, pools, heads in zip(self.parts, self.pools, self.heads, strict=True):
            own = keys[:, heads.kv_heads.start : heads.kv_heads.stop]
            pool = pools["key"][layer]
            pool.flatten(0, 1)[batch.slot_mapping.long()] = own
            part.write(layer, own, pool, batch)

    def choose(self, batch: Batch, layer: int = 2) -> list[list[set[int] | None]]:
        """What each row may read of its sequence (None: all), by KV head, or by query head where these have
        sets of their own; the same for all of them where the method has no sets of heads."""
        at = zip(_sequences(batch), batch.positions.tolist(), strict=True)
        q = torch.stack([self.cached.queries[s][p] for s, p in at])
        each = HEADS // self.size
        turns = [
            part.choose(layer, q[:, r * each : (r + 1) * each].contiguous(), pools["key"][layer], batch)
            for r, (part, pools) in enumerate(zip(self.parts, self.pools, strict=True))
        ]
        results: list[Any] = [None] * self.size
        sent: list[Any] = [None] * self.size
        while True:
            ballots = []
            for r, turn in enumerate(turns):
                try:
                    ballots.append(turn.send(sent[r]))
                except StopIteration as end:
                    results[r] = end.value
            if not ballots:
                break
            assert len(ballots) == self.size, "ranks vote in different places"
            total = torch.stack(ballots).sum(0)
            sent = [total.clone() for _ in turns]
        self.segments = results
        return self._sets(batch, results)

    def _sets(self, batch: Batch, results: list[list[Segment]]) -> list[list[set[int] | None]]:
        count = HEADS if self._by_query else KV_HEADS
        by_row: list[list[set[int] | None]] = [[None] * count for _ in range(batch.num_tokens)]
        for heads, segments in zip(self.heads, results, strict=True):
            assert [i for seg in segments for i in range(seg.rows.start, seg.rows.stop)] == [
                *range(batch.num_tokens)
            ]
            for segment in segments:
                for i, head in enumerate((heads.apart if self._by_query else heads).kv_heads):
                    for row in range(segment.rows.start, segment.rows.stop):
                        found = self._read(batch, segment, row, i, len(heads.kv_heads))
                        known = by_row[row][head]
                        assert known is None or known == found, "ranks that share a KV head differ"
                        by_row[row][head] = found
        return by_row

    def _read(self, batch: Batch, segment: Segment, row: int, head: int, kv_heads: int) -> set[int] | None:
        chosen, at = segment.chosen, row - segment.rows.start
        if chosen is None:
            return None
        if isinstance(chosen, TokensOfHeads):
            places = chosen.places[at, head, : int(chosen.counts[at, head])]
            assert (places % kv_heads == head * kv_heads // chosen.places.shape[1]).all()
            slots = places // kv_heads
        else:
            assert isinstance(chosen, Tokens)
            s = int(torch.searchsorted(chosen.cu_seqlens, at, right=True)) - 1
            slots = chosen.slots[s, : int(chosen.positions[at]) + 1]
        place = self.places(
            int(batch.state_slot[torch.searchsorted(batch.cu_seqlens_q, row, right=True) - 1])
        )
        logical = [place[slot] for slot in slots.tolist()]
        assert len(set(logical)) == len(logical), "a token is read twice"
        assert logical == sorted(logical)
        return set(logical)


def rotary(positions: int) -> Tensor:
    """As `rope_` takes it."""
    angles = torch.arange(positions)[:, None] * TURNS
    return (STRETCH * torch.cat([angles.cos(), angles.sin()], 1)).float()


def turned(x: Tensor, position: int) -> Tensor:
    """x [heads, D] by definition: float64."""
    a, b = x.double().chunk(2, -1)
    cos, sin = (position * TURNS).cos(), (position * TURNS).sin()
    return STRETCH * torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _sequences(batch: Batch) -> list[int]:
    return np.repeat(batch.state_slot.numpy(), np.diff(batch.cu_seqlens_q.numpy())).tolist()


def part_of(group: Group) -> Selector:
    """The first rank's."""
    return group.parts[0]


def sums(q: Tensor, keys: Tensor) -> Tensor:
    """Of q [HEADS, D] on keys [tokens, KV_HEADS, D], by KV head: float64 [KV_HEADS, tokens]."""
    grouped = q.double().view(KV_HEADS, HEADS // KV_HEADS, -1)
    return torch.einsum("ghd,kgd->gk", grouped, keys.double())


def soft_vote(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The same of shares."""
    grouped = q.double().view(KV_HEADS, HEADS // KV_HEADS, -1)
    return (torch.einsum("ghd,kgd->ghk", grouped, keys.double()) * scale).softmax(-1).sum(1)


def best(scores: Tensor, count: int, first: int = 0) -> set[int]:
    """Positions of the largest scores, the lowest of equal ones."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return {first + i for i in order[:count]}
