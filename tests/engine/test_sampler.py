from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ranks import pool
from weaveinf.comm.ranks import Ranks
from weaveinf.engine.sampler import PROMPT_BLOCK, Sampler
from weaveinf.engine.step import Admission, Step, StepOutput

VOCAB, HIDDEN, SLOTS = 203, 16, 16


def make_step(slots, positions, num_logits=None, targets=None) -> Step:
    """A step that samples output `positions` (-1: none) in `slots`; targets: one array a
    sequence."""
    count = len(slots)
    logits = np.array(num_logits or [1] * count, np.int32)
    targets = targets or [np.empty(0, np.int64)] * count
    ones = np.ones(count, np.int32)
    return Step(
        number=1,
        admissions=[],
        state_slot=np.array(slots, np.int32),
        num_computed=ones * 0,
        num_query=np.maximum(logits, 1),
        num_prompt_tokens=np.maximum(logits, 1),
        num_logits=logits,
        num_targets=np.array([len(t) for t in targets], np.int32),
        num_new_pages=ones * 0,
        output_position=np.array(positions, np.int32),
        by_reference=ones == 0,
        token_ids=np.zeros(int(np.maximum(logits, 1).sum()), np.int64),
        new_pages=np.empty(0, np.int64),
        targets=np.concatenate(targets),
    )


def sample(sampler: Sampler, logits: torch.Tensor, step: Step) -> StepOutput:
    now = step.output_position >= 0
    return sampler.sample(logits, step.state_slot[now], step.output_position[now])


def make_sampler(ranks: Ranks, vocab: int = VOCAB) -> Sampler:
    width = -(-vocab // ranks.size)
    return Sampler(vocab, ranks.rank * width, width, SLOTS, ranks.device, ranks.votes)


def shard_of(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    start, width = sampler.shard.start, sampler.shard.width
    padded = torch.full((len(logits), start + width), -torch.inf)
    padded[:, : logits.shape[1]] = logits[:, : start + width]
    return padded[:, start:].contiguous()


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def bias(pairs: dict[int, float]) -> dict[str, np.ndarray]:
    return {"bias_ids": ids(*pairs), "bias_values": np.array(list(pairs.values()), np.float64)}


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 5, "temperature": 1.5},
    {"min_p": 0.05, "top_p": 0.95, "logprobs": 3},
    {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "prompt_token_ids": ids(1, 2, 3, 150),
    },
    {"temperature": 0.0, "min_tokens": 3, "banned_ids": ids(0, 7, 202), "logprobs": 0},
    {"top_k": 100, "top_p": 0.99, **bias({5: 3.0, 199: -100.0, 120: 2.5})},
    {"seed": 2**63 - 1, "top_p": 0.999, "temperature": 5.0},
]


def mixed_batch(ranks: Ranks, logits: torch.Tensor):
    """Six steps of MIXED in one batch, seeds by slot -> tokens [6, requests] and
    log-probabilities."""
    sampler = make_sampler(ranks)
    for slot, settings in enumerate(MIXED):
        sampler.admit(Admission(slot, **{"seed": slot, **settings}))
    tokens, logprobs = [], []
    for position, rows in enumerate(logits):
        output = sample(
            sampler, shard_of(sampler, rows), make_step(range(len(MIXED)), [position] * len(MIXED))
        )
        assert torch.equal(sampler.last_token[: len(MIXED)].cpu(), torch.from_numpy(output.tokens))
        tokens.append(output.tokens)
        logprobs.append(output.logprobs)
    return np.stack(tokens), logprobs


def mixed_logits() -> torch.Tensor:
    logits = torch.randn(6, len(MIXED), VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 6, 202] = 60.0
    return logits


@pytest.fixture(scope="module")
def single():
    return Ranks.single(torch.device("cpu"))


def test_tokens_are_the_same_alone_and_in_any_company(single):
    logits = mixed_logits()
    together, _ = mixed_batch(single, logits)
    for index, settings in enumerate(MIXED):
        sampler = make_sampler(single)
        slot = SLOTS - 1 - index
        sampler.admit(Admission(slot, **{"seed": index, **settings}))
        for position in range(len(logits)):
            row = shard_of(sampler, logits[position, index : index + 1])
            assert sample(sampler, row, make_step([slot], [position])).tokens == together[position, index]


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_do_not_depend_on_the_number_of_ranks(single, size):
    logits = mixed_logits()
    tokens, logprobs = mixed_batch(single, logits)
    for theirs, scores in pool(size).run(mixed_batch, logits):
        assert np.array_equal(theirs, tokens)
        for step, expected in zip(scores, logprobs, strict=True):
            for ours, wanted in zip(step, expected, strict=True):
                if wanted is None:
                    assert ours is None
                else:
                    assert ours.ids == wanted.ids
                    assert ours.values == pytest.approx(wanted.values, abs=1e-5)
                    assert ours.logprob == pytest.approx(wanted.logprob, abs=1e-5)


