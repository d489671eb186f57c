"""What all tests share."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from tests.ranks import close_pools

_cache = tempfile.TemporaryDirectory()


def pytest_configure(config: pytest.Config) -> None:
    # Workers run one thread a rank beside the tests' own process.
    torch.set_num_threads(1)
    # Profiles of the links are kept between runs; those of a test are not the user's.
    os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    close_pools()
    _cache.cleanup()
