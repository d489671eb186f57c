"""Which build of the kernels is used: the processor's best, or the best that all ranks have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ops.builds import BUILDS, needs_kernels
from weaveinf.ops import native

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    native.agree([native.abilities()])
    assert native.isa == BUILDS[0]


def test_the_best_build_is_chosen() -> None:
    assert native.isa == BUILDS[0] and native.lib is not None and native.reason == ""


def test_ranks_keep_to_what_all_can_run() -> None:
    native.agree([BUILDS, BUILDS[-1:], [*BUILDS[-1:], "onednn"]])
    assert native.isa == BUILDS[-1] and not native.onednn
    native.agree([BUILDS, []])
    assert native.lib is None and native.isa == "torch" and "slower" in native.reason


def test_onednn_multiplies_where_it_is_the_fastest_that_all_have() -> None:
    native.agree([[*BUILDS, "onednn", "matrix"], [*BUILDS, "onednn"]])
    assert not native.onednn
    native.agree([[*BUILDS, "onednn", "matrix"]] * 2)
    assert native.onednn == native.ONEDNN
    native.agree([["onednn"], [*BUILDS, "onednn"]])
    assert native.onednn == native.ONEDNN


def test_a_build_that_does_not_load_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(native, "load", broken)
    native.agree([BUILDS])
    assert native.lib is None and "undefined symbol" in native.reason and "\n" not in native.reason
    monkeypatch.undo()
