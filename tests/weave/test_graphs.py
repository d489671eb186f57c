"""Decode steps padded to a graph's shape. The graphs themselves: tests/gpu/test_graphs.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf.cache.batch import Batch
from weaveinf.comm.ranks import Ranks
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.weave import graphs
from weaveinf.weave.graphs import StaticHalves

CPU = torch.device("cpu")


def test_few_shapes_serve_all_rows() -> None:
    served = [graphs.padded(rows) for rows in range(1, 257)]
    assert all(rows <= more <= rows * 1.25 or rows < 8 for rows, more in enumerate(served, 1))
    assert served == sorted(served)
    assert len(set(served)) <= graphs.RESIDENT


def decode_step(rows: int, context: int) -> Batch:
    """A token of each of `rows` sequences behind `context` cached ones, each in pages of its own."""
    blocks = -(-(context + 1) // PAGE_SIZE)
    table = torch.randperm(rows * blocks, dtype=torch.int32).view(rows, blocks)
    at = torch.full((rows,), context, dtype=torch.int32)
    return Batch(
        input_ids=torch.arange(rows) + 3,
        positions=at,
        slot_mapping=table[:, context // PAGE_SIZE] * PAGE_SIZE + context % PAGE_SIZE,
        cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=at + 1,
        num_prompt_tokens=at,
        block_table=table,
        state_slot=torch.arange(rows, dtype=torch.int32),
        logit_rows=torch.arange(rows),
    )


def rehearsed(ranks: Ranks, path: str, rows: int, cut: int) -> list[Any]:
    """A decode step as it is and padded, on filled pages: the rows, and whether the pages stay the same."""
    config = EngineConfig(
        model=path, dtype="float32", kv_cache_gib=0.01, max_num_seqs=32, max_num_batched_tokens=64, weave="on"
    )
    worker = Worker(config, ranks)
    with torch.inference_mode():
        torch.manual_seed(rows)
        pages = [layer.normal_() for name in ("key", "value") for layer in worker.pools[name]]
        halves = decode_step(rows, 20).split(cut)
        want = worker.weaver._run(halves).clone()
        before = [layer.clone() for layer in pages]
        static = StaticHalves(*graphs.shape(halves, 64), CPU)
        for _ in range(2):  # what a fuller step left in it does not matter
            static.fill(decode_step(static.halves[0].num_seqs, 30).split(cut))
            static.fill(halves)
            got = worker.weaver._run(static.halves)[:rows].clone()
    same = all(map(torch.equal, pages, before))
    worker.close()
    return [want, got, same, graphs.is_decode(halves)]


@pytest.mark.parametrize(("rows", "cut"), [(3, 1), (9, 4), (17, 8), (31, 16)])
def test_padding_changes_no_row_and_no_page(tmp_path: Path, rows: int, cut: int) -> None:
    make_checkpoint(tmp_path, "llama")
    for want, got, same, decode in pool(2).run(rehearsed, str(tmp_path), rows, cut):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert same and decode


def test_only_decode_steps_are_replayed() -> None:
    decode = decode_step(4, 10)
    assert graphs.is_decode([decode]) and graphs.is_decode(decode.split(2))
    assert not graphs.is_decode([replace(decode, logit_rows=torch.arange(3))])
    assert not graphs.is_decode([replace(decode, seq_lens=decode.seq_lens[:2])])  # two of two rows each
