"""RMSNorm, alone and behind the sum of partial results and the residual add; LayerNorm."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weaveinf.ops import native


@dataclass(frozen=True, eq=False)
class Joint:
    """The norm that follows a block: weight [hidden], of the model's dtype, and what the families vary.

    residual = round(residual + residual_scale * sum of partials);
    x = round(residual / sqrt(mean(residual^2) + eps) * (weight + weight_offset)), all in float32.
    """

    weight: Tensor
    eps: float
    weight_offset: float = 0.0
    residual_scale: float = 1.0

    @property
    def varied(self) -> tuple[float, float, float]:
        """What the kernels take besides the weight."""
        return self.eps, self.weight_offset, self.residual_scale


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """See `rms_norm`."""
    f = x.float()
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return f.to(x.dtype) if out is None else out.copy_(f)


def add_rms_norm_reference(partials: Sequence[Tensor], residual: Tensor, joint: Joint, out: Tensor) -> Tensor:
    """See `add_rms_norm`."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    residual.copy_(residual.float() + joint.residual_scale * total)
    return rms_norm_reference(residual, joint.weight, joint.eps, joint.weight_offset, out)


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
        *(x.data_ptr(), x.stride(0), x.stride(-2), weight.data_ptr()),
        *(out.data_ptr(), out.stride(0), out.stride(-2)),
        *(x.shape[0], heads, dim, eps, offset, native.DTYPES[x.dtype], torch.get_num_threads()),
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; float32 inside, rounded once."""
    f = torch.nn.functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return f.to(x.dtype)


def add_rms_norm(partials: Sequence[Tensor], residual: Tensor, joint: Joint, out: Tensor) -> Tensor:
    """The arithmetic of a seam (see `Joint`).

    partials: [R, D] each, summed in float32 in the order given; residual: [R, D], updated in place;
    the norm reads the rounded residual. Returns out [R, D]. All are contiguous and of one dtype.
    """
    if joint.weight.dtype != residual.dtype:
        raise ValueError(f"a norm in {joint.weight.dtype} behind sums in {residual.dtype}")
    if residual.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.add_rms_norm(partials, residual, joint, out)
    if native.lib is None or residual.dtype not in native.DTYPES:
        return add_rms_norm_reference(partials, residual, joint, out)
    native.lib.weave_add_rms_norm.run(sum_norm(partials, residual, out, joint))
    return out


def sum_norm(partials: Sequence[Tensor], residual: Tensor, out: Tensor, joint: Joint | None = None) -> bytes:
    """The arguments of weave_add_rms_norm (csrc/cpu/sum_norm.h), also for C++, which fills in the joint."""
    assert native.lib is not None
    weight, varied = (joint.weight.data_ptr(), joint.varied) if joint else (0, (0.0, 0.0, 1.0))
    call = native.lib.weave_add_rms_norm.pack(
        *(len(partials), residual.data_ptr(), weight, out.data_ptr(), *residual.shape, *varied),
        *(native.DTYPES[residual.dtype], torch.get_num_threads()),
    )
    return call + struct.pack(f"{len(partials)}P", *[partial.data_ptr() for partial in partials])
