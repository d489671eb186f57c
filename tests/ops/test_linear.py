"""The packed products against the plain one: every build, odd sizes, strides, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from weaveinf.ops import native
from weaveinf.ops.linear import PackedWeight, _onednn, linear, linear_reference, pack

# (rows, n, k): few rows and many, panels and k that end in the middle, several blocks of each kind.
SIZES = [
    (1, 1, 1),
    (1, 37, 51),
    (2, 16, 8),
    (3, 33, 1025),
    (5, 130, 384),
    (8, 48, 770),
    (13, 17, 33),
    (48, 40, 95),
    (49, 1030, 63),
    (64, 31, 800),
    (200, 65, 401),
    (70, 1050, 1025),
    (400, 40, 800),
]


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_products(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, m: int, n: int, k: int, threads: int
) -> None:
    use(monkeypatch, build)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.randn(n, k).to(dtype)
    x = torch.randn(m, k + 3).to(dtype)[:, :k]
    bias = torch.randn(n).to(dtype)
    packed = pack(weight)
    want = linear_reference(x, weight, bias, out_dtype=torch.float32)
    # float32 sums in another order: an error of about sqrt(k) roundings of the largest partial sum.
    exact = (k**0.5 + 2) * torch.finfo(torch.float32).eps * float(want.abs().max() + k**0.5)
    buffer = poisoned(m + 1, n + 5, dtype=dtype)
    linear(x, packed, bias, out=buffer[:m, :n])
    rounding = torch.finfo(dtype).eps / 2 * float(want.abs().max())
    torch.testing.assert_close(buffer[:m, :n].float(), want, rtol=0, atol=exact + rounding)
    assert buffer[m:].isnan().all() and buffer[:, n:].isnan().all()
    wide = linear(x, packed, bias, out_dtype=torch.float32)
    torch.testing.assert_close(wide, want, rtol=0, atol=exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_the_product_of_the_machine(dtype: torch.dtype) -> None:
    weight, x = torch.randn(24, 40).to(dtype), torch.randn(6, 40).to(dtype)
    packed = pack(weight)
    assert (packed.n, packed.k, packed.dtype) == (24, 40, dtype)
    close(linear(x, packed), linear_reference(x, weight))
    wide = linear(x, pack(weight, wide=True), out_dtype=torch.float32)
    close(wide, linear_reference(x, weight, out_dtype=torch.float32), 64)
    assert linear(x[:0], packed).shape == (0, 24)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_without_kernels_torch_multiplies(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(native, "lib", None)
    weight, x = torch.randn(24, 40).to(dtype), torch.randn(6, 40).to(dtype)
    bias = torch.randn(24).to(dtype)
    close(linear(x, pack(weight), bias), linear_reference(x, weight, bias))
    want = linear_reference(x, weight, bias, out_dtype=torch.float32)
    close(linear(x, pack(weight, wide=True), bias, out_dtype=torch.float32), want, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_onednn_multiplies(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not native.ONEDNN:
        pytest.skip("this processor has no instructions for bfloat16")
    weight, bias = torch.randn(65, 51).to(dtype)[:, 1:], torch.randn(65).to(dtype)
    packed = PackedWeight(weight, _onednn(weight))
    for rows in (1, 5, 70):
        x, out = torch.randn(rows, 53).to(dtype)[:, :50], poisoned(rows, 70, dtype=dtype)
        for b in (None, bias):
            linear(x, packed, b, out=out[:, :65])
            close(out[:, :65], linear_reference(x, weight, b), 2 if dtype == torch.bfloat16 else 64)
        assert out[:, 65:].isnan().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = pack(torch.eye(8))
    for x, out in ((torch.ones(2, 7), None), (torch.ones(2, 8), torch.ones(2, 9))):
        with pytest.raises(ValueError, match="times a weight"):
            linear(x, packed, out=out)


def test_a_packed_weight_lives_as_long_as_it_is_used() -> None:
    packed = pack(torch.eye(64))
    for _ in range(20):
        torch.randn(64, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x, packed), x, rtol=0, atol=0)