def test_seeds_positions_and_slots_anew(single):
    sampler = make_sampler(single)
    logits = torch.zeros(4, VOCAB)

    def draw(seeds, position):
        for slot, seed in enumerate(seeds):
            sampler.admit(Admission(slot, seed=seed, top_p=0.95))
        return sample(sampler, logits, make_step(range(4), [position] * 4)).tokens.tolist()

    first = draw([1, 1, 2, 3], 0)
    assert first[0] == first[1] and len(set(first)) == 3
    assert draw([3, 2, 1, 1], 0) == first[::-1]
    assert draw([1, 1, 2, 3], 1) != first


def test_greedy_takes_the_lower_id_and_leaves_the_logits_alone(single):
    sampler = make_sampler(single)
    for slot, settings in enumerate([{}, {"temperature": 1.0, "top_k": 1}, bias({90: 1.0})]):
        sampler.admit(Admission(slot, **{"temperature": 0.0, **settings}))
    logits = torch.zeros(3, VOCAB)
    logits[:, [40, 90, 150]] = 2.0
    before = logits.clone()
    assert sample(sampler, logits, make_step(range(3), [0] * 3)).tokens.tolist() == [40, 40, 90]
    assert torch.equal(logits, before)


def test_cold_is_greedy_and_the_coldest_sampling_is_at_a_hundredth(single):
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 0.005  # half a unit of noise's scale at 0.01, five units at 0.001
    drawn = {}
    for temperature in (1e-6, 0.001, 0.01):
        sampler = make_sampler(single)
        sampler.admit(Admission(0, seed=3, temperature=temperature))
        steps = [make_step([0], [position]) for position in range(40)]
        drawn[temperature] = [int(sample(sampler, logits, step).tokens[0]) for step in steps]
    assert set(drawn[1e-6]) == {9}
    assert drawn[0.001] == drawn[0.01] and len(set(drawn[0.01])) > 10


def test_bans_hold_until_min_tokens_and_bias_comes_before_penalties(single):
    sampler = make_sampler(single)
    sampler.admit(Admission(0, temperature=0.0, min_tokens=2, banned_ids=ids(9, 10)))
    halved = {"repetition_penalty": 2.0, "prompt_token_ids": ids(9), **bias({9: 4.0})}
    sampler.admit(Admission(1, temperature=0.0, **halved))
    logits = torch.zeros(2, VOCAB)
    logits[0, [8, 9, 10]] = torch.tensor([1.0, 3.0, 2.0])
    logits[1, [9, 10]] = torch.tensor([1.0, 2.6])  # (1 + 4) / 2 < 2.6 < 1 / 2 + 4
    for position, expected in enumerate([[8, 10], [8, 10], [9, 10]]):
        logits[1, 10] = 2.6 * 2**position  # token 10 is halved once it is sampled
        assert sample(sampler, logits, make_step([0, 1], [position] * 2)).tokens.tolist() == expected
    sampler.admit(Admission(1, temperature=0.0))
    logits[1, 10] = 0.5
    assert sample(sampler, logits[1:], make_step([1], [0])).tokens.tolist() == [9]


def greedy_with_penalties(settings, logits, given=()):
    """Plain Python, the definition: the tokens of a greedy run over logits [steps, vocab]."""
    output = list(given)
    rep = settings.get("repetition_penalty", 1.0)
    freq, pres = settings.get("frequency_penalty", 0.0), settings.get("presence_penalty", 0.0)
    for row in logits[len(output) :]:
        scores = row.double().clone()
        for token in set(settings["prompt_token_ids"].tolist()) | set(output):
            scores[token] = scores[token] / rep if scores[token] > 0 else scores[token] * rep
        for token in set(output):
            scores[token] -= freq * output.count(token) + pres
        output.append(int(scores.argmax()))
    return output


def test_penalties_follow_the_output_through_many_slots_and_preemption(single):
    generator = torch.Generator().manual_seed(3)
    sampler = make_sampler(single)
    steps, cases = 12, []
    logits = torch.randn(steps, 6, VOCAB, generator=generator)
    logits += torch.randn(1, 6, VOCAB, generator=generator) * 3  # so that tokens come again
    for slot in range(6):
        settings = {"prompt_token_ids": torch.randint(VOCAB, (20,), generator=generator).numpy()}
        settings |= [
            {"repetition_penalty": 1.5},
            {"frequency_penalty": 0.8},
            {"presence_penalty": 1.5, "frequency_penalty": 0.1},
        ][slot % 3]
        cases.append(settings)
        sampler.admit(Admission(slot, temperature=0.0, **settings))
    wanted = [greedy_with_penalties(c, logits[:, slot]) for slot, c in enumerate(cases)]
    assert any(w != logits[:, slot].argmax(1).tolist() for slot, w in enumerate(wanted))
    place = list(range(6))
    for position in range(steps):
        if position == 5:  # request 2 comes back in another slot with what it had said
            sampler.admit(Admission(2))
            past = np.array(wanted[2][:5], np.int64)
            sampler.admit(Admission(9, temperature=0.0, output_token_ids=past, **cases[2]))
            place[2] = 9
        output = sample(sampler, logits[position], make_step(place, [position] * 6))
        assert output.tokens.tolist() == [w[position] for w in wanted]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}])
