"""Engines come and go with the load, on a real cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.harness import eventually
from tests.ray_cluster import ray_cluster

pytest.importorskip("ray.serve")
from tests.server.test_ray_app import complete, engines, serving

pytestmark = pytest.mark.slow
CLIENTS = 8


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    with ray_cluster(2, num_cpus=1) as one:
        yield one


def test_an_engine_comes_under_load_and_goes_after_it() -> None:
    quick = {"upscale_delay_s": "2", "downscale_delay_s": "4", "max_num_seqs": "2"}
    with serving(min_replicas="1", max_replicas="2", **quick) as client, ThreadPoolExecutor(CLIENTS) as pool:
        assert len(engines()) == 1
        enough = threading.Event()

        def ask(number: int) -> set[int]:
            statuses = set[int]()
            while not enough.is_set():
                answer = complete(client, f"{number}: once upon a time", max_tokens=100)
                statuses.add(answer.status_code)
            return statuses

        asking = [pool.submit(ask, number) for number in range(CLIENTS)]
        try:
            assert eventually(lambda: len(set(engines().values())) == 2)
        finally:
            enough.set()
        assert [one.result() for one in asking] == [{200}] * CLIENTS
        # Serve looks back over half a minute.
        assert any(eventually(lambda: len(engines()) == 1) for _ in range(3))
        assert complete(client, "and then ").status_code == 200
