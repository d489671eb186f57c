"""Waiting for a process group's work, in this package's errors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from weaveinf.comm.errors import RankDied

Backend = Any
"""A process group's backend (gloo, NCCL), used directly; torch's stubs do not know its methods."""


def wait_for(work: dist.Work | None, rank: int | None, doing: str, seconds: float | None = None) -> None:
    """Waits for one operation, with `rank` when it concerns one peer.

    Without `seconds` the process group's own time limit holds. RankDied when the connection broke,
    TimeoutError when the time passed; gloo's connections are of no use after either.
    """
    if work is None:
        return
    try:
        if seconds is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        words = str(error).split("\n", 1)[0]
        if "imed out" in words or "imeout" in words:
            who = "a rank" if rank is None else f"rank {rank}"
            raise TimeoutError(f"{who} did not come to {doing} in time") from error
        raise RankDied(rank, f"its connection broke in {doing} ({words})") from error
