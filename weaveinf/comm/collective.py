"""The seam of ranks on any hosts: streams (comm/wire.py) between CPUs, NCCL between GPUs.

Every rank sends each other rank that one's share of the rows, sums what it got in float32 in rank order,
adds, normalises, and sends its rows of x to all. That moves the bytes of a reduce-scatter and an all-gather
with the arithmetic of every other seam, which a library's reduction (in the model's dtype) would not keep.
The sums go in chunks, so that one chunk's norm and way back lie under the next one's way here. Few rows
are latency: each rank sends all of them to all, and computes all of them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weaveinf.comm import segment
from weaveinf.comm.progress import Job, Sum, Transfers, Waits
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam, share_of
from weaveinf.comm.waits import wait_for
from weaveinf.comm.wire import Connection, Transfer
from weaveinf.ops import native
from weaveinf.ops.norm import add_rms_norm, sum_norm

_CHUNK_BYTES = 256 * 1024
_FEW_BYTES = 64 * 1024
"""What a rank may send in all for its rows to count as few."""

_KEPT = 32  # row counts whose plans are remembered


class _Chunk(NamedTuple):
    """Views of the seam's memory for a chunk of every rank's share; lists by rank, empty for what stays.

    own: its rows in this rank's residual. partials go to the ranks whose shares they are; inbox comes from
    them; sums: what is added up, in rank order; x: the result, which goes out as `mine`; others: theirs.
    """

    own: slice
    partials: list[Tensor]
    inbox: list[Tensor]
    sums: list[Tensor]
    x: Tensor
    mine: list[Tensor]
    others: list[Tensor]


class CollectiveSeam(Seam):
    """See `Seam`; for up to `max_rows` rows of `hidden` elements of `dtype`."""

    name = "collective"

    def __init__(self, ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype, why: str) -> None:
        self.why = why
        self._ranks = ranks
        self._nccl = ranks.device.type == "cuda"
        self._peers: dict[int, Connection] = {} if self._nccl else ranks.wire()
        size, row_bytes = ranks.size, hidden * dtype.itemsize
        self._few = min(max_rows, _FEW_BYTES // (row_bytes * (size - 1)))
        self._chunk = max_rows if self._nccl else max(1, _CHUNK_BYTES // row_bytes)
        most = max(-(-max_rows // size), self._few)

        def rows(count: int) -> Tensor:
            return torch.empty(count, hidden, dtype=dtype, device=ranks.device)

        self._partial, self._x = rows(max_rows), rows(max_rows)
        self._residual, self._spare = rows(most), rows(most)
        self._inbox = rows(size * most).view(size, most, hidden)
        self._memory = self._partial, self._x, self._residual, self._spare, self._inbox
        self._rows = 0
        self._plans: dict[tuple[int, int], tuple[Any, list[Any]]] = {}
        self._native = bool(self._peers and segment.lib and native.lib and dtype in native.DTYPES)
        self._job: Job | Sum | None = None

    def open(self, rows: int) -> None:
        """See `Seam.open`."""
        if rows > self._x.shape[0]:
            raise ValueError(f"{rows} rows in a seam made for {self._x.shape[0]}")
        self._rows = rows
        self._residual[: self._count(rows)].zero_()

    def partial(self) -> Tensor:
        """See `Seam.partial`."""
        return self._partial[: self._rows]

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`. The progress thread runs it."""
        if joint.weight.dtype != self._x.dtype:
            raise ValueError(f"a norm in {joint.weight.dtype} behind sums in {self._x.dtype}")
        before = self._rows
        if kept is not None:
            self._rows = len(kept)
        after = self._rows
        if kept is None and after and self._native:
            plan, held = self._plan(after)
            self._job = self._ranks.progress.sum(ctypes.addressof(plan), joint, (plan, held, self._memory))
        else:
            self._job = self._ranks.progress.submit(lambda: self._run(joint, kept, before, after))

    def finish(self) -> Tensor:
        """See `Seam.finish`."""
        if self._job is not None:
            self._job.wait()
            self.ran = self._job.ran
        return self._x[: self._rows]

    def _shares(self, rows: int) -> list[tuple[int, int]]:
        """The rows whose residual each rank holds: all of few, a share of many."""
        size = self._ranks.size
        if rows <= self._few:
            return [(0, rows)] * size
        return [share_of(rows, size, rank) for rank in range(size)]

    def _count(self, rows: int) -> int:
        first, last = self._shares(rows)[self._ranks.rank]
        return last - first

    def _exchange(self, out: Sequence[Tensor], into: Sequence[Tensor]) -> list[Transfer]:
        """Sends out[r] to rank r and receives into[r] from it; empty ones (the own, too) do not travel."""
        if self._nccl:
            wait_for(self._ranks.seams.alltoall(list(into), list(out)), None, "a seam")
            return []
        return self._receive(into) + [self._peers[r].send(t) for r, t in enumerate(out) if t.numel()]

    def _receive(self, into: Sequence[Tensor]) -> list[Transfer]:
        return [self._peers[r].receive(t) for r, t in enumerate(into) if t.numel()]

    def _to_peers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same list, nothing for this rank itself."""
        return [t if r != self._ranks.rank else t[:0] for r, t in enumerate(tensors)]

    def _run(self, joint: Joint, kept: Tensor | None, before: int, rows: int) -> Waits:
        if kept is not None:
            yield from self._move(kept, before, rows)
        chunks = self._cut(rows)
        sums = [self._exchange(chunk.partials, chunk.inbox) for chunk in chunks]
        back: list[Transfer] = []
        for chunk, transfers in zip(chunks, sums, strict=True):
            yield transfers
            self._add_and_norm(joint, chunk.sums, chunk.own, chunk.x)
            if rows > self._few:
                back += self._exchange(chunk.mine, chunk.others)
        return back

    def _plan(self, rows: int) -> tuple[Any, list[Any]]:
        """These rows' struct Plan of streams.cpp (`_run`, for the thread there) and what it points to."""
        key = rows, self._residual.data_ptr()
        if key not in self._plans:
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            self._plans[key] = self._written(self._cut(rows), rows > self._few)
        return self._plans[key]

    def _written(self, chunks: list[_Chunk], back: bool) -> tuple[Any, list[Any]]:
        words, held = [len(self._peers), len(chunks)], []
        for rank, peer in self._peers.items():
            words += [peer.fileno(), rank]
        for chunk in chunks:
            norm = sum_norm(chunk.sums, self._residual[chunk.own], chunk.x) if len(chunk.x) else b""
            held.append(ctypes.create_string_buffer(norm))
            words.append(ctypes.addressof(held[-1]) if norm else 0)
            for rank in self._peers:
                ways = [chunk.partials[rank], chunk.inbox[rank]]
                ways += [chunk.mine[rank], chunk.others[rank]] if back else [chunk.x[:0]] * 2
                words += [word for t in ways for word in (t.data_ptr(), t.nbytes)]
        return (ctypes.c_int64 * len(words))(*words), held

    def _part(self, at: int, span: tuple[int, int]) -> slice:
        """Rows `at` and on of a span, as many as go at once."""
        return slice(min(span[0] + at, span[1]), min(span[0] + at + self._chunk, span[1]))

    def _cut(self, rows: int) -> list[_Chunk]:
        shares, me = self._shares(rows), self._ranks.rank
        first, last = shares[me]

        chunks, part = [], self._part
        for at in range(0, max(b - a for a, b in shares), self._chunk):
            mine, own = part(at, (first, last)), part(at, (0, last - first))
            sums = [self._inbox[r][own] for r in range(len(shares))]
            x = self._x[mine]
            chunks.append(
                _Chunk(
                    own=own,
                    partials=self._to_peers([self._partial[part(at, span)] for span in shares]),
                    inbox=self._to_peers(sums),
                    sums=[*sums[:me], self._partial[mine], *sums[me + 1 :]],
                    x=x,
                    mine=self._to_peers([x] * len(shares)),
                    others=self._to_peers([self._x[part(at, span)] for span in shares]),
                )
            )
        return chunks

    def _add_and_norm(self, joint: Joint, parts: Sequence[Tensor], own: slice, x: Tensor) -> None:
        """Rows `own` of the residual, and x of them."""
        if len(x):
            add_rms_norm(parts, self._residual[own], joint, x)

    def _move(self, kept: Tensor, before: int, rows: int) -> Iterator[Transfers]:
        """Brings the residual of the kept rows to the ranks whose shares they now are."""
        old, new, me = self._shares(before), self._shares(rows), self._ranks.rank
        first, last = new[me]
        if before <= self._few:  # every rank holds all
            torch.index_select(self._residual, 0, kept[first:last], out=self._spare[: last - first])
        else:
            # kept ascends and shares are contiguous, so what goes from a rank to another is one range.
            edges = torch.tensor([0] + [b for _, b in old], device=kept.device)
            cuts = torch.searchsorted(kept, edges).tolist()
            held = self._residual.index_select(0, kept[cuts[me] : cuts[me + 1]] - old[me][0])

            def overlap(source: int, target: int) -> slice:
                low = max(cuts[source], new[target][0])
                return slice(low, max(low, min(cuts[source + 1], new[target][1])))

            def shifted(span: slice, by: int) -> slice:
                return slice(span.start - by, span.stop - by) if span.stop > span.start else slice(0, 0)

            ranks = range(len(new))
            out = [held[shifted(overlap(me, r), cuts[me])] for r in ranks]
            into = [self._spare[shifted(overlap(r, me), first)] for r in ranks]
            into[me].copy_(out[me])
            yield self._exchange(self._to_peers(out), self._to_peers(into))
        self._residual, self._spare = self._spare, self._residual

    def gather(self, rows: Tensor) -> Tensor:
        """See `Seam.gather`. Each rank sends those that it holds to all."""
        if self._rows <= self._few:
            return self._residual[: self._rows].index_select(0, rows)
        result = self._residual.new_empty(len(rows), self._residual.shape[1])
        spans, me = self._shares(self._rows), self._ranks.rank
        places = [((rows >= a) & (rows < b)).nonzero().flatten() for a, b in spans]

        def run() -> Waits:
            mine = self._residual.index_select(0, rows[places[me]] - spans[me][0])
            into = [result.new_empty(len(place), result.shape[1]) for place in places]
            yield self._exchange(self._to_peers([mine] * len(spans)), self._to_peers(into))
            into[me] = mine
            for place, values in zip(places, into, strict=True):
                result.index_copy_(0, place, values)
            return ()

        self._ranks.progress.submit(run).wait()
        return result

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """See `Seam.insert`. Each rank keeps those of its share."""
        first, last = self._shares(self._rows)[self._ranks.rank]
        mine = (rows >= first) & (rows < last)
        self._residual.index_copy_(0, rows[mine] - first, values[mine])

    def close(self) -> None:
        """See `Seam.close`."""
        if self._job is None or self._job.over:  # or the thread's end closes them
            self._ranks.progress.remove(list(self._peers.values()))
            for peer in self._peers.values():
                peer.close()
        self._peers, self._plans = {}, {}
        self._native = False
        self._job = None
