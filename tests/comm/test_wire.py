"""Streams between ranks: what arrives, who may connect, and a peer that is late or gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.comm.second import second_ranks, store_port
from tests.ranks import pool
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.errors import RankDied
from weaveinf.comm.progress import Transfers, Waits
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint
from weaveinf.comm.wire import Connection, announce, connect
from weaveinf.ops import native

SIZES = (1, 0, 3_000_000, 17, 65_536, 0, 1_000_003, 2)


def numbers(source: int, target: int, turn: int) -> Tensor:
    """What one rank sends another; all ranks can tell."""
    random = torch.Generator().manual_seed(10_000 * source + 100 * target + turn)
    return torch.randint(256, (SIZES[turn % len(SIZES)],), dtype=torch.uint8, generator=random)


def exchange(ranks: Ranks) -> None:
    """Two wires, each with all its transfers of all turns under way at once."""
    peers = [r for r in range(ranks.size) if r != ranks.rank]
    wires = [ranks.wire() for _ in range(2)]
    jobs, checks = [], []
    for first, wire in enumerate(wires):
        turns = range(first, first + len(SIZES))
        into = {(r, t): torch.full_like(numbers(r, ranks.rank, t), 99) for t in turns for r in peers}

        def work(wire: dict[int, Connection] = wire, turns: range = turns, into: dict = into) -> Waits:
            """Needs the first to come before it sends the last."""
            under_way: list[Transfers] = []
            for t in turns[:-1]:
                sent = [wire[r].send(numbers(ranks.rank, r, t)) for r in peers]
                under_way.append(sent + [wire[r].receive(into[r, t]) for r in peers])
            yield under_way[0]
            sent = [wire[r].send(numbers(ranks.rank, r, turns[-1])) for r in peers]
            under_way.append(sent + [wire[r].receive(into[r, turns[-1]]) for r in peers])
            return [transfer for some in under_way for transfer in some]

        if ranks.rank:
            time.sleep(0.02)
        jobs.append(ranks.progress.submit(work))
        checks.append(into)
    for job, into in zip(jobs, checks, strict=True):
        job.wait()
        for (r, t), got in into.items():
            assert torch.equal(got, numbers(r, ranks.rank, t))
    for wire in wires:
        ranks.progress.remove(list(wire.values()))
        for connection in wire.values():
            connection.close()


@pytest.mark.parametrize("size", [2, 4])
def test_all_that_is_sent_arrives_in_order(size: int) -> None:
    pool(size).run(exchange)


def congestion(link: socket.socket) -> bytes:
    """Which congestion control it has."""
    return link.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.mark.skipif(congestion(socket.socket()) != b"bbr", reason="connections are not BBR's here anyway")
def test_both_ends_of_a_connection_are_not_bbr_s() -> None:
    listener, mine = announce({"interface": "lo"})
    other, theirs = announce({"interface": "lo"})
    ends: dict[int, dict[int, Connection]] = {}

    def rank(number: int, listens: socket.socket) -> None:
        ends[number] = connect(number, 2, [mine, theirs], listens, 10.0)

    threads = [threading.Thread(target=rank, args=args) for args in ((0, listener), (1, other))]
    with listener, other:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [congestion(ends[rank][1 - rank]._link) for rank in (0, 1)] == [b"reno"] * 2
    for end in ends.values():
        for connection in end.values():
            connection.close()


def test_strangers_are_turned_away() -> None:
    listener, mine = announce({"interface": "lo"})
    other, theirs = announce({"hostname": "localhost"})
    addresses = [mine, theirs]
    host, port, _ = mine.split()
    with listener, other:
        for words in (b"", b"GET / HTTP/1.1\r\n\r\nxx", b"x" * 16 + (1).to_bytes(4, "little")):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(words)
        found: list[dict[int, Connection]] = [{}, {}]

        def join(rank: int) -> None:
            found[rank] = connect(rank, 2, addresses, (listener, other)[rank], 10.0)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
    there = found[1][0].receive(got := torch.zeros(3, dtype=torch.bfloat16))
    found[0][1].send(torch.arange(3).bfloat16())
    while not there.done:
        found[1][0].move()
    assert got.tolist() == [0, 1, 2]
    found[0][1].close()
    found[1][0].receive(got)
    with pytest.raises(RankDied, match="rank 0 died: its connection broke in a seam"):
        while True:
            found[1][0].move()
    found[1][0].close()


def test_a_peer_that_never_connects() -> None:
    listener, mine = announce({"interface": "lo"})
    with listener, pytest.raises(TimeoutError, match="rank 1 did not connect within 0 s"):
        connect(0, 2, [mine, mine], listener, 0.2)
    with pytest.raises(RankDied, match="rank 0 died: it cannot be reached"):
        connect(1, 2, [mine, mine], listener, 5.0)
    with pytest.raises(OSError, match="no interface 'none'"):
        announce({"interface": "none"})


def late(ranks: Ranks, port: int) -> str:
    with second_ranks(ranks, port) as group:
        group.progress._silence_s = 0.3
        wire = group.wire()
        if ranks.rank:
            ranks.votes.sum(torch.zeros(1))
            return ""

        def work() -> Waits:
            yield [wire[1].receive(torch.zeros(1))]
            return ()

        jobs = [group.progress.submit(work) for _ in range(2)]
        with pytest.raises(TimeoutError) as caught:
            jobs[0].wait()
        with pytest.raises(TimeoutError):  # nothing runs any more
            jobs[1].wait()
        ranks.votes.sum(torch.zeros(1))
        return str(caught.value)


def late_at_a_sum(ranks: Ranks, port: int) -> str:
    with second_ranks(ranks, port, library=True) as group:
        group.progress._silence_s = 0.3
        seams = [CollectiveSeam(group, 4, 8, torch.float32, "the test wants it") for _ in range(2)]
        if ranks.rank:
            ranks.votes.sum(torch.zeros(1))
            return ""
        for seam in seams:
            assert seam._native == (native.lib is not None)
            seam.open(4)
            seam.partial().zero_()
            seam.start(Joint(torch.ones(8), 1e-5))
        with pytest.raises(TimeoutError) as caught:
            seams[0].finish()
        with pytest.raises(TimeoutError):  # nothing runs any more
            seams[1].finish()
        with pytest.raises(TimeoutError):
            group.progress.submit(lambda: iter(())).wait()  # type: ignore[arg-type, return-value]
        ranks.votes.sum(torch.zeros(1))
        return str(caught.value)


def gone_at_a_sum(ranks: Ranks, port: int) -> str:
    """Rank 1 leaves while rank 0 waits for it, and nobody ever waits for the second seam."""
    with second_ranks(ranks, port, library=True) as group:
        seams = [CollectiveSeam(group, 4, 8, torch.float32, "the test wants it") for _ in range(2)]
        if ranks.rank:
            time.sleep(0.2)
            return ""
        for seam in seams:
            seam.open(4)
            seam.start(Joint(torch.ones(8), 1e-5))
        for seam in seams[:1] * 2:
            with pytest.raises(RankDied) as caught:
                seam.finish()
        return str(caught.value)


def test_a_peer_that_leaves() -> None:
    with store_port() as port:
        words = pool(2).run(gone_at_a_sum, port)[0]
    assert words.startswith("rank 1 died: its connection broke in a seam")


def closed_under_way(ranks: Ranks, port: int) -> None:
    """Whoever closes while a sum is under way is told so, and nothing is left behind."""
    with second_ranks(ranks, port, library=True) as group:
        seam = CollectiveSeam(group, 4, 8, torch.float32, "the test wants it")
        if ranks.rank == 0:
            seam.open(4)
            seam.start(Joint(torch.ones(8), 1e-5))
            job = seam._job
            seam.close()
            group.close()
            assert job is not None
            with pytest.raises(RuntimeError, match="the ranks are closed"):
                job.wait()
        ranks.votes.sum(torch.zeros(1))
    assert (
        not any(thread.name == "weaveinf-seams" for thread in threading.enumerate()) or ranks.progress._thread
    )


def test_closing_while_a_sum_is_under_way() -> None:
    with store_port() as port:
        pool(2).run(closed_under_way, port)


@pytest.mark.parametrize("wait", [late, late_at_a_sum])
def test_a_silent_peer_is_not_waited_for_without_end(wait: Callable[[Ranks, int], str]) -> None:
    with store_port() as port:
        assert pool(2).run(wait, port)[0] == "rank 1 did not come to a seam in time"
