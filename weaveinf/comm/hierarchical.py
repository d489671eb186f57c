"""The seam of CPU ranks on several hosts with several ranks each.

The ranks of a host write their partial sums into memory that they share, and rank i of every host sums some
of the rows over its host. With these it does what the collective seam does between all ranks, but only with
the ranks i of the other hosts, each of them for its share of the rows. x lies in the shared memory again.
That sends every row 2 (H-1)/H times out of each of H hosts, once for two; with R ranks a host the flat
exchange sends it R times as often.

The arithmetic differs from the other seams' in one point: what goes from host to host is rounded. A host's
sum, in float32 in rank order, is rounded to the model's dtype, also where it stays; these are summed in
float32 in host order. So a row's result does not depend on who computes it, nor on how many rows there are.
"""

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from weaveinf.comm import segment
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.errors import RankDied
from weaveinf.comm.progress import Transfers, Waits
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, share_of
from weaveinf.comm.segment import BLAMED, LINE, check, pages, share
from weaveinf.comm.wire import Transfer


class HierarchicalSeam(CollectiveSeam):
    """See `Seam`; for up to `max_rows` rows of `hidden` elements of float32 or bfloat16.

    Residuals lie, move and are gathered as in the collective seam. OSError on all ranks when a host's
    segment cannot be made.
    """

    name = "hierarchical"

    def __init__(self, ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> None:
        hosts = ranks.hosts
        why = f"{len(hosts)} hosts with {len(hosts[0])} CPU ranks each"
        super().__init__(ranks, max_rows, hidden, dtype, why)
        self._native = False  # ranks meet in the midst of it
        self._host = next(h for h, members in enumerate(hosts) if ranks.rank in members)
        self._here = hosts[self._host]
        self._place = self._here.index(ranks.rank)
        self._column = [members[self._place] for members in hosts]
        # Whom the calls into the segment may blame: its ranks, then all others.
        self._known = [*self._here, *(r for r in range(ranks.size) if r not in self._here)]

        shapes = [(len(self._here), max_rows, hidden), (max_rows, hidden), (len(hosts), self._few, hidden)]
        at = [pages(len(self._here) * LINE)]
        for shape in shapes:
            at.append(at[-1] + pages(torch.Size(shape).numel() * dtype.itemsize))
        agree_here = partial(ranks.agree, among=self._here)
        self._segment = seg = share(at[-1], self._place, agree_here, ranks.agree)
        planes = (seg.tensor(offset, shape, dtype) for offset, shape in zip(at, shapes, strict=False))
        self._partials, self._shared_x, self._sums = planes
        self._partial, self._x = self._partials[self._place], self._shared_x
        self._few_x = torch.empty(self._few, hidden, dtype=dtype)
        self._blamed = seg.tensor(self._place * LINE + BLAMED, (1,), torch.int32)
        self._meeting = seg.group(0, len(self._here), ranks.silence_s)

    def finish(self) -> Tensor:
        """See `Seam.finish`."""
        x = super().finish()
        return x if self._rows > self._few else self._few_x[: self._rows]

    def _run(self, joint: Joint, kept: Tensor | None, before: int, rows: int) -> Waits:
        """No other seam may come between: two whose meetings mix would wait for each other."""
        try:
            if kept is not None:
                for transfers in self._move(kept, before, rows):
                    self._wait(transfers)
            self._meet(rows)
            if rows > self._few:
                self._run_many(joint, rows)
            else:
                self._run_few(joint, rows)
        except BaseException as error:
            self._leave(error)
            raise
        yield ()  # nothing is left to wait for
        return ()

    def _run_few(self, joint: Joint, rows: int) -> None:
        """All hosts get the sums of all rows, and every rank computes all."""
        mine = slice(*share_of(rows, len(self._here), self._place))
        sums = self._sums[:, mine]
        _sum(self._partials[:, mine], sums[self._host])
        self._wait(self._across([sums[self._host]] * len(sums), sums.unbind(0)))
        self._meet(rows)
        self._add_and_norm(joint, self._sums[:, :rows].unbind(0), slice(rows), self._few_x[:rows])

    def _run_many(self, joint: Joint, rows: int) -> None:
        shares = self._shares(rows)
        spans = [shares[r] for r in self._column]
        first, last = spans[self._host]
        hosts = range(len(spans))
        starts = range(0, max(b - a for a, b in spans), self._chunk)

        chunk = self._part
        sums = []
        for at in starts:
            pieces = [chunk(at, span) for span in spans]
            for piece in pieces:  # nobody else reads these rows
                _sum(self._partials[:, piece], self._partial[piece])
            own = chunk(at, (0, last - first))
            out, into = [self._partial[piece] for piece in pieces], [self._inbox[h][own] for h in hosts]
            sums.append(self._across(out, into))
        back: list[Transfer] = []
        for at, transfers in zip(starts, sums, strict=True):
            self._wait(transfers)
            mine, own = chunk(at, (first, last)), chunk(at, (0, last - first))
            parts = [self._inbox[h][own] for h in hosts]
            parts[self._host] = self._partial[mine]
            self._add_and_norm(joint, parts, own, self._x[mine])
            back += self._across([self._x[mine]] * len(spans), [self._x[chunk(at, span)] for span in spans])
        self._wait(back)
        self._meet(rows)

    def _across(self, out: Sequence[Tensor], into: Sequence[Tensor]) -> list[Transfer]:
        """Sends out[h] to this rank's counterpart on host h and receives into[h] from it."""
        sends, receives = ([self._x[:0]] * self._ranks.size for _ in range(2))
        for host, rank in enumerate(self._column):
            if host != self._host:
                sends[rank], receives[rank] = out[host], into[host]
        return self._exchange(sends, receives)

    def _wait(self, transfers: Transfers) -> None:
        self._ranks.progress.wait(transfers)

    def _meet(self, rows: int) -> None:
        """Meets the ranks of this host."""
        code = segment.lib.weaveinf_meet(ctypes.addressof(self._meeting), rows)
        if code:
            kind, who = divmod(code, 256)
            check(256 * kind + self._known[who], "a seam")

    def _leave(self, error: BaseException) -> None:
        """Lets no peer wait for this rank, neither here nor on the other hosts."""
        if isinstance(error, RankDied) and error.rank is not None:
            self._blamed.fill_(1 + self._known.index(error.rank))
        self._segment.close()

    def close(self) -> None:
        """See `Seam.close`."""
        self._meeting.leave()
        self._segment.close()
        super().close()


def _sum(parts: Tensor, out: Tensor) -> None:
    """parts [ranks, rows, hidden] summed in float32 in rank order, rounded once; out may be one of them."""
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)
        return
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    out.copy_(total)
