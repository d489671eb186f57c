"""What DeepSeek's indexer and HISA choose, by definition, a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen(
    q: Tensor, weights: Tensor, keys: Tensor, top_k: int, block: int = 0, blocks: int = 0
) -> list[int]:
    """Positions that a row reads, ascending, of all its keys [t + 1, D]: q [H, D], weights [H].

    With blocks, only tokens of the best `blocks` of them count, among these the first one and the last.
    """

    def score(of: Tensor) -> Tensor:
        return (weights[:, None] * (q @ of.T).relu()).sum(0)

    scores = score(keys)
    if block and len(keys) > block * blocks:
        of_blocks = score(torch.stack([part.mean(0) for part in keys.split(block)]))
        of_blocks[[0, -1]] = torch.inf
        best = of_blocks.argsort(descending=True, stable=True)[:blocks]
        outside = ~torch.isin(torch.arange(len(keys)) // block, best)
        scores = scores.masked_fill(outside, -torch.inf)
    best = scores.argsort(descending=True, stable=True)[: min(top_k, int(scores.isfinite().sum()))]
    return sorted(best.tolist())
