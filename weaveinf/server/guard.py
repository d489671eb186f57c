"""What every HTTP request passes: who may ask, how much, and the one line about it in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weaveinf.server.config import ServerConfig
from weaveinf.server.errors import ApiError, error_body
from weaveinf.server.protocol import new_id

log = logging.getLogger("weaveinf")
access = logging.getLogger("weaveinf.access")

OPEN = frozenset({"/", "/health", "/ready"})
"""Need no key: they tell nothing of anybody's requests."""
BODY_S = 30.0
"""A body must be here within this time."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Guard:
    """ASGI middleware around the whole application.

    Handlers leave what the log shall say of a request in `scope["state"]["log"]`.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = config.keys
        self._max_body = config.max_body_bytes
        # Without a key, a page in a browser on this machine is kept out by the names it can be reached under.
        self._local = config.host in _LOCAL and not self._keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id_ = _request_id(headers.get(b"x-request-id", b""))
        seen: dict[str, Any] = {"id": id_}
        scope.setdefault("state", {})["log"] = seen
        began = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id_.encode())]
            await send(message)

        try:
            try:
                self._check(scope, headers)
                body = _Body(receive, self._max_body)
                await self._app(scope, body.receive, answer)
            except Exception as error:
                if "status" in seen:  # an answer has begun
                    raise
                if not isinstance(error, ApiError):
                    log.exception("a request failed")
                    error = ApiError(500, "the server failed; see its log")
                refusal = JSONResponse(error_body(error), error.status_code, error.headers)
                await refusal(scope, receive, answer)
        finally:
            seen |= {"method": scope["method"], "path": scope["path"], "status": seen.get("status", 499)}
            seen["ms"] = round((time.perf_counter() - began) * 1e3, 1)
            access.info(json.dumps(seen, ensure_ascii=True))

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._local and _name(headers.get(b"host", b"")) not in _LOCAL:
            raise ApiError(403, "without an API key this server answers to the names of this machine only")
        if self._keys and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # All are compared, so that the time tells nothing.
            known = sum(hmac.compare_digest(given, key) for key in self._keys)
            if scheme.lower() != b"bearer" or not known:
                raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise ApiError(413, f"the body exceeds {self._max_body} bytes")


class _Body:
    """Receives a body of bounded size, in bounded time."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most
        self._deadline = asyncio.get_running_loop().time() + BODY_S
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body was not here within {BODY_S:.0f} s") from None
        self._left -= len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._left < 0:
            raise ApiError(413, "the body is too large")
        return message


def _request_id(given: bytes) -> str:
    """The client's own, to be found in the log, if it is decent; it is never used as a key."""
    text = given.decode("latin-1")
    return text if 1 <= len(text) <= 128 and text.isascii() and text.isprintable() else new_id()


def _name(host: bytes) -> str:
    """A Host header without its port."""
    text = host.decode("latin-1")
    return text[1:].split("]")[0] if text.startswith("[") else text.rsplit(":", 1)[0]
