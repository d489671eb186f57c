"""The server under Ray Serve, with as many engines as the load asks for:

    serve run weaveinf.server.ray_app:build model=path/or/hub-id tensor_parallel_size=2 max_replicas=4

A request passes two deployments: the front reads it and picks an engine by how its prompt begins, so that
prompts of one beginning meet in one cache.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from weaveinf.cluster.ray import see_all_cards, share
from weaveinf.config import EngineConfig
from weaveinf.server.app import make_app
from weaveinf.server.async_engine import AsyncEngine
from weaveinf.server.config import ServerConfig
from weaveinf.server.errors import ApiError, error_body
from weaveinf.server.guard import BODY_S
from weaveinf.server.metrics import Metrics, together

T = TypeVar("T")

FRONTS = 2
"""The loss of a node leaves one."""
PREFIX_BYTES = 512
"""Of a prompt as it came: two that agree in them go to the same engine."""
BUSIER = 8
"""Unless it has so many requests more than the least busy one."""
METRICS_S = 10.0
"""Engines have so long to tell them."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Engines, and what they take.

    min_replicas, max_replicas: between them, there are as many as keep the requests of each at what it runs
    at a time (`max_num_seqs`). num_cpus: that Ray counts for a rank on a CPU, and its threads where it is
    the engine's only one. upscale_delay_s, downscale_delay_s: so long the load must ask for another number.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: int = 1
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


def build(args: dict[str, Any]) -> serve.Application:
    """The application, from any fields of `EngineConfig`, `ServerConfig` and `Scale`, as text or as they are.

    ValueError for a field that none of them has, or a value out of its range.
    """
    known = {name for kind in (EngineConfig, ServerConfig, Scale) for name in kind.__dataclass_fields__}
    if unknown := args.keys() - known:
        raise ValueError(f"unknown setting {min(unknown)!r}: see EngineConfig, ServerConfig and Scale")
    given = {"executor": "ray", "served_model_name": args.get("model"), **args}
    if Path(str(args.get("model"))).is_dir():  # replicas have a working directory of their own
        given["model"] = str(Path(args["model"]).absolute())
    config, server, scale = _read(EngineConfig, given), _read(ServerConfig, given), _read(Scale, given)
    if not ray.is_initialized():  # `serve run` joins the cluster only after this
        ray.init(namespace="serve", logging_level=logging.WARNING)
    take = share(config.device)
    if "CPU" in take:
        take["CPU"] = scale.num_cpus
    engines = serve.deployment(
        ray_actor_options={"num_cpus": take.get("CPU", 0), "num_gpus": take.get("GPU", 0)},
        placement_group_bundles=[take] * config.tensor_parallel_size,
        placement_group_strategy=config.placement.upper(),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=config.max_num_seqs,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
        ),
        max_ongoing_requests=config.max_num_seqs + server.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),  # type: ignore[arg-type]
        graceful_shutdown_timeout_s=server.drain_s,
    )(Replica)
    front = serve.deployment(
        num_replicas=FRONTS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=scale.max_replicas * (config.max_num_seqs + server.max_waiting),
    )(Front)
    return front.bind(engines.bind(config, server), server.max_body_bytes)


def _read(kind: type[T], given: dict[str, Any]) -> T:
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return TypeAdapter(kind).validate_python({name: given[name] for name in given.keys() & fields})


class PrefixRouter(RequestRouter):
    """Sends a request to the engine that its first argument, the beginning of its prompt, hashes to.

    When an engine comes or goes, only its own share of the beginnings moves.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or len(candidate_replicas) < 2:
            return [candidate_replicas]
        beginning = pending_request.args[0]

        def rank(replica: RunningReplica) -> bytes:
            return blake2b(beginning, key=replica.replica_id.unique_id.encode()[:64]).digest()

        first, *others = sorted(candidate_replicas, key=rank)
        load = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas}
        if load[first.replica_id] > min(load.values()) + BUSIER:
            return [others, [first]]
        return [[first], others]


class Front:
    """Reads a request, passes it to an engine and its answer back, as it comes."""

    def __init__(self, engines: DeploymentHandle, max_body_bytes: int) -> None:
        self._engines = engines.options(stream=True)
        self._most = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        if request.url.path == "/metrics":
            return await self._metrics(scope)
        body = b""
        with suppress(TimeoutError):  # the engine refuses what is not whole, or too large
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    if len(body) > self._most:
                        break
        starts = [at for at in (body.find(b'"messages"'), body.find(b'"prompt"')) if at >= 0]
        at = min(starts, default=0)
        answer = self._engines.answer.remote(body[at : at + PREFIX_BYTES], scope, body)
        return _Passed(cast(AsyncIterator[Message], answer))

    async def _metrics(self, scope: Scope) -> Response:
        """Of all engines. One that is going is left out."""
        asked = self._engines.broadcast("whole", scope)
        answers = await asked.results_async(timeout_s=METRICS_S, return_exceptions=True)
        pages = {}
        for name, status, page in (one for one in answers if not isinstance(one, Exception)):
            if status != 200:
                return Response(page, status, media_type="application/json")
            pages[name] = page.decode()
        return Response(together(pages), media_type=CONTENT_TYPE_LATEST)


class _Passed(Response):
    """An answer that another process gives."""

    def __init__(self, messages: AsyncIterator[Message]) -> None:
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False
        try:
            async for message in self._messages:
                began = True
                await send(message)
        except RayError:
            if began:
                raise  # the connection ends, and the client sees that
            error = ApiError(503, "the engine that had this request is gone; come again", retry_after=1)
            await JSONResponse(error_body(error), 503, error.headers)(scope, receive, send)


class Replica:
    """One engine, in whose placement group its ranks are; this process is rank 0."""

    async def __init__(self, config: EngineConfig, server: ServerConfig) -> None:  # type: ignore[misc]
        if config.tensor_parallel_size > 1:
            see_all_cards()
        self._engine = AsyncEngine(config, server, Metrics())
        self._app = make_app(self._engine, server)
        await self._engine.start()

    async def check_health(self) -> None:
        """RuntimeError when Ray Serve shall make another replica in place of this."""
        if (words := self._engine.silent()) is not None:
            raise RuntimeError(words)

    async def whole(self, scope: Scope) -> tuple[str, int, bytes]:
        """This engine's name, and its answer to a request without a body: the status and the content."""
        start, *rest = [message async for message in self.answer(b"", scope, b"")]
        name = serve.get_replica_context().replica_id.unique_id
        return name, start["status"], b"".join(message["body"] for message in rest)

    async def answer(self, beginning: bytes, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """What the ASGI application sends. Left early, the application is told that its client has gone."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        given = iter([{"type": "http.request", "body": body}])
        gone = asyncio.Event()

        async def receive() -> Message:
            if (whole := next(given, None)) is not None:
                return whole
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self._app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await working
        finally:
            gone.set()
            await working

    async def __del__(self) -> None:
        await asyncio.to_thread(self._engine.close)
