"""What SECURITY.md promises beyond the refusals, the faults and the checks of single parts."""

from __future__ import annotations

import ast
import asyncio
import ipaddress
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.testclient import TestClient

from tests.server.harness import DEMO, Server
from tests.test_layers import imports, sources
from weaveinf.config import EngineConfig
from weaveinf.server.app import make_app
from weaveinf.server.async_engine import AsyncEngine
from weaveinf.server.config import ServerConfig
from weaveinf.server.metrics import Metrics

SERVER = Path(__file__).parents[2] / "weaveinf" / "server"


def test_no_code_comes_from_data() -> None:
    """Nothing evaluates, unpickles or loads code, and no switch of a library that would is on."""
    banned = {"eval", "exec", "compile", "__import__"}
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{file}: {node.func.id}"
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only", "shell"):
                wanted = node.arg == "weights_only"
                assert isinstance(node.value, ast.Constant) and node.value.value is wanted, (
                    f"{file}: {node.arg}"
                )


def test_the_server_fetches_nothing() -> None:
    clients = {"requests", "httpx", "httpx2", "aiohttp", "urllib", "urllib3", "http"}
    for file in SERVER.glob("*.py"):
        assert not clients & {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}, file


def test_nothing_listens_beyond_this_machine(server: Server) -> None:
    """Neither HTTP, nor the store, nor any connection between the ranks."""
    top = psutil.Process(server.process.pid)
    listening = [
        one.laddr.ip
        for process in (top, *top.children(recursive=True))
        for one in process.net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2
    assert all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in listening), listening


def test_salts_share_no_prefix(server: Server) -> None:
    prompt = "def a_function_of_its_own(argument, another_argument, and_yet_another):\n" * 4

    def cached(**more: Any) -> int:
        found = server.complete(prompt, max_tokens=1, **more)
        return found["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0 and cached() > 0
    assert cached(cache_salt="mine") == 0 and cached(cache_salt="mine") > 0
    assert cached(cache_salt="yours") == 0


@pytest.mark.slow
def test_checks_hold_without_asserts(tmp_path: Path) -> None:
    """python -O takes away asserts; no check of a request is one."""
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    with Server("--api-key-file", str(keys), PYTHONOPTIMIZE="1") as server:
        assert server.client.get("/v1/models").status_code == 401
        server.client.headers["Authorization"] = "Bearer key"
        wrong: list[dict[str, Any]] = [{"n": 99}, {"max_tokens": -1}, {"prompt": [10**6]}, {"prompt": []}]
        for body in [*wrong, {"stop": [""]}, {"nonsense": 1}]:
            assert server.post("/v1/completions", **{"prompt": "a"} | body).status_code == 400
        assert server.text("a", max_tokens=4)


def _app(engine: AsyncEngine) -> TestClient:
    return TestClient(make_app(engine, ServerConfig()), base_url="http://localhost")


def test_an_error_inside_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(EngineConfig(model=DEMO), ServerConfig(), Metrics())

    def broken(self: AsyncEngine) -> str:
        raise KeyError("/secret/path at 0x7f0012345678")

    monkeypatch.setattr(AsyncEngine, "silent", broken)
    found = _app(engine).get("/health")
    assert found.status_code == 500
    assert "secret" not in found.text and "0x7f" not in found.text and "Traceback" not in found.text


def test_nothing_is_taken_while_there_is_no_engine() -> None:
    engine = AsyncEngine(EngineConfig(model=DEMO), ServerConfig(), Metrics())
    client = _app(engine)
    for state in ("loading", "restarting", "dead"):
        engine.state = state
        for path in ("/health", "/ready", "/v1/models"):
            assert client.get(path).status_code == 503, (state, path)
        found = client.post("/v1/completions", json={"prompt": "a"})
        assert found.status_code == 503 and found.headers["retry-after"]
    assert client.get("/metrics").status_code == 200


def test_health_covers_the_engine_s_thread() -> None:
    """A thread that ended or stands still shows, whatever the event loop can still answer."""

    async def look() -> None:
        config = EngineConfig(model=DEMO, dtype="float32", kv_cache_gib=0.01, max_num_seqs=2)
        engine = AsyncEngine(config, ServerConfig(), Metrics())
        await engine.start()
        assert engine.silent() is None
        engine._turned -= 1000
        assert engine.silent() is not None
        while engine.silent() is not None:  # the thread turns, and says so
            await asyncio.sleep(0.05)
        engine.close()
        assert engine.silent() is not None

    asyncio.run(asyncio.wait_for(look(), 60))


def test_ids_of_clients_are_no_keys(server: Server) -> None:
    """Two requests of one id are two requests."""
    headers = {"X-Request-Id": "same"}
    found = [
        server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
        for _ in range(2)
    ]
    assert len({one.json()["id"] for one in found}) == 2
    odd = server.client.get("/version", headers={"X-Request-Id": "x" * 200})
    assert len(odd.headers["x-request-id"]) == 32
