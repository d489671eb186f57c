"""Qwen3-MoE (arXiv 2505.09388): Qwen3 whose MLP is, in most layers, a mixture of experts.

Every layer is

    x = x + Attention(norm(x))      q, k = norm(W_q x), norm(W_k x)
    x = x + ExpertMlp(norm(x))      or Mlp, by `decoder_sparse_step` and `mlp_only_layers`
"""

from weaveinf.models.config import Experts, Fields, ModelConfig
from weaveinf.models.layers import Attention, Block, ExpertMlp, Mlp, Parts
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias")
    step, dense = fields.integer("decoder_sparse_step", 1), fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise fields.refuse("mlp_only_layers", "a list of layer numbers")
    experts = Experts(
        count=fields.integer("num_experts", fields.integer("num_local_experts", 128)),
        top_k=fields.integer("num_experts_per_tok", 8),
        intermediate_size=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.flag("norm_topk_prob"),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(fields.layers)),
    )
    return fields.decoder(
        max_position_embeddings=32768,
        kv_heads=4,
        windows=fields.qwen_windows(first=0),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        experts=experts,
    )


def layer(parts: Parts, i: int) -> tuple[Attention, Block]:
    name = f"model.layers.{i}"
    assert parts.config.experts is not None
    sparse = parts.config.experts.layers[i]
    names = ("gate_proj", "up_proj", "down_proj")
    mlp = ExpertMlp(parts, f"{name}.mlp", names) if sparse else Mlp(parts, f"{name}.mlp")
    return Attention(parts, i, f"{name}.self_attn"), mlp


FAMILY = Family("Qwen3MoeForCausalLM", "qwen3_moe", configure, layer)
