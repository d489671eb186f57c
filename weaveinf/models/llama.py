"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783): grouped queries, rotary positions, gated MLP.

Every layer is

    x = x + Attention(norm(x))
    x = x + Mlp(norm(x))
"""

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias")
    return fields.decoder(
        max_position_embeddings=2048,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family("LlamaForCausalLM", "llama", configure)
