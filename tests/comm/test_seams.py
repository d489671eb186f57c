"""Every kind of seam against the arithmetic of DESIGN section 1, worked out on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.ranks import pool
from weaveinf.comm import collective
from weaveinf.comm.choose import make_seam
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam, share_of
from weaveinf.ops import native
from weaveinf.ops.norm import add_rms_norm_reference

MAX_ROWS, HIDDEN = 701, 1000  # no multiple of any vector width; several chunks over TCP
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""The mean square is summed in another order, so its last bits are free; one unit of bfloat16."""
KINDS = ("shared memory", "collective", "collective, by Python on odd ranks")


def build(kind: str, ranks: Ranks, dtype: torch.dtype, max_rows: int = MAX_ROWS) -> Seam:
    if kind == "local":
        return LocalSeam(max_rows, HIDDEN, dtype, ranks.device)
    if kind.startswith("collective"):
        seam = CollectiveSeam(ranks, max_rows, HIDDEN, dtype, "the test wants it")
        seam._native &= kind == "collective" or ranks.rank % 2 == 0
        return seam
    seam = make_seam(ranks, max_rows, HIDDEN, dtype)
    assert seam.name == kind, seam.why
    return seam


class Oracle:
    """A pass as one rank would compute it that has the partial sums of all. All ranks draw the same."""

    def __init__(self, ranks: Ranks, seam: Seam, dtype: torch.dtype, seed: int) -> None:
        self.ranks, self.seam, self.dtype = ranks, seam, dtype
        self.random = torch.Generator().manual_seed(seed)
        self.digests: list[bytes] = []
        self.starts = 0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def open(self, rows: int) -> None:
        self.seam.open(rows)
        self.residual = torch.zeros(rows, HIDDEN, dtype=self.dtype)

    def start(self, joint: Joint, kept: Tensor | None = None) -> None:
        """Writes this rank's partial sums over poison, and starts the seam."""
        rows = len(self.residual) if kept is None else len(kept)
        parts = [self.draw(rows, HIDDEN) for _ in range(self.ranks.size)]
        out = self.seam.partial()
        assert out.shape == self.residual.shape
        out.fill_(float("nan"))
        out[:rows] = parts[self.ranks.rank]
        self.residual = self.residual.clone() if kept is None else self.residual[kept]
        self.expected = torch.empty_like(self.residual)
        add_rms_norm_reference(parts, self.residual, joint, self.expected)
        self.starts += 1
        self.seam.start(joint, kept, self.seam.ctas[self.starts % len(self.seam.ctas)])

    def finish(self) -> None:
        x = self.seam.finish()
        torch.testing.assert_close(x, self.expected, rtol=TOLERANCE[self.dtype], atol=1e-6)
        self.digests.append(x.contiguous().view(torch.uint8).numpy().tobytes())
        self.ranks.votes.sum(torch.zeros(1))  # all have looked at x, which ranks may share
        x.fill_(float("nan"))
        self.ranks.votes.sum(torch.zeros(1))

    def check_residual(self) -> None:
        """To the last bit: a sum in rank order, one rounding."""
        rows = torch.randperm(len(self.residual), generator=self.random)
        assert torch.equal(self.seam.gather(rows), self.residual[rows])

    def insert(self) -> None:
        rows = torch.randperm(len(self.residual), generator=self.random)[:5]
        values = self.draw(len(rows), HIDDEN)
        self.seam.insert(rows, values)
        self.residual[rows] = values


def joints(dtype: torch.dtype) -> Iterator[Joint]:
    random = torch.Generator().manual_seed(0)
    while True:
        weight = (1 + torch.randn(HIDDEN, generator=random)).to(dtype)
        yield Joint(weight, 1e-5)
        yield Joint(weight, 1e-6, weight_offset=1.0, residual_scale=0.22)


