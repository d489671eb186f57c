"""LazyLLM (arXiv 2407.14057): rows of a prompt leave the model on their way through it, and may come back.

The layers are in stages. Where one begins, the tokens that go on are the `budget` percent of the prompt's
tokens so far to which the latest token attends most, by the mean over all heads of the layer before (equation
3). What stays behind leaves its hidden state in an auxiliary store. When an answer's row comes by, every
stage chooses anew among all of the prompt's tokens; one that is chosen and was never there comes out of the
store and is computed along with the row. So a token is computed at most once in each layer, and attention in
a stage reads the chosen tokens and the answer's only.

The store of a request is held until the first step after its end, on every rank whole: what stays behind,
times the hidden size, for each stage. Pages are shared with nobody.

Positions stay what they were. A prompt that does not fit into one step, one whose log-probabilities are
wanted and one that is computed again after a preemption run whole: the last token must be seen first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch, Memo
from weaveinf.comm.seam import Joint, Seam
from weaveinf.ops import select
from weaveinf.ops.norm import rms_norm
from weaveinf.selectors.segments import ANSWER, DENSE, RowFacts, Segment, Tokens, segments
from weaveinf.selectors.selector import Budgets, Choosing, Heads, Selector, Settings

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class LazyLlm(Settings):
    """budget: percent of the prompt's tokens that go on from a stage to the next; stages: how many more there
    are than the first, which all tokens pass; they begin at even parts of the first nine tenths of the
    layers."""

    name: ClassVar[str] = "lazyllm"
    budget: int = 70
    stages: int = 3

    def make(self, heads: Heads, page_size: int) -> LazySelector:
        if heads.device.type == "cuda":
            raise ValueError("lazyllm runs on CPUs only; use device='cpu' or another selector")
        return LazySelector(self, heads, page_size)


@dataclass
class _Store:
    """Hidden states of tokens that a stage has not seen: ascending positions and a row for each."""

    positions: Positions
    hidden: Tensor

    def put(self, positions: Positions, hidden: Tensor) -> None:
        order = np.argsort(np.concatenate([self.positions, positions]), kind="stable")
        self.hidden = torch.cat([self.hidden, hidden])[order]
        self.positions = np.concatenate([self.positions, positions])[order]

    def take(self, positions: Positions) -> Tensor:
        """The rows of these, which leave."""
        at = np.searchsorted(self.positions, positions)
        taken = self.hidden[at]
        stay = np.setdiff1d(np.arange(len(self.positions)), at)
        self.positions, self.hidden = self.positions[stay], self.hidden[stay]
        return taken


@dataclass
class _Request:
    """A prompt under way; all by stage, the first's entries unused.

    Attributes:
        chosen: bool [prompt]: tokens of the prompt that the stage's attention reads in this step.
        present: bool [prompt]: those whose keys and values the stage's layers have.
        seen: in this step: the positions that the latest token attended to in the layer before the stage,
            and how much to each; None once the stage has chosen.
    """

    prompt: int
    budget: int
    chosen: list[NDArray[np.bool_]]
    present: list[NDArray[np.bool_]]
    stores: list[_Store]
    seen: list[tuple[Positions, Tensor] | None]

    def reads(self, stage: int, end: int) -> Positions:
        """Positions before `end` that the stage's attention reads."""
        answer = np.arange(self.prompt, max(end, self.prompt))
        return np.concatenate([np.flatnonzero(self.chosen[stage]), answer])


