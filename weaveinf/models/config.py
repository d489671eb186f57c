"""What a model is: the facts of a Hugging Face `config.json`, checked once, immutable afterwards.

`Fields` reads single values and refuses wrong ones by name; `ModelConfig` is the result. Which
fields a family has, and their defaults, is declared in the family's own file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weaveinf.models.rope import Rope

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys that change the arithmetic in ways no family here has, with the values that mean "off".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), (None,)),
    **dict.fromkeys(("attention_multiplier", "clip_qkv", "attention_chunk_size"), (None,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (None, 1.0)),
    **dict.fromkeys(("logits_scaling", "partial_rotary_factor"), (None, 1.0)),
    "no_rope_layers": (None, []),
}


@dataclass(frozen=True)
class Experts:
    """The mixture of a model: `count` experts of width `intermediate_size`, `top_k` per token.

    `layers[i]` says whether layer i has the mixture; `renormalize` whether the weights of the
    chosen experts are scaled to sum to one. DeepSeek's: `shared` more experts serve every token; the
    experts are in `groups`, of which a token's are in the best `top_groups`; `scale` is of their weights.
    """

    count: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    layers: tuple[bool, ...]
    shared: int = 0
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k > self.count:
            raise ValueError(f"config.json: num_experts_per_tok={self.top_k} of only {self.count} experts")
        if self.count % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"config.json: topk_group={self.top_groups} of n_group={self.groups} equal groups of "
                f"{self.count} experts"
            )
        if self.top_k > self.top_groups * self.count // self.groups:
            raise ValueError(
                f"config.json: num_experts_per_tok={self.top_k} of topk_group={self.top_groups} groups of "
                f"only {self.count // self.groups} experts"
            )


@dataclass(frozen=True)
class Latents:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): widths.

    A token's keys and values of all heads come from one latent of width `kv_rank` and one rotated key of
    width `rope`; a head's query and key are `nope` + `rope` wide, its value `value`. Queries come from a
    latent of width `q_rank`; None: from the hidden state. `interleaved`: channels 2i and 2i + 1 of a rotated
    part turn together, otherwise i and i + rope / 2.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool

    def weights(self, hidden: int, heads: int) -> int:
        """How many a layer's attention has, its indexer excluded."""
        queries = (self.q_rank or hidden) * heads * (self.nope + self.rope) + hidden * (self.q_rank or 0)
        cached = hidden * (self.kv_rank + self.rope) + self.kv_rank * heads * (self.nope + self.value)
        return queries + cached + heads * self.value * hidden


@dataclass(frozen=True)
class Indexing:
    """The lightning indexer of DeepSeek sparse attention: `heads` of width `dim` score every cached token, a
    row reads the best `top_k` of them.

    `layers[i]` says whether layer i scores for itself; others read what was chosen in the layer before.
    `interleaved`: as in `Latents`. `fp8`: whether queries and keys are rounded to eight bits.
    """

    heads: int
    dim: int
    top_k: int
    layers: tuple[bool, ...]
    interleaved: bool
    fp8: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model. Sizes are those of the whole model, not of a rank's share.

    Attributes:
        windows: per layer, how many positions a query sees, its own included; None: all.
        qkv_bias, output_bias, mlp_bias: biases of q/k/v, of the output projection, of the MLP.
        qk_norm: RMSNorm over each head's q and k before the rotation.
        latents: of a model that caches latents instead of keys and values; then head_dim is what is rotated.
        max_model_len: positions that a request may use; the rotary table has as many rows, as far as its
            frequencies reach.
        dtype: of the checkpoint, as its config says (float32 where it does not).
        eos_token_ids: of generation_config.json where it names any, else of config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    max_model_len: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    latents: Latents | None = None
    indexing: Indexing | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Checks a parsed config.json.

        Raises:
            ValueError: unknown or unsupported architecture, feature or value, naming it.
        """
        # Here and not above: the families import this module.
        from weaveinf.models.registry import family_of

        for key in ("quantization_config", "compression_config"):
            if raw.get(key):
                remedy = "its weights are quantized; use the unquantized checkpoint"
                raise ValueError(f"{where} has {key!r}: {remedy}")
        for key, neutral in _NEUTRAL.items():
            if raw.get(key) not in neutral:
                raise ValueError(f"{where}: {key}={raw[key]!r} is not supported by these families")
        family = family_of(raw, where)
        # Published configs of known families name their authors' code too.
        if raw.get("auto_map") and raw.get("model_type") != family.model_type:
            raise ValueError(
                f"{where} has 'auto_map', code that is never run, and model_type={raw.get('model_type')!r}: "
                f"use a model of a known family, as {family.model_type!r}"
            )
        return family.configure(Fields(raw, where, family.architecture))

    @classmethod
    def from_path(
        cls, path: str | Path, max_model_len: int | None = None, at_once: int | None = None
    ) -> ModelConfig:
        """Reads `path/config.json` (and the stop tokens of `generation_config.json`); see `limited_to`."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: {path} is not a Hugging Face checkpoint")
        config = cls.from_dict(read_json(file), str(file))
        config = config if max_model_len is None else config.limited_to(max_model_len, at_once)
        generation = Path(path) / "generation_config.json"
        if generation.is_file():
            fields = Fields(read_json(generation), str(generation))
            stops = fields.token_ids("eos_token_id")
            config = replace(config, eos_token_ids=stops or config.eos_token_ids)
        return config

    def limited_to(self, max_model_len: int, at_once: int | None = None) -> ModelConfig:
        """The same model for requests of at most `max_model_len` positions, of which attention has no more
        than `at_once` before it at a time, numbered anew (None: all, by their own numbers)."""
        reach = self.rope.max_positions
        if not 1 <= min(max_model_len, at_once or max_model_len) <= reach:
            remedy = "selector='tokenselect:positions=compacted' goes beyond"
            if at_once is not None:
                remedy = f"take a lower budget, as the selector reads {at_once} at once"
            raise ValueError(
                f"max_model_len={max_model_len} is outside 1..{reach}, the positions this model's rotary "
                f"embedding reaches; {remedy}"
            )
        return replace(self, max_model_len=max_model_len)

    def with_index_keys(self, kind: str) -> ModelConfig:
        """The same model with the keys of its indexer kept in its own dtype ("exact"), or in "fp8"."""
        if kind == "exact":
            return self
        if self.indexing is None:
            raise ValueError(f"index_keys={kind!r}: {self.architecture} has no indexer; use 'exact'")
        return replace(self, indexing=replace(self.indexing, fp8=True))

    def check_ranks(self, size: int) -> None:
        """Refuses a number of ranks that does not divide what must be cut evenly."""
        cuts = {"num_attention_heads": self.num_heads, "intermediate_size": self.intermediate_size}
        if self.experts is not None:
            if all(self.experts.layers):
                del cuts["intermediate_size"]
            cuts["the experts' intermediate size"] = self.experts.intermediate_size
        for name, value in cuts.items():
            if value % size:
                raise ValueError(f"{name}={value} is not divisible by {size} ranks: use fewer ranks")
        kv = self.num_kv_heads
        if kv % size and size % kv:
            raise ValueError(
                f"num_key_value_heads={kv} is neither a multiple nor a divisor of {size} ranks: "
                "use another number of ranks"
            )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


