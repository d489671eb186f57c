"""Votes: float32 sums over ranks, in rank order, through shared memory and through gloo."""

from __future__ import annotations

import pytest
import torch

from tests.comm.second import second_ranks, store_port
from tests.ranks import pool
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.votes import GlooVotes, SharedVotes

SHAPES = [(), (1,), (3, 5), (0,), (2, 0, 3), (16384,), (16385,), (7, 11111)]


def sums(ranks: Ranks, port: int | None) -> list[bytes]:
    with second_ranks(ranks, port) as group:
        assert type(group.votes) is (SharedVotes if port is None else GlooVotes)
        random = torch.Generator().manual_seed(5)
        results = []
        for shape in SHAPES * 3:
            parts = [torch.randn(shape, generator=random) for _ in range(ranks.size)]
            mine = parts[ranks.rank].clone()
            total = group.votes.sum(mine)
            expected = parts[0]
            for part in parts[1:]:
                expected = expected + part
            assert total.shape == torch.Size(shape) and torch.equal(total, expected)
            assert torch.equal(mine, parts[ranks.rank])
            results.append(total.numpy().tobytes())
        transposed = parts[ranks.rank].t()
        assert torch.equal(group.votes.sum(transposed), expected.t())
        return results


@pytest.mark.parametrize("size", [2, 4])
def test_sums_in_rank_order_through_shared_memory(size: int) -> None:
    results = pool(size).run(sums, None)
    assert all(one == results[0] for one in results)


def test_sums_in_rank_order_through_gloo() -> None:
    with store_port() as port:
        results = pool(2).run(sums, port)
    assert results[0] == results[1]


def test_one_rank_gets_its_own() -> None:
    t = torch.randn(3)
    assert torch.equal(Ranks.single(torch.device("cpu")).votes.sum(t), t)


def unequal(ranks: Ranks, port: int) -> None:
    with (
        second_ranks(ranks, port, library=True) as group,
        pytest.raises(RuntimeError, match="the ranks' steps differ"),
    ):
        group.votes.sum(torch.zeros(3 + ranks.rank))


def test_ranks_that_vote_on_different_things_are_told() -> None:
    with store_port() as port:
        pool(2).run(unequal, port)
