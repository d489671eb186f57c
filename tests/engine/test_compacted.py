"""TokenSelect with compacted positions in the whole engine, on prompts far beyond the model's window, against
the algorithm written down plainly in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine import test_selectors
from tests.engine.harness import complete
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf import LLM
from weaveinf.comm.ranks import Ranks
from weaveinf.engine.request import SamplingParams
from weaveinf.selectors.tokenselect import CHUNK

BUDGET, SINKS, LOCAL = 40, 4, 20
WINDOW = SINKS + BUDGET + LOCAL + CHUNK
LENGTH = 8
LONGEST = 2100
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
SELECTOR = {
    "name": "tokenselect",
    "budget": BUDGET,
    "sinks": SINKS,
    "local": LOCAL,
    "threshold": 2.0,
    "positions": "compacted",
}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 144}
SCALED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 144}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "biases": ("qwen2", {}),
    "norms of heads": ("qwen3", {}),
    "llama3": ("llama", {"rope_parameters": SCALED}),
    "yarn": ("llama", {"rope_parameters": YARN}),
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(0, 61, (2000,), generator=generator).tolist()
    return [first, [*first[:1100], 7, 8, 9], first[:70], [3, 4]]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, D], cos and sin [rows, D]."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


class Oracle:
    """Logits of a request's rows from its prompt's last one on, of transformers' model in float64."""

    def __init__(self, model: Any, tokens: list[int], prompt: int) -> None:
        self.model, self.prompt, self.tokens = model, prompt, tokens
        ends = [*range(CHUNK, prompt, CHUNK), prompt]
        self.groups = [range(end - 1 - (end - 1) % CHUNK, end) for end in ends]
        self.groups += [range(p, p + 1) for p in range(prompt, len(tokens))]
        self.furthest = 0

    @torch.inference_mode()
    def logits(self) -> Tensor:
        x = self.model.model.embed_tokens(torch.tensor(self.tokens))
        self.cos, self.sin = (
            part[0] for part in self.model.model.rotary_emb(x[None], torch.arange(WINDOW)[None])
        )
        for layer in self.model.model.layers:
            x = x + layer.self_attn.o_proj(self.attention(layer.self_attn, layer.input_layernorm(x)))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = self.model.lm_head(self.model.model.norm(x[self.prompt - 1 :]))
        return logits

    def attention(self, block: Any, x: Tensor) -> Tensor:
        dim = self.model.config.head_dim
        q, k, v = (getattr(block, f"{which}_proj")(x).view(len(x), -1, dim) for which in "qkv")
        if hasattr(block, "q_norm"):
            q, k = block.q_norm(q), block.k_norm(k)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = torch.empty_like(q)
        for rows in self.groups:
            before = self.reads(q[rows.start : rows.stop], k, rows)
            at = torch.tensor([*before, *rows])
            own = torch.arange(len(before), len(at))
            self.furthest = max(self.furthest, len(at))
            keys = turned(k[at], self.cos[: len(at)], self.sin[: len(at)])
            queries = turned(q[rows.start : rows.stop], self.cos[own], self.sin[own])
            scores = torch.einsum("rhd,khd->hrk", queries, keys) * dim**-0.5
            scores = scores.masked_fill(torch.arange(len(at)) > own[:, None], -torch.inf)
            out[rows.start : rows.stop] = torch.einsum("hrk,khd->rhd", scores.softmax(-1), v[at])
        return out.flatten(1)

    def reads(self, q: Tensor, k: Tensor, rows: range) -> list[int]:
        """What the rows read of the tokens before them."""
        # An answer's row counts itself among what is local to it.
        seen = rows.start + (rows.start >= self.prompt)
        if seen <= SINKS + BUDGET + LOCAL:
            return list(range(rows.start))
        local = seen - LOCAL
        at = slice(LOCAL, LOCAL + len(rows))
        asks = turned(q, self.cos[at], self.sin[at]).mean(0)
        middle = k[SINKS:local] * self.cos[0, 0]
        votes = torch.einsum("hd,khd->hk", asks, middle).softmax(-1).sum(0).bfloat16()
        best = votes.argsort(descending=True, stable=True)[:BUDGET].sort().values + SINKS
        return [*range(SINKS), *best.tolist(), *range(local, rows.start)]


