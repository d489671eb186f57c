"""The indexer's scores and choices against their definition; eight-bit keys; ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from tests.selectors.oracle import chosen
from weaveinf.ops import index, select
from weaveinf.ops.index import IndexKeys

PAGE, DIM, HEADS, TOP_K = 4, 16, 5, 7
LENGTHS = ((30, 30), (9, 1), (7, 7), (41, 3))
"""Of each sequence: its tokens, and how many of them are rows."""


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [*DTYPES, index.FP8])
@pytest.mark.parametrize(("heads", "dim", "page"), [(1, 16, 1), (5, 80, 3), (32, 64, 16), (64, 128, 64)])
def test_scores(
    monkeypatch: pytest.MonkeyPatch, build: str, dtype: torch.dtype, heads: int, dim: int, page: int
) -> None:
    """Against float64; rows of many lengths in scrambled pages, NaN wherever none is."""
    use(monkeypatch, build)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.manual_seed(6)
    ends = torch.tensor([0, 1, 700, 33, 2600], dtype=torch.int32)
    pages = -(-2600 // page)
    table = torch.randperm(len(ends) * pages).int().view(len(ends), pages)
    pool = poisoned(table.numel() + 1, page, dim, dtype=torch.float32)
    for r, end in enumerate(ends.tolist()):
        at = torch.arange(end)
        pool.view(-1, dim)[table[r, at // page].long() * page + at % page] = torch.randn(end, dim)
    q = torch.randn(len(ends), heads + 2, dim)[:, 1:-1]
    weights = torch.randn(len(ends), heads)
    keys = IndexKeys(*index.quantize(pool)) if dtype == index.FP8 else IndexKeys(pool.to(dtype))
    q = q if dtype == index.FP8 else q.to(dtype)
    got = index.scores(q, weights, keys, table, ends, 2603)
    for r, end in enumerate(ends.tolist()):
        at = torch.arange(end)
        own = keys.at(table[r, at // page] * page + at % page).double()
        want = weights[r].double() @ (q[r].double() @ own.t()).relu()
        close(got[r, :end], want, 16, float(want.abs().max()) if end else 1.0)


def test_what_is_no_number_stays_none() -> None:
    q, weights = torch.full((1, 2, 16), torch.nan), torch.ones(1, 2)
    where = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert index.scores(q, weights, IndexKeys(torch.randn(1, 4, 16)), *where, 3).isnan().all()


class Case:
    """Sequences in scrambled pages, NaN in slots that none has."""

    def __init__(self, whole: bool = False) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randint(-1, 2, shape).float() if whole else torch.randn(shape)

        pages = [-(-tokens // PAGE) for tokens, _ in LENGTHS]
        order = torch.randperm(sum(pages) + 2).int()
        pool = torch.full((len(order), PAGE, DIM), torch.nan)
        self.table = torch.zeros(len(LENGTHS), max(pages) + 1, dtype=torch.int32)
        self.slots = []
        at = 0
        for s, (tokens, _) in enumerate(LENGTHS):
            self.table[s, : pages[s]] = order[at : at + pages[s]]
            at += pages[s]
            where = torch.arange(tokens)
            self.slots.append(self.table[s, where // PAGE].long() * PAGE + where % PAGE)
            pool.view(-1, DIM)[self.slots[-1]] = random(tokens, DIM)
        self.keys = IndexKeys(pool)
        self.starts = torch.tensor([0, *(rows for _, rows in LENGTHS)]).cumsum(0).int()
        self.positions = torch.cat([torch.arange(t - r, t) for t, r in LENGTHS]).int()
        self.q = random(len(self.positions), HEADS, DIM)
        self.weights = random(len(self.positions), HEADS)

    def got(self) -> tuple[Tensor, Tensor]:
        """Twice as much room as there are pages, so that nothing ends where it may."""
        seq = torch.repeat_interleave(torch.arange(len(LENGTHS)), self.starts.diff().long())
        ends = self.positions + 1
        width = 2 * int(ends.max())
        return index.choose(self.q, self.weights, self.keys, self.table[seq], ends, width, TOP_K)

    def want(self) -> list[list[int]]:
        found = []
        for s, slots in enumerate(self.slots):
            for r in range(int(self.starts[s]), int(self.starts[s + 1])):
                keys = self.keys.at(slots[: int(self.positions[r]) + 1])
                found.append(chosen(self.q[r].double(), self.weights[r].double(), keys.double(), TOP_K))
        return found

    def check(self) -> None:
        got, counts = self.got()
        for row, count, want in zip(got.tolist(), counts.tolist(), self.want(), strict=True):
            assert row == want + [-1] * (TOP_K - len(want)) and count == len(want)


@pytest.mark.parametrize("floats", [1 << 24, 200])
def test_the_best_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, floats: int) -> None:
    monkeypatch.setattr(select, "_FLOATS", floats)
    torch.manual_seed(1)
    Case().check()


def test_of_equals_the_first_are_taken() -> None:
    torch.manual_seed(2)
    for _ in range(5):
        case = Case(whole=True)  # few different scores, all exact
        case.check()
        assert all(map(torch.equal, case.got(), case.got()))


def test_eight_bit_keys_are_chosen_as_what_they_stand_for() -> None:
    torch.manual_seed(3)
    case = Case()
    values, scales = index.quantize(index.hadamard(case.keys.values.nan_to_num()))
    exact, rounded = case.keys.values.nan_to_num(), values.float() * scales.unsqueeze(-1)
    assert values.dtype == index.FP8
    torch.testing.assert_close(index.hadamard(rounded), exact, rtol=0, atol=0.2)
    case.keys = IndexKeys(values, scales)
    case.check()
    assert index.quantize(torch.zeros(3, DIM))[0].float().abs().max() == 0


def test_the_hadamard_rotation_keeps_products() -> None:
    torch.manual_seed(4)
    a, b = torch.randn(2, 9, 64)
    torch.testing.assert_close(index.hadamard(a) @ index.hadamard(b).T, a @ b.T)
    torch.testing.assert_close(index.hadamard(torch.eye(4)).abs(), torch.full((4, 4), 0.5))


def test_candidates_of_a_row_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_FLOATS", 30)
    torch.manual_seed(5)
    case, rows, n = Case(), 11, 13
    slots = torch.cat(case.slots)[torch.randint(0, 80, (rows, n))].int()
    ends = torch.randint(1, n + 1, (rows,), dtype=torch.int32)
    mine = case.q[:rows], case.weights[:rows], case.keys.single
    got, counts = index.choose(*mine, slots, ends, n, TOP_K)
    for r in range(rows):
        own = case.keys.at(slots[r, : ends[r]])
        want = chosen(case.q[r], case.weights[r], own, TOP_K)
        assert got[r, : counts[r]].tolist() == want
