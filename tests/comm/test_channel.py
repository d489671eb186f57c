"""The control channel: arrays of int64 from rank 0 to all others, whole and in order."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.comm.second import second_ranks, store_port
from tests.ranks import pool
from weaveinf.comm.channel import GlooChannel, SharedChannel
from weaveinf.comm.ranks import Ranks

LONG = 3_000_017  # several times the ring


def lengths() -> list[int]:
    some = np.random.default_rng(7).integers(0, 300, 400).tolist()
    return [0, 1, 0, 524287, 524288, LONG, 5, *some, 400_000, 400_000, 0]


def talk(ranks: Ranks, port: int | None) -> None:
    with second_ranks(ranks, port) as group:
        assert type(group.control) is (SharedChannel if port is None else GlooChannel)
        random = np.random.default_rng(11)
        for length in lengths():
            message = random.integers(-(2**63), 2**63 - 1, length, dtype=np.int64)
            if ranks.rank == 0:
                group.control.send(message)  # runs ahead as far as there is room
            else:
                got = group.control.receive()
                assert got.dtype == np.int64 and np.array_equal(got, message)
    # In gloo when the interpreter ends, its thread would abort the process.
    assert "weaveinf-control" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("size", [2, 4])
def test_messages_arrive_whole_and_in_order_through_shared_memory(size: int) -> None:
    pool(size).run(talk, None)


def test_messages_arrive_whole_and_in_order_through_gloo() -> None:
    with store_port() as port:
        pool(2).run(talk, port)


def ahead(ranks: Ranks) -> float:
    """Rank 0 sends many before anyone looks; a vote says when."""
    import torch

    if ranks.rank == 0:
        for i in range(50):
            ranks.control.send(np.full(1000, i))
    ranks.votes.sum(torch.zeros(1))
    if ranks.rank == 0:
        return -1.0
    return float(np.mean([ranks.control.receive().mean() for _ in range(50)]))


def test_messages_wait_in_the_ring() -> None:
    assert pool(4).run(ahead) == [-1.0, 24.5, 24.5, 24.5]
