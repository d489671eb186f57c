"""What the user may set, validated once, immutable afterwards."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, get_args

import torch

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Executor = Literal["local", "ray"]
IndexKeys = Literal["exact", "fp8"]
LoadFormat = Literal["auto", "dummy"]
Placement = Literal["pack", "spread"]
Weave = Literal["auto", "off", "on"]

PAGE_SIZE = 16
"""Tokens in one page of the KV cache."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: a directory in the Hugging Face layout, or a hub id.
        tensor_parallel_size: number of ranks.
        executor: what starts the ranks above 0: "local", as processes of this machine, or "ray", as actors.
        placement: of Ray's actors: "pack" on few nodes, or "spread" over many.
        device: "auto" takes CUDA where there is one.
        dtype: "auto" takes the checkpoint's.
        weave: whether batches are cut in two halves ("on" is strict, see DESIGN section 1).
        selector: which cached tokens long contexts read: NAME or NAME:setting=value,..., an object of
            settings (`weaveinf.Quest`), or a mapping of the "name" and settings; None: all.
        index_keys: how the indexer of a model with sparse attention keeps its keys: "exact" in the model's
            dtype, or in "fp8", which needs less memory and chooses a little differently.
        max_model_len: tokens of prompt and output together; None: the model's own limit.
        seed: what requests without a seed of their own derive theirs from.
        revision: of the hub repository, applied to every file of it.
        load_format: "dummy" makes random weights.
        kv_cache_gib: GiB of KV cache on each rank, of its device, taken at once; None: by the memory that is
            free, on a CPU as it fills.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens computed in one step.
        trace: file that gets a Chrome trace of the latest steps of all ranks at the end; None: no trace.

    Raises:
        ValueError: on a value out of its range, naming it.
    """

    model: str
    tensor_parallel_size: int = 1
    executor: Executor = "local"
    placement: Placement = "pack"
    device: Device = "auto"
    dtype: DType = "auto"
    weave: Weave = "auto"
    selector: Any = None
    index_keys: IndexKeys = "exact"
    max_model_len: int | None = None
    seed: int = 0
    revision: str | None = None
    load_format: LoadFormat = "auto"
    kv_cache_gib: float | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    trace: str | None = None

    def __post_init__(self) -> None:
        _one_of("executor", self.executor, Executor)
        _one_of("placement", self.placement, Placement)
        _one_of("device", self.device, Device)
        _one_of("dtype", self.dtype, DType)
        _one_of("weave", self.weave, Weave)
        _one_of("index_keys", self.index_keys, IndexKeys)
        _one_of("load_format", self.load_format, LoadFormat)
        _int_in("tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        _int_in("max_num_seqs", self.max_num_seqs, 1, 4096)
        _int_in("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        _int_in("seed", self.seed, 0, (1 << 63) - 1)
        if self.max_model_len is not None:
            _int_in("max_model_len", self.max_model_len, 2, 1 << 24)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} exceeds max_num_batched_tokens="
                f"{self.max_num_batched_tokens}: each running request needs a token of every step"
            )
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < 1 << 20:
            raise ValueError(f"kv_cache_gib={self.kv_cache_gib} must be positive")
        if isinstance(self.selector, str):
            object.__setattr__(self, "selector", _selector(self.selector))
        elif is_dataclass(self.selector) and not isinstance(self.selector, type):
            name = getattr(self.selector, "name", None)
            object.__setattr__(self, "selector", {"name": name} | asdict(self.selector))
        elif self.selector is not None and not isinstance(self.selector, dict):
            raise ValueError(f"selector={self.selector!r} is neither a name nor settings of a selector")

    @property
    def torch_device(self) -> torch.device:
        """The kind of device; which card is the rank's own business."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' but torch sees no GPU; use device='cpu'")
        return torch.device(self.device)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _selector(words: str) -> dict[str, Any]:
    """NAME or NAME:setting=value,... in a mapping."""
    name, _, rest = words.partition(":")
    found: dict[str, Any] = {"name": name}
    for setting in filter(None, rest.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"selector={words!r}: {setting!r} is not of the form setting=value")
        for kind in (int, float, str):
            with suppress(ValueError):
                found[key] = kind(value)
                break
    return found


def _one_of(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        known = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{name}={value!r} is not one of {known}")


def _int_in(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a whole number from {low} to {high}")
