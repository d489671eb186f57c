"""A real `weaveinf serve`, and what its processes leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2 as httpx
import psutil

from tests.cluster.harness import PATIENCE_S

DEMO = str(Path(__file__).parents[2] / "weaveinf" / "assets" / "demo")
MODEL = "demo"


class Server:
    """The demo's model in float32 behind HTTP, in a process of its own, or in those of `launcher`."""

    def __init__(
        self, *options: str, model: str = DEMO, tp: int = 2, launcher: Sequence[str] = (), **environment: str
    ) -> None:
        command = [sys.executable, *launcher, "-m", "weaveinf", "serve", model, "--served-model-name", MODEL]
        command += ["--tp", str(tp), "--dtype", "float32", "--port", "0", "--kv-cache-gib", "0.05", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("listening on"):
                self._listening.set()

    @property
    def url(self) -> str:
        assert self._listening.wait(PATIENCE_S), self.lines
        return re.findall(r"http://\S+", next(line for line in self.lines if "listening" in line))[0]

    @property
    def address(self) -> tuple[str, int]:
        """For a socket."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def __enter__(self) -> Server:
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        until(lambda: self.client.get("/ready").status_code == 200, self.lines)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.end(signal.SIGTERM)

    def end(self, number: signal.Signals) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks above 0."""
        return psutil.Process(self.process.pid).children()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """A greedy completion unless told otherwise."""
        found = self.post("/v1/completions", **{"prompt": prompt, "temperature": 0} | body)
        assert found.status_code == 200, found.text
        return found.json()

    def text(self, prompt: Any, **body: Any) -> str:
        return self.complete(prompt, **body)["choices"][0]["text"]

    def metric(self, name: str) -> float:
        """A value of /metrics, its labels written as Prometheus writes them."""
        page = self.client.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.M)
        assert found is not None, f"{name} is not in\n{page}"
        return float(found[1])

    def idle(self) -> None:
        """Waits until nothing runs and no page is held."""
        name = f'{{model_name="{MODEL}"}}'
        until(lambda: self.metric("weaveinf_num_requests_running" + name) == 0, self.lines)
        until(lambda: self.metric("weaveinf_kv_cache_usage_ratio") == 0, self.lines)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last is "[DONE]" or an error."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def until(holds: Callable[[], bool], said: Any = "") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
