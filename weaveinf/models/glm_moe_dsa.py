"""GLM-5 (zai-org): DeepSeek-V3.2 with an indexer that turns neighbouring channels, and some layers that read
what was chosen in the layer before (arXiv 2603.12201)."""

from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.deepseek_v3 import decoder, latents, layer
from weaveinf.models.deepseek_v32 import indexing, mixtures
from weaveinf.models.registry import Family


def scoring_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers score: `indexer_types`, or a pattern of F (full) and S (shared), or every how many."""
    types, pattern = fields.raw.get("indexer_types"), fields.raw.get("index_topk_pattern")
    key = "indexer_types" if types is not None else "index_topk_pattern"
    if types is None and isinstance(pattern, str):
        types = [{"F": "full", "S": "shared"}.get(letter) for letter in pattern]
    elif types is None:
        types = pattern
    if types is None:
        every = max(1, fields.integer("index_topk_freq", 1, least=0))
        first = fields.integer("index_skip_topk_offset", 2, least=1 if every > 1 else 0)
        return tuple(max(i - first + 1, 0) % every == 0 for i in range(fields.layers))
    known = isinstance(types, list) and len(types) == fields.layers and not set(types) - {"full", "shared"}
    if not known or types[0] != "full":
        wanted = f"'full' or 'shared' for each of {fields.layers} layers, the first one 'full'"
        raise fields.refuse(key, wanted)
    return tuple(kind == "full" for kind in types)


def configure(fields: Fields) -> ModelConfig:
    return decoder(
        fields,
        mixtures(fields),
        groups=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=202752,
        latents=latents(fields, interleaved=True),
        indexing=indexing(fields, 32, scoring_layers(fields), interleaved=True),
    )


FAMILY = Family("GlmMoeDsaForCausalLM", "glm_moe_dsa", configure, layer)
