"""Which seam a group of ranks uses: each rank probes, all vote, one is chosen on all."""

from __future__ import annotations

import torch

from weaveinf.comm import segment
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.hierarchical import HierarchicalSeam
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Seam
from weaveinf.comm.segment import MAX_RANKS
from weaveinf.comm.shared import SharedSeam
from weaveinf.ops import native


def make_seam(ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> Seam:
    """A seam for passes of up to `max_rows` rows; every rank calls it, in the same order.

    `.name` is "local", "shared memory", "hierarchical" or "collective", the same on every rank; `.why` is
    one line for the log.
    """
    if ranks.size == 1:
        return LocalSeam(max_rows, hidden, dtype, ranks.device)
    objections = ranks.agree(_objection(ranks, dtype))
    why = next((f"rank {r}: {words}" for r, words in enumerate(objections) if words), "")
    if not why:
        try:
            kind = SharedSeam if len(ranks.hosts) == 1 else HierarchicalSeam
            return kind(ranks, max_rows, hidden, dtype)
        except TimeoutError:  # is an OSError, too
            raise
        except OSError as error:
            why = error.strerror or str(error)
    return CollectiveSeam(ranks, max_rows, hidden, dtype, why)


def _objection(ranks: Ranks, dtype: torch.dtype) -> str:
    """Why this rank cannot use shared memory, or nothing."""
    if ranks.device.type != "cpu":
        return f"its device is {ranks.device.type}"
    counts = sorted({len(host) for host in ranks.hosts})
    if counts == [1]:
        return f"{len(ranks.hosts)} hosts with one rank each"
    if len(counts) > 1:
        return f"some hosts have {counts[0]} ranks and others {counts[-1]}"
    if counts[0] > MAX_RANKS:
        return f"more than {MAX_RANKS} ranks on a host"
    if dtype not in native.DTYPES:
        return f"no shared-memory kernel for {dtype}"
    return segment.reason or (native.reason if len(ranks.hosts) == 1 else "")
