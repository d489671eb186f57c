"""Mixture of experts: the routing, and the experts' MLPs grouped so that each weight is read once."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from weaveinf.ops.activation import silu_mul
from weaveinf.ops.linear import PackedWeight, linear


def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The top_k experts of each row: (weights float32 [rows, top_k], ids int32 [rows, top_k]).

    logits: float32 [rows, E]. Softmax over all experts, then the largest (ties to the lower index);
    with renormalize the chosen weights are divided by their sum.
    """
    probs = logits.float().softmax(-1)
    # A stable sort, because topk does not say which of two equals it takes.
    values, ids = probs.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], ids[:, :top_k].to(torch.int32)
    if renormalize:
        values = values / values.sum(-1, keepdim=True)
    return values.contiguous(), ids.contiguous()


def route_in_groups(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's routing (arXiv 2412.19437, section 2.1.2): (weights float32, ids int32), [rows, top_k].

    logits: float32 [rows, E]; bias: float32 [E]. An expert is chosen by sigmoid(logit) + bias, among those of
    the top_groups groups whose two best sum to most (E / groups neighbours are a group); its weight is the
    sigmoid alone, with renormalize divided by the chosen ones' sum, times scale. Ties go to the lower index.
    """
    scores = logits.float().sigmoid()
    wanted = scores + bias
    grouped = wanted.unflatten(1, (groups, len(bias) // groups))
    best = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    rank = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, rank, False)
    wanted = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
    ids = wanted.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)


class ExpertWeights:
    """One weight of every expert."""

    def __init__(self, packed: Sequence[PackedWeight]) -> None:
        self.packed = packed

    @cached_property
    def addresses(self) -> Tensor:
        """Where they lie, on their device: int64 [E]."""
        stored = [w.stored.data_ptr() for w in self.packed if w.stored is not None]
        return torch.tensor(stored, dtype=torch.int64, device=self.packed[0].device)


def moe_reference(
    x: Tensor, gate_up: Sequence[Tensor], down: Sequence[Tensor], weights: Tensor, ids: Tensor
) -> Tensor:
    """Row by row, expert by expert, with plain weights [2I, H] and [H, I]: see `moe`."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
            gate, up = (gate_up[expert].float() @ x[row].float()).to(x.dtype).float().chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
            total[row] += weight * (down[expert].float() @ inner)
    return total.to(x.dtype)


def moe(
    x: Tensor, gate_up: ExpertWeights, down: ExpertWeights, weights: Tensor, ids: Tensor, out: Tensor
) -> Tensor:
    """out [rows, H] = sum over the chosen experts of weights * down(silu_mul(gate_up(x))).

    x: [rows, H]; gate_up: per expert [2I, H]; down: per expert [H, I]; weights, ids: as `route` gives them.
    Rows are grouped by expert, so that each expert's weights are read once; float32 sums over experts.
    On CUDA the host waits for nothing.
    """
    if x.is_cuda:
        from weaveinf.ops import triton_moe

        tables = gate_up.addresses, down.addresses
        return out.copy_(triton_moe.moe(x, *tables, down.packed[0].k, weights, ids))
    rows, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=len(gate_up.packed)).tolist()
    source = torch.div(order, top_k, rounding_mode="floor")
    grouped, share = x[source], weights.flatten()[order].unsqueeze(1)
    total = torch.zeros((rows, x.shape[1]), dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            inner = silu_mul(linear(grouped[start:end], gate_up.packed[expert]))
            y = linear(inner, down.packed[expert], out_dtype=torch.float32)
            total.index_add_(0, source[start:end], y.mul_(share[start:end]))
            start = end
    return out.copy_(total)
