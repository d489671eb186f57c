from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weaveinf.ops import logprobs, sampling
from weaveinf.ops.sampling import Limits, Shard


def shards(vocab: int, ranks: int) -> list[Shard]:
    width = -(-vocab // ranks)
    return [Shard(vocab, r * width, width) for r in range(ranks)]


def pieces(whole: Tensor, ranks: int, fill: float = -torch.inf) -> list[Tensor]:
    """[rows, vocab] -> one padded [rows, width] a rank."""
    vocab = whole.shape[1]
    width = -(-vocab // ranks)
    padded = whole.new_full((whole.shape[0], width * ranks), fill)
    padded[:, :vocab] = whole
    return [p.contiguous() for p in padded.split(width, 1)]


def lockstep(votings):
    """Runs the generators of all ranks side by side; sums in rank order. -> results, number of
    votes."""
    asks, votes = [None] * len(votings), 0
    while True:
        results, sent = [], []
        for voting, ask in zip(votings, asks, strict=True):
            try:
                sent.append(voting.send(ask))
            except StopIteration as end:
                results.append(end.value)
        assert len(results) in (0, len(votings)), "ranks disagree on the number of votes"
        if results:
            return results, votes
        assert len({t.shape for t in sent}) == 1
        assert all(t.dtype == torch.float32 for t in sent)
        total = sent[0].clone()
        for t in sent[1:]:
            total += t
        asks, votes = [total.clone() for _ in votings], votes + 1


def same(results):
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0, equal_nan=True)
    return results[0]


def keys_for(rows: int, seed: int = 0, start: int = 0) -> Tensor:
    return sampling.noise_keys(
        sampling.mixed(np.full(rows, seed, np.uint64), np.uint64(1)), np.arange(start, start + rows)
    )


def chi_square_limit(freedom: int) -> float:
    """A bound that chance passes once in a billion (Wilson-Hilferty, 6 sigma)."""
    return freedom * (1 - 2 / (9 * freedom) + 6 * (2 / (9 * freedom)) ** 0.5) ** 3


def assert_distributed(tokens: Tensor, probs: Tensor) -> None:
    """chi-square of token counts against float64 probabilities [vocab], rare tokens pooled."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert (counts[probs == 0] == 0).all()
    expected = probs * len(tokens)
    often = expected >= 10
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    used = wanted > 0
    chi = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    assert chi < chi_square_limit(max(1, int(used.sum()) - 1))


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens of one row may be sampled, by the definition, in float64: bool [vocab]."""
    order = scores.sort(descending=True, stable=True).indices
    probs = scores.double().softmax(0)[order]
    keep = probs >= min_p * probs[0] * (1 - 1e-9)
    keep &= torch.arange(len(probs)) < (top_k or len(probs))
    probs = probs * keep / (probs * keep).sum()
    if top_p < 1:
        keep &= probs.cumsum(0) - probs < top_p
    out = torch.zeros(len(probs), dtype=torch.bool)
    out[order[keep]] = True
    return out


def limits(rows: int, vocab: int, cases) -> Limits:
    k, p, m = zip(*(cases[i % len(cases)] for i in range(rows)), strict=True)
    floor = torch.tensor(m, dtype=torch.float64).log().float()
    return Limits(torch.tensor([x or vocab for x in k]), torch.tensor(p, dtype=torch.float64), floor)


@pytest.mark.parametrize("vary", ["ids", "positions", "seeds"])
def test_noise_is_uniform_and_uncorrelated_along_every_counter(vary):
    n = 1 << 16
    counter = np.arange(n)
    if vary == "ids":
        g = sampling.gumbel(keys_for(1, 7, 3), torch.arange(n, dtype=torch.int32))[0]
    elif vary == "positions":
        keys = sampling.noise_keys(sampling.mixed(np.full(n, 7, np.uint64), np.uint64(1)), counter)
        g = sampling.gumbel(keys, torch.tensor([11], dtype=torch.int32))[:, 0]
    else:
        keys = sampling.noise_keys(sampling.mixed(counter.astype(np.uint64), np.uint64(1)), np.full(n, 3))
        g = sampling.gumbel(keys, torch.tensor([11], dtype=torch.int32))[:, 0]
    assert g.isfinite().all()
    u = (-(-g.double()).exp()).exp()
    bins = torch.bincount((u * 256).long().clamp(max=255), minlength=256).double()
    assert ((bins - n / 256) ** 2 / (n / 256)).sum() < chi_square_limit(255)
    for lag in (1, 2, 128, 4096):  # pairs fall evenly into a 16 x 16 grid
        cell = (u[:-lag] * 16).long() * 16 + (u[lag:] * 16).long()
        grid = torch.bincount(cell, minlength=256).double()
        wanted = (n - lag) / 256
        assert ((grid - wanted) ** 2 / wanted).sum() < chi_square_limit(255)
    assert u.unique().numel() > n - 196  # 24 good bits: 128 birthdays are expected, 6 sigma above


def test_noise_ends_stay_finite():
    """The extreme states, 0 and 2^31 - 1, reached by inverting the mixer."""
    mask = (1 << 32) - 1

    def unfold(x: int, shift: int) -> int:
        out = x
        for _ in range(32 // shift + 1):
            out = x ^ (out >> shift)
        return out

    found = []
    for state in (0, 0x7FFFFFFF):
        x = unfold(state, 16) * pow(0x846CA68B, -1, 1 << 32) & mask
        x = unfold(x, 15) * pow(0x7FEB352D, -1, 1 << 32) & mask  # second key 0
        x = unfold(x, 16) * pow(0x9E3779B9, -1, 1 << 32) & mask
        ids = torch.from_numpy(np.array([x], np.uint32).view(np.int32))
        found.append(float(sampling.gumbel(torch.zeros(1, 2, dtype=torch.int32), ids)))
    assert found[0] == pytest.approx(32 * np.log(2), rel=1e-6)  # -log(2^-32): the largest noise
    assert found[1] == pytest.approx(-np.log(24 * np.log(2)), rel=1e-6)


def test_noise_of_few_tokens_is_that_of_all_to_the_bit():
    keys = keys_for(5, seed=2**64 - 1)
    ids = torch.arange(4001, dtype=torch.int32)
    whole = sampling.gumbel(keys, ids)
    some = torch.stack([torch.randperm(4001)[:37] for _ in range(5)])
    assert torch.equal(sampling.gumbel(keys, some.int()), whole.gather(1, some))
    assert torch.equal(sampling.gumbel(keys[2:3], ids[1000:1999]), whole[2:3, 1000:1999])


@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 1000])
def test_a_draw_without_noise_is_the_first_of_the_largest(n):
    scores = torch.randint(-3, 4, (40, n)).float()
    scores[0] = -torch.inf
    scores[1, n // 2] = torch.nan
    for row, (value, id_) in enumerate(zip(*sampling.draw(scores, 10), strict=True)):
        if row < 2:
            assert not value.isfinite() and id_ == -1
        else:
            assert value == scores[row].max() and id_ == 10 + (scores[row] == value).nonzero()[0, 0]


@pytest.mark.parametrize("distinct", [3, 10**6])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 40), (300, 7), (300, 64), (1280, 9)])
def test_top_takes_lower_columns_of_equals(n, k, distinct):
    scores = torch.randint(-distinct, distinct, (20, n)) / 7.0
    scores[0, ::2] = -0.0
    scores[0, 1::2] = 0.0
    values, columns = sampling.top(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_mass_is_exact_in_any_order():
    below = -torch.rand(1, 5000) * 30
    unit = Shard(5000, 0, 5000).unit
    whole = sampling.mass(below, unit)
    assert torch.equal(whole, whole.floor()) and float(whole.double().sum()) < 2**53
    parts = [sampling.mass(b.contiguous(), unit) for b in below.split(617, 1)]
    assert torch.equal(torch.cat(parts, 1), whole)
    error = (whole.double() / unit - below.double().exp()).abs()
    assert (error <= 1 / unit + 2e-7 * below.double().exp()).all()
    limbs = sum(sampling._to_limbs(p.double().sum(1)) for p in parts)
    assert torch.equal(sampling._from_limbs(limbs), whole.double().sum(1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("distinct", "scale"), [(1, 3), (4, 3), (10**6, 3e4), (10**6, 1e8)])
def test_first_of_mass_is_the_shortest_prefix(ranks, distinct, scale):
    rows, vocab = 12, 401
    scores = torch.randint(-distinct, distinct, (rows, vocab)) / scale
    below = scores - scores.amax(1, keepdim=True)
    weight = (scores.double() * (6 * scale / distinct)).exp().mul(1000).ceil().float()
    total = weight.sum(1, dtype=torch.float64)
    share = torch.rand(rows, dtype=torch.float64)
    share[0], share[1] = 1e-12, 1.0
    for relative, target in ((True, share), (False, share * total), (False, total + 1)):
        votings = [
            sampling.first_of_mass(s, b, w, target, shard, relative)
            for s, b, w, shard in zip(
                *(pieces(x, ranks, f) for x, f in ((scores, -torch.inf), (below, -torch.inf))),
                pieces(weight, ranks, 0.0),
                shards(vocab, ranks),
                strict=True,
            )
        ]
        results, votes = lockstep(votings)
        chosen = torch.cat(results, 1)
        assert votes == (5 if ranks == 1 else 6)
        assert not chosen[:, vocab:].any()
        wanted = torch.minimum(share * total if relative else target, total)
        for row in range(rows):
            order = scores[row].sort(descending=True, stable=True).indices
            n = int((weight[row, order].double().cumsum(0) < wanted[row]).sum()) + 1
            assert torch.equal(chosen[row, :vocab].nonzero()[:, 0], order[:n].sort().values)


CASES = [  # top_k, top_p, min_p
    (5, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.1),
    (70, 1.0, 0.0),
    (700, 0.8, 0.0),
    (3, 0.5, 0.0),
    (0, 0.99, 1e-4),
    (40, 0.7, 0.01),
    (0, 0.999, 0.0),
    (1000, 1.0, 1e-6),
    (0, 1e-9, 0.0),
    (0, 1.0, 1.0),
]


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 6.0, "ties"])
@pytest.mark.parametrize("vocab", [37, 1501])
def test_limited_sampling_is_the_definition_at_any_number_of_ranks(vocab, spread):
    rows = 4 * len(CASES)
    if spread == "ties":
        scores = torch.randint(-4, 3, (rows, vocab)).float()
    else:
        scores = torch.randn(rows, vocab) * spread
    noise = sampling.gumbel(keys_for(rows), torch.arange(vocab, dtype=torch.int32))
    expected, drawn = [], []
    for row in range(rows):
        keep = kept(scores[row], *CASES[row % len(CASES)])
        expected.append((scores[row] + noise[row]).masked_fill(~keep, -torch.inf).argmax())
    for ranks in (1, 2, 4):
        votings = [
            sampling.sample_limited(s, keys_for(rows), limits(rows, vocab, CASES), shard)
            for s, shard in zip(pieces(scores, ranks), shards(vocab, ranks), strict=True)
        ]
        drawn.append(same(lockstep(votings)[0]))
    same(drawn)
    agreed = int((drawn[0] == torch.stack(expected)).sum())
    assert agreed >= rows - 1  # float64 may put one boundary on the other side


