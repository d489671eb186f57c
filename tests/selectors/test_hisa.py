"""HISA against its definition: partial blocks, several sequences, chunks, recycled pages; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.harness import make_checkpoint
from tests.selectors.oracle import chosen
from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.ops import index
from weaveinf.ops.index import IndexKeys
from weaveinf.selectors.hisa import STAGED, Hisa, HisaSelector
from weaveinf.selectors.segments import RowFacts, segments
from weaveinf.selectors.selector import Heads, Index

PAGE, DIM, INDEX_HEADS, TOP_K = 16, 8, 6, 20
CPU = torch.device("cpu")


def selector(settings: Hisa) -> HisaSelector:
    heads = Heads(1, 4, 4, 8, range(4), 1, 8, torch.float32, CPU, Index(TOP_K, DIM, 1))
    return settings.make(heads, PAGE)


class Cached:
    """Index keys of sequences in scrambled pages, and what a selector made of them."""

    def __init__(self, settings: Hisa, pages: int = 64) -> None:
        self.selector = selector(settings)
        self.selector.bind(Pools(self.selector.pools, pages, PAGE, CPU))
        self.keys = IndexKeys(torch.full((pages, PAGE, DIM), torch.nan))
        self.free = torch.randperm(pages).tolist()
        self.tables: dict[int, list[int]] = {}
        self.written: dict[int, torch.Tensor] = {}

    def write(self, *chunks: tuple[int, int]) -> Batch:
        """A step with the next tokens, so many, of some sequences."""
        slots, positions = [], []
        for s, count in chunks:
            new, table = torch.randn(count, DIM) + torch.randn(DIM), self.tables.setdefault(s, [])
            before = self.written.get(s, torch.empty(0, DIM))
            self.written[s] = torch.cat([before, new])
            at = np.arange(len(before), len(before) + count)
            table += [self.free.pop() for _ in range(int(at[-1]) // PAGE + 1 - len(table))]
            positions.append(at)
            slots.append(np.array(table)[at // PAGE] * PAGE + at % PAGE)
            self.keys.values.view(-1, DIM)[slots[-1]] = new
        tables = [self.tables[s] for s, _ in chunks]
        width = max(map(len, tables))
        counts = [count for _, count in chunks]
        batch = Batch(
            input_ids=torch.zeros(sum(counts), dtype=torch.int64),
            positions=torch.from_numpy(np.concatenate(positions)).int(),
            slot_mapping=torch.from_numpy(np.concatenate(slots)).int(),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([len(self.written[s]) for s, _ in chunks], dtype=torch.int32),
            num_prompt_tokens=torch.zeros(len(chunks), dtype=torch.int32),
            block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
            state_slot=torch.arange(len(chunks), dtype=torch.int32),
            logit_rows=torch.arange(0),
        )
        self.selector.write_index(0, self.keys, batch)
        return batch

    def free_all(self) -> None:
        self.free += [page for table in self.tables.values() for page in table]
        self.tables, self.written = {}, {}

    def check(self, batch: Batch, sequences: list[int], settings: Hisa) -> int:
        """Every row that looks at blocks first chooses by definition; returns how many such rows it had."""
        facts = RowFacts.of(batch, self.selector.budgets.of_slot)
        staged = self.selector.kinds(facts)
        q, weights = torch.randn(len(staged), INDEX_HEADS, DIM), torch.randn(len(staged), INDEX_HEADS)
        found = [s for s in segments(batch, facts, staged) if s.kind == STAGED]
        for segment in found:
            rows = segment.rows
            assert segment.per_row is not None
            got, counts = self.selector.choose_among_blocks(
                0, q[rows], weights[rows], self.keys, segment.per_row
            )
            for i, r in enumerate(range(rows.start, rows.stop)):
                end = int(batch.positions[r]) + 1
                own = self.written[sequences[facts.seq[r]]][:end]
                want = chosen(q[r], weights[r], own, TOP_K, settings.block, settings.blocks)
                assert got[i].tolist() == want + [-1] * (TOP_K - len(want)) and counts[i] == len(want)
        return sum(segment.rows.stop - segment.rows.start for segment in found)


@pytest.mark.parametrize("settings", [Hisa(16, 2, 0), Hisa(32, 3, 0), Hisa(16, 5, 0)])
def test_blocks_then_tokens_are_those_of_the_definition(settings: Hisa) -> None:
    torch.manual_seed(2)
    cached = Cached(settings)
    looked = 0
    for step in ([(0, 150)], [(1, 77), (0, 9)], [(1, 31), (2, 130)], *[[(0, 1), (1, 1), (2, 1)]] * 20):
        looked += cached.check(cached.write(*step), [s for s, _ in step], settings)
    assert looked > 150


def test_a_recycled_page_has_no_memory() -> None:
    """As from scratch, whatever was in the pages, and however the tokens came."""
    torch.manual_seed(3)
    settings = Hisa(32, 2, 0)
    cached = Cached(settings, pages=18)
    for _ in range(4):
        for step in ([(0, 100)], [(0, 27), (1, 120)], [(0, 1), (1, 1)], [(1, 9)]):
            cached.check(cached.write(*step), [s for s, _ in step], settings)
        cached.free_all()


def test_as_many_blocks_as_there_are_choose_as_the_indexer_alone() -> None:
    torch.manual_seed(4)
    settings = Hisa(16, 10, 0)
    cached = Cached(settings)
    batch = cached.write((0, 144))  # as many as the blocks hold: no row looks at blocks first
    assert cached.check(batch, [0], settings) == 0
    # A row behind them, if it may look into all of its blocks, too.
    cached.selector.budgets.of_slot[0] = 16
    batch = cached.write((0, 1))
    facts = RowFacts.of(batch, cached.selector.budgets.of_slot)
    facts.budget[:] = 160
    (segment,) = segments(batch, facts, np.array([STAGED]))
    q, weights = torch.randn(1, INDEX_HEADS, DIM), torch.randn(1, INDEX_HEADS)
    rows = segment.per_row
    assert rows is not None
    got = cached.selector.choose_among_blocks(0, q, weights, cached.keys, rows)
    where = batch.block_table, batch.positions + 1, rows.longest
    want = index.choose(q, weights, cached.keys, *where, TOP_K)
    assert all(map(torch.equal, got, want))


def test_budgets_and_what_shapes_a_page() -> None:
    made = selector(Hisa(32, 4, 0))
    assert [made.budgets.resolved(asked) for asked in (None, 0, 64, 100)] == [128, 0, 64, 100]
    for asked in (63, 129):
        with pytest.raises(ValueError, match="must be 0 or 64 to 128"):
            made.budgets.resolved(asked)
    assert made.shape(1000, 128, 128) == b"" and made.shape(1000, 4096, 0) == b""
    assert made.shape(1000, 144, 128) != made.shape(1000, 144, 96) != b""
    assert made.shape(1000, 144, 100) == made.shape(1000, 144, 96)


def worker(path: Path, **settings: Any) -> Worker:
    config = EngineConfig(model=str(path), kv_cache_gib=0.01, max_num_seqs=8, **settings)
    return Worker(config, Ranks.single(CPU))


@pytest.mark.parametrize(
    ("family", "chosen", "words"),
    [
        ("llama", "hisa", "this model has none"),
        ("deepseek_v3", "hisa", "this model has none"),
        ("deepseek_v32", "quest", "this model caches latents"),
        ("deepseek_v3", "fasa", "this model caches latents"),
        ("glm_moe_dsa", "lazyllm", "this model caches latents"),
        ("mistral", "tokenselect", "cannot choose in a sliding window"),
        ("deepseek_v32", Hisa(24, 4, 0), "block=24 must be a multiple of 16"),
        ("deepseek_v32", Hisa(16, 1, 0), "blocks=1 must be at least 2"),
        ("deepseek_v32", Hisa(16, 1 << 27), "and at most 67108864"),
        ("glm_moe_dsa", Hisa(16, 2, 0), "at least 3"),
    ],
)
def test_what_is_refused(tmp_path: Path, family: str, chosen: Any, words: str) -> None:
    make_checkpoint(tmp_path, family, **({"index_topk": 40} if family == "glm_moe_dsa" else {}))
    with pytest.raises(ValueError, match=words):
        worker(tmp_path, selector=chosen)


def test_fp8_keys_need_an_indexer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    with pytest.raises(ValueError, match="has no indexer"):
        worker(tmp_path, index_keys="fp8")
