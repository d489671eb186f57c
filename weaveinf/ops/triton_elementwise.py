"""Norms, rotary embedding, cache writes and the gated activation for CUDA, in Triton.

Every kernel reads and writes each value once, computes in float32 and rounds once; one program handles one
row (or a part of it). The functions here have the contracts of the same names in `weaveinf.ops`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaveinf.ops.norm import Joint


@triton.jit
def _rms_norm(
    x, weight, out, eps, offset, strides, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows * HEADS,), one vector of WIDTH each. strides: of x, then of out; of rows, then of heads."""
    x_row_stride, x_head_stride, out_row_stride, out_head_stride = strides
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    f = tl.load(x + row * x_row_stride + head * x_head_stride + i, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32) + offset
    f = f * tl.rsqrt(tl.sum(f * f) / WIDTH + eps) * w
    at = out + row * out_row_stride + head * out_head_stride + i
    tl.store(at, f.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(partials, residual, weight, out, varied, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows,). `partials`: a tuple of pointers, summed in its order; varied: see `Joint`; strides: of
    rows of residual, out and each of the partials."""
    eps, offset, scale = varied
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(len(partials)):
        part = tl.load(partials[rank] + row * strides[2 + rank] + i, mask=inside, other=0.0)
        total += part.to(tl.float32)
    at = residual + row * strides[0] + i
    f = tl.load(at, mask=inside, other=0.0).to(tl.float32) + scale * total
    rounded = f.to(residual.dtype.element_ty)
    tl.store(at, rounded, mask=inside)
    f = rounded.to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32) + offset
    f = f * tl.rsqrt(tl.sum(f * f) / WIDTH + eps) * w
    tl.store(out + row * strides[1] + i, f.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope(x, cos_sin, positions, heads, strides, HALF: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, head tiles). strides: of x, of rows and heads."""
    row_stride, head_stride = strides
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i = tl.arange(0, BLOCK)
    table = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * HALF) + i
    cos = tl.load(table, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(table + HALF, mask=i < HALF, other=0.0)[None, :]
    at = x + row * row_stride + head[:, None] * head_stride + i[None, :]
    inside = (head < heads)[:, None] & (i < HALF)[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _write_kv(
    k, v, pools, slot_mapping, strides, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows,). WIDTH = KV heads * HEAD_DIM values go to the row's slot of either pool. strides: of k,
    then of v; of rows, then of heads."""
    k_row_stride, k_head_stride, v_row_stride, v_head_stride = strides
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        inside = i < WIDTH
        head = i // HEAD_DIM
        d = i % HEAD_DIM
        key = tl.load(k + row * k_row_stride + head * k_head_stride + d, mask=inside, other=0.0)
        tl.store(pools[0] + slot * WIDTH + i, key, mask=inside)
        value = tl.load(v + row * v_row_stride + head * v_head_stride + d, mask=inside, other=0.0)
        tl.store(pools[1] + slot * WIDTH + i, value, mask=inside)


@triton.jit
def _silu_mul(gate_up, out, gate_up_stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, column tiles)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    at = gate_up + row * gate_up_stride + i
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    f = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + i, f.to(out.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    """Warps for a row of `block` values: eight values a thread, 1 to 16 warps."""
    return min(max(block // 256, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """See `weaveinf.ops.norm.rms_norm`. x and out: at most two leading dims, or contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    width = x.shape[-1]
    source = x.unsqueeze(-2) if x.ndim == 2 else x.view(-1, x.shape[-2] if x.ndim > 1 else 1, width)
    target = out.view(source.shape) if out.ndim != 2 else out.unsqueeze(-2)
    if x.numel():
        block = triton.next_power_of_2(width)
        strides = *source.stride()[:2], *target.stride()[:2]
        given = source, weight, target, eps, offset, strides, source.shape[1], width, block
        _rms_norm[(source.shape[0] * source.shape[1],)](*given, num_warps=_warps(block))
    return out


def add_rms_norm(partials: Sequence[Tensor], residual: Tensor, joint: Joint, out: Tensor) -> Tensor:
    """See `weaveinf.ops.norm.add_rms_norm`."""
    rows, width = residual.shape
    if rows:
        block = triton.next_power_of_2(width)
        given = tuple(partials), residual, joint.weight, out, joint.varied
        strides = tuple(each.stride(0) for each in (residual, out, *partials))
        _add_rms_norm[(rows,)](*given, strides, width, block, num_warps=_warps(block))
    return out


def rope_(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """See `weaveinf.ops.rope.rope_`."""
    rows, heads, _ = x.shape
    half = cos_sin.shape[1] // 2
    block_half = triton.next_power_of_2(half)
    block_heads = min(triton.next_power_of_2(heads), max(1, 2048 // block_half))
    if rows:
        given = x, cos_sin, positions, heads, x.stride()[:2], half, block_heads, block_half
        warps = _warps(block_heads * block_half)
        _rope[(rows, triton.cdiv(heads, block_heads))](*given, num_warps=warps)
    return x


def write_kv(k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """See `weaveinf.ops.rope.write_kv`."""
    rows, heads, head_dim = k.shape
    block = triton.next_power_of_2(heads * head_dim)
    if rows:
        strides, sizes = (*k.stride()[:2], *v.stride()[:2]), (head_dim, heads * head_dim, block)
        given = k, v, (key_pool, value_pool), slot_mapping, strides
        _write_kv[(rows,)](*given, *sizes, num_warps=_warps(block))


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """See `weaveinf.ops.activation.silu_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width)) if out is None else out
    if rows:
        block = min(triton.next_power_of_2(width), 2048)
        given = gate_up, out, gate_up.stride(0), out.stride(0), width, block
        _silu_mul[(rows, triton.cdiv(width, block))](*given, num_warps=_warps(block))
    return out