def test_limited_sampling_costs_few_votes_when_few_tokens_matter():
    scores = torch.randn(8, 6000) * 8
    for case, most in (((20, 1.0, 0.0), 1), ((0, 1.0, 0.2), 1), ((0, 0.9, 0.0), 2)):
        votings = [
            sampling.sample_limited(s, keys_for(8), limits(8, 6000, [case]), shard)
            for s, shard in zip(pieces(scores, 2), shards(6000, 2), strict=True)
        ]
        assert lockstep(votings)[1] == most


@pytest.mark.parametrize("case", [(0, 0.9, 0.0), (7, 1.0, 0.0), (0, 1.0, 0.05), (20, 0.8, 0.01)])
@pytest.mark.parametrize("vocab", [60, 400])
def test_limited_sampling_is_distributed_as_the_model_says(case, vocab):
    draws = 20000 if vocab == 60 else 1200
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = scores.double().softmax(0) * kept(scores, *case)
    one = Shard(vocab, 0, vocab)
    rows = scores.expand(draws, vocab).contiguous()
    voting = sampling.sample_limited(rows, keys_for(draws, 3), limits(draws, vocab, [case]), one)
    assert_distributed(lockstep([voting])[0][0], probs / probs.sum())


def test_free_sampling_is_distributed_as_the_model_says():
    vocab, draws = 300, 30000
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 2
    rows = scores.expand(draws, vocab).contiguous()
    ids = sampling.draw(rows, 0, torch.ones(draws), keys_for(draws, 9))[1]
    assert_distributed(ids.long(), scores.double().softmax(0))


