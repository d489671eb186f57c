"""The planner: the executor's order, played; legal cuts; no plan that is predicted to lose."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaveinf.weave.plan import GAIN, Half, Planner, Span, Stage, cuts, play, predict, split


@dataclass
class Made:
    """Costs by simple laws: a fixed part and one by rows."""

    fixed: float = 0.05
    per_row: float = 0.001
    per_read: float = 1e-7
    seam_fixed: float = 0.02
    seam_per_row: float = 0.0005
    slow: tuple[float, float] = (1.1, 1.4)
    num_layers: int = 12
    row_block: int = 16
    seam_ctas: Sequence[int] = (0,)

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        share = {"embedding": 0.1, "attention": 0.6, "mlp": 1.0}[stage]
        return (
            share * (self.fixed + self.per_row * rows)
            + (stage == "attention") * self.per_read * rows * context
        )

    def seam(self, rows: int, seam_ctas: int) -> float:
        return self.seam_fixed + self.seam_per_row * rows

    def beside(self, rows: int, seam_ctas: int) -> tuple[float, float]:
        return self.slow

    def outside(self, rows: int, halves: int = 1) -> float:
        return 0.3


part = st.floats(0, 0.2)
made = st.builds(
    Made,
    fixed=part,
    per_row=st.floats(0, 0.002),
    seam_fixed=part,
    seam_per_row=st.floats(0, 0.002),
    slow=st.tuples(st.floats(1, 2), st.floats(1, 2)),
)
halves = st.lists(st.builds(Half, st.integers(1, 4000), st.floats(1, 4000)), min_size=1, max_size=2)


def of(spans: list[Span], half: int, seam: bool) -> list[Span]:
    return [span for span in spans if span.half == half and (span.what == "seam") == seam]


@given(made, halves)
def test_the_executors_order(costs: Made, halves: list[Half]) -> None:
    spans = play(costs, halves, (0, 0), 3)
    for half in range(len(halves)):
        blocks, seams = of(spans, half, seam=False), of(spans, half, seam=True)
        assert [block.what for block in blocks] == ["embedding"] + ["attention", "mlp"] * 3
        assert len(seams) == len(blocks)
        for block, seam in zip(blocks, seams, strict=True):
            assert seam.start >= block.end and seam.end >= seam.start
        for seam, following in zip(seams, blocks[1:], strict=False):
            assert following.start >= seam.end - 1e-9
    for kind in (True, False):  # seams one after another, blocks one after another, half by half
        line = [span for span in spans if (span.what == "seam") == kind]
        assert [span.half for span in line] == [*range(len(halves))] * 7
        for one, other in pairwise(line):
            assert other.start >= one.end - 1e-9


@given(halves)
def test_without_seams_it_is_the_sum_of_the_blocks(halves: list[Half]) -> None:
    costs = Made(seam_fixed=0.0, seam_per_row=0.0)
    expected = sum(
        costs.block("embedding", *half, 0)
        + costs.num_layers * (costs.block("attention", *half, 0) + costs.block("mlp", *half, 0))
        for half in halves
    )
    assert predict(costs, halves, (0, 0)) == pytest.approx(expected + costs.outside(0))


@given(halves)
def test_without_blocks_it_is_the_sum_of_the_seams(halves: list[Half]) -> None:
    costs = Made(fixed=0.0, per_row=0.0, per_read=0.0)
    expected = (2 * costs.num_layers + 1) * sum(costs.seam(half.rows, 0) for half in halves)
    assert predict(costs, halves, (0, 0)) == pytest.approx(expected + costs.outside(0))


@given(made, halves)
def test_layers_that_are_not_played_are_like_the_last_that_is(costs: Made, halves: list[Half]) -> None:
    played = play(costs, halves, (0, 0), costs.num_layers)[-1].end + costs.outside(0)
    assert predict(costs, halves, (0, 0)) == pytest.approx(played, rel=0.02)


def test_a_seam_under_a_block_costs_only_what_it_slows_down() -> None:
    costs = Made(slow=(1.0, 1.0))
    one = predict(costs, [Half(512, 100.0)], (0, 0))
    two = predict(costs, [Half(256, 100.0)] * 2, (0, 0))
    assert two < one
    spans = play(costs, [Half(256, 100.0)] * 2, (0, 0), 2)
    blocks = [span for span in spans if span.what != "seam"]
    # Seams are shorter than blocks: none is waited for after the embedding's.
    for one_block, other in pairwise(blocks[3:]):
        assert other.start == pytest.approx(one_block.end)


@given(st.integers(1, 100_000), st.sampled_from([1, 8, 16, 128]))
def test_cuts_are_multiples_from_a_third_to_two_thirds(rows: int, row_block: int) -> None:
    found = cuts(rows, row_block)
    assert found == sorted(set(found)) and len(found) <= 2 * rows.bit_length() + 1
    assert all(at % row_block == 0 and 0 < at < rows and rows <= 3 * at <= 2 * rows for at in found)
    if rows >= 6 * row_block:
        assert any(abs(at - rows / 2) <= row_block / 2 for at in found)


@given(st.integers(2, 5000), st.floats(1, 5000), st.floats(0, 1), st.data())
def test_halves_share_what_is_read(rows: int, context: float, share: float, data: st.DataObject) -> None:
    first, second = split(rows, context, share, at := data.draw(st.integers(1, rows - 1)))
    assert (first.rows, second.rows) == (at, rows - at)
    assert min(first.context, second.context) >= 0
    assert first.rows * first.context + second.rows * second.context == pytest.approx(rows * context)


def test_halves_of_a_prompt_and_of_equal_rows() -> None:
    assert split(1000, 500, 0.25, 400) == [Half(400, pytest.approx(200)), Half(600, pytest.approx(700))]
    assert split(1000, 500, 0.5, 400) == [Half(400, pytest.approx(500)), Half(600, pytest.approx(500))]


@given(made, st.integers(1, 5000), st.floats(1, 4000), st.floats(0, 1))
def test_no_plan_is_predicted_to_lose(costs: Made, rows: int, context: float, share: float) -> None:
    plan = Planner(costs).plan(rows, rows * context, share * rows * context)
    assert plan.whole_ms == pytest.approx(predict(costs, [Half(rows, context)], (0, 0)))
    if plan.cut:
        halves = split(rows, context, share, plan.cut)
        assert plan.woven_ms == pytest.approx(predict(costs, halves, plan.seam_ctas), rel=1e-6)
        assert plan.woven_ms <= GAIN * plan.whole_ms and plan.why == "predicted faster woven"
    else:
        assert plan.seam_ctas == (0, 0) and plan.why in ("too small to cut", "predicted slower woven")


def test_one_layer() -> None:
    costs = Made(num_layers=1)
    assert predict(costs, [Half(64, 10.0)], (0, 0)) == play(costs, [Half(64, 10.0)], (0, 0), 1)[-1].end + 0.3


def test_nothing_to_hide_is_not_cut() -> None:
    plan = Planner(Made(seam_fixed=0.0, seam_per_row=0.0)).plan(1024, 1024**2 / 2, 1024**2 / 8)
    assert plan.cut == 0 and plan.woven_ms > plan.whole_ms and plan.why == "predicted slower woven"
    assert Planner(Made()).plan(20, 200, 50).why == "too small to cut"


def test_a_new_shape_is_planned_in_two_milliseconds() -> None:
    measured = np.array([8, 32, 128, 256, 512, 1024, 2048, 4096]), np.arange(1.0, 9.0)

    class Measured(Made):
        def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
            return float(np.interp(rows, *measured))

        def seam(self, rows: int, seam_ctas: int) -> float:
            return float(np.interp(rows, *measured))

    planner, took = Planner(Measured()), []
    for rows in random.Random(0).sample(range(64, 4096), 50):
        began = time.perf_counter()
        planner.plan(rows, rows**2 / 2, rows**2 / 8)
        took.append(time.perf_counter() - began)
    assert min(took) < 2e-3, f"{1e3 * min(took):.2f} to {1e3 * max(took):.2f} ms"
