"""Rotary position embedding: the frequencies of each scaling, and the table of cosines and sines.

Definitions follow transformers 5.24 (`modeling_rope_utils`), checked against it in the tests:
linear (kaiokendev), dynamic NTK (bloc97, emozilla), YaRN (arXiv 2309.00071), Llama 3.1's.

`dynamic`: transformers takes new frequencies for every longer sequence, and so mixes keys of
several frequencies in its cache. Pages here are shared and stay, so the frequencies are decided
once, for `max_model_len`: within the original length (the default) they are the plain ones, beyond
it those that transformers uses on a sequence of exactly `max_model_len` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
_NAMES, _OTHERS = {"rope_type", "type"}, {"original_max_position_embeddings", "finetuned"}
_ALWAYS = _NAMES | _OTHERS | {"rope_theta", "partial_rotary_factor"}

MAX_TABLE = 1 << 24
"""Positions beyond which a config is not believed; the table is memory of every rank."""


@dataclass(frozen=True)
class Rope:
    """The rotation of a model: over `dim` dimensions of each head, `theta` the base.

    `original` is the length the model was trained for before any scaling; `default_positions` the
    context to serve unless told otherwise, `max_positions` the longest that makes sense. `score_factor` is
    what DeepSeek's attention multiplies all scores by, besides.
    """

    kind: str
    dim: int
    theta: float
    original: int
    default_positions: int
    max_positions: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    score_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], head_dim: int, max_positions: int, theta: float, where: str
    ) -> Rope:
        """Reads either spelling: `rope_scaling` beside `rope_theta`, or `rope_parameters`.

        Raises:
            ValueError: unknown type or key, missing or senseless value, naming it.
        """
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
            raise ValueError(f"{where}: rope parameters must be one flat object, got {given!r}")
        kind = given.get("rope_type", given.get("type", "default")) or "default"
        if kind not in _KEYS:
            raise ValueError(f"{where}: rope type {kind!r} is unknown; supported: {', '.join(_KEYS)}")
        unknown = sorted(set(given) - _KEYS[kind] - _ALWAYS)
        if unknown:
            raise ValueError(f"{where}: rope type {kind!r} has no parameter {unknown[0]!r}")
        if given.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(f"{where}: partial_rotary_factor is not supported by these families")

        def number(key: str, default: float | None) -> float:
            value = given.get(key)
            if value is None:
                value = default
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if value is None or not (real and math.isfinite(value) and value > 0):
                raise ValueError(f"{where}: rope {key}={value!r}, expected a positive number")
            return float(value)

        original = max_positions
        if kind in ("llama3", "yarn"):
            outer = raw.get("original_max_position_embeddings")
            inner = number("original_max_position_embeddings", max_positions)
            original = int(outer if isinstance(outer, int) else inner)
        base = raw.get("rope_theta")
        values: dict[str, Any] = {"theta": number("rope_theta", theta if base is None else base)}
        if kind != "default":
            ratio = max_positions / original if kind == "yarn" else None
            values["factor"] = number("factor", ratio)
            if values["factor"] < 1:
                raise ValueError(f"{where}: rope factor={values['factor']} must be at least 1")
        if kind == "llama3":
            values |= {key: number(key, None) for key in ("low_freq_factor", "high_freq_factor")}
            if values["low_freq_factor"] >= values["high_freq_factor"]:
                raise ValueError(f"{where}: rope low_freq_factor must be below high_freq_factor")
        if kind == "yarn":
            values |= {"beta_fast": number("beta_fast", 32.0), "beta_slow": number("beta_slow", 1.0)}
            values["truncate"] = bool(given.get("truncate", True))
            scale = _magnitude(values["factor"], 1.0)
            if given.get("mscale_all_dim"):
                by_dim = _magnitude(values["factor"], number("mscale_all_dim", None))
                values["score_factor"] = by_dim**2
                if given.get("mscale"):
                    scale = _magnitude(values["factor"], number("mscale", None)) / by_dim
            values["attention_factor"] = number("attention_factor", scale)
        stretched = int(original * values.get("factor", 1.0))
        reach = max_positions if kind in ("default", "llama3") else max(max_positions, stretched)
        default = max_positions if kind == "dynamic" else reach
        return cls(
            kind, head_dim, original=original, default_positions=default, max_positions=reach, **values
        )

    def frequencies(self, length: int) -> Tensor:
        """Float32 [dim / 2]: angle per position, for a context of `length` (dynamic's only)."""
        dim, base = self.dim, self.theta
        if self.kind == "dynamic" and length > self.original:
            stretch = self.factor * length / self.original - (self.factor - 1)
            base *= stretch ** (dim / (dim - 2))
        plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            # By turns within the original length: few are stretched, many kept, between blended.
            turns = self.original * plain / (2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            return torch.lerp(plain / self.factor, plain, blend.clamp(0, 1))
        if self.kind == "yarn":
            low, high = self._turning_dim(self.beta_fast), self._turning_dim(self.beta_slow)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            # 0.001 keeps the ramp defined where both ends fall on one dimension.
            ramp = (torch.arange(dim // 2) - low) / (high - low if high != low else 0.001)
            return torch.lerp(plain, plain / self.factor, ramp.clamp(0, 1))
        return plain

    def _turning_dim(self, turns: float) -> float:
        """The (real) dimension pair that turns this often within the original length."""
        return self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def table(self, length: int, device: torch.device) -> Tensor:
        """Float32 [length, dim]: cosines, then sines, of every position, on `device`."""
        if length > MAX_TABLE:
            raise ValueError(f"the config claims {length} positions: set max_model_len to what you need")
        half = self.dim // 2
        table = torch.empty(length, self.dim, dtype=torch.float32)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies(length))
        torch.cos(angles, out=table[:, :half])
        torch.sin(angles, out=table[:, half:])
        return table.mul_(self.attention_factor).to(device)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
