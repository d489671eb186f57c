"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp, technical report, section 2.1):

    I[t, s] = sum over heads j of w[t, j] relu(q[t, j] . k[s])        row t reads the s <= t that score best

Keys have one head. They are cached as they are, or as eight-bit floats with a scale for each token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weaveinf.ops import native, select

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


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

    @property
    def single(self) -> IndexKeys:
        """The same in pages of one token."""
        values = self.values.view(-1, 1, self.values.shape[2])
        return IndexKeys(values, None if self.scales is None else self.scales.view(-1, 1))


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


def scores_reference(
    q: Tensor, weights: Tensor, keys: IndexKeys, table: Tensor, ends: Tensor, width: int
) -> Tensor:
    """See `scores`."""
    out = torch.full((len(q), width), torch.nan, device=q.device)
    at = torch.arange(width, device=q.device)
    for r, end in enumerate(ends.tolist()):
        own = at[:end]
        slots = table[r, own // keys.page_size].long() * keys.page_size + own % keys.page_size
        out[r, :end] = weights[r] @ (q[r].float() @ keys.at(slots).t()).relu_()
    return out


def scores(q: Tensor, weights: Tensor, keys: IndexKeys, table: Tensor, ends: Tensor, width: int) -> Tensor:
    """I above, float32 [rows, width]: q [rows, H, D], weights float32 [rows, H], of the keys at the first
    ends[r] (int32 [rows], at most width) positions of pages table[r] (int32 [rows, max_blocks]); anything
    behind them. Queries are of the keys' dtype, or FP8's values in float32 where these have scales."""
    if q.is_cuda:
        from weaveinf.ops import triton_select

        return triton_select.index_scores(q, weights, *keys, table, ends, width)
    dtypes = (q.dtype, keys.values.dtype)
    known = dtypes in ((q.dtype, q.dtype), (torch.float32, FP8)) and q.dtype in native.DTYPES
    if native.lib is None or not known or q.shape[2] % 16:
        return scores_reference(q, weights, keys, table, ends, width)
    out = torch.empty(len(q), width)
    native.lib.weave_index(
        *native.pointers(q, keys.values, out, weights, keys.scales, table, ends),
        *(q.stride(0), q.stride(1), table.stride(0), *q.shape, keys.page_size, width),
        *(native.DTYPES[q.dtype], torch.get_num_threads()),
    )
    return out


def choose(
    q: Tensor, weights: Tensor, keys: IndexKeys, table: Tensor, ends: Tensor, width: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """The positions that score best for each row, as `select.top_k` gives them: int32 [rows, top_k], int32
    [rows]; the other arguments are those of `scores`."""
    found, wanted = [], torch.full_like(ends, top_k)
    for rows in select.slices(len(q), width):
        own = scores(q[rows], weights[rows], keys, table[rows], ends[rows], width)
        found.append(select.top_k(own, ends[rows], wanted[rows], top_k))
    return select.joined(found)
