"""RMSNorm, alone and behind the sum of partial results and the residual add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    return rms_norm_reference(x, weight, eps, offset, out)


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
    the norm reads the rounded residual. Returns out [R, D].
    """
    if residual.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.add_rms_norm(partials, residual, weight, eps, offset, scale, out)
    return add_rms_norm_reference(partials, residual, weight, eps, offset, scale, out)
