"""A real Ray cluster of several nodes on this machine, which asks for a token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}
_ROOT = str(Path(__file__).parents[1])


@contextmanager
def ray_cluster(nodes: int, **node: Any) -> Iterator[Any]:
    """Joined by this process. `node`: what each of the nodes has."""
    ray = pytest.importorskip("ray")
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "t" * 32)
        reset_auth_token_state()
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, **node})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**NODE, **node)
            patch.setenv("RAY_ADDRESS", cluster.address)
            ray.init()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
    reset_auth_token_state()
