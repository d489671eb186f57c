"""The ranks of one engine: who they are, which share a host, and how they reach each other."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from weaveinf.comm import segment
from weaveinf.comm.channel import Channel, GlooChannel, SharedChannel
from weaveinf.comm.errors import RankDied
from weaveinf.comm.progress import Progress
from weaveinf.comm.segment import LINE, MAX_RANKS, PAGE, SILENCE_S, Segment
from weaveinf.comm.votes import GlooVotes, SharedVotes, Votes
from weaveinf.comm.waits import Backend
from weaveinf.comm.wire import Connection, announce, connect

_c10d: Any = _distributed_c10d

_IDLE = timedelta(days=365)
"""The control group's time limit: an idle engine sends nothing. Who waits on it looks after the peers
itself, with a deadline of its own where one is due."""


class Ranks:
    """This process among its peers. Made by `join` or `single`.

    rank, size, device; `hosts`: the ranks of each host, ascending; `votes`: sums over ranks; `control`: the
    channel from rank 0 to all others; `seams`: the process group of GPUs' collective seams, issued by
    `progress` alone; `silence_s`: how long a wait bears with a living but silent peer; `words`: two int32
    that kernels see: 1 + the rank whom one of them missed, and whether they shall wait no more.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        store: dist.Store | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.silence_s = silence_s
        self.hosts: tuple[tuple[int, ...], ...] = ((0,),)
        self.progress = Progress(device, silence_s)
        self.seams: Backend = None
        self.segment: Segment | None = None
        self.words = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        # Of a single rank, or until `join` has found better.
        self.votes: Votes = GlooVotes(None, 1, device)
        self.control: Channel = GlooChannel(None, 0, 1, silence_s)
        self._store = store
        self._listen = {"interface": "lo"}
        self._agreements: Counter[str] = Counter()
        self._groups: list[Any] = []
        self._symmetric = ""
        self._gloo: Any = None

    @classmethod
    def single(cls, device: torch.device) -> Ranks:
        """The only rank: no process group, no store."""
        return cls(0, 1, device)

    @classmethod
    def join(
        cls, rank: int, size: int, store: dist.Store, device: torch.device, silence_s: float = SILENCE_S
    ) -> Ranks:
        """Meets the other ranks through `store`; every rank of the group calls it, with equal size.

        RankDied or TimeoutError when a peer does not come within `silence_s` seconds.
        """
        if size == 1:
            return cls.single(device)
        ranks = cls(rank, size, device, dist.PrefixStore("weaveinf/comm", store), silence_s)
        try:
            ranks._connect()
        except BaseException:
            ranks.close()
            raise
        return ranks

    def _connect(self) -> None:
        self.hosts = _find_hosts(self)
        one_host = len(self.hosts) == 1
        if not one_host:
            self._listen = _find_listen(self)
        silence = timedelta(seconds=self.silence_s)
        if self.device.type == "cuda":
            self.seams = self.group("seams", "cuda", silence)
        able = one_host and self.size <= MAX_RANKS and segment.lib is not None
        lines, words = self.size * LINE, SharedVotes.bytes(self.size)
        if all(self.agree("able" if able else "")):
            try:
                size = 2 * lines + words + SharedChannel.BYTES
                self.segment = segment.share(size, self.rank, self.agree)
            except OSError:
                self.segment = None  # on every rank; gloo serves as well
        if self.segment is not None and self.device.type == "cpu":
            self.votes = SharedVotes(self.segment, 2 * lines, 0, self.size, self.silence_s)
        else:
            self.votes = GlooVotes(self.group("votes", self.device.type, silence), self.size, self.device)
        if self.segment is not None:
            self.control = SharedChannel(self.segment, 2 * lines + words, lines, self.size, self.silence_s)
        else:
            gloo = self.group("control", "cpu", _IDLE)
            self.control = GlooChannel(gloo, self.rank, self.size, self.silence_s)
        self.agree("connected")

    def group(self, name: str, device: str, timeout: timedelta) -> Backend:
        """One process group of its own, outside torch.distributed's global state; every rank calls it."""
        assert self._store is not None
        self._agreements[name] += 1  # in the store there may still be the addresses of one before it
        store = dist.PrefixStore(f"{name}/{self._agreements[name]}", self._store)
        group: Backend
        if device == "cuda":
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            options.is_high_priority_stream = True
            group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            # One for all groups: its thread wakes a hundred times a second, on a core that computes.
            self._gloo = self._gloo or gloo.create_device(**self._listen)
            options._devices = [self._gloo]
            group = gloo(store, self.rank, self.size, options)
        self._groups.append(group)
        return group

    def symmetric_group(self) -> str:
        """The name by which torch's symmetric memory finds these ranks; every rank calls it."""
        if not self._symmetric:
            assert self._store is not None
            self._symmetric = self.agree(f"weaveinf-{secrets.token_hex(8)}")[0]
            store = dist.PrefixStore(self._symmetric, self._store)
            self._groups.append(group := dist.ProcessGroup(store, self.rank, self.size))
            _c10d._register_process_group(self._symmetric, group)
        return self._symmetric

    def check(self) -> None:
        """TimeoutError when a kernel missed a rank, which no wait of the host's shows."""
        if missed := int(self.words[0]):
            raise TimeoutError(f"rank {missed - 1} did not come to a seam in time")

    def give_up(self) -> None:
        """No kernel waits for a peer any more."""
        self.words[1] = 1

    def wire(self) -> dict[int, Connection]:
        """A new connection to each peer, which `progress` moves; every rank calls it.

        RankDied or TimeoutError when a peer does not come; OSError when this rank cannot listen.
        """
        listener, words = announce(self._listen)
        with listener:
            found = connect(self.rank, self.size, self.agree(words), listener, self.silence_s)
        self.progress.add(list(found.values()))
        return found

    def agree(self, words: str, among: Sequence[int] | None = None) -> list[str]:
        """The words of all ranks, or of those `among`, in that order: for start-up, through the store.

        Every one of these ranks calls it with the same `among`. TimeoutError when one does not come.
        """
        if self._store is None:
            return [words]
        scope = "agree" if among is None else "agree " + " ".join(map(str, among))
        among = range(self.size) if among is None else among
        self._agreements[scope] += 1
        keys = [f"{scope}/{self._agreements[scope]}/{r}" for r in among]
        self._store.set(keys[among.index(self.rank)], words or "-")
        deadline = time.monotonic() + self.silence_s
        pause = 0.0005
        for rank, key in zip(among, keys, strict=True):
            while not self._heard(key):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"rank {rank} did not come to the start-up of the ranks within {self.silence_s:.0f} s"
                    )
                if isinstance(self.control, SharedChannel):
                    self.control.look()
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        heard = [self._store.get(key).decode() for key in keys]
        return ["" if word == "-" else word for word in heard]

    def _heard(self, key: str) -> bool:
        assert self._store is not None
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise RankDied(None, f"the store that the ranks meet at is gone ({error})") from error

    def close(self) -> None:
        """Leaves the group. A peer that still waits for this rank is told that it is gone."""
        self.progress.close()
        self.control.close()
        self.votes.close()
        if self.segment is not None:
            self.segment.close()
        if self._symmetric:
            _c10d._unregister_process_group(self._symmetric)
            self._symmetric = ""
        self._groups.clear()
        self._gloo = None
        self.seams = None
        self._store = None


