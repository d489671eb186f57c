"""A second group of ranks over the processes of a test pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from unittest import mock

import torch.distributed as dist

from weaveinf.comm import segment
from weaveinf.comm.ranks import Ranks


@contextmanager
def store_port() -> Iterator[int]:
    """The port of a store for a second group to meet at."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
    yield store.port
    del store


@contextmanager
def second_ranks(ranks: Ranks, port: int | None, library: bool = False) -> Iterator[Ranks]:
    """The pool's own ranks (no port), or another group; as if without a compiler unless `library`."""
    if port is None:
        yield ranks
        return
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    without = {} if library else {"lib": None, "reason": "no library"}
    with mock.patch.multiple(segment, **without) if without else nullcontext():
        group = Ranks.join(ranks.rank, ranks.size, store, ranks.device, silence_s=60.0)
        try:
            yield group
        finally:
            group.close()
            group.close()
