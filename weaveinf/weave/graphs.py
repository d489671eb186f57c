"""Steps as CUDA graphs: what a step launches, both halves and both streams, is launched at once.

A small step is bound by its launches, which a cut doubles. The batch of a graph lies at fixed addresses and
is padded, so that few graphs serve all steps. Where NCCL sums, only decode steps are graphs: the last layer
drops the other rows of a prompt, and the residual then moves by counts that the host must know.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weaveinf.cache.batch import TENSORS, Batch

RESIDENT = 24
"""Graphs that are kept at most; the one that was not used for longest goes first."""

OTHERS = 8
"""Of these, not of decode steps: prompts are of many shapes, and must not displace what every token needs."""

MOST_ROWS = 1024
"""Of a graph that is no decode step. With more rows a GPU takes longer than the host that issues its work."""

Runs = Callable[[Sequence[Batch], tuple[int, int]], Tensor]
"""A step of these halves, with what their seams are given; its normalised rows."""

Holds = Callable[[], list[Tensor]]

_INT32 = [name for name in TENSORS if name != "input_ids"]


def padded(rows: int) -> int:
    """Rows of the graph that serves `rows`: a power of two up to 8, then an eighth of one, or several, up to
    half a tile of a product."""
    bits = (rows - 1).bit_length()
    step = min(1 << (bits - 3 if rows > 8 else bits), 64)
    return -(-rows // step) * step


class Shape(NamedTuple):
    """What a graph is made for: rows of each half; those of them whose logits are wanted; sequences; pages of
    a sequence; what its seams are given (`Plan`)."""

    rows: tuple[int, ...]
    logits: tuple[int, ...]
    seqs: int
    blocks: int
    ctas: tuple[int, int]

    @property
    def decode(self) -> bool:
        """Whether the logits of all rows are wanted."""
        return self.logits == self.rows


def shape(halves: Sequence[Batch], most: int, ctas: tuple[int, int] = (0, 0)) -> Shape:
    """Of the graph that serves these, of `most` rows at most."""
    rows = [half.num_tokens for half in halves]
    rows[-1] = min(padded(sum(rows)), most) - sum(rows[:-1])
    logits = []
    for half, count in zip(halves, rows, strict=True):
        wanted = half.logit_rows.shape[0]
        # All rows, or fewer than all: which, the last layer tells by these counts.
        logits.append(count if wanted == half.num_tokens else min(padded(wanted), count - 1) if wanted else 0)
    seqs, blocks = halves[0].block_table.shape
    seqs = sum(rows) if is_decode(halves) else padded(seqs)
    return Shape(tuple(rows), tuple(logits), seqs, 1 << (blocks - 1).bit_length(), ctas)


def is_decode(halves: Sequence[Batch]) -> bool:
    """Whether every sequence has one row, and every row's logits are wanted."""
    rows = sum(half.num_tokens for half in halves)
    return rows == halves[0].num_seqs == sum(half.logit_rows.shape[0] for half in halves)


