"""What a config.json may say, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.harness import FAMILIES, SMALL
from weaveinf.models.config import ModelConfig
from weaveinf.models.registry import families

OFTEN = {"indexer_types": None, "index_topk_freq": 2}
NAMES = {family.model_type: name for name, family in families().items()}


def parse(family: str = "llama", **changes: Any) -> ModelConfig:
    raw = {"architectures": [NAMES[family]], **SMALL, **FAMILIES[family], **changes}
    return ModelConfig.from_dict({key: value for key, value in raw.items() if value != "absent"})


def test_the_families_are_found_by_their_files() -> None:
    assert sorted(NAMES) == sorted(FAMILIES)
    assert parse(architectures="absent", model_type="qwen2").architecture == "Qwen2ForCausalLM"
    assert parse(architectures=["New", "MistralForCausalLM"]).architecture == "MistralForCausalLM"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "'Gemma2ForCausalLM' is not supported: it norm"),
        ({"architectures": ["Olmo2ForCausalLM"]}, "before the residual add"),
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'.*LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list"),
        (
            {"auto_map": {"AutoModel": "x.Y"}},
            "auto_map.*never run.*use a model of a known family, as 'llama'",
        ),
        ({"auto_map": {"AutoModel": "x.Y"}, "model_type": "my_llama"}, "model_type='my_llama'"),
        ({"quantization_config": {"quant_method": "awq"}}, "unquantized"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "absent"}, "hidden_size=None"),
        ({"hidden_size": 48.0}, "hidden_size=48.0, expected an integer"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000, expected at most 1000"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"rms_norm_eps": "1e-5"}, "expected a number"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"head_dim": None, "hidden_size": 50}, "a multiple of num_attention_heads=4"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        parse(**changes)
    assert "\n" not in str(error.value)


def test_what_the_mixtures_refuse() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok=9 of only 4"):
        parse("mixtral", num_experts_per_tok=9)
    with pytest.raises(ValueError, match="mlp_only_layers"):
        parse("qwen3_moe", mlp_only_layers=1)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy', expected 'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "expected 'sigmoid'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2.*latents serve all"),
        ("deepseek_v3", {"n_group": 3}, "n_group=3 equal groups of 8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group=5 of n_group=4"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group=1 groups of only 2"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "odd"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank=None"),
        ("deepseek_v32", {"index_head_dim": 4}, "index_head_dim=4, expected at least"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk=0"),
        ("deepseek_v32", {"mlp_layer_types": ["dense"]}, "3 times 'dense' or 'sparse'"),
        ("glm_moe_dsa", {"indexer_types": ["shared", "full", "full"]}, "the first one 'full'"),
        ("glm_moe_dsa", {"indexer_types": None, "index_topk_pattern": "FXS"}, "index_topk_pattern='FXS'"),
        (
            "glm_moe_dsa",
            OFTEN | {"index_skip_topk_offset": 0},
            "index_skip_topk_offset=0, expected .* least 1",
        ),
        ("glm_moe_dsa", OFTEN | {"index_skip_topk_offset": -1}, "index_skip_topk_offset=-1"),
        ("glm_moe_dsa", OFTEN | {"index_topk_freq": 2.5}, "index_topk_freq=2.5"),
    ],
)
def test_what_latent_attention_refuses(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        parse(family, **changes)
    assert "\n" not in str(error.value)


def test_a_published_config_names_code_that_is_not_needed() -> None:
    """The keys of DeepSeek-V3's own, but for its quantization."""
    code = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
    }
    more = {"aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1}
    more |= {"pretraining_tp": 1, "scoring_func": "sigmoid", "seq_aux": True, "topk_method": "noaux_tc"}
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32}
    more |= {
        "rope_scaling": yarn | {"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 10000,
    }
    more |= {"max_position_embeddings": 163840, "model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    assert parse("deepseek_v3", auto_map=code, **more).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="quantized"):
        parse("deepseek_v3", auto_map=code, **more, quantization_config={"quant_method": "fp8"})


def test_which_layers_have_an_indexer_of_their_own() -> None:
    def layers(**changes: Any) -> tuple[bool, ...]:
        found = parse("glm_moe_dsa", indexer_types=None, num_hidden_layers=6, **changes).indexing
        assert found is not None
        return found.layers

    assert layers() == (True,) * 6
    assert layers(index_topk_freq=2) == (True, True, False, True, False, True)
    assert layers(index_topk_freq=0, index_skip_topk_offset=0) == (True,) * 6
    assert layers(index_topk_freq=4, index_skip_topk_offset=5) == (True,) * 5 + (False,)
    assert layers(index_topk_freq=3, index_skip_topk_offset=1) == (True, False, False) * 2
    assert layers(index_topk_pattern="FSSFSF") == (True, False, False, True, False, True)


def test_which_layers_slide() -> None:
    def windows(family: str, **changes: Any) -> tuple[int | None, ...]:
        return parse(family, **changes).windows

    assert windows("mistral", sliding_window=7) == (7, 7, 7)
    assert windows("mistral", sliding_window=None) == (None,) * 3
    assert windows("mistral", sliding_window="absent") == (4096,) * 3
    assert windows("mixtral") == windows("qwen2", sliding_window=9) == (None,) * 3
    sliding = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("qwen2", **sliding, max_window_layers=2) == (None, None, 9)
    assert windows("qwen3", **sliding) == (None,) * 3  # from layer 28 on
    assert windows("qwen3_moe", **sliding) == (9, 9, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert windows("qwen3", **sliding, layer_types=types) == (9, None, None)
    assert windows("qwen3", use_sliding_window=False, layer_types=types) == (None,) * 3
    for wrong in (types[:2], ["chunked_attention"] * 3):
        with pytest.raises(ValueError, match="layer_types"):
            windows("qwen3", **sliding, layer_types=wrong)


def test_defaults_of_absent_fields() -> None:
    config = parse("qwen3", head_dim="absent")
    assert (config.head_dim, config.dtype) == (128, torch.float32)
    assert parse(num_key_value_heads="absent").num_kv_heads == 4
    assert parse("qwen3_moe", head_dim="absent").head_dim == 12
    assert parse("mixtral").rope.theta == 1e6
    assert parse(dtype="bfloat16").dtype is parse(torch_dtype="bfloat16").dtype is torch.bfloat16


def test_sizes_that_ranks_cannot_share() -> None:
    config = parse(num_attention_heads=12, num_key_value_heads=2, intermediate_size=44)
    for size in (1, 2, 4):
        config.check_ranks(size)
    with pytest.raises(ValueError, match="num_attention_heads=12 is not divisible by 8 ranks"):
        config.check_ranks(8)
    with pytest.raises(ValueError, match="intermediate_size=44 is not divisible by 6 ranks"):
        config.check_ranks(6)
    with pytest.raises(ValueError, match="num_key_value_heads=3 is neither"):
        parse(num_attention_heads=6, num_key_value_heads=3).check_ranks(2)
    with pytest.raises(ValueError, match="experts' intermediate size=24"):
        parse("qwen3_moe", num_attention_heads=16, intermediate_size=16).check_ranks(16)
    parse("qwen3_moe", intermediate_size=41).check_ranks(4)  # no layer is dense


def test_the_length_of_requests() -> None:
    assert parse().max_model_len == 128
    assert parse().limited_to(100).max_model_len == 100
    for wrong in (0, 129):
        with pytest.raises(ValueError, match=f"max_model_len={wrong} is outside 1..128"):
            parse().limited_to(wrong)
    assert parse().limited_to(1000, 128).max_model_len == 1000
    assert parse().limited_to(128, 1000).max_model_len == 128
    with pytest.raises(ValueError, match="reads 129 at once"):
        parse().limited_to(1000, 129)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_path(tmp_path)
    raw = {"model_type": "llama", **SMALL, "eos_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_path(tmp_path, 50).max_model_len == 50
    assert ModelConfig.from_path(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert ModelConfig.from_path(tmp_path).eos_token_ids == (4, 5)
    for wrong in ("{", "[]"):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"config\.json"):
            ModelConfig.from_path(tmp_path)
