"""A subset of a batch's rows is again a batch."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec, bytes_per_page


def batch_of(lengths: list[int], wanted: list[int]) -> Batch:
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Batch(
        input_ids=torch.arange(100, 100 + total),
        positions=torch.cat([torch.arange(7, 7 + n) for n in lengths]).int(),
        slot_mapping=torch.arange(total).int() * 3,
        cu_seqlens_q=bounds.int(),
        seq_lens=torch.tensor(lengths).int() + 7,
        num_prompt_tokens=torch.tensor(lengths).int(),
        block_table=torch.zeros(len(lengths), 4, dtype=torch.int32),
        state_slot=torch.arange(len(lengths)).int(),
        logit_rows=torch.tensor(wanted, dtype=torch.int64),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rows = st.lists(st.integers(0, sum(lengths) - 1), unique=True).map(sorted)
    return lengths, draw(rows), draw(rows)


@given(cases())
def test_take_keeps_each_row_in_its_sequence(case: tuple[list[int], list[int], list[int]]) -> None:
    lengths, wanted, rows = case
    whole = batch_of(lengths, wanted)
    part = whole.take(torch.tensor(rows, dtype=torch.int64))
    assert part.num_tokens == len(rows) and part.num_seqs == len(lengths)
    assert part.input_ids.tolist() == [100 + row for row in rows]
    assert part.positions.tolist() == [whole.positions[row].item() for row in rows]
    assert part.slot_mapping.tolist() == [3 * row for row in rows]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert part.cu_seqlens_q.tolist() == [0, *[sum(row < end for row in rows) for end in ends]]
    assert [rows[i] for i in part.logit_rows] == [row for row in rows if row in wanted]
    assert whole.take(whole.logit_rows).logit_rows.tolist() == list(range(len(wanted)))


def test_pools_are_addressed_by_one_page_table() -> None:
    specs = [
        PoolSpec("key", (2, 8), torch.bfloat16, layers=3),
        PoolSpec("bounds", (2,), torch.float32, layers=1, per="page"),
    ]
    pools = Pools(specs, num_pages=5, page_size=4, device=torch.device("cpu"))
    assert [tuple(t.shape) for t in pools["key"]] == [(5, 4, 2, 8)] * 3
    assert [tuple(t.shape) for t in pools["bounds"]] == [(5, 2)]
    assert bytes_per_page(specs, 4) == (3 * 4 * 16 * 2 + 2 * 4, 0)
    specs[0] = replace(specs[0], host=range(1, 3))
    assert bytes_per_page(specs, 4) == (4 * 16 * 2 + 2 * 4, 2 * 4 * 16 * 2)
    pools.occupy()
    pools["key"][0].fill_(9)
    assert not pools["key"][1].any() and not pools["bounds"][0].any()


def test_memory_is_taken_when_it_is_written_or_at_once() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    size, before = 64 << 20, resident()
    pools = Pools([PoolSpec("key", (1024,), torch.float32, layers=2)], size >> 16, 16, torch.device("cpu"))
    assert pools["key"][0].nbytes == size and resident() < before + size // 2
    pools.occupy()
    assert resident() > before + 2 * size * 0.9