def ways(fresh: Any) -> dict[str, list[list[int]]]:
    alone = fresh(max_num_seqs=1)
    found = {"alone": [complete(alone, [p], GREEDY)[0].output_token_ids for p in prompts()]}
    batched = fresh()
    found["batched"] = [r.output_token_ids for r in complete(batched, prompts(), GREEDY)]
    again = complete(batched, prompts(), GREEDY)
    assert [r.num_cached for r in again[:2]] == [1536, 1024]
    found["prefix hits"] = [r.output_token_ids for r in again]
    chunked = fresh(max_num_batched_tokens=515, max_num_seqs=4)
    found["chunked"] = [r.output_token_ids for r in complete(chunked, prompts(), GREEDY)]
    with pytest.raises(ValueError, match="no request may read all"):
        batched.add([1, 2], SamplingParams(selector_budget=0))
    return found


def on_ranks(ranks: Ranks, path: str, weave: str) -> dict[str, list[list[int]]] | None:
    return test_selectors.on_ranks(ranks, path, SELECTOR, weave, ways, LONGEST)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_plain_algorithm(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    model = make_checkpoint(tmp_path, family, max_position_embeddings=WINDOW, **changes).double()
    got = on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), "off")
    assert got is not None
    ties = 0
    for prompt, tokens in zip(prompts(), got["alone"], strict=True):
        oracle = Oracle(model, [*prompt, *tokens[:-1]], len(prompt))
        logits = oracle.logits()
        short = logits.amax(1) - logits[torch.arange(LENGTH), tokens]
        assert (short < 1e-4 * (logits.amax(1) - logits.amin(1))).all(), short
        ties += int((short > 0).sum())
        assert oracle.furthest <= WINDOW
    assert ties <= 1
    want = got.pop("alone")
    more = ((2, "on"), (4, "off")) if name == "plain" else ((2, "off"),)
    for size, weave in ((1, "off"), *more):
        if size > 1:
            got = pool(size).run(on_ranks, str(tmp_path), weave)[0]
        for how, tokens in got.items():
            assert tokens == want, f"{size} ranks, weave {weave}: {how}"


def test_a_window_of_this_size_is_wanted(tmp_path: Path) -> None:
    """By the offline API, which looks at the settings before any rank begins."""
    make_checkpoint(tmp_path, "llama", max_position_embeddings=WINDOW)
    words = "tokenselect:" + ",".join(f"{key}={SELECTOR[key]}" for key in ("sinks", "local", "positions"))

    def llm(selector: str | None, longest: int = LONGEST) -> LLM:
        return LLM(str(tmp_path), selector=selector, max_model_len=longest, kv_cache_gib=0.01)

    with pytest.raises(ValueError, match=r"outside 1\.\.576.*positions=compacted"):
        llm(None)
    with pytest.raises(ValueError, match=r"outside 1\.\.576.*reads 577 at once"):
        llm(f"{words},budget={BUDGET + 1}")
    with pytest.raises(ValueError, match="must be one of original, compacted"):
        llm("tokenselect:positions=other", WINDOW)
    with llm(f"{words},budget={BUDGET}") as made:
        assert len(made.generate([prompts()[0]], GREEDY)[0].token_ids) == LENGTH
        with pytest.raises(ValueError, match="max_model_len is 2100"):
            made.generate([[1] * LONGEST], GREEDY)
    with llm(f"{words},budget=4096", WINDOW) as made:  # no request is longer than the window
        assert len(made.generate([prompts()[0][:500]], GREEDY)[0].token_ids) == LENGTH
