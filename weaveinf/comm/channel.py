"""The control channel: rank 0 tells all others, in order, arrays of int64."""

import ctypes
import queue
import threading
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from torch.distributed import Work

from weaveinf.comm import segment
from weaveinf.comm.errors import RankDied
from weaveinf.comm.segment import SILENT, Group, Segment, check
from weaveinf.comm.waits import Backend, blamed, wait_for
from weaveinf.ops.native import fields

_LOOK_S = 0.2
"""A receiver comes back to Python this often, so that signals are handled."""


_FAREWELL_S = 1.0
"""How long a rank that closes gloo's channel waits for the other end to do so."""


class Channel(Protocol):
    """From rank 0 to all others. Messages arrive whole and in order; several may be under way."""

    def send(self, message: np.ndarray) -> None:
        """Rank 0: sends int64 words, from none to millions. RankDied, or TimeoutError when a living
        receiver takes nothing for the group's `silence_s`."""

    def receive(self) -> np.ndarray:
        """The others: the next message; waits as long as the peers live. RankDied when one does not."""

    def close(self) -> None:
        """Takes part no longer."""


class _State(ctypes.Structure):
    """struct Channel of shm.cpp."""

    _fields_ = [("group", Group), *fields("void_p ring, int64 words, uint64 at")]


class SharedChannel:
    """A ring in a segment; `at`: byte offset of the ring, `lines`: of the counter lines."""

    WORDS = 1 << 19
    BYTES = WORDS * 8

    def __init__(self, seg: Segment, at: int, lines: int, size: int, silence_s: float) -> None:
        self._lib = segment.lib
        self._state = _State(seg.group(lines, size, silence_s), seg.address + at, self.WORDS, 0)
        self._address = ctypes.addressof(self._state)
        self._length = ctypes.c_int64()
        self._length_address = ctypes.addressof(self._length)
        self._segment = seg

    def send(self, message: np.ndarray) -> None:
        """See `Channel.send`."""
        words = np.ascontiguousarray(message, dtype=np.int64).reshape(-1)
        code = self._lib.weaveinf_channel_send(self._address, words.ctypes.data, words.size)
        check(code, "the control channel")

    def receive(self) -> np.ndarray:
        """See `Channel.receive`."""
        patience = int(_LOOK_S * 1e9)
        while True:
            code = self._lib.weaveinf_channel_length(self._address, patience, self._length_address)
            if code // 256 != SILENT:
                break
        check(code, "the control channel")
        message = np.empty(self._length.value, dtype=np.int64)
        code = self._lib.weaveinf_channel_take(self._address, message.ctypes.data, message.size)
        check(code, "the control channel")
        return message

    def look(self) -> None:
        """Raises RankDied when a peer is gone."""
        check(self._lib.weaveinf_look(self._address), "the control channel")

    def close(self) -> None:
        """See `Channel.close`."""
        self._state.group.leave()


class GlooChannel:
    """Point-to-point sends of a gloo group of its own; also the channel of a single rank.

    A timed-out receive breaks gloo's connections, so a thread waits there without a limit, and
    `receive` waits for the thread. It ends with rank 0's farewell or with the connection, and before
    `close` returns, as a rule: inside gloo when the interpreter ends, it would abort the process.
    """

    def __init__(self, group: Backend, rank: int, size: int, silence_s: float) -> None:
        self._group = group
        self._size = size
        self._silence_s = silence_s
        self._arrived: queue.SimpleQueue[np.ndarray | Exception] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        if group is not None and rank != 0:
            self._listener = threading.Thread(
                target=self._listen, args=(group,), name="weaveinf-control", daemon=True
            )
            self._listener.start()

    def _listen(self, group: Backend) -> None:
        try:
            while True:
                length = torch.empty(1, dtype=torch.int64)
                self._hear(group, length)
                if int(length) < 0:
                    return
                body = torch.empty(int(length), dtype=torch.int64)
                if body.numel():
                    self._hear(group, body)
                self._arrived.put(body.numpy())
        except Exception as error:
            self._arrived.put(error)

    @staticmethod
    def _hear(group: Backend, into: torch.Tensor) -> None:
        with blamed(0, "the control channel"):
            group.recv([into], 0, 0).wait()

    @staticmethod
    def _tell(group: Backend, part: torch.Tensor, peer: int) -> Work:
        with blamed(peer, "the control channel"):
            return group.send([part], peer, 0)

    def send(self, message: np.ndarray) -> None:
        """See `Channel.send`."""
        if self._group is None:
            return
        words = torch.from_numpy(np.array(message, dtype=np.int64).reshape(-1))
        length = torch.tensor([words.numel()])
        parts = [length, words] if words.numel() else [length]
        peers = range(1, self._size)
        works = [(peer, self._tell(self._group, part, peer)) for peer in peers for part in parts]
        for peer, work in works:
            wait_for(work, peer, "the control channel", self._silence_s)

    def receive(self) -> np.ndarray:
        """See `Channel.receive`."""
        while True:
            try:
                message = self._arrived.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if isinstance(message, Exception):
                self._arrived.put(message)  # whoever asks again hears the same
                raise message
            return message

    def close(self) -> None:
        """See `Channel.close`."""
        group, self._group = self._group, None
        if self._listener is not None:
            self._listener.join(timeout=_FAREWELL_S)
        elif group is not None:
            farewell = torch.tensor([-1])
            for peer in range(1, self._size):
                with suppress(RankDied, TimeoutError):
                    wait_for(self._tell(group, farewell, peer), peer, "the control channel", _FAREWELL_S)
