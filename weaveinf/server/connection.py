"""One client's connection: what a request's head may cost, and a short way for the parts of its answer."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from weaveinf.server.errors import ApiError, error_body

log = logging.getLogger("weaveinf")

HEAD_BYTES = 64 << 10
HEAD_S = 10.0
"""A request's line and headers must be here within this time, and be no larger where one read does not bring
them whole."""
UNHEARD_BYTES = 4 << 20
"""A client that sends more than is heard is cut off after so much."""
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

    What comes while an answer is due is not heard, and the connection closes after that answer; a client that
    pipelines asks again on another. So its going is noticed, for which all that it sends has to be read.

    An offer to speak HTTP/2, which every Java client makes, is left out: the parser would take the body that
    follows it for the other protocol's.
    """

    _head = b""
    _inside = False
    """Whether the parser is between the ends of a request."""
    _deaf = False
    _held = 0
    """Bytes of a head, of what surrounds a body, which are kept until it ends, or of what is not heard."""
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    @property
    def _due(self) -> bool:
        """Whether an answer is."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        if self._deaf:
            if self._held > UNHEARD_BYTES:
                self.transport.abort()
            return
        if not self._inside and not self._due:
            head, end, rest = (self._head + data).partition(b"\r\n\r\n")
            self._head, data = (b"", _OFFER.sub(b"", head) + end + rest) if end else (head, b"")
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # of CONNECT, which no route allows
        except httptools.HttpParserError:
            if not self._deaf:
                self.send_400_response("this is not HTTP/1.1")
        if self._held > HEAD_BYTES and not self._deaf and not self.transport.is_closing():
            self.send_400_response("the headers are too large")
        self._wait()

    def send_400_response(self, msg: str) -> None:
        log.warning("refused what a client sent: %s", msg)
        if not (self._due and self.cycle.response_started):  # else it would be taken for a part of that
            body = json.dumps(error_body(ApiError(400, msg))).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close" % len(body)
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%b\r\n\r\n%b" % (head, body))
        if self._due:
            self.transport.close()
        else:
            self._deaf = True
            self._end()

    def on_message_begin(self) -> None:
        if self._due:
            self._deaf, self.cycle.keep_alive = True, False
            whole = self.transport
            self.cycle.transport = SimpleNamespace(  # type: ignore[assignment]
                write=whole.write, is_closing=whole.is_closing, close=self._end
            )
            raise ValueError("not heard")
        self._inside = True
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._inside, self._held = False, 0
        super().on_message_complete()

    def _end(self) -> None:
        """Ends the answer, and closes later: a reset, as more comes, would cost its last part."""
        with suppress(OSError):
            self.transport.write_eof()
        self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _wait(self) -> None:
        if self._due and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not self._due and self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
