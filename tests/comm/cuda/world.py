"""All ranks of a seam as rows of one grid of csrc/cuda/seam.cu, and what must be true of them: on threads of
a CPU (tests/comm/test_symmetric.py) and on one GPU (tests/gpu/test_seam.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weaveinf.comm.symmetric import Call

MULTICAST = 1 << 46
"""On a CPU the address of what lies at the same place in all buffers."""

MOST_BLOCKS = 256
Launch = Callable[[Call, int, int], None]
Sizes = tuple[torch.dtype, int, int, int, int]
"""dtype, hidden, ranks, rows, blocks of a rank."""


class World:
    """The ranks' memory, for one launch after another."""

    def __init__(self, launch: Launch, sizes: Sizes, device: str, fp8: bool = False) -> None:
        self.launch, self.device = launch, device
        self.dtype, self.hidden, self.size, self.rows, self.blocks = sizes
        self.out_dtype = torch.float8_e4m3fn if fp8 else self.dtype
        row = self.hidden * self.dtype.itemsize
        self.at = {"partial": 0, "x": self.rows * row, "residual": 2 * self.rows * row}
        self.at |= {"old_residual": 3 * self.rows * row, "scales": 4 * self.rows * row}
        self.at["pads"] = -(-(self.at["scales"] + 4 * self.rows) // 256) * 256
        size = (self.size, self.at["pads"] + MOST_BLOCKS * 32)
        self.buffers = torch.full(size, 0xFF, dtype=torch.uint8, device=device)
        self.buffers[:, self.at["pads"] :] = 0
        self.counts = torch.zeros(self.size, MOST_BLOCKS + 1, dtype=torch.int32, device=device)
        self.said = torch.zeros(2, dtype=torch.int32, pin_memory=device == "cuda")
        self.call = call = Call()
        for r in range(self.size):
            call.buffers[r] = self.buffers[r].data_ptr()
            call.epochs[r] = self.counts[r].data_ptr()
        call.multicast = MULTICAST
        call.failed, call.said = self.counts[0, MOST_BLOCKS:].data_ptr(), self.said.data_ptr()
        call.patience_ns = 60 * 10**9
        for name, at in self.at.items():
            setattr(call, f"{name}_at", at)

    def view(self, name: str, rank: int, dtype: torch.dtype, width: int) -> Tensor:
        nbytes = self.rows * width * dtype.itemsize
        return self.buffers[rank][self.at[name] : self.at[name] + nbytes].view(dtype).view(self.rows, width)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def run(self, parts: list[Tensor], weight: Tensor, fresh: bool, ranks: int | None = None) -> list[Tensor]:
        """The x of every rank, over poison; only the first `ranks` come."""
        for r, part in enumerate(parts):
            self.view("partial", r, self.dtype, self.hidden).copy_(part)
            self.view("x", r, self.dtype, self.hidden).view(torch.uint8).fill_(0x7F)
        call = self.call
        call.rows, call.fresh, call.weight = self.rows, fresh, weight.data_ptr()
        call.eps, call.offset, call.scale = 1e-5, 0.5, 0.75
        self.launch(call, self.blocks, self.size if ranks is None else ranks)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return [self.view("x", r, self.out_dtype, self.hidden) for r in range(self.size)]


def check_sums(world: World) -> None:
    """Against float64, the same bits on all ranks, the residual carried on."""
    rows, hidden, dtype = world.rows, world.hidden, world.dtype
    torch.manual_seed(hidden)
    weight = 1 + world.draw(hidden)
    residual = torch.zeros(rows, hidden, dtype=torch.float64, device=world.device)
    unit = torch.finfo(dtype).eps
    for turn in range(3):
        parts = [world.draw(rows, hidden) for _ in range(world.size)]
        xs = world.run(parts, weight, fresh=turn == 0)
        assert world.said[0] == 0
        assert all(torch.equal(x, xs[0]) for x in xs)
        for part in parts:
            residual += 0.75 * part.double()
        want = residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 0.5)
        # One rounding of the residual (two where the switch rounds the sum) and one of x, a turn each.
        bound = 3 * (turn + 1) * unit * (1 + want.abs() + weight.abs().max().double())
        assert ((xs[0].double() - want).abs() <= bound).all()


def check_eight_bits(world: World) -> None:
    """x as e4m3, a scale a row: the largest is 448, the others within half a unit of theirs."""
    torch.manual_seed(0)
    weight = 1 + world.draw(world.hidden)
    parts = [world.draw(world.rows, world.hidden) for _ in range(world.size)]
    for part in parts:
        part[3] = 0
    xs = world.run(parts, weight, fresh=True)
    assert all(torch.equal(x.view(torch.uint8), xs[0].view(torch.uint8)) for x in xs)
    scales = [world.view("scales", r, torch.float32, 1) for r in range(world.size)]
    assert all(torch.equal(one, scales[0]) for one in scales)
    total = torch.stack([part.float() for part in parts]).sum(0)
    residual = (0.75 * total).to(world.dtype).float()
    want = residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.float() + 0.5)
    largest = xs[0].float().abs().amax(-1)
    assert torch.equal(largest, torch.where(want.abs().amax(-1) > 0, 448.0, 0.0))
    torch.testing.assert_close(
        xs[0].float() * scales[0], want, rtol=2**-4, atol=2**-9 * scales[0].max().item()
    )


def check_launches(world: World, turns: int) -> None:
    """One after another, with other numbers of blocks: every launch has its own numbers at its meetings."""
    torch.manual_seed(1)
    weight = torch.ones(world.hidden, dtype=world.dtype, device=world.device)
    met = [0, 0, 0]
    for turn in range(turns):
        world.blocks = (1, 3, 2)[turn % 3]
        met = [count + 2 * (block < world.blocks) for block, count in enumerate(met)]
        parts = [world.draw(world.rows, world.hidden) for _ in range(world.size)]
        xs = world.run(parts, weight, fresh=turn % 5 == 0)
        assert all(torch.equal(x, xs[0]) for x in xs) and xs[0].isfinite().all()
    assert all(counts[:3].tolist() == met for counts in world.counts)


def check_a_rank_is_missing(world: World) -> None:
    """The others give up in time, say whom they missed, and refuse the next launch."""
    world.call.patience_ns = 100 * 10**6
    weight = torch.ones(world.hidden, dtype=world.dtype, device=world.device)
    parts = [world.draw(world.rows, world.hidden) for _ in range(world.size)]
    world.run(parts, weight, True, ranks=world.size - 1)
    assert world.said[0] == world.size
    met = world.counts[:, :MOST_BLOCKS].clone()
    world.run(parts, weight, True)
    assert torch.equal(world.counts[:, :MOST_BLOCKS], met)
