"""RMSNorm, alone and behind the sum of partial results and the residual add; LayerNorm."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from weaveinf.ops import native


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """See `rms_norm`."""
    f = x.float()
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return f.to(x.dtype) if out is None else out.copy_(f)


def add_rms_norm_reference(
    partials: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    scale: float,
    out: Tensor,
) -> Tensor:
    """See `add_rms_norm`."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    residual.copy_(residual.float() + scale * total)
    return rms_norm_reference(residual, weight, eps, offset, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dim; float32 inside, rounded once.

    x: [..., D] with any strides but a contiguous last dim; weight: [D]; out: like x (may be x itself).
    """
    if x.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.rms_norm(x, weight, eps, offset, out)
    if native.lib is None or x.dtype not in native.DTYPES or x.dim() not in (2, 3):
        return rms_norm_reference(x, weight, eps, offset, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    heads, dim = x.shape[-2] if x.dim() == 3 else 1, x.shape[-1]
    native.lib.weave_rms_norm(
        x.data_ptr(),
        x.stride(0),
        x.stride(-2),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(-2),
        x.shape[0],
        heads,
        dim,
        eps,
        offset,
        native.DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; float32 inside, rounded once."""
    f = torch.nn.functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return f.to(x.dtype)


def add_rms_norm(
    partials: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    scale: float,
    out: Tensor,
) -> Tensor:
    """The arithmetic of a seam: residual = round(residual + scale * sum(partials)); out = norm(residual).

    partials: [R, D] each, summed in float32 in the order given; residual: [R, D], updated in place;
    the norm reads the rounded residual. Returns out [R, D]. All are contiguous and of one dtype.
    """
    if weight.dtype != residual.dtype:
        raise ValueError(f"a norm in {weight.dtype} behind sums in {residual.dtype}")
    if residual.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.add_rms_norm(partials, residual, weight, eps, offset, scale, out)
    if native.lib is None or residual.dtype not in native.DTYPES:
        return add_rms_norm_reference(partials, residual, weight, eps, offset, scale, out)
    native.lib.weave_add_rms_norm.run(sum_norm(partials, residual, out, weight, eps, offset, scale))
    return out


def sum_norm(
    partials: Sequence[Tensor],
    residual: Tensor,
    out: Tensor,
    weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    scale: float = 1.0,
) -> bytes:
    """The arguments of weave_add_rms_norm (csrc/cpu/sum_norm.h), for who calls it from C++, too."""
    assert native.lib is not None
    call = native.lib.weave_add_rms_norm.pack(
        len(partials),
        residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        *residual.shape,
        eps,
        offset,
        scale,
        native.DTYPES[residual.dtype],
        torch.get_num_threads(),
    )
    return call + struct.pack(f"{len(partials)}P", *[partial.data_ptr() for partial in partials])
