"""Which seam a group of ranks uses: each rank probes, all vote, one is chosen on all."""

from collections.abc import Sequence

import torch

from weaveinf.comm import segment
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.hierarchical import HierarchicalSeam
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Seam
from weaveinf.comm.segment import MAX_RANKS
from weaveinf.comm.shared import SharedSeam
from weaveinf.comm.symmetric import SymmetricSeam
from weaveinf.ops import cuda, native


def make_seam(ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> Seam:
    """A seam for passes of up to `max_rows` rows; every rank calls it, in the same order.

    `.name` is "local", "shared memory", "hierarchical", "multimem", "peer", "peer in Triton" or
    "collective", the same on every
    rank; `.why` is one line for the log.
    """
    if ranks.size == 1:
        return LocalSeam(max_rows, hidden, dtype, ranks.device)
    on_gpus = ranks.device.type == "cuda"
    why = _first(ranks.agree(_gpu_objection(ranks, hidden, dtype) if on_gpus else _objection(ranks, dtype)))
    if not why and on_gpus:
        seam, said = None, ""
        try:
            lacks = _first(ranks.agree(cuda.objection()))
            seam = SymmetricSeam(ranks, max_rows, hidden, dtype, compiled=not lacks)
            if lacks:
                seam.why += f"; {lacks}"
        except Exception as error:  # torch's or the compiler's
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        why = _first(ranks.agree(said))
        if not why and seam is not None:
            return seam
    elif not why:
        try:
            kind = SharedSeam if len(ranks.hosts) == 1 else HierarchicalSeam
            return kind(ranks, max_rows, hidden, dtype)
        except TimeoutError:  # is an OSError, too
            raise
        except OSError as error:
            why = error.strerror or str(error)
    return CollectiveSeam(ranks, max_rows, hidden, dtype, why)


def _first(words: Sequence[str]) -> str:
    """What the first rank that said anything said."""
    return next((f"rank {r}: {one}" for r, one in enumerate(words) if one), "")


def _gpu_objection(ranks: Ranks, hidden: int, dtype: torch.dtype) -> str:
    """Why this rank's GPU cannot map the others' memory for csrc/cuda/seam.cu, or nothing."""
    devices = [int(index) for index in ranks.agree(str(ranks.device.index))]
    if len(ranks.hosts) > 1:
        return f"{len(ranks.hosts)} hosts"
    if ranks.size > MAX_RANKS:
        return f"more than {MAX_RANKS} ranks"
    if hidden * dtype.itemsize % 16:
        return f"rows of {hidden} {dtype} are no multiple of 16 bytes"
    own = devices[ranks.rank]
    for rank, device in enumerate(devices):
        if rank != ranks.rank and device == own:
            return f"shares its GPU with rank {rank}"
        if rank != ranks.rank and not torch.cuda.can_device_access_peer(own, device):
            return f"GPU {own} does not reach GPU {device}"
    return ""


def _objection(ranks: Ranks, dtype: torch.dtype) -> str:
    """Why this rank cannot use shared memory, or nothing."""
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
