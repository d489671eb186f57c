"""What runs row by row against the references: norms, rotary embedding, cache writes, activation."""

from __future__ import annotations

import pytest
import torch

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from weaveinf.ops.activation import silu_mul, silu_mul_reference
from weaveinf.ops.embedding import embed, embed_reference, zero_
from weaveinf.ops.norm import Joint, add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from weaveinf.ops.rope import rope_, rope_reference_, write_kv, write_kv_reference
from weaveinf.ops.sampling import draw, draw_reference, gumbel

pytestmark = needs_kernels
every_build = pytest.mark.parametrize("build", BUILDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def norm_ulps(dtype: torch.dtype, dim: int) -> float:
    """A float32 sum of dim squares in another order is off by about sqrt(dim) / 4 units."""
    return 2 + (dim**0.5 / 4 if dtype == torch.float32 else 0)


@every_build
@every_dtype
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 1), (3, 7), (5, 64), (40, 1031)])
def test_rms_norm(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, rows: int, dim: int
) -> None:
    use(monkeypatch, build)
    x = torch.randn(rows, dim + 2).to(dtype)[:, :dim]
    weight = torch.randn(dim).to(dtype)
    out = poisoned(rows, dim + 1, dtype=dtype)
    rms_norm(x, weight, 1e-5, offset=1.0, out=out[:, :dim])
    if rows:
        close(out[:, :dim], rms_norm_reference(x, weight, 1e-5, 1.0), norm_ulps(dtype, dim))
    assert out[:, dim:].isnan().all()


@every_build
@every_dtype
def test_rms_norm_of_heads_in_place(monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype) -> None:
    use(monkeypatch, build)
    both = torch.randn(6, 5, 24).to(dtype)
    weight, before = torch.randn(24).to(dtype), both.clone()
    rms_norm(both[:, 1:3], weight, 1e-6, out=both[:, 1:3])
    close(both[:, 1:3], rms_norm_reference(before[:, 1:3], weight, 1e-6))
    assert torch.equal(both[:, 0], before[:, 0]) and torch.equal(both[:, 3:], before[:, 3:])


@every_build
@every_dtype
@pytest.mark.parametrize(("rows", "dim", "ranks"), [(0, 8, 2), (1, 9, 1), (7, 130, 3), (64, 1024, 2)])
def test_add_rms_norm(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, rows: int, dim: int, ranks: int
) -> None:
    use(monkeypatch, build)
    partials = [torch.randn(rows, dim).to(dtype) for _ in range(ranks)]
    residual, weight = torch.randn(rows, dim).to(dtype), torch.randn(dim).to(dtype)
    wanted, want = residual.clone(), poisoned(rows, dim, dtype=dtype)
    joint = Joint(weight, 1e-5, 0.5, 0.25)
    add_rms_norm_reference(partials, wanted, joint, want)
    out = poisoned(rows, dim, dtype=dtype)
    add_rms_norm(partials, residual, joint, out)
    if rows:
        # A fused multiply-add may round the other way where two sums are one unit apart.
        close(residual, wanted, 1.0)
        close(out, rms_norm_reference(residual, weight, 1e-5, 0.5), norm_ulps(dtype, dim))


@every_build
@every_dtype
@pytest.mark.parametrize("count", [0, 1, 7])
def test_embed(monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, count: int) -> None:
    use(monkeypatch, build)
    table = torch.randn(count, 33).to(dtype)
    ids = torch.randint(0, 15, (40,))  # the table holds 4 to 4 + count - 1
    out, want = poisoned(40, 33, dtype=dtype), poisoned(40, 33, dtype=dtype)
    embed(ids, table, 4, out)
    assert torch.equal(out, embed_reference(ids, table, 4, want))
    own = (ids >= 4) & (ids < 4 + count)
    assert torch.equal(out[own], table[ids[own] - 4]) and not out[~own].any()
    assert not zero_(out[1:]).any() and torch.equal(out[:1], want[:1])


@every_build
@every_dtype
@pytest.mark.parametrize(("heads", "dim", "rot"), [(1, 2, 2), (3, 20, 12), (4, 64, 64), (2, 128, 128)])
def test_rope(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, heads: int, dim: int, rot: int
) -> None:
    use(monkeypatch, build)
    angles = torch.randn(50, rot // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    x = torch.randn(9, heads + 2, dim).to(dtype)
    positions = torch.randint(0, 50, (9,), dtype=torch.int32)
    want = x.clone()
    rope_reference_(want[:, 1:-1], cos_sin, positions)
    rope_(x[:, 1:-1], cos_sin, positions)
    close(x, want)
    assert torch.equal(x[:, 0], want[:, 0]) and torch.equal(x[..., rot:], want[..., rot:])


@every_build
@every_dtype
def test_write_kv_skips_what_has_no_slot(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype
) -> None:
    use(monkeypatch, build)
    kv = torch.randn(300, 6, 10).to(dtype)
    slots = torch.randperm(77 * 4, dtype=torch.int32)[:300]
    slots[::7] = -1
    pools = [poisoned(77, 4, 2, 10, dtype=dtype) for _ in range(4)]
    write_kv(kv[:, 1:3], kv[:, 4:], pools[0], pools[1], slots)
    write_kv_reference(kv[:, 1:3], kv[:, 4:], pools[2], pools[3], slots)
    for got, want in zip(pools[:2], pools[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_build
@every_dtype
@pytest.mark.parametrize(("rows", "inner"), [(0, 4), (1, 1), (3, 37), (70, 1408)])
def test_silu_mul(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, rows: int, inner: int
) -> None:
    use(monkeypatch, build)
    both = (torch.randn(rows, 2 * inner + 1) * 20).to(dtype)[:, : 2 * inner]
    out = poisoned(rows, inner + 3, dtype=dtype)
    silu_mul(both, out=out[:, :inner])
    if rows:
        want = silu_mul_reference(both)
        torch.testing.assert_close(
            out[:, :inner].float(), want.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-30
        )
    assert out[:, inner:].isnan().all()


@every_build
@pytest.mark.parametrize("n", [1, 7, 64, 129, 1000])
def test_draw(monkeypatch: pytest.MonkeyPatch, build: str, n: int) -> None:
    use(monkeypatch, build)
    scores = torch.randn(40, n + 3).round(decimals=1)[:, :n]  # with ties
    scores[3] = -torch.inf
    scores[4, n // 2] = torch.inf
    scores[5:9, torch.randint(0, n, (2,))] = torch.nan
    got, want = draw(scores, 70), draw_reference(scores, 70)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    temperature = torch.rand(40) + 0.1
    temperature[::3] = 0
    keys = torch.randint(-(2**31), 2**31, (40, 2), dtype=torch.int32)
    got, want = (f(scores, 70, temperature, keys) for f in (draw, draw_reference))
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(got[1], want[1])  # Gumbel noise has no ties worth the name
    torch.testing.assert_close(got[:, ::3], draw(scores, 70)[:, ::3], rtol=0, atol=0, equal_nan=True)


@every_build
def test_noise_of_draw(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """One column a row: the noise itself, also where float32 has few digits left."""
    use(monkeypatch, build)
    rows = 1 << 17
    keys = torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int32)
    noise = draw(torch.zeros(rows, 1), 5, torch.ones(rows), keys)[0]
    want = gumbel(keys, torch.tensor([5], dtype=torch.int32))[:, 0]
    assert want.max() > 10 and want.min() < -2
    torch.testing.assert_close(noise, want, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-6)
