"""The executor: a model is a chain of blocks joined by seams (DESIGN section 1).

    for every block, for every half: finish its last seam, run the block, start its next seam

With two halves the seam of one runs while the block of the other computes (TokenWeave, arXiv 2505.11329,
section 4); with one half this is the ordinary forward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.comm.seam import Joint, Seam
from weaveinf.comm.votes import Votes

if TYPE_CHECKING:
    from weaveinf.models.layers import Block

    Chain = Sequence[tuple[Block, Joint]]


def run(chain: Chain, halves: Sequence[Batch], seams: Sequence[Seam], votes: Votes) -> Tensor:
    """Runs a batch, whole or in two halves (`Batch.split`), through every block and seam of a model.

    Each half has a seam of its own. Returns the normalised rows that are left (`[rows, hidden]`, the same
    on every rank; valid until a seam's next start).
    """
    batches = list(halves)
    seams = seams[: len(batches)]
    for batch, seam in zip(batches, seams, strict=True):
        seam.open(batch.num_tokens)
    for i, (block, joint) in enumerate(chain):
        for half, seam in enumerate(seams):
            x = seam.finish() if i else None
            kept = _drive(block, x, batches[half], seam.partial(), votes)
            if kept is not None:
                batches[half] = batches[half].take(kept)
            seam.start(joint, kept)
    left = [seam.finish() for seam in seams]
    return left[0] if len(left) == 1 else torch.cat(left)


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