def _find_listen(ranks: Ranks) -> dict[str, str]:
    """Where gloo listens: GLOO_SOCKET_IFNAME if set, else the address from which packets to the store go out.

    From the store's own host they go out by the loopback: it is the address where the others find the store.
    (The host's name, gloo's own choice, may stand for an address that no other host reaches.)
    """
    here, there = _route(ranks._store)
    heard = next((words for words in ranks.agree(there) if words), "")
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return {"interface": name.split(",")[0]}
    return {"hostname": here or heard or socket.gethostname()}


def _route(store: dist.Store | None) -> tuple[str, str]:
    """This host's and the store's address, as packets from here to there carry them; "" for none."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        with suppress(OSError):
            family, kind, protocol, _, at = socket.getaddrinfo(store.host, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(at)  # sends nothing
                here, there = str(probe.getsockname()[0]), str(probe.getpeername()[0])
            if not ipaddress.ip_address(here.split("%")[0]).is_loopback:
                return here, there
    return "", ""


def _find_hosts(ranks: Ranks) -> tuple[tuple[int, ...], ...]:
    """Which ranks share a host: same boot, same network namespace, and each can map the other's memory.

    Network namespaces of one machine share its name and /dev/shm, and are not one host.
    """
    places = ranks.agree(_place())
    leader = places.index(places[ranks.rank])
    mine: Segment | None = None
    proof = secrets.token_hex(8)
    try:
        if leader == ranks.rank and places.count(places[ranks.rank]) > 1:
            mine, _ = segment.attempt(PAGE, ranks.rank)
        if mine is not None:
            written = torch.tensor(list(proof.encode()), dtype=torch.uint8)
            mine.tensor(0, (16,), torch.uint8).copy_(written)
        names = ranks.agree(mine.name if mine else "")
        answers = ranks.agree(proof if leader == ranks.rank else _read_proof(names[leader], ranks.rank))
    finally:
        if mine is not None:
            mine.unlink()
            mine.close()
    return _partition(places, answers)


def _partition(places: Sequence[str], answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    hosts: dict[tuple[str, str], list[int]] = {}
    for rank, (place, answer) in enumerate(zip(places, answers, strict=True)):
        hosts.setdefault((place, answer or f"alone {rank}"), []).append(rank)
    return tuple(tuple(host) for host in hosts.values())


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return secrets.token_hex(16)  # nothing is known of this machine: it is alone


def _read_proof(name: str, rank: int) -> str:
    """What the host's first rank wrote into its segment, or "" when it cannot be mapped."""
    theirs, _ = segment.attempt(PAGE, rank, name) if name else (None, "")
    if theirs is None:
        return ""
    value = bytes(theirs.tensor(0, (16,), torch.uint8).tolist()).decode()
    theirs.close()
    return value
