"""Brings an engine's ranks to life, and hands rank 0 what drives them."""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from weaveinf.cluster.board import Board
from weaveinf.cluster.rank import LOADING_S, follow, rank_device, take_share
from weaveinf.cluster.spawn import Children, make_store
from weaveinf.cluster.supervise import LEAVE_S, Supervisor
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.step import Step, StepOutput
from weaveinf.engine.worker import Progress, Worker
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import resolve
from weaveinf.selectors.registry import at_once

if TYPE_CHECKING:
    from weaveinf.cluster.ray import Actors

log = logging.getLogger("weaveinf")

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_taken = False  # torchrun's ranks serve one engine


def launch(config: EngineConfig, progress: Progress | None = None) -> Cluster:
    """Starts the ranks of `config` and returns once all have loaded.

    The calling process is rank 0. Under torchrun the ranks are torchrun's, and the call returns on rank 0
    only: on the others it serves rank 0 and then raises SystemExit. `tensor_parallel_size` may be left
    at 1 there.

    Args:
        progress: see `Worker`; for rank 0's part of the checkpoint.

    Raises:
        ValueError: for settings or a checkpoint that cannot work, whichever rank found out.
        RankDied: when a rank ends before it is ready. No process is left then.
    """
    if all(os.environ.get(name) for name in _TORCHRUN) and os.environ["WORLD_SIZE"] != "1":
        return _join_torchrun(config, progress)
    size = config.tensor_parallel_size
    path = _look_at_model(config)
    if size == 1:
        return Cluster(_Driver(config, None, None, progress))
    found = replace(config, model=str(path.absolute()), revision=None)
    if config.executor == "ray":
        return _launch_actors(config, found, progress)
    store, port = make_store(LOADING_S)
    return Cluster(_Driver(config, store, Children(found, size, port), progress))


def _launch_actors(config: EngineConfig, found: EngineConfig, progress: Progress | None) -> Cluster:
    try:
        from weaveinf.cluster.ray import Actors, connect
    except ImportError as error:
        raise ValueError(f"executor='ray' needs Ray ({error}); pip install 'weaveinf[ray]'") from None
    if not Path(config.model).is_dir():  # every node fetches the same commit
        found = replace(config, revision=Path(found.model).name)
    host = connect()
    store, port = make_store(LOADING_S, host)
    return Cluster(_Driver(config, store, Actors(found, host, port), progress))


def _look_at_model(config: EngineConfig) -> Path:
    """Finds the most frequent mistakes before any process is started, and fetches the model once."""
    path = resolve(config.model, config.revision)
    ModelConfig.from_path(path, config.max_model_len, at_once(config.selector))
    return path


def _join_torchrun(config: EngineConfig, progress: Progress | None) -> Cluster:
    """Mistakes are said by rank 0 alone; torchrun ends the others, who wait for it."""
    global _taken
    size, given = int(os.environ["WORLD_SIZE"]), config.tensor_parallel_size
    config = replace(config, tensor_parallel_size=size)
    if os.environ["RANK"] == "0":
        if given not in (1, size):
            raise ValueError(
                f"tensor_parallel_size={given}, but torchrun started {size} ranks; leave it out or "
                f"use torchrun's --nproc-per-node {given}"
            )
        if config.executor != "local":
            raise ValueError(f"executor={config.executor!r}, but torchrun started the ranks; leave one out")
        if _taken:
            raise ValueError(
                "torchrun's ranks already serve an engine; for several engines in a process start "
                "it without torchrun"
            )
        _look_at_model(config)
    _taken = True
    store, rank, _ = torchrun_s_store()
    if rank > 0:
        raise SystemExit(follow(config, store, rank, size))
    return Cluster(_Driver(config, store, None, progress))


def torchrun_s_store() -> tuple[dist.Store, int, int]:
    """The store that torchrun's ranks meet at, this one's rank, and how many there are.

    It outlives ranks that torchrun starts anew: what the dead ones wrote must not be read.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=LOADING_S)))
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), rank, size


class Cluster:
    """The `Executor` over all ranks. `worker` is rank 0's, whose steps run in the thread that submits them.

    That thread takes rank 0's share of the cores as long as the cluster is open.

    What `launch` may raise is raised by the constructor.
    """

    ahead = 0
    on_sent: Callable[[], None] | None = None

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._finalizer = weakref.finalize(self, driver.close)
        try:
            driver.start()
        except BaseException:
            self.close()
            raise
        assert driver.worker is not None
        self.worker: Worker = driver.worker

    @property
    def failure(self) -> Exception | None:
        return self._driver.failure

    def silent(self) -> str | None:
        return self._driver.silent()

    def submit(self, step: Step) -> None:
        """Sends a step to every rank, and runs it on this one. RankDied when one is gone."""
        try:
            self._driver.submit(step, self.on_sent)
        except BaseException:
            self.close()
            raise

    def collect(self) -> StepOutput:
        """The output of the oldest step not yet collected. RankDied when a rank is gone."""
        try:
            return self._driver.take()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Ends all ranks within seconds, also those that do not listen. May be called again."""
        self._finalizer()


