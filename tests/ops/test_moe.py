"""Routing and the grouped experts against the plain loop over rows."""

from __future__ import annotations

import pytest
import torch

from tests.ops.builds import DTYPES, close, poisoned
from weaveinf.ops import native
from weaveinf.ops.linear import pack
from weaveinf.ops.moe import ExpertWeights, moe, moe_reference, route


def packed(weights: list[torch.Tensor]) -> ExpertWeights:
    return ExpertWeights([pack(weight) for weight in weights])


def test_routing_takes_the_largest_and_renormalises_on_demand() -> None:
    logits = torch.randn(40, 7)
    probs = logits.softmax(-1)
    weights, ids = route(logits, 3, renormalize=False)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    torch.testing.assert_close(weights, probs.topk(3).values)
    torch.testing.assert_close(probs.gather(1, ids.long()), weights)
    renormalised, same = route(logits, 3, renormalize=True)
    assert torch.equal(ids, same)
    torch.testing.assert_close(renormalised.sum(-1), torch.ones(40))
    torch.testing.assert_close(renormalised * weights.sum(-1, keepdim=True), weights)


def test_ties_go_to_the_lower_expert() -> None:
    logits = torch.zeros(3, 128)
    logits[1, 100] = logits[1, 64] = 2.0
    _, ids = route(logits, 4, renormalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [64, 100, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "experts", "top_k"), [(0, 4, 2), (1, 8, 2), (9, 3, 3), (70, 5, 1)])
def test_experts(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, dtype: torch.dtype, rows: int, experts: int, top_k: int
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "lib", None)
    hidden, inner = 37, 22
    x = torch.randn(rows, hidden).to(dtype)
    gate_up = [torch.randn(2 * inner, hidden).to(dtype) for _ in range(experts)]
    down = [torch.randn(hidden, inner).to(dtype) for _ in range(experts)]
    weights, ids = route(torch.randn(rows, experts), top_k, renormalize=True)
    out = poisoned(rows, hidden, dtype=dtype)
    got = moe(x, packed(gate_up), packed(down), weights, ids, out)
    assert got is out
    if rows:
        # The products before the activation may round one unit apart, and 22 of them are summed.
        close(out, moe_reference(x, gate_up, down, weights, ids), 64 if dtype == torch.float32 else 2)


def test_an_expert_that_no_row_chose_is_not_read() -> None:
    x, ids = torch.randn(2, 8), torch.tensor([[0], [2]], dtype=torch.int32)
    weights = torch.ones(2, 1)
    gate_up = [torch.randn(6, 8), poisoned(6, 8, dtype=torch.float32), torch.randn(6, 8)]
    down = [torch.randn(8, 3), poisoned(8, 3, dtype=torch.float32), torch.randn(8, 3)]
    out = poisoned(2, 8, dtype=torch.float32)
    moe(x, packed(gate_up), packed(down), weights, ids, out)
    close(out, moe_reference(x, gate_up, down, weights, ids), 64)
