"""The whole engine against transformers: families, alone, batched, chunked, with prefix hits, preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.engine.harness import complete, near_ties, with_engines
from tests.models.harness import FAMILIES, make_checkpoint
from tests.ranks import pool
from weaveinf.comm.choose import make_seam
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams
from weaveinf.weave import weaver

LENGTH = 64
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(0, 61, (33,), generator=generator).tolist()
    lengths = (1, 2, 7, 16, 17, 40)
    own = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    return [*own, [*shared, 5], [*shared, 9, 11]]


def all_ways(fresh: Any, how: str) -> dict[str, list[list[int]]]:
    """Greedy tokens of the prompts in every way in which an engine may come to run them."""
    ways = {}
    alone = fresh(max_num_seqs=1)
    ways["alone"] = [complete(alone, [p], GREEDY)[0].output_token_ids for p in prompts()[:3]]
    batched = fresh()
    ways["batched"] = [r.output_token_ids for r in complete(batched, prompts(), GREEDY)]
    again = complete(batched, prompts(), GREEDY)
    assert sum(r.num_cached for r in again) >= 3 * 32
    ways["prefix hits"] = [r.output_token_ids for r in again]
    chunked = fresh(max_num_batched_tokens=13, max_num_seqs=5)
    ways["chunked"] = [r.output_token_ids for r in complete(chunked, prompts(), GREEDY)]
    short = fresh(num_pages=14)
    preempted = complete(short, prompts(), GREEDY)
    assert short.scheduler.num_preemptions > 0
    steps = short.trace.steps
    assert (steps["woven"] > steps.total() / 2) == ("woven" in how)
    ways["preempted"] = [r.output_token_ids for r in preempted]
    return ways


def over_sockets(ranks: Ranks, rows: int, hidden: int, dtype: torch.dtype) -> CollectiveSeam:
    return CollectiveSeam(ranks, rows, hidden, dtype, "the test wants it")


def on_ranks(ranks: Ranks, path: str, how: str) -> dict[str, list[list[int]]] | None:
    config = EngineConfig(
        model=path,
        dtype="float32",
        kv_cache_gib=0.01,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        weave="off" if how == "whole" else "on",
    )
    with mock.patch.object(weaver, "make_seam", over_sockets if "sockets" in how else make_seam):
        result: dict[str, list[list[int]]] | None = with_engines(ranks, config, all_ways, how)
    return result


@pytest.mark.parametrize(
    ("size", "how"), [(1, "whole"), (2, "whole"), (2, "woven over sockets"), (4, "whole"), (4, "woven")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, family: str, size: int, how: str) -> None:
    if size == 4 and family not in ("llama", "qwen3_moe"):
        pytest.skip("four ranks: one dense family and one mixture stand for all")
    model = make_checkpoint(tmp_path, family)
    if size == 1:
        ways = on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), how)
    else:
        ways = pool(size).run(on_ranks, str(tmp_path), how)[0]
    assert ways is not None
    ties = total = 0
    for outputs in ways.values():
        for prompt, tokens in zip(prompts(), outputs, strict=False):
            assert len(tokens) == LENGTH
            ties += near_ties(model, prompt, tokens)
            total += LENGTH
    assert ties <= total / 100