def test_rows_without_a_choice_are_told_and_the_others_unharmed():
    scores = torch.randn(8 * len(CASES), 500)
    bad = {1: torch.nan, 14: torch.inf, 25: -torch.inf, 38: torch.nan}

    def draw(given):
        votings = [
            sampling.sample_limited(s, keys_for(len(given)), limits(len(given), 500, CASES), shard)
            for s, shard in zip(pieces(given, 2), shards(500, 2), strict=True)
        ]
        return same(lockstep(votings)[0])

    clean, spoilt = draw(scores), scores.clone()
    for row, value in bad.items():
        spoilt[row, 300] = value
        if value == -torch.inf:
            spoilt[row] = value
    tokens = draw(spoilt)
    for row in range(len(scores)):
        assert tokens[row] == (-1 if row in bad else clean[row])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_winner_prefers_the_lower_id(ranks):
    scores = torch.randint(0, 3, (50, 42)).float()
    scores[3] = torch.nan
    votings = []
    for s, shard in zip(pieces(scores, ranks), shards(42, ranks), strict=True):
        votings.append(sampling.winner(sampling.draw(s, shard.start), shard))
    tokens = same(lockstep(votings)[0])
    expected = scores.argmax(1)
    expected[3] = -1
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("n", [0, 5, 20])
def test_logprobs_are_those_of_log_softmax(ranks, n):
    vocab, rows = 61, 9
    logits = torch.randn(rows, vocab) * 5 + 100
    logits[0, 10:] = -1000.0  # fewer real candidates than asked for
    targets = torch.randint(0, vocab, (rows,))
    votings = [
        shard.gather(logprobs.logprob_parts(p, targets, n, shard))
        for p, shard in zip(pieces(logits, ranks), shards(vocab, ranks), strict=True)
    ]
    chosen, ids, values = logprobs.join_logprobs(same(lockstep(votings)[0]), n)
    expected = logits.double().log_softmax(1)
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :n]
    torch.testing.assert_close(chosen, expected.gather(1, targets[:, None])[:, 0].float())
    assert torch.equal(ids, best)
    torch.testing.assert_close(values, expected.gather(1, best).float())


