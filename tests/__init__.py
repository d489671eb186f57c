"""pytest makes the helpers' asserts, too, into ones that hold under `python -O`."""

import pkgutil

import pytest

pytest.register_assert_rewrite(*(f"tests.{one.name}" for one in pkgutil.iter_modules(__path__)))
