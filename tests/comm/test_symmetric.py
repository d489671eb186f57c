"""The seam kernel of GPUs on threads of the CPU: seam.cu itself, compiled by the C++ compiler with
tests/comm/cuda/ptx.cuh for the GPU's instructions. Arithmetic, shares and meetings are the kernel's own.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.comm import test_seams
from tests.comm.cuda import world
from tests.comm.cuda.world import MULTICAST, World
from tests.comm.test_seams import HIDDEN, edits, halves, joints, passes, unguarded
from tests.ranks import pool
from weaveinf.comm import segment, symmetric
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.symmetric import Call, Memory, SymmetricSeam

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
ROOT = Path(__file__).parents[2]
Build = Callable[..., str]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles the kernel for some sizes, once each: the library's path."""
    home, made = tmp_path_factory.mktemp("seam"), {}

    def compiled(
        dtype: torch.dtype, hidden: int, ranks: int, multimem: bool = False, fp8: bool = False
    ) -> str:
        defines = symmetric.defines(dtype, hidden, ranks, multimem, fp8) | {"MAX_THREADS": 64}
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
        seam = SymmetricSeam(ranks, max_rows, HIDDEN, dtype, allocate)
        ranks.agree("made")
        return seam

    with (
        mock.patch.object(symmetric, "ALONE", 2),
        mock.patch.object(SymmetricSeam, "ctas", (0, 1)),
        mock.patch.object(test_seams, "MAX_ROWS", 350),
        mock.patch.object(symmetric, "kernel", lambda *sizes: Grid(path)),
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
        with pytest.raises(TimeoutError):
            ranks.check()
    ranks.words.zero_()
    seam.close()
    return said


def test_a_rank_that_does_not_come_is_named(build: Build) -> None:
    said = pool(2).run(on_threads, build(torch.bfloat16, HIDDEN, 2), False, alone)
    assert said == ["rank 1 did not come to a seam in time", ""]


def given_up(ranks: Ranks) -> float:
    """Rank 0 waits in vain, with all patience, until it is told not to."""
    seam = test_seams.build("peer", ranks, torch.bfloat16)
    seam.open(4)
    took = 0.0
    if ranks.rank == 0:
        threading.Timer(0.2, ranks.give_up).start()
        began = time.monotonic()
        seam.start(next(joints(torch.bfloat16)))
        with pytest.raises(TimeoutError):
            seam.finish()
        took = time.monotonic() - began
    ranks.words.zero_()
    seam.close()
    return took


def test_a_verdict_ends_a_wait(build: Build) -> None:
    took = pool(2).run(on_threads, build(torch.bfloat16, HIDDEN, 2), False, given_up)[0]
    assert 0.1 < took < 10


# ---- virtual ranks: all ranks as rows of one grid -------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "multimem"),
    [
        ((torch.float32, 4, 1, 3, 1), False),
        ((torch.float32, 516, 3, 7, 2), False),
        ((torch.bfloat16, 512, 8, 19, 1), False),
        ((torch.bfloat16, 2056, 4, 9, 3), False),
        ((torch.float16, 1040, 2, 11, 2), False),
        ((torch.float16, 1040, 2, 11, 2), True),
        ((torch.bfloat16, 264, 5, 2, 4), True),
        ((torch.bfloat16, 264, 5, 0, 4), True),
    ],
)
def test_against_float64(build: Build, sizes: world.Sizes, multimem: bool) -> None:
    world.check_sums(World(Grid(build(*sizes[:3], multimem)), sizes, "cpu"))


def test_eight_bits(build: Build) -> None:
    sizes = torch.bfloat16, 264, 2, 7, 2
    world.check_eight_bits(World(Grid(build(*sizes[:3], fp8=True)), sizes, "cpu", fp8=True))


def test_many_launches_one_after_another(build: Build) -> None:
    sizes = torch.bfloat16, 264, 2, 6, 1
    world.check_launches(World(Grid(build(*sizes[:3])), sizes, "cpu"), 60)


def test_a_missing_rank_is_named_and_nobody_goes_on(build: Build) -> None:
    sizes = torch.bfloat16, 264, 5, 6, 1
    world.check_a_rank_is_missing(World(Grid(build(*sizes[:3])), sizes, "cpu"))


def known_to_torch(ranks: Ranks) -> None:
    seam = test_seams.build("peer", ranks, torch.float32)
    call = symmetric.Call.from_buffer_copy(seam._call)
    call.rows, call.weight = 0, torch.ones(HIDDEN).data_ptr()
    packed = torch.frombuffer(call, dtype=torch.uint8)
    arguments = seam._memory.buffers[ranks.rank], packed, [torch.ones(HIDDEN)], 1, seam._number
    torch.library.opcheck(torch.ops.weaveinf.seam.default, arguments)
    seam.close()


def test_the_launch_is_an_operator(build: Build) -> None:
    """With a fake for tracing; torch's own check of such operators is content."""
    pool(2).run(on_threads, build(torch.float32, HIDDEN, 2), False, known_to_torch)
