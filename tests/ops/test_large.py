"""Memory in large pages: where it lies, and that it is plain memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaveinf.ops import large


@pytest.mark.parametrize("nbytes", [1, 4096, large.PAGE - 1, 3 * large.PAGE // 2, 9 * large.PAGE - 64])
def test_memory_has_its_size_and_keeps_what_is_written(nbytes: int) -> None:
    first, second = large.memory(nbytes), large.memory(nbytes)
    first.fill_(3)
    second.fill_(5)
    assert first.shape == (nbytes,) and bool((first == 3).all()) and bool((second == 5).all())


def advised(begin: int, end: int) -> int:
    """Bytes of these addresses for which large pages were asked for."""
    found, start, stop = 0, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(number, 16) for number in first.split("-"))
        elif first == "VmFlags:" and "hg" in rest:
            found += max(0, min(stop, end) - max(start, begin))
    return found


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here")
@pytest.mark.parametrize(
    ("nbytes", "in_large"),
    [
        (large.PAGE - 1, large.PAGE),
        (large.PAGE, large.PAGE),
        (9 * large.PAGE - 64, 9 * large.PAGE),
        (2 * large.PAGE + 64, 2 * large.PAGE),
        (large.PAGE // 2, 0),
    ],
)
def test_large_pages_are_asked_for_where_they_waste_little(nbytes: int, in_large: int) -> None:
    memory = large.memory(nbytes)
    begin = memory.data_ptr()
    assert begin % (large.PAGE if in_large else 64) == 0
    assert advised(begin, begin + nbytes) == min(nbytes, in_large)
