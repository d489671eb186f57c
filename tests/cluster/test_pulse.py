"""The thread that shows rank 0 how far a rank is: it ends before the process does."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist

from weaveinf.cluster.board import Board
from weaveinf.cluster.rank import Pulse


def pulses() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_a_rank_that_has_left_has_no_thread_in_the_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    boards = [Board(store, rank, 2) for rank in (0, 1)]
    for board in boards:
        board.enter()
    processes = boards[1].processes()
    assert processes is not None
    pulse = Pulse(boards[1])
    pulse.start(processes)
    try:
        assert len(pulses()) == 1
        pulse.end("left")
    finally:
        pulse.close()
    assert not pulses()
    assert boards[0].beats([1])[0].state == "left"
