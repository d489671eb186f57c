"""What breaks, and what must happen: the rows of the table in SECURITY.md and the README."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from tests.ray_cluster import ray_cluster
from tests.server.harness import DEMO, MODEL, Server, events, until
from weaveinf.config import EngineConfig
from weaveinf.server.async_engine import AsyncEngine
from weaveinf.server.config import ServerConfig
from weaveinf.server.metrics import Metrics

LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}
REBUILT_S = 15.0
RUNNING = f'weaveinf_num_requests_running{{model_name="{MODEL}"}}'
WAITING = f'weaveinf_num_requests_waiting{{model_name="{MODEL}"}}'


@pytest.fixture(scope="module")
def breakable() -> Any:
    """Of the tests here alone: its ranks die."""
    with Server("--max-restarts", "20", "--max-num-seqs", "8") as server:
        yield server


def rebuilt(server: Server, since: float) -> None:
    """Waits until the ranks are back; a client that asks meanwhile is told so, or served."""
    while True:
        ready, health = (server.client.get(path).status_code for path in ("/ready", "/health"))
        if health == 200:
            break
        assert ready == 503
        assert time.monotonic() - since < REBUILT_S
        time.sleep(0.05)
    assert len(server.ranks()) == 1


@pytest.mark.parametrize(
    "when",
    [
        "idle",
        *(pytest.param(when, marks=pytest.mark.slow) for when in ("in prefill", "in decode")),
        "under load",
    ],
)
def test_a_rank_is_killed(breakable: Server, when: str) -> None:
    server = breakable
    alone = server.text("def f(", max_tokens=8)
    server.idle()
    restarts = server.metric("weaveinf_engine_restarts_total")
    answers: list[Future[httpx.Response]] = []
    with ThreadPoolExecutor(16) as pool:
        prompt = {"in prefill": "x = 1\n" * 300}.get(when, "x")
        for i in range({"idle": 0, "under load": 16}.get(when, 1)):
            more = {"max_tokens": 300} if i else {"max_tokens": 600}
            answers.append(pool.submit(server.post, "/v1/completions", prompt=f"{i}{prompt}", **LONG | more))
        if when == "in decode":
            until(lambda: server.metric("weaveinf_time_to_first_token_seconds_count") > 1)
            time.sleep(0.2)
        elif answers:
            until(lambda: server.metric(RUNNING) > 0)
        server.ranks()[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: server.client.get("/health").status_code == 503)
        rebuilt(server, killed)
        # Nothing of them was seen by their clients, so they were begun again.
        assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    assert server.metric("weaveinf_engine_restarts_total") == restarts + 1
    assert server.text("def f(", max_tokens=8) == alone
    server.idle()


def test_a_stream_that_was_begun_ends_with_an_error(breakable: Server) -> None:
    body = {"prompt": "x", "stream": True, **LONG}
    with breakable.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        breakable.ranks()[0].send_signal(signal.SIGKILL)
        *_, last = [line for line in lines if line]
    assert '"code":503' in last and "rank 1" in last
    rebuilt(breakable, time.monotonic())


def test_metrics_stay_true_when_ranks_are_started_anew(breakable: Server) -> None:
    server, seconds = breakable, "weaveinf_inter_token_latency_seconds_"
    names = [seconds + "sum", seconds + "count", "weaveinf_time_to_first_token_seconds_count"]
    aborted = 'weaveinf_request_success_total{finished_reason="abort"}'
    lost = server.metric(aborted)
    with server.client.stream(
        "POST", "/v1/completions", json={"prompt": "x", "n": 3, "stream": True} | LONG
    ) as it:
        next(lines := it.iter_lines())
        server.ranks()[0].kill()
        assert any('"code":503' in line for line in lines)
    began = time.monotonic()
    rebuilt(server, began)
    assert server.metric(aborted) == lost + 3
    before = [server.metric(name) for name in names]
    for _ in range(3):  # numbered like those that are gone
        server.complete("x", max_tokens=5, ignore_eos=True)
    server.idle()
    took, *counts = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert counts == [12, 3] and took < time.monotonic() - began


def test_a_rank_is_killed_while_ranks_are_started_anew(breakable: Server) -> None:
    restarts = breakable.metric("weaveinf_engine_restarts_total")
    (first,) = breakable.ranks()
    first.kill()
    until(lambda: any(rank.pid != first.pid for rank in breakable.ranks()))
    for rank in breakable.ranks():
        rank.kill()
    rebuilt(breakable, time.monotonic())
    assert breakable.metric("weaveinf_engine_restarts_total") == restarts + 2


@pytest.mark.slow
def test_a_rank_hangs(breakable: Server) -> None:
    """Noticed by its silence, and treated as dead."""
    answer: list[int] = []
    thread = threading.Thread(
        target=lambda: answer.append(breakable.post("/v1/completions", prompt="x", **LONG).status_code)
    )
    thread.start()
    until(lambda: breakable.metric(RUNNING) > 0)
    breakable.ranks()[0].send_signal(signal.SIGSTOP)
    until(lambda: breakable.client.get("/health").status_code == 503)
    rebuilt(breakable, time.monotonic())
    thread.join()
    assert answer == [200]


@pytest.mark.slow
def test_a_rank_that_dies_again_and_again_ends_the_server() -> None:
    with Server("--max-restarts", "1") as server:
        for _ in range(2):
            until(lambda: server.client.get("/health").status_code == 200)
            server.ranks()[0].send_signal(signal.SIGKILL)
            time.sleep(0.5)
            if server.process.poll() is None and not server.ranks():
                continue
        assert server.process.wait(30) == 1
        assert any("the engine has failed" in line and "rank 1" in line for line in server.lines)


def test_an_engine_that_died_leaves_its_memory_to_the_next() -> None:
    async def look() -> None:
        config = EngineConfig(model=DEMO, tensor_parallel_size=2, dtype="float32", kv_cache_gib=0.01)
        engine = AsyncEngine(config, ServerConfig(), Metrics())
        others = {process.pid for process in psutil.Process().children()}
        await engine.start()
        died = weakref.ref(engine.engine)
        try:
            for process in psutil.Process().children():
                if process.pid not in others:
                    process.kill()
            while engine.num_restarts == 0 or engine.state != "ready":
                await asyncio.sleep(0.05)
            assert died() is None
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(asyncio.wait_for(look(), 60))


def test_sigterm_lets_what_runs_end() -> None:
    with Server(tp=1) as server:
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "stream": True, **LONG}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=server.url) as other:
                until(lambda: other.get("/ready").status_code == 503)
                assert other.get("/health").status_code == 200
                assert other.post("/v1/completions", json={"prompt": "a"}).status_code == 503
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_what_runs() -> None:
    """Each client is told, as when the time to drain is over."""
    body = {"prompt": "x", **LONG, "max_tokens": 2000}
    with Server(tp=1) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, "/v1/completions", **body)
        stream = pool.submit(server.post, "/v1/completions", **body, stream=True)
        until(lambda: server.metric(RUNNING) == 2)
        server.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=server.url) as other:
            until(lambda: other.get("/ready").status_code == 503)
        began = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5
        told = whole.result().json()["error"], events(stream.result())[-1]["error"]
    assert whole.result().status_code == 503
    assert [(error["code"], error["message"]) for error in told] == [(503, "the server has shut down")] * 2


@pytest.mark.slow
def test_what_runs_too_long_is_ended_when_the_server_ends() -> None:
    with Server("--drain-s", "0.5", "--max-num-seqs", "1", tp=1) as server:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(server.post, "/v1/completions", prompt="x", n=1, **LONG) for _ in range(4)]
            until(lambda: server.metric(WAITING) > 0)
            assert server.end(signal.SIGTERM) == 0
            codes = {answer.result().status_code for answer in answers}
        assert codes <= {200, 503} and 503 in codes


def test_a_client_that_leaves_frees_its_pages(server: Server) -> None:
    for stream in (True, False):
        body = {"prompt": ["x", "y"], "n": 2, "stream": stream, **LONG}
        ended = server.metric('weaveinf_request_success_total{finished_reason="length"}')
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=server.url, timeout=0.5) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            next(response.iter_lines())
            raise httpx.ReadTimeout("it has seen enough")
        server.idle()
        assert server.metric('weaveinf_request_success_total{finished_reason="length"}') == ended


def test_a_client_that_leaves_after_a_second_request_frees_its_pages(server: Server) -> None:
    for stream in (True, False):
        body = json.dumps({"prompt": "x", "stream": stream, **LONG})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        first = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        ended = server.metric('weaveinf_request_success_total{finished_reason="length"}')
        with socket.create_connection(server.address) as client:
            client.sendall(first + b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: server.metric(RUNNING) == 1)
        server.idle()
        assert server.metric('weaveinf_request_success_total{finished_reason="length"}') == ended


@pytest.mark.slow
def test_the_cache_is_full_of_long_requests() -> None:
    """Preemption, no deadlock, all end, and as they would alone."""
    with Server("--kv-cache-gib", "0.002", "--max-num-seqs", "16") as server:
        body = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda i: server.text(f"{i} = ", **body), range(12)))
        assert server.metric("weaveinf_num_preemptions_total") > 0
        server.idle()
        assert [server.text(f"{i} = ", **body) for i in range(12)] == found


@pytest.mark.slow
def test_the_log_cannot_be_written() -> None:
    """To a full disk: it keeps serving."""
    command = [sys.executable, "-m", "weaveinf", "serve", DEMO, "--port", "0", "--kv-cache-gib", "0.05"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stderr=full, stdout=full)
    try:
        ports: list[int] = []

        def found() -> bool:
            ports[:] = [
                c.laddr.port for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"
            ]
            return bool(ports)

        until(found)
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30) as client:
            until(lambda: client.get("/ready").status_code == 200)
            for _ in range(3):
                assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_the_log_is_not_read() -> None:
    """A pipe that is full: it keeps serving, and ends."""
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "weaveinf", "serve", DEMO, "--port", "0", "--kv-cache-gib", "0.05"]
    process = subprocess.Popen(command, stderr=theirs)
    os.close(theirs)
    try:
        url = re.findall(rb"http://\S+", os.read(ours, 4096))[0].decode()
        with httpx.Client(base_url=url, timeout=10) as client:
            until(lambda: client.get("/ready").status_code == 200)
            for _ in range(1000):
                assert client.get("/health", headers={"X-Request-Id": "a" * 128}).status_code == 200
            process.terminate()
            assert process.wait(30) == 0
        assert len(os.read(ours, 1 << 20)) > 60_000  # no more went in
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.slow
def test_starting_fails_clearly(tmp_path: Any) -> None:
    def fails(*options: str) -> str:
        command = [sys.executable, "-m", "weaveinf", "serve", *options, "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "listen" in fails(DEMO, "--host", "203.0.113.1")
    assert "key" in fails(DEMO, "--api-key-file", os.devnull)
    assert "No such file" in fails(DEMO, "--api-key-file", str(tmp_path / "none"))
    assert "config.json" in fails(str(tmp_path))


def crowd(server: Server, clients: int, seconds: float) -> int:
    """Clients at once, three of ten leaving midway, until the time is up; each whole answer is the one given
    alone. How many there were."""
    prompts = [f"{i}: def f(" for i in range(24)]
    alone = {prompt: server.text(prompt, max_tokens=12) for prompt in prompts}
    until_s = time.monotonic() + seconds
    whole = 0

    async def one(client: httpx.AsyncClient, chance: random.Random) -> None:
        nonlocal whole
        while time.monotonic() < until_s:
            prompt = chance.choice(prompts)
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": chance.random() < 0.7}
            if chance.random() < 0.3:
                try:
                    await asyncio.wait_for(client.post("/v1/completions", json=body), chance.random() * 2)
                except (TimeoutError, httpx.TransportError):
                    continue
            found = await client.post("/v1/completions", json=body)
            if found.status_code == 429:
                await asyncio.sleep(float(found.headers["retry-after"]))
                continue
            assert found.status_code == 200, found.text
            if body["stream"]:
                said = "".join(event["choices"][0]["text"] for event in parsed(found.text))
            else:
                said = found.json()["choices"][0]["text"]
            assert said == alone[prompt]
            whole += 1

    def parsed(text: str) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(one(client, random.Random(i)) for i in range(clients)))

    asyncio.run(all_of_them())
    return whole


@pytest.mark.parametrize(
    ("clients", "seconds"), [(60, 2.0), pytest.param(500, 180.0, marks=pytest.mark.slow)]
)
def test_a_crowd_of_which_some_leave(clients: int, seconds: float) -> None:
    with Server("--max-waiting", "2000") as server:
        crowd(server, clients, 2.0)
        server.idle()
        process = psutil.Process(server.process.pid)
        before = process.num_fds(), process.num_threads(), process.memory_info().rss
        assert crowd(server, clients, seconds) > clients
        server.idle()
        until(lambda: process.num_fds() <= before[0] + 2, process.net_connections())
        assert process.num_threads() <= before[1] + 2
        assert process.memory_info().rss < before[2] + (64 << 20)


@pytest.mark.slow
def test_two_signals_end_a_server_on_ray_without_an_abort() -> None:
    """Ray handles SIGTERM in a process that joins it, and aborts when another comes meanwhile."""
    pytest.importorskip("ray")
    with Server("--executor", "ray") as server:
        server.text("x", max_tokens=2)
        server.process.send_signal(signal.SIGTERM)
        assert server.end(signal.SIGTERM) == 0
    assert not [line for line in server.lines if "FailureSignalHandler" in line]


@pytest.mark.slow
def test_a_signal_ends_a_server_that_waits_for_a_place_on_ray() -> None:
    with ray_cluster(1, num_cpus=1):
        server = Server("--executor", "ray")
        until(lambda: any("for Ray to place" in line for line in server.lines), server.lines)
        assert server.end(signal.SIGTERM) == 0
    assert not [line for line in server.lines if "FailureSignalHandler" in line]
