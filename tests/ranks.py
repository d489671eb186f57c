"""Ranks for tests: one pool of worker processes per size, started once and kept for the whole run.

    results = pool(2).run(function, *args)      # function(ranks, *args), module-level, on every rank

The workers have joined one `Ranks`, which is kept across calls. (Pickle is fine here: the pipes are ours.)
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")
_GRACE_S = 3.0
"""After the first error, how long the other ranks may take to report theirs."""

_pools: dict[int, RankPool] = {}


def pool(size: int) -> RankPool:
    """The pool of `size` ranks; made on first use."""
    return _pools.setdefault(size, RankPool(size))


def close_pools() -> None:
    """Ends all workers."""
    for one in _pools.values():
        one.stop()
    _pools.clear()


class RankPool:
    """`size` processes with one torch thread each, joined. Rebuilt after an error or a death."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, deadline_s: float = 120.0) -> list[Any]:
        """Calls `function(ranks, *args)` on every rank and returns the results in rank order.

        Raises the first error, with its rank and traceback as a note; TimeoutError past the deadline.
        """
        if not self._processes or not all(p.is_alive() for p in self._processes):
            self.stop()
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        error: BaseException | None = None
        end = time.monotonic() + deadline_s
        while len(results) < self.size:
            ready = wait(
                [p for r, p in enumerate(self._pipes) if r not in results], max(0.0, end - time.monotonic())
            )
            if not ready:
                late = [r for r in range(self.size) if r not in results]
                error = error or TimeoutError(f"no answer from ranks {late} in {deadline_s} s")
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                problem, results[rank] = self._answer(rank)
                if problem is not None and error is None:
                    error = problem
                    end = min(end, time.monotonic() + _GRACE_S)
        if error is not None:
            self.stop()
            raise error
        return [results[r] for r in range(self.size)]

    def _answer(self, rank: int) -> tuple[BaseException | None, Any]:
        try:
            result, problem, trace = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(1)
            code = self._processes[rank].exitcode
            return RuntimeError(f"rank {rank} of the test pool ended with code {code}"), None
        if problem is not None:
            problem.add_note(f"on rank {rank}:\n{trace}")
        return problem, result

    def _start(self) -> None:
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
        for rank in range(self.size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_work, args=(rank, self.size, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Ends the workers; the next run starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.5 if process.is_alive() else 0)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _work(rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from weaveinf.comm.ranks import Ranks

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    ranks = Ranks.join(rank, size, store, torch.device("cpu"), silence_s=60.0)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(ranks, *args), None, ""))
        except BaseException as error:
            trace = traceback.format_exc()
            try:
                pipe.send((None, error, trace))
            except Exception:  # an error that cannot be pickled
                pipe.send((None, RuntimeError(repr(error)), trace))
    ranks.close()
