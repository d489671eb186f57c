"""How FlashAttention is called: its documented arguments, by a stand-in written from its documentation, as
the library itself runs on Hopper only (tests/gpu/test_triton.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.test_attention import Case
from weaveinf.ops import flash_attention
from weaveinf.ops.attention import Paged


def stand_in(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """Row i of n sees keys up to len - n + i, and from `left` before that; -1: no bound."""
    assert causal
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for s, length in enumerate(cache_seqlens.tolist()):
        first, end = cu_seqlens_q[s : s + 2].tolist()
        assert end - first <= max_seqlen_q
        pages = page_table[s, : -(-length // k_cache.shape[1])].long()
        k, v = (pool[pages].flatten(0, 1)[:length].nan_to_num() for pool in (k_cache, v_cache))
        for row in range(first, end):
            last = length - (end - row)
            start = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            for head in range(q.shape[1]):
                kv = head // (q.shape[1] // k.shape[1])
                p = (k[start : last + 1, kv].float() @ q[row, head].float() * softmax_scale).softmax(0)
                out[row, head] = p @ v[start : last + 1, kv].float()
    return out


@pytest.mark.parametrize("window", [None, 1, 37])
def test_arguments(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(flash_attention, "library", stand_in)
    torch.manual_seed(0)
    case = Case([[4], list(range(3, 50)), [], [90, 91]], (4, 2, 64, 16), torch.float16, window)
    lengths = torch.tensor([5, 50, 7, 92], dtype=torch.int32)
    q = case.q.contiguous()
    assert flash_attention.takes(q)
    assert not flash_attention.takes(q.float())
    out = torch.full_like(q, torch.nan)
    table = case.table.where(case.table < len(case.pools[0]), 0).clamp(min=0)
    paged = Paged(table, case.starts, case.positions, lengths)
    flash_attention.paged_attention(q, tuple(case.pools), paged, case.scale, window, out)
    case.close(out, case.want())
