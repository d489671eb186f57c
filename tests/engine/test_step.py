"""A step survives its journey, and nothing else passes for one."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaveinf.engine.step import MAGIC, PER_SEQUENCE, Admission, Step

HEADER = 13
words = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(width=64)


def _array(draw: st.DrawFn, elements: st.SearchStrategy, dtype: type, size: int) -> np.ndarray:
    count = int(size)
    return np.array(draw(st.lists(elements, min_size=count, max_size=count)), dtype)


@st.composite
def admissions(draw: st.DrawFn) -> Admission:
    biased = draw(st.integers(0, 3))
    small = st.integers(0, 3)
    return Admission(
        draw(st.integers(0, 100)),
        draw(words),
        *[draw(floats) for _ in range(2)],
        draw(words),
        *[draw(floats) for _ in range(4)],
        *[draw(words) for _ in range(3)],
        banned_ids=_array(draw, words, np.int64, draw(small)),
        bias_ids=_array(draw, words, np.int64, biased),
        bias_values=_array(draw, floats, np.float64, biased),
        prompt_token_ids=_array(draw, words, np.int64, draw(small)),
        output_token_ids=_array(draw, words, np.int64, draw(small)),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = []
    natural = st.integers(0, 2**31 - 1)
    for _ in range(draw(st.integers(0, 4))):
        by_reference = draw(st.booleans())
        query = 1 if by_reference else draw(st.integers(1, 5))
        logits = draw(st.sampled_from([0, 1, query]))
        targets = draw(st.sampled_from([0, query])) if logits == query else 0
        position = draw(natural) if logits and draw(st.booleans()) else -1
        row = (draw(natural), draw(natural), query, draw(natural), logits, targets)
        rows.append((*row, draw(st.integers(0, 3)), position, by_reference))
    table = np.array(rows, np.int32).reshape(-1, len(PER_SEQUENCE)).T
    columns = dict(zip(PER_SEQUENCE, table, strict=True))
    columns["by_reference"] = columns["by_reference"].astype(np.bool_)
    by_value = columns["num_query"][~columns["by_reference"]].sum()
    masked = [i for i in range((columns["output_position"] >= 0).sum()) if draw(st.booleans())]
    each = draw(st.integers(1, 2)) if masked else 0
    return Step(
        number=draw(natural),
        admissions=draw(st.lists(admissions(), max_size=2)),
        **columns,
        token_ids=_array(draw, words, np.int64, by_value),
        new_pages=_array(draw, words, np.int64, columns["num_new_pages"].sum()),
        targets=_array(draw, words, np.int64, columns["num_targets"].sum()),
        released=_array(draw, words, np.int64, draw(st.integers(0, 3))),
        masked=np.array(masked, np.int64),
        masks=_array(draw, words, np.int64, len(masked) * each).reshape(len(masked), each),
    )


def _same(a: object, b: object) -> None:
    assert type(a) is type(b)
    for field in fields(a):  # type: ignore[arg-type]
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "admissions":
            assert len(left) == len(right)
            for one, other in zip(left, right, strict=True):
                _same(one, other)
        else:
            assert np.asarray(left).dtype == np.asarray(right).dtype
            np.testing.assert_array_equal(left, right)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_unpack_is_the_inverse_of_pack(step: Step) -> None:
    packed = step.pack()
    assert packed.dtype == np.int64
    _same(Step.unpack(packed), step)


@settings(max_examples=150, deadline=None)
@given(steps(), st.data())
def test_a_cut_or_padded_step_is_refused(step: Step, data: st.DataObject) -> None:
    packed = step.pack()
    length = data.draw(st.integers(0, len(packed) + 3).filter(lambda n: n != len(packed)))
    changed = np.resize(packed, length)
    with pytest.raises(ValueError, match="packed step"):
        Step.unpack(changed)
    if length > 10:  # a length that agrees does not help
        changed[1] = length
        with pytest.raises(ValueError, match="packed step"):
            Step.unpack(changed)


@settings(max_examples=300, deadline=None)
@given(steps(), st.data())
def test_a_changed_word_is_refused_or_harmless(step: Step, data: st.DataObject) -> None:
    """Whatever a header or a row is changed to, nothing but ValueError comes, and what passes is
    whole: it packs to the very same words."""
    packed = step.pack()
    flat = (step.token_ids, step.new_pages, step.targets, step.released)
    masked = HEADER + len(PER_SEQUENCE) * step.num_seqs + sum(map(len, flat))
    places = [*range(masked - sum(map(len, flat))), *range(masked, masked + len(step.masked))]
    packed[data.draw(st.sampled_from(places))] = data.draw(words | st.integers(-2, 9))
    try:
        passed = Step.unpack(packed)
    except ValueError as error:
        assert "packed step" in str(error)
    else:
        np.testing.assert_array_equal(passed.pack(), packed)


@settings(max_examples=100, deadline=None)
@given(st.lists(words, max_size=30), st.booleans())
def test_garbage_is_refused(garbage: list[int], dressed: bool) -> None:
    array = np.array(garbage, np.int64)
    if dressed and len(array) >= HEADER:
        array[:2] = MAGIC, len(array)
        array[3:HEADER] = abs(array[3:HEADER] % 4)
        array[6] += 1
        array[HEADER : HEADER + 2] = -1  # a slot or position that cannot be
    with pytest.raises(ValueError, match="packed step"):
        Step.unpack(array)
    with pytest.raises(ValueError, match="packed step"):
        Step.unpack(array.astype(np.float64))


def test_what_a_step_counts() -> None:
    columns = {name: np.array([0, 1], np.int32) for name in PER_SEQUENCE}
    columns |= {"num_query": np.array([3, 1], np.int32), "num_logits": np.array([0, 1], np.int32)}
    columns["output_position"] = np.array([-1, 0], np.int32)
    columns["by_reference"] = np.array([False, True])
    flat = {name: np.zeros(n, np.int64) for name, n in (("token_ids", 3), ("new_pages", 1))}
    step = Step(number=0, admissions=[], **columns, **flat, targets=np.zeros(1, np.int64))
    assert (step.num_seqs, step.num_tokens, step.num_samples) == (2, 4, 1)
    _same(Step.unpack(step.pack()), step)
