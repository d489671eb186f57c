"""The linear layer's CUDA path (cuBLAS) against the reference. Never run so far: written without a GPU."""

from __future__ import annotations

import pytest
import torch

from weaveinf.ops.linear import linear, linear_reference, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_linear(rows: int, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(75, 64, device="cuda").to(dtype) / 8
    bias = torch.randn(75, device="cuda").to(dtype) if biased else None
    x = torch.randn(rows, 96, device="cuda").to(dtype)[:, :64]
    packed = pack(weight)
    for out_dtype in (dtype, torch.float32):
        want = linear_reference(x, weight, bias, out_dtype=out_dtype)
        # float32 results of bfloat16 weights are not rounded to bfloat16 on the way.
        tolerance = 1.6e-2 if out_dtype == torch.bfloat16 else 1e-4
        got = linear(x, packed, bias, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        held = torch.full((rows, 80), torch.nan, dtype=out_dtype, device="cuda")
        linear(x, packed, bias, out=held[:, :75])
        torch.testing.assert_close(held[:, :75], want, atol=tolerance, rtol=tolerance)
        assert held[:, 75:].isnan().all()
