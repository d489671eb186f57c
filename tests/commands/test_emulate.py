"""`bench overlap --emulate`: rank 0's part of every variant, with the seam kernel on threads of the CPU."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.comm.test_symmetric import Build, Grid, build  # noqa: F401
from tests.models.harness import SMALL, make_checkpoint
from weaveinf.cli import main
from weaveinf.comm import symmetric
from weaveinf.commands import emulate
from weaveinf.commands.emulate import Emulation, published_us
from weaveinf.models.config import ModelConfig
from weaveinf.ops import cuda
from weaveinf.weave.waves import GpuCosts

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"


def test_times_are_those_that_were_published_and_grow_beyond() -> None:
    assert published_us(emulate._MULTIMEM, 1024 * 16384) == pytest.approx(74.8)
    assert published_us(emulate._NCCL, 2 * 32768 * 16384) == pytest.approx(2 * 2402.5)
    assert published_us(emulate._FUSED[8], 96 * 16384) == pytest.approx((18.3 + 23.1) / 2)
    assert published_us(emulate._FUSED[8], 16384) == pytest.approx(18.3)
    assert {*GpuCosts.seam_ctas, symmetric.ALONE} == set(emulate._FUSED)


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_variants_run(tmp_path: Path, build: Build, family: str) -> None:  # noqa: F811
    make_checkpoint(tmp_path, family)
    held: list[tuple[int, int, int]] = []

    def pace(name: str, threads: int) -> Any:
        assert (name, threads) == ("pace", 1024)
        return lambda call, blocks: held.append((call.begins, call.ns, blocks))

    def kernel(dtype: torch.dtype, hidden: int, ranks: int, multimem: bool) -> Grid:
        return Grid(build(dtype, hidden, ranks, multimem))

    with mock.patch.object(cuda, "Kernel", pace), mock.patch.object(symmetric, "kernel", kernel):
        bench = Emulation(tmp_path, 2, 96, torch.device("cpu"))
        cell = bench.cell(96, pairs=1)
        first = bench.model.chain[0][1].weight.shape[0]
        bench.ranks.close()
    assert all(cell[f"{name}_ms"] > 0 for name in ("plain", "nccl", "fused", "woven", "no_comm"))
    joints, halves = 2 * SMALL["num_hidden_layers"] + 1, 2
    # Every variant ran twice; all seams were timed from their beginning on, none of the one without.
    assert len(held) == 2 * 2 * joints * (3 + halves)
    assert [begins for begins, _, _ in held] == [1, 0] * (len(held) // 2)
    assert {blocks for begins, _, blocks in held if not begins} == {
        symmetric.ALONE,
        *map(int, cell["ctas"].split("/")),
    }
    assert first == SMALL["hidden_size"] and max(ns for _, ns, _ in held) < 60_000


def test_what_it_needs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch.cuda, "is_available", lambda: False), pytest.raises(SystemExit) as end:
        main(["bench", "overlap", str(SHAPES / "llama-70b"), "--emulate", "8"])
    assert end.value.code == 2 and "--emulate needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_shapes_can_be_shared_by_eight(shape: str) -> None:
    config = ModelConfig.from_path(SHAPES / shape)
    config.check_ranks(8)
    assert config.num_layers == 8 and json.loads((SHAPES / shape / "config.json").read_text())
