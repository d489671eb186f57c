"""Pools in the host's memory, which a GPU's kernels write and read."""

from __future__ import annotations

import pytest
import torch

from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import select
from weaveinf.ops.rope import write_kv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("pages", [7, 3000])
@pytest.mark.parametrize("scattered", [False, True])
def test_what_was_written_to_the_host_is_fetched(pages: int, scattered: bool) -> None:
    torch.manual_seed(0)
    device, rows, kv_heads, dim, page_size = torch.device("cuda", 0), 60, 3, 32, 16
    specs = [PoolSpec(name, (kv_heads, dim), torch.bfloat16, 2, host=range(1, 2)) for name in "kv"]
    before = torch.cuda.memory_allocated(device)
    pools = Pools(specs, pages, page_size, device, scattered)
    near, far = zip(*(pools[name] for name in "kv"), strict=True)
    # torch rounds what it takes of the device up to 512 bytes.
    assert torch.cuda.memory_allocated(device) - before <= sum(pool.nbytes + 512 for pool in near)
    written = torch.randn(2, rows, kv_heads, dim, device=device).bfloat16()
    slots = torch.randperm(pages * page_size, device=device)[:rows].int()
    write_kv(*written, *far, slots)
    places = slots[:50, None] * kv_heads + torch.arange(kv_heads, device=device)
    for pool, mirror, rows_of in zip(far, near, written, strict=True):
        mirror.fill_(torch.nan)
        select.fetch(pool.flatten(0, 2), places.int(), mirror.flatten(0, 2))
        assert torch.equal(mirror.flatten(0, 1)[slots[:50].long()], rows_of[:50])
        assert int(mirror.isnan().sum()) == mirror.numel() - 50 * kv_heads * dim
