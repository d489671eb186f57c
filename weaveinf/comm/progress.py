"""Where a rank's collective seams run: on CPU one thread, on CUDA one high-priority stream.

On CPU, work is a generator that yields the transfers (comm/wire.py) that it needs to go on, and returns those
that end it; the thread moves whatever can be moved. The sums of seams, which are nearly all of it, are run by
csrc/cpu/streams.cpp where that is there: no Python takes the core from what computes, and a sum starts as
soon as the network has all that the one before it sends, so it never pauses and the older one is not slowed.

On CUDA no wait is the host's: whoever submits a job issues all of it, so that a graph can be captured.
"""

from __future__ import annotations

import ctypes
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from weaveinf.comm import segment
from weaveinf.comm.seam import Joint
from weaveinf.comm.wire import Connection, Transfer, broken, late
from weaveinf.ops import native

Transfers = Sequence[Transfer]
Waits = Generator[Transfers, None, Transfers]
Work = Callable[[], Waits]

_DIED, _SILENT, _LEFT = 1, 2, 3
"""Kinds of problem in streams.cpp; the last: Python knows why."""


class Job:
    """Something under way. ran: from when to when, on the monotonic clock; on CUDA two events."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.after: Any = None
        self.error: BaseException | None = None
        self.ran: tuple[Any, Any] = 0.0, 0.0
        self._done = threading.Event()

    @property
    def over(self) -> bool:
        """Whether nothing is under way any more."""
        return self._done.is_set()

    def settle(self) -> None:
        """Said by the thread: it ran, or `error` is why not."""
        self._done.set()

    def wait(self) -> None:
        """Returns when it ran, or raises what it raised. Its own waits have deadlines, so it ends. On
        CUDA the caller's stream waits, not the caller."""
        if self.after is not None:
            torch.cuda.current_stream().wait_event(self.after)
            return
        self._done.wait()
        if self.error is not None:
            raise self.error


class _Outcome(ctypes.Structure):
    """struct Outcome of streams.cpp. error: errno, or -1 where a peer closed its connection."""

    _fields_ = native.fields("double began ended, int64 kind rank error")

    def problem(self) -> BaseException | None:
        """What went wrong; None for nothing."""
        if self.kind == _DIED:
            return broken(self.rank, "it was closed" if self.error < 0 else os.strerror(self.error))
        if self.kind == _SILENT:
            return late(self.rank)
        return RuntimeError("the ranks are closed") if self.kind else None


class Sum:
    """A seam's sum under way in streams.cpp. held: what it reads and writes meanwhile."""

    def __init__(self, progress: Progress, handle: int, held: Any) -> None:
        self.held = held
        self.over = False
        self.error: BaseException | None = None
        self.ran = 0.0, 0.0
        self._progress = progress
        self._handle = handle

    def wait(self) -> None:
        """See `Job.wait`."""
        if not self.over:
            outcome = _Outcome()
            here = self._progress.engine, self._handle, ctypes.byref(outcome)
            while segment.lib.weaveinf_streams_wait(*here):
                pass  # now signals are looked after
            self.over = True
            self.ran = outcome.began, outcome.ended
            self.error = outcome.problem()
            if outcome.kind == _LEFT:
                self.error = self._progress.failure or self.error
            self._progress.settled(self)
        if self.error is not None:
            raise self.error


