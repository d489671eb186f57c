"""What the ranks tell each other through the store that they meet at: who they are, how far they got,
how they ended. Small JSON values; the store is a trusted network (SECURITY.md)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from weaveinf.comm.errors import RankDied


@dataclass(frozen=True)
class Process:
    """A rank's process, as other processes of its host can find it.

    host: of one boot and one namespace of process ids. started: clock ticks since the boot, so that
    another process with the same id is not taken for it. cores: those it may run on. card: the GPU it was
    given, among those it sees; None: by its place among the host's ranks.
    """

    host: str
    pid: int
    started: str
    cores: tuple[int, ...]
    card: int | None = None

    @classmethod
    def mine(cls, card: int | None = None) -> Process:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        host = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return cls(host, os.getpid(), _stat(os.getpid())[1], cores, card)

    def alive(self) -> bool:
        """Whether it runs (or is stopped). Only of use on its own host."""
        try:
            state, started = _stat(self.pid)
        except OSError:
            return False
        return state not in "ZX" and started == self.started

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the process still is there."""
        if self.alive():
            with suppress(OSError):
                os.kill(self.pid, number)


def _stat(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; OSError when there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], fields[19]


@dataclass(frozen=True)
class End:
    """Why a rank gave up.

    mistake: the user's, found while loading. echo: only the consequence of another rank's end, which
    is `blamed` where it is known.
    """

    words: str
    mistake: bool = False
    echo: bool = False
    blamed: int | None = None

    @classmethod
    def of(cls, error: BaseException, loading: bool) -> End:
        if isinstance(error, RankDied):
            return cls(error.words, echo=True, blamed=error.rank)
        words = " ".join(str(error).split()) or type(error).__name__
        if loading and isinstance(error, ValueError):
            return cls(str(error), mistake=True)
        echo = isinstance(error, dist.DistError) or "gloo/transport" in words
        return cls(f"{type(error).__name__}: {words}", echo=echo)


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life. state: "loading", "running", "failed" or "left". steps: those it has run."""

    count: int
    state: str
    steps: int
    end: End | None = None


class Board:
    """One rank's view of the store, through a connection of its own.

    No call blocks on a key that is not there. All raise RuntimeError when the store is gone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = dist.PrefixStore("weaveinf/cluster", store.clone())  # type: ignore[attr-defined]
        self._count = 0

    def enter(self, card: int | None = None) -> None:
        """Says that this rank's process is here, and loading; `card`: see `Process`."""
        self._store.set(f"process/{self.rank}", json.dumps(asdict(Process.mine(card))))
        self.beat("loading", 0)

    def processes(self) -> list[Process] | None:
        """The processes of all ranks; None until all have entered."""
        if not self._store.check([f"beat/{r}" for r in range(self.size)]):
            return None
        values = self._store.multi_get([f"process/{r}" for r in range(self.size)])
        read = [json.loads(value) for value in values]
        return [Process(**{**one, "cores": tuple(one["cores"])}) for one in read]

    def beat(self, state: str, steps: int, end: End | None = None) -> None:
        """Shows a sign of life to the others."""
        self._count += 1
        mine = Beat(self._count, state, steps, end)
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(mine)))

    def beats(self, ranks: Sequence[int]) -> list[Beat]:
        """The latest signs of life of ranks that have entered."""
        values = self._store.multi_get([f"beat/{r}" for r in ranks])
        read = [json.loads(value) for value in values]
        return [Beat(**{**one, "end": one["end"] and End(**one["end"])}) for one in read]

    def call_off(self, stacks: bool) -> None:
        """Tells the ranks to exit at once; with `stacks`, to print where they stand first."""
        self._store.set("off", "stacks" if stacks else "exit")

    def called_off(self) -> str | None:
        """What rank 0 called: "exit", "stacks" or nothing yet."""
        return self._store.get("off").decode() if self._store.check(["off"]) else None

    def close(self) -> None:
        """Gives up the connection, also when an exception's frames still hold this object."""
        del self._store
