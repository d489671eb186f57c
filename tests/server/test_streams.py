"""A stream's parts take two ways to its client, and come in order."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace

from starlette.types import Message

from tests.cluster.harness import PATIENCE_S
from tests.server.harness import DEMO, Server
from weaveinf import SamplingParams
from weaveinf.config import EngineConfig
from weaveinf.server.answers import CompletionAnswer
from weaveinf.server.app import _Stream
from weaveinf.server.async_engine import AsyncEngine, Job, Piece
from weaveinf.server.config import ServerConfig
from weaveinf.server.metrics import Metrics
from weaveinf.server.protocol import CompletionRequest


def test_however_slowly_it_is_read(server: Server) -> None:
    fields = {"prompt": "def softmax(x):", "max_tokens": 600, "ignore_eos": True, "temperature": 0}
    (wanted,) = server.complete(**fields, return_token_ids=True)["choices"]
    body = json.dumps(fields | {"n": 16, "logprobs": 20, "stream": True, "return_token_ids": True})
    found: dict[int, list[int]] = {number: [] for number in range(16)}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        client.settimeout(PATIENCE_S)
        head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        with client.makefile("rb") as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
                    found[choice["index"]] += choice["token_ids"]
                    time.sleep(1e-4)
    assert [*found.values()] == [wanted["token_ids"]] * 16


def test_what_waits_is_not_overtaken() -> None:
    """Pieces go past the application's layers, but for the first and last, and those that come while another
    waits to be sent."""
    engine = AsyncEngine(EngineConfig(model=DEMO), ServerConfig(), Metrics())
    engine.state, engine.at_work = "ready", SimpleNamespace(config=engine.config)  # type: ignore[assignment]
    job = Job([[1]], SamplingParams(n=2), stream=True)
    answer = CompletionAnswer(CompletionRequest(prompt=[1], n=2, stream=True), job, [], None)
    sent: list[tuple[str, bytes]] = []

    def note(way: str, part: bytes) -> None:
        sent.extend((way, text) for text in re.findall(rb'"text":"(.)"', part))

    async def deliver(text: str, sample: int = 0, end: str | None = None) -> None:
        engine._deliver([(job, Piece(sample, text, [1], [], end, None))])
        await asyncio.sleep(0.01)

    async def run() -> None:
        drained = asyncio.Event()

        async def send(message: Message) -> None:
            await drained.wait()
            note("layers", message.get("body", b""))

        async def receive() -> Message:
            return await asyncio.get_running_loop().create_future()

        def push(make: Callable[..., bytes], *given: object) -> None:
            note("past", make(*given))

        pieces = engine.run(job)
        first = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.01)
        await deliver("a")
        stream = _Stream({}, answer, await first, pieces)
        running = asyncio.ensure_future(stream({"push": push, "state": {"log": {}}}, receive, send))
        await deliver("b")
        drained.set()
        await asyncio.sleep(0.01)
        await deliver("c")
        await deliver("d")
        drained.clear()
        await deliver("e", end="length")
        await deliver("f", sample=1)
        drained.set()
        await asyncio.sleep(0.01)
        await deliver("g", sample=1)
        await deliver("h", sample=1, end="stop")
        await running

    asyncio.run(run())
    ways = ["layers", "layers", "past", "past", "layers", "layers", "past", "layers"]
    assert sent == [*zip(ways, (b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"), strict=True)]
