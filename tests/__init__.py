"""The helpers' asserts, too, hold under `python -O`."""

import pytest

pytest.register_assert_rewrite("tests")
