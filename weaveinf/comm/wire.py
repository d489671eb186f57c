"""Streams between CPU ranks: what one sends another on a wire comes there in the order of the sends.

Nothing here waits, and nothing says what is sent: both ends name the same transfers in the same order. One
thread (comm/progress.py, csrc/cpu/streams.cpp) moves the bytes of all; the kernel wakes it when a whole
transfer is there, not for each packet, so little of a core is taken from what computes on it.
"""

import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import psutil
import torch
from torch import Tensor

from weaveinf.comm.errors import RankDied

_GREETING = struct.Struct("16sI")  # the listener's secret; who calls
_GREETING_S = 2.0


class Transfer:
    """A contiguous tensor's bytes on their way. done: all of them have been handed over."""

    __slots__ = ("at", "data", "done", "rank")

    def __init__(self, rank: int, t: Tensor) -> None:
        self.rank = rank
        self.data = memoryview(t.view(torch.uint8).numpy().data).cast("B")
        self.at = 0
        self.done = not len(self.data)


class Connection:
    """Both directions between this rank and a peer."""

    def __init__(self, rank: int, link: socket.socket) -> None:
        self.rank = rank
        self._link = link
        self._out: deque[Transfer] = deque()
        self._into: deque[Transfer] = deque()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setblocking(False)

    def fileno(self) -> int:
        return self._link.fileno()

    def send(self, t: Tensor) -> Transfer:
        """What the network takes leaves at once, the rest in `move`."""
        transfer = Transfer(self.rank, t)
        if not transfer.done:
            self._out.append(transfer)
            self._pass_on(self._out, self._link.send)
        return transfer

    def receive(self, t: Tensor) -> Transfer:
        transfer = Transfer(self.rank, t)
        if not transfer.done:
            self._into.append(transfer)
        return transfer

    def wants(self) -> int:
        """Which of poll's events let it get on; none where nothing is under way."""
        if self._into:  # streams.cpp may have set it since
            enough = len(self._into[0].data) - self._into[0].at
            self._link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
        return (select.POLLIN if self._into else 0) | (select.POLLOUT if self._out else 0)

    def move(self) -> None:
        """Sends and receives what can be now. RankDied when the connection is broken."""
        self._pass_on(self._out, self._link.send)
        self._pass_on(self._into, self._link.recv_into)

    def _pass_on(self, queue: deque[Transfer], some: Callable[[memoryview], int]) -> None:
        """Hands over `some` bytes again and again; none come from a closed connection."""
        try:
            while queue:
                head = queue[0]
                count = some(head.data[head.at :])
                if not count:
                    raise broken(self.rank, "it was closed")
                head.at += count
                if head.at == len(head.data):
                    queue.popleft().done = True
        except BlockingIOError:
            pass
        except OSError as error:
            raise broken(self.rank, error.strerror or str(error)) from error

    def end(self) -> None:
        """Lets nobody wait for it, here or there; its number stays its own until `close`."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._link.close()


def broken(rank: int, words: str) -> RankDied:
    """The error of a connection that ended."""
    return RankDied(rank, f"its connection broke in a seam ({words})")


def late(rank: int) -> TimeoutError:
    """The error of a peer that sends nothing."""
    return TimeoutError(f"rank {rank} did not come to a seam in time")


def connect(
    rank: int, size: int, addresses: list[str], listener: socket.socket, seconds: float
) -> dict[int, Connection]:
    """A connection to each peer: from each rank to all below it.

    addresses: what `announce` returned on each rank. TimeoutError when a peer does not come; RankDied where
    nobody listens any more.
    """
    deadline = time.monotonic() + seconds
    found: dict[int, Connection] = {}
    for peer in range(rank):
        host, port, secret = addresses[peer].split()
        link = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            _never_pace(link)
            link.settimeout(max(0.1, deadline - time.monotonic()))
            link.connect((host, int(port)))
            link.sendall(_GREETING.pack(bytes.fromhex(secret), rank))
        except OSError as error:
            link.close()
            if isinstance(error, TimeoutError):
                words = f"rank {peer} did not answer at {host}:{port} within {seconds:.0f} s"
                raise TimeoutError(words) from None
            raise RankDied(peer, f"it cannot be reached at {host}:{port} ({error.strerror})") from error
        found[peer] = Connection(peer, link)
    own = bytes.fromhex(addresses[rank].split()[2])
    while len(found) < size - 1:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            link, _ = listener.accept()
        except TimeoutError:
            missing = next(r for r in range(size) if r != rank and r not in found)
            raise TimeoutError(f"rank {missing} did not connect within {seconds:.0f} s") from None
        said, peer = _greeted(link)
        if secrets.compare_digest(said, own) and rank < peer < size and peer not in found:
            found[peer] = Connection(peer, link)
        else:
            link.close()
    return found


def _greeted(link: socket.socket) -> tuple[bytes, int]:
    """What a caller says of itself; a stranger may say anything, or nothing."""
    link.settimeout(_GREETING_S)
    try:
        said, peer = _GREETING.unpack(link.recv(_GREETING.size, socket.MSG_WAITALL))
    except (OSError, struct.error):
        return b"", -1
    return said, peer


def announce(listen: dict[str, str]) -> tuple[socket.socket, str]:
    """Listens at an interface or a host's name; the words that let a peer connect. OSError if it cannot."""
    host = listen.get("hostname") or _address(listen["interface"])
    family, _, _, _, at = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(at[:2], family=family)
    _never_pace(listener)  # nor will what it accepts
    return listener, f"{at[0]} {listener.getsockname()[1]} {secrets.token_hex(16)}"


def _never_pace(link: socket.socket) -> None:
    """BBR gives way in a connection that is yet to come (once there, its pacing stays): it paces by what it
    saw delivered, and a seam's rows, which come in bursts, lay for 10 to 90 ms before an idle link."""
    if link.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
        with suppress(OSError):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _address(interface: str) -> str:
    """The interface's address; IPv4 where it has both."""
    known = psutil.net_if_addrs().get(interface, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for one in known:
            if one.family == family:
                return one.address
    raise OSError(f"no interface {interface!r} with an address here; see GLOO_SOCKET_IFNAME")
