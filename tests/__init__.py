from pkgutil import iter_modules

import pytest

# Helpers check too: their asserts are pytest's, which python -O leaves there.
pytest.register_assert_rewrite(*(f"tests.{module.name}" for module in iter_modules(__path__)))