class StaticHalves:
    """The halves of a step, padded, at fixed addresses; one copy brings all but the tokens to the device."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape = shape
        shapes: list[tuple[int, ...]] = []
        for count, logits in zip(shape.rows, shape.logits, strict=True):
            of: dict[str, tuple[int, ...]] = dict.fromkeys(_INT32, (shape.seqs,))
            of |= {
                "cu_seqlens_q": (shape.seqs + 1,),
                "positions": (count,),
                "slot_mapping": (count,),
                "block_table": (shape.seqs, shape.blocks),
                "logit_rows": (logits,),
            }
            shapes += [of[name] for name in _INT32]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = torch.zeros(sum(sizes), dtype=torch.int32, device=device)

        def cut(flat: Tensor) -> list[dict[str, Tensor]]:
            views = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
            each = len(_INT32)
            return [dict(zip(_INT32, views[i : i + each], strict=True)) for i in range(0, len(views), each)]

        self._fields, self._copies = cut(self._host), cut(self._there)
        self.halves = [
            Batch(
                input_ids=torch.zeros(count, dtype=torch.int64, device=device),
                **views | {"logit_rows": torch.arange(logits, device=device)},
            )
            for count, logits, views in zip(shape.rows, shape.logits, self._copies, strict=True)
        ]

    def fill(self, halves: Sequence[Batch]) -> None:
        """Takes over halves of no more rows, which but for the tokens are on the host."""
        for static, into, half in zip(self.halves, self._fields, halves, strict=True):
            static.input_ids[: half.num_tokens].copy_(half.input_ids)
            padding = {"slot_mapping": -1, "cu_seqlens_q": half.num_tokens}
            if half.logit_rows.shape[0]:  # a row may be wanted several times
                padding["logit_rows"] = int(half.logit_rows[-1])
            for name, field in into.items():
                given = getattr(half, name)
                field.fill_(padding.get(name, 0))
                field[tuple(slice(0, n) for n in given.shape)] = given
        self._there.copy_(self._host, non_blocking=True)
        for static, there in zip(self.halves, self._copies, strict=True):
            if static.logit_rows.shape[0] < static.num_tokens:  # or it is all rows, for good
                static.logit_rows.copy_(there["logit_rows"])

    def wanted(self, x: Tensor, halves: Sequence[Batch]) -> Tensor:
        """The rows of these halves among those that a step of the static ones returned."""
        counts = [half.logit_rows.shape[0] for half in halves]
        if counts[:-1] == list(self._shape.logits[:-1]):
            return x[: sum(counts)]
        parts = x.split(self._shape.logits)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Graph(NamedTuple):
    graph: Any
    static: StaticHalves
    x: Tensor
    held: list[Tensor]


class Graphs:
    """The graphs of a rank; all ranks run the same steps, so all capture and replay alike.

    Args:
        step: runs halves that are on the device; the normalised rows.
        held: the memory that a step uses beside its halves now, which a graph must keep.
        most: rows of a step.
        only_decode: whether the seams need the host's help where rows are dropped.
    """

    def __init__(self, step: Runs, held: Holds, most: int, only_decode: bool, device: torch.device) -> None:
        self._step, self._held = step, held
        self._most, self._only_decode, self._device = most, only_decode, device
        self._seen: dict[Shape, StaticHalves | None] = {}
        self._kept: OrderedDict[Shape, _Graph] = OrderedDict()
        self._pool: Any = None

    def takes(self, halves: Sequence[Batch]) -> bool:
        """Whether such a step may be a graph."""
        rows = sum(half.num_tokens for half in halves)
        return is_decode(halves) or (rows <= MOST_ROWS and not self._only_decode)

    def planned(self, rows: int) -> int:
        """The rows for which a step of `rows` is to be planned, so that steps of a graph have one plan."""
        return rows if self._only_decode or rows > MOST_ROWS else min(padded(rows), self._most)

    def run(self, halves: Sequence[Batch], ctas: tuple[int, int]) -> Tensor:
        """What the step returns for halves that it `takes`. Of each shape the first step runs as it is, the
        second padded, which compiles kernels; the third is captured."""
        key = shape(halves, self._most, ctas)
        if (kept := self._kept.get(key)) is None:
            if key not in self._seen:
                if len(self._seen) == 2 * RESIDENT:
                    self._seen.clear()
                self._seen[key] = None
                return self._step([half.to(self._device) for half in halves], ctas)
            if (static := self._seen[key]) is None:
                static = self._seen[key] = StaticHalves(key, self._device)
                static.fill(halves)
                return static.wanted(self._step(static.halves, ctas), halves)
            del self._seen[key]
            kept = self._kept[key] = self._capture(static, ctas)
            alike = [other for other in self._kept if other.decode == key.decode]
            if len(alike) > (RESIDENT - OTHERS if key.decode else OTHERS):
                del self._kept[alike[0]]
        self._kept.move_to_end(key)
        kept.static.fill(halves)
        kept.graph.replay()
        return kept.static.wanted(kept.x, halves)

    def _capture(self, static: StaticHalves, ctas: tuple[int, int]) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            x = self._step(static.halves, ctas)
        return _Graph(graph, static, x, self._held())
