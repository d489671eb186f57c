"""The products of a mixture of experts for CUDA in Triton: all experts in one launch.

The rows lie grouped by expert, and how many each has is known on the device alone: the launch depends on
shapes, so the host waits for nothing and graphs can replay it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaveinf.ops.triton_attention import owner
from weaveinf.ops.triton_elementwise import silu_mul


@triton.jit
def _experts(
    x,
    weights,
    order,
    starts,
    shares,
    out,
    sizes,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[p] = x[order[p] // TOP_K] W^T (UP), or out[order[p]] = shares[order[p]] * x[p] W^T.

    Pair p belongs to expert e where starts[e] <= p < starts[e + 1]; weights: the address of each expert's
    W [n, k]. sizes: how many experts, n, k, the stride of x. Grid: (row tiles, column tiles).
    """
    num_experts, n, k, x_stride = sizes
    tile = tl.program_id(0)
    expert = owner(starts, num_experts, tile, BLOCK_M)
    begin = tl.load(starts + expert)
    end = tl.load(starts + expert + 1)
    first = begin + (tile - (begin // BLOCK_M + expert)) * BLOCK_M
    if first < end:
        pair = first + tl.arange(0, BLOCK_M)
        pair_ok = pair < end
        chosen = tl.load(order + pair, mask=pair_ok, other=0)
        if UP:
            row = chosen // TOP_K
            target = pair.to(tl.int64)
        else:
            row = pair.to(tl.int64)
            target = chosen
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = column < n
        w = tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty))
        w = tl.multiple_of(w, 16)
        w_n = w + column.to(tl.int64) * k
        x_m = x + row * x_stride
        acc_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, k, BLOCK_K):
            i = at + tl.arange(0, BLOCK_K)
            inside = i < k
            x_mk = tl.load(x_m[:, None] + i[None, :], mask=pair_ok[:, None] & inside[None, :], other=0.0)
            w_nk = tl.load(w_n[:, None] + i[None, :], mask=column_ok[:, None] & inside[None, :], other=0.0)
            acc_mn = tl.dot(x_mk, tl.trans(w_nk), acc_mn, input_precision="ieee")
        if not UP:
            acc_mn = acc_mn * tl.load(shares + chosen, mask=pair_ok, other=0.0)[:, None]
        at_mn = out + target[:, None] * n + column[None, :]
        tl.store(at_mn, acc_mn.to(out.dtype.element_ty), mask=pair_ok[:, None] & column_ok[None, :])


def moe(x: Tensor, gate_up: Tensor, down: Tensor, inner: int, shares: Tensor, ids: Tensor) -> Tensor:
    """float32 [rows, H], what `weaveinf.ops.moe.moe` fills its `out` with.

    x: [rows, H], of float32, bfloat16 or float16; gate_up, down: int64 [E], the addresses of the experts'
    weights [2 * inner, H] and [H, inner], of x's dtype and contiguous; shares, ids: as `route` gives them.
    """
    rows, hidden = x.shape
    top_k, experts = ids.shape[1], gate_up.shape[0]
    chosen, order = ids.flatten().sort(stable=True)
    bounds = torch.arange(experts + 1, dtype=ids.dtype, device=x.device)
    starts = torch.searchsorted(chosen, bounds, out_int32=True)

    def product(x: Tensor, weights: Tensor, n: int, out_dtype: torch.dtype, up: bool) -> Tensor:
        pairs = order.shape[0]
        out = torch.empty((pairs, n), dtype=out_dtype, device=x.device)
        if pairs == 0:
            return out
        # tl.dot wants 16 at least; float32 has no tensor cores, and larger tiles spill.
        wide = x.dtype != torch.float32
        block_m = min(max(16, triton.next_power_of_2(pairs // experts)), 128 if wide else 32)
        block_n = 128 if wide else 64
        _experts[(pairs // block_m + experts, triton.cdiv(n, block_n))](
            *(x, weights, order, starts, shares, out, (experts, n, x.shape[1], x.stride(0))),
            *(top_k, up, block_m, block_n, 64 if wide else 32),
            num_warps=8 if block_m == 128 else 4,
            num_stages=3,
        )
        return out

    both = product(x, gate_up, 2 * inner, x.dtype, up=True)
    parts = product(silu_mul(both), down, hidden, torch.float32, up=False)
    return parts.view(rows, top_k, hidden).sum(1)
