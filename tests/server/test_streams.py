"""A stream's parts take two ways to its client, and come in order."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection, IncompleteRead
from types import SimpleNamespace

from starlette.types import Message

from tests.cluster.harness import PATIENCE_S
from tests.server.harness import DEMO, Server
from weaveinf import SamplingParams
from weaveinf.comm.errors import RankDied
from weaveinf.config import EngineConfig
from weaveinf.server.answers import CompletionAnswer
from weaveinf.server.app import _Stream
from weaveinf.server.async_engine import AsyncEngine, Job, Piece
from weaveinf.server.config import ServerConfig
from weaveinf.server.metrics import Metrics
from weaveinf.server.protocol import CompletionRequest


def test_however_slowly_it_is_read(server: Server) -> None:
    wanted = _wanted(server)
    *events, last = _read_slowly(server)
    found, ends = _of_samples(events)
    assert last == b"data: [DONE]\n" and ends == ["length"] * 16
    assert [*found.values()] == [wanted] * 16


def test_a_reader_that_half_closes(server: Server) -> None:
    """It has left, as far as a server can tell; what it still gets has no gaps and does not look whole."""
    wanted = _wanted(server)
    found, ends = _of_samples(_read_slowly(server, half_closes=True))
    assert ends == [] and any(found.values())
    assert all(ids == wanted[: len(ids)] for ids in found.values())
    server.idle()


FIELDS = {"prompt": "def softmax(x):", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def _wanted(server: Server) -> list[int]:
    (choice,) = server.complete(**FIELDS, return_token_ids=True)["choices"]
    return choice["token_ids"]


def _read_slowly(server: Server, half_closes: bool = False) -> list[bytes]:
    """The lines of a stream of 16 samples that holds more than all buffers on its way."""
    body = json.dumps(FIELDS | {"n": 16, "logprobs": 20, "stream": True, "return_token_ids": True})
    lines = []
    with closing(HTTPConnection(*server.address)) as client, suppress(IncompleteRead):
        client.sock = socket.socket()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it tells of its window
        client.sock.settimeout(PATIENCE_S)
        client.sock.connect(server.address)
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = client.getresponse()
        if half_closes:
            client.sock.shutdown(socket.SHUT_WR)
        for line in response:
            time.sleep(1e-4)
            lines.append(line)
    return [line for line in lines if line.endswith(b"\n") and line != b"\n"]


def _of_samples(events: list[bytes]) -> tuple[dict[int, list[int]], list[str]]:
    """The tokens of each, and the reasons for which they ended."""
    found: dict[int, list[int]] = {number: [] for number in range(16)}
    ends = []
    for event in events:
        (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
        found[choice["index"]] += choice["token_ids"]
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return found, ends


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

    def deliver_now(text: str, sample: int = 0, end: str | None = None) -> None:
        engine._deliver([(job, Piece(sample, text, [1], [], end, None))])

    async def deliver(text: str, sample: int = 0, end: str | None = None) -> None:
        deliver_now(text, sample, end)
        await asyncio.sleep(0.01)

    async def run() -> None:
        drained = asyncio.Event()

        async def send(message: Message) -> None:
            await drained.wait()
            note("layers", message.get("body", b""))

        async def receive() -> Message:
            return await asyncio.get_running_loop().create_future()

        def push(make: Callable[..., bytes], *given: object) -> bool:
            if drained.is_set():
                note("past", make(*given))
            return drained.is_set()

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
        drained.set()  # but the task that sends it has not had its turn yet
        await deliver("f", sample=1)
        await deliver("g", sample=1)
        drained.clear()
        deliver_now("h", sample=1)
        drained.set()  # but the task has not taken what was refused
        await deliver("i", sample=1)
        await deliver("j", sample=1, end="stop")
        await running

    asyncio.run(run())
    assert b"".join(text for _, text in sent) == b"abcdefghij"
    assert [text for way, text in sent if way == "past"] == [b"c", b"d", b"g"]
    assert job.num_answered == len(sent)


def test_a_piece_that_a_rescue_takes_back_wakes_nobody() -> None:
    """Its ranks die between the piece and the turn of its client's task: what comes anew counts."""
    engine = AsyncEngine(EngineConfig(model=DEMO), ServerConfig(), Metrics())
    engine.state, engine.at_work = "ready", SimpleNamespace(config=engine.config)  # type: ignore[assignment]
    job = Job([[1]], SamplingParams())

    def deliver(text: str) -> None:
        engine._deliver([(job, Piece(0, text, [1], [], "length", None))])

    async def run() -> list[Piece]:
        first = asyncio.ensure_future(anext(engine.run(job)))
        await asyncio.sleep(0.01)
        job.ids = [0]
        deliver("lost")
        engine._rescue(RankDied(1, "killed"))
        await asyncio.sleep(0.01)
        deliver("new")
        return await first

    (piece,) = asyncio.run(run())
    assert piece.text == "new"
