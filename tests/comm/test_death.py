"""A rank that is killed in the middle is noticed by all others, wherever they wait."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.comm.second import second_ranks, store_port
from tests.ranks import RankPool
from weaveinf.comm.aid import aid
from weaveinf.comm.choose import make_seam
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.errors import RankDied
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint
from weaveinf.comm.segment import SHM
from weaveinf.comm.shared import SharedSeam
from weaveinf.ops import native
from weaveinf.ops.linear import linear, pack

NOTICED_S = 5.0
"""Far below `silence_s`, which would end the wait as well, and far above the second it takes."""


def in_seam(ranks: Ranks) -> Callable[[], object]:
    seam = make_seam(ranks, 64, 32, torch.bfloat16)
    joint = Joint(torch.ones(32, dtype=torch.bfloat16), 1e-5)
    seam.open(64)
    seam.partial().zero_()

    def step() -> None:
        seam.start(joint)
        seam.finish()

    return step


def in_halves(ranks: Ranks) -> Callable[[], object]:
    """Two seams are under way at once, as in a woven step."""
    seams = [make_seam(ranks, 64, 32, torch.bfloat16) for _ in range(2)]
    joint = Joint(torch.ones(32, dtype=torch.bfloat16), 1e-5)
    for seam in seams:
        seam.open(64)
        seam.partial().zero_()

    def step() -> None:
        for seam in seams:
            seam.start(joint)
        for seam in seams:
            seam.finish()

    return step


def in_sums(ranks: Ranks) -> Callable[[], object]:
    """The same over TCP, on ranks that have compiled kernels."""
    with mock.patch.object(sys.modules[__name__], "make_seam", over_tcp):
        return in_halves(ranks)


def over_tcp(*arguments: Any) -> CollectiveSeam:
    return CollectiveSeam(*arguments, "the test wants it")


def in_product(ranks: Ranks) -> Callable[[], object]:
    """One of several ranks that wait for the tiles of the one that is killed."""
    seam = make_seam(ranks, 64, 32, torch.bfloat16)
    assert isinstance(seam, SharedSeam)
    with mock.patch.object(native, "onednn", False):  # whose products are not shared
        weight = pack(torch.ones(32, 16, dtype=torch.bfloat16))
    with mock.patch.object(os, "sched_getaffinity", return_value=range(8)):
        shared = aid(ranks, 64, [weight], [seam])
    assert shared is not None
    x = torch.ones(64, 16, dtype=torch.bfloat16)
    seam.open(64)
    return lambda: linear(x, weight, out=seam.partial())


def in_vote(ranks: Ranks) -> Callable[[], object]:
    return lambda: ranks.votes.sum(torch.ones(4))


def in_channel(ranks: Ranks) -> Callable[[], object]:
    return ranks.control.receive


def in_full_channel(ranks: Ranks) -> Callable[[], object]:
    """Rank 0 finds no room, since the killed one takes nothing any more."""
    if ranks.rank == 0:
        return lambda: ranks.control.send(np.zeros(100_000, dtype=np.int64))
    return ranks.control.receive


def die(
    ranks: Ranks, port: int | None, wait: Callable[[Ranks], Callable[[], object]], victim: int, folder: str
) -> None:
    with second_ranks(ranks, port, library=wait is in_sums) as group:
        step = wait(group)
        if wait is not in_channel:
            for _ in range(3):
                step()
        if ranks.rank == victim:
            time.sleep(0.3)  # the others wait, and sleep, by now
            Path(folder, "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                step()
        except RankDied as error:
            words = f"{time.monotonic()} {error.rank}"
    waiting = sum(thread.name == "weaveinf-seams" for thread in threading.enumerate())
    Path(folder, f"seen {ranks.rank}").write_text(f"{words} {waiting}")


@pytest.mark.parametrize(
    ("wait", "victim", "gloo"),
    [
        (in_seam, 1, False),
        (in_product, 1, False),
        (in_vote, 0, False),
        (in_channel, 2, False),
        (in_full_channel, 1, False),
        (in_seam, 1, True),
        (in_halves, 1, False),
        (in_halves, 0, True),
        (in_sums, 1, True),
        (in_channel, 0, True),
    ],
)
def test_a_killed_rank_is_noticed(
    wait: Callable[[Ranks], Callable[[], object]], victim: int, gloo: bool, tmp_path: Path
) -> None:
    if wait is in_product and native.lib is None:
        pytest.skip("no compiled kernels here")
    size = 2 if gloo else 3
    mine = RankPool(size)
    before = set(os.listdir(SHM))
    try:
        with store_port() as port, pytest.raises(RuntimeError, match="ended with code -9"):
            mine.run(die, port if gloo else None, wait, victim, str(tmp_path), deadline_s=60.0)
    finally:
        mine.stop()
    killed = float((tmp_path / "killed").read_text())
    for rank in set(range(size)) - {victim}:
        seen, who, waiting = (tmp_path / f"seen {rank}").read_text().split()
        assert float(seen) - killed < NOTICED_S
        assert who == str(victim) and waiting == "0"
    left = {n for n in set(os.listdir(SHM)) - before if n.startswith("weaveinf-")}
    deadline = time.monotonic() + 5  # another run's segments have names for a moment
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= set(os.listdir(SHM))
    assert not left


def silent(ranks: Ranks, port: int) -> None:
    with second_ranks(ranks, port, library=True) as group:
        group.votes.sum(torch.ones(1))
        if ranks.rank == 1:
            time.sleep(1.5)
            return
        votes = group.votes
        votes._state.group.deadline_ns = 300_000_000  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError, match="rank 1 lives but did not come to a vote"):
            votes.sum(torch.ones(1))


def test_a_silent_rank_is_not_waited_for_without_end() -> None:
    from tests.ranks import pool

    with store_port() as port:
        pool(2).run(silent, port)
