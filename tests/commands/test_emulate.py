"""bench/emulate.py: rank 0's part of every variant, with the seam kernel on threads of the CPU."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.comm.test_symmetric import Build, Grid, build  # noqa: F401
from tests.models.harness import SMALL, make_checkpoint
from weaveinf.comm import symmetric
from weaveinf.comm.symmetric import Call
from weaveinf.models.config import ModelConfig
from weaveinf.weave.waves import GpuCosts

BENCH = Path(__file__).parents[2] / "bench"
SHAPES = BENCH / "shapes"


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("emulate")


def test_times_are_those_that_were_published_and_grow_beyond(emulate: Any) -> None:
    published_us = emulate.published_us
    assert published_us(emulate._MULTIMEM, 1024 * 16384) == pytest.approx(74.8)
    assert published_us(emulate._NCCL, 2 * 32768 * 16384) == pytest.approx(2 * 2402.5)
    assert published_us(emulate._FUSED[8], 96 * 16384) == pytest.approx((18.3 + 23.1) / 2)
    assert published_us(emulate._FUSED[8], 16384) == pytest.approx(18.3)
    assert {*GpuCosts.seam_ctas, symmetric.ALONE} == set(emulate._FUSED)


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_variants_run(tmp_path: Path, emulate: Any, build: Build, family: str) -> None:  # noqa: F811
    make_checkpoint(tmp_path, family)
    held: list[tuple[int, int, int]] = []

    class Recorded(Grid):
        def __call__(self, call: Call, blocks: int, rows: int = 1, delay_us: int = 0) -> None:
            held.append((call.rows, call.lasts_ns, blocks))
            began = time.monotonic_ns()
            super().__call__(call, blocks, rows, delay_us)
            assert time.monotonic_ns() - began >= call.lasts_ns > 0

    def kernel(dtype: torch.dtype, hidden: int, ranks: int, multimem: bool) -> Grid:
        return Recorded(build(dtype, hidden, ranks, multimem))

    with mock.patch.object(symmetric, "kernel", kernel):
        bench = emulate.Emulation(tmp_path, 2, 96, torch.device("cpu"))
        cell = bench.cell(96, pairs=1)
        bench.ranks.close()
    assert all(cell[f"{name}_ms"] > 0 for name in ("plain", "nccl", "fused", "woven", "no_comm"))
    joints, halves = 2 * SMALL["num_hidden_layers"] + 1, 2
    assert len(held) == 2 * joints * (3 + halves)  # every variant ran twice, that without seams too
    given = {blocks for rows, _, blocks in held if rows}
    assert given == {symmetric.ALONE, *map(int, cell["ctas"].split("/"))}
    pauses = [ns for rows, ns, _ in held if not rows]
    assert [pauses.count(int(1e3 * us)) for us in (16.5, 36.0)] == [2 * joints] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_what_it_needs_is_said() -> None:
    command = [sys.executable, str(BENCH / "emulate.py"), str(SHAPES / "llama-70b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "the seam of a GPU: there is none" in done.stderr


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_shapes_can_be_shared_by_eight(shape: str) -> None:
    config = ModelConfig.from_path(SHAPES / shape)
    config.check_ranks(8)
    assert config.num_layers == 8 and json.loads((SHAPES / shape / "config.json").read_text())
