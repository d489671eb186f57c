"""The gated activation of the MLP."""

import torch
from torch import Tensor

from weaveinf.ops import native


def silu_mul_reference(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """See `silu_mul`."""
    gate, up = gate_up.float().chunk(2, -1)
    f = torch.nn.functional.silu(gate) * up
    return f.to(gate_up.dtype) if out is None else out.copy_(f)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of gate_up [rows, 2*I] (gate first) -> [rows, I]; float32 inside, rounded once."""
    if gate_up.is_cuda:
        from weaveinf.ops import triton_elementwise

        return triton_elementwise.silu_mul(gate_up, out)
    if native.lib is None or gate_up.dtype not in native.DTYPES:
        return silu_mul_reference(gate_up, out)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((rows, inner), dtype=gate_up.dtype)
    native.lib.weave_silu_mul(
        *(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), out.stride(0), rows, inner),
        *(native.DTYPES[gate_up.dtype], torch.get_num_threads()),
    )
    return out
