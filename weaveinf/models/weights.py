"""Where a model's weights come from: safetensors files, or made up; and a rank's view of them.

A model is built twice by the same code: first on a survey, which reads only names and shapes and so
finds every missing, unexpected or misshapen tensor before a byte is read; then on the real thing.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weaveinf.models.config import read_json
from weaveinf.ops.linear import PackedWeight, pack

Progress = Callable[[int, int], None]
Shape = tuple[int, ...]

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that some exporters saved; every one is derived from the config.
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")


class Piece(NamedTuple):
    """A part of a checkpoint tensor: its name, the whole's shape by the config, and the cut."""

    name: str
    shape: Shape
    cut: tuple[slice, ...] = ()

    @property
    def extent(self) -> Shape:
        """The shape of the part."""
        cuts = self.cut + (slice(None),) * (len(self.shape) - len(self.cut))
        return tuple(len(range(*c.indices(n))) for c, n in zip(cuts, self.shape, strict=True))


def rows(name: str, n: int, k: int, cut: range) -> Piece:
    """Rows `cut` of an `[n, k]` weight: a share of its outputs."""
    return Piece(name, (n, k), (slice(cut.start, cut.stop),))


def columns(name: str, n: int, k: int, cut: range) -> Piece:
    """Columns `cut` of an `[n, k]` weight: a share of its inputs."""
    return Piece(name, (n, k), (slice(None), slice(cut.start, cut.stop)))


class Source(Protocol):
    """Named tensors, of which parts can be read."""

    def find(self, name: str) -> tuple[Shape, str] | None:
        """The tensor's shape and the file it is in; None: there is no such tensor."""

    def names(self) -> Sequence[str]:
        """The names of all tensors."""

    def read(self, piece: Piece, out: Tensor) -> None:
        """Copies a part into `out`, converting its dtype."""


