"""Votes, the best of them, and attention over what was chosen, against their references: every build, odd
sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from weaveinf.ops import native, select
from weaveinf.ops.attention import Paged, paged_attention_reference

# (query heads, KV heads, head size, page size)
SHAPES = [(4, 1, 64, 16), (8, 8, 32, 5), (14, 2, 128, 16), (16, 1, 80, 32), (12, 4, 96, 1), (3, 3, 16, 3)]
SPANS = [(0, 1), (3, 3), (0, 700), (128, 2500), (5, 64), (17, 4200)]


def paged(
    spans: list[tuple[int, int]], kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys in pages in random order, NaN in slots before and behind each row's span; and the tables."""
    counts = [-(-end // page) for _, end in spans]
    order = torch.randperm(sum(counts)).to(torch.int32)
    pool = poisoned(len(order), page, kv_heads, dim, dtype=dtype)
    table = torch.zeros(len(spans), max(counts), dtype=torch.int32)
    at = 0
    for r, (first, end) in enumerate(spans):
        table[r, : counts[r]] = order[at : at + counts[r]]
        at += counts[r]
        where = torch.arange(first, end)
        slots = table[r, where // page].long() * page + where % page
        pool.view(-1, kv_heads, dim)[slots] = torch.randn(end - first, kv_heads, dim).to(dtype)
    return pool, table


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_votes(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    use(monkeypatch, build)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.manual_seed(1)
    heads, kv_heads, dim, page = shape
    pool, table = paged(SPANS, kv_heads, dim, page, dtype)
    firsts, ends = torch.tensor(SPANS, dtype=torch.int32).T.contiguous()
    width = int(ends.max()) + 3
    q = torch.randn(len(SPANS), heads + 2, dim).to(dtype)[:, 1:-1]
    given_ = (table, firsts, ends), width, dim**-0.5, None, True
    got = select.votes(q, pool, *given_)
    clean = pool.nan_to_num()
    want = select.votes_reference(q.double(), clean.double(), *given_)
    outside = want.isinf()
    assert torch.equal(got.isinf(), outside)
    # exp multiplies a score's error, which is of its own sum of `dim` products
    close(got.masked_fill(outside, 0), want.masked_fill(outside, 0).float(), 64, 1.0)
    assert torch.allclose(
        got.masked_fill(outside, 0).sum(-1)[2:], torch.full((4, kv_heads), heads / kv_heads), rtol=1e-4
    )


@needs_kernels
def test_a_score_that_is_no_number_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    pool, table = paged([(0, 90)], 2, 32, 16, torch.float32)
    pool.view(-1, 2, 32)[table[0, 1] * 16 + 3, 1] = torch.nan
    q = torch.randn(1, 4, 32)
    where = table, torch.zeros(1, dtype=torch.int32), torch.tensor([90], dtype=torch.int32)
    given_ = q, pool, where, 90, 1.0, None, True
    got, want = select.votes(*given_), select.votes_reference(*given_)
    assert got[0, 1, 19] == want[0, 1, 19] == 0
    close(got, want, 64, 1.0)


def brute(scores: list[float], end: int, k: int) -> list[int]:
    clean = [float("-inf") if x != x else x for x in scores[:end]]
    return sorted(sorted(range(end), key=lambda i: (-clean[i], i))[:k])


@needs_kernels
@given(st.data())
def test_top_k_is_brute_force(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 400))
    value = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32))
    scores = data.draw(st.lists(value, min_size=width, max_size=width))
    end, wanted = data.draw(st.integers(0, width)), data.draw(st.integers(0, width))
    capacity = wanted + data.draw(st.integers(0, 3))
    rows = torch.tensor([scores, [0.0] * width], dtype=torch.float32)
    ends = torch.tensor([end, width], dtype=torch.int32)
    k = torch.tensor([wanted, wanted], dtype=torch.int32)
    for choose in (select.top_k, select.top_k_reference):
        index, counts = choose(rows, ends, k, capacity)
        want = brute(rows[0].tolist(), end, wanted)
        assert counts.tolist() == [len(want), wanted]
        assert index[0].tolist() == want + [-1] * (capacity - len(want))
        assert index[1, :wanted].tolist() == list(range(wanted))  # ties: the lowest


@needs_kernels
@pytest.mark.parametrize("width", [5000, 131072])
@pytest.mark.parametrize("k", [1, 256, 2048])
def test_top_k_of_many(width: int, k: int) -> None:
    torch.manual_seed(3)
    scores = (torch.randn(3, width) * 8).to(torch.bfloat16).float()  # many ties
    ends = torch.tensor([width, width - 7, 300], dtype=torch.int32)
    wanted = torch.full((3,), k, dtype=torch.int32)
    got, want = select.top_k(scores, ends, wanted, k), select.top_k_reference(scores, ends, wanted, k)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("kernels", [True, False])
def test_attention_by_head_reads_what_was_chosen(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    if not kernels:
        monkeypatch.setattr(native, "lib", None)
    torch.manual_seed(4)
    heads, kv_heads, dim, page = 8, 2, 32, 16
    keys, table = paged([(0, 300), (0, 77)], kv_heads, dim, page, torch.float32)
    values = torch.randn_like(keys)
    q = torch.randn(2, heads, dim)
    counts = torch.tensor([[40, 12], [1, 77]], dtype=torch.int32)
    index = torch.full((2, kv_heads, 77), -1, dtype=torch.int32)
    for r, length in enumerate((300, 77)):
        for g in range(kv_heads):
            n = int(counts[r, g])
            index[r, g, :n] = torch.randperm(length)[:n].sort().values.int()
    places = select.places(index, table, page)
    assert torch.equal(places, select.places_reference(index, table, page))
    slots = places // kv_heads
    out = torch.full_like(q, torch.nan)
    select.attend_by_head(q, keys, values, places, counts, 0.3, out)
    for r in range(2):
        for head in range(heads):
            g = head // (heads // kv_heads)
            chosen = slots[r, g, : counts[r, g]].long()
            k, v = (pool.view(-1, kv_heads, dim)[chosen, g].double() for pool in (keys, values))
            want = (k @ q[r, head].double() * 0.3).softmax(0) @ v
            close(out[r, head], want.float(), 8, float(v.abs().max()))


def test_all_tokens_are_dense_attention() -> None:
    torch.manual_seed(5)
    pool, table = paged([(0, 130)], 2, 32, 16, torch.float32)
    values = torch.randn_like(pool)
    pool = pool.nan_to_num()
    q = torch.randn(3, 4, 32)
    positions = torch.tensor([127, 128, 129], dtype=torch.int32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    slots = select.places(torch.arange(130, dtype=torch.int32)[None, None], table, 16)[0]
    chosen = Paged(slots, starts, positions)
    got = select.attend(q, pool, values, chosen, 0.2, torch.full_like(q, torch.nan))
    want = paged_attention_reference(q, (pool, values), Paged(table, starts, positions), 0.2)
    close(got, want, 8, 4.0)


@needs_kernels
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.sampled_from([1, 2, 8]), st.integers(0, 99)
)
def test_places(rows: int, kv_heads: int, count: int, run: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(rows * 7, generator=generator).to(torch.int32).view(rows, 7)
    index = torch.randint(-1, 7 * 8 // run, (rows, kv_heads, count), generator=generator).int()
    assert torch.equal(select.places(index, table, 8, run), select.places_reference(index, table, 8, run))


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_beside_the_keys(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype
) -> None:
    use(monkeypatch, build)
    torch.manual_seed(6)
    keys = torch.randn(9, 16, 3, 24).to(dtype)
    pages, counts = torch.tensor([7, 0, 4]), torch.tensor([16, 1, 9])
    rows = torch.randn(5, 7, 24).to(dtype)[:, 2:5]
    channels = torch.stack([torch.randperm(24)[:6] for _ in range(3)]).int()
    slots = torch.tensor([17, -1, 143, 0, 5], dtype=torch.int32)
    written = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "lib", None)
        bounds, pool = poisoned(9, 3, 48, dtype=dtype), poisoned(9, 16, 3, 6, dtype=dtype)
        select.write_bounds(keys, bounds, pages, counts)
        select.write_channels(rows, pool, channels, slots)
        assert int((~bounds.isnan().flatten(1).any(1)).sum()) == 3
        assert int((~pool.isnan().flatten(0, 1).flatten(1).any(1)).sum()) == 4
        written.append((bounds.nan_to_num(), pool.nan_to_num()))
    assert torch.equal(written[0][0], written[1][0])
    assert torch.equal(written[0][1], written[1][1])


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_votes_of_some_channels_and_of_bounds(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype
) -> None:
    use(monkeypatch, build)
    torch.manual_seed(7)
    pool, table = paged([(0, 300), (9, 40)], 2, 32, 16, dtype)
    firsts, ends = torch.tensor([[0, 300], [9, 40]], dtype=torch.int32).T.contiguous()
    channels = torch.stack([torch.randperm(64)[:32] for _ in range(2)]).int()
    for width, chosen, soft in ((64, channels, True), (16, None, True), (16, None, False)):
        q = torch.randn(2, 6, width).to(dtype)
        given_ = (table, firsts, ends), 300, 0.2, chosen, soft
        got = select.votes(q, pool, *given_)
        want = select.votes_reference(q.double(), pool.nan_to_num().double(), *given_)
        size = 1.0 if soft else float(want.nan_to_num(posinf=9).abs().max())
        close(got.nan_to_num(posinf=9), want.nan_to_num(posinf=9).float(), 64, size)