class LazySelector(Selector):
    """See `Selector` and `RowPruner`. Counts prompts in place of rows: "prompts_pruned", "prompts_whole"."""

    publishes = False

    def __init__(self, settings: LazyLlm, heads: Heads, page_size: int) -> None:
        if not 1 <= settings.budget <= 100 or settings.stages < 1:
            raise ValueError(
                f"lazyllm keeps 1 to 100 percent in at least one stage, got budget={settings.budget} and "
                f"stages={settings.stages}"
            )
        super().__init__(Budgets(heads, 1, 100, settings.budget))
        self._heads, self._page = heads, page_size
        parts = {round(0.9 * (i + 1) / settings.stages * heads.num_layers) for i in range(settings.stages)}
        begin = sorted(layer for layer in parts if 0 < layer < heads.num_layers)
        if not begin:
            raise ValueError(f"{heads.num_layers} layers are too few for a stage of lazyllm")
        self._begin = begin
        self.boundaries = {1 + 2 * layer: stage for stage, layer in enumerate(begin, 1)}
        self._fresh: set[int] = set()
        self._requests: dict[int, _Request] = {}
        self._room = [0]
        """Rows that may come back to each request in a step, by stage."""
        self._memo = Memo()

    def admit(self, slot: int, budget: int) -> None:
        """See `Selector`."""
        self.budgets.admit(slot, budget)
        self.release(slot)
        self._fresh.add(slot)

    def release(self, slot: int) -> None:
        """See `Selector`."""
        self._requests.pop(slot, None)

    def pruned(self, slots: Sequence[int]) -> Sequence[bool]:
        """See `Selector`."""
        return [slot in self._requests for slot in slots]

    def begin(self, batch: Batch, most_rows: int) -> None:
        """See `Selector`: a prompt is pruned if all of it is in this step."""
        starts = batch.cu_seqlens_q.numpy()
        logits = np.searchsorted(batch.logit_rows.numpy(), starts)
        for s, slot in enumerate(batch.state_slot.tolist()):
            if slot not in self._fresh:
                continue
            self._fresh.discard(slot)
            prompt, budget = int(batch.num_prompt_tokens[s]), int(self.budgets.of_slot[slot])
            whole = int(batch.positions[starts[s]]) == 0 and int(batch.seq_lens[s]) == prompt
            fits = whole and logits[s + 1] - logits[s] == 1
            self.counts["prompts_pruned" if budget and fits else "prompts_whole"] += 1
            if budget and fits:
                self._requests[slot] = self._request(prompt, budget)
        # Nobody's share depends on what the others want, nor on where the step is cut.
        rows, answering = np.zeros(len(self._begin) + 1, np.int64), 0
        for slot, count in zip(batch.state_slot.tolist(), np.diff(starts).tolist(), strict=True):
            request = self._requests.get(slot)
            answering += request is not None and count < request.prompt
            for stage in range(len(rows)):
                rows[stage] += count
                if request is not None and count == request.prompt:
                    count = -(-count * request.budget // 100)
        self._room = ((most_rows - rows) // max(1, answering)).tolist()

    def _request(self, prompt: int, budget: int) -> _Request:
        stages = range(len(self._begin) + 1)
        return _Request(
            prompt,
            budget,
            [np.ones(prompt, np.bool_) for _ in stages],
            [np.zeros(prompt, np.bool_) for _ in stages],
            [_Store(np.empty(0, np.int64), torch.empty(0)) for _ in stages],
            [None for _ in stages],
        )

    def _stage(self, layer: int) -> int:
        return int(np.searchsorted(self._begin, layer, "right"))

    # What attention reads

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        stage = self._stage(layer)
        found: list[Segment] = self._memo.get(batch, lambda whole: self._segments(whole, stage))
        if layer + 1 in self._begin:
            yield from self._watch(stage + 1, q, pool, batch)
        return found

    def _segments(self, batch: Batch, stage: int) -> list[Segment]:
        facts = RowFacts.of(batch, self.budgets.of_slot)
        lazy = np.array([slot in self._requests for slot in batch.state_slot.tolist()])
        kinds = np.where(lazy[facts.seq], ANSWER, DENSE) if stage else np.zeros(len(facts.seq), np.int64)
        found = segments(batch, facts, kinds)
        for segment in found:
            if segment.kind == ANSWER:
                first = int(facts.seq[segment.rows.start])
                requests = batch.state_slot[first : first + len(segment.block_table)].tolist()
                segment.chosen = self._tokens(segment, stage, [self._requests[slot] for slot in requests])
        return found

    def _tokens(self, segment: Segment, stage: int, requests: list[_Request]) -> Tokens:
        starts, positions = segment.cu_seqlens.numpy(), segment.positions.numpy()
        reads, places = [], []
        for request, start, end in zip(requests, starts[:-1], starts[1:], strict=True):
            own = positions[start:end]
            reads.append(request.reads(stage, int(own[-1]) + 1 if len(own) else 0))
            places.append(np.searchsorted(reads[-1], own))
        where = torch.from_numpy(np.concatenate(places).astype(np.int32))
        return Tokens(self._slots(reads, segment.block_table), segment.cu_seqlens, where)

    def _slots(self, reads: list[Positions], table: Tensor) -> Tensor:
        """Of positions of each sequence: int32 [S, n], anything behind them."""
        index = np.full((len(reads), max(map(len, reads))), -1, np.int32)
        for i, tokens in enumerate(reads):
            index[i, : len(tokens)] = tokens
        return select.places(torch.from_numpy(index).unsqueeze(1), table, self._page).squeeze(1)

    def _watch(self, stage: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """How much the latest token of each request attends to each that this layer reads, for the stage that
        begins with the next layer."""
        starts, positions = batch.cu_seqlens_q.numpy(), batch.positions.numpy()
        rows, requests, reads = [], [], []
        for s, slot in enumerate(batch.state_slot.tolist()):
            request = self._requests.get(slot)
            if request is None or starts[s] == starts[s + 1]:
                continue
            row = int(starts[s + 1]) - 1
            end = int(positions[row]) + 1
            if end >= request.prompt:  # or a later half has the prompt's last token
                rows.append((row, s))
                requests.append(request)
                reads.append(request.reads(stage - 1, end))
        if not rows:
            return []
        slots = self._slots(reads, batch.block_table[[s for _, s in rows]])
        ends = torch.tensor([len(tokens) for tokens in reads], dtype=torch.int32)
        latest = q[[row for row, _ in rows]]
        one, scale = pool.view(-1, 1, *pool.shape[2:]), self._heads.head_dim**-0.5
        where = slots, torch.zeros_like(ends), ends
        votes = select.votes(latest, one, where, slots.shape[1], scale, None, True).sum(1)
        total = yield votes
        for i, request in enumerate(requests):
            request.seen[stage] = reads[i], total[i, : len(reads[i])].clone()
        return []

    # Where a stage begins

    def change(self, number: int, x: Tensor, batch: Batch, seam: Seam, joint: Joint) -> tuple[Tensor, Batch]:
        """See `RowPruner`."""
        stage = self.boundaries[number]
        starts, positions = batch.cu_seqlens_q.numpy(), batch.positions.numpy().astype(np.int64)
        requests = [self._requests.get(slot) for slot in batch.state_slot.tolist()]
        if not any(r is not None and starts[s] < starts[s + 1] for s, r in enumerate(requests)):
            return x, batch
        residual = seam.gather(torch.arange(batch.num_tokens))
        rows: list[Positions] = []
        hidden: list[Tensor] = []
        for s, request in enumerate(requests):
            own, state = positions[starts[s] : starts[s + 1]], residual[starts[s] : starts[s + 1]]
            if request is not None and len(own):
                own, state = self._enter(request, stage, own, state)
            rows.append(own)
            hidden.append(state)
        whole = torch.cat(hidden)
        seam.open(len(whole))
        seam.insert(torch.arange(len(whole)), whole)
        return rms_norm(whole, joint.weight, joint.eps, joint.weight_offset), self._batch(batch, rows)

    def _enter(
        self, request: _Request, stage: int, own: Positions, state: Tensor
    ) -> tuple[Positions, Tensor]:
        """A request's rows that go on into a stage: their positions and hidden states."""
        answers = own[-1] >= request.prompt
        if request.seen[stage] is not None:
            self._choose(request, stage, bool(answers))
        chosen, store = request.chosen[stage], request.stores[stage]
        prompt = own < request.prompt
        going = ~prompt
        going[prompt] = chosen[own[prompt]]
        left = own[~going]
        if len(left):
            store.hidden = store.hidden.to(state.dtype) if len(store.positions) else state[:0]
            store.put(left, state[~going])
        own, state = own[going], state[going]
        if answers:  # in a prompt's own step all tokens are under way already
            missing = chosen & ~request.present[stage]
            missing[own[own < request.prompt]] = False
            back = np.flatnonzero(missing)
            if len(back):
                order = np.argsort(np.concatenate([own, back]), kind="stable")
                state = torch.cat([state, store.take(back)])[order]
                own = np.concatenate([own, back])[order]
        request.present[stage] |= chosen
        return own, state

    def _choose(self, request: _Request, stage: int, answers: bool) -> None:
        """The stage's tokens in this step, by what the latest token attended to."""
        seen = request.seen[stage]
        assert seen is not None
        request.seen[stage] = None
        positions, weights = seen
        count = int(np.searchsorted(positions, request.prompt))  # the others are the answer's
        weights = weights[:count].clone()
        if not answers:
            weights[-1] = torch.inf  # the prompt's last token goes on
        wanted = -(-count * request.budget // 100)
        all_, some = (torch.tensor([n], dtype=torch.int32) for n in (count, wanted))
        index = select.top_k(weights[None], all_, some, wanted)[0][0].numpy()
        chosen = np.zeros(request.prompt, np.bool_)
        chosen[positions[index]] = True
        # The least attended of those that would come back, and have no room, stay away.
        missing = np.flatnonzero(chosen & ~request.present[stage]) if answers else positions[:0]
        if len(missing) > self._room[stage]:
            at = np.searchsorted(positions, missing)
            back = torch.argsort(weights[at], descending=True, stable=True).numpy()
            chosen[missing[back[self._room[stage] :]]] = False
        request.chosen[stage] = chosen

    def _batch(self, batch: Batch, positions: list[Positions]) -> Batch:
        """The batch of rows at these positions; a logit row is the latest token's, which is always there."""
        at, counts = np.concatenate(positions), [len(own) for own in positions]
        seq = np.repeat(np.arange(len(counts)), counts)
        table = batch.block_table.numpy()
        slots = table[seq, at // self._page].astype(np.int64) * self._page + at % self._page
        cu = np.concatenate([[0], np.cumsum(counts)])
        old = batch.cu_seqlens_q.numpy()
        logits = batch.logit_rows.numpy()
        of = np.searchsorted(old, logits, "right") - 1
        return replace(
            batch,
            input_ids=torch.zeros(len(at), dtype=torch.int64),
            positions=torch.from_numpy(at.astype(np.int32)),
            slot_mapping=torch.from_numpy(slots).to(batch.slot_mapping.dtype),
            cu_seqlens_q=torch.from_numpy(cu.astype(np.int32)),
            logit_rows=torch.from_numpy(cu[of + 1] - (old[of + 1] - logits)),
        )
