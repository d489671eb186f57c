"""The HTTP routes: OpenAI's, the probes, the metrics and the status page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from weaveinf import __version__
from weaveinf.engine.request import SamplingParams
from weaveinf.engine.structured import Busy, Grammar
from weaveinf.engine.tokenizer import TextTokenizer
from weaveinf.server import tools
from weaveinf.server.answers import Answer, ChatAnswer, CompletionAnswer, Object, head, usage
from weaveinf.server.async_engine import AsyncEngine, Job, Piece
from weaveinf.server.config import ServerConfig
from weaveinf.server.errors import ApiError, ErrorBody, error_body
from weaveinf.server.guard import Guard
from weaveinf.server.metrics import EngineCollector
from weaveinf.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    StreamOptions,
    TokenizeRequest,
)
from weaveinf.server.status import page, status
from weaveinf.server.tracing import Traced

T = TypeVar("T")
log = logging.getLogger("weaveinf")

LATE_S = 60.0
"""So long after a request's deadline its client may take to read the answer."""
TEXT_THREADS = 2
"""Threads that turn text into tokens, so that the event loop never does."""
MAX_COMPILING = 16
"""Requests whose schemas wait to be compiled, one after another."""


def make_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The application over an engine, which whoever serves it starts and closes."""
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in ("4XX", "5XX")}
    app = FastAPI(title="weaveinf", version=__version__, docs_url=None, redoc_url=None, responses=refusals)
    app.router.route_class = _Route
    app.add_middleware(Guard, config=config)
    if config.otlp_endpoint is not None:
        app.add_middleware(Traced, endpoint=config.otlp_endpoint)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValueError, _wrong)
    _Routes(engine, config).add_to(app)
    return app


class _Routes:
    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        self._model = config.served_model_name or engine.config.model
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")
        self._compiler = ThreadPoolExecutor(1, "schemas")
        self._num_compiling = 0
        engine.metrics.registry.register(EngineCollector(engine, self._model))

    def add_to(self, app: FastAPI) -> None:
        streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
        app.post("/v1/chat/completions", responses=streams)(self.chat)
        app.post("/v1/completions", responses=streams)(self.complete)
        app.post("/tokenize")(self.tokenize)
        app.post("/detokenize")(self.detokenize)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.get("/health")(self.health)
        app.get("/ready")(self.ready)
        app.get("/version")(self.version)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        app.get("/status")(self.status)
        app.get("/", include_in_schema=False)(self.page)

    # Completions

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        return await self._reply(http, body, self._completion(body))

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        return await self._reply(http, body, self._chat(body))

    async def _completion(self, body: CompletionRequest) -> Answer:
        tokenizer = self._tokenizer(body.model)
        prompts, texts = [one for one in body.prompts() if not isinstance(one, str)], list[str]()
        if body.echo or not prompts:
            prompts, texts = await self._text(self._prompts, body, tokenizer)
        return CompletionAnswer(body, self._job(body, prompts, body.params()), texts, tokenizer)

    async def _chat(self, body: ChatRequest) -> Answer:
        tokenizer = self._tokenizer(body.model)
        offered = tools.offered(body)
        params = body.params(tools.required(body, offered))
        if offered and params.json_schema is None and tokenizer is not None and not tokenizer.shows_tools:
            raise ValueError("tools: this model's chat template shows none; only calls that must come can")
        prompt = await self._text(self._render, body, offered)
        job = self._job(body, [prompt], params)
        if params.json_schema is not None:
            try:
                job.grammar = await self._grammar(params.json_schema)
            except ValueError as error:
                field = "tools" if body.response_format is None else "response_format"
                again = 1 if isinstance(error, Busy) else None
                raise ApiError(429 if again else 400, str(error), field, again) from None
        return ChatAnswer(body, job, offered, tokenizer)

    def _tokenizer(self, model: str | None) -> TextTokenizer | None:
        """Of the model, which must be the one that is served. ApiError (503) while there is none."""
        if model not in (None, self._model):
            raise ApiError(404, f"the model {model!r:.100} is not served here; {self._model!r} is", "model")
        return self._engine.engine.tokenizer

    async def _text(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    async def _grammar(self, schema: str) -> Grammar:
        """In a thread that text does not need, unless it is known; never, if given up while it waits."""
        if (known := self._engine.engine.grammars.find(schema)) is not None:
            return known
        if self._num_compiling == MAX_COMPILING:
            raise Busy(f"json_schema: {MAX_COMPILING} others wait to be compiled; try again later")
        self._num_compiling += 1
        try:
            loop, compile = asyncio.get_running_loop(), self._engine.engine.compile
            return await loop.run_in_executor(self._compiler, compile, schema)
        finally:
            self._num_compiling -= 1

    def _prompts(
        self, body: CompletionRequest, tokenizer: TextTokenizer | None
    ) -> tuple[list[list[int]], list[str]]:
        """Token ids of every prompt, and their texts where these are echoed."""
        prompts = body.prompts()
        encode = self._engine.engine.encode
        ids = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if not body.echo:
            return ids, []
        self._check("prompt", [token for prompt in ids for token in prompt])
        return ids, [one if isinstance(one, str) else _spelt(tokenizer, one) for one in prompts]

    def _check(self, field: str, ids: Sequence[int]) -> None:
        size = self._engine.engine.model_config.vocab_size
        if any(not 0 <= id_ < size for id_ in ids):
            raise ValueError(f"{field} holds a token id outside 0 to {size - 1}")

    def _render(self, body: ChatRequest, offered: Sequence[tools.Tool]) -> list[int]:
        given = [tool.model_dump(exclude_none=True) for tool in offered] or None
        return self._engine.engine.render_chat([message.plain() for message in body.messages], given)

    def _job(self, body: Sampling, prompts: list[list[int]], params: SamplingParams) -> Job:
        if (most := self._config.max_output_tokens) is not None:
            if params.max_tokens is None:
                params = replace(params, max_tokens=most)
            elif params.max_tokens > most:
                raise ValueError(f"max_tokens must be at most {most} on this server")
        salt = (body.cache_salt or "").encode()
        return Job(prompts, params, body.stream, salt, body.priority, self._timeout_s(body))

    def _timeout_s(self, body: Sampling) -> float:
        return min(self._config.timeout_s, body.timeout or self._config.timeout_s)

    async def _begin(
        self, http: Request, body: Sampling, preparing: Coroutine[Any, Any, Answer]
    ) -> tuple[Answer, Object, list[Piece], AsyncGenerator[list[Piece]]]:
        """An answer, what it begins with, its first pieces and the others."""
        try:
            async with asyncio.timeout(self._timeout_s(body)):
                answer = await preparing
        except TimeoutError:
            raise ApiError(504, "the request's time is up before it was begun") from None
        job, top = answer.job, head(answer.names, self._model, body.stream)
        seen = http.state.log
        seen |= {"answer": top["id"], "prompts": len(job.prompts), "output_tokens": 0}
        seen["prompt_tokens"] = sum(map(len, job.prompts))
        seen |= {} if body.user is None else {"user": body.user}
        seen |= {"prompt_token_ids": job.prompts} if self._config.log_prompts else {}
        pieces = self._engine.run(job)
        return answer, top, await anext(pieces), pieces

    async def _reply(self, http: Request, body: Sampling, preparing: Coroutine[Any, Any, Answer]) -> Response:
        try:
            begun = await _unless_gone(http.receive, self._begin(http, body, preparing))
        except _Gone:
            return Response(status_code=499)
        answer, top, first, pieces = begun
        if body.stream:
            return _Stream(top, answer, first, pieces)
        await pieces.aclose()
        job = answer.job

        def whole() -> Response:
            found = sorted(first, key=lambda piece: piece.sample)
            choices = [choice for piece in found for choice in answer.choices(piece)]
            told = pydantic_core.to_json(top | {"choices": choices, "usage": usage(job)})
            return Response(told, media_type="application/json")

        # Log-probabilities may be megabytes of text.
        reply = whole() if job.params.logprobs is None else await self._text(whole)
        http.state.log["output_tokens"] = job.num_answered
        return reply

    # The other routes

    async def tokenize(self, body: TokenizeRequest) -> Object:
        self._tokenizer(body.model)
        if isinstance(given := body.texts(), str):
            ids = await self._text(self._engine.engine.encode, given)
        else:
            ids = await self._text(self._render, body, body.tools or [])
        most = self._engine.engine.model_config.max_model_len
        return {"count": len(ids), "max_model_len": most, "tokens": ids}

    async def detokenize(self, body: DetokenizeRequest) -> Object:
        if (tokenizer := self._tokenizer(body.model)) is None:
            raise ValueError("tokens: this model has no tokenizer")
        self._check("tokens", body.tokens)
        return {"prompt": await self._text(_spelt, tokenizer, body.tokens)}

    async def models(self) -> Object:
        return {"object": "list", "data": [await self.model(self._model)]}

    async def model(self, name: str) -> Object:
        self._tokenizer(name)
        most = self._engine.engine.model_config.max_model_len
        one = {"id": self._model, "object": "model", "created": 0, "owned_by": "weaveinf"}
        return one | {"max_model_len": most}

    async def health(self) -> Response:
        silent = self._engine.silent()
        return JSONResponse({"status": silent or "ok"}, 200 if silent is None else 503)

    async def ready(self) -> Response:
        silent = "draining" if self._engine.state == "draining" else self._engine.silent()
        return JSONResponse({"status": silent or "ok"}, 200 if silent is None else 503)

    async def version(self) -> Object:
        return {"version": __version__}

    async def metrics(self) -> Response:
        page = await asyncio.to_thread(generate_latest, self._engine.metrics.registry)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def status(self) -> Object:
        return status(self._engine, self._model)

    async def page(self) -> Response:
        return HTMLResponse(*page())


class _Stream(Response):
    """Server-sent events: a chunk for each choice of each piece, then the usage if it is wanted.

    When the client leaves, what makes them is cancelled.
    """

    def __init__(
        self, top: Object, answer: Answer, first: list[Piece], rest: AsyncGenerator[list[Piece]]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._top, self._answer, self._job, self._first, self._rest = top, answer, answer.job, first, rest
        self._options = options = answer.request.stream_options or StreamOptions()
        # All chunks begin alike, and end alike unless they tell of the tokens so far.
        self._begin = b'data: %b,"choices":[' % pydantic_core.to_json(top)[:-1]
        self._end = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._job.timeout_s + LATE_S), aclosing(self._rest):
                await _unless_gone(receive, self._send(send, scope.get("push")))
        except (_Gone, TimeoutError):
            scope["state"]["log"]["status"] = 499
        finally:
            scope["state"]["log"]["output_tokens"] = self._job.num_answered

    def _push(self, past_layers: Callable[..., bool], piece: Piece) -> bool:
        try:
            return past_layers(self._events, [piece])
        except Exception as error:
            self._job.push = None
            self._job.fail(error)
            return True

    async def _send(self, send: Send, past_layers: Callable[..., bool] | None) -> None:
        push = None if past_layers is None else partial(self._push, past_layers)

        async def part(body: bytes, more: bool = True) -> None:
            self._job.push = None  # what comes while this part has to wait must not overtake it
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self._job.push = push if more else None

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            pieces = self._first
            while self._job.left:
                if events := self._events(pieces):
                    await part(events)
                pieces = await anext(self._rest)
            await part(self._events(pieces) + self._last(), more=False)
        except Exception as error:
            if not isinstance(error, HTTPException):
                log.exception("a stream failed")
                error = ApiError(500, "the server failed; see its log")
            await part(b"data: %b\n\n" % pydantic_core.to_json(error_body(error)), more=False)

    def _events(self, pieces: list[Piece]) -> bytes:
        choices = [choice for piece in pieces for choice in self._answer.choices(piece)]
        end = self._end
        if self._options.continuous_usage_stats:
            end = b'],"usage":%b}\n\n' % pydantic_core.to_json(usage(self._job))
        return b"".join([self._begin + pydantic_core.to_json(choice) + end for choice in choices])

    def _last(self) -> bytes:
        told = pydantic_core.to_json(self._top | {"choices": [], "usage": usage(self._job)})
        return (b"data: %b\n\n" % told if self._options.include_usage else b"") + b"data: [DONE]\n\n"


def _spelt(tokenizer: TextTokenizer | None, ids: list[int]) -> str:
    """The text of a prompt's tokens, special ones too; empty without a tokenizer."""
    return "" if tokenizer is None else tokenizer.backend.decode(ids, skip_special_tokens=False)


class _Gone(Exception):
    """The client has left."""


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` returns. It is cancelled, and _Gone raised, when the client leaves."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Route(APIRoute):
    """A route whose JSON is strict: no NaN, no half of a surrogate pair, no endless nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.state.log["param"] = getattr(error, "param", None)
    return JSONResponse(error_body(error), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]
    what = "is not known here" if first["type"] == "extra_forbidden" else first["msg"]
    if not path and "json" not in request.headers.get("content-type", ""):
        what = "the body must be JSON, with the header Content-Type: application/json"
    message = f"{'.'.join(path)}: {what}" if path else what
    return await _refused(request, ApiError(400, message, path[0] if path else None))


async def _wrong(request: Request, error: Exception) -> Response:
    """The words of a ValueError begin with the field, where they are about one."""
    words = str(error).replace("=", " ").replace(":", " ").replace("[", " ").split()[:3]
    fields = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys() | {"tokens"}
    param = next((word for word in words if word in fields), None)
    return await _refused(request, ApiError(400, str(error), param))
