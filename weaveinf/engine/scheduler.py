"""Which tokens run next: continuous batching, chunked prefill, prefix hits, preemption.

The scheduler may run ahead of the tokens (see `Executor.ahead`): step n + 1 is described before the
tokens of step n are known here. It therefore counts instead of looking: a request has `in_flight`
samples under way, its next row refers to the last one, and its length limit is met by counting. What
only the token tells (an end-of-sequence id) is found late, and the samples that were surplus are dropped.

All ranks run all steps in order. So a page or a slot that is given up here may go to another
request in the very next step, whatever is still under way, and a page that a scheduled step fills
may be shared by the next one; but never by a request of the same step.

A request that follows a grammar is not run ahead: its row needs a mask, which depends on the token before.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from weaveinf.cache.blocks import BlockAllocator, legal_cut
from weaveinf.engine.prefix import Prefixes, Shape
from weaveinf.engine.request import Request, TokenLogprob
from weaveinf.engine.step import PER_SEQUENCE, Admission, SampledLogprobs, Step, StepOutput
from weaveinf.engine.structured import WAIT_S, Mask


class _Run(NamedTuple):
    """Tokens start to end (exclusive) of a request run in this step; it got these pages for it."""

    request: Request
    start: int
    end: int
    new_pages: Sequence[int]


class _Flight(NamedTuple):
    """What update() must know of a step under way."""

    number: int
    sampled: list[Request]
    prompt_rows: list[tuple[int, Request, int]]  # sequence index, request, first position


class Scheduler:
    """Turns requests into steps, and sampled tokens into finished requests.

    Requests are served in the order of their priorities, and of one priority in the order they were added;
    each keeps its place when it is preempted (the last first, never the first, so that something always
    ends). `row_align`: where prompts may be cut, see `legal_cut`; `shape`: of pages, see there; `publishes`:
    whether requests share theirs. Not thread-safe.
    """

    def __init__(
        self,
        blocks: BlockAllocator,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        row_align: int = 1,
        shape: Shape = lambda request, end: b"",
        publishes: bool = True,
    ) -> None:
        if min(max_num_seqs, max_num_batched_tokens, row_align) < 1 or max_model_len < 2:
            raise ValueError(
                "max_num_seqs, max_num_batched_tokens and row_align must be at least 1, "
                "max_model_len at least 2"
            )
        least = max_num_seqs - 1 + min(row_align, max_model_len)
        if max_num_batched_tokens < least:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least {least} for "
                f"{max_num_seqs} sequences: raise it or lower max_num_seqs"
            )
        self.blocks = blocks
        self.num_preemptions = 0
        self.num_prefix_queried = 0
        """Tokens of admitted requests; `num_prefix_hit` of them came from the prefix cache."""
        self.num_prefix_hit = 0
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._row_align = row_align
        self._prefixes = Prefixes(blocks, row_align, shape, publishes)
        self._requests: dict[int, Request] = {}
        self._waiting: list[Request] = []  # both by priority, then age
        self._running: list[Request] = []
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._released: list[int] = []  # slots given up since the last step was described
        self._flights: deque[_Flight] = deque()
        self._unmasked: list[Request] = []  # whose grammars were asked for the next mask
        self._number = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._flights)

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step is under way."""
        return bool(self._running or self._waiting or self._flights)

    def add(self, request: Request) -> None:
        """Queues a new request. `ValueError` if it could never be served, or its id is taken."""
        prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
        room = self.blocks.num_blocks * self.blocks.block_size + 1  # the last token is not cached
        if prompt == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if request.id in self._requests or request.status != "new":
            raise ValueError(f"request {request.id} was added before")
        if prompt >= self._max_model_len:
            raise ValueError(
                f"the prompt has {prompt} tokens, max_model_len is {self._max_model_len} with the "
                f"answer: shorten the prompt to {self._max_model_len - 1} or raise max_model_len"
            )
        limit = min(self._max_model_len, room if wanted is None else prompt + wanted)
        if max(limit, prompt + 1) > room:
            remedy = f"lower max_tokens to {room - prompt}" if prompt < room else "shorten it"
            raise ValueError(
                f"the prompt has {prompt} tokens, with the answer {max(limit, prompt + 1)}, and "
                f"the cache holds {room - 1}: {remedy} or give the cache more memory"
            )
        request.limit = limit
        eos = frozenset() if request.params.ignore_eos else self._eos
        request.stop_ids = eos.union(request.params.stop_token_ids)
        request.status = "waiting"
        self._requests[request.id] = request
        insort(self._waiting, request, key=_place)

    def abort(self, request_id: int) -> Request | None:
        """Ends a request at once; returns it, or None if there is no such unfinished request."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a request at once ("stop" for a stop string); samples under way are dropped."""
        if request.status == "running":
            self._running.remove(request)
            self._give_up(request)
        elif request.status == "waiting":
            self._waiting.remove(request)
        else:
            return
        if request.constraint is not None:
            request.constraint.grammar.drop(request.constraint)
        request.status = "finished"
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.id]
        if not self._running and self.blocks.num_free != self.blocks.num_blocks:
            raise RuntimeError("nothing runs, yet pages of the cache are held")

    def check(self) -> None:
        """`RuntimeError` unless all pages and slots are accounted for."""
        self.blocks.check([request.blocks for request in self._running])
        if sorted([*self._slots, *(r.slot for r in self._running)]) != [*range(self._max_num_seqs)]:
            raise RuntimeError("a state slot is lost or taken twice")

    # What runs next

    def constrain(self) -> list[Request]:
        """Takes the masks that have come, waiting a little; returns the requests that grammars ended."""
        if not self._unmasked:
            return []
        alone = not self._flights and len(self._unmasked) >= len(self._running)
        ended, asked = [], self._unmasked
        self._unmasked = []
        for request in asked:
            if request.status == "finished" or request.constraint is None:
                continue
            grammar = request.constraint.grammar
            grammar.read(WAIT_S if alone or not grammar.late else 0)
            if request.constraint.end is not None:
                self.finish(request, *request.constraint.end)
                ended.append(request)
            elif request.unmasked:
                self._unmasked.append(request)
        return ended

    def schedule(self) -> Step | None:
        """The next step, or None while there is nothing to run (all waits for `update`).

        Decodes come first, then chunks of running prompts, then new requests, in their order in each.
        """
        decodes: list[_Run] = []
        chunks: list[_Run] = []
        running, size = self._running, self.blocks.block_size
        spare = self._max_tokens - len(running)  # every running request has one token's budget
        short_of_pages = False
        index = 0
        while index < len(running):
            request = running[index]
            index += 1
            prompt, start = len(request.prompt_token_ids), request.num_computed
            total = prompt + len(request.output_token_ids) + request.in_flight
            count = total - start
            if total >= request.limit or request.unmasked:  # its last sample is under way, or its mask
                count = 0
            elif count > 1:
                end = start + min(count, spare + 1)
                count = legal_cut(end, prompt, self._row_align) - start
            new_pages: Sequence[int] = ()
            if count > 0 and start + count > len(request.blocks) * size:
                new_pages, preempted = self._grow(request, index)
                spare += preempted
                if preempted or not new_pages:
                    short_of_pages = True
                count = len(new_pages)
            spare -= max(count, 0) - 1
            if count > 0:
                kind = decodes if start >= prompt and start + 1 == total else chunks
                kind.append(_Run(request, start, start + count, new_pages))
        admissions: list[Admission] = []
        if self._waiting and not short_of_pages:
            admissions = self._admit(chunks, spare)
        if not decodes and not chunks:
            return None
        step = self._describe(decodes + chunks, admissions)
        for run in chunks:
            self._prefixes.publish(run.request)
        return step

    def _grow(self, request: Request, index: int) -> tuple[list[int], int]:
        """A page for the next token of `request`, and how many requests behind it, from `index` on,
        were preempted for it. Without a page it keeps those it has and waits: those before it
        end, or preempt it."""
        preempted = 0
        while self.blocks.num_free == 0 and len(self._running) > index:
            self._preempt(self._running.pop())
            preempted += 1
        if self.blocks.num_free == 0:
            return [], preempted
        pages = self.blocks.allocate(1)
        request.blocks += pages
        return pages, preempted

    def _preempt(self, request: Request) -> None:
        """Takes all from the last running request, which starts over when its turn comes."""
        self._give_up(request)
        request.status = "waiting"
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, request, key=_place)

    def _give_up(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        self._slots.append(request.slot)
        self._released.append(request.slot)
        request.blocks = []
        request.slot = -1
        request.num_computed = 0

    def _admit(self, chunks: list[_Run], spare: int) -> list[Admission]:
        """Starts waiting requests, in order, as long as there are slots, budget and pages.

        A request gets the pages of all its known tokens at once, and one free page is left for
        each running request to grow into: who was admitted seldom has to be preempted.
        """
        admissions = []
        size = self.blocks.block_size
        fresh = {h for run in chunks for h in self._prefixes.fills(run.request, run.end)}
        while self._waiting and self._slots and spare > 0:
            if self.blocks.num_free <= len(self._running):  # spares the search for hits
                break
            request = self._waiting[0]
            # Preempted: its last tokens must arrive before it starts over.
            if request.in_flight or request.unmasked:
                break
            known, prompt = request.num_known, len(request.prompt_token_ids)
            hits = self._prefixes.hits(request)
            start = len(hits) * size
            count = legal_cut(start + min(known - start, spare), prompt, self._row_align) - start
            missing = -(-known // size) - len(hits)
            wanted = missing + self.blocks.num_resting(hits) + len(self._running)
            if (
                count <= 0
                or wanted > self.blocks.num_free
                or self._prefixes.shares_soon(request, len(hits), fresh)
            ):
                break
            del self._waiting[0]
            insort(self._running, request, key=_place)
            self.blocks.hold(hits)
            request.blocks = hits + self.blocks.allocate(missing)
            request.status = "running"
            request.slot = self._slots.pop()
            request.num_published = len(hits)
            if request.num_preemptions == 0:
                request.num_cached = start
                request.started = time.monotonic()
                self.num_prefix_queried += known
                self.num_prefix_hit += start
            spare -= count
            chunks.append(_Run(request, start, start + count, request.blocks))
            fresh.update(self._prefixes.fills(request, start + count))
            admissions.append(_admission(request))
        return admissions

    # Describing a step, and what comes of it

    def _describe(self, runs: list[_Run], admissions: list[Admission]) -> Step:
        rows: list[int] = []  # one sequence's PER_SEQUENCE after another's
        tokens: list[int] = []
        pages: list[int] = []
        targets: list[int] = []
        masked: list[int] = []
        masks: list[Mask] = []
        flight = _Flight(self._number, [], [])
        for request, start, end, new_pages in runs:
            prompt, outputs = len(request.prompt_token_ids), len(request.output_token_ids)
            known = prompt + outputs
            refers = start >= known
            if not refers:
                tokens += request.tokens(start, end)
            pages += new_pages
            wanted = 0
            if request.prompt_logprobs is not None and start < prompt and outputs == 0:
                wanted = end - start
                targets += request.prompt_token_ids[start + 1 : end + 1]
                targets += [-1] * (end == prompt)
                flight.prompt_rows.append((len(rows) // len(PER_SEQUENCE), request, start))
            position = -1
            if end == known + request.in_flight:
                position = outputs + request.in_flight
                request.in_flight += 1
                if request.constraint is not None and request.constraint.mask is not None:
                    masked.append(len(flight.sampled))
                    masks.append(request.constraint.mask)
                    request.constraint.mask = None
                flight.sampled.append(request)
            logits = wanted or int(position >= 0)
            counts = (end - start, prompt, logits, wanted, len(new_pages))
            rows += (request.slot, start, *counts, position, refers)
            request.num_computed = end
        self._flights.append(flight)
        self._number += 1
        table = np.fromiter(rows, np.int32, len(rows)).reshape(len(runs), -1).T.copy()
        columns: list[Any] = [*table[:-1], table[-1] > 0]
        flat = [np.array(ids, np.int64) for ids in (tokens, pages, targets, self._released)]
        self._released = []
        step = Step(flight.number, admissions, *columns, *flat)
        if masked:
            step.masked, step.masks = np.array(masked, np.int64), np.stack(masks)
        return step

    def update(self, step: Step, output: StepOutput) -> list[tuple[Request, list[int]]]:
        """Takes the results of the oldest step under way: (request, its new tokens) of each that
        got some; those that ended have `finish_reason`. Samples of ended requests are dropped. A
        token -1 means that none could be sampled (NaN logits): that request is aborted.
        """
        if not self._flights or self._flights[0].number != step.number:
            raise RuntimeError(f"step {step.number} is not the oldest one under way")
        flight = self._flights.popleft()
        tokens: list[int] = output.tokens.tolist()
        if len(tokens) != len(flight.sampled):
            raise RuntimeError(f"{len(flight.sampled)} samples were due, {len(tokens)} came")
        for sequence, request, start in flight.prompt_rows:
            _store_prompt_logprobs(request, start, output, sequence)
        events: list[tuple[Request, list[int]]] = []
        for i, request in enumerate(flight.sampled):
            if request.status == "finished":
                continue
            token = tokens[i]
            request.in_flight -= 1
            if token < 0:
                self.finish(request, "abort", "its logits leave no token to choose")
                events.append((request, []))
                continue
            request.output_token_ids.append(token)
            if output.pruned is not None:
                request.pruned = request.pruned is not False and output.pruned[i]
            if request.logprobs is not None:
                request.logprobs.append(_token_logprob(request, token, output.logprobs, i))
            self._prefixes.publish(request)
            params = request.params
            if token in request.stop_ids and len(request.output_token_ids) > params.min_tokens:
                self.finish(request, "stop", token if token in params.stop_token_ids else None)
            elif request.num_known >= request.limit:
                self.finish(request, "length")
            elif request.constraint is not None:
                request.constraint.grammar.ask(request.constraint, token)
                self._unmasked.append(request)
            events.append((request, [token]))
        return events


def _place(request: Request) -> tuple[int, int]:
    return request.priority, request.id


def _token_logprob(
    request: Request, token: int, logprobs: Sequence[SampledLogprobs | None] | None, sample: int
) -> TokenLogprob:
    entry = None if logprobs is None else logprobs[sample]
    if entry is None:
        raise RuntimeError(f"the log-probabilities of request {request.id} did not come")
    return TokenLogprob(token, *entry)


def _store_prompt_logprobs(request: Request, start: int, output: StepOutput, sequence: int) -> None:
    """Files each row's entry under the prompt position that it predicts."""
    entries = output.prompt_logprobs[sequence] if output.prompt_logprobs is not None else None
    if entries is None or request.prompt_logprobs is None:
        raise RuntimeError(f"the prompt log-probabilities of request {request.id} did not come")
    for position, entry in enumerate(entries, start + 1):
        if entry is not None:
            token = request.prompt_token_ids[position]
            request.prompt_logprobs[position] = TokenLogprob(token, *entry)


def _admission(request: Request) -> Admission:
    """What the ranks must know of a request that takes its slot."""
    params = request.params
    bias = params.logit_bias or {}
    banned = sorted(request.stop_ids) if params.min_tokens else []
    seen = params.needs_token_counts
    return Admission(
        slot=request.slot,
        seed=request.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        min_tokens=params.min_tokens,
        logprobs=-1 if request.logprobs is None else params.logprobs or 0,
        prompt_logprobs=-1 if request.prompt_logprobs is None else params.prompt_logprobs or 0,
        selector_budget=-1 if params.selector_budget is None else params.selector_budget,
        banned_ids=np.array(banned, np.int64),
        bias_ids=np.array(list(bias), np.int64),
        bias_values=np.array(list(bias.values()), np.float64),
        prompt_token_ids=np.array(request.prompt_token_ids if seen else [], np.int64),
        output_token_ids=np.array(request.output_token_ids if seen else [], np.int64),
    )
