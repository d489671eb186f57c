"""Whatever happens in whatever order: the right tokens, no page lost, none shared by mistake."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.ranks import EOS, VOCAB, SimulatedRank, expected, logprob
from weaveinf.cache.blocks import BlockAllocator
from weaveinf.engine.request import Request, SamplingParams, make_requests
from weaveinf.engine.scheduler import Scheduler
from weaveinf.engine.step import Step, StepOutput

MAX_MODEL_LEN = 14

params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(2, 8),
    min_tokens=st.integers(0, 2),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(1, VOCAB - 1), max_size=1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    seed=st.integers(0, 2),
    n=st.sampled_from([1, 1, 1, 2]),
    logprobs=st.sampled_from([None, None, 1]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)
# Few different tokens and long runs, so that prefixes are often the same.
prompts = st.builds(
    lambda run, tail: [1] * run + tail, st.integers(0, 8), st.lists(st.integers(1, 2), min_size=1, max_size=4)
)


class Serving(RuleBasedStateMachine):
    """Requests come, end, are aborted and stopped, with up to `depth` steps under way."""

    @initialize(
        num_blocks=st.integers(4, 12),
        size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        row_align=st.sampled_from([1, 1, 2, 3, 100]),
        extra=st.integers(0, 6),
        depth=st.integers(1, 3),
    )
    def set_up(
        self, num_blocks: int, size: int, max_num_seqs: int, row_align: int, extra: int, depth: int
    ) -> None:
        self.room = num_blocks * size + 1
        self.budget = max_num_seqs - 1 + min(row_align, MAX_MODEL_LEN) + extra
        self.row_align, self.depth = row_align, depth
        self.blocks = BlockAllocator(num_blocks, size, b"key")
        self.shapes: dict[int, bytes] = {}
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs, self.budget, MAX_MODEL_LEN, [EOS], row_align, self.shape
        )
        self.rank = SimulatedRank(num_blocks, size, max_num_seqs)
        self.under_way: deque[tuple[Step, StepOutput]] = deque()
        self.requests: list[Request] = []
        self.reported: dict[int, list[int]] = {}

    def shape(self, request: Request, end: int) -> bytes:
        """As a selector's: what is behind the prompt is shaped by more than its tokens."""
        return self.shapes[request.id] if end > len(request.prompt_token_ids) else b""

    @rule(
        prompt=prompts,
        params=params_strategy,
        salt=st.sampled_from([b"", b"", b"", b"s"]),
        shape=st.sampled_from([b"", b"", b"", b"s"]),
    )
    def add(self, prompt: list[int], params: SamplingParams, salt: bytes, shape: bytes) -> None:
        first = len(self.requests)
        for request in make_requests(first, prompt, params, VOCAB, 7, salt):
            self.shapes[request.id] = shape
            limit = min(
                MAX_MODEL_LEN, self.room if params.max_tokens is None else len(prompt) + params.max_tokens
            )
            try:
                self.scheduler.add(request)
            except ValueError:
                assert len(prompt) >= min(MAX_MODEL_LEN, self.room) or limit > self.room
                return
            assert limit <= self.room
            self.requests.append(request)
            self.reported[request.id] = []

    @precondition(lambda self: len(self.under_way) < self.depth)
    @rule()
    def schedule(self) -> None:
        before = {r.id: r for r in self.requests if r.status == "running"}
        step = self.scheduler.schedule()
        if step is None:
            assert self.under_way or not self.scheduler.has_work, "work, but nothing to run"
            return
        assert 1 <= step.num_tokens <= self.budget
        slots = step.state_slot.tolist()
        assert len(set(slots)) == len(slots)
        running = {r.slot: r for r in self.requests if r.status == "running"}
        for slot, start, count in zip(slots, step.num_computed, step.num_query, strict=True):
            prompt = len(running[slot].prompt_token_ids)
            assert start + count < running[slot].limit  # nothing is computed past the end
            for cut in (start, start + count):
                assert cut >= prompt or cut % self.row_align == 0
        if before:  # the oldest is never preempted, and never waits for pages
            oldest = before[min(before)]
            assert oldest.status == "running"
            under_way = oldest.num_known + oldest.in_flight >= oldest.limit
            assert oldest.slot in slots or under_way
        self.under_way.append((step, self.rank.execute(step.pack())))

    @precondition(lambda self: self.under_way)
    @rule()
    def update(self) -> None:
        for request, tokens in self.scheduler.update(*self.under_way.popleft()):
            self.reported[request.id] += tokens
            assert self.reported[request.id] == request.output_token_ids

    @precondition(lambda self: any(r.finish_reason is None for r in self.requests))
    @rule(data=st.data(), stop_string=st.booleans())
    def end_early(self, data: st.DataObject, stop_string: bool) -> None:
        unfinished = [r for r in self.requests if r.finish_reason is None]
        request = data.draw(st.sampled_from(unfinished))
        if stop_string:
            self.scheduler.finish(request, "stop", "a string")
        else:
            assert self.scheduler.abort(request.id) is request
        assert self.scheduler.abort(request.id) is None
        assert request.slot == -1

    @invariant()
    def pages_are_shared_only_by_equal_prefixes(self) -> None:
        self.scheduler.check()
        contents: dict[int, object] = {}
        for request in self.requests:
            assert request.status == "running" or not request.blocks
            for i, page in enumerate(request.blocks):
                end = (i + 1) * self.blocks.block_size
                # A page that is not yet full of known tokens is its request's alone.
                own: object = request.id
                if end <= request.num_known:
                    ends = range(self.blocks.block_size, end + 1, self.blocks.block_size)
                    own = (request.tokens(0, end), request.salt, [self.shape(request, e) for e in ends])
                assert contents.setdefault(page, own) == own

    @invariant()
    def tokens_are_right_so_far(self) -> None:
        for request in self.requests:
            self.check_tokens(request)

    def check_tokens(self, request: Request) -> None:
        prompt, out = request.prompt_token_ids, request.output_token_ids
        right, reason = expected(request, {EOS}, request.limit)
        assert out == right[: len(out)]
        if request.finish_reason is not None:
            early = request.finish_reason == "abort" or request.stop_reason == "a string"
            assert early or (out, request.finish_reason) == (right, reason)
        if request.logprobs is not None:
            wanted = [logprob(prompt + out[:i], token) for i, token in enumerate(out)]
            assert [tuple(entry[1:]) for entry in request.logprobs] == [tuple(w) for w in wanted]
            assert [entry.token_id for entry in request.logprobs] == out
        if request.prompt_logprobs is not None and out:
            assert request.prompt_logprobs[0] is None
            for i in range(1, len(prompt)):
                entry = request.prompt_logprobs[i]
                assert entry is not None
                assert tuple(entry) == (prompt[i], *logprob(prompt[:i], prompt[i]))

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.scheduler.has_work:
            if len(self.under_way) < self.depth:
                self.schedule()
            if self.under_way:
                self.update()
            steps += 1
            self.pages_are_shared_only_by_equal_prefixes()
            assert steps < 3 * MAX_MODEL_LEN * (1 + len(self.requests)), "requests do not end"
        for request in self.requests:
            assert request.finish_reason is not None
            self.check_tokens(request)
        self.scheduler.check()
        assert self.blocks.num_free == self.blocks.num_blocks


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
