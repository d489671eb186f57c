"""Answers that follow a JSON schema: the engine's end of the processes that match them.

A constrained sequence may be sampled only while it holds a mask. The step that samples it uses the mask up,
and the sampled token asks for the next one. While that is awaited, the other sequences go on. What a process
does, or does no more, ends the sequences that follow its schema and nothing else.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

MAX_SCHEMA = 1 << 16
"""Bytes of a schema."""
MAX_GRAMMARS = 32
"""Schemas known at a time, each by a process."""
MEMORY_MIB = 512
"""What the process of a schema may take beyond what all of them share."""
COMPILE_S = 5
"""Seconds of processor time for a schema."""
STEP_S = 1
"""Seconds of processor time for the mask behind one token."""
ANSWER_S = 60.0
"""Seconds after which a process is given up, whatever it does. The first one has to start."""
WAIT_S = 0.02
"""How long a step waits for masks that are due."""

MASK, END, ERROR = range(3)
"""The second int64 of an answer, after the sequence: more follows, nothing can, or there is a reason. A mask
or the reason's text comes behind."""
_REASON = 1024
"""Bytes that an answer has at most beside a mask."""

Mask = NDArray[np.int64]


def words_of(vocab_size: int) -> int:
    """int64 words of a mask."""
    return -(-vocab_size // 64)


class Busy(ValueError):
    """As many schemas as there may be are followed just now."""


class Grammar:
    """A compiled schema, and the process that follows its answers, which ends with it.

    Used by the engine's thread alone, and by any engine of the same model.

    Attributes:
        late: answers are due that were waited for in vain.
        dead: its process is gone.
    """

    def __init__(self, process: socket.socket, first: bytes, eos_token_ids: list[int]) -> None:
        self.late = self.dead = False
        self._process = process
        self._first: Mask = np.frombuffer(first, np.int64)
        self._eos = eos_token_ids
        self._sequences = count()
        self._unsent: list[int] = []
        self._asked: dict[int, Constraint] = {}
        self._since = 0.0

    def __del__(self) -> None:
        self._process.close()

    def begin(self, ignore_eos: bool) -> Constraint:
        """What holds a new sequence to it. With `ignore_eos` that ends only where nothing else can follow."""
        kept = np.ones(64 * len(self._first), np.bool_)
        kept[self._eos if ignore_eos else []] = False
        return Constraint(
            self, next(self._sequences), self._first, np.packbits(kept, bitorder="little").view(np.int64)
        )

    def ask(self, constraint: Constraint, token: int) -> None:
        """Asks for the mask behind this token of the sequence; `read` brings it."""
        if not self._asked:
            self._since = time.monotonic()
        self._asked[constraint.sequence] = constraint
        self._unsent += (constraint.sequence, token)

    def drop(self, constraint: Constraint) -> None:
        """Its sequence is over."""
        self._asked.pop(constraint.sequence, None)
        self._unsent += (constraint.sequence, -1)
        self._send()

    def read(self, seconds: float) -> None:
        """Hands out the answers that have come, after waiting so long for all that are due."""
        self._send()
        deadline = time.monotonic() + seconds
        while self._asked and (answer := self._receive(deadline - time.monotonic())):
            self._since = time.monotonic()
            sequence, status = np.frombuffer(answer[:16], np.int64).tolist()
            if (constraint := self._asked.pop(sequence, None)) is not None:
                constraint.take(status, answer[16:])
        self.late = bool(self._asked)
        if self.late and (self.dead or time.monotonic() - self._since > ANSWER_S):
            self.dead = True
            self._process.close()
            for constraint in self._asked.values():
                constraint.take(ERROR, f"a token took over {STEP_S} s, or crashed xgrammar".encode())
            self._asked = {}

    def _send(self) -> None:
        try:
            self._process.settimeout(0)
            if self._unsent:
                self._process.send(np.array(self._unsent, np.int64).tobytes())
            self._unsent = []
        except BlockingIOError:
            pass  # it is busy: next time
        except OSError:
            self.dead = True

    def _receive(self, seconds: float) -> bytes:
        """The next answer; empty when none comes in that time."""
        try:
            self._process.settimeout(max(0.0, seconds))
            answer = self._process.recv(_REASON + 8 * len(self._first))
        except (TimeoutError, BlockingIOError):
            return b""
        except OSError:
            answer = b""
        self.dead = not answer
        return answer


class Constraint:
    """Holds one sequence to a grammar.

    Attributes:
        mask: int64 [words], a bit for each token id that may come next; None while that is not known.
        end: (finish reason, stop reason) once the grammar has ended the sequence.
    """

    def __init__(self, grammar: Grammar, sequence: int, first: Mask, kept: Mask) -> None:
        self.grammar = grammar
        self.sequence = sequence
        self.mask: Mask | None = first & kept
        self.end: tuple[str, str | None] | None = None
        self._kept = kept

    def take(self, status: int, payload: bytes) -> None:
        """The answer to the last token."""
        if status == MASK:
            self.mask = np.frombuffer(payload, np.int64) & self._kept
        elif status == END:
            self.end = ("stop", None)
        else:
            self.end = ("abort", f"json_schema: {payload.decode(errors='replace')}")


class Grammars:
    """Compiles schemas for one model, and keeps those used last. For any thread."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._words = words_of(vocab_size)
        self._eos = [token for token in eos_token_ids if token < vocab_size]
        self._about = [str(path.resolve()), str(vocab_size), *map(str, self._eos)]
        self._alive = WeakValueDictionary[str, Grammar]()
        self._kept: dict[str, Grammar] = {}  # though nobody follows them; used last comes last
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def compile(self, schema: str) -> Grammar:
        """The grammar of a JSON schema. One at a time is compiled, with COMPILE_S of processor time.

        Raises:
            ValueError: naming json_schema, and why there is no grammar; Busy where there may be one later.
        """
        if find_spec("xgrammar") is None:
            raise ValueError("json_schema needs xgrammar: pip install weaveinf[structured]")
        text = schema.encode(errors="surrogatepass")
        if not 0 < len(text) <= MAX_SCHEMA:
            raise ValueError(f"json_schema: it has {len(text)} bytes, 1 to {MAX_SCHEMA} are allowed")
        with self._compiling:
            return self.find(schema) or self._compile(schema, text)

    def find(self, schema: str) -> Grammar | None:
        """The grammar of a schema that was compiled lately. Never waits."""
        with self._lock:
            self._kept.pop(schema, None)
            if (grammar := self._alive.get(schema)) is None or grammar.dead:
                return None
            self._kept[schema] = grammar
            return grammar

    def close(self) -> None:
        """Ends all processes; may be called again."""
        with self._lock:
            self._kept = {}
        if self._parent is not None and self._control is not None:
            self._control.close()
            self._parent.kill()
            self._parent.wait()

    def _compile(self, schema: str, text: bytes) -> Grammar:
        with self._lock:
            for known in [*self._kept]:
                if len(self._alive) < MAX_GRAMMARS:
                    break
                del self._kept[known]  # which ends it, unless it is followed
                if (followed := self._alive.get(known)) is not None:
                    self._kept[known] = followed
            if len(self._alive) >= MAX_GRAMMARS:
                raise Busy(f"json_schema: {MAX_GRAMMARS} others are in use; try again later")
        process, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process.settimeout(ANSWER_S)
        try:
            with theirs:
                socket.send_fds(self._running(), [b" "], [theirs.fileno()])
            process.send(text)
            answer = process.recv(_REASON + 8 * self._words)
        except OSError:
            answer = b""
        if answer[8:9] != bytes([MASK]):
            process.close()
            reason = answer[16:].decode(errors="replace") if answer[8:9] == bytes([ERROR]) else ""
            reason = reason or f"compiling took over {COMPILE_S} s, or crashed xgrammar; simplify it"
            raise ValueError(f"json_schema: {reason}")
        grammar = Grammar(process, answer[16:], self._eos)
        with self._lock:
            self._alive[schema] = self._kept[schema] = grammar
        return grammar

    def _running(self) -> socket.socket:
        """The line to the process that forks the others; it is started where it does not run."""
        if self._control is None or self._parent is None or self._parent.poll() is not None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._parent = subprocess.Popen(
                    [sys.executable, "-P", "-m", "weaveinf.engine.matching", *self._about],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    process_group=0,  # out of reach of the terminal's Ctrl-C
                )
        return self._control
