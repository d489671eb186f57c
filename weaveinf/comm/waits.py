"""Waiting for a process group's work, in this package's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from weaveinf.comm.errors import RankDied

Backend = Any
"""A process group's backend (gloo, NCCL), used directly; torch's stubs do not know its methods."""


@contextmanager
def blamed(rank: int | None, doing: str) -> Iterator[None]:
    """What gloo raises inside, in this package's errors, with `rank` when it concerns one peer.

    Starting an operation may raise as well as waiting for one: RankDied when the connection broke,
    TimeoutError when the time passed; gloo's connections are of no use after either.
    """
    try:
        yield
    except RankDied:
        raise
    except RuntimeError as error:
        words = str(error).split("\n", 1)[0]
        if "imed out" in words or "imeout" in words:
            who = "a rank" if rank is None else f"rank {rank}"
            raise TimeoutError(f"{who} did not come to {doing} in time") from error
        raise RankDied(rank, f"its connection broke in {doing} ({words})") from error


def wait_for(work: dist.Work | None, rank: int | None, doing: str, seconds: float | None = None) -> None:
    """Waits for one operation, with the errors of `blamed`; without `seconds` the group's own limit holds."""
    if work is None:
        return
    with blamed(rank, doing):
        if seconds is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=seconds))
