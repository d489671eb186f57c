from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from weaveinf.cache.pools import PoolSpec
from weaveinf.comm.ranks import Ranks
from weaveinf.config import PAGE_SIZE
from weaveinf.engine import worker


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cgroup v2: the limit less what is used, of which cached files can be given back."""
    monkeypatch.setattr(worker, "_CGROUP", tmp_path)
    machine = psutil.virtual_memory().available
    assert worker._free_memory() == pytest.approx(machine, rel=0.1)  # no such files: no container
    (tmp_path / "memory.current").write_text("9000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\ninactive_file 3000000\n")
    (tmp_path / "memory.max").write_text("10000000\n")
    assert worker._free_memory() == 4000000
    (tmp_path / "memory.max").write_text("max\n")
    assert worker._free_memory() == pytest.approx(machine, rel=0.1)


@pytest.mark.parametrize(
    ("on_gpu", "free", "free_on_host", "gib", "pages"),
    [
        (True, 1000, 1 << 40, None, 800),  # 80 % of a GPU, a page of which takes one of these units
        (True, 1 << 40, 1000, None, 133),  # 40 % of the host, where it takes three
        (True, 1, 1000, 2.0, 133),
        (True, 1, 1 << 40, 0.5, (1 << 29) // (PAGE_SIZE * 4)),
        (False, 1, 1000, None, 100),  # one memory
    ],
)
def test_each_memory_has_room_for_its_own_pools(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, free: int, free_on_host: int, gib: float | None, pages: int
) -> None:
    unit = PAGE_SIZE * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * unit, 0))
    monkeypatch.setattr(worker, "_free_memory", lambda: free_on_host * unit)
    specs = [PoolSpec("key", (), torch.float32, 4, host=range(1, 4))]
    config = SimpleNamespace(kv_cache_gib=gib, max_num_seqs=1 << 24)
    ranks = Ranks.single(torch.device("cpu"))
    one: Any = SimpleNamespace(config=config, ranks=ranks, _on_gpu=on_gpu, max_blocks=1)
    assert worker.Worker._agree_on_pages(one, specs) == pages
