"""Sampling parameters refuse what cannot be meant; requests keep their tokens."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaveinf.engine.request import (
    CompletionOutput,
    Request,
    RequestOutput,
    SamplingParams,
    make_requests,
    mix_seed,
)

BAD = {
    "temperature": [-0.1, 101, math.nan, math.inf, True, "1", None, Decimal(1), 10**400],
    "top_p": [0, -0.5, 1.01, math.nan, True, None],
    "top_k": [-2, 1.5, True, 2**31, None],
    "min_p": [-0.01, 1.01, math.nan, False],
    "repetition_penalty": [0, -1, math.inf, math.nan, 101],
    "frequency_penalty": [-2.1, 2.1, math.nan, True],
    "presence_penalty": [-2.1, 2.1, math.nan, True],
    "seed": [2**64, -(2**63) - 1, 1.0, True],
    "stop": ["", ["a", ""], ["a"] * 17, 5, [5], "x" * 1025, {"a": 1}],
    "stop_token_ids": [[-1], [1.5], "12", 3, [True], [2**31], range(1025)],
    "ignore_eos": [1, "yes", None],
    "max_tokens": [0, -1, 1.5, True, 2**31],
    "min_tokens": [-1, 17, True, 1.0],
    "n": [0, 17, True, None],
    "logprobs": [-1, 21, True, 1.5],
    "prompt_logprobs": [-1, 21, True],
    "logit_bias": [
        {1: 101},
        {1: -101},
        {1: math.nan},
        {-1: 1},
        {"1": 1},
        {1: True},
        [1],
        dict.fromkeys(range(1025), 1),
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.rstrip("s").replace("_", ".")) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_good_values_are_brought_into_one_form() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=-1,
        stop="end",
        stop_token_ids=[np.int64(7)],
        seed=2**64 - 1,
        logit_bias={np.int64(3): 1},
        max_tokens=None,
        min_tokens=20,
    )
    assert params.temperature == 0.5
    assert params.top_k == 0
    assert params.stop == ("end",)
    assert params.stop_token_ids == (7,)
    assert params.logit_bias == {3: 1.0}
    assert type(params.temperature) is float
    assert not params.needs_token_counts
    assert SamplingParams(presence_penalty=0.1).needs_token_counts


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.data())
def test_tokens_are_those_of_prompt_and_output_together(
    prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    request = Request(0, prompt, SamplingParams(), 0, output_token_ids=output)
    start = data.draw(st.integers(0, request.num_known))
    stop = data.draw(st.integers(start, request.num_known))
    assert request.tokens(start, stop) == (prompt + output)[start:stop]


def test_n_samples_differ_by_seed_alone() -> None:
    requests = make_requests(5, (1, 2), SamplingParams(n=3, seed=-4, prompt_logprobs=0), 10, 99)
    assert [request.id for request in requests] == [5, 6, 7]
    assert [request.index for request in requests] == [0, 1, 2]
    assert len({request.seed for request in requests}) == 3
    assert all(request.prompt_token_ids == [1, 2] for request in requests)
    # One of them says all there is to say of the prompt.
    assert [request.prompt_logprobs for request in requests] == [[None, None], None, None]
    again = make_requests(0, [1, 2], SamplingParams(seed=-4), 10, 98)
    assert again[0].seed == requests[0].seed
    unnamed = [make_requests(0, [1, 2], SamplingParams(), 10, f)[0].seed for f in (98, 99)]
    assert unnamed[0] != unnamed[1]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 15))
def test_mixed_seeds_fit_an_int64(seed: int, index: int) -> None:
    assert 0 <= mix_seed(seed, index) < 2**63


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        ("text", "empty"),
        ([1, 10], "token id 10, outside 0 to 9"),
        ([1, -1], "token id -1, outside 0 to 9"),
        ([1, 2**70], "flat list"),
        ([1.5], "flat list"),
        ([[1], [2]], "flat list"),
        ([[1], [2, 3]], "flat list"),
        (["a"], "flat list"),
        ([True], "flat list"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_requests(0, prompt, SamplingParams(), 10, 0)


@pytest.mark.parametrize("params", [{"stop_token_ids": [10]}, {"logit_bias": {10: 1}}])
def test_ids_outside_the_vocabulary_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(params))} holds 10"):
        make_requests(0, [1], SamplingParams(**params), 10, 0)


def test_the_first_sample_is_the_output_s_face() -> None:
    samples = [CompletionOutput(0, "a", [1], "stop", 1), CompletionOutput(1, "b", [2], "length")]
    output = RequestOutput("p", [9], samples)
    assert (output.text, output.token_ids, output.finish_reason) == ("a", [1], "stop")
    assert (output.stop_reason, output.logprobs) == (1, None)
