"""Mistral (arXiv 2310.06825): Llama whose queries see a sliding window of positions.

Every layer is

    x = x + Attention(norm(x))      over the last `sliding_window` positions
    x = x + Mlp(norm(x))
"""

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    windows = fields.windows(fields.window(4096))
    return fields.decoder(max_position_embeddings=131072, kv_heads=8, windows=windows)


FAMILY = Family("MistralForCausalLM", "mistral", configure)