class Fields:
    """Typed, checked access to a config's raw values; None counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str, architecture: str = "") -> None:
        self.raw, self.where, self.architecture = raw, where, architecture

    def refuse(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {key}={self.raw.get(key)!r}, expected {wanted}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refuse(key, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, "a number")
        if not (math.isfinite(value) and value > 0):
            raise self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.refuse(key, "a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    @property
    def layers(self) -> int:
        """`num_hidden_layers`; bounded, as much is built per layer before any file is looked at."""
        layers = self.integer("num_hidden_layers")
        if layers > 1000:
            raise self.refuse("num_hidden_layers", "at most 1000")
        return layers

    def window(self, default: int | None) -> int | None:
        """`sliding_window`, where it is absent the default; null, and a default of None, mean none."""
        unlimited = self.raw.get("sliding_window", default) is None
        return None if unlimited else self.integer("sliding_window", default)

    def windows(self, window: int | None, slides: Sequence[bool] = ()) -> tuple[int | None, ...]:
        """Each layer's window: `window` where `slides` (empty: everywhere).

        `layer_types`, where a config has it, is the last word on which layers slide.
        """
        layers = self.layers
        types = self.raw.get("layer_types")
        if window is None:
            return (None,) * layers
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise self.refuse("layer_types", f"a list of {layers} layer types")
            unknown = sorted({str(t) for t in types} - {"sliding_attention", "full_attention"})
            if unknown:
                raise ValueError(f"{self.where}: layer_types has {unknown[0]!r}, which is unknown")
            slides = [t == "sliding_attention" for t in types]
        return tuple(window if slide else None for slide in slides or (True,) * layers)

    def qwen_windows(self, first: int) -> tuple[int | None, ...]:
        """Qwen's rule: none without `use_sliding_window`, and then only from layer `first` on."""
        window = self.window(4096) if self.flag("use_sliding_window") else None
        return self.windows(window, [i >= first for i in range(self.layers)])

    def decoder(
        self,
        *,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        max_position_embeddings: int,
        kv_heads: int | None = None,
        **declared: Any,
    ) -> ModelConfig:
        """The config of a family: the fields all of them share, plus what it declares itself."""
        activation = self.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.refuse("hidden_act", "'silu', the only supported activation")
        layers, hidden = self.layers, self.integer("hidden_size")
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", kv_heads or heads)
        if heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
        head_dim = declared.pop("head_dim", None)
        if head_dim is None:
            if self.raw.get("head_dim") is None and hidden % heads:
                raise self.refuse("hidden_size", f"a multiple of num_attention_heads={heads}")
            head_dim = self.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"{self.where}: head_dim={head_dim} is odd; rotary embedding needs pairs")
        positions = self.integer("max_position_embeddings", max_position_embeddings)
        rope = Rope.parse(self.raw, head_dim, positions, rope_theta, self.where)
        dtype = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        if str(dtype).removeprefix("torch.") not in _DTYPES:
            raise self.refuse("dtype" if self.raw.get("dtype") else "torch_dtype", f"one of {[*_DTYPES]}")
        declared.setdefault("windows", (None,) * layers)
        declared.setdefault("tie_word_embeddings", self.flag("tie_word_embeddings"))
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", rms_norm_eps),
            rope=rope,
            max_model_len=rope.default_positions,
            dtype=_DTYPES[str(dtype).removeprefix("torch.")],
            eos_token_ids=self.token_ids("eos_token_id"),
            **declared,
        )
