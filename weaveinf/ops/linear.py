"""y = x W^T + b with weights packed once for the processor that runs them."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedWeight:
    """A weight [n, k] in whatever layout this device multiplies fastest (made by `pack`)."""

    def __init__(self, weight: Tensor) -> None:
        self.n, self.k = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.data = weight


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K] transposed: see `linear`."""
    f = x.float() @ weight.float().t()
    if bias is not None:
        f += bias.float()
    return f.to(out_dtype or x.dtype) if out is None else out.copy_(f)


def pack(weight: Tensor) -> PackedWeight:
    """Packs weight [N, K] for `linear`; the caller drops its own reference to save the memory."""
    return PackedWeight(weight)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] times the packed weight [N, K] transposed, plus bias [N] -> [M, N].

    float32 accumulation, rounded once to the dtype of out (or out_dtype; x's when neither is given).
    x and out may have row strides larger than their widths. M may be 0.
    """
    return linear_reference(x, w.data, bias, out, out_dtype)
