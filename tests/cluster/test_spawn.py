"""Ranks that rank 0 starts: they come, they work, and nothing is left of them."""

from __future__ import annotations

import gc
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.cluster.harness import (
    Footprint,
    children,
    eventually,
    make_model,
    patch_ranks,
    read_line,
    run_program,
    start,
    step,
    tokens,
)
from weaveinf.cluster import supervise
from weaveinf.cluster.board import Process
from weaveinf.cluster.spawn import make_store
from weaveinf.comm import segment
from weaveinf.comm.errors import RankDied
from weaveinf.engine.step import Step, StepOutput


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def footprint() -> Footprint:
    gc.collect()
    return Footprint()


def test_one_rank_is_this_process_alone(model: Path, footprint: Footprint) -> None:
    cluster = start(model, 1)
    assert len(tokens(cluster, 0, 3)) == 3
    assert not children() and not dist.is_initialized()
    cluster.close()
    cluster.close()
    with pytest.raises(RuntimeError, match="closed"):
        cluster.submit(step(3))
    footprint.check()


def test_two_engines_side_by_side(model: Path, footprint: Footprint) -> None:
    environment, threads = dict(os.environ), torch.get_num_threads()
    one, two = start(model, 2), start(model, 2)
    first = tokens(one, 0, 10)
    assert tokens(two, 0, 10) == first
    assert len(children()) == 2
    one.close()
    assert len(children()) == 1
    for n in range(10, 40):  # ahead of their results
        two.submit(step(n))
    assert all(0 <= int(two.collect().tokens[0]) < 100 for _ in range(30))
    two.close()
    assert dict(os.environ) == environment and torch.get_num_threads() == threads
    footprint.check()


def test_a_forgotten_engine_ends(model: Path, footprint: Footprint) -> None:
    cluster = start(model, 2)
    tokens(cluster, 0, 2)
    assert len(children()) == 1
    del cluster
    gc.collect()
    footprint.check()


@pytest.mark.parametrize(("rank", "busy", "shared"), [(1, False, True), (2, True, True), (1, True, False)])
def test_a_killed_rank_ends_all(
    model: Path, footprint: Footprint, monkeypatch: pytest.MonkeyPatch, rank: int, busy: bool, shared: bool
) -> None:
    if not shared:
        monkeypatch.setattr(segment, "lib", None)
        monkeypatch.setattr(segment, "reason", "a test")  # whose vote turns all ranks to gloo
    cluster = start(model, 3)
    tokens(cluster, 0, 3)
    assert shared or cluster.worker.seam.name == "collective"
    ranks = children()
    with pytest.raises(RankDied) as caught:
        if busy:
            for n in range(3, 500):
                cluster.submit(step(n))
                if n == 50:
                    ranks[rank - 1].send_signal(signal.SIGKILL)
            for _ in range(3, 500):
                cluster.collect()
        else:
            ranks[rank - 1].send_signal(signal.SIGKILL)
            assert eventually(lambda: cluster.failure)  # known without a step
            cluster.submit(step(3))
    assert caught.value.rank == rank
    assert "SIGKILL" in caught.value.words
    with pytest.raises(RankDied):
        cluster.collect()
    footprint.check()


