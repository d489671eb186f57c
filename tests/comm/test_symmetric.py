"""The seam kernel of GPUs on threads of the CPU: seam.cu itself, compiled by the C++ compiler with
tests/comm/cuda/ptx.cuh for the GPU's instructions. Arithmetic, shares and meetings are the kernel's own.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.comm import test_seams
from tests.comm.test_seams import HIDDEN, edits, halves, joints, passes, unguarded
from tests.ranks import pool
from weaveinf.comm import segment, symmetric
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.symmetric import Call, Memory, SymmetricSeam
from weaveinf.ops import cuda

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
ROOT = Path(__file__).parents[2]
ELEMENTS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
MULTICAST = 1 << 46
Build = Callable[..., str]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles the kernel for some sizes, once each: the library's path."""
    home, made = tmp_path_factory.mktemp("seam"), {}

    def compiled(
        dtype: torch.dtype, hidden: int, ranks: int, multimem: bool = False, fp8: bool = False
    ) -> str:
        defines = {
            "ELEMENT": ELEMENTS[dtype],
            "HIDDEN": hidden,
            "RANKS": ranks,
            "MULTIMEM": int(multimem),
            "FP8": int(fp8),
            "MAX_THREADS": 64,
        }
        name = "-".join(map(str, defines.values()))
        if name not in made:
            made[name] = str(home / f"{name}.so")
            words = (
                "g++ -std=c++20 -O1 -mf16c -pthread -fPIC -shared -Wall -Werror -Wno-unknown-pragmas".split()
            )
            words += [f"-I{ROOT}/tests/comm/cuda", *(f"-D{key}={value}" for key, value in defines.items())]
            subprocess.run([*words, f"{ROOT}/tests/comm/cuda/grid.cpp", "-o", made[name]], check=True)
        return made[name]

    return compiled