def test_penalties_match_transformers_and_their_definition():
    rows, vocab = 4, 50
    logits = torch.randn(rows, vocab) * 3
    prompt = torch.randint(0, 25, (rows, 12))
    output = torch.randint(15, 40, (rows, 30))
    seen = torch.zeros(rows, vocab, dtype=torch.bool).scatter_(1, prompt, True)
    counts = torch.zeros(rows, vocab).scatter_add_(1, output, torch.ones(output.shape))
    off, rep = torch.zeros(rows, 1), torch.full((rows, 1), 1.3)
    ours = sampling.penalise(logits, counts, seen, rep, off, off)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat((prompt, output), 1), logits.clone())
    torch.testing.assert_close(ours, theirs)
    frequency, presence = torch.tensor([[0.5], [0.0], [-1.0], [2.0]]), torch.full((rows, 1), 0.25)
    ours = sampling.penalise(logits, counts, seen, off + 1, frequency, presence)
    for row in range(rows):
        for token in range(vocab):
            count = output[row].tolist().count(token)
            wanted = logits[row, token] - frequency[row] * count - presence[row] * (count > 0)
            assert float(ours[row, token]) == pytest.approx(float(wanted), abs=1e-5)


def test_limits_match_transformers():
    """The processors of transformers, in our order, then the same noise: the same tokens."""
    rows, vocab = 60, 900
    logits = torch.randn(rows, vocab) * 4
    temperatures = (0.3, 0.8, 1.0, 1.7)
    noise = sampling.gumbel(keys_for(rows), torch.arange(vocab, dtype=torch.int32))
    cases = [(0, 0.9, 0.0), (50, 0.95, 0.0), (0, 1.0, 0.02), (30, 0.6, 0.05), (300, 0.9, 0.001)]
    for temperature in temperatures:
        cooled = TemperatureLogitsWarper(temperature)(None, logits)
        rows_of_theirs = []
        for row in range(rows):
            k, p, m = cases[row % len(cases)]
            left = cooled[row : row + 1]
            left = MinPLogitsWarper(m)(None, left) if m else left
            left = TopKLogitsWarper(k)(None, left) if k else left
            left = TopPLogitsWarper(p)(None, left) if p < 1 else left
            rows_of_theirs.append((left[0] + noise[row]).argmax())
        one = Shard(vocab, 0, vocab)
        voting = sampling.sample_limited(
            logits / temperature, keys_for(rows), limits(rows, vocab, cases), one
        )
        assert torch.equal(lockstep([voting])[0][0], torch.stack(rows_of_theirs))


def test_ids_must_be_exact_in_float32():
    with pytest.raises(ValueError, match="vocabulary"):
        Shard((1 << 24) + 1, 0, 1)
