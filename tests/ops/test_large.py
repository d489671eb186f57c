"""Memory in large pages: where it lies, and that it is plain memory."""

from __future__ import annotations

import pytest
import torch

from weaveinf.ops import large


@pytest.mark.parametrize("nbytes", [1, 4096, large.PAGE - 1, large.PAGE, 9 * large.PAGE - 64])
def test_memory_has_its_size_and_keeps_what_is_written(nbytes: int) -> None:
    first, second = large.memory(nbytes), large.memory(nbytes)
    first.fill_(3)
    second.fill_(5)
    assert first.shape == (nbytes,) and bool((first == 3).all()) and bool((second == 5).all())


@pytest.mark.parametrize("nbytes", [large.PAGE - 1, large.PAGE, 9 * large.PAGE - 64])
def test_memory_begins_at_a_large_page(nbytes: int) -> None:
    assert large.memory(nbytes).data_ptr() % large.PAGE == 0


def test_memory_that_would_waste_much_of_a_large_page_begins_a_cache_line() -> None:
    memory = large.memory(large.PAGE + large.PAGE // 2)
    assert memory.dtype == torch.uint8 and memory.data_ptr() % 64 == 0