class Checkpoint:
    """A directory with `model.safetensors`, or an index and its shards. Files are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Opens all files and reads their headers.

        Raises:
            ValueError: no safetensors, or a file that is missing, truncated or corrupt, named.
        """
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for file in _shards(path):
            try:
                opened = safe_open(str(file), framework="pt")
                names = list(opened.keys())
            except (OSError, SafetensorError) as error:
                what = f"{file} is missing, truncated or corrupt ({error})"
                raise ValueError(f"{what}: fetch it again") from error
            for name in names:
                if name in self._where:
                    raise ValueError(f"tensor {name} is in both {self._where[name]} and {file}")
                self._where[name] = str(file)
            self._files[str(file)] = opened

    def find(self, name: str) -> tuple[Shape, str] | None:
        file = self._where.get(name)
        if file is None:
            return None
        part = self._files[file].get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise ValueError(
                f"tensor {name} in {file} has dtype {part.get_dtype()}: its weights are quantized; "
                "use the unquantized checkpoint"
            )
        return tuple(part.get_shape()), file

    def names(self) -> Sequence[str]:
        return list(self._where)

    def read(self, piece: Piece, out: Tensor) -> None:
        part = self._files[self._where[piece.name]].get_slice(piece.name)
        # A view of the mapped file: only the pages of the part are touched.
        out.copy_((part[piece.cut] if piece.cut else part[:]).view(piece.extent).reshape(out.shape))


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, by its index if it has one."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{index} has no weight_map")
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is not a file beside it")
            if not (path / file).is_file():
                raise ValueError(f"{path / file} is missing though {index.name} names it: fetch it again")
        return [path / file for file in sorted(set(files.values()))]
    if single.is_file():
        return [single]
    pickled = [file.name for pattern in _PICKLED for file in path.glob(pattern)]
    if pickled:
        raise ValueError(
            f"{path} holds only pickled weights ({pickled[0]}), which are never loaded: "
            "convert to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    raise ValueError(f"{path} holds no model.safetensors and no model.safetensors.index.json")


class Dummy:
    """Random weights for benchmarks: normal with deviation 0.02, norms one.

    An element depends on the tensor's name and its place alone, so that any number of ranks holds
    the same model. To cost no more than a copy, rows are windows into one table of random numbers.
    """

    _PERIOD = 1048573  # a prime: rows start at different offsets whatever their length

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(self._PERIOD, generator=generator).mul_(0.02)
        self._table = torch.cat((table, table))

    def find(self, name: str) -> tuple[Shape, str] | None:
        return None

    def names(self) -> Sequence[str]:
        return ()

    def read(self, piece: Piece, out: Tensor) -> None:
        if piece.name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        *lead, k = piece.shape
        cuts = piece.cut + (slice(None),) * (len(piece.shape) - len(piece.cut))
        grid = torch.arange(prod(lead)).view(lead)[cuts[:-1]] if lead else torch.zeros(1)
        first, stop, _ = cuts[-1].indices(k)
        starts = grid.flatten().long() * k + zlib.crc32(piece.name.encode()) + first
        windows = self._table.unfold(0, stop - first, 1)
        flat = out.view(-1, stop - first)
        for at in range(0, starts.shape[0], 4096):  # bounds what indexing copies
            flat[at : at + 4096] = windows[starts[at : at + 4096] % self._PERIOD]


@dataclass
class Weights:
    """One rank's weights: reads its parts, packs them, and keeps account of names and bytes.

    With `survey` nothing is read: placeholders are returned, and `check()` says what was wrong.
    `total` is the number of bytes that a survey found this rank to hold.
    """

    source: Source
    device: torch.device
    dtype: torch.dtype
    survey: bool = False
    progress: Progress | None = None
    total: int = 0
    done: int = 0
    _used: set[str] = field(default_factory=set)
    _missing: list[str] = field(default_factory=list)
    _skipped: tuple[str, ...] = ()
    # Raw weights on their way into packed ones share this memory: freed one by one, they would leave
    # holes of their sizes in the heap.
    _passage: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def has(self, name: str) -> bool:
        return self.source.find(name) is not None

    def skip(self, prefix: str) -> None:
        """What a name begins with whose tensor nobody wants."""
        self._skipped += (prefix,)

    def tensor(self, *pieces: Piece, dtype: torch.dtype | None = None) -> Tensor:
        """The pieces one below the other, in the model's dtype unless told otherwise."""
        return self._gather(pieces, 0, lambda shape: torch.empty(shape, dtype=dtype or self.dtype))

    def packed(self, *pieces: Piece, pad: int = 0, wide: bool = False) -> PackedWeight:
        """The same and `pad` rows of zeros, packed for `ops.linear` (see `pack`); the raw copy is dropped."""
        raw = self._gather(pieces, pad, self._room)
        return cast(PackedWeight, None) if self.survey else pack(raw, wide)

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        size = prod(shape) * self.dtype.itemsize
        if self._passage.shape[0] < size:
            self._passage = torch.empty(size, dtype=torch.uint8)
        return self._passage[:size].view(self.dtype).view(shape)

    def _gather(self, pieces: Sequence[Piece], pad: int, room: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        for piece in pieces:
            self._look(piece)
        *_, width = extent = pieces[0].extent
        ends = [prod(piece.extent[:-1]) if len(extent) > 1 else piece.extent[0] for piece in pieces]
        shape = (sum(ends) + pad, width) if len(extent) > 1 else (sum(ends) + pad,)
        size = prod(shape) * self.dtype.itemsize
        if self.survey:
            self.total += size
            return torch.empty(0)
        whole = room(shape)
        at = 0
        for piece, count in zip(pieces, ends, strict=True):
            self.source.read(piece, whole[at : at + count])
            at += count
        whole[at:] = 0
        self.done += size
        if self.progress is not None:
            self.progress(self.done, self.total)
        return whole.to(self.device)

    def _look(self, piece: Piece) -> None:
        """Notes a tensor as wanted; refuses one whose shape is not what the config says."""
        if not self.survey or piece.name in self._used:
            return
        self._used.add(piece.name)
        found = self.source.find(piece.name)
        if found is None:
            self._missing.append(piece.name)
        elif found[0] != piece.shape:
            raise ValueError(
                f"tensor {piece.name} in {found[1]} has shape {list(found[0])}, but config.json "
                f"makes it {list(piece.shape)}: config and weights do not belong together"
            )

    def check(self) -> None:
        """Raises ValueError if the checkpoint lacks tensors or has some that nobody wanted."""
        words = []
        if self._missing:
            words.append(f"lacks {_listed(self._missing)}")
        unused = [n for n in self.source.names() if n not in self._used and not n.startswith(self._skipped)]
        extra = [n for n in unused if not _HARMLESS.search(n)]
        if extra:
            words.append(f"has unexpected {_listed(sorted(extra))}")
        if words:
            found = f"the checkpoint {' and '.join(words)}"
            raise ValueError(f"{found}: config and weights do not belong together")


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s'[: len(names) > 1]} {', '.join(names[:most])}{more}"
