"""Ranks that torchrun started: the same program, the same answers, the same ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.cluster.harness import children, eventually, make_model, read_line, run_program, start, tokens


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


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
        ranks = sorted(
            (p for p in psutil.Process(program.pid).children() if "tests.cluster.program" in p.cmdline()),
            key=lambda p: int(p.environ()["RANK"]),
        )
        assert len(ranks) == 2
        ranks[rank].send_signal(signal.SIGKILL)
        assert program.wait(60) not in (0, None)
        assert eventually(lambda: not any(p.is_running() for p in ranks))


def test_a_mistake_is_said_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lies").mkdir()
    settings = json.loads((model / "config.json").read_text())
    (tmp_path / "lies" / "config.json").write_text(json.dumps({**settings, "intermediate_size": 7}))
    for arguments, words in (
        ((str(model), "3", "close"), "but torchrun started 2 ranks"),
        ((str(tmp_path / "lies"), "2", "close"), "7"),
    ):
        with run_program(*arguments, torchrun=2) as program:
            assert program.wait(60) != 0
            assert program.stderr is not None
            said = [line for line in program.stderr if line.startswith("error: ")]
        assert len(said) == 1 and words in said[0]
        assert "rank" not in said[0].split("torchrun")[0] and "gloo" not in said[0]