class Grid:
    """In a Kernel's place: the launch on threads, of blocks that begin at their own time."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        assert self._library.call_bytes() == ctypes.sizeof(Call)
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, call: Call, blocks: int, rows: int = 1, delay_us: int = 100) -> None:
        delays = torch.randint(delay_us + 1, (blocks * rows,), generator=self._random, dtype=torch.int32)
        self._library.run(ctypes.byref(call), blocks, rows, ctypes.c_void_p(delays.data_ptr()))


# ---- processes: the whole seam, in memory that they share in symmetric memory's place -------------------


def on_threads(
    ranks: Ranks, path: str, multimem: bool, function: Callable[..., object], *args: object
) -> object:
    def allocate(ranks: Ranks, nbytes: int) -> Memory:
        shared = segment.share(nbytes * ranks.size, ranks.rank, ranks.agree)
        buffers = [shared.tensor(r * nbytes, (nbytes,), torch.uint8) for r in range(ranks.size)]
        return Memory(buffers, MULTICAST if multimem else 0)

    def build(kind: str, ranks: Ranks, dtype: torch.dtype, max_rows: int = 350) -> SymmetricSeam:
        seam = SymmetricSeam(ranks, max_rows, HIDDEN, dtype)
        ranks.agree("made")
        return seam

    with (
        mock.patch.object(symmetric, "allocate", allocate),
        mock.patch.object(symmetric, "BLOCKS", 2),
        mock.patch.object(test_seams, "MAX_ROWS", 350),
        mock.patch.object(cuda, "seam", lambda *sizes: Grid(path)),
        mock.patch.object(test_seams, "build", build),
    ):
        return function(ranks, *args)


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_passes(build: Build, size: int, dtype: torch.dtype) -> None:
    path = build(dtype, HIDDEN, size)
    digests = pool(size).run(on_threads, path, False, passes, "peer", dtype)
    assert all(one == digests[0] for one in digests)


def test_the_switch_sums(build: Build) -> None:
    path = build(torch.float32, HIDDEN, 2, multimem=True)
    digests = pool(2).run(on_threads, path, True, passes, "multimem", torch.float32)
    assert digests[0] == digests[1]


def test_gather_and_insert(build: Build) -> None:
    pool(2).run(on_threads, build(torch.bfloat16, HIDDEN, 2), False, edits, "peer", torch.bfloat16)


def test_two_halves(build: Build) -> None:
    pool(2).run(on_threads, build(torch.bfloat16, HIDDEN, 2), False, halves, "peer", torch.bfloat16)


def test_nobody_writes_what_a_peer_still_reads(build: Build) -> None:
    path = build(torch.bfloat16, HIDDEN, 2)
    first, second = pool(2).run(on_threads, path, False, unguarded, "peer", torch.bfloat16)
    assert first == second


def alone(ranks: Ranks) -> str:
    with mock.patch.object(ranks, "silence_s", 0.3):
        seam = test_seams.build("peer", ranks, torch.bfloat16)
    seam.open(4)
    said = ""
    if ranks.rank == 0:
        began = time.monotonic()
        seam.start(next(joints(torch.bfloat16)))
        with pytest.raises(TimeoutError) as error:
            seam.finish()
        assert time.monotonic() - began < 5
        with pytest.raises(TimeoutError):
            seam.start(next(joints(torch.bfloat16)))
        said = str(error.value)
    seam.close()
    return said


def test_a_rank_that_does_not_come_is_named(build: Build) -> None:
    said = pool(2).run(on_threads, build(torch.bfloat16, HIDDEN, 2), False, alone)
    assert said == ["rank 1 did not come to a seam in time", ""]


# ---- virtual ranks: all ranks as rows of one grid -------------------------------------------------------


class Virtual:
    """All ranks' memory in one process, for one launch after another."""

    def __init__(self, grid: Grid, dtype: torch.dtype, hidden: int, size: int, rows: int, fp8: bool) -> None:
        self.grid, self.dtype, self.hidden, self.size, self.rows = grid, dtype, hidden, size, rows
        row = hidden * dtype.itemsize
        self.at = {"partial": 0, "x": rows * row, "residual": 2 * rows * row, "scales": 3 * rows * row}
        self.at["pads"] = -(-(self.at["scales"] + 4 * rows) // 256) * 256
        self.buffers = torch.full((size, self.at["pads"] + 64 * 32), 0xFF, dtype=torch.uint8)
        self.buffers[:, self.at["pads"] :] = 0
        self.counts = torch.zeros(size, 65, dtype=torch.int32)
        self.said = torch.zeros(1, dtype=torch.int32)
        self.call = call = Call()
        for r in range(size):
            call.buffers[r] = self.buffers[r].data_ptr()
            call.epochs[r] = self.counts[r].data_ptr()
        call.multicast = MULTICAST
        call.failed, call.said = self.counts[0, 64:].data_ptr(), self.said.data_ptr()
        call.patience_ns = 60 * 10**9
        for name, at in self.at.items():
            setattr(call, f"{name}_at", at)
        self.out_dtype = torch.float8_e4m3fn if fp8 else dtype

    def view(self, name: str, rank: int, dtype: torch.dtype, width: int) -> Tensor:
        nbytes = self.rows * width * dtype.itemsize
        return self.buffers[rank][self.at[name] : self.at[name] + nbytes].view(dtype).view(self.rows, width)

    def run(self, parts: list[Tensor], weight: Tensor, blocks: int, fresh: bool) -> list[Tensor]:
        """The x of every rank."""
        for r, part in enumerate(parts):
            self.view("partial", r, self.dtype, self.hidden).copy_(part)
            self.view("x", r, self.dtype, self.hidden).view(torch.uint8).fill_(0x7F)
        call = self.call
        call.rows, call.fresh, call.weight = self.rows, fresh, weight.data_ptr()
        call.eps, call.offset, call.scale = 1e-5, 0.5, 0.75
        self.grid(call, blocks, self.size)
        assert self.said.item() == 0
        return [self.view("x", r, self.out_dtype, self.hidden) for r in range(self.size)]


@pytest.mark.parametrize(
    ("dtype", "hidden", "size", "rows", "blocks", "multimem"),
    [
        (torch.float32, 4, 1, 3, 1, False),
        (torch.float32, 516, 3, 7, 2, False),
        (torch.bfloat16, 512, 8, 19, 1, False),
        (torch.bfloat16, 2056, 4, 9, 3, False),
        (torch.float16, 1040, 2, 11, 2, False),
        (torch.float16, 1040, 2, 11, 2, True),
        (torch.bfloat16, 264, 5, 2, 4, True),
        (torch.bfloat16, 264, 5, 0, 4, True),
    ],
)
def test_against_float64(
    build: Build, dtype: torch.dtype, hidden: int, size: int, rows: int, blocks: int, multimem: bool
) -> None:
    torch.manual_seed(hidden)
    world = Virtual(Grid(build(dtype, hidden, size, multimem)), dtype, hidden, size, rows, False)
    weight = (1 + torch.randn(hidden)).to(dtype)
    residual = torch.zeros(rows, hidden, dtype=torch.float64)
    unit = torch.finfo(dtype).eps
    for turn in range(3):
        parts = [torch.randn(rows, hidden).to(dtype) for _ in range(size)]
        xs = world.run(parts, weight, blocks, fresh=turn == 0)
        assert all(torch.equal(x, xs[0]) for x in xs)
        total = sum((part.double() for part in parts), torch.zeros(rows, hidden, dtype=torch.float64))
        residual += 0.75 * total
        want = residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 0.5)
        # One rounding of the residual (two where the switch rounds the sum) and one of x, a turn each.
        close = (xs[0].double() - want).abs() <= 3 * (turn + 1) * unit * (1 + want.abs() + weight.abs().max())
        assert close.all()


