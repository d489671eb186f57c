"""Steps padded to a graph's shape. The graphs themselves: tests/gpu/test_graphs.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.harness import SMALL, UNINDEXED, Lockstep, make_checkpoint
from tests.ranks import pool
from weaveinf.cache.batch import Batch
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.weave import graphs
from weaveinf.weave.graphs import Graphs, StaticHalves
from weaveinf.weave.plan import cuts
from weaveinf.weave.run import run

CPU = torch.device("cpu")


def test_few_shapes_serve_all_rows() -> None:
    served = [graphs.padded(rows) for rows in range(1, 257)]
    assert all(rows <= more <= rows * 1.25 or rows < 8 for rows, more in enumerate(served, 1))
    assert served == sorted(served)
    assert len(set(served)) <= graphs.RESIDENT
    assert all(graphs.padded(rows) - rows < 64 for rows in range(1, 5000))


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
        want = worker.weaver._run(halves, (0, 0)).clone()
        before = [layer.clone() for layer in pages]
        static = StaticHalves(graphs.shape(halves, 64), CPU)
        for _ in range(2):  # what a fuller step left in it does not matter
            static.fill(decode_step(static.halves[0].num_seqs, 30).split(cut))
            static.fill(halves)
            got = static.wanted(worker.weaver._run(static.halves, (0, 0)), halves).clone()
    same = all(map(torch.equal, pages, before))
    worker.close()
    return [want, got, same, graphs.is_decode(halves)]


@pytest.mark.parametrize(("rows", "cut"), [(3, 1), (9, 4), (17, 8), (31, 16)])
def test_padding_changes_no_row_and_no_page(tmp_path: Path, rows: int, cut: int) -> None:
    make_checkpoint(tmp_path, "llama")
    for want, got, same, decode in pool(2).run(rehearsed, str(tmp_path), rows, cut):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert same and decode


class Rehearsal(Graphs):
    """Graphs whose capture only remembers what to run, for there is no GPU here."""

    def _capture(self, static: StaticHalves, ctas: tuple[int, int]) -> Any:
        x = torch.empty(sum(half.logit_rows.shape[0] for half in static.halves), SMALL["hidden_size"])
        return SimpleNamespace(
            static=static, x=x, graph=SimpleNamespace(replay=lambda: x.copy_(self._step(static.halves, ctas)))
        )


@pytest.fixture(scope="module", params=UNINDEXED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, request.param)
    return path


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_step_padded_gives_the_same_rows(family: Path, data: st.DataObject) -> None:
    """Prompts and answers, whole or cut anywhere: as they are, padded, captured, replayed."""
    most = 160
    with torch.inference_mode():
        one, other = (Lockstep(family, pages=1024) for _ in range(2))
        steps = [stepper(one, most), stepper(other, most)]
        kept = Rehearsal(steps[1], list, most, False, CPU)
        lengths = data.draw(st.lists(st.sampled_from([1, 1, 2, 3, 9, 30, 37]), min_size=1, max_size=4))
        wanted = [data.draw(st.sampled_from([0, 1, n])) for n in lengths]
        wanted[-1] = wanted[-1] if any(wanted) else 1
        before = data.draw(st.lists(st.sampled_from([0, 1, 20]), min_size=4, max_size=4))
        cut = data.draw(st.integers(0, sum(lengths) - 1))
        random = torch.Generator().manual_seed(sum(lengths))
        for turn in range(4):
            # Of the same shape, but with a row less where that may be: what was there does not matter.
            rows = [n - (turn == 3 and n > 8) for n in lengths]
            chunks = [
                (4 * turn + i, torch.randint(0, 61, (n,), generator=random).tolist(), min(w, n))
                for i, (n, w) in enumerate(zip(rows, wanted, strict=True))
            ]
            cached = [(4 * turn + i, [7] * n, 1) for i, n in enumerate(before[: len(rows)]) if n]
            found = []
            for ranks, plain, step in ((one, steps[0], steps[0]), (other, steps[1], kept.run)):
                if cached:
                    plain([ranks.batch(cached)], (0, 0))
                batch = ranks.batch(chunks)
                halves = batch.split(cut) if 0 < cut < batch.num_tokens else (batch,)
                assert kept.takes(halves)
                found.append(step(halves, (0, 0)).clone())
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert len(kept._kept) >= 1


def stepper(ranks: Lockstep, most: int) -> Callable[[Sequence[Batch], tuple[int, int]], torch.Tensor]:
    seams = [LocalSeam(most, ranks.config.hidden_size, ranks.dtype, CPU) for _ in range(2)]
    votes = Ranks.single(CPU).votes
    return lambda halves, ctas: run(ranks.models[0].chain, halves, seams, votes, ctas)


def test_which_steps_are_graphs() -> None:
    decode = decode_step(4, 10)
    assert graphs.is_decode([decode]) and graphs.is_decode(decode.split(2))
    some = replace(decode, logit_rows=torch.arange(3))
    assert not graphs.is_decode([some])
    assert not graphs.is_decode([replace(decode, seq_lens=decode.seq_lens[:2])])  # two of two rows each
    host_counts, all_there = (Graphs(None, list, 8192, host, CPU) for host in (True, False))  # type: ignore[arg-type]
    assert host_counts.takes([decode]) and not host_counts.takes([some])
    assert all_there.takes([some]) and not all_there.takes([replace(some, input_ids=torch.zeros(4096))])


@given(st.integers(1, 5000))
def test_steps_of_a_graph_have_one_plan(rows: int) -> None:
    kept = Graphs(None, list, 3000, False, CPU)  # type: ignore[arg-type]
    planned = kept.planned(rows)
    assert planned == rows if rows > graphs.MOST_ROWS else rows <= planned == kept.planned(planned)
    assert all(cut < rows for cut in cuts(planned, 16))


def test_a_graph_is_of_what_its_seams_are_given() -> None:
    halves = decode_step(9, 10).split(4)
    assert graphs.shape(halves, 64, (2, 8)) != graphs.shape(halves, 64, (8, 2))


def test_prompts_displace_no_decode_steps(family: Path) -> None:
    kept = Rehearsal(lambda halves, ctas: halves[0].input_ids[:, None].float(), list, 2048, False, CPU)

    def capture(static: StaticHalves, ctas: tuple[int, int]) -> Any:
        return SimpleNamespace(
            static=static, x=torch.zeros(4096, 1), graph=SimpleNamespace(replay=lambda: None)
        )

    kept._capture = capture  # type: ignore[method-assign]
    decode = decode_step(5, 10)
    prompts = [replace(decode_step(rows, 10), logit_rows=torch.tensor([0])) for rows in range(16, 800, 32)]
    for step in [decode, *prompts]:
        for _ in range(3):
            kept.run([step], (0, 0))
    assert len(kept._kept) == 1 + graphs.OTHERS and next(iter(kept._kept)).decode
