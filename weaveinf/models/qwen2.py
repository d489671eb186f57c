"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v, none on the output.

Every layer is

    x = x + Attention(norm(x))      q, k, v = W x + b
    x = x + Mlp(norm(x))
"""

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    return fields.decoder(
        max_position_embeddings=32768,
        kv_heads=32,
        windows=fields.qwen_windows(fields.integer("max_window_layers", 28, least=0)),
        qkv_bias=True,
    )


FAMILY = Family("Qwen2ForCausalLM", "qwen2", configure)
