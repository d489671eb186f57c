"""Qwen3 (arXiv 2505.09388): Llama whose queries and keys are normalised per head.

Every layer is

    x = x + Attention(norm(x))      q, k = norm(W_q x), norm(W_k x)
    x = x + Mlp(norm(x))
"""

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias")
    return fields.decoder(
        max_position_embeddings=32768,
        kv_heads=32,
        head_dim=fields.integer("head_dim", 128),
        windows=fields.qwen_windows(fields.integer("max_window_layers", 28, least=0)),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )


FAMILY = Family("Qwen3ForCausalLM", "qwen3", configure)
