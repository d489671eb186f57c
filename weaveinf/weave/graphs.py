"""Decode steps as CUDA graphs: what a step launches, both halves and both streams, is launched at once.

A small step is bound by its launches, which a cut doubles. The batch of a graph lies at fixed addresses and
is padded, so that few graphs serve all steps. Prefill changes the number of rows in the last layer, and where
NCCL sums, the residual then moves by counts that the host must know: it runs as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch

RESIDENT = 24
"""Graphs that are kept at most; the one that was not used for longest goes first."""

_INT32 = [f.name for f in fields(Batch) if f.name not in ("input_ids", "logit_rows")]


def padded(rows: int) -> int:
    """Rows of the graph that serves `rows`: a power of two up to 8, then an eighth of one, or several."""
    bits = (rows - 1).bit_length()
    step = 1 << (bits - 3 if rows > 8 else bits)
    return -(-rows // step) * step


def shape(halves: Sequence[Batch], most: int) -> tuple[tuple[int, ...], int]:
    """Rows of each half of the graph that serves these, of `most` rows at most, and pages of a sequence."""
    first = [half.num_tokens for half in halves[:-1]]
    rows = sum(first) + halves[-1].num_tokens
    blocks = halves[0].block_table.shape[1]
    return (*first, min(padded(rows), most) - sum(first)), 1 << (blocks - 1).bit_length()


def is_decode(halves: Sequence[Batch]) -> bool:
    """Whether every sequence has one row, and every row's logits are wanted."""
    rows = sum(half.num_tokens for half in halves)
    return rows == halves[0].num_seqs == sum(half.logit_rows.shape[0] for half in halves)


class StaticHalves:
    """The halves of a decode step, padded, at fixed addresses; one copy brings them to the device.

    Args:
        rows: of each half; the sequences of each are as many as all rows.
        blocks: columns of the block table.
    """

    def __init__(self, rows: Sequence[int], blocks: int, device: torch.device) -> None:
        seqs = sum(rows)
        shapes: list[tuple[int, ...]] = []
        for count in rows:
            of: dict[str, tuple[int, ...]] = dict.fromkeys(_INT32, (seqs,))
            of |= {
                "cu_seqlens_q": (seqs + 1,),
                "positions": (count,),
                "slot_mapping": (count,),
                "block_table": (seqs, blocks),
            }
            shapes += [of[name] for name in _INT32]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = torch.zeros(sum(sizes), dtype=torch.int32, device=device)

        def cut(flat: Tensor) -> list[dict[str, Tensor]]:
            views = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
            each = len(_INT32)
            return [dict(zip(_INT32, views[i : i + each], strict=True)) for i in range(0, len(views), each)]

        self._fields = cut(self._host)
        self.halves = [
            Batch(
                input_ids=torch.zeros(count, dtype=torch.int64, device=device),
                logit_rows=torch.arange(count, device=device),
                **views,
            )
            for count, views in zip(rows, cut(self._there), strict=True)
        ]

    def fill(self, halves: Sequence[Batch]) -> None:
        """Takes over halves of no more rows, which but for the tokens are on the host."""
        for static, into, half in zip(self.halves, self._fields, halves, strict=True):
            static.input_ids[: half.num_tokens].copy_(half.input_ids)
            for name, field in into.items():
                given = getattr(half, name)
                field.fill_(
                    -1 if name == "slot_mapping" else half.num_tokens if name == "cu_seqlens_q" else 0
                )
                field[tuple(slice(0, n) for n in given.shape)] = given
        self._there.copy_(self._host, non_blocking=True)


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
    """

    def __init__(
        self,
        step: Callable[[Sequence[Batch]], Tensor],
        held: Callable[[], list[Tensor]],
        most: int,
        device: torch.device,
    ) -> None:
        self._step, self._held = step, held
        self._most, self._device = most, device
        self._seen: dict[Any, StaticHalves] = {}
        self._kept: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: Any = None

    def run(self, halves: Sequence[Batch]) -> Tensor:
        """What the step returns for the halves of a decode step (see `is_decode`). Of each shape the first
        step runs as it is, which compiles kernels; the second is captured."""
        total = sum(half.num_tokens for half in halves)
        key = shape(halves, self._most)
        if (kept := self._kept.get(key)) is None:
            if key not in self._seen:
                if len(self._seen) == RESIDENT:
                    self._seen.clear()
                static = self._seen[key] = StaticHalves(*key, self._device)
                static.fill(halves)
                return self._step(static.halves)[:total]
            kept = self._capture(self._seen.pop(key))
            self._kept[key] = kept
            if len(self._kept) > RESIDENT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        kept.static.fill(halves)
        kept.graph.replay()
        return kept.x[:total]

    def _capture(self, static: StaticHalves) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            x = self._step(static.halves)
        return _Graph(graph, static, x, self._held())
