"""One client's connection: what a request's head may cost, and a short way for the parts of its answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES = 64 << 10
HEAD_S = 10.0
"""A request's line and headers must be here within this time, and be no larger where one read does not bring
them whole."""
_OFFER = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


def with_push(app: ASGIApp) -> ASGIApp:
    """Shows the application, as `scope["push"]`, a short way to its client: see `_push`."""

    async def shown(scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(cycle := getattr(send, "__self__", None), RequestResponseCycle):
            scope = {**scope, "push": partial(_push, cycle)}
        await app(scope, receive, send)

    return shown


def _push(cycle: RequestResponseCycle, make: Callable[..., bytes], *given: Any) -> bool:
    """Makes and sends a part of an answer that has begun, past all layers; False where that would wait."""
    if cycle.flow.write_paused:
        return False
    if part := make(*given):
        with suppress(StopIteration):  # it has run to its end, as it had not to wait
            cycle.send({"type": "http.response.body", "body": part, "more_body": True}).send(None)
    return True


class Connection(HttpToolsProtocol):
    """Closes when a request's head does not come in time, or is too large.

    An offer to speak HTTP/2, which every Java client makes, is left out: the parser would take the body that
    follows it for the other protocol's.
    """

    _head = b""
    _inside = False
    """Whether the parser is between the ends of a request."""
    _held = 0
    """Bytes of a head, or of what surrounds a body, which are kept until it ends."""
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        if not self._inside:
            head, end, rest = (self._head + data).partition(b"\r\n\r\n")
            self._head, data = (b"", _OFFER.sub(b"", head) + end + rest) if end else (head, b"")
        super().data_received(data)
        if self._held > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")
        self._wait()

    def on_message_begin(self) -> None:
        self._inside = True
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._inside, self._held = False, 0
        super().on_message_complete()

    def _wait(self) -> None:
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not begun and self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
