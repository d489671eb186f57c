"""Paged attention against the reference: every build, mixed batches, windows, gaps, odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from weaveinf.ops.attention import Paged, paged_attention, paged_attention_reference

# (positions of each sequence's rows): decode, prefill, chunks, gaps, nothing at all, mixed.
DECODE = [[0], [5], [1700], [63], [64]]
PREFILL = [list(range(150)), [0, 1]]
MIXED = [[300], list(range(100, 217)), [], [17], [3, 9, 10, 250], list(range(65))]
# (query heads, KV heads, head size, page size)
SHAPES = [(4, 1, 64, 16), (8, 2, 32, 5), (16, 1, 80, 32), (5, 1, 24, 7), (12, 2, 96, 1), (3, 3, 7, 3)]
NOWHERE = 10**6
"""A page that no pool has: what no row reads need not be there."""


class Case:
    """Random queries over pages in random order; NaN in every slot that no row reads.

    rows: the positions of each sequence's rows.
    """

    def __init__(
        self,
        rows: list[list[int]],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        heads, kv_heads, dim, page = shape
        read = []  # per sequence: its positions that are read
        for at in rows:
            seen = torch.zeros(at[-1] + 1 if at else 0, dtype=torch.bool)
            for end in at:
                seen[0 if window is None else max(0, end + 1 - window) : end + 1] = True
            read.append(seen.nonzero().flatten())
        owned = [(seen // page).unique() for seen in read]
        count = sum(map(len, owned))
        order = iter(torch.randperm(count + 3).to(torch.int32).split(1))
        longest = max(int(pages[-1]) + 1 if len(pages) else 0 for pages in owned)
        self.table = torch.full((len(rows), longest + 2), NOWHERE, dtype=torch.int32)
        self.pools = [poisoned(count + 3, page, kv_heads, dim, dtype=dtype) for _ in range(2)]
        self.window, self.page, self.heads = window, page, heads
        self.scale = dim**-0.5  # scores of about 1: an error in a large one is multiplied by exp
        for s, seen in enumerate(read):
            for number in owned[s]:
                self.table[s, number] = next(order)
            for pool in self.pools:
                values = torch.randn(len(seen), kv_heads, dim).to(dtype)
                pool.view(-1, kv_heads, dim)[self.slots(s, seen)] = values
        self.positions = torch.tensor([p for at in rows for p in at], dtype=torch.int32)
        self.starts = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)
        self.q = torch.randn(len(self.positions), heads + 1, dim + 1).to(dtype)[:, :heads, :dim]

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        return self.table[sequence, positions // self.page].long() * self.page + positions % self.page

    def want(self) -> Tensor:
        """The reference reads whole pages, up to the last row: they get numbers."""
        pools = (pool.nan_to_num() for pool in self.pools)
        table = self.table.where(self.table != NOWHERE, 0)
        paged = Paged(table, self.starts, self.positions)
        return paged_attention_reference(self.q, tuple(pools), paged, self.scale, self.window)

    def got(self) -> Tensor:
        out = poisoned(len(self.q), self.heads + 2, self.q.shape[2], dtype=self.q.dtype)
        view = out[:, : self.heads]
        paged = Paged(self.table, self.starts, self.positions)
        result = paged_attention(self.q, tuple(self.pools), paged, self.scale, self.window, view)
        assert result is view
        assert out[:, self.heads :].isnan().all()
        return view

    def check(self) -> None:
        self.close(self.got(), self.want())

    def close(self, got: Tensor, want: Tensor) -> None:
        """bfloat16: its rounding. float32: of sums of values, which may cancel."""
        if got.dtype == torch.float32:
            close(got, want, 8, float(self.pools[1].nan_to_num(posinf=0).abs().max()))
        else:
            close(got, want, 1.5)


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_attention(
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    dtype: torch.dtype,
    rows: list[list[int]],
    shape: tuple[int, int, int, int],
    window: int | None,
) -> None:
    use(monkeypatch, build)
    threads = 1 if window == 1 else 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(len(rows))
    Case(rows, shape, dtype, window).check()


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 128, 16), (2, 1, 20, 64), (7, 1, 16, 3), (6, 2, 256, 16)])
@pytest.mark.parametrize("rows", [[[2999]], [list(range(2990, 3000))], [[700, 2500, 2999], [1]]])
def test_few_rows_of_a_long_context_are_shared_by_threads(
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rows: list[list[int]],
) -> None:
    use(monkeypatch, build)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    torch.manual_seed(1)
    Case(rows, shape, dtype).check()


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("at", [20, 21])
@pytest.mark.parametrize("heads", [3, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_rows_that_read_a_value_see_it(
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    bad: float,
    window: int | None,
    at: int,
    heads: int,
    dtype: torch.dtype,
) -> None:
    """A slot's NaN or infinity reaches the rows from its position on, while it is in their window. With 32
    heads all lanes are of one row, so nothing is masked."""
    use(monkeypatch, build)
    torch.manual_seed(2)
    case = Case([list(range(40))], (heads, 1, 20, 8), dtype, window)
    want = case.want()
    case.pools[1].view(-1, 1, 20)[case.slots(0, torch.tensor([at]))] = bad
    got = case.got()
    reach = torch.zeros(40, dtype=torch.bool)
    reach[at : 40 if window is None else at + window] = True
    case.close(got[~reach], want[~reach])
    assert not got[reach].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [[[5, 6, 900, 905]], [list(range(30)), [50, 400, 401, 1300]]])
def test_pages_between_the_windows_of_rows_are_not_touched(
    monkeypatch: pytest.MonkeyPatch, build: str, rows: list[list[int]]
) -> None:
    use(monkeypatch, build)
    torch.manual_seed(3)
    case = Case(rows, (4, 2, 16, 8), torch.bfloat16, window=16)
    assert (case.table == NOWHERE).sum() > 2 * len(rows)
    case.check()


def test_no_rows_and_no_sequences() -> None:
    case = Case([[], []], (4, 2, 16, 8), torch.float32)
    assert case.got().shape == (0, 4, 16)
    case = Case([[3]], (4, 2, 16, 8), torch.float32)
    none = torch.zeros(1, dtype=torch.int32)
    paged = Paged(case.table[:0], none, none[:0])
    assert paged_attention(case.q[:0], tuple(case.pools), paged, 1.0).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_an_output_of_its_own_has_the_dtype_of_q(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    case = Case([[7], [1, 2]], (4, 2, 16, 8), dtype)
    pools = tuple(pool.nan_to_num() for pool in case.pools)
    paged = Paged(case.table.where(case.table != NOWHERE, 0), case.starts, case.positions)
    got = paged_attention(case.q, pools, paged, case.scale)
    assert got.dtype == dtype and got.is_contiguous()
    case.close(got, case.want())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_heads_of_a_large_model_on_one_wide_key(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """More queries to a row than a task is to have: latent attention."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Case([[40, 41, 90]], (128, 1, 576, 16), dtype).check()
