"""Choosing cached tokens for sparse attention: how much the queries of each KV head want each key, the best
of them, and attention over nothing else.

A choice of tokens is a page table of pages of one token, and a choice for each KV head one of virtual
sequences with one KV head, so that whatever attends over pages attends over it.
"""

import torch
from torch import Tensor

from weaveinf.ops import native
from weaveinf.ops.attention import Paged, paged_attention

_MOST_CHANNELS = 1024  # of select.cpp
_FLOATS = 1 << 24

Where = tuple[Tensor, Tensor, Tensor]
"""Of each row its pages, int32 [rows, max_blocks], and where its candidates begin and end, int32 [rows]."""


def slices(rows: int, floats: int) -> list[slice]:
    """Rows of `floats` floats each, cut so that a part has _FLOATS at most; the same on every rank."""
    step = max(1, _FLOATS // max(1, floats))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `top_k` found of parts of the rows, at least one."""
    index, counts = zip(*parts, strict=True)
    return torch.cat(index), torch.cat(counts)


def votes_reference(
    q: Tensor, keys: Tensor, where: Where, width: int, scale: float, channels: Tensor | None, soft: bool
) -> Tensor:
    """See `votes`."""
    (rows, heads, _), (table, firsts, ends) = q.shape, where
    page_size, kv_heads, dim = keys.shape[1:]
    if channels is not None:
        q = _picked(q, channels.repeat_interleave(heads // kv_heads, 0))
    elif q.shape[2] != dim:
        q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    out = torch.full((rows, kv_heads, width), torch.inf, device=q.device)
    for r, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        if first < end:
            pages = table[r, : -(-end // page_size)].long()
            k = keys[pages].flatten(0, 1)[first:end].float()
            grouped = q[r].float().view(kv_heads, heads // kv_heads, -1)
            scores = torch.einsum("ghd,kgd->ghk", grouped, k) * scale
            scores = scores.masked_fill(scores.isnan(), -torch.inf)
            out[r, :, first:end] = (scores.softmax(-1).nan_to_num(0.0) if soft else scores).sum(1)
    return out


def _picked(x: Tensor, channels: Tensor) -> Tensor:
    """Channels [heads, n] of x [rows, heads, D]; zeros for -1."""
    at = channels.long().expand(len(x), -1, -1)
    return x.gather(2, at.clamp(min=0)).masked_fill(at < 0, 0)


def votes(
    q: Tensor, keys: Tensor, where: Where, width: int, scale: float, channels: Tensor | None, soft: bool
) -> Tensor:
    """The soft vote of TokenSelect (arXiv 2411.02886, section 4.1), by KV head: for row r of q [rows, Hq, D],
    the sum over the query heads h of a KV head of softmax(scale * q[h] . keys) -> float32 [rows, Hkv, width].

    Candidates are positions before `width`; all others get an infinite vote. keys: [num_pages, page_size,
    Hkv, K]. Query head h is of KV head h // (Hq // Hkv). A score that is NaN counts as -inf.

    K is D; or channels (int32 [Hkv, K]) says which of a query's elements meet the keys' (-1: none); or it is
    2 D, and a query meets them as max(q, 0) and then min(q, 0), as bounds want it. soft: else the sum is of
    the products.
    """
    dim = keys.shape[3]
    if q.is_cuda:
        from weaveinf.ops import triton_select

        return triton_select.votes(q, keys, where, width, scale, channels, soft)
    if native.lib is None or q.dtype not in native.DTYPES or dim % 16 or dim > _MOST_CHANNELS:
        return votes_reference(q, keys, where, width, scale, channels, soft)
    out, threads = torch.empty(q.shape[0], keys.shape[2], width), torch.get_num_threads()
    native.lib.weave_votes(
        *native.pointers(q, keys, out, *where, channels),
        *(q.stride(0), q.stride(1), where[0].stride(0)),
        *(q.shape[0], q.shape[1], keys.shape[2], dim, keys.shape[1], width),
        *(channels is None and q.shape[2] != dim, soft, native.DTYPES[q.dtype], threads, scale),
    )
    return out


def top_k_reference(scores: Tensor, ends: Tensor, wanted: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See `top_k`."""
    at = torch.arange(scores.shape[1], device=scores.device)
    real = scores.masked_fill(scores.isnan(), -torch.inf).double()
    # What does not count comes behind everything, even behind -inf.
    order = torch.where(at < ends[:, None], 0, 1)
    best = torch.argsort(real, dim=1, descending=True, stable=True)
    best = best.gather(1, torch.argsort(order.gather(1, best), dim=1, stable=True))[:, :capacity]
    counts = torch.minimum(ends, wanted).clamp(max=capacity).int()
    kept = torch.arange(best.shape[1], device=scores.device) < counts[:, None]
    ascending = best.masked_fill(~kept, scores.shape[1]).sort(1).values
    ascending = torch.nn.functional.pad(ascending, (0, capacity - best.shape[1]), value=scores.shape[1])
    return ascending.masked_fill(ascending == scores.shape[1], -1).int(), counts


def top_k(scores: Tensor, ends: Tensor, wanted: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the best scores of each row, ascending: int32 [rows, capacity], -1 behind them, and how
    many there are, int32 [rows].

    scores: float32 [rows, width], of which the first ends[r] count (int32 [rows], at most width); wanted[r]
    of them are chosen (int32 [rows], at most capacity), all if there are no more. Equal scores: the lowest
    position. NaN counts as -inf.
    """
    if scores.is_cuda:
        from weaveinf.ops import triton_select

        return triton_select.top_k(scores, ends, wanted, capacity)
    if native.lib is None:
        return top_k_reference(scores, ends, wanted, capacity)
    out = torch.empty(scores.shape[0], capacity, dtype=torch.int32)
    counts = torch.empty(scores.shape[0], dtype=torch.int32)
    native.lib.weave_top_k(
        *native.pointers(scores, ends, wanted, out, counts), *scores.shape, capacity, torch.get_num_threads()
    )
    return out, counts


def places_reference(index: Tensor, table: Tensor, page_size: int, run: int = 1) -> Tensor:
    """See `places`."""
    rows, kv_heads, _ = index.shape
    tokens = index.clamp(min=0).unsqueeze(-1) * run + torch.arange(run, device=index.device)
    tokens = tokens.flatten(1)
    slots = table.gather(1, tokens // page_size).long() * page_size + tokens % page_size
    heads = torch.arange(kv_heads, device=index.device)[:, None]
    return (slots.view(rows, kv_heads, -1) * kv_heads + heads).int()


def places(index: Tensor, table: Tensor, page_size: int, run: int = 1) -> Tensor:
    """Where what each KV head chose lies in the cache: index int32 [rows, Hkv, n] of runs of `run` tokens,
    none across pages, and table int32 [rows, max_blocks] -> int32 [rows, Hkv, n * run], each a slot times Hkv
    plus the head. Hkv is 1 where all heads share a choice. Some place of the row's where the index is -1."""
    if index.is_cuda:
        from weaveinf.ops import triton_select

        return triton_select.places(index, table, page_size, run)
    if native.lib is None:
        return places_reference(index, table, page_size, run)
    rows, kv_heads, count = index.shape
    out = torch.empty(rows, kv_heads, count * run, dtype=torch.int32)
    native.lib.weave_places(
        *native.pointers(index, table, out),
        *(table.stride(0), rows, kv_heads, count, run, page_size, torch.get_num_threads()),
    )
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, slots: Paged, scale: float, out: Tensor) -> Tensor:
    """Attention of q [rows, Hq, D] over tokens at slots (int32 [S, n], in the place of pages) of pools as
    `paged_attention` takes them, -> out [rows, Hq, D]. A row reads its sequence's slots up to number
    positions[row]."""
    one = (-1, 1, *keys.shape[2:])
    return paged_attention(q, (keys.view(one), values.view(one)), slots, scale, out=out)


def write_bounds(keys: Tensor, bounds: Tensor, pages: Tensor, counts: Tensor) -> None:
    """Of pages (int64 [n]) of keys [num_pages, page_size, Hkv, D], of which the first `counts` tokens are
    there (int64 [n], at least 1): the largest value of every channel and then the least, into bounds
    [num_pages, Hkv, 2 D]."""
    _, page_size, kv_heads, dim = keys.shape
    if keys.is_cuda:
        from weaveinf.ops import triton_select

        triton_select.write_bounds(keys, bounds, pages, counts)
    elif native.lib is None or keys.dtype not in native.DTYPES:
        held = keys[pages]
        beyond = (torch.arange(page_size, device=keys.device) >= counts[:, None])[:, :, None, None]
        bounds[pages, :, :dim] = held.masked_fill(beyond, -torch.inf).amax(1)
        bounds[pages, :, dim:] = held.masked_fill(beyond, torch.inf).amin(1)
    else:
        native.lib.weave_bounds(
            *native.pointers(keys, bounds, pages, counts),
            *(len(pages), kv_heads, dim, page_size, native.DTYPES[keys.dtype], torch.get_num_threads()),
        )


def write_channels(keys: Tensor, pool: Tensor, channels: Tensor, slots: Tensor) -> None:
    """These channels (int32 [Hkv, K]; -1: zeros) of keys [rows, Hkv, D] into slots (int32 [rows]; -1:
    nowhere) of a pool [num_pages, page_size, Hkv, K]."""
    rows, kv_heads, dim = keys.shape
    if keys.is_cuda:
        from weaveinf.ops import triton_select

        triton_select.write_channels(keys, pool, channels, slots)
    elif native.lib is None or keys.stride()[1:] != (dim, 1):
        real = slots >= 0
        pool.flatten(0, 1)[slots[real].long()] = _picked(keys, channels)[real]
    else:
        native.lib.weave_planes(
            *native.pointers(keys, pool, channels, slots),
            *(keys.stride(0), rows, kv_heads, dim, channels.shape[1], keys.element_size()),
        )


def fetch(pool: Tensor, rows: Tensor, mirror: Tensor) -> None:
    """These rows (int32 or int64, of any shape, some perhaps often) of a pool [n, width], in the host's
    memory, into the same rows of a mirror on the device."""
    at = rows.flatten().long()
    mirror.index_copy_(0, at, pool.index_select(0, at))


def attend_by_head(
    q: Tensor, keys: Tensor, values: Tensor, places: Tensor, counts: Tensor, scale: float, out: Tensor
) -> Tensor:
    """Attention of each row's queries of each KV head, or of each query, over tokens of their own, at
    `places` (int32 [rows, Hkv or Hq, n]), of which the first counts[row, head] count (int32 [rows, Hkv or
    Hq], at least 1); out contiguous."""
    rows, heads, dim = q.shape
    sets = places.shape[1]
    grouped, one = (rows * sets, heads // sets, dim), (-1, 1, 1, dim)
    starts = torch.arange(rows * sets + 1, dtype=torch.int32, device=q.device)
    slots = Paged(places.flatten(0, 1), starts, counts.flatten() - 1)
    attend(q.reshape(grouped), keys.view(one), values.view(one), slots, scale, out.view(grouped))
    return out
