"""What is DeepSeek's own, beside the logits of `test_families`: the indexer, the routing, more layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.harness import INDEXED, Lockstep, make_checkpoint
from tests.models.test_families import TOKENS
from weaveinf.models import indexer
from weaveinf.models.config import ModelConfig
from weaveinf.models.indexer import KEYS
from weaveinf.ops import index
from weaveinf.ops.moe import route_in_groups

ROPE = INDEXED["qk_rope_head_dim"]
Found = list[tuple[Tensor, Tensor]]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Found:
    """What the indexers choose, in their order."""
    found: Found = []

    def noted(*args: Any) -> tuple[Tensor, Tensor]:
        found.append(index.choose(*args))
        return found[-1]

    monkeypatch.setattr(indexer, "index", type("Noted", (), {**vars(index), "choose": staticmethod(noted)}))
    return found


@pytest.mark.parametrize(("family", "interleaved"), [("deepseek_v32", False), ("glm_moe_dsa", True)])
def test_which_channels_of_the_indexer_turn_together(tmp_path: Path, family: str, interleaved: bool) -> None:
    """Halves in DeepSeek's, neighbours in GLM's: the first layer's cached keys, by the formula in float64."""
    theirs = make_checkpoint(tmp_path, family)
    ours = Lockstep(tmp_path)
    ours.step((0, TOKENS, 1))
    layer = theirs.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(theirs.model.embed_tokens(torch.tensor(TOKENS)))
        k = layer.self_attn.indexer.k_norm(layer.self_attn.indexer.wk(x)).double()
    angles = torch.arange(len(TOKENS))[:, None] * 1e4 ** (-torch.arange(0, ROPE, 2).double() / ROPE)
    turns = torch.polar(torch.ones_like(angles), angles)

    def turned(neighbours: bool) -> Tensor:
        pairs = k[:, :ROPE].unflatten(1, (-1, 2) if neighbours else (2, -1))
        both = torch.complex(*pairs.unbind(-1 if neighbours else 1)) * turns
        return torch.cat([both.real, both.imag, k[:, ROPE:]], 1).float()

    (pool,) = [
        attention.indexer.keys.values
        for attention, _ in ours.models[0].chain[1:2]  # type: ignore[attr-defined]
    ]
    at = torch.arange(len(TOKENS))
    pages = torch.tensor(ours.tables[0])[at // ours.page_size]
    got = pool.flatten(0, 1)[pages * ours.page_size + at % ours.page_size]
    torch.testing.assert_close(got, turned(interleaved), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, turned(not interleaved), atol=0.1)


def test_rows_that_may_read_all_read_as_without_an_indexer(tmp_path: Path, choices: Found) -> None:
    """Bit for bit, however wide the choice could be; and all ranks choose the same."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    make_checkpoint(tmp_path / "a", "deepseek_v32", index_topk=len(TOKENS))
    make_checkpoint(tmp_path / "b", "deepseek_v32", index_topk=4096)
    first, second = (Lockstep(tmp_path / name, 2).step((0, TOKENS, 40)) for name in "ab")
    assert torch.equal(first, second) and not choices
    make_checkpoint(tmp_path / "b", "deepseek_v32", index_topk=8)
    assert not torch.allclose(first, Lockstep(tmp_path / "b", 2).step((0, TOKENS, 40)), atol=1e-2)
    assert len(choices) == 2 * 3
    for one, other in zip(choices[::2], choices[1::2], strict=True):
        assert all(map(torch.equal, one, other))


def test_eight_bit_keys_choose_nearly_the_same(tmp_path: Path, choices: Found) -> None:
    make_checkpoint(tmp_path, "deepseek_v32")
    models = [Lockstep(tmp_path, index_keys=kind) for kind in ("exact", "fp8")]
    assert [m.models[0].pool_specs[1].dtype for m in models] == [torch.float32, index.FP8]
    assert models[1].models[0].pool_specs[1].name == KEYS
    logits = [model.step((0, TOKENS, 40)) for model in models]
    torch.testing.assert_close(logits[0][:16], logits[1][:16], rtol=0, atol=0)  # rows that read all
    assert logits[1].isfinite().all()
    exact, rounded = choices[0][0], choices[3][0]  # of the first layer, where what comes in is the same
    same = [len({*a} & {*b}) / len(a) for a, b in zip(exact.tolist(), rounded.tolist(), strict=True)]
    assert sum(same) / len(same) > 0.9


def test_further_layers_are_not_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    want = Lockstep(tmp_path).step((0, TOKENS, 40))
    file = tmp_path / "model.safetensors"
    more = {"model.layers.3.eh_proj.weight": torch.zeros(2), "model.layers.3.enorm.weight": torch.zeros(2)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert torch.equal(Lockstep(tmp_path).step((0, TOKENS, 40)), want)


@pytest.mark.parametrize("q_rank", [20, None])
def test_how_many_weights_its_attention_has(tmp_path: Path, q_rank: int | None) -> None:
    theirs = make_checkpoint(tmp_path, "deepseek_v3", q_lora_rank=q_rank)
    count = sum(p.numel() for p in theirs.model.layers[0].self_attn.parameters() if p.dim() == 2)
    latents = ModelConfig.from_path(tmp_path).latents
    assert latents is not None and latents.weights(48, 4) == count


def test_routing_in_groups() -> None:
    """By definition, a row at a time; ties to the lower group and expert."""
    logits, bias = torch.randint(-2, 3, (50, 12)).float(), torch.randint(-1, 2, (12,)) / 4
    weights, ids = route_in_groups(logits, bias, 3, 4, 2, True, 2.5)
    for row, got, weight in zip(logits.sigmoid(), ids.tolist(), weights, strict=True):
        wanted = (row + bias).tolist()
        best = [sum(sorted(wanted[g : g + 3])[1:]) for g in range(0, 12, 3)]
        groups = sorted(range(4), key=lambda g: (-best[g], g))[:2]
        own = [e for e in range(12) if e // 3 in groups]
        assert got == sorted(own, key=lambda e: (-wanted[e], e))[:3]
        torch.testing.assert_close(weight, row[got] / row[got].sum() * 2.5)
    alone, _ = route_in_groups(logits, bias, 3, 4, 2, False, 1.0)
    torch.testing.assert_close(alone, logits.sigmoid().gather(1, ids.long()))