def keeps(rows: int) -> list[Tensor | None]:
    """What a pass keeps from joint to joint: all, some, few, one, none."""
    every = torch.arange(rows)
    some = every[torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.6]
    left = len(some)
    half = torch.arange(left)[left // 2 :]
    few = torch.arange(len(half))[::7]
    return [None, every, None, some, None, half, few, None, torch.arange(len(few))[-1:], None]


def passes(ranks: Ranks, kind: str, dtype: torch.dtype) -> list[bytes]:
    seam = build(kind, ranks, dtype)
    oracle = Oracle(ranks, seam, dtype, seed=1)
    chain = joints(dtype)
    for rows in (0, 1, 2, 3, 17, 33, MAX_ROWS, 1, 350):
        oracle.open(rows)
        oracle.check_residual()
        for kept in keeps(rows):
            oracle.start(next(chain), kept)
            oracle.finish()
        oracle.check_residual()
        nothing = torch.empty(0, dtype=torch.int64)
        oracle.start(next(chain), nothing)
        oracle.finish()
    with pytest.raises(ValueError, match="rows in a seam made for"):
        seam.open(MAX_ROWS + 1)
    seam.close()
    seam.close()
    return oracle.digests


def edits(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    seam = build(kind, ranks, dtype)
    oracle = Oracle(ranks, seam, dtype, seed=2)
    chain = joints(dtype)
    for rows in (5, 120):
        oracle.open(rows)
        for kept in (None, torch.arange(rows)[1::2], torch.arange(2), None):
            oracle.insert()
            oracle.check_residual()
            oracle.start(next(chain), kept)
            oracle.finish()
            oracle.check_residual()
            oracle.check_residual()
            oracle.insert()
    seam.close()


def halves(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    """Two seams in turn, as the woven executor uses them: one runs while the other's block does."""
    seams = [build(kind, ranks, dtype) for _ in range(2)]
    oracles = [Oracle(ranks, seam, dtype, seed=3 + i) for i, seam in enumerate(seams)]
    chain = joints(dtype)
    for rows in ((MAX_ROWS - 1, 3), (64, 65), (1, 1)):
        for oracle, count in zip(oracles, rows, strict=True):
            oracle.open(count)
            oracle.start(next(chain))
        for step in range(4):
            for oracle in oracles:
                oracle.finish()
                left = len(oracle.residual)
                oracle.start(next(chain), torch.arange(left)[left // 2 :] if step == 2 else None)
        for oracle in oracles:
            oracle.finish()
            oracle.check_residual()
    for seam in seams:
        seam.close()


def unguarded(ranks: Ranks, kind: str, dtype: torch.dtype) -> list[bytes]:
    """Many short passes with no other meeting between them: nobody writes what a peer still reads."""
    seam = build(kind, ranks, dtype, 64)
    random = torch.Generator().manual_seed(ranks.rank)
    joint = next(joints(dtype))
    digests = []
    for turn in range(60):
        rows = (1, 40, 3, 64)[turn % 4]
        seam.open(rows)
        for kept in (None, torch.arange(0, rows, 2), None, torch.arange((rows + 1) // 2)[:2], None):
            out = seam.partial()
            out.copy_(torch.randn(out.shape, generator=random))
            seam.start(joint, kept)
            digests.append(seam.finish().contiguous().view(torch.uint8).numpy().tobytes())
    seam.close()
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_passes(kind: str, size: int, dtype: torch.dtype) -> None:
    digests = pool(size).run(passes, kind, dtype)
    assert all(one == digests[0] for one in digests)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gather_and_insert(kind: str, size: int) -> None:
    pool(size).run(edits, kind, torch.bfloat16)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_two_halves(kind: str, size: int) -> None:
    pool(size).run(halves, kind, torch.bfloat16)


def while_one_is_late(ranks: Ranks) -> None:
    """Rank 0 has both seams under way, the newer of which moves rows, before the others start any."""
    with mock.patch.object(collective, "_CHUNK_BYTES", 16 * 2 * HIDDEN):
        older, newer = (build("collective", ranks, torch.bfloat16) for _ in range(2))
    oracles = [Oracle(ranks, seam, torch.bfloat16, seed=5) for seam in (older, newer)]
    chain = joints(torch.bfloat16)
    every = torch.arange(MAX_ROWS)
    for oracle in oracles:
        oracle.open(MAX_ROWS)
    for kept in (every[1:], None), (every[350:], every[2:]), (every[:300:3], None):
        for oracle, keep in zip(oracles, kept, strict=True):
            if ranks.rank:
                time.sleep(0.05)
            oracle.start(next(chain), keep if keep is None else keep[keep < len(oracle.residual)])
        oracles[0].seam.finish()
        gathered = oracles[0].seam.gather(torch.arange(60))  # as a vote does under the other half
        assert torch.equal(gathered, oracles[0].residual[:60])
        for oracle in oracles:
            oracle.finish()
    for seam in (older, newer):
        seam.close()


def test_a_newer_seam_keeps_nobody_waiting() -> None:
    pool(3).run(while_one_is_late)


@pytest.mark.parametrize("size", [2, 4])
def test_all_kinds_agree_without_other_meetings(size: int) -> None:
    shared, collective, mixed = (pool(size).run(unguarded, kind, torch.float32) for kind in KINDS)
    assert all(one == shared[0] for one in shared)
    assert all(one == collective[0] for one in collective + mixed)
    for a, b in zip(shared[0], collective[0], strict=True):
        x, y = (torch.frombuffer(bytearray(d), dtype=torch.float32) for d in (a, b))
        torch.testing.assert_close(x, y)


@torch.inference_mode()
def without_kernels(ranks: Ranks) -> None:
    with mock.patch.object(native, "lib", None):
        passes(ranks, "collective", torch.bfloat16)


def test_without_compiled_kernels() -> None:
    """Nobody compiled csrc/cpu: the progress thread too works on what was made in inference mode."""
    pool(2).run(without_kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local(dtype: torch.dtype) -> None:
    ranks = Ranks.single(torch.device("cpu"))
    passes(ranks, "local", dtype)
    edits(ranks, "local", dtype)


def wrong_rows(ranks: Ranks) -> None:
    seam = build("shared memory", ranks, torch.float32)
    joint = next(joints(torch.float32))
    seam.open(4)
    for bad in ([0, 4], [1, 1], [2, 1], [-1, 0]):
        with pytest.raises(ValueError, match="ascend"):
            seam.start(joint, torch.tensor(bad))
    seam.open(4 + ranks.rank)
    with pytest.raises(RuntimeError, match="the ranks' steps differ"):
        seam.start(joint)
    seam.close()


def test_shared_memory_refuses_rows_that_are_not_there() -> None:
    pool(2).run(wrong_rows)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 10])
def test_shares_are_contiguous_and_equal(rows: int) -> None:
    spans = [share_of(rows, 4, rank) for rank in range(4)]
    assert [spans[0][0], *(b for _, b in spans)] == [*(a for a, _ in spans), rows]
    lengths = [b - a for a, b in spans]
    assert sorted(lengths, reverse=True) == lengths and lengths[0] - lengths[-1] <= 1


def float16(ranks: Ranks) -> tuple[str, str]:
    seam = make_seam(ranks, 8, HIDDEN, torch.float16)
    seam.close()
    return seam.name, seam.why


def test_the_choice_is_the_same_on_every_rank_and_says_why() -> None:
    first, second = pool(2).run(float16)
    assert first == second and first[0] == "collective" and "float16" in first[1]
