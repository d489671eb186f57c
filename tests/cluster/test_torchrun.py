"""Ranks that torchrun started: the same program, the same answers, the same ends."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from tests.cluster.harness import children, eventually, make_model, read_line, run_program, start, tokens
from tests.server.harness import Server, until
from weaveinf.cluster import launch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def ranks_of(torchrun: int) -> list[psutil.Process]:
    ranks = [p for p in psutil.Process(torchrun).children() if "RANK" in p.environ()]
    assert len(ranks) == 2
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def test_torchrun_gives_the_answers_of_spawned_ranks(model: Path) -> None:
    cluster = start(model, 2)
    expected = tokens(cluster, 0, 5)
    cluster.close()
    assert not children()
    with run_program(str(model), "1", "close", torchrun=2) as program:
        assert [int(token) for token in read_line(program, "tokens").split()] == expected
        assert read_line(program, "ranks") == ""
        assert program.wait(60) == 0
        assert program.stderr is not None and "Traceback" not in program.stderr.read()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_torchrun(model: Path, rank: int) -> None:
    with run_program(str(model), "2", "forever", torchrun=2) as program:
        read_line(program, "ranks")
        ranks = ranks_of(program.pid)
        ranks[rank].send_signal(signal.SIGKILL)
        assert program.wait(60) not in (0, None)
        assert eventually(lambda: not any(p.is_running() for p in ranks))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_torchrun_starts_dead_ranks_anew(rank: int) -> None:
    def ready() -> bool:
        with suppress(httpx.HTTPError):  # between two lives nobody listens
            return server.client.get("/ready").status_code == 200
        return False

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    with Server("--port", port, launcher=torchrun) as server:
        first = server.text("x", max_tokens=8)
        ranks = ranks_of(server.process.pid)
        ranks[rank].send_signal(signal.SIGKILL)
        assert eventually(lambda: not any(p.is_running() for p in ranks))
        until(ready, server.lines)
        assert server.text("x", max_tokens=8) == first
        again = ranks_of(server.process.pid)
    assert not any(p.is_running() for p in again)


def test_a_mistake_is_said_once(model: Path, tmp_path: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "intermediate_size": 7}))
    with run_program(str(model), "2", "close", torchrun=2) as program:
        assert program.wait(60) != 0
        assert program.stderr is not None
        said = [line for line in program.stderr if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: intermediate_size=7 is not divisible")


def test_mistakes_with_torchrun(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3, but torchrun started 2 ranks"):
        start(model, 3)
    monkeypatch.setattr(launch, "_taken", True)
    with pytest.raises(ValueError, match="already serve an engine"):
        start(model, 2)
