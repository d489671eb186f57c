"""Rotary position embedding, and the write of keys and values into their pages."""

import torch
from torch import Tensor

from weaveinf.ops import native


def rope_reference_(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """See `rope_`."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.long()].unsqueeze(1).split(half, -1)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    # Both halves before either is written: for float32 `first` is a view of x.
    turned = first * cos - second * sin, second * cos + first * sin
    x[..., :half], x[..., half : 2 * half] = turned
    return x


def halves(x: Tensor) -> Tensor:
    """The channels of [..., d] from the interleaved layout, where 2i and 2i + 1 turn together, to that which
    `rope_` turns: a copy. Products of queries and keys that both went through it stay what they were."""
    return x.unflatten(-1, (x.shape[-1] // 2, 2)).transpose(-1, -2).flatten(-2)


def write_kv_reference(
    k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor
) -> None:
    """See `write_kv`."""
    kept = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[kept].long()
    key_pool.flatten(0, 1)[slots] = k[kept]
    value_pool.flatten(0, 1)[slots] = v[kept]


def rope_(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates x in place, half-split ("neox") layout over the first rot_dim dims; returns x.

    x: [rows, heads, head_dim], last dim contiguous; cos_sin: float32 [max_pos, rot_dim], first half
    cosines, second half sines, contiguous; positions: int32 [rows].
    """
    if x.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.rope_(x, cos_sin, positions)
    if native.lib is None or x.dtype not in native.DTYPES:
        return rope_reference_(x, cos_sin, positions)
    native.lib.weave_rope(
        *(x.data_ptr(), x.stride(0), x.stride(1), x.shape[0], x.shape[1]),
        *(cos_sin.shape[1], cos_sin.data_ptr(), positions.data_ptr()),
        *(native.DTYPES[x.dtype], torch.get_num_threads()),
    )
    return x


def write_kv(k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """Stores row i of k and v [rows, Hkv, D] at token slot slot_mapping[i] (int32); -1 is skipped.

    The values of one row of k or v are contiguous.

    Pools: [num_pages, page_size, Hkv, D], contiguous; slot = page * page_size + offset in the page.
    """
    if k.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.write_kv(k, v, key_pool, value_pool, slot_mapping)
    if native.lib is None:
        return write_kv_reference(k, v, key_pool, value_pool, slot_mapping)
    itemsize = k.element_size()
    native.lib.weave_write_kv(
        *(k.data_ptr(), k.stride(0) * itemsize, v.data_ptr(), v.stride(0) * itemsize),
        *(key_pool.data_ptr(), value_pool.data_ptr(), slot_mapping.data_ptr()),
        *(k.shape[0], k.shape[1] * k.shape[2] * itemsize, torch.get_num_threads()),
    )
    return None