def test_a_row_of_nan_fails_alone(single, settings):
    logits = torch.randn(4, VOCAB)
    outputs = []
    for spoil in (False, True):
        sampler = make_sampler(single)
        for slot in range(4):
            sampler.admit(Admission(slot, seed=slot, logprobs=2, **settings))
        given = logits.clone()
        if spoil:
            given[1, 100] = torch.nan
            given[2] = -torch.inf
        outputs.append(sample(sampler, given, make_step(range(4), [0] * 4)))
    clean, spoilt = outputs
    assert spoilt.tokens.tolist() == [clean.tokens[0], -1, -1, clean.tokens[3]]
    assert spoilt.logprobs[3] == clean.logprobs[3]
    assert sampler.last_token[:4].tolist() == [clean.tokens[0], -1, -1, clean.tokens[3]]


def test_padding_is_never_chosen(single):
    sampler = Sampler(7, 0, 16, SLOTS, torch.device("cpu"), single.votes)
    for slot in range(8):
        sampler.admit(Admission(slot, seed=slot, temperature=100.0, top_k=50 * (slot % 2)))
    logits = torch.full((8, 16), -torch.inf)
    logits[:, :7] = -1e30
    for position in range(50):
        tokens = sample(sampler, logits, make_step(range(8), [position] * 8)).tokens
        assert ((tokens >= 0) & (tokens < 7)).all()


def run_all(ranks: Ranks, weight: torch.Tensor, x: torch.Tensor, tokens: np.ndarray):
    """A prompt of 150 tokens with log-probabilities, in two chunks, beside two other sequences."""
    sampler = make_sampler(ranks)
    sampler.admit(Admission(0, temperature=0.0, logprobs=2))
    sampler.admit(Admission(1, temperature=0.0, prompt_logprobs=4))
    sampler.admit(Admission(2))
    widest = 0

    def head(rows: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(rows))
        return shard_of(sampler, rows @ weight)

    none = np.empty(0, np.int64)
    first = make_step([0, 1, 2], [0, -1, -1], [1, 100, 0], [none, tokens[1:101], none])
    outputs = [sampler.run(head, x[:101], first)]
    last = np.append(tokens[101:], -1)
    second = make_step([1, 0], [0, 1], [50, 1], [last, none])
    outputs.append(sampler.run(head, torch.cat((x[101:151], x[:1])), second))
    return outputs, widest


def test_prompt_logprobs_are_log_softmax_in_bounded_blocks(single):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(HIDDEN, VOCAB, generator=generator)
    x = torch.randn(151, HIDDEN, generator=generator)
    tokens = torch.randint(VOCAB, (150,), generator=generator).numpy()
    expected = (x @ weight).double().log_softmax(1)
    for outputs, widest in [run_all(single, weight, x, tokens), *pool(2).run(run_all, weight, x, tokens)]:
        assert widest == PROMPT_BLOCK
        first, second = outputs
        assert first.prompt_logprobs[0] is None and first.prompt_logprobs[2] is None
        assert second.prompt_logprobs[1] is None
        found = [*first.prompt_logprobs[1], *second.prompt_logprobs[0]]
        assert len(found) == 150 and found[-1] is None
        for row, entry in enumerate(found[:-1]):
            scores = expected[row + 1]
            assert entry.logprob == pytest.approx(float(scores[tokens[row + 1]]), abs=1e-5)
            assert entry.ids == scores.topk(4).indices.tolist()
            assert entry.values == pytest.approx(scores.topk(4).values.tolist(), abs=1e-5)
        best = [int(expected[row].argmax()) for row in (0, 150, 0)]
        assert [*first.tokens, *second.tokens] == best
        (chosen,) = first.logprobs
        assert chosen.logprob == chosen.values[0] == pytest.approx(float(expected[0].max()), abs=1e-5)
        assert len(chosen.ids) == 2 and second.logprobs[0] is None


def test_a_step_without_samples_yields_none(single):
    sampler = make_sampler(single)
    output = sampler.run(lambda x: x, torch.empty(0, HIDDEN), make_step([3], [-1], [0]))
    assert output.tokens.shape == (0,) and output.logprobs is None and output.prompt_logprobs is None