class Progress:
    """Runs jobs, the oldest first. A transfer that takes `silence_s` is a peer that does not come."""

    def __init__(self, device: torch.device, silence_s: float) -> None:
        self._device = device
        self._silence_s = silence_s
        self._stream: Any = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._bell: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self._closed = False
        self.engine: int | None = None  # of streams.cpp
        self._sums: set[Sum] = set()  # under way, as long as nobody has heard otherwise

    def add(self, connections: Sequence[Connection]) -> None:
        """Moves what they send and receive from now on; they are closed with this."""
        self._connections = [*self._connections, *connections]

    def remove(self, connections: Sequence[Connection]) -> None:
        """Leaves them alone; nothing may be under way on them."""
        self._connections = [c for c in self._connections if c not in connections]

    def submit(self, work: Work) -> Job:
        """Starts `work` behind all jobs before it; on CUDA also behind the caller's stream."""
        job = Job(work)
        if self._device.type == "cuda":
            self._refuse_closed()
            self._issue(job)
            return job
        self._start()
        self._queue(job)
        return job

    def sum(self, plan: int, joint: Joint, held: Any) -> Sum:
        """Starts a sum by the struct Plan of streams.cpp at an address, behind all jobs before it; holds what
        that points to."""
        self._start()
        assert native.lib is not None
        where = self.engine, plan, native.lib.weave_add_rms_norm.address, joint.weight.data_ptr()
        handle = segment.lib.weaveinf_streams_submit(*where, *joint.varied)
        job = Sum(self, handle, (joint, held))
        self._sums.add(job)
        return job

    def settled(self, job: Sum) -> None:
        """Nothing of it is under way any more."""
        self._sums.discard(job)

    def _start(self) -> None:
        self._refuse_closed()
        if self._thread is None:
            self._bell, self._ear = socket.socketpair()
            self._bell.setblocking(False)
            if segment.lib is not None:
                self.engine = segment.lib.weaveinf_streams(self._bell.fileno(), self._ear.fileno())
            self._thread = threading.Thread(target=self._run, name="weaveinf-seams", daemon=True)
            self._thread.start()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the ranks are closed")

    def _queue(self, job: Job | None) -> None:
        self._jobs.put(job)
        if self.engine is not None:
            segment.lib.weaveinf_streams_submit(self.engine, None, None, None, 0.0, 0.0, 0.0)

    def _issue(self, job: Job) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            began, job.after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in job.work():
                pass
            job.after.record()
        job.ran = began, job.after

    @torch.inference_mode()  # a thread's own affair; the seams' buffers are made under it
    def _run(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                if self.failure is not None:
                    raise self.failure
                self._do(job.work())
            except BaseException as error:
                self._fail(error)
                job.error = self.failure
            job.ran = began, time.monotonic()
            job.settle()
        self._ear.close()

    def _next(self) -> Job | None:
        """Runs sums until it is another job's turn."""
        if self.engine is not None and self.failure is None:
            outcome = _Outcome()
            silence_ns = int(1e9 * self._silence_s)
            segment.lib.weaveinf_streams_run(self.engine, silence_ns, ctypes.byref(outcome))
            if error := outcome.problem():
                self._fail(error)
        return self._jobs.get()

    def _do(self, steps: Waits) -> None:
        try:
            while True:
                self.wait(next(steps))
        except StopIteration as end:
            self.wait(end.value)

    def wait(self, needs: Transfers) -> None:
        """Within a job: returns when these have come."""
        deadline = time.monotonic() + self._silence_s
        while not all(transfer.done for transfer in needs):
            if self.failure is not None:
                raise self.failure
            self._move(needs, deadline)

    def _move(self, needs: Transfers, deadline: float) -> None:
        """Waits until something can be moved and moves it; TimeoutError past the deadline."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        busy = {}
        for connection in self._connections:
            if wanted := connection.wants():
                poll.register(connection, wanted)
                busy[connection.fileno()] = connection
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)
        if not events:
            raise late(next(transfer.rank for transfer in needs if not transfer.done))
        for number, _ in events:
            if number in busy:
                busy[number].move()
            else:
                self._ear.recv(4096)

    def _fail(self, error: BaseException) -> None:
        """Nothing runs any more, and no peer waits for this rank."""
        self.failure = self.failure or error
        if self.engine is not None:
            segment.lib.weaveinf_streams_refuse(self.engine)
        for connection in self._connections:
            connection.end()

    def close(self) -> None:
        """Lets the thread end behind what is queued; waits a second for it at most."""
        if self._closed:
            return
        self._closed = True
        thread = self._thread
        if thread is not None:
            self._queue(None)
            thread.join(timeout=1.0)
        self._fail(RuntimeError("the ranks are closed"))
        if self._bell is not None:
            self._bell.close()  # the thread hears it, wherever it waits
        if thread is not None:
            thread.join(timeout=1.0)
        if thread is None or not thread.is_alive():
            for connection in self._connections:
                connection.close()
            self._connections, self._sums = [], set()
            self.failure = None  # its frames hold the connections
        self._thread = None

    def __del__(self) -> None:
        if self.engine is not None:
            segment.lib.weaveinf_streams_free(self.engine)
