"""The seam kernel on a real GPU: all ranks as rows of one grid, and as processes that share the GPU.

Until these have passed on a machine with a GPU, the kernel counts as compiled
(tests/comm/test_seam_compiles.py) and as run on threads of a CPU (tests/comm/test_symmetric.py). The switch's
instructions need several GPUs with one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.comm.cuda import world
from tests.comm.cuda.world import World
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint
from weaveinf.comm.symmetric import SymmetricSeam, kernel
from weaveinf.ops import cuda
from weaveinf.ops.norm import add_rms_norm_reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(bool(cuda.objection()), reason=cuda.objection() or "-"),
]
CASES = [
    (torch.float32, 512, 1, 3, 1),
    (torch.float32, 16384, 8, 37, 4),
    (torch.bfloat16, 512, 8, 1, 8),
    (torch.bfloat16, 2880, 3, 513, 8),
    (torch.bfloat16, 8192, 8, 1000, 8),
    (torch.bfloat16, 8192, 2, 77, 16),
    (torch.bfloat16, 16384, 8, 64, 2),
    (torch.float16, 5120, 4, 255, 8),
    (torch.float16, 7168, 5, 0, 8),
]


def made(sizes: world.Sizes, fp8: bool = False) -> World:
    return World(kernel(*sizes[:3], fp8=fp8), sizes, "cuda", fp8)


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_against_float64(sizes: world.Sizes) -> None:
    world.check_sums(made(sizes))


def test_eight_bits() -> None:
    world.check_eight_bits(made((torch.bfloat16, 8192, 8, 100, 4), fp8=True))


def test_many_launches_one_after_another() -> None:
    world.check_launches(made((torch.bfloat16, 8192, 8, 19, 1)), 2000)


def test_a_missing_rank_is_named_and_nobody_goes_on() -> None:
    world.check_a_rank_is_missing(made((torch.bfloat16, 8192, 8, 19, 4)))


def test_replayed_in_a_graph() -> None:
    """The meetings' numbers lie on the device: a replay has new ones."""
    one = made((torch.bfloat16, 4096, 4, 50, 8))
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    parts = [one.draw(50, 4096) for _ in range(4)]
    want = one.run(parts, weight, fresh=True)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.launch(one.call, one.blocks, one.size)
    for _ in range(50):
        one.view("x", 3, torch.bfloat16, 4096).fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert one.said[0] == 0
        assert torch.equal(one.view("x", 3, torch.bfloat16, 4096), want)


def of_a_process(rank: int, size: int, path: str) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", 0)
    store = dist.FileStore(path, size)
    store.set_timeout(timedelta(seconds=60))
    ranks = Ranks(rank, size, device, store)  # only what the seam needs: NCCL wants a GPU for each rank
    seam = SymmetricSeam(ranks, 100, 1024, torch.bfloat16)
    ranks.agree("made")
    random = torch.Generator().manual_seed(0)
    joint = Joint(torch.ones(1024, dtype=torch.bfloat16, device=device), 1e-5)
    for rows in (1, 100, 37):
        seam.open(rows)
        residual = torch.zeros(rows, 1024, dtype=torch.bfloat16)
        for kept in (None, torch.arange(0, rows, 3), None):
            left = rows if kept is None else len(kept)
            residual = residual[: len(residual)] if kept is None else residual[kept]
            rows = left
            parts = [torch.randn(left, 1024, generator=random).bfloat16() for _ in range(size)]
            want = torch.empty_like(residual)
            add_rms_norm_reference(parts, residual, Joint(joint.weight.cpu(), 1e-5), want)
            seam.partial()[:left] = parts[rank].to(device)
            seam.start(joint, None if kept is None else kept.to(device))
            torch.testing.assert_close(seam.finish().cpu(), want, rtol=2**-7, atol=1e-6)
            every = torch.arange(left, device=device)
            assert torch.equal(seam.gather(every).cpu(), residual)
    seam.finish()
    ranks.agree("done")
    seam.close()
    ranks.close()


def test_processes_that_share_a_gpu() -> None:
    """The way memory is mapped between processes; how two of them share one GPU is not for speed."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        path = str(Path(folder) / "store")
        processes = [context.Process(target=of_a_process, args=(rank, 2, path)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0, 0]
