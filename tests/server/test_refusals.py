"""Whatever is wrong with a request, it is refused at once, by name, with OpenAI's status; it harms nobody."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.harness import PATIENCE_S
from tests.server.harness import DEMO, MODEL, Server, until
from weaveinf.commands.serve import UNREAD_S
from weaveinf.config import EngineConfig
from weaveinf.server.app import make_app
from weaveinf.server.async_engine import AsyncEngine
from weaveinf.server.config import ServerConfig
from weaveinf.server.guard import OPEN
from weaveinf.server.metrics import Metrics
from weaveinf.server.protocol import CompletionRequest, Message, TokenizeRequest

CHAT = {"messages": [{"role": "user", "content": "a"}]}
FORM = {"json_schema": {"name": "a", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]


def called(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 65}, "prompt"),
    ("/v1/completions", {"prompt": [1, 2, 10**6]}, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, "prompt"),
    ("/v1/completions", {"prompt": [True]}, "prompt"),
    ("/v1/completions", {"prompt": 7}, "prompt"),
    ("/v1/completions", {"prompt": "a " * 5000}, "prompt"),
    ("/v1/completions", {"prompt": "a" * 3_000_000}, "prompt"),
    ("/v1/completions", {"prompt": [5] * 2048}, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2**62}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": True}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "n": 10**9}, "n"),
    ("/v1/completions", {"prompt": "a", "n": 0}, "n"),
    ("/v1/completions", {"prompt": "a", "temperature": -0.1}, "temperature"),
    ("/v1/completions", {"prompt": None}, "prompt"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": None}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, "top_p"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, "seed"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, "stop"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"9999999": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 1000}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [10**7]}, "stop_token_ids"),
    ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/v1/completions", {"prompt": "a", "timeout": 0}, "timeout"),
    ("/v1/completions", {"prompt": "a", "priority": 2**40}, "priority"),
    ("/v1/completions", {"prompt": "a", "selector_budget": 5}, "selector_budget"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"prompt": "a", "user": "u" * 129}, "user"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 99}, "min_tokens"),
    ("/v1/chat/completions", {}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages"),
    ("/v1/chat/completions", {"messages": IMAGE}, "messages"),
    ("/v1/chat/completions", {"messages": [called(r'{"a": "\ud800"}')]}, "messages"),
    ("/v1/chat/completions", {"messages": [called('{"a": NaN}')]}, "messages"),
    ("/v1/chat/completions", {"messages": [called("[" * 9999)]}, "messages"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"functions": []}, "functions"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "auto"}, "tool_choice"),
    ("/v1/chat/completions", CHAT | {"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "xml"}}, "response_format"),
    ("/v1/chat/completions", CHAT | {"response_format": FORM | {"type": "text"}}, "response_format"),
    ("/v1/chat/completions", CHAT | {"response_format": FORM | {"type": "json_object"}}, "response_format"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, "response_format"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", CHAT | {"prompt": "a"}, "prompt"),
    ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
    ("/tokenize", {"prompt": None, "messages": None}, "prompt"),
    ("/detokenize", {"tokens": [10**7]}, "tokens"),
    ("/detokenize", {"tokens": None}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(server: Server, path: str, body: dict[str, Any], field: str) -> None:
    found = server.post(path, **body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == field and field in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"] == 400
    assert len(error["message"]) < 300


def test_options_of_a_stream_need_one() -> None:
    asked = CompletionRequest.model_validate({"prompt": "a", "stream_options": {}})
    with pytest.raises(ValueError, match="stream_options needs stream=true"):
        asked.params()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "a", "tools": [TOOL]}, "tools need messages"),
        ({"tools": [TOOL]}, "give either prompt or messages"),
        (CHAT | {"prompt": "a", "tools": [TOOL]}, "give either prompt or messages"),
    ],
)
def test_tokenize_ignores_nothing(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenizeRequest.model_validate(body).texts()
    assert TokenizeRequest.model_validate({"prompt": ""}).texts() == ""
    (message,) = TokenizeRequest.model_validate(CHAT | {"tools": [TOOL]}).texts()
    assert isinstance(message, Message) and message.content == "a"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
def test_what_is_no_request_is_refused(server: Server, body: bytes) -> None:
    found = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400, found.text
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_other_statuses(server: Server) -> None:
    def status(method: str, path: str, **more: Any) -> int:
        found = server.client.request(method, path, **more)
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        return found.status_code

    assert status("GET", "/nowhere") == 404
    assert status("POST", "/v1/completions", json={"model": "gpt-5", "prompt": "a"}) == 404
    assert status("GET", "/v1/completions") == 405
    assert status("POST", "/v1/completions", content=b'{"prompt": "a"}') == 400  # as a browser's form would
    assert status("POST", "/v1/models", json={}) == 405
    assert status("GET", "/v1/models", headers={"Host": "evil.example"}) == 403
    big = b'{"prompt": "' + b"a" * (100 << 20) + b'"}'
    assert status("POST", "/v1/completions", content=big, headers={"Content-Type": "application/json"}) == 413


def test_chunked_bodies_are_bounded_too(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * (1 << 20)

    try:
        found = server.client.post(
            "/v1/completions", content=endless(), headers={"Content-Type": "application/json"}
        )
        assert found.status_code == 413
    except httpx.TransportError:
        pass  # the server has closed the connection while it was being written to
    assert server.client.get("/health").status_code == 200


LONG = json.dumps({"prompt": "a", "stream": True, "n": 16, "max_tokens": 1500, "ignore_eos": True}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_an_offer_of_http2_costs_no_body(server: Server) -> None:
    """Every Java client makes it with every request that is not encrypted."""
    body = b'{"prompt": "a", "max_tokens": 2}'
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    measured = b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    chunked = b"%bTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body)
    with socket.create_connection(server.address, PATIENCE_S) as client, client.makefile("rb") as answers:
        for parts in ([measured], [chunked], [chunked[:300], chunked[300:]], [bytes([c]) for c in measured]):
            for part in parts:
                client.sendall(part)
                time.sleep(0.3 / len(parts))
            assert b" 200 " in answers.readline()
            length = next(int(line[15:]) for line in answers if line.lower().startswith(b"content-length"))
            while answers.readline() != b"\r\n":
                pass
            assert json.loads(answers.read(length))["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5;x=",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ",
        POST + b"Content-Length: %d\r\n\r\n%bGET /" % (len(LONG), LONG),
    ],
    ids=["header", "extension of a chunk", "trailer", "the next request's"],
)
def test_nothing_beside_a_body_is_endless(server: Server, begin: bytes) -> None:
    with socket.create_connection(server.address, PATIENCE_S) as client:
        client.sendall(begin)
        with pytest.raises(ConnectionError):
            for _ in range(1000):  # 64 MiB: no socket's buffers hold them
                client.sendall(b"a" * 65536)
    assert server.text("the others", max_tokens=2)


@pytest.mark.slow
def test_a_slow_client(server: Server) -> None:
    with socket.create_connection(server.address, PATIENCE_S) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert server.text("the others", max_tokens=2)
        assert slow.recv(1) == b""  # after HEAD_S


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_cut_off(server: Server) -> None:
    asked = {"prompt": "x", "stream": True, "n": 16, "logprobs": 20, "max_tokens": 1500, "ignore_eos": True}
    body = json.dumps(asked)  # of an answer that the kernel's buffers cannot hold

    def connected() -> bool:
        ours = client.getsockname()[1]
        found = psutil.Process(server.process.pid).net_connections()
        return any(one.raddr and one.raddr.port == ours for one in found)

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(UNREAD_S / 2)
        assert connected() and server.text("the others", max_tokens=2)
        time.sleep(UNREAD_S)
        until(lambda: not connected())
        server.idle()


def test_keys_open_every_route_but_the_probes(tmp_path: Path) -> None:
    """Each route that there is, not those that somebody thought of."""
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    config = ServerConfig(api_key_file=str(keys))
    app = make_app(AsyncEngine(EngineConfig(model=DEMO), config, Metrics()), config)
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert paths >= {"/v1/completions", "/v1/chat/completions", "/metrics", "/status", "/openapi.json"}
    assert paths > OPEN
    with Server("--api-key-file", str(keys), tp=1) as server:
        for path in paths:
            for method in ("GET", "POST"):
                for headers in ({}, {"Authorization": "Bearer first-ke"}, {"Authorization": "Bearer"}):
                    found = server.client.request(method, path, json={}, headers=headers)
                    assert (found.status_code == 401) == (path not in OPEN), (path, method)
        for key in ("first-key", "second-key"):
            found = server.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == 200
        assert server.client.get("//health/../v1/models").status_code == 401
        assert server.client.get("/v1/models", headers={"Host": "/health"}).status_code == 401
        assert not any("first-key" in line for line in server.lines)


def test_a_full_queue_says_when_to_come_again() -> None:
    options = ("--max-num-seqs", "1", "--max-waiting", "1", "--timeout-s", "20")
    with Server(*options, tp=1) as server:

        def long() -> None:
            server.post("/v1/completions", prompt="a", max_tokens=1500, ignore_eos=True, temperature=0)

        threads = [threading.Thread(target=long) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: server.metric(f'weaveinf_num_requests_waiting{{model_name="{MODEL}"}}') == 1)
        found = server.post("/v1/completions", prompt="a")
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "rate_limit_error"
        assert server.metric('weaveinf_request_rejected_total{reason="queue_full"}') == 1
        for thread in threads:
            thread.join()


def test_a_deadline_ends_a_request_in_both_forms(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "timeout": 0.3}
    found = server.post("/v1/completions", **body)
    assert found.status_code == 504
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == 504
    server.idle()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("prompt", "messages", "max_tokens", "temperature", "n", "stop", "logit_bias", "stream", "tools")
FIELDS += ("stream_options", "logprobs", "response_format", "tool_choice", "seed", "top_k", "stop_token_ids")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=5),
)
def test_no_field_brings_it_down(server: Server, path: str, body: dict[str, Any]) -> None:
    sent = json.dumps({"prompt": "a"} | body if path == "/v1/completions" else CHAT | body)
    found = server.client.post(path, content=sent.encode(), headers={"Content-Type": "application/json"})
    assert found.status_code in (200, 400, 404), (sent, found.text)
