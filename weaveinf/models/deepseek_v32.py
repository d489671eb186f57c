"""DeepSeek-V3.2 (technical report of DeepSeek-V3.2-Exp): V3 whose attention reads what an indexer chooses.

Every layer is that of DeepSeek-V3, with an `Indexer` in its attention.
"""

from weaveinf.models.config import Fields, Indexing, ModelConfig
from weaveinf.models.deepseek_v3 import decoder, dense_first, latents, layer
from weaveinf.models.registry import Family


def mixtures(fields: Fields) -> tuple[bool, ...]:
    """Which layers have the mixture, said one by one or as in DeepSeek-V3."""
    types = fields.raw.get("mlp_layer_types")
    if types is None:
        return dense_first(fields)
    if not isinstance(types, list) or len(types) != fields.layers or set(types) - {"dense", "sparse"}:
        raise fields.refuse("mlp_layer_types", f"a list of {fields.layers} times 'dense' or 'sparse'")
    return tuple(kind == "sparse" for kind in types)


def indexing(fields: Fields, heads: int, layers: tuple[bool, ...], interleaved: bool) -> Indexing:
    """A config's indexer; `heads`: the family's default."""
    if fields.raw.get("q_lora_rank", 1) is None:
        raise fields.refuse("q_lora_rank", "a number: the indexer's queries come from that latent")
    found = Indexing(
        heads=fields.integer("index_n_heads", heads),
        dim=fields.integer("index_head_dim", 128),
        top_k=fields.integer("index_topk", 2048),
        layers=layers,
        interleaved=interleaved,
    )
    if found.dim < fields.integer("qk_rope_head_dim", 64):
        raise fields.refuse("index_head_dim", "at least qk_rope_head_dim, which is rotated of it")
    return found


def configure(fields: Fields) -> ModelConfig:
    return decoder(
        fields,
        mixtures(fields),
        groups=8,
        max_position_embeddings=163840,
        latents=latents(fields, interleaved=True),
        indexing=indexing(fields, 64, (True,) * fields.layers, interleaved=False),
    )


FAMILY = Family("DeepseekV32ForCausalLM", "deepseek_v32", configure, layer)
