"""Choosing cached tokens for CUDA, in Triton: the functions of `weaveinf.ops.select` and `scores` of
`weaveinf.ops.index`.

Launches depend on shapes alone, and the host reads nothing back. Where rows are few, several programs share
one: each takes a part of what the row really has. All sums are in a fixed order, so results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaveinf.ops.select import Where
from weaveinf.ops.triton_attention import LOG2E, splits

_TILE = tl.constexpr(1024)
_PASSES = tl.constexpr(4)

Given = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _share(first, end, TILE: tl.constexpr):
    """This program's tiles of what a row has."""
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), TILE), tl.num_programs(1)) * TILE
    start = first + tl.program_id(1) * share
    return start, tl.minimum(end, start + share)


@triton.jit
def _score(
    q, keys, where, given, out, lse, scale, strides, sizes, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    """Products of a row's queries of one KV head with a share of its keys. Grid: (rows * KV heads, splits).

    With `lse` [rows, heads, splits] they are out [rows, heads, width], and lse the log2 of their sums of
    exp2; else out [rows, KV heads, width] has their sums over heads: as they are, or with `weights` [rows,
    heads] what is positive of them. strides: q's and the table's. A query of fewer elements than a key's dim
    comes as what is positive of it, and then what is negative.
    """
    table, firsts, ends = where
    channels, weights, scales = given
    width, dim, elements, kv_heads, group, page_size = sizes
    one = tl.program_id(0).to(tl.int64)
    row = one // kv_heads
    kv_head = one % kv_heads
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    head = kv_head * group + m
    channel = d % elements
    if channels is not None:
        channel = tl.load(channels + kv_head * dim + d, mask=d < dim, other=-1)
    q_ok = (m < group)[:, None] & ((d < dim) & (channel >= 0))[None, :]
    q_md = tl.load(q + row * strides[0] + head[:, None] * strides[1] + channel[None, :], mask=q_ok, other=0.0)
    q_md = tl.where((elements < dim) & ((d < elements)[None, :] != (q_md > 0)), 0.0, q_md)
    if weights is not None:
        weight = tl.load(weights + one * group + m, mask=m < group, other=0.0)
    start, stop = _share(tl.load(firsts + row), tl.load(ends + row), N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in range(start, stop, N):
        at = tile + tl.arange(0, N)
        ok = at < stop
        page = tl.load(table + row * strides[2] + at // page_size, mask=ok, other=0).to(tl.int64)
        slot = page * page_size + at % page_size
        at_nd = (slot * kv_heads + kv_head)[:, None] * dim + d[None, :]
        k_nd = tl.load(keys + at_nd, mask=ok[:, None] & (d < dim)[None, :], other=0.0)
        s_mn = tl.dot(q_md, tl.trans(k_nd.to(q_md.dtype)), input_precision="ieee") * scale
        if weights is not None:
            s_mn = tl.where(s_mn < 0, 0.0, s_mn) * weight[:, None]  # NaN stays
        else:
            s_mn = tl.where(ok[None, :] & (s_mn == s_mn), s_mn, float("-inf"))
        if lse is not None:
            at_mn = (one * group + m)[:, None] * width + at[None, :]
            tl.store(out + at_mn, s_mn, mask=(m < group)[:, None] & ok[None, :])
            higher = tl.maximum(top, tl.max(s_mn, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # so that no inf - inf arises
            total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s_mn - safe[:, None]), 1)
            top = higher
        else:
            sums = tl.sum(tl.where((m < group)[:, None], s_mn, 0.0), 0)
            if scales is not None:
                sums *= tl.load(scales + slot, mask=ok, other=0.0)
            tl.store(out + one * width + at, sums, mask=ok)
    if lse is not None:
        to = lse + (one * group + m) * tl.num_programs(1) + tl.program_id(1)
        tl.store(to, top + tl.log2(total), mask=m < group)


@triton.jit
def _vote(scores, lse, where, out, sizes, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """out[row, kv head] = sum over its queries of exp2(scores) / sum over S splits of exp2(lse).

    Grid: (rows * KV heads, tiles of keys)."""
    _, firsts, ends = where
    width, kv_heads, group = sizes
    one = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M)
    at = tl.program_id(1) * N + tl.arange(0, N)
    ok = (at >= tl.load(firsts + one // kv_heads)) & (at < tl.load(ends + one // kv_heads))
    head = (one * group + m)[:, None]
    lse_ms = tl.load(lse + head * S + tl.arange(0, S)[None, :], mask=m[:, None] < group, other=float("-inf"))
    top = tl.max(lse_ms, 1)[:, None]
    top = tl.where(top == float("-inf"), 0.0, top)  # of a query without a score
    total = tl.sum(tl.exp2(lse_ms - top), 1)[:, None]
    s_ok = (m < group)[:, None] & ok[None, :]
    s_mn = tl.load(scores + head * width + at[None, :], mask=s_ok, other=float("-inf"))
    votes = tl.sum(tl.exp2(s_mn - top) / tl.where(total == 0.0, 1.0, total), 0)
    tl.store(out + one * width + at, votes, mask=ok)


@triton.jit
def _threshold(counts, wanted, part, PASSES: tl.constexpr, PARTS: tl.constexpr):
    """What PASSES passes found of a row, whose counts [PASSES, PARTS, 256] are: the first digits of the
    `wanted`-th largest key; how many of those that begin so are among the `wanted`; and how many in the parts
    before this one are larger, and how many begin so."""
    digit = 255 - tl.arange(0, 256)
    parts = tl.arange(0, PARTS)
    prefix = 0
    larger = 0
    equal = 0
    for i in tl.static_range(PASSES):
        each = tl.load(counts + (i * PARTS + parts)[:, None] * 256 + digit[None, :])
        total = tl.sum(each, 0)
        found = 255 - tl.sum((tl.cumsum(total, 0) < wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(digit > found, total, 0), 0)
        before = tl.sum(tl.where((parts < part)[:, None], each, 0), 0)
        larger += tl.sum(tl.where(digit > found, before, 0), 0)
        equal = tl.sum(tl.where(digit == found, before, 0), 0)
        prefix = prefix * 256 + found.to(tl.uint32)
    return prefix, wanted, larger, equal


@triton.jit
def _top_k(scores, ends, wanted, counts, out, width, capacity, PASS: tl.constexpr, PARTS: tl.constexpr):
    """Pass number PASS of a radix select: how many of a part's keys that begin like the one that is looked
    for have which next digit, into counts [rows, _PASSES, PARTS, 256]; after the last one, the part's share
    of the chosen positions. Grid: (rows, PARTS)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start, stop = _share(0, tl.load(ends + row), _TILE)
    counts += row * (_PASSES * PARTS * 256)
    prefix, left, larger, equal = _threshold(counts, tl.load(wanted + row), part, PASS, PARTS)
    bins = tl.zeros([256], tl.int32)
    place = larger + tl.minimum(equal, left)
    for tile in range(start, stop, _TILE):
        at = tile + tl.arange(0, _TILE)
        x = tl.load(scores + row * width + at, mask=at < stop, other=0.0)
        x = tl.where(x == x, x, float("-inf"))
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # no -0.0
        key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)  # of the same order
        alike = at < stop
        if PASS > 0:
            alike = alike & (key >> (32 - 8 * PASS) == prefix)
        if PASS < _PASSES:
            bins += tl.histogram(((key >> (24 - 8 * PASS)) & 255).to(tl.int32), 256, mask=alike)
        else:
            first = alike & (equal + tl.cumsum(alike.to(tl.int32), 0) <= left)
            chosen = (first | ((at < stop) & (key > prefix))).to(tl.int32)
            tl.store(out + row * capacity + place + tl.cumsum(chosen, 0) - 1, at, mask=chosen == 1)
            place += tl.sum(chosen, 0)
            equal += tl.sum(alike.to(tl.int32), 0)
    if PASS < _PASSES:
        tl.store(counts + (PASS * PARTS + part) * 256 + tl.arange(0, 256), bins)


@triton.jit
def _places(index, table, out, count, table_stride, kv_heads, run, page_size, N: tl.constexpr):
    """Grid: (rows * KV heads, tiles of count * run)."""
    one = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * N + tl.arange(0, N)
    inside = i < count * run
    token = tl.maximum(tl.load(index + one * count + i // run, mask=inside, other=0), 0) * run + i % run
    page = tl.load(table + one // kv_heads * table_stride + token // page_size, mask=inside, other=0)
    place = (page * page_size + token % page_size) * kv_heads + (one % kv_heads).to(tl.int32)
    tl.store(out + one * (count * run) + i, place, mask=inside)


@triton.jit
def _bounds(keys, bounds, pages, counts, page_size, dim, N: tl.constexpr, D: tl.constexpr):
    """Grid: (pages, KV heads)."""
    page = tl.load(pages + tl.program_id(0))
    kv_heads = tl.num_programs(1)
    token = tl.arange(0, N)
    d = tl.arange(0, D)
    there = (token < tl.load(counts + tl.program_id(0)))[:, None] & (d < dim)[None, :]
    at = ((page * page_size + token) * kv_heads + tl.program_id(1))[:, None] * dim + d[None, :]
    k_nd = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
    high = tl.max(tl.where(there, k_nd, float("-inf")), 0)
    low = tl.min(tl.where(there, k_nd, float("inf")), 0)
    to = bounds + (page * kv_heads + tl.program_id(1)) * (2 * dim) + d
    tl.store(to, high.to(bounds.dtype.element_ty), mask=d < dim)
    tl.store(to + dim, low.to(bounds.dtype.element_ty), mask=d < dim)


@triton.jit
def _channels(keys, pool, channels, slots, strides, each, width, N: tl.constexpr):
    """Grid: (rows,). `each` channels of every KV head, in all `width`, go to the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    i = tl.arange(0, N)
    channel = tl.load(channels + i, mask=i < width, other=-1)
    value = tl.load(keys + row * strides[0] + i // each * strides[1] + channel, mask=channel >= 0, other=0.0)
    tl.store(pool + slot * width + i, value, mask=(i < width) & (slot >= 0))


def _launch(
    q: Tensor, keys: Tensor, where: Where, given: Given, out: Tensor, lse: Tensor | None, scale: float
) -> None:
    """`_score` of q [rows, heads, D] and keys [num_pages, page_size, Hkv, K]."""
    (rows, heads, elements), (page_size, kv_heads, dim) = q.shape, keys.shape[1:]
    group, width = heads // kv_heads, out.shape[2]
    parts = _parts(rows * kv_heads, width) if lse is None else lse.shape[2]
    strides = q.stride(0), q.stride(1), where[0].stride(0)
    sizes = width, dim, elements if given[0] is None else dim, kv_heads, group, page_size
    m, d = (max(16, triton.next_power_of_2(n)) for n in (group, dim))
    n = 32 if q.dtype == torch.float32 else 64
    _score[(rows * kv_heads, parts)](q, keys, where, given, out, lse, scale, strides, sizes, m, n, d)


def _parts(programs: int, width: int) -> int:
    """How many programs share a row's keys, which may be so many."""
    return splits(programs, width // 256, 256)


def votes(
    q: Tensor, keys: Tensor, where: Where, width: int, scale: float, channels: Tensor | None, soft: bool
) -> Tensor:
    """See `weaveinf.ops.select.votes`."""
    (rows, heads, _), kv_heads = q.shape, keys.shape[2]
    out = torch.full((rows, kv_heads, width), torch.inf, device=q.device)
    given = channels, None, None
    if not soft:
        _launch(q, keys, where, given, out, None, scale)
        return out
    parts = _parts(rows * kv_heads, width)
    scores, lse = (torch.empty(rows, heads, n, device=q.device) for n in (width, parts))
    _launch(q, keys, where, given, scores, lse, scale * LOG2E)
    group, grid = heads // kv_heads, (rows * kv_heads, triton.cdiv(width, 256))
    m = triton.next_power_of_2(group)
    _vote[grid](scores, lse, where, out, (width, kv_heads, group), m, 256, parts)
    return out


def index_scores(
    q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor | None, table: Tensor, ends: Tensor, width: int
) -> Tensor:
    """See `weaveinf.ops.index.scores`."""
    out = torch.empty(len(q), 1, width, device=q.device)
    where, given = (table, torch.zeros_like(ends), ends), (None, weights.contiguous(), scales)
    # Half precision holds what eight bits do.
    _launch(q if scales is None else q.half(), keys.unsqueeze(2), where, given, out, None, 1.0)
    return out.squeeze(1)


def top_k(scores: Tensor, ends: Tensor, wanted: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See `weaveinf.ops.select.top_k`. Passes find the key that is last chosen, digit by digit, one more
    writes; what programs of a row must know of each other are counts of digits."""
    (rows, width), passes = scores.shape, _PASSES.value
    parts = splits(rows, width // _TILE.value)
    out = torch.full((rows, capacity), -1, dtype=torch.int32, device=scores.device)
    found = torch.minimum(ends, wanted).clamp(max=capacity)
    counts = torch.empty(rows, passes, parts, 256, dtype=torch.int32, device=scores.device)
    for i in range(passes + 1):
        _top_k[(rows, parts)](scores, ends, found, counts, out, width, capacity, i, parts, num_warps=8)
    return out, found


def places(index: Tensor, table: Tensor, page_size: int, run: int) -> Tensor:
    """See `weaveinf.ops.select.places`."""
    rows, kv_heads, count = index.shape
    out = torch.empty(rows, kv_heads, count * run, dtype=torch.int32, device=index.device)
    grid = rows * kv_heads, triton.cdiv(count * run, 512)
    _places[grid](index, table, out, count, table.stride(0), kv_heads, run, page_size, 512)
    return out


def write_bounds(keys: Tensor, bounds: Tensor, pages: Tensor, counts: Tensor) -> None:
    """See `weaveinf.ops.select.write_bounds`."""
    page_size, kv_heads, dim = keys.shape[1:]
    blocks = triton.next_power_of_2(page_size), triton.next_power_of_2(dim)
    _bounds[(len(pages), kv_heads)](keys, bounds, pages, counts, page_size, dim, *blocks)


def write_channels(keys: Tensor, pool: Tensor, channels: Tensor, slots: Tensor) -> None:
    """See `weaveinf.ops.select.write_channels`."""
    strides, width = keys.stride()[:2], channels.numel()
    given = keys, pool, channels, slots, strides, channels.shape[1], width, triton.next_power_of_2(width)
    _channels[(len(keys),)](*given)
