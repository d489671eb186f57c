"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, and a mixture routed in groups.

Every layer is

    x = x + LatentAttention(norm(x))
    x = x + GroupedExpertMlp(norm(x))      or Mlp, in the first `first_k_dense_replace` layers

Sigmoids score the experts; a bias that no gradient trained balances which are chosen. The layers behind the
last, which predict further tokens, are not read.
"""

from typing import Any

import torch
from torch import Tensor

from weaveinf.models.config import Experts, Fields, Latents, ModelConfig
from weaveinf.models.layers import Block, ExpertMlp, Mlp, Parts
from weaveinf.models.mla import LatentAttention
from weaveinf.models.registry import Family
from weaveinf.models.weights import Piece, columns, rows
from weaveinf.ops.moe import ExpertWeights, route_in_groups

_NAMES = ("gate_proj", "up_proj", "down_proj")


class GroupedExpertMlp(ExpertMlp):
    """The mixture of these models: see `ops.moe.route_in_groups`.

    The experts that serve every row, one MLP in the file, are cut into experts of the others' width: then
    they are chosen ones with a weight of one.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__(parts, name, _NAMES)
        experts, weights, hidden = self.experts, parts.weights, parts.config.hidden_size
        bias = Piece(f"{name}.gate.e_score_correction_bias", (experts.count,))
        self.correction = weights.tensor(bias, dtype=torch.float32)
        inner, whole = experts.intermediate_size, experts.shared * experts.intermediate_size
        own = parts.share.of(inner)
        gate, up, down = (f"{name}.shared_experts.{which}.weight" for which in _NAMES)
        gate_up, back = [*self.gate_up.packed], [*self.down.packed]
        for first in range(0, whole, inner):
            span = range(first + own.start, first + own.stop)
            gate_up.append(weights.packed(*(rows(half, whole, hidden, span) for half in (gate, up))))
            back.append(weights.packed(columns(down, hidden, whole, span)))
        self.gate_up, self.down = ExpertWeights(gate_up), ExpertWeights(back)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        e = self.experts
        groups = e.groups, e.top_groups, e.renormalize, e.scale
        weights, ids = route_in_groups(logits, self.correction, e.top_k, *groups)
        always = torch.arange(e.count, e.count + e.shared, dtype=ids.dtype, device=ids.device)
        ones = weights.new_ones(len(weights), e.shared)
        return torch.cat([weights, ones], 1), torch.cat([ids, always.expand(len(ids), -1)], 1)


def latents(fields: Fields, interleaved: bool) -> Latents:
    """The widths of a config's latent attention."""
    no_latent = "q_lora_rank" in fields.raw and fields.raw["q_lora_rank"] is None
    return Latents(
        q_rank=None if no_latent else fields.integer("q_lora_rank", 1536),
        kv_rank=fields.integer("kv_lora_rank", 512),
        nope=fields.integer("qk_nope_head_dim", 128),
        rope=fields.integer("qk_rope_head_dim", 64),
        value=fields.integer("v_head_dim", 128),
        interleaved=interleaved,
    )


def dense_first(fields: Fields) -> tuple[bool, ...]:
    """Which layers have the mixture."""
    dense = fields.integer("first_k_dense_replace", 3, least=0)
    return tuple(i >= dense for i in range(fields.layers))


def decoder(fields: Fields, layers: tuple[bool, ...], groups: int, **declared: Any) -> ModelConfig:
    """The config of a family with latent attention (`latents`), and the mixture in these layers."""
    for key, known in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1)):
        if fields.raw.get(key) not in (None, known):
            raise fields.refuse(key, repr(known))
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", heads) != heads:
        raise fields.refuse("num_key_value_heads", f"num_attention_heads={heads}: latents serve all of them")
    bias = fields.flag("attention_bias")
    experts = Experts(
        count=fields.integer("n_routed_experts", 256),
        top_k=fields.integer("num_experts_per_tok", 8),
        intermediate_size=fields.integer("moe_intermediate_size", 2048),
        renormalize=fields.flag("norm_topk_prob", True),
        layers=layers,
        shared=fields.integer("n_shared_experts", 1, least=0),
        groups=fields.integer("n_group", groups),
        top_groups=fields.integer("topk_group", min(groups, 4)),
        scale=fields.number("routed_scaling_factor", 2.5),
    )
    return fields.decoder(
        head_dim=declared["latents"].rope, qkv_bias=bias, output_bias=bias, experts=experts, **declared
    )


def configure(fields: Fields) -> ModelConfig:
    return decoder(
        fields,
        dense_first(fields),
        groups=8,
        max_position_embeddings=4096,
        latents=latents(fields, fields.flag("rope_interleave", True)),
    )


def layer(parts: Parts, i: int) -> tuple[LatentAttention, Block]:
    config, name = parts.config, f"model.layers.{i}"
    assert config.experts is not None
    parts.weights.skip(f"model.layers.{config.num_layers}.")
    attention = LatentAttention(parts, i, f"{name}.self_attn", config.output_bias)
    sparse = config.experts.layers[i]
    return attention, (GroupedExpertMlp if sparse else Mlp)(parts, f"{name}.mlp")


FAMILY = Family("DeepseekV3ForCausalLM", "deepseek_v3", configure, layer)
