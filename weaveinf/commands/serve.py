"""`weaveinf serve`: the model over HTTP, until a signal or the engine's end."""

from __future__ import annotations

import argparse
import asyncio
import logging.handlers
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from weaveinf.cli import settings
from weaveinf.cluster.launch import launch
from weaveinf.config import EngineConfig
from weaveinf.server.app import make_app
from weaveinf.server.async_engine import AsyncEngine
from weaveinf.server.config import ServerConfig
from weaveinf.server.connection import Connection, with_push
from weaveinf.server.metrics import Metrics

log = logging.getLogger("weaveinf")

LOG_LINES = 10_000
"""Wait at most to be written; LOG_S at most, when the server ends."""
LOG_S = 1.0
UNREAD_S = 60
"""A client that takes nothing of its answer for so long is cut off."""


def run(args: argparse.Namespace) -> None:
    names = ServerConfig.__dataclass_fields__.keys() & vars(args).keys()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    server, config = ServerConfig(**given), EngineConfig(**settings(args))
    if os.environ.get("RANK", "0") != "0":
        # torchrun and Slurm signal every rank: rank 0 finishes what runs, and needs the others for it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        launch(config)  # serves rank 0, and exits
    engine = AsyncEngine(config, server, Metrics())
    with _logging(), _listen(server) as listener:
        asyncio.run(_serve(engine, server, listener))


@contextmanager
def _logging() -> Iterator[None]:
    """A thread writes the lines, so that nothing waits where nobody reads them; they are then left out."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES)

    def write() -> None:
        while True:
            line = lines.get().getMessage() + "\n"
            with suppress(OSError):  # it is full, or there is none
                os.write(2, line.encode(errors="backslashreplace"))
            lines.task_done()

    logging.raiseExceptions = False  # a log that cannot be written, or is full, ends nothing
    handler = logging.handlers.QueueHandler(lines)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    threading.Thread(target=write, name="log", daemon=True).start()
    try:
        yield
    finally:
        with lines.all_tasks_done:
            lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, LOG_S)


def _listen(server: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    try:
        listener = socket.create_server((server.host, server.port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {server.host} port {server.port}: {error.strerror}") from None
    # Connections inherit it. asyncio sets it on sockets of its own making only, and without it a stream's
    # first tokens wait for the acknowledgement of its head, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux's
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
    return listener


async def _serve(engine: AsyncEngine, server: ServerConfig, listener: socket.socket) -> None:
    """Serves while the engine loads, too. RuntimeError when the engine is dead."""
    http = _Http(
        uvicorn.Config(
            with_push(make_app(engine, server)),
            http=Connection,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=2,
        ),
        engine,
    )
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    serving = asyncio.create_task(http.serve([listener]))
    try:
        loading = asyncio.create_task(engine.start())
        while not (loading.done() or serving.done()):
            await asyncio.wait({loading, serving}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                # As its cluster is joined, Ray puts a handler in this one's place that aborts the process.
                signal.signal(signal.SIGTERM, http.handle_exit)
        if loading.done():
            await loading
            log.info("ready: %s", engine.config.model)
            dying = asyncio.create_task(engine.died())
            await asyncio.wait({serving, dying}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise RuntimeError(f"the engine has failed: {dying.result()}")
    finally:
        http.should_exit = True
        await serving
        await asyncio.to_thread(engine.close)


class _Http(uvicorn.Server):
    """Drains at the first signal; at the second what still runs is ended, too."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine) -> None:
        super().__init__(config)
        self._engine = engine
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        loop = asyncio.get_running_loop()
        if self._draining is not None:
            loop.call_soon_threadsafe(self._engine.stop)
        elif self._engine.state == "loading":
            self.should_exit = self.force_exit = True
        else:
            name, seconds = signal.Signals(sig).name, self._engine.server.drain_s
            log.info("%s: ending what runs within %.0f s", name, seconds)
            self._draining = loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain()
        self.should_exit = True