def test_a_stopped_rank_is_ended(
    model: Path, footprint: Footprint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(supervise, "LOST_S", 4.0)
    cluster = start(model, 3)
    children()[1].send_signal(signal.SIGSTOP)
    with pytest.raises(RankDied, match="no sign of life for 4 s") as caught:
        tokens(cluster, 0, 2)
    assert caught.value.rank == 2
    shown = capfd.readouterr().err.splitlines()
    for place in ("[rank 1]", "[rank 2]"):
        assert any(line.startswith(place) and "in follow" in line for line in shown)
    footprint.check()


def test_the_lines_of_ranks_stay_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    patch_ranks(monkeypatch, tmp_path / "patch", 'print("a line\\n" * 20_000)')
    start(model, 3).close()
    shown = [line for line in capfd.readouterr().err.splitlines() if "a line" in line]
    assert sorted(shown) == ["[rank 1] a line"] * 20_000 + ["[rank 2] a line"] * 20_000


def test_a_stuck_step_shows_all_stacks(
    model: Path,
    footprint: Footprint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(supervise, "STUCK_S", 4.0)
    code = """
import time
execute = worker.Worker.execute
def stuck_here(self, step):
    while step.number == 3:
        time.sleep(0.1)
    return execute(self, step)
worker.Worker.execute = stuck_here
"""
    patch_ranks(monkeypatch, tmp_path / "patch", code)
    cluster = start(model, 2)
    tokens(cluster, 0, 3)
    with pytest.raises(RankDied, match="step 4 has stood still on rank 0, 1 for"):
        tokens(cluster, 3, 4)
    shown = capfd.readouterr().err
    assert any("[rank 1]" in line and "stuck_here" in line for line in shown.splitlines())
    assert any("[rank 1]" not in line and "in execute" in line for line in shown.splitlines())
    footprint.check()


@pytest.mark.parametrize(
    ("deed", "error", "words"),
    [
        ('raise ValueError("shard 2 is truncated")', ValueError, "^shard 2 is truncated$"),
        ('raise KeyError("a bug")', RankDied, "^rank 1 died: KeyError: 'a bug'$"),
        ('print("so far"); import os; os.abort()', RankDied, "rank 1 died.*signal 6(.|\n)*so far"),
    ],
)
def test_a_rank_that_fails_to_load(
    model: Path,
    footprint: Footprint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    deed: str,
    error: type[Exception],
    words: str,
) -> None:
    code = f"def fail(*_, **__):\n    {deed}\nworker.load_model = fail"
    patch_ranks(monkeypatch, tmp_path / "patch", code)
    with pytest.raises(error, match=words):
        start(model, 2)
    assert ("Traceback" in capfd.readouterr().err) == ("a bug" in deed)
    footprint.check()


def test_a_model_that_is_not_there(
    tmp_path: Path, footprint: Footprint, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        start(tmp_path / "empty", 2)
    assert "Traceback" not in capfd.readouterr().err
    footprint.check()


def test_errors_of_a_step(
    model: Path, footprint: Footprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
execute = worker.Worker.execute
def fails(self, step):
    if step.number == 2:
        raise IndexError("out of range")
    return execute(self, step)
worker.Worker.execute = fails
"""
    patch_ranks(monkeypatch, tmp_path / "patch", code)
    cluster = start(model, 2)
    with pytest.raises(RankDied, match=r"^rank 1 died: IndexError: out of range$"):
        tokens(cluster, 0, 4)
    footprint.check()


def test_an_error_of_rank_0_is_its_own(model: Path, footprint: Footprint) -> None:
    cluster = start(model, 2)
    tokens(cluster, 0, 2)
    broken = step(2)
    cluster.worker.weaver.run = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="not callable"):
        cluster.submit(broken)
        cluster.collect()
    footprint.check()


@pytest.mark.parametrize(("ending", "number"), [("forget", None), ("forever", signal.SIGKILL)])
def test_ranks_follow_their_program(model: Path, ending: str, number: int | None) -> None:
    with run_program(str(model), "3", ending) as program:
        pids = [int(pid) for pid in read_line(program, "ranks").split()]
        assert len(pids) == 2
        if number is not None:
            program.send_signal(number)
        assert program.wait(60) == (-number if number else 0)
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_signal_may_close_the_engine_in_the_midst_of_a_step(
    model: Path, footprint: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start(model, 2)
    tokens(cluster, 0, 2)
    execute = cluster.worker.execute

    def interrupted(given: Step) -> StepOutput:
        signal.raise_signal(signal.SIGALRM)
        return execute(given)

    monkeypatch.setattr(cluster.worker, "execute", interrupted)
    before = signal.signal(signal.SIGALRM, lambda *_: cluster.close())
    try:
        with pytest.raises(RuntimeError, match="this engine is closed"):
            tokens(cluster, 2, 3)
    finally:
        signal.signal(signal.SIGALRM, before)
    monkeypatch.undo()
    footprint.check()


def test_a_step_that_waits_for_nobody_ends_with_the_program(model: Path) -> None:
    with run_program(str(model), "2", "stuck") as program:
        pids = [int(pid) for pid in read_line(program, "ranks").split()]
        assert program.wait(60) == 1
        assert program.stderr is not None
        last = program.stderr.read().splitlines()[-1]
        assert "step 6 has stood still on rank 0" in last and "rank 0 cannot be stopped" in last
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.slow
def test_it_does_so_when_nothing_can_be_said(model: Path) -> None:
    with open("/dev/full", "w") as full, run_program(str(model), "2", "stuck", stderr=full) as program:
        pids = [int(pid) for pid in read_line(program, "ranks").split()]
        try:
            assert program.wait(60) == 1
        finally:
            program.kill()
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_interrupt_ends_quietly(model: Path) -> None:
    with run_program(str(model), "2", "forever") as program:
        pids = [int(pid) for pid in read_line(program, "ranks").split()]
        os.killpg(program.pid, signal.SIGINT)  # what a terminal does
        assert program.wait(60) == 130
        assert program.stderr is not None and "Traceback" not in program.stderr.read()
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_the_store_listens_on_loopback_alone() -> None:
    store, port = make_store(5.0)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert [c.laddr.ip for c in listening if c.laddr.port == port] == ["127.0.0.1"]
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    del store


def test_process_is_known_by_more_than_its_number() -> None:
    me = Process.mine()
    assert me.alive()
    assert not Process(me.host, me.pid, str(int(me.started) + 1), me.cores).alive()
    child = psutil.Popen(["true"])
    assert eventually(lambda: child.status() == psutil.STATUS_ZOMBIE)
    born = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    assert not Process(me.host, child.pid, born, me.cores).alive()
    child.wait()
