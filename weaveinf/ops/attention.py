"""Attention over a paged cache: rows of many sequences, prefill and decode alike."""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from weaveinf.ops import native

_NO_WINDOW = 2**31

Pair = tuple[Tensor, Tensor]
"""Of keys and values: [num_pages, page_size, Hkv, D], contiguous."""


class Paged(NamedTuple):
    """Which cached tokens rows read.

    Rows cu_seqlens_q[s] to cu_seqlens_q[s+1] (int32 [S+1]) belong to sequence s, whose pages are
    block_table[s] (int32 [S, max_blocks]). The rows of a sequence ascend in position (int32 [rows], >= 0) but
    need not be consecutive. seq_lens (int32 [S]) may be given where each sequence's rows are the last of so
    many positions, without a gap: then FlashAttention may run.
    """

    block_table: Tensor
    cu_seqlens_q: Tensor
    positions: Tensor
    seq_lens: Tensor | None = None


def paged_attention_reference(
    q: Tensor, pools: Pair, paged: Paged, scale: float, window: int | None = None, out: Tensor | None = None
) -> Tensor:
    """See `paged_attention`."""
    page_size, kv_heads = pools[0].shape[1:3]
    group = q.shape[1] // kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    for s, (start, end) in enumerate(pairwise(paged.cu_seqlens_q.tolist())):
        if start == end:
            continue
        at = paged.positions[start:end].long().unsqueeze(1)
        length = int(at.max()) + 1
        pages = paged.block_table[s, : -(-length // page_size)].long()
        k, v = (pool[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for pool in pools)
        scores = torch.einsum("rhd,khd->hrk", q[start:end].float(), k) * scale
        key_at = torch.arange(length, device=q.device)
        hidden = key_at > at
        if window is not None:
            hidden |= key_at <= at - window
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hrk,khd->rhd", probs, v).to(q.dtype)
    return out


def paged_attention(
    q: Tensor, pools: Pair, paged: Paged, scale: float, window: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Softmax attention of q [rows, Hq, D] over keys and values in pages -> [rows, Hq, D].

    A row at position p reads the keys at max(0, p - window + 1) to p; no other slot or page matters, whatever
    is there. Query head h reads KV head h // (Hq // Hkv). On CPU the last dims of q, out and block_table, and
    all of cu_seqlens_q and positions, must be contiguous; out may lie in wider rows.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if q.is_cuda:
        return _on_gpu(q, pools, paged, scale, window, out)
    if native.lib is None or q.dtype not in native.DTYPES:
        return paged_attention_reference(q, pools, paged, scale, window, out)
    (_, page_size, kv_heads, dim), (table, starts, positions, _) = pools[0].shape, paged
    native.lib.weave_attention(
        *native.pointers(q, *pools, out, table, starts, positions),
        *(q.stride(0), q.stride(1), out.stride(0), out.stride(1), table.stride(0)),
        *(starts.shape[0] - 1, q.shape[1], kv_heads, dim, page_size, window or _NO_WINDOW),
        *(native.DTYPES[q.dtype], torch.get_num_threads(), scale),
    )
    return out


def _on_gpu(q: Tensor, pools: Pair, paged: Paged, scale: float, window: int | None, out: Tensor) -> Tensor:
    from weaveinf.ops import flash_attention, triton_attention

    given = q, pools, paged, scale, window, out
    ours = partial(triton_attention.paged_attention, *given)
    if paged.seq_lens is None or not q.numel() or not flash_attention.takes(q):
        return ours()
    theirs = partial(flash_attention.paged_attention, *given)
    many = q.shape[0] > 4 * len(paged.seq_lens)
    return flash_attention.choose(ours, theirs, (many, q.dtype, q.shape[1:], pools[0].shape[2], window))()
