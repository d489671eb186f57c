"""Products that the ranks of a host share: whoever computes them, to the last bit."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from tests.ranks import pool
from weaveinf.comm.aid import WORTH, Aid, aid
from weaveinf.comm.choose import make_seam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.shared import SharedSeam
from weaveinf.ops import native
from weaveinf.ops.linear import PackedWeight, linear, pack

MAX_ROWS, HIDDEN = 401, 250
WIDTHS = (1041, 130)


def aided(ranks: Ranks, dtype: torch.dtype) -> tuple[Aid | None, SharedSeam, list[PackedWeight]]:
    """Weights of this rank's own, shared as if the machine had cores enough."""
    seam = make_seam(ranks, MAX_ROWS, HIDDEN, dtype)
    assert isinstance(seam, SharedSeam)
    random = torch.Generator().manual_seed(ranks.rank)
    with mock.patch.object(native, "onednn", False):  # whose products are not shared
        weights = [
            pack(torch.randn(HIDDEN, width + 2 * ranks.rank, generator=random).to(dtype)) for width in WIDTHS
        ]
    with mock.patch.object(os, "sched_getaffinity", return_value=range(8)):
        return aid(ranks, MAX_ROWS, weights, [seam]), seam, weights


def share_products(ranks: Ranks, dtype: torch.dtype, idle: int) -> None:
    """Rank `idle` computes nothing, as if its core never got to it: all its sums are the others' work."""
    random = torch.Generator().manual_seed(7 + ranks.rank)
    helper, seam, weights = aided(ranks, dtype)
    try:
        assert helper is not None
        if ranks.rank == idle:
            helper._tiles = lambda *_: None  # type: ignore[assignment]
        for rows in (WORTH - 1, WORTH, 197, MAX_ROWS):
            for weight in weights:
                x = torch.randn(rows, weight.k, generator=random).to(dtype)
                assert weight.stored is not None
                want = torch.empty(rows, HIDDEN, dtype=dtype)
                call = native.lib.weave_linear  # type: ignore[union-attr]
                alone = (native.DTYPES[dtype], x.data_ptr(), weight.k, rows, 0, want.data_ptr(), HIDDEN)
                call(weight.stored.data_ptr(), HIDDEN, weight.k, *alone, native.DTYPES[dtype], 1)
                seam.open(rows)
                out = seam.partial().fill_(torch.nan)
                linear(x, weight, out=out)
                ranks.votes.sum(torch.zeros(1))
                few = rows * weight.k <= 1 << 16  # another kernel, with another order of sums
                tolerance = {"rtol": 2**-7, "atol": 1e-3} if few else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(out, want, **tolerance)
                ranks.votes.sum(torch.zeros(1))
    finally:
        seam.close()
        if helper is not None:
            helper.close()


@pytest.mark.skipif(native.lib is None, reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "idle"), [(2, 0), (2, 1), (4, 2), (4, -1)])
def test_shared_products(size: int, idle: int, dtype: torch.dtype) -> None:
    pool(size).run(share_products, dtype, idle)


def without(ranks: Ranks, room: bool) -> bool:
    seam = make_seam(ranks, 8, HIDDEN, torch.float32)
    assert isinstance(seam, SharedSeam)
    weights = [pack(torch.ones(HIDDEN, 8))]
    size = 0 if room and ranks.rank == 0 else 1 << 30
    full = mock.patch.object(os, "statvfs", return_value=mock.Mock(f_bavail=size, f_frsize=1))
    cores = mock.patch.object(os, "sched_getaffinity", return_value=range(8 if room else 1))
    with full, cores:
        return aid(ranks, 8, weights, [seam]) is None


@pytest.mark.skipif(native.lib is None, reason="no compiled kernels here")
@pytest.mark.parametrize("room", [True, False], ids=["no room", "no cores"])
def test_products_stay_alone(room: bool) -> None:
    assert all(pool(2).run(without, room))
