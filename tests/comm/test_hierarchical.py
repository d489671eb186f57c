"""The hierarchical seam: two pretended hosts of two ranks each, and two real network namespaces."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.comm import test_seams
from tests.comm.second import second_ranks, store_port
from tests.comm.test_death import NOTICED_S, die
from tests.ranks import RankPool, pool
from weaveinf.comm import ranks as ranks_module
from weaveinf.comm import segment
from weaveinf.comm.choose import make_seam
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.errors import RankDied
from weaveinf.comm.hierarchical import HierarchicalSeam, _sum
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.ops.norm import add_rms_norm_reference

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ((0, 1), (2, 3))
INTERLEAVED = ((0, 2), (1, 3))


@contextmanager
def pretend(ranks: Ranks, hosts: tuple[tuple[int, ...], ...] = HOSTS) -> Iterator[None]:
    before, ranks.hosts = ranks.hosts, hosts
    try:
        yield
    finally:
        ranks.hosts = before


def with_hosts(
    ranks: Ranks, work: Callable[..., object], dtype: torch.dtype, hosts: tuple[tuple[int, ...], ...] = HOSTS
) -> object:
    """What `work` of test_seams returns for the seam that these hosts get."""

    def by_hosts(parts: Sequence[Tensor], *args: Any) -> Tensor:
        """Each host's sum is rounded; then as everywhere."""
        sums = [torch.stack([parts[r].float() for r in host]).sum(0).to(dtype) for host in hosts]
        return add_rms_norm_reference(sums, *args)

    with pretend(ranks, hosts), mock.patch.object(test_seams, "add_rms_norm_reference", by_hosts):
        return work(ranks, "hierarchical", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes(dtype: torch.dtype) -> None:
    digests = pool(4).run(with_hosts, test_seams.passes, dtype)
    assert all(one == digests[0] for one in digests)


@pytest.mark.parametrize("work", [test_seams.edits, test_seams.halves])
def test_edits_and_halves(work: Callable[..., None]) -> None:
    pool(4).run(with_hosts, work, torch.bfloat16)


@pytest.mark.parametrize("hosts", [HOSTS, INTERLEAVED, ((3, 1), (0, 2))])
def test_no_other_meetings(hosts: tuple[tuple[int, ...], ...]) -> None:
    digests = pool(4).run(with_hosts, test_seams.unguarded, torch.bfloat16, hosts)
    assert all(one == digests[0] for one in digests)


def test_a_sum_over_three_ranks_is_rounded_once() -> None:
    parts = torch.randn(3, 50, 40).bfloat16()
    expected = parts.float().sum(0).bfloat16()
    _sum(parts, parts[1])
    assert torch.equal(parts[1], expected)


def chosen(ranks: Ranks, hosts: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> tuple[str, str]:
    with pretend(ranks, hosts):
        seam = make_seam(ranks, 8, 64, dtype)
    seam.close()
    return seam.name, seam.why


@pytest.mark.parametrize(
    ("hosts", "dtype", "name", "why"),
    [
        (HOSTS, torch.bfloat16, "hierarchical", "2 hosts with 2 CPU ranks each"),
        (HOSTS, torch.float16, "collective", "rank 0: no shared-memory kernel for torch.float16"),
        (((0, 1, 2), (3,)), torch.float32, "collective", "rank 0: some hosts have 1 ranks and others 3"),
        (((0,), (1,), (2,), (3,)), torch.float32, "collective", "rank 0: 4 hosts with one rank each"),
    ],
)
def test_the_choice(hosts: tuple[tuple[int, ...], ...], dtype: torch.dtype, name: str, why: str) -> None:
    assert pool(4).run(chosen, hosts, dtype) == [(name, why)] * 4


def one_host_is_full(ranks: Ranks) -> tuple[str, str]:
    full = OSError(errno.ENOSPC, "/dev/shm is too small")
    with mock.patch.object(segment, "Segment", side_effect=full) if ranks.rank == 2 else nullcontext():
        return chosen(ranks, HOSTS, torch.float32)


def test_a_segment_that_one_host_cannot_make() -> None:
    (name, why), *others = pool(4).run(one_host_is_full)
    assert name == "collective" and "/dev/shm is too small" in why
    assert others == [(name, why)] * 3


def steps(ranks: Ranks, rows: int) -> Callable[[], object]:
    ranks.hosts = HOSTS  # for good: the pool ends with the test
    seam = make_seam(ranks, rows, 32, torch.bfloat16)
    assert seam.name == "hierarchical"
    joint = Joint(torch.ones(32, dtype=torch.bfloat16), 1e-5)
    seam.open(rows)
    seam.partial().zero_()

    def step() -> None:
        seam.start(joint)
        seam.finish()

    return step


@pytest.mark.parametrize("rows", [8, 2000])
def test_a_killed_rank_is_noticed(rows: int, tmp_path: Path) -> None:
    mine = RankPool(4)
    try:
        with pytest.raises(RuntimeError, match="ended with code -9"):
            mine.run(die, None, partial(steps, rows=rows), 3, str(tmp_path), deadline_s=60.0)
    finally:
        mine.stop()
    killed = float((tmp_path / "killed").read_text())
    for rank, who in ((0, "23"), (1, "23"), (2, "3")):  # from afar, who broke the connection is named
        seen, named, _ = (tmp_path / f"seen {rank}").read_text().split()
        assert float(seen) - killed < NOTICED_S
        assert named in who


def silent(ranks: Ranks, port: int) -> str:
    with second_ranks(ranks, port, library=True) as group:
        with pretend(group):
            seam = HierarchicalSeam(group, 8, 32, torch.float32)
        seam._meeting.deadline_ns = 300_000_000
        group.votes.sum(torch.ones(1))
        if ranks.rank == 3:
            time.sleep(1.0)
        seam.open(8)
        began = time.monotonic()
        seam.start(Joint(torch.ones(32), 1e-5))
        with pytest.raises((RankDied, TimeoutError)) as caught:
            seam.finish()
        assert time.monotonic() - began < NOTICED_S
        seam.close()
        return str(caught.value)


def test_a_silent_rank_is_not_waited_for_without_end() -> None:
    with store_port() as port:
        words = pool(4).run(silent, port)
    assert words[2] == "rank 3 lives but did not come to a seam in time"


@pytest.mark.parametrize(
    ("own", "heard", "listen"),
    [
        (("10.0.0.2", "10.0.0.1"), ["", "10.0.0.1"], {"hostname": "10.0.0.2"}),
        (("", ""), ["", "10.0.0.1"], {"hostname": "10.0.0.1"}),  # where the others find the store
    ],
)
def test_where_gloo_listens(
    own: tuple[str, str], heard: list[str], listen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    ranks = mock.Mock(agree=lambda words: [*heard, words])
    monkeypatch.setattr(ranks_module, "_route", lambda store: own)
    assert ranks_module._find_listen(ranks) == listen
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert ranks_module._find_listen(ranks) == {"interface": "eth7"}


ROWS, WIDTH, JOINTS = 512, 1024, 40


def bytes_out(ranks: Ranks, seam: Seam) -> list[float]:
    """Of each host, for one joint."""
    weight = Joint(torch.ones(WIDTH, dtype=torch.bfloat16), 1e-5)

    def joints_and_counter(count: int) -> int:
        seam.open(ROWS)
        for _ in range(count):
            seam.partial().fill_(0.01)
            seam.start(weight)
            seam.finish()
        ranks.votes.sum(torch.zeros(1))
        shown = subprocess.run(
            ["ip", "-s", "-j", "link", "show", "link0"], stdout=subprocess.PIPE, check=True
        )
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])

    before = joints_and_counter(2)
    each = (joints_and_counter(JOINTS) - before) / JOINTS
    host = next(h for h, members in enumerate(ranks.hosts) if ranks.rank in members)
    return ranks.votes.sum(torch.tensor([each / 2 if h == host else 0.0 for h in (0, 1)])).tolist()


def main() -> None:
    """A rank that torchrun started: what leaves the hosts, by the seam that is chosen and the flat one."""
    store, rank, size = next(dist.rendezvous("env://"))
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, size, store, torch.device("cpu"), silence_s=60.0)
    chosen = make_seam(ranks, ROWS, WIDTH, torch.bfloat16)
    flat = CollectiveSeam(ranks, ROWS, WIDTH, torch.bfloat16, "to compare")
    found = {seam.name: bytes_out(ranks, seam) for seam in (chosen, flat)}
    if rank == 0:
        print(json.dumps(found))
    ranks.agree("done")
    ranks.close()


@pytest.mark.slow
def test_bytes_that_leave_a_host() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    links = importlib.import_module("links")
    if reason := links.why_not():
        pytest.skip(reason)
    with links.Hosts(2) as hosts:
        out = links.torchrun(hosts, 2, ["-m", __name__], {"PYTHONPATH": str(ROOT)}, seconds=120)
    found = json.loads(out)
    whole = ROWS * WIDTH * torch.bfloat16.itemsize
    for name, counts in found.items():
        shown = " and ".join(f"{count:,.0f} B ({count / whole:.3f})" for count in counts)
        print(f"{name}: {shown} leave the hosts for a joint")
    assert max(found["hierarchical"]) <= 1.05 * whole
    assert min(found["collective"]) > 1.4 * whole


if __name__ == "__main__":
    main()
