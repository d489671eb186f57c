"""bench/hopper.sh runs dry where there is no GPU: the seam comes first, and every part leaves its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_it_runs_dry(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "HOSTS": ""}
    command = [str(ROOT / "bench" / "hopper.sh"), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    found = {path.stem.split("-")[-1]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"seam", "overlap", "latency", "throughput"}
    assert [seam["dtype"] for seam in found["seam"]["seams"]] == ["torch.float32", "torch.bfloat16"]
    assert all(seam["passes"] > 10 and seam["seam"] == "shared memory" for seam in found["seam"]["seams"])
    assert found["latency"]["tp"] == 2 and len(found["overlap"]["cells"]) == 2
