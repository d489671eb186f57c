"""However a connection's bytes are cut on their way, each request is answered as if it had come whole."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any, NamedTuple

import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.cluster.harness import PATIENCE_S
from weaveinf.server.connection import Connection

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nuPGRADE: h2c\r\n"


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
        more = message["more_body"]
    told = scope["path"].encode() + b":" + body
    length = (b"content-length", b"%d" % len(told))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": told})


async def ask(segments: list[bytes], answers: list[int]) -> list[bytes]:
    """Bodies of the answers, `answers[i]` of which follow segment i."""
    config = uvicorn.Config(echo, http=Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    state: dict[str, Any] = {}
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: Connection(config=config, server_state=ServerState(), app_state=state), "127.0.0.1", 0
    )
    found = []
    async with listener, asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        for segment, count in zip(segments, answers, strict=True):
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)  # read on its own
            for _ in range(count):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
                found.append(await reader.readexactly(length))
        writer.close()
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
    asked = [one._replace(offer=False) for one in asked]
    segments = cut(b"".join(one.encode() for one in asked), at)
    told = [b"/%d:%b" % (len(one.body), one.body) for one in asked]
    assert asyncio.run(ask(segments, [0] * (len(segments) - 1) + [len(asked)])) == told
