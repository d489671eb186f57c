"""Who shares a host, two groups side by side, and segments that leave nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch

from tests.comm.second import second_ranks, store_port
from tests.ranks import pool
from weaveinf.comm import segment
from weaveinf.comm.choose import make_seam
from weaveinf.comm.ranks import Ranks, _partition
from weaveinf.comm.seam import Joint
from weaveinf.comm.segment import PAGE, Segment
from weaveinf.ops import large


def hosts(ranks: Ranks) -> tuple[tuple[int, ...], ...]:
    return ranks.hosts


def test_ranks_of_one_machine_share_a_host() -> None:
    assert pool(4).run(hosts) == [((0, 1, 2, 3),)] * 4


def test_a_rank_elsewhere_or_that_cannot_map_is_a_host_of_its_own() -> None:
    # Ranks 1 and 3 are in another network namespace; rank 2 could not read what rank 0 wrote.
    places = ["a", "b", "a", "b", "a"]
    answers = ["x", "y", "", "y", "x"]
    assert _partition(places, answers) == ((0, 4), (1, 3), (2,))


def side_by_side(ranks: Ranks, port: int) -> list[str]:
    """A second group's seams and votes between those of the first."""
    with second_ranks(ranks, port, library=True) as second:
        groups = [ranks, second]
        seams = [make_seam(group, 40, 64, torch.float32) for group in groups]
        joint = Joint(torch.ones(64), 0.0)
        for seam in seams:
            seam.open(40)
        for turn in range(20):
            for factor, (group, seam) in enumerate(zip(groups, seams, strict=True), start=1):
                seam.partial().fill_(factor)
                seam.start(joint)
                total = group.votes.sum(torch.tensor([float(factor)]))
                assert total.item() == factor * ranks.size
                assert torch.allclose(seam.finish(), torch.ones(40, 64))
                rows = seam.gather(torch.tensor([39]))
                assert torch.all(rows == factor * ranks.size * (turn + 1))
        for seam in seams:
            seam.close()
        return [seam.name for seam in seams]


def test_two_groups_side_by_side() -> None:
    with store_port() as port:
        assert pool(2).run(side_by_side, port) == [["shared memory"] * 2] * 2


def without_library(ranks: Ranks, port: int) -> tuple[str, str]:
    with second_ranks(ranks, port) as group:
        seam = make_seam(group, 8, 64, torch.float32)
        seam.close()
        return seam.name, seam.why


def test_without_the_library_everything_goes_through_gloo() -> None:
    with store_port() as port:
        answers = pool(2).run(without_library, port)
    assert answers == [("collective", "rank 0: no library")] * 2


@pytest.fixture
def made() -> Iterator[Segment]:
    one = Segment(4096, 0)
    yield one
    one.unlink()
    one.close()


def test_a_segment_has_a_name_nobody_guesses_and_only_while_needed(made: Segment) -> None:
    assert re.fullmatch(r"weaveinf-[0-9a-f]{16}", made.name)
    path = segment.SHM / made.name
    assert path.stat().st_mode & 0o777 == 0o600
    made.unlink()
    assert not path.exists()
    made.tensor(0, (4096,), torch.uint8).fill_(1)  # the memory stays


def test_large_pages_keep_what_was_written_where_it_was() -> None:
    size = 3 * large.PAGE + PAGE
    one = Segment(size, 0)
    try:
        assert one.address % large.PAGE == 0
        bytes_ = one.tensor(PAGE, (size - PAGE,), torch.uint8)
        written = torch.randint(0, 256, bytes_.shape, dtype=torch.uint8)
        bytes_.copy_(written)
        one.enlarge(PAGE, size - PAGE)
        assert torch.equal(bytes_, written)
        assert os.pread(one.fd, size - PAGE, PAGE) == written.numpy().tobytes()
    finally:
        one.unlink()
        one.close()


def test_a_full_shm_says_how_much_is_needed() -> None:
    free = os.statvfs(segment.SHM)
    before = set(os.listdir(segment.SHM))
    size = free.f_blocks * free.f_frsize * 64
    with pytest.raises(OSError, match=r"/dev/shm is too small: .* MiB needed, .* MiB free"):
        Segment(size, 0)
    assert not {n for n in set(os.listdir(segment.SHM)) - before if os.stat(segment.SHM / n).st_size == size}
