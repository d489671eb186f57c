"""The processes of ranks above 0, started by rank 0's."""

from __future__ import annotations

import json
import os
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch.distributed as dist

from weaveinf.config import EngineConfig

LAST_WORDS = 20
"""Lines kept of what a rank wrote."""


def make_store(seconds: float, host: str = "127.0.0.1") -> tuple[dist.TCPStore, int]:
    """A store served by this process, at this address only; and its port."""
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )
    return store, port


def say(line: str) -> None:
    """Shows a line, and its end with it: print writes that apart, and another thread's line gets between."""
    with suppress(OSError, ValueError):  # our stderr is full or closed: nobody reads it
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Children:
    """Ranks 1 to size-1, each a process of its own that reads its place from stdin.

    What they write goes to this process's stderr, with the rank before each line.
    """

    card: int | None = None
    """Rank 0's, see `Process`."""

    def __init__(self, config: EngineConfig, size: int, port: int) -> None:
        self.ranks = range(1, size)
        self._place = {"config": config.to_dict(), "size": size, "port": port, "parent": os.getpid()}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lines: dict[int, deque[str]] = {r: deque(maxlen=LAST_WORDS) for r in self.ranks}
        self._readers: list[threading.Thread] = []

    def start(self) -> None:
        """Starts them. They are killed when the calling thread ends, however it ends."""
        for rank in self.ranks:
            out, into = os.pipe()
            reader = threading.Thread(target=self._forward, args=(rank, os.fdopen(out, "rb")), daemon=True)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-u", "-P", "-m", "weaveinf.cluster.rank"],  # -u: no last words are lost
                    stdin=subprocess.PIPE,
                    stdout=into,
                    stderr=into,
                    env=_environment(),
                    process_group=0,  # out of reach of the terminal's Ctrl-C and Ctrl-Z
                )
            finally:
                os.close(into)
            self._processes[rank] = process
            reader.start()
            self._readers.append(reader)
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps({**self._place, "rank": rank}).encode() + b"\n")

    def ended(self, rank: int) -> bool:
        """Whether the rank's process was started and has ended."""
        return rank in self._processes and self._processes[rank].poll() is not None

    def end(self, rank: int) -> str:
        """How a rank's process ended, with its last words."""
        self._readers[rank - 1].join(1)
        code = self._processes[rank].returncode
        if code >= 0:
            how = f"its process ended with exit status {code}"
        elif -code == signal.SIGKILL:
            how = "its process was killed by SIGKILL (the kernel does so when memory runs out)"
        else:
            how = f"its process was killed by signal {-code}, {signal.strsignal(-code)}"
        said = [line for line in self._lines[rank] if line]
        return "\n  ".join([how + (", after" if said else ""), *said])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all that still run."""
        for process in self._processes.values():
            process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Waits until all have ended; False when some have not in that time."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        for reader in self._readers:
            reader.join(1)
        return True

    def _forward(self, rank: int, pipe: IO[bytes]) -> None:
        with pipe:
            for raw in pipe:
                line = raw.decode(errors="replace").rstrip()
                self._lines[rank].append(line)
                say(f"[rank {rank}] {line}")


def _environment() -> dict[str, str]:
    """Ours, and this package importable as it is here, wherever the process was started."""
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    if root not in site.getsitepackages():
        paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, root])
    return environment
