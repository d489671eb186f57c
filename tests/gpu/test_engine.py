"""The whole engine on a GPU against transformers, as tests/engine/test_parity.py is on CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import near_ties, with_engines
from tests.engine.test_parity import LENGTH, all_ways, prompts
from tests.models.harness import FAMILIES, make_checkpoint
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    model = make_checkpoint(tmp_path, family)
    config = EngineConfig(
        model=str(tmp_path),
        device="cuda",
        dtype="float32",
        kv_cache_gib=0.01,
        max_num_seqs=8,
        max_num_batched_tokens=128,
    )
    ways = with_engines(Ranks.single(torch.device("cuda", 0)), config, all_ways, "whole")
    ties = sum(
        near_ties(model, prompt, tokens)
        for outputs in ways.values()
        for prompt, tokens in zip(prompts(), outputs, strict=False)
    )
    assert ties <= LENGTH * sum(map(len, ways.values())) / 100
