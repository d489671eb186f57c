"""However a connection's bytes are cut on their way, each request is answered as if it came whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from tests.cluster.harness import PATIENCE_S
from weaveinf.server.config import ServerConfig
from weaveinf.server.connection import Connection
from weaveinf.server.guard import Guard

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nuPGRADE: h2c\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Asked(NamedTuple):
    body: bytes
    chunks: int
    offer: bool

    def encode(self) -> bytes:
        head = b"POST /%d HTTP/1.1\r\nHost: localhost\r\n%b" % (len(self.body), OFFER * self.offer)
        if not self.chunks:
            return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(self.body), self.body)
        size = -(-len(self.body) // self.chunks) or 1
        parts = [self.body[i : i + size] for i in range(0, len(self.body), size)]
        sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return b"%bTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (head, sent)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    told = scope["path"].encode() + b":" + body
    length = (b"content-length", b"%d" % len(told))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": told})


async def begin(scope: Scope, receive: Receive, send: Send) -> None:
    """Begins its answer, and ends it never."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def connected(app: ASGIApp) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    state: dict[str, Any] = {}
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: Connection(config=config, server_state=ServerState(), app_state=state), "127.0.0.1", 0
    )
    async with listener, asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        yield reader, writer
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head of one, in lower case, and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return head, await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r")[0]))


async def ask(segments: list[bytes], answers: list[int]) -> list[bytes]:
    """Bodies of the answers, `answers[i]` of which follow segment i."""
    found = []
    async with connected(echo) as (reader, writer):
        for segment, count in zip(segments, answers, strict=True):
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)  # read on its own
            for _ in range(count):
                head, body = await answer(reader)
                assert head.startswith(b"http/1.1 200 ")
                found.append(body)
    return found


async def pipeline(segments: list[bytes], count: int) -> list[bytes]:
    """Bodies of the answers up to the one after which the connection ends, or to the last."""
    found = []
    async with connected(echo) as (reader, writer):
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)
        while len(found) < count:
            head, body = await answer(reader)
            found.append(body)
            if b"connection: close" in head:
                assert await reader.read() == b""
                break
    return found


def cut(whole: bytes, at: list[int]) -> list[bytes]:
    ends = sorted({0, len(whole), *(place % len(whole) for place in at)})
    return [whole[a:b] for a, b in pairwise(ends)]


bodies = st.binary(max_size=40) | st.just(b"\r\n\r\nUpgrade: h2c\r\n\r\n") | st.just(b"a" * 300_000)
requests = st.builds(Asked, bodies, st.integers(0, 3), st.booleans())
places = st.lists(st.integers(0, 1 << 20), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(requests, places), min_size=1, max_size=4))
def test_requests_one_after_another(asked: list[tuple[Asked, list[int]]]) -> None:
    segments: list[bytes] = []
    answers: list[int] = []
    for one, at in asked:
        parts = cut(one.encode(), at)
        segments += parts
        answers += [0] * (len(parts) - 1) + [1]
    told = [b"/%d:%b" % (len(one.body), one.body) for one, _ in asked]
    assert asyncio.run(ask(segments, answers)) == told


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=2, max_size=4), places)
def test_requests_that_wait_for_no_answer(asked: list[Asked], at: list[int]) -> None:
    """Those that come while an answer is due are to be sent again: it says so."""
    segments = cut(b"".join(one.encode() for one in asked), at)
    told = [b"/%d:%b" % (len(one.body), one.body) for one in asked]
    found = asyncio.run(pipeline(segments, len(asked)))
    assert found and found == told[: len(found)]


def test_requests_sent_at_once() -> None:
    async def look() -> None:
        async with connected(echo) as (reader, writer):
            writer.write(Asked(b"a", 0, False).encode() + b"\r\n")  # an old client's, which is no request
            assert await answer(reader)
            writer.write(Asked(b"b", 0, False).encode() * 3)
            head, body = await answer(reader)
            assert b"connection: close" in head and body == b"/1:b"
            writer.write(b"a" * 100_000)  # and yet the end comes, and no reset
            assert await reader.read() == b""

    asyncio.run(look())


@pytest.mark.parametrize("after", [b"", GET, GET[:20], b"a" * 100_000, b"\r\n"], ids=lambda sent: sent[:9])
def test_that_a_client_left_is_noticed_whatever_it_sent(after: bytes) -> None:
    async def look() -> None:
        left = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async with connected(wait) as (_, writer):
            writer.write(GET + after)
            await writer.drain()
            await asyncio.sleep(0.1)
            assert not left.is_set()
            writer.close()
            await asyncio.wait_for(left.wait(), 1)

    asyncio.run(look())


def test_a_client_that_sends_on_without_end_is_cut_off() -> None:
    async def look() -> None:
        async with connected(begin) as (_, writer):
            with pytest.raises(ConnectionError):
                writer.write(GET)
                for _ in range(1000):
                    writer.write(b"GET /" + b"a" * 65536)
                    await writer.drain()

    asyncio.run(look())


def test_the_next_request_directly_after_an_answer() -> None:
    """However quick the client, its connection is kept."""

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body"})
        else:
            await echo(scope, receive, send)

    async def look() -> None:
        async with connected(stream) as (reader, writer):
            for i in range(4000):
                writer.write(Asked(b"%d" % i, 0, True).encode())
                assert b"connection: close" not in (await answer(reader))[0]
                writer.write(GET.replace(b"/", b"/stream", 1))
                assert b"connection: close" not in await reader.readuntil(b"0\r\n\r\n")
                writer.write(GET.replace(b"GET", b"HEAD"))
                assert b"connection: close" not in await reader.readuntil(b"\r\n\r\n")

    asyncio.run(look())


@pytest.mark.parametrize(
    ("sent", "words"),
    [(b"\x16\x03\x01\x02\r\n\r\n", "not HTTP"), (GET[:-2] + b"X: " + b"a" * (300 << 10), "too large")],
    ids=["another protocol", "a large head"],
)
def test_what_the_parser_refuses_is_told_in_openai_s_shape(sent: bytes, words: str) -> None:
    async def look() -> None:
        async with connected(echo) as (reader, writer):
            writer.write(sent)
            head, body = await answer(reader)
            assert head.startswith(b"http/1.1 400 ") and b"content-type: application/json" in head
            assert b"connection: close" in head
            error = json.loads(body)["error"]
            assert words in error["message"] and error["type"] == "invalid_request_error"
            assert error["code"] == 400 and error["param"] is None
            writer.write(sent)
            assert await reader.read() == b""

    asyncio.run(look())


def test_a_refusal_is_no_part_of_an_answer_that_has_begun() -> None:
    async def look() -> None:
        async with connected(begin) as (reader, writer):
            writer.write(GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"no size of a chunk\r\n")
            assert await reader.read() == b""

    asyncio.run(look())


def test_the_scheme_of_a_key_is_written_in_any_case(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("our-key\n")
    client = TestClient(Guard(echo, ServerConfig(api_key_file=str(keys))))
    right = ["Bearer our-key", "bearer our-key", "BEARER our-key"]
    wrong = ["bearer our-ke", "bearer", "our-key", "basic our-key", "bearerour-key"]
    for value in right + wrong:
        found = client.get("/v1/models", headers={"Authorization": value})
        assert (found.status_code == 200) == (value in right), value
