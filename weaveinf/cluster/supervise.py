"""Rank 0's watch over the others: who died, who is stuck, and whose fault it was."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from weaveinf.cluster.board import Beat, Board, End, Process
from weaveinf.cluster.rank import BEAT_S, FAREWELL_S, LOADING_S, LOST_S, STDERR
from weaveinf.cluster.spawn import Children, say
from weaveinf.comm.errors import RankDied

if TYPE_CHECKING:
    from weaveinf.cluster.ray import Actors

TICK_S = 0.1
STUCK_S = 60.0
"""A step that stands still for so long, and for STUCK_TIMES the slowest of the latest, is stuck."""
STUCK_TIMES = 20
SETTLE_S = 0.3
"""After the first sign of trouble, the time in which the others' reports come in."""
ECHO_S = 2.0
"""How long to look for the cause when all that is known are consequences."""
KILL_S = 2.0
"""Between asking a rank to end and making it."""
LEAVE_S = 5.0
"""Ranks that were told to stop are ended after this time."""
WAITING_S = 10.0
"""While ranks are loading, one line so often says which."""


class Supervisor(threading.Thread):
    """The thread that watches all ranks of an engine, and ends them.

    Args:
        tell: called once with None when all ranks have loaded, and at most once with the exception that
            ends the run: `RankDied`, rank 0's own, or the ValueError of a user's mistake.
        children: the ranks' processes or actors; None when another launcher started them. This thread starts
            them, since the kernel ends them with the thread that did.

    Attributes:
        verdict: the exception that was told.
        over: set when rank 0 may go, no process of its own being left.
    """

    def __init__(
        self, board: Board, children: Children | Actors | None, tell: Callable[[Exception | None], None]
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._begun = self._done = 0  # steps on rank 0
        self._recent: deque[float] = deque([0.0], maxlen=64)  # their seconds
        self.verdict: Exception | None = None
        self._board = board
        self._children = children
        self._tell = tell
        self._others = range(1, board.size)
        self._processes: list[Process] | None = None
        self._met = threading.Event()
        self._closing = threading.Event()
        self.over = threading.Event()
        self._at_once = False
        self._state = "loading"
        self._loaded = False
        self._own: Exception | None = None
        self._ends: dict[int, End] = {}
        self._dead: list[int] = []  # in the order of their deaths
        self._beats = dict.fromkeys(range(board.size), Beat(0, "loading", 0))
        now = time.monotonic()
        self._began = self._ticked = self._beaten = self._waited = now
        self._trouble: float | None = None
        self._hung = False
        self._seen = dict.fromkeys(range(board.size), now)
        self._moved = dict.fromkeys(range(board.size), now)

    # What the threads of rank 0 call.

    def processes(self) -> list[Process]:
        """Waits until all ranks' processes are here. RankDied when that is not to be."""
        self._met.wait()
        if self._processes is None:
            raise RankDied(None, "before all ranks had come")
        return self._processes

    def ready(self) -> None:
        """Rank 0 has loaded."""
        self._state = "running"

    def silent(self) -> str | None:
        """The rank, or this thread, that has given no sign of life for LOST_S; None while all have."""
        now = time.monotonic()
        if not self.is_alive() or now - self._ticked > LOST_S:
            return "the supervisor stands still"
        return next((f"rank {rank} is silent" for rank, at in self._seen.items() if now - at > LOST_S), None)

    @contextmanager
    def a_step(self) -> Iterator[None]:
        """Around a step's sending, and its running on rank 0."""
        began = time.monotonic()
        self._begun += 1
        yield
        self._done += 1
        self._recent.append(time.monotonic() - began)

    def accuse(self, error: Exception) -> None:
        """Rank 0 cannot go on; whose fault that is will be found out and told."""
        if self._own is None or self._ends[0].echo:
            self._own = error
            self._ends[0] = End.of(error, loading=not self._loaded)

    def leave(self, at_once: bool) -> None:
        """From now on ranks may end, as they were told to stop; or are ended at once."""
        self._at_once = at_once
        self._closing.set()

    # The thread itself.

    def run(self) -> None:
        """Watches until there is a verdict or `leave` is called; then sees all others out."""
        try:
            if self._children is not None:
                self._children.start()
            self._board.enter(self._children.card if self._children is not None else None)
            while self.verdict is None and not self._closing.wait(TICK_S):
                self._look(time.monotonic())
        except Exception as error:  # the store is gone, or no process can be started
            self.verdict = error
        finally:
            if self.verdict is not None:
                self._tell(self.verdict)
            self._own = None  # whose frames hold the connections
            if self._hung:
                self._print_stacks()
            self._end_others()
            self._board.close()
            self._met.set()
            self.over.set()
            if self._hung and self._begun > self._done and not self._closing.wait(LEAVE_S):
                say(f"weaveinf: {self.verdict}; rank 0 cannot be stopped")
                os._exit(1)  # nothing else ends a step that waits for nobody

    def _look(self, now: float) -> None:
        if now - self._ticked > 20 * TICK_S:  # this process slept itself, so it cannot judge
            self._seen, self._moved = dict.fromkeys(self._seen, now), dict.fromkeys(self._moved, now)
        self._ticked = now
        if self._processes is None and (processes := self._board.processes()) is not None:
            self._processes = processes
            self._met.set()
        self._dead += [rank for rank in self._others if rank not in self._dead and self._is_gone(rank)]
        troubled = bool(self._dead or self._ends)
        if self._processes is not None and (not self._loaded or troubled or now - self._beaten >= BEAT_S):
            self._listen(now)
        self.verdict = self._judge(now)

    def _is_gone(self, rank: int) -> bool:
        if self._children is not None:
            return self._children.ended(rank)
        return (process := self._near().get(rank)) is not None and not process.alive()

    def _near(self) -> dict[int, Process]:
        """The processes of other ranks on this host."""
        here = self._processes or []
        return {r: here[r] for r in self._others if here and here[r].host == here[0].host}

    def _listen(self, now: float) -> None:
        """Shows rank 0's sign of life and reads those of the others."""
        self._beaten = now
        self._board.beat(self._state, self._done)
        beats = dict(zip(self._others, self._board.beats(self._others), strict=True))
        beats[0] = Beat(self._beats[0].count + 1, self._state, self._done)
        for rank, beat in beats.items():
            if beat.count != self._beats[rank].count:
                self._seen[rank] = now
            if beat.steps != self._beats[rank].steps or beat.steps >= self._begun:
                self._moved[rank] = now
            if beat.end is not None:
                self._ends[rank] = beat.end
        self._beats = beats
        if not self._loaded and all(beat.state == "running" for beat in beats.values()):
            self._loaded = True
            self._seen = dict.fromkeys(self._seen, now)
            self._tell(None)

    def _judge(self, now: float) -> Exception | None:
        """The exception that ends the run, once the cause is known."""
        for rank, end in sorted(self._ends.items()):
            if end.mistake:
                return self._own if rank == 0 else ValueError(end.words)
        silent = [r for r in self._others if self._loaded and now - self._seen[r] > LOST_S]
        if not (self._dead or self._ends or silent):
            self._trouble = None
            return self._stuck(now)
        if self._trouble is None:
            self._trouble = now
        if now - self._trouble < SETTLE_S:
            return None
        for rank in self._dead:
            if rank not in self._ends:
                return RankDied(rank, self._children.end(rank) if self._children else "its process is gone")
        for rank, end in sorted(self._ends.items()):
            if not end.echo:
                return self._own if rank == 0 else RankDied(rank, end.words)
        if silent:
            self._hung = True
            return RankDied(silent[0], f"no sign of life for {LOST_S:.0f} s; it hangs or is stopped")
        if now - self._trouble < ECHO_S:
            return None
        end = next(iter(self._ends.values()))
        return RankDied(end.blamed, end.words)

    def _stuck(self, now: float) -> Exception | None:
        if not self._loaded:
            slow = [r for r, beat in self._beats.items() if beat.state == "loading"]
            names = f"rank{'s' if len(slow) > 1 else ''} {', '.join(map(str, slow))}"
            if now - self._began > LOADING_S:
                self._hung = True
                return RankDied(slow[0], f"{names} did not load within {LOADING_S:.0f} s")
            if now - self._waited > WAITING_S and self._state == "running":
                self._waited = now
                say(f"weaveinf: waiting for {names} to load")
            return None
        limit = max(STUCK_S, STUCK_TIMES * max(self._recent))
        if all(now - moved <= limit for moved in self._moved.values()):
            return None
        behind = min(beat.steps for beat in self._beats.values())
        still = [r for r, beat in sorted(self._beats.items()) if beat.steps == behind]
        self._hung = True
        names = ", ".join(map(str, still))
        return RankDied(
            still[0] if len(still) == 1 else None,
            f"step {behind + 1} has stood still on rank {names} for {limit:.0f} s; "
            "the stacks of all ranks are printed above",
        )

    def _print_stacks(self) -> None:
        """The Python stacks of all ranks, on stderr."""
        say("weaveinf: rank 0 stands at")
        faulthandler.dump_traceback(STDERR, all_threads=True)
        for process in self._near().values():
            process.send(signal.SIGUSR1)
            process.send(signal.SIGCONT)  # one that is stopped prints nothing
        time.sleep(BEAT_S)  # which those near do before all are called off, and end
        with suppress(RuntimeError):  # the store is gone
            self._board.call_off(stacks=True)
        time.sleep(2 * BEAT_S)

    def _end_others(self) -> None:
        """Sees to it that no other rank is left.

        Another launcher kills rank 0 as soon as it sees a rank fail, so there the others get the time
        that rank 0 needs to tell the user.
        """
        grace = 0.0 if self.verdict is not None or self._at_once else LEAVE_S
        if self._children is not None and not self._children.wait(grace):
            self._children.signal(signal.SIGTERM)
            self._children.signal(signal.SIGCONT)
            if not self._children.wait(KILL_S):
                self._children.signal(signal.SIGKILL)
                self._children.wait(KILL_S)
        if self._children is None:
            if self.verdict is not None:
                self.over.set()
            end = time.monotonic() + (grace or FAREWELL_S)
            with suppress(RuntimeError):  # the store is gone, and the ranks leave by that
                while time.monotonic() < end and any(
                    b.state != "left" for b in self._board.beats(self._others)
                ):
                    time.sleep(TICK_S)
                self._board.call_off(stacks=False)  # those who have left do not mind
