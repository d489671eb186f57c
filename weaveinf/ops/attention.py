"""Attention over a paged cache: rows of many sequences, prefill and decode alike."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from weaveinf.ops import native

_NO_WINDOW = 2**31


def paged_attention_reference(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `paged_attention`."""
    page_size, kv_heads = key_pool.shape[1:3]
    group = q.shape[1] // kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    bounds = cu_seqlens_q.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        at = positions[start:end].long().unsqueeze(1)
        length = int(at.max()) + 1
        pages = block_table[s, : -(-length // page_size)].long()
        k, v = (
            pool[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1)
            for pool in (key_pool, value_pool)
        )
        scores = torch.einsum("rhd,khd->hrk", q[start:end].float(), k) * scale
        key_at = torch.arange(length, device=q.device)
        hidden = key_at > at
        if sliding_window is not None:
            hidden |= key_at <= at - sliding_window
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hrk,khd->rhd", probs, v).to(q.dtype)
    return out


def paged_attention(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
    seq_lens: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [rows, Hq, D] over keys and values in pages -> [rows, Hq, D].

    Pools: [num_pages, page_size, Hkv, D], contiguous. Rows cu_seqlens_q[s] to cu_seqlens_q[s+1] (int32
    [S+1]) belong to sequence s, whose pages are block_table[s] (int32 [S, max_blocks]). A row at position p
    (positions: int32 [rows], >= 0) reads the keys at max(0, p - sliding_window + 1) to p; no other slot or
    page matters, whatever is there. The rows of a sequence ascend in position but need not be consecutive.
    Query head h reads KV head h // (Hq // Hkv). On CPU the last dims of q, out and block_table, and all of
    cu_seqlens_q and positions, must be contiguous; out may lie in wider rows. seq_lens (int32 [S]) may be
    given where each sequence's rows are the last of so many positions, without a gap: then FlashAttention may
    run.
    """
    if q.is_cuda:
        return _on_gpu(
            q,
            (key_pool, value_pool),
            block_table,
            cu_seqlens_q,
            positions,
            scale,
            sliding_window,
            out,
            seq_lens,
        )
    if native.lib is None or q.dtype not in native.DTYPES:
        return paged_attention_reference(
            q, key_pool, value_pool, block_table, cu_seqlens_q, positions, scale, sliding_window, out
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _, page_size, kv_heads, dim = key_pool.shape
    native.lib.weave_attention(
        *native.pointers(q, key_pool, value_pool, out, block_table, cu_seqlens_q, positions),
        *(q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_table.stride(0)),
        *(cu_seqlens_q.shape[0] - 1, q.shape[1], kv_heads, dim, page_size, sliding_window or _NO_WINDOW),
        *(native.DTYPES[q.dtype], torch.get_num_threads(), scale),
    )
    return out


def _on_gpu(
    q: Tensor,
    pools: tuple[Tensor, Tensor],
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    out: Tensor | None,
    seq_lens: Tensor | None,
) -> Tensor:
    from weaveinf.ops import flash_attention, triton_attention

    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    where = (q, *pools, block_table, cu_seqlens_q)
    ours = partial(triton_attention.paged_attention, *where, positions, scale, window, out)
    if seq_lens is None or not q.numel() or not flash_attention.takes(q):
        return ours()
    theirs = partial(flash_attention.paged_attention, *where, scale, window, out, seq_lens)
    many = q.shape[0] > 4 * len(seq_lens)
    return flash_attention.choose(ours, theirs, (many, q.dtype, q.shape[1:], pools[0].shape[2], window))()
