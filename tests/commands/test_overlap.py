"""The bench of weaving over a real link: what it prints can be read, and the bytes are those of the steps."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.harness import make_checkpoint

ROOT = Path(__file__).parents[2]


def test_overlap_between_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    links = importlib.import_module("links")
    if reason := links.why_not():
        pytest.skip(reason)
    make_checkpoint(tmp_path / "model", "llama")
    result, trace = tmp_path / "result.json", tmp_path / "trace.json"
    argv = ["-m", "weaveinf", "bench", "overlap", str(tmp_path / "model"), "--dtype", "float32"]
    argv += ["--tokens", "64", "100", "--decode", "2", "32", "--pairs", "2"]
    argv += ["--json", str(result), "--trace", str(trace)]
    with links.Hosts(2) as hosts:
        said = links.torchrun(hosts, 1, argv, {"PYTHONPATH": str(ROOT)}, seconds=200)
    found = json.loads(result.read_text())
    assert (found["tp"], found["seam"], found["pairs"]) == (2, "collective", 2)
    assert [cell["tokens"] for cell in found["cells"]] == [64, 100]
    for cell in found["cells"]:
        assert 0.95 < cell["sent_share"] < 1.6  # tiny rows, whose headers count
        assert min(cell["plain_ms"], cell["woven_ms"], cell["no_comm_ms"], cell["comm_only_ms"]) > 0
        assert cell["gain"] == pytest.approx(cell["plain_ms"] / cell["woven_ms"])
    assert [cell["rows"] for cell in found["decode"]] == [2, 32]
    assert "2 decode rows" in said and "64 tokens: plain" in said and "hidden" in said
    assert json.loads(trace.read_text())["traceEvents"]


def test_overlap_on_one_host_as_the_readme_says(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    argv = [sys.executable, "-m", "weaveinf", "bench", "overlap", str(tmp_path / "model"), "--tp", "2"]
    argv += ["--tokens", "64", "100", "--decode", "64", "--pairs", "2"]  # so many rows share their products
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "64 tokens: plain" in done.stdout and "64 decode rows: whole" in done.stdout
