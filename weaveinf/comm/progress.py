"""Where a rank's collective seams are issued: on CPU by one thread, on CUDA on one high-priority stream.

On CPU, work that is a generator yields before each of its waits, so that the next job's first messages leave
meanwhile: the network has no pause between one half's seam and the other's. Which messages overtake which
then depends on the moment, so a seam's messages have tags of their own.

Only the oldest job may wait: a rank that waited in a newer one would keep back what its peers' older job
waits for. So either all waits of a job come right after a yield, or the job yields nowhere, and then no
job beside it may.

On CUDA no wait is the host's: whoever submits a job issues all of it, so that a graph can be captured.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

Work = Callable[[], Iterator[None] | None]


class Job:
    """Something under way. ran: from when to when, on the monotonic clock; on CUDA two events."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.steps: Iterator[None] | None = None
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
    """Runs jobs, the oldest first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def submit(self, work: Work) -> Job:
        """Queues `work` behind all jobs before it; on CUDA also behind the caller's stream."""
        if self._closed:
            raise RuntimeError("the ranks are closed")
        job = Job(work)
        if self._device.type == "cuda":
            self._issue(job)
            return job
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weaveinf-seams", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return job

    def _issue(self, job: Job) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            began, job.after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in job.work() or ():
                pass
            job.after.record()
        job.ran = began, job.after

    @torch.inference_mode()  # a thread's own affair; the seams' buffers are made under it
    def _run(self) -> None:
        active: deque[Job] = deque()
        closing = False
        while active or not closing:
            try:
                job = self._jobs.get(block=not active)
            except queue.Empty:
                job = active[0]
            if job is None:
                closing = True
            elif self._advance(job):
                if job in active:
                    active.remove(job)
            elif job not in active:
                active.append(job)

    def _advance(self, job: Job) -> bool:
        """Runs a job to its next yield; whether it is over."""
        try:
            if self._failure is not None:  # the connections are broken: nothing runs any more
                raise self._failure
            if job.steps is None:
                job.ran = time.monotonic(), 0.0
                job.steps = iter(job.work() or ())
            next(job.steps)
            return False
        except StopIteration:
            pass
        except BaseException as error:
            self._failure = job.error = error
        job.ran = job.ran[0], time.monotonic()
        job.settle()
        return True

    def close(self) -> None:
        """Lets the thread end behind what is queued; waits a second for it at most."""
        self._closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None
        self._failure = None  # its frames hold the connections
