"""y = x W^T + b with weights packed once for the processor that runs them."""

from collections.abc import Callable

import torch
from torch import Tensor

from weaveinf.ops import large, native

Product = Callable[[Tensor, Tensor | None, Tensor], None]
"""(x [M, K], bias [N] or None, out [M, N] to be filled)."""


class PackedWeight:
    """A weight [n, k] in the layout that this device multiplies fastest (made by `pack`).

    stored: what `product` reads: bytes in the layout of csrc/cpu/gemm.cpp, on CUDA the weight itself; None
        where it is a library's or torch's own affair.
    """

    def __init__(self, weight: Tensor, product: Product, stored: Tensor | None = None) -> None:
        self.n, self.k = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.product = product
        self.stored = stored


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


def pack(weight: Tensor, wide: bool = False) -> PackedWeight:
    """Packs weight [N, K] for `linear`, which keeps no reference to the caller's memory.

    wide: its products are wanted in float32 (oneDNN and torch would round them to bfloat16 first).
    """
    if weight.device.type == "cpu" and weight.dtype in native.DTYPES:
        if weight.dtype == torch.bfloat16 and native.onednn and not wide:
            return PackedWeight(weight, _onednn(weight))
        if native.lib is not None:
            panels, (n, k) = _panels(weight, native.lib), weight.shape
            return PackedWeight(weight, panels_product(panels, n, k, weight.dtype), panels)
    if weight.is_cuda:
        return PackedWeight(weight, _cuda(weight), weight)
    return PackedWeight(weight, _torch(weight, wide))


def _panels(weight: Tensor, lib: native.Library) -> Tensor:
    """The layout of csrc/cpu/gemm.cpp: panels of bfloat16 or float32, widened in registers."""
    n, k = weight.shape
    dtype = native.DTYPES[weight.dtype]
    panels = large.memory(lib.packed_bytes(n, k, dtype))
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    given = weight.data_ptr(), weight.stride(0), n, k, dtype, panels.data_ptr()
    lib.weave_pack(*given, torch.get_num_threads())
    return panels


def panels_product(panels: Tensor, n: int, k: int, weight_dtype: torch.dtype) -> Product:
    """The product with a weight [n, k] in the layout of csrc/cpu/gemm.cpp."""
    assert native.lib is not None
    data, call, codes = panels.data_ptr(), native.lib.weave_linear, native.DTYPES
    dtype, threads = codes[weight_dtype], torch.get_num_threads

    # `panels` as a default keeps the memory as long as the function.
    def product(x: Tensor, bias: Tensor | None, out: Tensor, panels: Tensor = panels) -> None:
        added = 0 if bias is None else bias.data_ptr()
        given = x.data_ptr(), x.stride(0), x.shape[0], added
        call(data, n, k, dtype, *given, out.data_ptr(), out.stride(0), codes[out.dtype], threads())

    return product


def _onednn(weight: Tensor) -> Product:
    """oneDNN with the weight reordered once, for bfloat16."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""))

    return product


def _cuda(weight: Tensor) -> Product:
    """cuBLAS; float32 results of half-precision weights leave its accumulators unrounded."""
    transposed = weight.t()

    def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype != weight.dtype:
            out.copy_(torch.mm(x, transposed, out_dtype=out.dtype))
            if bias is not None:
                out += bias
        elif bias is not None:
            torch.addmm(bias, x, transposed, out=out)
        else:
            torch.mm(x, transposed, out=out)

    return product


def _torch(weight: Tensor, wide: bool) -> Product:
    """torch's own product, in float32 if it is wanted so."""
    weight = weight.to(torch.float32 if wide else weight.dtype, copy=True)

    def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        bias = None if bias is None else bias.to(weight.dtype)
        out.copy_(torch.nn.functional.linear(x.to(weight.dtype), weight, bias))

    return product


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
    if out is None:
        out = torch.empty((x.shape[0], w.n), dtype=out_dtype or x.dtype, device=x.device)
    if x.shape[1] != w.k or out.shape[1] != w.n or out.shape[0] != x.shape[0]:
        raise ValueError(f"{list(x.shape)} times a weight [{w.n}, {w.k}] into {list(out.shape)}")
    if x.shape[0]:
        w.product(x, bias, out)
    return out