class _Driver:
    """Rank 0: makes its worker, in a thread that a verdict need not wait for, and runs its steps."""

    def __init__(
        self,
        config: EngineConfig,
        store: dist.Store | None,
        children: Children | Actors | None,
        progress: Progress | None,
    ) -> None:
        self.worker: Worker | None = None
        self.failure: Exception | None = None
        self._config = config
        self._store = store
        self._progress = progress
        self._process = os.getpid()
        self._threads = torch.get_num_threads()
        self._ranks: Ranks | None = None
        self._loader = threading.Thread(target=self._load, name="rank 0 loads", daemon=True)
        self._broken = False
        self._outputs: deque[StepOutput] = deque()
        self._news: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._supervisor: Supervisor | None = None
        if store is not None:
            board = Board(store, 0, config.tensor_parallel_size)
            self._supervisor = Supervisor(board, children, self._hear)
            self._supervisor.start()

    def _hear(self, news: Exception | None) -> None:
        if news is not None:
            self.failure = news
            if self._ranks is not None:
                self._ranks.give_up()
        self._news.put(news)

    def start(self) -> None:
        """Returns when all ranks have loaded; raises what ended that."""
        self._loader.start()
        if (verdict := self._news.get()) is not None:
            raise verdict
        if self._supervisor is not None:
            take_share(self._supervisor.processes(), 0)  # OpenMP's threads are counted for each thread

    def _load(self) -> None:
        watch = self._supervisor
        try:
            self._ranks = self._join()
            self.worker = Worker(self._config, self._ranks, self._progress)
            if watch is None:
                self._hear(None)
            else:
                watch.ready()
        except Exception as error:
            (self._hear if watch is None else watch.accuse)(error)

    def _join(self) -> Ranks:
        if self._supervisor is None:
            device = self._config.torch_device
            return Ranks.single(torch.device("cuda", 0) if device.type == "cuda" else device)
        assert self._store is not None
        processes = self._supervisor.processes()
        take_share(processes, 0)
        device = rank_device(self._config, processes, 0)
        return Ranks.join(0, self._config.tensor_parallel_size, self._store, device, LOADING_S)

    def submit(self, step: Step, on_sent: Callable[[], None] | None) -> None:
        self._check()
        assert self.worker is not None
        watch = self._supervisor
        try:
            with watch.a_step() if watch is not None else nullcontext():
                if watch is not None:
                    self.worker.ranks.control.send(step.pack())
                if on_sent is not None:
                    on_sent()
                self._outputs.append(self.worker.execute(step))
                return
        except Exception as error:
            if watch is None:
                self.failure = error
                raise
            watch.accuse(error)
        except BaseException:
            self._broken = True  # the others may have a step that this rank has not
            raise
        # The verdict, but not from the error, whose frames hold the connections. There is none when the
        # step's own thread closed the engine meanwhile, as a signal's handler may.
        if self.failure is None:
            self._news.get()
        self._check()

    def silent(self) -> str | None:
        return None if self._supervisor is None else self._supervisor.silent()

    def take(self) -> StepOutput:
        """The oldest output."""
        self._check()
        return self._outputs.popleft()

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this engine belongs to the process that made it; make one after the fork")
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # a fork of the process that has the ranks
        worker, watch = self.worker, self._supervisor
        orderly = worker is not None and not self._broken and self.failure is None
        if watch is not None:
            watch.leave(at_once=not orderly)
        if self._ranks is not None and not orderly:
            self._ranks.give_up()
        if worker is not None and orderly:
            try:
                if watch is not None:
                    worker.ranks.control.send(np.empty(0, np.int64))
                worker.tell()
            except (RuntimeError, TimeoutError) as error:
                log.error("the ranks did not end in order: %s", error)
                if watch is not None:
                    watch.leave(at_once=True)
        if self._loader.is_alive():
            self._loader.join(LEAVE_S)
        if self.worker is not None:
            self.worker.close()
        if self._ranks is not None:
            self._ranks.close()
        if watch is not None:
            watch.over.wait(2 * LEAVE_S)
        torch.set_num_threads(self._threads)
        self._ranks = self._store = self._supervisor = None  # and with them the store's sockets
        self.failure = self.failure or RuntimeError("this engine is closed")
