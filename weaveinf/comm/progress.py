"""Where a rank's collective seams run: on CPU one thread, on CUDA one high-priority stream.

On CPU, work is a generator that yields the transfers (comm/wire.py) that it needs to go on, and returns those
that end it. The thread moves whatever can be moved. A job starts when the one before it has nothing more to
send: the network has no pause between one half's seam and the other's, and the older one has it to itself.

On CUDA no wait is the host's: whoever submits a job issues all of it, so that a graph can be captured.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

import torch

from weaveinf.comm.wire import Connection, Transfer

Transfers = Sequence[Transfer]
Waits = Generator[Transfers, None, Transfers]
Work = Callable[[], Waits]


class Job:
    """Something under way. ran: from when to when, on the monotonic clock; on CUDA two events."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.steps: Waits | None = None
        self.needs: Transfers = ()
        self.ending = False
        self.deadline = 0.0
        self.after: Any = None
        self.error: BaseException | None = None
        self.ran: tuple[Any, Any] = 0.0, 0.0
        self._done = threading.Event()

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
        self._failure: BaseException | None = None
        self._closed = False

    def add(self, connections: Sequence[Connection]) -> None:
        """Moves what they send and receive from now on; they are closed with this."""
        self._connections = [*self._connections, *connections]

    def remove(self, connections: Sequence[Connection]) -> None:
        """Leaves them alone; nothing may be under way on them."""
        self._connections = [c for c in self._connections if c not in connections]

    def submit(self, work: Work) -> Job:
        """Starts `work` behind all jobs before it; on CUDA also behind the caller's stream."""
        if self._closed:
            raise RuntimeError("the ranks are closed")
        job = Job(work)
        if self._device.type == "cuda":
            self._issue(job)
            return job
        if self._thread is None:
            self._bell, self._ear = socket.socketpair()
            self._bell.setblocking(False)
            self._thread = threading.Thread(target=self._run, name="weaveinf-seams", daemon=True)
            self._thread.start()
        self._queue(job)
        return job

    def _queue(self, job: Job | None) -> None:
        self._jobs.put(job)
        assert self._bell is not None
        with suppress(BlockingIOError):  # it rings already
            self._bell.send(b".")

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
        active: list[Job] = []
        closing = False
        while active or not closing:
            active = [job for job in active if not self._advance(job)]
            if not closing and (not active or active[-1].ending) and not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    closing = True
                else:
                    active.append(job)
            elif active or not closing:
                try:
                    self._move(active[0].needs if active else (), active[0].deadline if active else None)
                except BaseException as error:
                    self._fail(error)
        self._ear.close()

    def _advance(self, job: Job) -> bool:
        """Runs a job as far as what has come allows; whether it is over."""
        try:
            while self._failure is None:
                if not all(transfer.done for transfer in job.needs):
                    return False
                if job.ending:
                    break
                if job.steps is None:
                    job.ran = time.monotonic(), 0.0
                    job.steps = job.work()
                try:
                    job.needs = next(job.steps)
                except StopIteration as end:
                    job.needs, job.ending = end.value, True
                job.deadline = time.monotonic() + self._silence_s
            else:  # the connections are broken: nothing runs any more
                raise self._failure
        except BaseException as error:
            self._fail(error)
            job.error = error
        job.ran = job.ran[0], time.monotonic()
        job.settle()
        return True

    def wait(self, needs: Transfers) -> None:
        """Within a job that no other may interrupt: returns when these have come."""
        deadline = time.monotonic() + self._silence_s
        while not all(transfer.done for transfer in needs):
            self._move(needs, deadline)

    def _move(self, needs: Transfers, deadline: float | None) -> None:
        """Waits until something can be moved, or a job came, and moves it; TimeoutError past the deadline."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        busy = {}
        for connection in self._connections:
            if wanted := connection.wants():
                poll.register(connection, wanted)
                busy[connection.fileno()] = connection
        events = poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3)
        if not events:
            late = next(transfer.rank for transfer in needs if not transfer.done)
            raise TimeoutError(f"rank {late} did not come to a seam in time")
        for number, _ in events:
            if number in busy:
                busy[number].move()
            else:
                self._ear.recv(4096)

    def _fail(self, error: BaseException) -> None:
        """Nothing runs any more, and no peer waits for this rank."""
        self._failure = self._failure or error
        for connection in self._connections:
            connection.close()
        self._connections = []

    def close(self) -> None:
        """Lets the thread end behind what is queued; waits a second for it at most."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None and self._bell is not None:
            self._queue(None)
            self._thread.join(timeout=1.0)
        late = self._thread is not None and self._thread.is_alive()
        self._fail(RuntimeError("the ranks are closed"))
        if self._bell is not None:
            self._bell.close()  # the thread hears it, wherever it waits
        if not late:
            self._failure = None  # its frames hold the connections
        self._thread = None
