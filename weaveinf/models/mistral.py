"""Mistral (arXiv 2310.06825): Llama whose queries see a sliding window of positions.

Every layer is

    x = x + Attention(norm(x))      over the last `sliding_window` positions
    x = x + Mlp(norm(x))
"""

from __future__ import annotations

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.layers import Attention, Mlp, Parts
from weaveinf.models.registry import Family


def configure(fields: Fields) -> ModelConfig:
    # Absent means 4096, null means none.
    unlimited = fields.raw.get("sliding_window", 4096) is None
    window = None if unlimited else fields.integer("sliding_window", 4096)
    return fields.decoder(
        architecture="MistralForCausalLM",
        max_position_embeddings=131072,
        kv_heads=8,
        windows=fields.windows(window),
    )


def layer(parts: Parts, i: int) -> tuple[Attention, Mlp]:
    name = f"model.layers.{i}"
    return Attention(parts, i, f"{name}.self_attn"), Mlp(parts, f"{name}.mlp")


FAMILY = Family("MistralForCausalLM", "mistral", configure, layer)
