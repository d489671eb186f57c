"""Paged attention against the reference: every build, mixed batches, windows, gaps, odd sizes."""

from __future__ import annotations

import pytest
import torch

from tests.ops.builds import BUILDS, DTYPES, close, needs_kernels, poisoned, use
from weaveinf.ops.attention import paged_attention, paged_attention_reference

# (positions of each sequence's rows): decode, prefill, chunks, gaps, nothing at all, mixed.
DECODE = [[0], [5], [700], [63], [64]]
PREFILL = [list(range(150)), [0, 1]]
MIXED = [[300], list(range(100, 217)), [], [17], [3, 9, 10, 250], list(range(65))]
# (query heads, KV heads, head size, page size)
SHAPES = [(4, 1, 64, 16), (8, 2, 32, 5), (2, 2, 128, 32), (5, 1, 24, 7), (12, 2, 96, 1), (3, 3, 7, 3)]


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
    threads = 1 if window else 64  # 64: even few rows are cut in parts
    heads, kv_heads, dim, page = shape
    lengths = [at[-1] + 1 if at else 0 for at in rows]
    pages = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(pages) + 3).to(torch.int32)
    # Pages that no sequence owns, and slots past a sequence's end, must never count.
    pools = [poisoned(sum(pages) + 3, page, kv_heads, dim, dtype=dtype) for _ in range(2)]
    table = torch.full((len(rows), max(pages) + 2), 10**6, dtype=torch.int32)
    used = 0
    for s, length in enumerate(lengths):
        table[s, : pages[s]] = order[used : used + pages[s]]
        used += pages[s]
        for at in range(length):
            for pool in pools:
                pool[table[s, at // page], at % page] = torch.randn(kv_heads, dim).to(dtype)
    positions = torch.tensor([at for each in rows for at in each], dtype=torch.int32)
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)
    q = torch.randn(len(positions), heads + 1, dim + 1).to(dtype)[:, :heads, :dim]
    want = paged_attention_reference(
        q, *(p.nan_to_num() for p in pools), table, starts, positions, 0.3, window
    )
    out = poisoned(len(positions), heads + 2, dim, dtype=dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    paged_attention(q, *pools, table, starts, positions, 0.3, window, out[:, :heads])
    # float32: an error of a score of size 10 is ten times as large in its exponential.
    close(out[:, :heads], want, 100 if dtype == torch.float32 else 1.5)
    assert out[:, heads:].isnan().all()
