"""TokenSelect (arXiv 2411.02886): single tokens, by a soft vote of all heads, the same for all of them.

A row reads the first `sinks` tokens, the `budget` tokens of the middle with most votes and its latest `local`
ones. A token's vote is the sum over query heads of softmax(q . k) over the middle (section 4.1; no factor
1/sqrt(d)). Rows of the prompt vote by chunks of CHUNK positions, with the mean of the chunk's queries, on
what lies `local` tokens before the chunk and further back (4.3). An answer's row keeps the choice of the rows
before it as long as its query is like the one that made it (the Selection Cache, 4.2).

Positions are the tokens' own; or they are compacted, and then nothing is ever rotated further than the model
was trained for, however long a context is. The keys are cached as they are before the rotation. What a row
reads is numbered from 0 on in its order, and rotated as it is read; and all tokens of the middle are at the
same distance of a row that votes, `local` and its place in its chunk (as in InfLLM, arXiv 2402.04617). In the
first layer nothing then tells a token from the same one elsewhere but how the products that made their keys
were rounded, which depends on what else was in a batch: votes are rounded to bfloat16, so that they tie.

Queries vote on the keys of their own KV head, h // group; the authors' code takes h % kv_heads.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, Memo, put
from weaveinf.ops import select
from weaveinf.ops.attention import Paged
from weaveinf.ops.rope import rope_
from weaveinf.selectors.segments import ANSWER, DENSE, PROMPT, PerRow, RowFacts, Segment, Tokens
from weaveinf.selectors.selector import Budgets, Choosing, Heads, Selector, Settings

Positions = Literal["original", "compacted"]
CHUNK = 512
"""Positions of a prompt that share a choice; chunks begin at multiples of it."""


@dataclass(frozen=True)
class TokenSelect(Settings):
    """budget, sinks, local: tokens, see above. threshold: the cosine of two queries from which on a choice is
    kept; above 1 it never is. positions: "original" or "compacted". dense_below: cached tokens up to which
    all are read, as choosing costs more than it saves; of no meaning where positions are compacted, as all
    that is read must then be within sinks, budget and local."""

    name: ClassVar[str] = "tokenselect"
    budget: int = 2048
    sinks: int = 128
    local: int = 512
    threshold: float = 0.9
    dense_below: int = 8192
    positions: Positions = "original"

    @property
    def at_once(self) -> int | None:
        """See `Settings`."""
        most = self.sinks + self.budget + self.local + CHUNK
        return most if self.positions == "compacted" else None

    def make(self, heads: Heads, page_size: int) -> TokenSelector:
        return TokenSelector(self, heads, page_size)


class TokenSelector(Selector):
    """See `Selector`. Counts choices of answers' rows too, in each layer: "choices_kept", "choices_made"."""

    row_align = CHUNK

    def __init__(self, settings: TokenSelect, heads: Heads, page_size: int) -> None:
        if min(settings.budget, settings.local) < 1 or settings.sinks < 0:
            got = f"{settings.budget}, {settings.local} and {settings.sinks}"
            raise ValueError(f"tokenselect wants budget and local from 1 and sinks from 0 on, got {got}")
        if settings.positions not in (known := get_args(Positions)):
            given = f"positions={settings.positions!r}"
            raise ValueError(f"tokenselect: {given} must be one of {', '.join(known)}")
        super().__init__(Budgets(heads, 1, settings.budget, settings.budget))
        self.unrotated = settings.positions == "compacted"
        self._rotary = heads.rotary if self.unrotated else None
        # A key at position 0 is itself, but for what some scalings multiply all they rotate by.
        self._scale = 1.0 if self._rotary is None else float(self._rotary[0, 0])
        self._dense_below = 0 if self.unrotated else settings.dense_below
        self._settings, self._heads, self._page = settings, heads, page_size
        self._forced = settings.sinks + settings.local
        layers, slots = heads.num_layers, heads.max_num_seqs
        width = heads.num_heads // heads.ranks * heads.head_dim
        self._queries = torch.zeros(layers, slots, width, device=heads.device)
        self._held = torch.full((layers, slots), -1, dtype=torch.int32, device=heads.device)
        """The position whose choice a slot holds in a layer; -1: of none."""
        most = min(settings.sinks + settings.budget, heads.max_tokens)
        self._choices = self._held.unsqueeze(2).repeat(1, 1, most)
        self._memo = Memo()

    def admit(self, slot: int, budget: int) -> None:
        """See `Selector`."""
        self.budgets.admit(slot, budget)
        self._held[:, slot] = -1

    def shape(self, prompt: int, end: int, budget: int) -> bytes:
        """See `Selector`. A whole chunk of the prompt shapes its pages alike in every prompt that goes on;
        the last one's rows are another mean in another prompt."""
        if budget == 0 or end <= max(budget + self._forced, self._dense_below):
            return b""
        behind = -(-end // CHUNK) * CHUNK  # where the page's chunk ends
        until = -1 if behind <= prompt else prompt
        return repr((self._settings, budget, until)).encode()

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        found = self._memo.get(batch, self._segments)
        for segment, facts in found:
            if facts is None:
                continue
            asking = q[segment.rows]
            if self._rotary is not None:
                asking = rope_(asking.clone(), self._rotary, facts.distance)
            if isinstance(facts, _Answers):
                segment.chosen = yield from self._for_answers(layer, asking, pool, facts)
            else:
                segment.chosen = yield from self._for_prompts(asking, pool, facts)
        return [segment for segment, _ in found]

    def kinds(self, facts: RowFacts) -> NDArray[np.integer[Any]]:
        """See `Selector`."""
        asked = np.where(facts.position >= facts.prompt, ANSWER, PROMPT)
        # A chunk's middle ends `local` tokens before it, an answer's row's `local` tokens before its own end.
        seen = np.where(asked == ANSWER, facts.position + 1, facts.position // CHUNK * CHUNK)
        least = np.maximum(facts.budget + self._forced, self._dense_below)
        return np.where((facts.budget > 0) & (seen > least), asked, DENSE)

    def _segments(self, batch: Batch) -> list[tuple[Segment, _Answers | _Chunks | None]]:
        of_kind: dict[int, type[_Answers] | type[_Chunks]] = {ANSWER: _Answers, PROMPT: _Chunks}
        found = self.cut(batch)
        for segment in found:
            if self.unrotated and segment.per_row is None:
                table, longest = segment.block_table, int(batch.host.positions[segment.rows].max()) + 1
                index = torch.arange(longest, dtype=torch.int32, device=table.device).repeat(len(table), 1)
                slots = _slots(index, table, self._page)
                seq = segment.facts.seq
                bounds = np.searchsorted(seq, np.arange(seq[0], seq[-1] + 2)).tolist()
                segment.chosen = self._tokens(slots, segment.cu_seqlens, segment.positions, bounds)
        given = self._settings, self._page
        return [(s, None if s.per_row is None else of_kind[s.kind](s.per_row, *given)) for s in found]

    def _tokens(self, slots: Tensor, cu_seqlens: Tensor, positions: Tensor, bounds: Sequence[int]) -> Tokens:
        """bounds: cu_seqlens on the host."""
        if self._rotary is None:
            return Tokens(slots, cu_seqlens, positions)
        return Compacted(slots, cu_seqlens, positions, bounds, self._rotary)

    def _middle(
        self, q: Tensor, pool: Tensor, table: Tensor, seen: Tensor, budget: Tensor, longest: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        """Slots of the sinks and the best of the middle for queries [n, Hq, D] that have `seen` tokens (int32
        [n]), in order of position: int32 [n, as many as are ever chosen], -1
        behind them."""
        s = self._settings
        firsts, ends = torch.full_like(seen, s.sinks), seen - s.local
        index = torch.empty(len(q), self._choices.shape[2], dtype=torch.int32, device=q.device)
        for rows in select.slices(len(q), self._heads.num_kv_heads * longest):
            where, width = (table[rows], firsts[rows], ends[rows]), longest - s.local
            votes = yield select.votes(q[rows], pool, where, width, self._scale, None, True).sum(1)
            if self.unrotated:
                votes = votes.bfloat16().float()
            index[rows], _ = select.top_k(votes, ends[rows], budget[rows] + s.sinks, index.shape[1])
        return _slots(index, table, self._page)

    def _for_answers(
        self, layer: int, q: Tensor, pool: Tensor, facts: _Answers
    ) -> Generator[Tensor, Tensor, Tokens]:
        rows, slot = facts.rows, facts.rows.slot
        flat, kept = q.flatten(1).float(), self._queries[layer, slot]
        dots = [(flat * kept).sum(1), (flat * flat).sum(1), (kept * kept).sum(1)]
        dot, own, other = yield torch.stack(dots)
        hit = dot >= self._settings.threshold * (own * other).sqrt()
        hit &= (self._held[layer, slot] == rows.position - 1) & ~facts.again
        chosen = self._choices[layer, slot]
        asked = _asked(~hit)
        miss = ~hit[asked]
        if len(miss):
            seen = (rows.position[asked] + 1).where(miss, self._forced)  # who keeps its choice has no middle
            where = rows.table[asked], seen, rows.budget[asked], rows.longest
            found = yield from self._middle(q[asked], pool, *where)
            miss = miss[:, None]
            chosen[asked] = found = found.where(miss, chosen[asked])
            self._queries[layer, slot[asked]] = flat[asked].where(miss, kept[asked])
            self._choices[layer, slot[asked]] = found
        self._held[layer, slot] = facts.held
        self.counts.update(choices_kept=hit.sum(), choices_made=(~hit).sum())
        slots, counts = _packed(torch.cat([chosen, facts.local], 1), facts.full)
        return self._tokens(slots, facts.starts, counts - 1, range(len(slots) + 1))

    def _for_prompts(self, q: Tensor, pool: Tensor, facts: _Chunks) -> Generator[Tensor, Tensor, Tokens]:
        means = torch.stack([part.float().mean(0) for part in q.split(facts.lengths)]).to(q.dtype)
        chosen = yield from self._middle(means, pool, facts.table, facts.seen, facts.budget, facts.longest)
        slots, counts = _packed(torch.cat([chosen, facts.tail], 1), False)
        places = counts[facts.of_row] - 1 - facts.behind
        return self._tokens(slots, facts.starts, places, facts.bounds)


@dataclass
class Compacted(Tokens):
    """Of keys that are cached unrotated: a sequence's tokens stand at positions 0, 1, ... in their order, and
    its rows at theirs among them. bounds: cu_seqlens on the host."""

    bounds: Sequence[int]
    rotary: Tensor

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """See `Chosen`."""
        # There may be room for more than requests choose that ask for less, and more than can be rotated.
        slots = self.slots[:, : len(self.rotary)].long()
        count = slots.shape[1]
        for part in select.slices(len(slots), count * keys[0, 0].numel()):
            rows = slice(self.bounds[part.start], self.bounds[part.stop])
            k, v = (pool.flatten(0, 1)[slots[part]] for pool in (keys, values))
            here = torch.arange(len(k) * count, dtype=torch.int32, device=k.device)
            rope_(k.flatten(0, 1), self.rotary, here % count)
            turned = rope_(q[rows].clone(), self.rotary, self.positions[rows])
            starts = self.cu_seqlens[part.start : part.stop + 1] - rows.start
            paged = Paged(here.view(-1, count), starts, self.positions[rows])
            select.attend(turned, k, v, paged, scale, out[rows])


class _Answers:
    """What all layers ask of an answer's rows.

    Attributes:
        again: rows of a request that has several, as it is computed again: its choices are dropped.
        held: the position that its slot holds from now on, -1 for none.
        local: slots of the latest tokens, int32 [rows, local].
        full: whether every row chooses as many as there is room for.
        distance: how far behind keys a row stands as it votes, where positions are compacted; int32 [rows].
    """

    def __init__(self, rows: PerRow, settings: TokenSelect, page_size: int) -> None:
        self.rows = rows
        self.again = torch.zeros_like(rows.slot, dtype=torch.bool)
        self.again[1:] = rows.slot[1:] == rows.slot[:-1]
        self.again[:-1] |= self.again[1:].clone()
        self.held = rows.position.masked_fill(self.again, -1)
        device = rows.position.device
        back = torch.arange(1 - settings.local, 1, dtype=torch.int32, device=device)
        self.local = _slots(rows.position[:, None] + back, rows.table, page_size)
        self.full = bool((rows.facts.budget == settings.budget).all())
        self.starts = torch.arange(len(rows.slot) + 1, dtype=torch.int32, device=device)
        self.distance = torch.full_like(rows.position, settings.local)


class _Chunks:
    """What all layers ask of a prompt's rows, which choose by chunks.

    Attributes:
        bounds: where chunks begin, and the last ends.
        lengths, seen, budget, table: of each chunk, its rows, the tokens before it, and its request's.
        tail: slots of what is local to a chunk, and of the chunk; int32 [chunks, local + CHUNK], -1 behind
        them. of_row: each row's chunk. behind: how many rows of the chunk come after it (int32).
        distance: as in `_Answers`.
    """

    def __init__(self, rows: PerRow, settings: TokenSelect, page_size: int) -> None:
        facts, device = rows.facts, rows.position.device
        chunk = facts.position // CHUNK * CHUNK
        new = np.append(True, (np.diff(chunk) != 0) | (np.diff(facts.seq) != 0))
        starts = np.append(np.flatnonzero(new), len(chunk))
        self.bounds, self.longest = starts.tolist(), int(chunk.max())
        self.lengths = np.diff(starts).tolist()
        first = put(torch.from_numpy(starts[:-1]), device)
        self.starts = put(torch.from_numpy(starts), device).int()
        self.of_row = put(torch.from_numpy(new.cumsum() - 1), device)
        self.budget, self.table = rows.budget[first], rows.table[first]
        self.seen = rows.position[first] // CHUNK * CHUNK
        last = rows.position[self.starts[1:] - 1]
        tail = self.seen[:, None] + torch.arange(-settings.local, CHUNK, dtype=torch.int32, device=device)
        self.tail = _slots(tail.masked_fill(tail > last[:, None], -1), self.table, page_size)
        self.behind = last[self.of_row] - rows.position
        self.distance = settings.local + rows.position % CHUNK


def _asked(miss: Tensor) -> Tensor | slice:
    """The rows that are worked on: those that miss, or all where the host would have to wait to know."""
    return miss.nonzero().flatten() if miss.device.type == "cpu" else slice(None)


def _slots(index: Tensor, table: Tensor, page_size: int) -> Tensor:
    """Of positions (int32 [n, count]), -1 where these are."""
    return select.places(index.unsqueeze(1), table, page_size).squeeze(1).masked_fill_(index < 0, -1)


def _packed(slots: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    """Slots with what is -1 behind the others, and how many those are (int32); full: none is -1."""
    if full:
        return slots, slots.new_full((len(slots),), slots.shape[1])
    real = slots >= 0
    behind = torch.argsort((~real).int(), dim=1, stable=True)
    return slots.gather(1, behind).clamp_(min=0), real.sum(1).int()
