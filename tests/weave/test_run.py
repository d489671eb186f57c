"""Woven is whole: any cut of any batch gives the same rows and the same cache."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.comm.second import second_ranks, store_port
from tests.models.harness import FAMILIES, Lockstep, make_checkpoint
from tests.ranks import pool
from weaveinf.cache.batch import Batch
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint
from weaveinf.models.layers import Block
from weaveinf.weave.run import run

RANKS = Ranks.single(torch.device("cpu"))


@torch.inference_mode()
def logits(ranks: Lockstep, batch: Batch, cut: int) -> Tensor:
    model = ranks.models[0]
    seams = [LocalSeam(256, ranks.config.hidden_size, ranks.dtype, RANKS.device) for _ in range(2)]
    halves = batch.split(cut) if cut else (batch,)
    return model.head(run(model.chain, halves, seams, RANKS.votes))


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, request.param)
    return path, request.param


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_gives_the_same_logits(models: tuple[Path, str], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([1, 1, 2, 3, 9, 30, 61]), min_size=1, max_size=4))
    before = data.draw(st.lists(st.sampled_from([0, 1, 5, 20]), min_size=4, max_size=4))
    rows = sum(lengths)
    if rows < 2:
        lengths, rows = [2], 2
    cut = data.draw(
        st.sampled_from([1, rows - 1, lengths[0] if len(lengths) > 1 else 1, rows // 2, rows // 3 or 1])
    )
    wanted = [data.draw(st.integers(0, n)) for n in lengths]
    if not any(wanted):
        wanted[-1] = 1
    found = []
    for at in (0, cut):
        ranks = Lockstep(models[0], pages=128)
        generator = torch.Generator().manual_seed(rows)

        def tokens(n: int, generator: torch.Generator = generator) -> list[int]:
            return torch.randint(0, 61, (n,), generator=generator).tolist()

        for i, n in enumerate(before[: len(lengths)]):
            if n:
                logits(ranks, ranks.batch([(i, tokens(n), 1)]), 0)
        batch = ranks.batch([(i, tokens(n), w) for i, (n, w) in enumerate(zip(lengths, wanted, strict=True))])
        found.append(logits(ranks, batch, at))
        after = ranks.batch([(i, tokens(1), 1) for i in range(len(lengths))])
        found.append(logits(ranks, after, 0))  # reads what the halves cached
    for whole, woven in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(woven, whole, rtol=1e-4, atol=1e-4)


def test_a_half_may_be_left_without_rows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    ranks = Lockstep(tmp_path)
    batch = ranks.batch([(0, list(range(1, 20)), 1)])
    assert logits(ranks, batch, 18).shape[0] == 1
    torch.testing.assert_close(logits(ranks, batch, 3), logits(ranks, batch, 0), rtol=1e-4, atol=1e-4)


def asks_twice(log: list[tuple[int, str]], first: bool) -> Block:
    """A block that adds to its rows (of the tokens, if it is the first one) what the ranks vote together;
    `log` gets (rows, what it did)."""

    def block(x: Tensor, batch: Batch, out: Tensor) -> Generator[Tensor, Tensor, None]:
        rows = batch.num_tokens
        x = batch.input_ids[:, None].float() * torch.ones(8) if first else x
        total = x.sum(1)
        for turn in range(2):
            log.append((rows, f"asks {turn}"))
            total = yield total / 8
        out.copy_(x + total[:, None])
        log.append((rows, "done"))

    return block


def nine_rows() -> Batch:
    lengths = torch.tensor([9], dtype=torch.int32)
    return Batch(
        input_ids=torch.arange(9) + 1,
        positions=torch.arange(9, dtype=torch.int32),
        slot_mapping=torch.arange(9),
        cu_seqlens_q=torch.tensor([0, 9], dtype=torch.int32),
        seq_lens=lengths,
        num_prompt_tokens=lengths,
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        state_slot=torch.zeros(1, dtype=torch.int32),
        logit_rows=torch.tensor([0, 8]),
    )


def run_voting(ranks: Ranks, port: int | None) -> None:
    joint = Joint(torch.ones(8), 1e-5)
    batch = nine_rows()
    with second_ranks(ranks, port) as group:
        found, logs = [], []
        for cut in (0, 4):
            log: list[tuple[int, str]] = []
            chain = [(asks_twice(log, first), joint) for first in (True, False)]
            seams = [LocalSeam(9, 8, torch.float32, group.device) for _ in range(2)]
            halves = batch.split(cut) if cut else (batch,)
            found.append(run(chain, halves, seams, group.votes))
            logs.append(log)
    assert torch.equal(found[0], found[1]) and found[0].abs().sum() > 0
    turns = ["asks 0", "asks 1", "done"]
    assert logs[0] == [(9, turn) for turn in turns] * 2
    assert (
        logs[1] == [(rows, turn) for turn in turns for rows in (4, 5)] * 2
    )  # one half under the other's vote


def test_one_half_goes_on_while_the_other_votes() -> None:
    run_voting(RANKS, None)
    pool(2).run(run_voting, None)
    with store_port() as port:
        pool(2).run(run_voting, port)
