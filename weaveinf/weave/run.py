"""The executor: a model is a chain of blocks joined by seams (DESIGN section 1)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.comm.seam import Seam
from weaveinf.comm.votes import Votes

if TYPE_CHECKING:
    from weaveinf.models.layers import Block, Model


def run(model: Model, batch: Batch, seam: Seam, votes: Votes) -> tuple[Tensor, Batch]:
    """Runs `batch` through every block and seam of the model.

    Returns the normalised rows that are left (`[rows, hidden]`, the same on every rank; valid until
    the seam's next start) and the batch of these rows.
    """
    seam.open(batch.num_tokens)
    x: Tensor | None = None
    for block, joint in model.chain:
        kept = _drive(block, x, batch, seam.partial(), votes)
        if kept is not None:
            batch = batch.take(kept)
        seam.start(joint, kept)
        x = seam.finish()
    assert x is not None
    return x, batch


def _drive(block: Block, x: Tensor | None, batch: Batch, out: Tensor, votes: Votes) -> Tensor | None:
    """Calls a block; one that votes is a generator and is sent each sum over the ranks."""
    result = block(x, batch, out)
    if not isinstance(result, Generator):
        return result
    try:
        ballot = next(result)
        while True:
            ballot = result.send(votes.sum(ballot))
    except StopIteration as end:
        return end.value
