"""What all tests share."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import close_pools


def pytest_configure(config: pytest.Config) -> None:
    # Workers run one thread a rank beside the tests' own process.
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    close_pools()
