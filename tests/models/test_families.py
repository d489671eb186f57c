"""Every family and variant against transformers: logits, greedy tokens, any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.harness import FAMILIES, SMALL, Lockstep, make_checkpoint

VOCAB = SMALL["vocab_size"]
TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(5)).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DEEP_YARN = YARN | {"rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.3}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Each with one number of ranks; 4 ranks share 2 KV heads, so that each is held twice.
VARIANTS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, 4),
    ("llama", {"num_key_value_heads": 1}, 2),
    ("llama", {"attention_bias": True, "mlp_bias": True}, 1),
    ("llama", {"attention_bias": True, "mlp_bias": True}, 4),
    ("llama", {"vocab_size": 5, "tie_word_embeddings": True}, 4),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}, 1),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 2),
    ("mistral", {"sliding_window": None}, 2),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, 2),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN | {"rope_theta": 1e4}}, 4),
    ("qwen3", {"attention_bias": True}, 4),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        1,
    ),
    ("mixtral", {"sliding_window": 9}, 2),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}, 4),
    ("qwen3_moe", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8}, 1),
    ("qwen3_moe", {"mlp_only_layers": [1]}, 2),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2}, 2),
    ("deepseek_v3", {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}, 2),
    ("deepseek_v3", {"rope_parameters": DEEP_YARN, "n_group": 1, "topk_group": 1}, 1),
    ("deepseek_v32", {"attention_bias": True, "mlp_layer_types": ["sparse", "dense", "sparse"]}, 2),
    ("deepseek_v32", {"rope_parameters": DEEP_YARN, "index_topk": 5}, 1),
    ("deepseek_v32", {"index_topk": 64, "first_k_dense_replace": 0}, 2),
    ("glm_moe_dsa", {"indexer_types": ["full", "full", "shared"], "rms_norm_eps": 1e-2}, 2),
    ("glm_moe_dsa", {"indexer_types": None, "attention_bias": True}, 1),
]
CASES = [(family, {}, size) for family in FAMILIES for size in (1, 2, 4)] + VARIANTS


def reference(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def close(got: Tensor, want: Tensor) -> None:
    """Equal up to float32 rounding through a few layers: some tens of ulps of the largest logit."""
    tolerance = 64 * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(got[:, : want.shape[1]], want, rtol=0, atol=tolerance)
    assert (got[:, want.shape[1] :] == -torch.inf).all()


@pytest.mark.parametrize(("family", "changes", "size"), CASES)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any], size: int
) -> None:
    theirs = make_checkpoint(tmp_path, family, **changes)
    ids = [token % theirs.config.vocab_size for token in TOKENS]
    first, second = reference(theirs, ids), reference(theirs, ids[7:20])

    close(Lockstep(tmp_path, size).step((0, ids, len(ids))), first)

    # Chunks, some without any logits, beside a second sequence; then single tokens of both.
    ours = Lockstep(tmp_path, size)
    assert ours.step((0, ids[:9], 0)).shape[0] == 0
    close(ours.step((0, ids[9:22], 2), (1, ids[7:12], 5)), torch.cat((first[20:22], second[:5])))
    close(ours.step((1, ids[12:19], 1), (0, ids[22:38], 0)), second[11:12])
    close(ours.step((0, ids[38:39], 1), (1, ids[19:20], 1)), torch.stack((first[38], second[12])))
    close(ours.step((0, ids[39:], 1)), first[39:])


@pytest.mark.parametrize(("family", "size"), [(f, (2, 1, 4)[i % 3]) for i, f in enumerate(FAMILIES)])
def test_sixty_four_greedy_tokens_are_those_of_transformers(tmp_path: Path, family: str, size: int) -> None:
    theirs = make_checkpoint(tmp_path, family)
    ours = Lockstep(tmp_path, size)
    written = [TOKENS[:13], TOKENS[20:25]]
    logits = ours.step(*((s, tokens, 1) for s, tokens in enumerate(written)))
    for _ in range(64):
        for tokens, row in zip(written, logits, strict=True):
            tokens.append(int(row.argmax()))
        logits = ours.step(*((s, tokens[-1:], 1) for s, tokens in enumerate(written)))
    for tokens in written:
        want = reference(theirs, tokens[:-1])[-64:]
        best = want.topk(2).values
        tie = best[:, 0] - best[:, 1] < 1e-4 * (want.max(1).values - want.min(1).values)
        assert tie.sum() <= 1
        same = want.argmax(1) == torch.tensor(tokens[-64:])
        assert (same | tie).all()


@pytest.mark.parametrize(("family", "size"), [("llama", 2), ("qwen3", 1), ("qwen2", 4), ("deepseek_v3", 2)])
def test_bfloat16_is_as_near_to_the_truth_as_transformers(tmp_path: Path, family: str, size: int) -> None:
    model = make_checkpoint(tmp_path, family)
    model = model.bfloat16()
    rounded = reference(model, TOKENS)
    exact = reference(model.float(), TOKENS)  # the same bfloat16 weights
    ours = Lockstep(tmp_path, size, torch.bfloat16).step((0, TOKENS, len(TOKENS)))[:, :VOCAB]
    error, theirs = ((x - exact).square().mean().sqrt().item() for x in (ours, rounded))
    assert error < 1.5 * theirs
    assert error < 8 * torch.finfo(torch.bfloat16).eps * exact.std().item()


def test_dynamic_rope_is_decided_once_for_the_longest_context(tmp_path: Path) -> None:
    """Within the trained length plain; beyond it transformers' own at exactly `max_model_len`."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    theirs = make_checkpoint(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=24)
    close(Lockstep(tmp_path).step((0, TOKENS[:24], 24)), reference(theirs, TOKENS[:24]))
    close(Lockstep(tmp_path, max_model_len=40).step((0, TOKENS, 40)), reference(theirs, TOKENS))


def test_the_older_spelling_of_rope_is_the_same_model(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    file.write_text(json.dumps(config))
    close(Lockstep(tmp_path).step((0, TOKENS, 40)), reference(theirs, TOKENS))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_expert_tensors_are_read_too(tmp_path: Path, family: str) -> None:
    theirs = make_checkpoint(tmp_path, family, save={"save_original_format": False})
    close(Lockstep(tmp_path, 2).step((0, TOKENS, 40)), reference(theirs, TOKENS))


def test_a_head_of_its_own_counts_though_the_config_ties_it(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    close(Lockstep(tmp_path, 2).step((0, TOKENS, 40)), reference(theirs, TOKENS))
