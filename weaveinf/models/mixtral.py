"""Mixtral (arXiv 2401.04088): Mistral whose MLP is a mixture of experts.

Every layer is

    x = x + Attention(norm(x))
    x = x + ExpertMlp(norm(x))      the weights of the chosen experts sum to one
"""

from weaveinf.models.config import Experts, Fields, ModelConfig
from weaveinf.models.layers import Attention, ExpertMlp, Parts
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    experts = Experts(
        count=fields.integer("num_local_experts", fields.integer("num_experts", 8)),
        top_k=fields.integer("num_experts_per_tok", 2),
        intermediate_size=fields.integer("intermediate_size"),
        renormalize=True,
        layers=(True,) * fields.layers,
    )
    return fields.decoder(
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=131072,
        kv_heads=8,
        windows=fields.windows(fields.window(None)),
        experts=experts,
    )


def layer(parts: Parts, i: int) -> tuple[Attention, ExpertMlp]:
    name = f"model.layers.{i}"
    # Files with fused experts call the mixture `mlp`, all others `block_sparse_moe`.
    fused = parts.weights.has(f"{name}.mlp.experts.gate_up_proj")
    mixture = f"{name}.{'mlp' if fused else 'block_sparse_moe'}"
    return Attention(parts, i, f"{name}.self_attn"), ExpertMlp(parts, mixture, ("w1", "w3", "w2"))


FAMILY = Family("MixtralForCausalLM", "mixtral", configure, layer)
