"""FlashAttention 3 (`flash_attn_interface`, Hopper) in place of this project's attention, where it is
installed and faster: the first call of each kind times both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weaveinf.ops.attention import Paged, Pair

try:
    from flash_attn_interface import flash_attn_with_kvcache as library
except ImportError:
    library = None

_TRIES = 3
_preferred: dict[Any, bool] = {}


def choose(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], kind: Any) -> Callable[[], Tensor]:
    """The faster of two calls that do the same, as it was when this kind was first seen. Both are called
    then, and the host waits; never while a graph is captured."""
    if kind not in _preferred:
        if torch.cuda.is_current_stream_capturing():
            return ours
        _preferred[kind] = _ms(theirs) < _ms(ours)
    return theirs if _preferred[kind] else ours


def _ms(call: Callable[[], Tensor]) -> float:
    call()  # may compile
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(_TRIES):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def takes(q: Tensor) -> bool:
    """Whether the library is there, for such queries."""
    return library is not None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] in (64, 128, 256)


def paged_attention(
    q: Tensor, pools: Pair, paged: Paged, scale: float, window: int | None, out: Tensor
) -> Tensor:
    """`weaveinf.ops.attention.paged_attention` with `seq_lens`."""
    assert library is not None
    attend = partial(library, q, *pools, page_table=paged.block_table, cache_seqlens=paged.seq_lens)
    # Not read back from the device: no sequence has more rows than there are.
    attend = partial(attend, cu_seqlens_q=paged.cu_seqlens_q, max_seqlen_q=q.shape[0])
    left = -1 if window is None else window - 1
    return out.copy_(attend(softmax_scale=scale, causal=True, window_size=(left, -1 if left < 0 else 0)))
