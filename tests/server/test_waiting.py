"""Whatever a request waits for, its deadline and its client's patience hold, and no other waits with it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.harness import PATIENCE_S
from tests.server.harness import DEMO, Server, until
from weaveinf import SamplingParams
from weaveinf.config import EngineConfig
from weaveinf.engine.structured import MAX_GRAMMARS
from weaveinf.server.async_engine import AsyncEngine, Job
from weaveinf.server.config import ServerConfig
from weaveinf.server.errors import ApiError
from weaveinf.server.metrics import Metrics

MESSAGES = [{"role": "user", "content": "A thing, please."}]


def _chat(schema: Any, **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"messages": MESSAGES, "max_tokens": 5, "response_format": form, **more}


def _slow(number: int) -> dict[str, Any]:
    """Takes all of the processor time that compiling may take."""
    return {"type": "string", "pattern": f"^(.{{1,{40 + number}}}){{1,40}}$"}


def _send(server: Server, path: str, body: dict[str, Any], stack: ExitStack) -> HTTPConnection:
    client = stack.enter_context(closing(HTTPConnection(*server.address, timeout=PATIENCE_S)))
    client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return client


def test_schemas_wait_for_one_another_but_not_for_ever(server: Server) -> None:
    known = _chat({"const": "known"})
    assert server.post("/v1/chat/completions", **known).status_code == 200
    with ExitStack() as stack:
        for number in range(8):  # 40 s of processor time
            _send(server, "/v1/chat/completions", _chat(_slow(number)), stack)
        time.sleep(0.5)
        late = server.post("/v1/chat/completions", **_chat({"const": "new"}, timeout=0.5))
        assert late.status_code == 504, late.text
        assert server.post("/v1/chat/completions", **known, timeout=2).status_code == 200
    # Those whose clients have left are not compiled any more; the one under way is.
    found = server.post("/v1/chat/completions", **_chat({"const": "new"}, timeout=20))
    assert found.status_code == 200, found.text
    assert json.loads(found.json()["choices"][0]["message"]["content"]) == "new"


def test_schemas_in_use_leave_no_room_for_now(server: Server) -> None:
    with ExitStack() as stack:
        for number in range(MAX_GRAMMARS):
            body = _chat({"type": "string", "minLength": 6000 + number}, max_tokens=1500, stream=True)
            assert _send(server, "/v1/chat/completions", body, stack).getresponse().status == 200
        full = server.post("/v1/chat/completions", **_chat({"const": "another"}))
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert full.json()["error"]["param"] == "response_format"
    server.idle()
    assert server.post("/v1/chat/completions", **_chat({"const": "another"})).status_code == 200


def test_the_engine_s_thread_compiles_nothing() -> None:
    engine = AsyncEngine(EngineConfig(model=DEMO), ServerConfig(), Metrics())
    added: list[Any] = []
    fake: Any = SimpleNamespace(add=lambda *given: added.append(given[-1]) or [0])
    job = Job([[1]], SamplingParams(json_schema="{}"), grammar=object())  # type: ignore[arg-type]
    engine._begin(fake, job)
    assert added == [job.grammar]


def test_a_text_that_cannot_fit_is_not_cut(server: Server) -> None:
    long = "ab" * 1_500_000
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": long}]}),
    ):
        found = server.post(path, **body)
        assert found.status_code == 400 and "characters, too many" in found.json()["error"]["message"]


def test_a_deadline_ends_what_nobody_reads(server: Server) -> None:
    aborted = 'weaveinf_request_success_total{finished_reason="abort"}'
    before = server.metric(aborted)
    fields = {"prompt": "x", "max_tokens": 2000, "n": 16, "ignore_eos": True, "logprobs": 20, "stream": True}
    with ExitStack() as stack:
        client = stack.enter_context(closing(HTTPConnection(*server.address)))
        client.sock = socket.socket()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sock.connect(server.address)
        body = json.dumps(fields | {"timeout": 3})  # by then all buffers are full
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: server.metric(aborted) == before + 16)
        server.idle()
        *_, last = [line for line in client.getresponse() if line.startswith(b"data")]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 504


def test_what_never_fits_the_queue_is_no_matter_of_time() -> None:
    engine = AsyncEngine(EngineConfig(model=DEMO, max_num_seqs=2), ServerConfig(max_waiting=1), Metrics())
    engine.state, engine.at_work = "ready", SimpleNamespace(config=engine.config)  # type: ignore[assignment]

    async def run(samples: int) -> None:
        await anext(engine.run(Job([[1]], SamplingParams(n=samples), timeout_s=0.01)))

    with pytest.raises(ApiError, match="time is up"):
        asyncio.run(run(3))
    with pytest.raises(ValueError, match="n: 4 sequences"):
        asyncio.run(run(4))