def test_eight_bits(build: Build) -> None:
    """x as e4m3, a scale a row: the largest is 448, the others within half a unit of theirs."""
    torch.manual_seed(0)
    hidden, size, rows = 264, 2, 7
    world = Virtual(
        Grid(build(torch.bfloat16, hidden, size, fp8=True)), torch.bfloat16, hidden, size, rows, True
    )
    weight = (1 + torch.randn(hidden)).bfloat16()
    parts = [torch.randn(rows, hidden).bfloat16() for _ in range(size)]
    parts[0][3] = parts[1][3] = 0
    xs = world.run(parts, weight, 2, fresh=True)
    assert torch.equal(xs[0].view(torch.uint8), xs[1].view(torch.uint8))
    scales = [world.view("scales", r, torch.float32, 1) for r in range(size)]
    assert torch.equal(scales[0], scales[1])
    residual = (0.75 * (parts[0].float() + parts[1].float())).bfloat16().float()
    want = residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.float() + 0.5)
    assert (xs[0].float().abs().amax(-1) == torch.where(want.abs().amax(-1) > 0, 448.0, 0.0)).all()
    torch.testing.assert_close(
        xs[0].float() * scales[0], want, rtol=2**-4, atol=2**-9 * scales[0].max().item()
    )


def test_many_launches_one_after_another(build: Build) -> None:
    """Blocks at random times, rows that vary: every launch has its own numbers at its meetings."""
    torch.manual_seed(1)
    grid = Grid(build(torch.bfloat16, 264, 2))
    world = Virtual(grid, torch.bfloat16, 264, 2, 6, False)
    weight = torch.ones(264).bfloat16()
    for turn in range(60):
        blocks = (1, 3, 2)[turn % 3]
        parts = [torch.randn(6, 264).bfloat16() for _ in range(2)]
        first, second = world.run(parts, weight, blocks, fresh=turn % 5 == 0)
        assert torch.equal(first, second) and first.isfinite().all()
    assert world.counts[0, :3].tolist() == world.counts[1, :3].tolist() == [120, 80, 40]
