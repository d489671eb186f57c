"""Frequencies of every scaling against transformers; refusals of what nobody defined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from weaveinf.models.rope import Rope

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3,
    YARN,
    YARN | {"truncate": False},
    YARN | {"attention_factor": 0.7},
    YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    YARN | {"beta_fast": 16, "beta_slow": 2},
    YARN | {"beta_fast": 1e6, "beta_slow": 9e5},
]


def parse(rope: dict[str, Any], spelling: str = "rope_parameters", **raw: Any) -> Rope:
    return Rope.parse({spelling: rope, **raw}, 64, 4096, 10000.0, "config.json")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_and_magnitude(scaling: dict[str, Any], theta: float) -> None:
    rope = scaling | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=rope
    )
    for length in (4096, 10000):
        want, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
        ours = parse(rope)
        torch.testing.assert_close(ours.frequencies(length), want, rtol=1e-6, atol=0)
        table = ours.table(5, torch.device("cpu"))
        assert table.shape == (5, 64)
        angles = 3 * ours.frequencies(5)
        rows = torch.cat((angles.cos(), angles.sin())) * magnitude
        torch.testing.assert_close(table[3], rows, rtol=1e-5, atol=1e-6)


def test_both_spellings_and_their_defaults() -> None:
    new = parse(LLAMA3 | {"rope_theta": 5e5})
    old = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    assert parse(old, "rope_scaling", rope_theta=5e5) == new
    assert Rope.parse({}, 64, 4096, 7.0, "").theta == 7.0
    assert Rope.parse({"rope_scaling": None, "rope_theta": 9.0}, 64, 4096, 7.0, "").theta == 9.0
    assert parse({"rope_type": "yarn", "factor": 2.0}).original == 4096
    assert parse(YARN, original_max_position_embeddings=256).original == 256


def test_how_far_each_scaling_reaches() -> None:
    def reach(rope: dict[str, Any]) -> tuple[int, int]:
        parsed = parse(rope)
        return parsed.default_positions, parsed.max_positions

    assert reach({}) == reach(LLAMA3) == reach(YARN) == (4096, 4096)
    assert reach({"rope_type": "yarn", "factor": 4.0}) == (16384, 16384)
    assert reach({"rope_type": "linear", "factor": 2.0}) == (8192, 8192)
    assert reach({"rope_type": "dynamic", "factor": 2.0}) == (4096, 8192)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope"}, "rope type 'longrope' is unknown"),
        ({"type": "mrope", "mrope_section": [1]}, "rope type 'mrope' is unknown"),
        ({"rope_type": "linear"}, "rope factor=None"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope factor=nan"),
        ({"rope_type": "linear", "factor": True}, "rope factor=True"),
        ({"rope_type": "default", "mrope_section": [1]}, "no parameter 'mrope_section'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "below high_freq_factor"),
        ({"full_attention": {"rope_type": "default"}}, "one flat object"),
        ([1], "one flat object"),
    ],
)
def test_what_is_refused(rope: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(rope)
