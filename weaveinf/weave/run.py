"""The executor: a model is a chain of blocks joined by seams (DESIGN section 1).

    for every block, for every half: finish its last seam, run the block, start its next seam

With two halves the seam of one runs while the block of the other computes (TokenWeave, arXiv 2505.11329,
section 4); with one half this is the ordinary forward pass. A block that votes in its middle lets the other
half go on meanwhile.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.comm.seam import Joint, Seam
from weaveinf.comm.votes import Votes
from weaveinf.models.layers import Block
from weaveinf.selectors.selector import RowPruner

Chain = Sequence[tuple[Block, Joint]]


def run(
    chain: Chain,
    halves: Sequence[Batch],
    seams: Sequence[Seam],
    votes: Votes,
    ctas: tuple[int, int] = (0, 0),
    pruner: RowPruner | None = None,
) -> Tensor:
    """Runs a batch, whole or in two halves (`Batch.split`), through every block and seam of a model.

    Each half has a seam of its own; `ctas` are for seams that run under attention and under another block
    (`Plan`). Where a pruner's boundary is, rows may come and go. Returns the normalised rows that are left
    (`[rows, hidden]`, the same on every rank; valid until a seam's next start).
    """
    batches = list(halves)
    seams = seams[: len(batches)]
    for batch, seam in zip(batches, seams, strict=True):
        seam.open(batch.num_tokens)

    def part(half: int, block: Block, joint: Joint, number: int) -> Iterator[None]:
        """A half's turn at a block; yields while a vote of its is under way."""
        seam = seams[half]
        x = seam.finish() if number else seam.partial()
        if pruner is not None and number in pruner.boundaries:
            x, batches[half] = pruner.change(number, x, batches[half], seam, chain[number - 1][1])
        kept = block(x, batches[half], seam.partial())
        if isinstance(kept, Generator):
            kept = yield from _voting(kept, votes)
        if kept is not None:
            batches[half] = batches[half].take(kept)
        # The first half's seam lies under the second's same block, the second's under the first's next, if
        # there is one.
        under = number + half
        alone = under == len(chain) or len(seams) == 1
        seam.start(joint, kept, 0 if alone else ctas[0] if under % 2 else ctas[1])

    for i, (block, joint) in enumerate(chain):
        turns = deque(part(half, block, joint, i) for half in range(len(seams)))
        while turns:
            turn = turns.popleft()
            if next(turn, "over") is None:
                turns.append(turn)
    left = [seam.finish() for seam in seams]
    return left[0] if len(left) == 1 else torch.cat(left)


def _voting(
    block: Generator[Tensor, Tensor, Tensor | None], votes: Votes
) -> Generator[None, None, Tensor | None]:
    """Runs a block that yields what it votes on and is sent each sum over the ranks; what it returns."""
    try:
        ballot = next(block)
        while True:
            total = votes.start(ballot)
            yield
            ballot = block.send(total())
    except StopIteration as end:
        return end.value
