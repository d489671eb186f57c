"""Rows of an embedding table, or of this rank's part of one."""

import torch
from torch import Tensor

from weaveinf.ops import native


def embed_reference(ids: Tensor, table: Tensor, first: int, out: Tensor) -> Tensor:
    """See `embed`."""
    at = ids - first
    foreign = (at < 0) | (at >= table.shape[0])
    if table.shape[0]:  # a small vocabulary leaves the last ranks none
        torch.index_select(table, 0, at.masked_fill(foreign, 0), out=out)
    return out.masked_fill_(foreign[:, None], 0)


def embed(ids: Tensor, table: Tensor, first: int, out: Tensor) -> Tensor:
    """out [rows, hidden] = the rows of ids (int64 [rows]) in table [count, hidden], which holds the ids
    first to first + count - 1; zeros for all other ids. All are contiguous."""
    if native.lib is None or out.is_cuda:
        return embed_reference(ids, table, first, out)
    native.lib.weave_embed(
        *(ids.data_ptr(), table.data_ptr(), out.data_ptr(), ids.shape[0], first),
        *(table.shape[0], out.shape[1] * out.element_size(), torch.get_num_threads()),
    )
    return out


def zero_(x: Tensor) -> Tensor:
    """Fills contiguous memory with zeros."""
    if native.lib is None or x.is_cuda:
        return x.zero_()
    native.lib.weave_zero(x.data_ptr(), x.numel() * x.element_size())
    return x
