"""A rank that follows rank 0: one of torchrun's, an actor of Ray's, or a process that `spawn` started."""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from weaveinf.cluster.board import Board, End, Process
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.worker import Worker

BEAT_S = 0.5
LOST_S = 10.0
"""A rank is dead when it gave no sign of life for so long."""
LOADING_S = 1800.0
"""All ranks must have loaded within this time."""
FAREWELL_S = 2.0
"""A rank that failed waits so long for rank 0, which tells the user, before it exits."""
STDERR = 2
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs a spawned rank; its place and its settings come through stdin."""
    # The kernel kills this process when the thread that started it ends.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is rank 0's business
    given = json.loads(sys.stdin.readline())
    if os.getppid() != given["parent"]:
        sys.exit(1)  # it died before the kernel was told
    store = dist.TCPStore("127.0.0.1", given["port"], timeout=timedelta(seconds=LOADING_S))
    code = follow(EngineConfig(**given["config"]), store, given["rank"], given["size"])
    os._exit(code)  # no teardown that could hang


def follow(config: EngineConfig, store: dist.Store, rank: int, size: int, card: int | None = None) -> int:
    """Runs the worker of a rank above 0 until rank 0 says stop; returns the exit status.

    `card`: see `Process`.
    """
    faulthandler.register(signal.SIGUSR1, STDERR, all_threads=True)
    board = Board(store, rank, size)
    pulse = Pulse(board)
    ranks: Ranks | None = None
    try:
        processes = meet(board, card)
        pulse.start(processes)
        take_share(processes, rank)
        ranks = Ranks.join(rank, size, store, rank_device(config, processes, rank), LOADING_S)
        worker = Worker(config, ranks)
        pulse.run(worker)
        worker.follow()
    except Exception as error:
        end = End.of(error, loading=pulse.worker is None)
        pulse.end("failed", end)
        if not (end.mistake or end.echo):
            traceback.print_exc()
        if pulse.worker is not None:
            pulse.worker.close()
        if ranks is not None:
            ranks.close()
        time.sleep(FAREWELL_S)
        return 1
    else:
        pulse.end("left")
        worker.close()
        ranks.close()
        return 0
    finally:
        pulse.close()


def meet(board: Board, card: int | None) -> list[Process]:
    """Waits until every rank's process is here. TimeoutError after LOADING_S."""
    board.enter(card)
    deadline = time.monotonic() + LOADING_S
    while (processes := board.processes()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all {board.size} ranks came within {LOADING_S:.0f} s")
        time.sleep(0.02)
    return processes


def take_share(processes: Sequence[Process], rank: int) -> None:
    """Sets the threads of torch to this rank's share of the cores that it has in common with others."""
    mine = processes[rank]
    sharing = [p for p in processes if (p.host, p.cores) == (mine.host, mine.cores)]
    torch.set_num_threads(max(1, physical(mine.cores) // len(sharing)))


def physical(cores: Collection[int]) -> int:
    """Number of physical cores among logical ones."""
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(core)).read_text() for core in cores})
    except OSError:
        return len(cores)


def rank_device(config: EngineConfig, processes: Sequence[Process], rank: int) -> torch.device:
    """The rank's device: with CUDA, one card for each rank of a host."""
    device, given = config.torch_device, processes[rank].card
    if device.type == "cpu":
        return device
    if given is not None:
        return torch.device("cuda", given)
    here = [r for r, process in enumerate(processes) if process.host == processes[rank].host]
    if len(here) > (gpus := torch.cuda.device_count()):
        raise ValueError(f"{len(here)} ranks on a host with {gpus} GPUs; use fewer ranks")
    return torch.device("cuda", here.index(rank))


class Pulse:
    """The thread of a rank above 0 that shows rank 0 how far this one is, and ends the process when
    rank 0 is gone or calls the run off."""

    def __init__(self, board: Board) -> None:
        self.worker: Worker | None = None
        self._board = board
        self._state = "loading"
        self._end: End | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._parent = os.getppid()

    def start(self, processes: Sequence[Process]) -> None:
        """From now on this rank follows the end of rank 0."""
        self._first = processes[0]
        self._near = self._first.host == processes[self._board.rank].host
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    def run(self, worker: Worker) -> None:
        """The rank has loaded."""
        self.worker = worker
        self._show("running")

    def end(self, state: str, end: End | None = None) -> None:
        """Tells rank 0 of this rank's end."""
        with suppress(RuntimeError):  # the store went: rank 0 is gone, too
            self._show(state, end)

    def close(self) -> None:
        """Ends the thread, as a rule before it returns: inside the store when the interpreter ends, it would
        abort the process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=FAREWELL_S)

    def _show(self, state: str | None = None, end: End | None = None) -> None:
        with self._lock:
            if state is not None:
                self._state, self._end = state, end
            self._board.beat(self._state, self.worker.steps_done if self.worker else 0, self._end)

    def _watch(self) -> None:
        heard, since = -1, time.monotonic()
        while not self._over.wait(BEAT_S):
            try:
                self._show()
                off = self._board.called_off()
                count = self._board.beats([0])[0].count
            except RuntimeError:
                off, count = "exit", heard  # the store went, and rank 0 with it
            if count != heard:
                heard, since = count, time.monotonic()
            if self._near:
                gone = not self._first.alive()
            else:
                gone = self._state == "running" and time.monotonic() - since > LOST_S
            if off == "stacks" and not self._near:  # those near rank 0 have got its signal
                faulthandler.dump_traceback(STDERR, all_threads=True)
            if self._state != "left" and (off or gone or os.getppid() != self._parent):
                os._exit(1)


if __name__ == "__main__":
    main()
