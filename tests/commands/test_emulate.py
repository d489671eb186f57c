"""`bench overlap --emulate`: rank 0's part of every variant, with the seam kernel on threads of the CPU."""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.comm.test_symmetric import Build, Grid, build  # noqa: F401
from tests.models.harness import SMALL, make_checkpoint
from weaveinf.cli import main
from weaveinf.comm import symmetric
from weaveinf.comm.symmetric import Call
from weaveinf.commands import emulate
from weaveinf.commands.emulate import Emulation, published_us
from weaveinf.models.config import ModelConfig
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

    class Recorded(Grid):
        def __call__(self, call: Call, blocks: int, rows: int = 1, delay_us: int = 0) -> None:
            held.append((call.rows, call.lasts_ns, blocks))
            began = time.monotonic_ns()
            super().__call__(call, blocks, rows, delay_us)
            assert time.monotonic_ns() - began >= call.lasts_ns > 0

    def kernel(dtype: torch.dtype, hidden: int, ranks: int, multimem: bool) -> Grid:
        return Recorded(build(dtype, hidden, ranks, multimem))

    with mock.patch.object(symmetric, "kernel", kernel):
        bench = Emulation(tmp_path, 2, 96, torch.device("cpu"))
        cell = bench.cell(96, pairs=1)
        bench.ranks.close()
    assert all(cell[f"{name}_ms"] > 0 for name in ("plain", "nccl", "fused", "woven", "no_comm"))
    joints, halves = 2 * SMALL["num_hidden_layers"] + 1, 2
    assert len(held) == 2 * joints * (3 + halves)  # every variant ran twice, that without seams too
    given = {blocks for rows, _, blocks in held if rows}
    assert given == {symmetric.ALONE, *map(int, cell["ctas"].split("/"))}
    pauses = [ns for rows, ns, _ in held if not rows]
    assert [pauses.count(int(1e3 * us)) for us in (16.5, 36.0)] == [2 * joints] * 2


def test_what_it_needs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch.cuda, "is_available", lambda: False), pytest.raises(SystemExit) as end:
        main(["bench", "overlap", str(SHAPES / "llama-70b"), "--emulate", "8"])
    assert end.value.code == 2 and "--emulate needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_shapes_can_be_shared_by_eight(shape: str) -> None:
    config = ModelConfig.from_path(SHAPES / shape)
    config.check_ranks(8)
    assert config.num_layers == 8 and json.loads((SHAPES / shape / "config.json").read_text())
