"""Chooses the next tokens from logits that stay sharded over the vocabulary; the same on every
rank.

Order of operations: logit bias and the ban of end tokens (`min_tokens`), penalties (repetition,
frequency, presence), masks, temperature, min_p, top_k, top_p. Log-probabilities are those of the raw
logits. A batch costs only what its rows ask for: one vote for greedy and freely sampled rows
together, one or two more when a row has top_p, top_k or min_p, one for log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import put
from weaveinf.comm.votes import Votes
from weaveinf.engine.step import Admission, SampledLogprobs, Step, StepOutput
from weaveinf.ops import logprobs, sampling
from weaveinf.ops.sampling import Limits, Shard, T, Voting

GREEDY_BELOW = 1e-5
MIN_TEMPERATURE = 1e-2
"""What is colder than greedy's bound but below this is sampled at this."""
PROMPT_BLOCK = 64
"""Rows of logits that exist at a time when prompt log-probabilities are wanted."""

Rows = NDArray[np.integer[Any]]
NO_ROWS: Rows = np.empty(0, np.int64)
Head = Callable[[Tensor], Tensor]
"""x [rows, hidden] -> float32 logits [rows, vocab_shard] of this rank, -inf beyond the
vocabulary."""


class Sampler:
    """Sampling state of every state slot, and the sampling itself.

    Every rank admits and samples the same steps in the same order. `last_token` int64
    [max_num_seqs] on `device` holds what each slot sampled last (-1 where that failed), for rows
    that come by reference. `put` brings an array to `device`.
    """

    def __init__(
        self,
        vocab_size: int,
        vocab_start: int,
        vocab_shard: int,
        max_num_seqs: int,
        device: torch.device,
        votes: Votes,
    ) -> None:
        self.shard = Shard(vocab_size, vocab_start, vocab_shard)
        self.device = device
        self.votes = votes
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.put: Callable[[NDArray[Any]], Tensor] = lambda array: put(torch.from_numpy(array), device)
        self._limited = np.zeros(max_num_seqs, np.bool_)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._temperature = np.zeros(max_num_seqs, np.float32)  # 0: greedy
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float64)
        self._floor = np.zeros(max_num_seqs, np.float32)
        self._min_tokens = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs: dict[int, int] = {}
        self._num_prompt_logprobs = np.full(max_num_seqs, -1, np.int64)
        self._banned: dict[int, Tensor] = {}
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._history = History(vocab_shard, device)

    def admit(self, admission: Admission) -> None:
        """A slot starts anew with a request's settings; what its last owner left is forgotten."""
        slot = admission.slot
        for state in (self._banned, self._bias, self._num_logprobs):
            state.pop(slot, None)
        self._seed[slot] = sampling.mixed(np.array([admission.seed % (1 << 64)], np.uint64), np.uint64(1))[0]
        top_k = admission.top_k if admission.top_k > 0 else self.shard.vocab_size
        self._top_k[slot] = min(top_k, self.shard.vocab_size)
        self._top_p[slot] = admission.top_p
        self._floor[slot] = math.log(admission.min_p) if admission.min_p > 0 else -math.inf
        if admission.logprobs >= 0:
            self._num_logprobs[slot] = admission.logprobs
        self._num_prompt_logprobs[slot] = admission.prompt_logprobs
        limited = top_k < self.shard.vocab_size or admission.top_p < 1 or admission.min_p > 0
        greedy = admission.temperature < GREEDY_BELOW or top_k == 1
        self._limited[slot] = limited and not greedy
        self._temperature[slot] = 0 if greedy else max(admission.temperature, MIN_TEMPERATURE)
        self._min_tokens[slot] = admission.min_tokens if len(admission.banned_ids) else 0
        if self._min_tokens[slot]:
            self._banned[slot] = self.put(self._own(admission.banned_ids)[0])
        columns, owned = self._own(admission.bias_ids)
        if len(columns):
            values = admission.bias_values[owned].astype(np.float32)
            self._bias[slot] = self.put(columns), self.put(values)
        penalties = (admission.repetition_penalty, admission.frequency_penalty, admission.presence_penalty)
        self._history.forget(slot)
        if penalties != (1.0, 0.0, 0.0):
            prompt = self.put(self._own(admission.prompt_token_ids)[0])
            output = self.put(self._own(admission.output_token_ids)[0])
            self._history.begin(slot, penalties, prompt, output)

    def run(self, head: Head, x: Tensor, step: Step) -> StepOutput:
        """All that a step samples, from the rows [sum(num_logits), hidden] whose logits it
        wants."""
        sampling_now = step.output_position >= 0
        samples = np.count_nonzero(sampling_now)
        if samples == len(x) == step.num_seqs and not len(step.targets):
            # The common case: every sequence samples from its row.
            return self.sample(head(x), step.state_slot, step.output_position, step.masked, step.masks)
        output = StepOutput(np.empty(0, np.int64))
        ends = np.cumsum(step.num_logits, dtype=np.int64)
        if samples:
            logits = head(_take(x, ends[sampling_now] - 1))
            slots, positions = step.state_slot[sampling_now], step.output_position[sampling_now]
            output = self.sample(logits, slots, positions, step.masked, step.masks)
        if len(step.targets):
            wanted: list[Sequence[SampledLogprobs | None] | None] = [None] * step.num_seqs
            first = 0
            for i in np.flatnonzero(step.num_targets).tolist():
                count = int(step.num_targets[i])
                rows = x[int(ends[i]) - count : int(ends[i])]
                n = int(self._num_prompt_logprobs[step.state_slot[i]])
                targets = step.targets[first : first + count]
                wanted[i] = self.prompt_logprobs(head, rows, targets, n)
                first += count
            output.prompt_logprobs = wanted
        return output

    def sample(
        self, logits: Tensor, slots: Rows, positions: Rows, masked: Rows = NO_ROWS, masks: Rows = NO_ROWS
    ) -> StepOutput:
        """One token for each row, of the request in its slot, at these positions of its output.

        logits: float32 [samples, vocab_shard], left as they are. masked, masks: see `Step`. A token
        is -1 where none can be chosen (NaN or infinite logits, or everything banned); the other rows
        are not touched by that.
        """
        shaped = self._shape(logits, slots, positions, masked, masks)
        tokens = self._vote(self._draw(shaped, slots, positions))
        self.last_token.index_copy_(0, self.put(slots.astype(np.int64)), tokens)
        self._history.append(slots, tokens, self.shard.start)
        return StepOutput(tokens.cpu().numpy(), self._logprobs(logits, tokens, slots))

    def prompt_logprobs(
        self, head: Head, x: Tensor, targets: NDArray[np.int64], n: int
    ) -> list[SampledLogprobs | None]:
        """Log-probabilities of the tokens `targets` [rows] (-1: none wanted) that follow rows
        [rows, hidden], and of the n best; never more than PROMPT_BLOCK rows of logits at a
        time."""
        out: list[SampledLogprobs | None] = [None] * len(targets)
        rows = np.flatnonzero(targets >= 0)
        for block in (rows[i : i + PROMPT_BLOCK] for i in range(0, len(rows), PROMPT_BLOCK)):
            found = self._score(head(_take(x, block)), self.put(targets[block]), n)
            for row, logprob in zip(block.tolist(), found, strict=True):
                out[row] = logprob
        return out

    def _shape(self, logits: Tensor, slots: Rows, positions: Rows, masked: Rows, masks: Rows) -> Tensor:
        """The logits after bias, bans, penalties and masks: a copy if any row has one of them."""
        biased = [(i, s) for i, s in enumerate(slots.tolist() if self._bias else ()) if s in self._bias]
        banned = np.flatnonzero(positions < self._min_tokens[slots]).tolist() if self._banned else ()
        penalised = self._history.known(slots)
        if not (biased or banned or len(penalised) or len(masked)):
            return logits
        shaped = logits.clone()
        for row, slot in biased:
            columns, values = self._bias[slot]
            shaped[row].index_add_(0, columns, values)
        for row in banned:
            shaped[row, self._banned[int(slots[row])]] = -torch.inf
        if len(penalised):
            rows = self.put(penalised)
            shaped[rows] = self._history.penalise(shaped[rows], slots[penalised])
        if len(masked):
            bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
            own = bits[:, self.shard.start : self.shard.start + self.shard.width]
            for row, bans in zip(masked.tolist(), self.put(own == 0), strict=True):
                # Columns behind the vocabulary are -inf anyway.
                shaped[row, : len(bans)].masked_fill_(bans, -torch.inf)
        return shaped

    def _draw(self, logits: Tensor, slots: Rows, positions: Rows) -> Voting[Tensor]:
        is_limited = self._limited[slots]
        if not np.count_nonzero(is_limited):
            return (yield from self._draw_freely(logits, slots, positions))
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        free, limited = np.flatnonzero(~is_limited), np.flatnonzero(is_limited)
        if len(free):
            drawn = yield from self._draw_freely(_take(logits, free), slots[free], positions[free])
            tokens[self.put(free)] = drawn
        of = slots[limited]
        limits = Limits(*(self.put(setting[of]) for setting in (self._top_k, self._top_p, self._floor)))
        scores = _take(logits, limited) / self.put(self._temperature[of])[:, None]
        keys = sampling.noise_keys(self._seed[of], positions[limited]).to(self.device)
        tokens[self.put(limited)] = yield from sampling.sample_limited(scores, keys, limits, self.shard)
        return tokens

    def _draw_freely(self, logits: Tensor, slots: Rows, positions: Rows) -> Voting[Tensor]:
        """Greedy rows and those with nothing but a temperature, in one vote."""
        temperature = self._temperature[slots]
        if not np.count_nonzero(temperature):
            return (yield from sampling.winner(sampling.draw(logits, self.shard.start), self.shard))
        keys = sampling.noise_keys(self._seed[slots], positions).to(self.device)
        offer = sampling.draw(logits, self.shard.start, self.put(temperature), keys)
        return (yield from sampling.winner(offer, self.shard))

    def _logprobs(self, logits: Tensor, tokens: Tensor, slots: Rows) -> list[SampledLogprobs | None] | None:
        if not self._num_logprobs:
            return None
        wanted = [self._num_logprobs.get(slot, -1) for slot in slots.tolist()]
        rows = np.flatnonzero(np.array(wanted) >= 0)
        if not len(rows):
            return None
        found = self._score(_take(logits, rows), _take(tokens, rows), max(wanted))
        out: list[SampledLogprobs | None] = [None] * len(slots)
        for row, (logprob, ids, values) in zip(rows.tolist(), found, strict=True):
            out[row] = SampledLogprobs(logprob, ids[: wanted[row]], values[: wanted[row]])
        return out

    def _score(self, logits: Tensor, targets: Tensor, n: int) -> list[SampledLogprobs]:
        parts = logprobs.logprob_parts(logits, targets, n, self.shard)
        joined = logprobs.join_logprobs(self._vote(self.shard.gather(parts)), n)
        return [SampledLogprobs(*row) for row in zip(*(t.tolist() for t in joined), strict=True)]

    def _vote(self, voting: Voting[T]) -> T:
        try:
            mine = next(voting)
            while True:
                mine = voting.send(self.votes.sum(mine))
        except StopIteration as end:
            result: T = end.value
            return result

    def _own(self, ids: NDArray[np.int64]) -> tuple[Rows, NDArray[np.bool_]]:
        """Columns of the ids that this rank owns, and which they are."""
        owned = (ids >= self.shard.start) & (ids < self.shard.start + self.shard.width)
        return ids[owned] - self.shard.start, owned


