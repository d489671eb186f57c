"""Calls of CPU kernels that are kept and made again by one call, as a CUDA graph does on a GPU.

Between the kernels of a small step a processor runs Python, whose code and data the weights, which stream
past the caches, have just evicted. A tape has none of it: the functions and their packed arguments, in order.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
_READ = torch.ops.aten.resolve_conj.default
"""What `tolist` begins with."""
_here = threading.local()
"""`tape`: what this thread records on, if it does."""


class Kernel:
    """A function of a library that takes a pointer to its packed arguments and returns 0 or a problem.

    layout: of the arguments, for the `struct` module, each of 8 bytes; `pack` makes bytes of them.
    """

    def __init__(self, function: Callable[[bytes], int], layout: str) -> None:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int  # type: ignore[attr-defined]
        self._function = function
        self._address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
        self.pack = struct.Struct(layout).pack

    @property
    def address(self) -> int:
        assert self._address is not None
        return self._address

    def __call__(self, *arguments: float) -> int:
        """Packs the arguments (pointers and integers; floats where the layout has them) and runs."""
        return self.run(self.pack(*arguments))

    def run(self, packed: bytes) -> int:
        """Runs on arguments that are packed, and notes the call where this thread records."""
        tape: Tape | None = getattr(_here, "tape", None)
        if tape is not None:
            tape.calls.append((self.address, packed))
        return self._function(packed)


class Tape:
    """What one thread called while it recorded. Only addresses are kept, never values: who replays it fills
    the same memory anew first. Calls of anything but a `Kernel`, and memory that neither was there before nor
    comes from `torch.empty`, are not seen: what is recorded must have none.

    Attributes:
        calls: address of the function and packed arguments, in order.
        foreign: what else was computed meanwhile, by torch; such a tape must not be replayed. "" for nothing.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.foreign = ""
        self._held: list[Any] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The calls within are made and noted; for `foreign`, in torch's inference mode."""
        _here.tape = self
        try:
            with _Watch(self, self._held):
                yield
        finally:
            _here.tape = None
        self._arguments = ctypes.create_string_buffer(b"".join(packed for _, packed in self.calls))
        words, at = [], ctypes.addressof(self._arguments)
        for function, packed in self.calls:
            words += [function, at]
            at += len(packed)  # fields of 8 bytes: all lie as they should
        self._kept = (ctypes.c_void_p * len(words))(*words)

    def replay(self, kernel: Kernel) -> int:
        """Makes all calls again by `kernel`, weave_replay. The first result that is not 0 ends it."""
        return kernel(ctypes.addressof(self._kept), len(self.calls))


class _Watch(TorchDispatchMode):
    """Sees what torch does: views and memory, which is held, are all that a tape can do without."""

    def __init__(self, tape: Tape, held: list[Any]) -> None:
        super().__init__()
        self._tape, self._held = tape, held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler to skip this, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self._held.append(result)
        elif func is _READ or not (func.is_view and _within(args[0], result)):
            self._tape.foreign = self._tape.foreign or str(func)
        return result


def _within(of: Tensor, result: Tensor | Sequence[Tensor]) -> bool:
    """Whether these are views of `of` (`reshape`, `contiguous` and `to` give views only where they can)."""
    views = [result] if isinstance(result, Tensor) else result
    return all(view.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() for view in views)
