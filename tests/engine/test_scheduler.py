"""What the scheduler does, case by case; `test_scheduler_properties` does all at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from weaveinf.cache.blocks import BlockAllocator
from weaveinf.engine.request import Request, SamplingParams, make_requests
from weaveinf.engine.scheduler import Scheduler
from weaveinf.engine.step import SampledLogprobs, Step, StepOutput

EOS = 0


def scheduler(
    num_blocks: int = 100,
    size: int = 4,
    seqs: int = 8,
    budget: int = 64,
    length: int = 64,
    row_align: int = 1,
) -> Scheduler:
    blocks = BlockAllocator(num_blocks, size, b"key")
    return Scheduler(blocks, seqs, budget, length, [EOS], row_align)


def add(it: Scheduler, id: int, prompt: Sequence[int], **params: Any) -> Request:
    """A request whose prompt shares no page with that of another id, unless meant to."""
    params.setdefault("max_tokens", 8)
    request = make_requests(id, prompt, SamplingParams(**params), 1000, 0)[0]
    it.add(request)
    return request


def unlike(id: int, length: int) -> list[int]:
    return [100 + id] * length


def run(it: Scheduler) -> Step:
    step = it.schedule()
    assert step is not None
    return Step.unpack(step.pack())


def answer(it: Scheduler, step: Step, token: int = 7) -> list[tuple[Request, list[int]]]:
    return it.update(step, StepOutput(np.full(step.num_samples, token, np.int64)))


def test_a_request_from_its_prompt_to_its_end_one_step_ahead() -> None:
    it = scheduler()
    request = add(it, 3, [5, 6, 7, 8, 9], max_tokens=3, temperature=1e-6)
    first = run(it)
    assert (first.num_computed[0], first.num_query[0], first.num_logits[0]) == (0, 5, 1)
    assert first.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert (first.output_position[0], first.num_new_pages[0]) == (0, 2)
    assert first.admissions[0].temperature == 1e-6  # what that means is the sampler's business
    second = run(it)  # before the first token is known
    assert second.by_reference.tolist() == [True]
    assert (second.num_computed[0], second.num_query[0], second.output_position[0]) == (5, 1, 1)
    assert len(second.token_ids) == len(second.new_pages) == len(second.admissions) == 0
    third = run(it)
    assert it.schedule() is None  # max_tokens is met by counting
    assert request.in_flight == it.num_in_flight == 3
    assert answer(it, first) == [(request, [7])]
    assert answer(it, second) == [(request, [7])]
    assert request.finish_reason is None
    assert answer(it, third) == [(request, [7])]
    assert (request.finish_reason, request.output_token_ids) == ("length", [7, 7, 7])
    assert not it.has_work
    it.check()


def test_a_known_token_goes_by_value() -> None:
    it = scheduler()
    add(it, 0, [5, 6])
    answer(it, run(it), token=9)
    step = run(it)
    assert step.by_reference.tolist() == [False]
    assert step.token_ids.tolist() == [9]


def test_the_end_is_seen_late_and_the_surplus_dropped_while_its_room_is_reused() -> None:
    it = scheduler(num_blocks=2, seqs=1)
    ending = add(it, 0, unlike(0, 4), max_tokens=4)
    waiting = add(it, 1, unlike(1, 4), max_tokens=4)
    first, surplus = run(it), run(it)
    pages = list(ending.blocks)
    assert answer(it, first, token=EOS) == [(ending, [EOS])]
    assert (ending.finish_reason, ending.stop_reason) == ("stop", None)
    step = run(it)  # while the surplus step is still under way
    assert waiting.slot == surplus.state_slot[0] == step.state_slot[0]
    assert set(waiting.blocks) <= set(pages)
    assert answer(it, surplus) == []
    assert ending.output_token_ids == [EOS]
    assert answer(it, step) == [(waiting, [7])]


def test_stop_tokens_min_tokens_and_ignore_eos() -> None:
    it = scheduler()
    named = add(it, 0, [5], stop_token_ids=[7])
    patient = add(it, 1, [5], stop_token_ids=[7], min_tokens=1)
    other = add(it, 2, [5], ignore_eos=True)
    step = run(it)
    banned = [admission.banned_ids.tolist() for admission in step.admissions]
    assert banned == [[], [EOS, 7], []]
    answer(it, step)
    assert (named.finish_reason, named.stop_reason) == ("stop", 7)
    assert patient.finish_reason is None
    answer(it, run(it), token=EOS)
    assert (patient.finish_reason, patient.stop_reason) == ("stop", None)
    assert other.finish_reason is None


def test_the_budget_cuts_prompts_and_decodes_come_first() -> None:
    it = scheduler(budget=10, seqs=2)
    add(it, 0, unlike(0, 4))
    long = add(it, 1, unlike(1, 20), max_tokens=4)
    steps = [run(it) for _ in range(4)]
    assert [step.num_query.tolist() for step in steps] == [[4, 6], [1, 9], [1, 5], [1, 1]]
    assert [step.num_computed.tolist()[1] for step in steps] == [0, 6, 15, 20]
    assert [step.output_position.tolist()[1] for step in steps] == [-1, -1, 0, 1]
    assert [step.num_logits.tolist()[1] for step in steps] == [0, 0, 1, 1]
    assert steps[0].num_new_pages[1] == 5  # those of the whole prompt at once
    assert long.in_flight == 2


def test_prompts_are_cut_at_legal_rows_only() -> None:
    it = scheduler(budget=13, seqs=2, row_align=6)
    add(it, 0, unlike(0, 3))
    add(it, 1, unlike(1, 20))
    steps = [run(it) for _ in range(3)]
    assert [step.num_query.tolist() for step in steps] == [[3, 6], [1, 12], [1, 2]]


def test_a_prefix_is_shared_from_the_next_step_on() -> None:
    it = scheduler()
    prompt = list(range(1, 13))
    first = add(it, 0, prompt)
    step = run(it)
    second, unlike_salt = (
        add(it, 1, [*prompt, 50, 51]),
        make_requests(2, prompt, SamplingParams(), 1000, 0, salt=b"other")[0],
    )
    it.add(unlike_salt)
    same = add(it, 3, prompt)
    step = run(it)
    assert step.num_computed.tolist() == [12, 12, 0, 8]  # one token at least is computed
    assert step.num_query.tolist() == [1, 2, 12, 4]
    assert second.blocks[:3] == first.blocks[:3]
    assert same.blocks[:2] == first.blocks[:2]
    assert not set(unlike_salt.blocks) & set(first.blocks)
    assert (second.num_cached, unlike_salt.num_cached, same.num_cached) == (12, 0, 8)
    assert (it.num_prefix_queried, it.num_prefix_hit) == (12 + 14 + 12 + 12, 12 + 8)
    it.check()


def test_a_prefix_outlives_its_request_and_its_answer_is_shared_too() -> None:
    it = scheduler()
    first = add(it, 0, [1, 2, 3], max_tokens=6)
    while it.has_work:
        answer(it, run(it), token=9)
    again = add(it, 1, [1, 2, 3, 9, 9, 9, 9, 9, 5])
    assert run(it).num_computed.tolist() == [8]
    assert again.num_cached == 8
    assert first.num_known == 9


def test_samples_of_one_prompt_compute_it_once() -> None:
    it = scheduler()
    for request in make_requests(0, list(range(1, 14)), SamplingParams(n=3), 1000, 0):
        it.add(request)
    assert run(it).num_query.tolist() == [13]
    assert run(it).num_query.tolist() == [1, 1, 1]


def test_a_short_common_prefix_makes_nobody_wait() -> None:
    it = scheduler()
    for i in range(2):
        add(it, i, [1, 2, 3, 4, *unlike(i, 8)])
    assert run(it).num_query.tolist() == [12, 12]


def test_hits_end_where_a_prompt_may_be_cut() -> None:
    it = scheduler(row_align=6)
    prompt = list(range(1, 21))
    add(it, 0, prompt)
    run(it)
    add(it, 1, prompt)
    assert run(it).num_computed.tolist() == [20, 12]  # 16 is a page's end, 12 a legal one as well


def test_prompt_logprobs_compute_every_row_and_are_filed_by_position() -> None:
    it = scheduler(budget=5, seqs=1)
    for i in range(2):
        add(it, i, [1, 2, 3, 4, 5, 6, 7], max_tokens=1, prompt_logprobs=2 if i else None)
        if i == 0:
            answer(it, run(it))
            answer(it, run(it))
    request = it.abort(99) or it._waiting[0]
    steps = [run(it), run(it)]
    assert [step.num_computed[0] for step in steps] == [0, 5]  # no prefix hits
    assert [step.targets.tolist() for step in steps] == [[2, 3, 4, 5, 6], [7, -1]]
    assert [step.num_logits[0] for step in steps] == [5, 2]
    assert steps[0].admissions[0].prompt_logprobs == 2
    for step in steps:
        rows = [
            None if target < 0 else SampledLogprobs(-float(target), [1, 2], [-0.5, -1.0])
            for target in step.targets
        ]
        output = StepOutput(np.full(step.num_samples, 7, np.int64), None, [rows])
        it.update(step, output)
    entries = request.prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert [(e.token_id, e.logprob) for e in entries[1:] if e] == [(t, -t) for t in range(2, 8)]
    assert request.finish_reason == "length"


def test_the_newest_is_preempted_and_the_oldest_goes_on() -> None:
    it = scheduler(num_blocks=5, size=2)
    old = add(it, 0, unlike(0, 4), max_tokens=5)
    new = add(it, 1, unlike(1, 2), max_tokens=4)
    steps = [run(it) for _ in range(3)]
    assert [step.num_new_pages.tolist() for step in steps] == [[2, 1], [1, 1], [0, 0]]
    taken = list(new.blocks)
    step = run(it)  # the old one needs a fourth page, and all five are held
    assert step.state_slot.tolist() == [old.slot]
    assert set(step.new_pages) <= set(taken)
    assert (new.status, new.blocks, new.slot, new.in_flight) == ("waiting", [], -1, 3)
    assert (it.num_preemptions, it.num_waiting, old.num_preemptions) == (1, 1, 0)
    it.check()


def test_a_preempted_request_waits_for_its_tokens_under_way() -> None:
    it = scheduler(num_blocks=6, size=1, seqs=2)
    old = add(it, 0, unlike(0, 2), max_tokens=4)
    new = add(it, 1, unlike(1, 1), max_tokens=4, frequency_penalty=1)
    steps = [run(it)]
    while new.num_preemptions == 0:
        steps.append(run(it))
    sampled = new.in_flight
    assert sampled >= 1
    it.abort(old.id)  # there is room again
    assert it.schedule() is None
    for step in steps:
        answer(it, step)
    assert new.output_token_ids == [7] * sampled
    step = run(it)
    assert step.num_computed[0] + step.num_query[0] == 1 + sampled
    assert step.output_position.tolist() == [sampled]
    assert step.admissions[0].prompt_token_ids.tolist() == unlike(1, 1)
    assert step.admissions[0].output_token_ids.tolist() == [7] * sampled
    answer(it, step)
    assert len(new.output_token_ids) == sampled + 1


def test_a_preempted_request_may_end_with_a_token_under_way() -> None:
    it = scheduler(num_blocks=6, size=1, seqs=2)
    add(it, 0, unlike(0, 2), max_tokens=4)
    new = add(it, 1, unlike(1, 1), max_tokens=4)
    steps = [run(it)]
    while new.num_preemptions == 0:
        steps.append(run(it))
    answer(it, steps[0], token=EOS)
    assert (new.status, new.finish_reason) == ("finished", "stop")
    assert it.num_waiting == 0
    it.check()


def test_an_abort_frees_at_once_and_forgets_what_is_under_way() -> None:
    it = scheduler()
    running, waiting = add(it, 0, [5, 6]), add(it, 1, unlike(1, 62), max_tokens=1)
    step = run(it)
    it.abort(0)
    it.abort(1)
    assert (running.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert it.blocks.num_free == it.blocks.num_blocks
    assert it.has_work  # a step is under way
    assert answer(it, step) == []
    assert not it.has_work
    assert it.abort(0) is None
    assert it.abort(12345) is None


def test_a_stop_string_ends_a_request_as_stop() -> None:
    it = scheduler()
    request = add(it, 0, [5])
    first, second = run(it), run(it)
    answer(it, first)
    it.finish(request, "stop", "END")
    it.finish(request, "abort")  # too late
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    assert answer(it, second) == []


def test_logprobs_come_with_their_tokens() -> None:
    it = scheduler()
    asked, not_asked = add(it, 0, [5], logprobs=1), add(it, 1, [5])
    step = run(it)
    assert [admission.logprobs for admission in step.admissions] == [1, -1]
    entry = SampledLogprobs(-1.5, [3], [-0.1])
    it.update(step, StepOutput(np.array([7, 7]), [entry, None]))
    assert asked.logprobs == [(7, -1.5, [3], [-0.1])]
    assert not_asked.logprobs is None


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [
        (64, 1, "64 tokens, max_model_len is 64 .* shorten the prompt to 63"),
        (30, 20, "30 tokens, with the answer 50, .* 40: lower max_tokens to 11"),
        (41, None, "41 tokens, .* 40: shorten it or give the cache more memory"),
    ],
)
def test_what_can_never_be_served_is_refused(length: int, max_tokens: int | None, words: str) -> None:
    it = scheduler(num_blocks=10)
    with pytest.raises(ValueError, match=words):
        add(it, 0, [5] * length, max_tokens=max_tokens)
    assert not it.has_work
    add(it, 0, [5] * 40, max_tokens=1)  # the last token is sampled and never stored
    answer(it, run(it))
    assert not it.has_work


def test_an_open_end_is_the_context_s_or_the_cache_s() -> None:
    for num_blocks, end in ((100, 64), (10, 41)):
        request = add(scheduler(num_blocks), 0, [5], max_tokens=None)
        assert request.limit == end
    assert add(scheduler(), 0, [5] * 60, max_tokens=50).limit == 64


def test_ids_are_taken_once() -> None:
    it = scheduler()
    add(it, 0, [5])
    with pytest.raises(ValueError, match="added before"):
        add(it, 0, [5])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seqs": 8, "budget": 7}, "must be at least 8 for 8 sequences"),
        ({"seqs": 8, "budget": 10, "row_align": 4}, "must be at least 11"),
        ({"seqs": 0}, "at least 1"),
        ({"length": 1}, "max_model_len at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scheduler(**settings)


def test_results_must_fit_the_oldest_step_under_way() -> None:
    it = scheduler()
    add(it, 0, [5])
    first, second = run(it), run(it)
    with pytest.raises(RuntimeError, match="not the oldest"):
        answer(it, second)
    with pytest.raises(RuntimeError, match="1 samples were due, 0 came"):
        it.update(first, StepOutput(np.empty(0, np.int64)))
