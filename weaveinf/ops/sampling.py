"""Sampling from a vocabulary that is cut into equal contiguous shards, one a rank.

Pure tensor math, for any device. Functions that need the ranks to agree are generators, as blocks
are: they yield a float32 tensor and are sent its sum over ranks (DESIGN section 1, "Vote").
Everything that decides how many votes follow is computed from voted numbers by correctly rounded
arithmetic alone (no exp, no log), so ranks on different processors never part ways.

Exactness. Tokens are ordered by float32 score, ties by the lower id. Masses are exp(score - peak)
cut to a whole number of units (`mass`), small enough that float64 sums of them are exact in any
order: the set that top-p keeps does not depend on how many ranks share the vocabulary. Noise is a
hash of (seed, output position, token id), so it does not depend on anything else at all.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from weaveinf.ops import native

T = TypeVar("T")
Voting = Generator[Tensor, Tensor, T]

CANDIDATES = 64  # tokens per shard that the first attempt at top-k, top-p and min-p exchanges
_BLOCK, _SMALL_BLOCK = 128, 64
_LIMB = 18  # bits: sums over up to 64 ranks stay exact in float32
_STEPS, _BUCKETS = 64.0, 2048  # equal steps of the score, down to 32 below the peak
_GOLDEN, _FIRST, _SECOND = (
    np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_30, _27, _31 = (np.uint64(bits) for bits in (30, 27, 31))
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary this rank owns: ids start .. start + width - 1 (those from
    `vocab_size` on are padding, whose logits are -inf)."""

    vocab_size: int
    start: int
    width: int

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= 1 << 24:
            raise ValueError(f"vocabulary of {self.vocab_size}: ids must be exact in float32 (up to 2^24)")

    @property
    def unit(self) -> float:
        """How many mass units the most likely token weighs: as many as keep sums below 2^53."""
        return 2.0 ** (52 - self.vocab_size.bit_length())

    def gather(self, own: Tensor) -> Voting[Tensor]:
        """float32 [...] of every rank -> [ranks, ...]. A rank that owns only padding has no say."""
        ranks = -(-self.vocab_size // self.width)
        if ranks == 1:
            return own[None]
        parts = own.new_zeros((ranks, *own.shape))
        if self.start < self.vocab_size:
            parts[self.start // self.width] = own
        return (yield parts)


def mixed(key: np.ndarray, count: np.uint64 | np.ndarray) -> np.ndarray:
    """The `count`-th number of SplitMix64 that starts at `key` (an array, which wraps round); both uint64."""
    key = key + _GOLDEN * count
    key = (key ^ (key >> _30)) * _FIRST
    key = (key ^ (key >> _27)) * _SECOND
    return np.asarray(key ^ (key >> _31))


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> Tensor:
    """uint64 [rows] seeds, mixed once, and int [rows] output positions -> int32 [rows, 2]."""
    key = mixed(seeds, positions.astype(np.uint64) + np.uint64(1))
    return torch.from_numpy(key.view(np.int32).reshape(-1, 2))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise float32 [rows, n] of the tokens `ids` (int32 [n] or [rows, n]) under int32
    `keys` [rows, 2].

    A 32-bit mixer (the shifts and factors of Wellons' lowbias32) takes the second key between its
    two multiplications. Its low 31 bits make v in (0, 1), and -log(-log1p(-v)): v is finest near
    0, where the large values, the ones that win, come from.
    """
    state = ids * -0x61C88647 + keys[:, :1]  # the golden ratio in 32 bits
    shifted = torch.empty_like(state)

    def fold(bits: int) -> None:
        torch.bitwise_right_shift(state, bits, out=shifted)  # copies the sign: masked off
        state.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))

    fold(16)
    state.mul_(0x7FEB352D).bitwise_xor_(keys[:, 1:])
    fold(15)
    state.mul_(0x846CA68B - (1 << 32))
    fold(16)
    minus_v = state.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-(2.0**-31))
    return minus_v.clamp_(min=2.0**-24 - 1).log1p_().neg_().log_().neg_()


def penalise(
    logits: Tensor, counts: Tensor, prompt: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Logits [rows, width] after the penalties (float32 [rows, 1]) for tokens that were seen.

    counts: float32 [rows, width], how often among the output tokens; prompt: bool [rows, width].
    Repetition (Keskar et al. 2019, "CTRL") divides positive and multiplies negative logits of any
    token seen, in prompt or output; frequency and presence (OpenAI's) subtract for output tokens
    alone.
    """
    outputs = counts > 0
    factor = torch.where(logits > 0, 1 / repetition, repetition)
    repeated = torch.where(outputs | prompt, logits * factor, logits)
    return repeated - frequency * counts - presence * outputs


def draw_reference(
    scores: Tensor, start: int, temperature: Tensor | None = None, keys: Tensor | None = None
) -> Tensor:
    """See `draw`. Maxima of blocks first, then one block: reductions without an index are ten times
    as fast."""
    n = scores.shape[1]
    if temperature is not None and keys is not None:
        ids = torch.arange(start, start + n, dtype=torch.int32, device=scores.device)
        warm = temperature[:, None] > 0
        scores = torch.where(warm, scores / temperature[:, None] + gumbel(keys, ids), scores)
    whole = n - n % _BLOCK
    peaks = scores[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).amax(-1)
    if whole < n:
        peaks = torch.cat((peaks, scores[:, whole:].amax(-1, keepdim=True)), 1)
    first = peaks.argmax(1, keepdim=True) * _BLOCK
    columns = (first + torch.arange(_BLOCK, device=scores.device)).clamp_(max=n - 1)
    value, at = scores.gather(1, columns).max(1)
    return _offer(value, columns.gather(1, at[:, None]).squeeze(1) + start)


def draw(scores: Tensor, start: int, temperature: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """What each row offers of its shard, whose ids begin at `start`: float32 [2, rows], the largest
    value and the lowest id that has it; NaN and -1 where a score is NaN, id -1 where it is infinite.

    scores: float32 [rows, n]. temperature: float32 [rows], above 0 to divide the row's scores and
    add the Gumbel noise of its keys (int32 [rows, 2]), 0 or None to take the scores as they are.
    """
    if native.lib is None or scores.is_cuda:
        return draw_reference(scores, start, temperature, keys)
    rows, n = scores.shape
    out = torch.empty(2, rows)
    native.lib.weave_draw(
        *(scores.data_ptr(), scores.stride(0), rows, n, start),
        *(*native.pointers(temperature, keys, out), torch.get_num_threads()),
    )
    return out


def _offer(values: Tensor, ids: Tensor) -> Tensor:
    return torch.stack((values, ids.float().masked_fill_(~values.isfinite(), -1)))


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k <= n first of each row of [rows, n] by (score descending, column ascending): scores,
    columns."""
    n = scores.shape[1]
    columns, clear = _top_unless_tied(scores, k)
    if not clear:
        key = _ordered(scores).long() * (1 << 32) + torch.arange(n - 1, -1, -1, device=scores.device)
        columns = key.topk(k, dim=1).indices
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _top_unless_tied(scores: Tensor, k: int) -> tuple[Tensor, bool]:
    """Columns of the k largest of each row, and whether these are clear: topk takes any of equals.

    The k + 1 largest lie in the k + 1 blocks of the largest maxima; to find these costs half.
    """
    rows, n = scores.shape
    k_more = min(k + 1, n)
    columns = None
    blocks = n // _SMALL_BLOCK
    if n % _SMALL_BLOCK == 0 and blocks > 2 * k_more:
        peaks = scores.unflatten(1, (blocks, _SMALL_BLOCK)).amax(-1)
        block = peaks.topk(k_more, dim=1, sorted=False).indices
        line = (block + torch.arange(rows, device=scores.device)[:, None] * blocks).flatten()
        scores = scores.reshape(-1, _SMALL_BLOCK).index_select(0, line).view(rows, -1)
        inside = torch.arange(_SMALL_BLOCK, device=scores.device)
        columns = (block[..., None] * _SMALL_BLOCK + inside).flatten(1)
    values, found = scores.topk(k_more, dim=1)
    if columns is not None:
        found = columns.gather(1, found)
    return found[:, :k], k == n or not bool((values[:, k - 1] == values[:, k]).any())


def _ordered(scores: Tensor) -> Tensor:
    """float32 -> int32 in the same order, equal exactly where the floats are (-0.0 becomes 0.0)."""
    return _flip((scores + 0.0).view(torch.int32))


def _flip(bits: Tensor) -> Tensor:
    """A float32's bits to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def mass(below_peak: Tensor, unit: float) -> Tensor:
    """exp(below_peak) (float32 <= 0) in whole units, as float32: a float64 sum over a vocabulary
    is exact."""
    return below_peak.exp().mul_(unit).floor_()


def _to_limbs(whole: Tensor) -> Tensor:
    """Whole numbers below 2^54 (float64 [...]) -> float32 [3, ...] whose sum over ranks is
    exact."""
    high = (whole * 2.0 ** (-2 * _LIMB)).floor()
    rest = whole - high * 2.0 ** (2 * _LIMB)
    middle = (rest * 2.0**-_LIMB).floor()
    return torch.stack((high, middle, rest - middle * 2.0**_LIMB)).float()


def _from_limbs(limbs: Tensor) -> Tensor:
    high, middle, low = limbs.double()
    return (high * 2.0**_LIMB + middle) * 2.0**_LIMB + low


def winner(offer: Tensor, shard: Shard) -> Voting[Tensor]:
    """What the ranks offer (see `draw`) -> the best of all, int64 [rows]; -1 for a row whose best is
    not finite (NaN or infinite logits, or every token banned)."""
    if shard.width >= shard.vocab_size:
        return offer[1].long()
    offers = yield from shard.gather(offer)
    rank = offers[:, 0].argmax(0, keepdim=True)
    return offers[:, 1].gather(0, rank)[0].long()


@dataclass(frozen=True)
class Limits:
    """What may be sampled, per row: the first `top_k` (int64; at least the vocabulary's size: off)
    tokens, not below the peak by more than `floor` (float32 <= 0: log(min_p); -inf: off), then of
    these the smallest set of the most likely that holds `top_p` (float64; 1: off) of their
    mass."""

    top_k: Tensor
    top_p: Tensor
    floor: Tensor

    def rows(self, rows: Tensor) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.floor[rows])


def sample_limited(scores: Tensor, keys: Tensor, limits: Limits, shard: Shard) -> Voting[Tensor]:
    """One token per row of float32 [rows, width] (divided by the temperature) under `limits`:
    int64 [rows].

    The ranks exchange their first CANDIDATES tokens. Merged, these are the true order down to
    where the first shard has no more to offer. A row whose limits bite within that is done (one
    vote, two with top-p); the others take the long way, which is as exact.
    """
    k = min(CANDIDATES, shard.width)
    value, column = top(scores, k)
    ids = (column + shard.start).to(torch.int32)
    offer = torch.stack((value, ids.float(), value + gumbel(keys, ids)))
    merged = (yield from shard.gather(offer)).permute(1, 2, 0, 3).flatten(2)  # [3, rows, ranks * k]
    value_all, order = merged[0].sort(dim=1, descending=True, stable=True)
    peak = value_all[:, :1]
    place = torch.arange(order.shape[1], device=scores.device)
    known = (order % k == k - 1).int().argmax(1) + 1 if k < shard.width else scores.new_full((), torch.inf)
    allowed = (place < known[..., None]) & (place < limits.top_k[:, None])
    allowed &= value_all - peak >= limits.floor.clamp(min=_LOWEST)[:, None]
    count = allowed.sum(1)
    done = (count < known) | (count == limits.top_k)
    if bool((limits.top_p < 1).any()):
        weight = mass(value - peak, shard.unit)
        share = yield from _within_top_p(scores, weight, peak, order, allowed, done, limits, shard)
        allowed &= share[0]
        done = done | share[1]
    noisy = merged[2].gather(1, order).masked_fill_(~allowed, -torch.inf)
    ids_all = merged[1].gather(1, order)
    tied = noisy == noisy.amax(1, keepdim=True)
    token = ids_all.masked_fill_(~tied, 1 << 24).amin(1).long()
    if not bool(done.all()):
        left = (~done).nonzero().squeeze(1)
        token[left] = yield from _sample_far(scores[left], peak[left], keys[left], limits.rows(left), shard)
    return token.masked_fill_(~peak.squeeze(1).isfinite(), -1)


def _within_top_p(
    scores: Tensor,
    weight: Tensor,
    peak: Tensor,
    order: Tensor,
    allowed: Tensor,
    closed: Tensor,
    limits: Limits,
    shard: Shard,
) -> Voting[tuple[Tensor, Tensor]]:
    """Which of the merged candidates top-p keeps [rows, ranks * k], and whether its boundary lies
    among them [rows]. Where the other limits did not bite, all ranks add up all their mass."""
    rows = scores.shape[0]
    total = torch.zeros(rows, dtype=torch.float64, device=scores.device)
    far = ((limits.top_p < 1) & ~closed).nonzero().squeeze(1)
    if far.numel():
        below = (scores if far.numel() == rows else scores[far]) - peak[far]
        spread = mass(below, shard.unit)
        if bool((limits.floor[far] > -torch.inf).any()):
            spread *= below >= limits.floor[far, None]
        total[far] = spread.sum(1, dtype=torch.float64)
        own = torch.cat((weight, _to_limbs(total).T), 1)
        parts = yield from shard.gather(own)
        total = _from_limbs(parts[..., -3:].double().sum(0).T)
        parts = parts[..., :-3]
    else:
        parts = yield from shard.gather(weight)
    heavy = parts.permute(1, 0, 2).flatten(1).gather(1, order).double() * allowed
    after = heavy.cumsum(1)
    target = limits.top_p * torch.where(closed, after[:, -1], total)
    inside = (after - heavy < target[:, None]) | (limits.top_p >= 1)[:, None]
    whole = closed | (limits.top_k >= shard.vocab_size)  # else `total` is not that of the first top_k
    return inside, (limits.top_p < 1) & (after[:, -1] >= target) & whole


def _sample_far(scores: Tensor, peak: Tensor, keys: Tensor, limits: Limits, shard: Shard) -> Voting[Tensor]:
    """`sample_limited` for rows whose boundary lies deep in the vocabulary: search, then noise.

    Sets are float32 masks of 0 and 1: on CPU arithmetic is several times as fast as `where`.
    """
    below = scores - peak
    allowed = _reaching(below, limits.floor)
    if bool((limits.top_k < shard.vocab_size).any()):
        inside = yield from first_of_mass(scores, below, allowed, limits.top_k.double(), shard)
        allowed *= inside
    if bool((limits.top_p < 1).any()):
        weight = mass(below, shard.unit).mul_(allowed)
        inside = yield from first_of_mass(scores, below, weight, limits.top_p, shard, True)
        allowed *= inside.maximum((limits.top_p >= 1)[:, None].float())
    ids = torch.arange(shard.width, dtype=torch.int32, device=scores.device) + shard.start
    noisy = gumbel(keys, ids).add_(scores).add_(allowed.sub_(1), alpha=-_LOWEST)
    return (yield from winner(draw(noisy, shard.start), shard))


def _reaching(scores: Tensor, edge: Tensor) -> Tensor:
    """1.0 where a score [rows, n] is finite and not below the row's edge [rows], else 0.0."""
    short = (edge.clamp(min=_LOWEST)[:, None] - scores).clamp_(min=0)
    return short.sign_().neg_().add_(1)


def first_of_mass(
    scores: Tensor, below: Tensor, weight: Tensor, target: Tensor, shard: Shard, relative: bool = False
) -> Voting[Tensor]:
    """The fewest tokens, highest scores first, whose weights reach `target`: 1.0 or 0.0, float32.

    scores, below (score - peak), weight: float32 [rows, width]; the weights whole numbers, equal
    for equal scores. target: float64 [rows] above 0, of the total when `relative`, else at most
    the total. One vote finds the boundary's bucket in equal steps of `below`, four more the byte
    after byte of its exact score (of the few tokens in that bucket), a last one counts its ties.
    """
    rows, width = scores.shape
    lines = torch.arange(rows, device=scores.device)
    bucket = (below * -_STEPS).clamp_(max=_BUCKETS - 1).floor_()
    index = (bucket + (lines * _BUCKETS)[:, None]).long().flatten()
    sums = _sums(index, weight.flatten(), rows, _BUCKETS)
    hit, target, tied = _reach((yield _to_limbs(sums)), target, relative)
    at = (bucket == hit[:, None]).flatten().nonzero().squeeze(1)
    row, heavy = at // width, weight.flatten()[at]
    code = 0x7FFFFFFF - _ordered(scores.flatten()[at]).long()  # 32 bits, the best is the smallest
    edge = torch.zeros_like(lines)
    for shift in (24, 16, 8, 0):
        digit = (code >> shift) & 0xFF
        sums = _sums((row << 8) + digit, heavy, rows, 256)
        hit, target, tied = _reach((yield _to_limbs(sums)), target)
        edge = (edge << 8) + hit
        inside = (digit == hit[row]).nonzero().squeeze(1)
        at, row, heavy, code = at[inside], row[inside], heavy[inside], code[inside]
    own = torch.bincount(row, minlength=rows)
    ties = yield from shard.gather(own.float())
    wanted = (target / (tied / ties.sum(0))).ceil()  # the inner ratio is whole, so exact
    wanted -= ties[: shard.start // shard.width].sum(0)
    chosen = _reaching(scores, _flip((0x7FFFFFFF - edge).to(torch.int32)).view(torch.float32))
    surplus = torch.arange(row.numel(), device=row.device) - (own.cumsum(0) - own)[row]
    chosen.view(-1)[at[surplus >= wanted[row]]] = 0
    return chosen


def _sums(index: Tensor, weight: Tensor, rows: int, buckets: int) -> Tensor:
    """float32 weights at int64 row * buckets + bucket -> exact sums, float64 [rows, buckets]."""
    sums = torch.zeros(rows * buckets, dtype=torch.float64, device=weight.device)
    return sums.scatter_add_(0, index, weight.double()).view(rows, buckets)


def _reach(limbs: Tensor, target: Tensor, relative: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over ranks [3, rows, buckets] -> per row the first bucket up to which they reach the
    target, what is left to reach inside of it, and all that it holds."""
    sums = _from_limbs(limbs)
    upto = sums.cumsum(1)
    target = target * upto[:, -1] if relative else torch.minimum(target, upto[:, -1])
    hit = torch.searchsorted(upto, target[:, None]).clamp_(max=sums.shape[1] - 1)
    held = sums.gather(1, hit)
    return hit.squeeze(1), (target[:, None] - upto.gather(1, hit) + held).squeeze(1), held.squeeze(1)
