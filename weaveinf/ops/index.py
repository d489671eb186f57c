"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp, technical report, section 2.1):

    I[t, s] = sum over heads j of w[t, j] relu(q[t, j] . k[s])        row t reads the s <= t that score best

Keys have one head. They are cached as they are, or as eight-bit floats with a scale for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from weaveinf.ops import select

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FLOATS = 1 << 24
"""What is held at a time of scores by head, or of gathered keys."""


class IndexKeys(NamedTuple):
    """Cached keys: [num_pages, page_size, D]; scales: float32 [num_pages, page_size], or None for ones."""

    values: Tensor
    scales: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.values.shape[1]

    def at(self, slots: Tensor) -> Tensor:
        """Float32 [*slots.shape, D]: the keys at these slots."""
        slots = slots.long()
        keys = self.values.flatten(0, 1)[slots].float()
        return keys if self.scales is None else keys * self.scales.flatten()[slots].unsqueeze(-1)

    def of(self, pages: Tensor, count: int) -> Tensor:
        """Float32 [count, D]: the first keys of these pages."""
        pages = pages[: -(-count // self.page_size)].long()
        keys = self.values[pages].flatten(0, 1)[:count].float()
        return keys if self.scales is None else keys * self.scales[pages].flatten()[:count].unsqueeze(-1)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values like x [..., D], float32 scales [...]) of which the product is nearly x."""
    scales = x.float().abs().amax(-1).clamp(min=1e-12) / _FP8_MAX
    scaled = x.float() / scales.unsqueeze(-1)
    return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(FP8), scales


def hadamard(x: Tensor) -> Tensor:
    """The orthogonal Hadamard rotation of [..., D], D a power of two, in float32. It keeps dot products and
    spreads outliers over the channels, for `quantize`."""
    dim, f = x.shape[-1], x.float()
    width = 1
    while width < dim:
        first, second = f.reshape(*x.shape[:-1], -1, 2, width).unbind(-2)
        f = torch.stack([first + second, first - second], -2)
        width *= 2
    return f.reshape(x.shape) * dim**-0.5


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """I above, float32 [rows, T]: q [rows, H, D], weights float32 [rows, H]; keys float32 [T, D], which all
    rows share, or [rows, T, D]."""
    rows, heads, dim = q.shape
    if keys.dim() == 2:
        by_head = (q.float().reshape(rows * heads, dim) @ keys.t()).view(rows, heads, -1)
    else:
        by_head = torch.bmm(q.float(), keys.transpose(1, 2))
    return torch.bmm(weights.unsqueeze(1), by_head.relu_()).squeeze(1)


def row_scores(
    q: Tensor, weights: Tensor, keys: IndexKeys, block_table: Tensor, cu_seqlens_q: Tensor, positions: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, `index_scores` of them over the cached keys up to the last one's position), a part of a sequence
    at a time; the arguments as in `paged_attention`. A row's scores behind its own position mean nothing."""
    heads = q.shape[1]
    for s, (start, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        if start == end:
            continue
        count = int(positions[end - 1]) + 1
        cached = keys.of(block_table[s], count)
        step = max(1, _FLOATS // (heads * count))
        for at in range(start, end, step):
            rows = slice(at, min(at + step, end))
            yield rows, index_scores(q[rows], weights[rows], cached)


def choose(
    q: Tensor,
    weights: Tensor,
    keys: IndexKeys,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """The positions up to its own that score best for each row, as `select.top_k` gives them: int32 [rows,
    top_k], int32 [rows]."""
    index = torch.empty(len(q), top_k, dtype=torch.int32, device=q.device)
    counts = torch.empty(len(q), dtype=torch.int32, device=q.device)
    for rows, scores in row_scores(q, weights, keys, block_table, cu_seqlens_q, positions):
        ends = positions[rows] + 1
        index[rows], counts[rows] = select.top_k(scores, ends, torch.full_like(ends, top_k), top_k)
    return index, counts


def choose_among(
    q: Tensor, weights: Tensor, keys: IndexKeys, slots: Tensor, ends: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The same among candidates of each row's own, at `slots` (int32 [rows, n], of which the first ends[row]
    count): which of the n."""
    index = torch.empty(len(q), top_k, dtype=torch.int32, device=q.device)
    counts = torch.empty(len(q), dtype=torch.int32, device=q.device)
    step = max(1, _FLOATS // (slots.shape[1] * max(q.shape[1:])))
    for rows in [slice(at, at + step) for at in range(0, len(q), step)]:
        scores = index_scores(q[rows], weights[rows], keys.at(slots[rows]))
        wanted = torch.full_like(ends[rows], top_k)
        index[rows], counts[rows] = select.top_k(scores, ends[rows], wanted, top_k)
    return index, counts
