"""The one thread of a rank that issues the collective seams, in the order of their starts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class Job:
    """Something under way on the progress thread. ran: from when to when, on the monotonic clock."""

    def __init__(self, work: Callable[[], None], before: Any) -> None:
        self.work = work
        self.before = before
        self.after: Any = None
        self.error: BaseException | None = None
        self.ran = 0.0, 0.0
        self._done = threading.Event()

    def settle(self) -> None:
        """Said by the thread: it ran, or `error` is why not."""
        self._done.set()

    def wait(self) -> None:
        """Returns when it ran, or raises what it raised. Its own waits have deadlines, so it ends. On
        CUDA the caller's stream waits, not the caller."""
        self._done.wait()
        if self.error is not None:
            raise self.error
        if self.after is not None:
            torch.cuda.current_stream().wait_event(self.after)


class Progress:
    """Runs jobs one after another: a thread on CPU, a thread and a high-priority stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def submit(self, work: Callable[[], None]) -> Job:
        """Queues `work` behind all jobs before it, and behind the caller's stream."""
        if self._closed:
            raise RuntimeError("the ranks are closed")
        before = None
        if self._device.type == "cuda":
            before = torch.cuda.Event()
            before.record()
        job = Job(work, before)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weaveinf-seams", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return job

    @torch.inference_mode()  # a thread's own affair; the seams' buffers are made under it
    def _run(self) -> None:
        stream = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device, priority=-1)
        while (job := self._jobs.get()) is not None:
            began = time.monotonic()
            try:
                if self._failure is not None:  # the connections are broken: nothing runs any more
                    raise self._failure
                if stream is None:
                    job.work()
                else:
                    with torch.cuda.stream(stream):
                        stream.wait_event(job.before)
                        job.work()
                        job.after = torch.cuda.Event()
                        job.after.record(stream)
            except BaseException as error:
                self._failure = job.error = error
            job.ran = began, time.monotonic()
            job.settle()

    def close(self) -> None:
        """Lets the thread end behind what is queued; waits a second for it at most."""
        self._closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None
        self._failure = None  # its frames hold the connections