class History:
    """Which tokens the slots with a penalty have seen: this rank's columns, rows taken on
    demand."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(0, width, device=device)  # of output tokens
        self.prompt = torch.zeros(0, width, dtype=torch.bool, device=device)
        self._row: dict[int, int] = {}
        self._free: list[int] = []
        self._penalties: dict[int, tuple[float, float, float]] = {}

    def forget(self, slot: int) -> None:
        if slot in self._row:
            self._free.append(self._row.pop(slot))

    def begin(self, slot: int, penalties: tuple[float, float, float], prompt: Tensor, output: Tensor) -> None:
        """penalties: repetition, frequency, presence. prompt, output: columns int64 [any], repeats
        count."""
        if not self._free:
            had = len(self.counts)
            more = max(1, had)
            self.counts = torch.cat((self.counts, self.counts.new_empty(more, self.counts.shape[1])))
            self.prompt = torch.cat((self.prompt, self.prompt.new_empty(more, self.prompt.shape[1])))
            self._free.extend(range(had, had + more))
        row = self._row[slot] = self._free.pop()
        self._penalties[slot] = penalties
        self.prompt[row] = False
        self.prompt[row, prompt] = True
        self.counts[row] = 0
        self.counts[row].index_add_(0, output, torch.ones(len(output), device=output.device))

    def known(self, slots: Rows) -> Rows:
        """Indices into `slots` of those that have a history."""
        if not self._row:
            return np.empty(0, np.int64)
        return np.flatnonzero([slot in self._row for slot in slots.tolist()])

    def penalise(self, logits: Tensor, slots: Rows) -> Tensor:
        rows = self._rows(slots)
        settings = torch.tensor([self._penalties[s] for s in slots.tolist()], device=logits.device)
        return sampling.penalise(logits, self.counts[rows], self.prompt[rows], *settings.T[..., None])

    def append(self, slots: Rows, tokens: Tensor, start: int) -> None:
        """One sampled token per slot; `start` is the first of this rank's."""
        known = self.known(slots)
        if len(known):
            width = self.counts.shape[1]
            at = tokens[torch.from_numpy(known).to(tokens.device)] - start
            owned = (at >= 0) & (at < width)
            rows = self._rows(slots[known])
            self.counts[rows, at.clamp(0, width - 1)] += owned

    def _rows(self, slots: Rows) -> Tensor:
        rows = [self._row[slot] for slot in slots.tolist()]
        return torch.tensor(rows, device=self.counts.device)


def _take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows], without a copy when these are all of them (rows ascend)."""
    return x if len(rows) == len(x) else x[torch.from_numpy(rows).to(x.device)]
