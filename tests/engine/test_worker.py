from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from weaveinf.engine import worker


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cgroup v2: the limit less what is used, of which cached files can be given back."""
    monkeypatch.setattr(worker, "_CGROUP", tmp_path)
    machine = psutil.virtual_memory().available
    assert worker._free_memory() == pytest.approx(machine, rel=0.1)  # no such files: no container
    (tmp_path / "memory.current").write_text("9000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\ninactive_file 3000000\n")
    (tmp_path / "memory.max").write_text("10000000\n")
    assert worker._free_memory() == 4000000
    (tmp_path / "memory.max").write_text("max\n")
    assert worker._free_memory() == pytest.approx(machine, rel=0.1)
