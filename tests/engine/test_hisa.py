"""HISA in the whole engine against transformers, whose indexer is made to choose by HISA's definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer, apply_rotary_pos_emb

from tests.engine.harness import complete, near_ties, with_engines
from tests.engine.test_parity import GREEDY, LENGTH, all_ways, over_sockets, prompts
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from tests.selectors.oracle import chosen
from weaveinf.comm.choose import make_seam
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.selectors.hisa import Hisa
from weaveinf.weave import weaver

SETTINGS = Hisa(block=16, blocks=3, dense_below=0)


def by_definition(
    self: Any, x: Tensor, latents: Tensor, rotary: tuple[Tensor, Tensor], *rest: Any, **kwargs: Any
) -> Tensor:
    """The forward pass of transformers' indexer on whole sequences."""
    q = self.wq_b(latents).unflatten(-1, (self.n_heads, self.head_dim))
    k = self.k_norm(self.wk(x)).unsqueeze(2)
    turned = [
        each.split([self.qk_rope_head_dim, self.head_dim - self.qk_rope_head_dim], -1) for each in (q, k)
    ]
    rotated = apply_rotary_pos_emb(turned[0][0], turned[1][0], *rotary, unsqueeze_dim=2)
    q, k = (torch.cat([r, pair[1]], -1)[0] for r, pair in zip(rotated, turned, strict=True))
    weights = self.weights_proj(x)[0]
    out = torch.zeros(1, len(q), min(self.index_topk, len(q)), dtype=torch.int32)
    for t in range(len(q)):
        best = chosen(q[t], weights[t], k[: t + 1, 0], self.index_topk, SETTINGS.block, SETTINGS.blocks)
        out[0, t, : len(best)] = torch.tensor(best)
    return out


def on_ranks(
    ranks: Ranks, path: str, how: str, use: Any = all_ways, selector: Hisa | None = SETTINGS
) -> dict[str, list[list[int]]] | None:
    config = EngineConfig(
        model=path,
        dtype="float32",
        selector=selector,
        kv_cache_gib=0.01,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        weave="off" if how == "whole" else "on",
    )
    with mock.patch.object(weaver, "make_seam", over_sockets if "sockets" in how else make_seam):
        result: dict[str, list[list[int]]] | None = with_engines(ranks, config, use, how)
    return result


@pytest.mark.parametrize(("size", "how"), [(1, "whole"), (2, "woven over sockets")])
def test_greedy_tokens_are_those_of_the_definition(tmp_path: Path, size: int, how: str) -> None:
    model = make_checkpoint(tmp_path, "deepseek_v32")
    alone = Ranks.single(torch.device("cpu"))
    if size == 1:
        ways = on_ranks(alone, str(tmp_path), how)
    else:
        ways = pool(size).run(on_ranks, str(tmp_path), how)[0]
    assert ways is not None
    with mock.patch.object(DeepseekV32Indexer, "forward", by_definition):
        seen = {
            (*prompt, *tokens)
            for out in ways.values()
            for prompt, tokens in zip(prompts(), out, strict=False)
        }
        ties = sum(near_ties(model, list(all_of[:-LENGTH]), list(all_of[-LENGTH:])) for all_of in seen)
    assert ties <= LENGTH * len(seen) / 100
    # The choice of blocks is felt: without it, other tokens come.
    with pytest.raises(AssertionError):
        for all_of in seen:
            near_ties(model, list(all_of[:-LENGTH]), list(all_of[-LENGTH:]))


def with_and_without(fresh: Any, how: str) -> dict[str, list[float]]:
    """Log-probabilities of answers to prompts that share their beginnings, with the method's own budget, then
    without blocks."""
    engine, tokens = fresh(), [token for prompt in prompts() for token in prompt]
    asked = [tokens[:100], [*tokens[:90], 1, 2, 3]]
    params = replace(GREEDY, max_tokens=8, logprobs=0)
    flat = replace(params, selector_budget=0 if engine.trace.selector else None)
    found = {}
    for name, own in (("own", params), ("flat", flat)):
        found[name] = [one.logprob for r in complete(engine, asked, own) for one in r.logprobs]
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_with_room_for_all_or_without_blocks_it_is_the_indexer_alone(tmp_path: Path, size: int) -> None:
    """Also behind requests that looked at blocks first, and began alike."""
    make_checkpoint(tmp_path, "deepseek_v32")

    def run(selector: Hisa | None) -> dict[str, list[float]]:
        args = (str(tmp_path), "whole", with_and_without, selector)
        alone = Ranks.single(torch.device("cpu"))
        found: Any = on_ranks(alone, *args) if size == 1 else pool(size).run(on_ranks, *args)[0]
        return found

    want = pytest.approx(run(None)["own"], abs=1e-5)
    all_of_it, some = run(Hisa(block=16, blocks=8, dense_below=0)), run(SETTINGS)
    assert all(tokens == want for tokens in (all_of_it["own"], all_of_it["flat"], some["flat"]))
    assert some["own"] != want
