"""What the commands say about a run: which parts ran, how fast, and how fast the machine is."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from weaveinf.cluster.rank import physical
from weaveinf.llm import LLM
from weaveinf.models.config import ModelConfig
from weaveinf.ops import native
from weaveinf.ops.linear import linear, pack


@dataclass(frozen=True)
class Machine:
    """What this machine's cores can do together, measured in about a second."""

    gb_per_s: float
    gflops: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Machine:
        """Reading memory, and this package's own matrix product, with a thread on each core that the ranks
        of this host may use together."""
        share = torch.get_num_threads()
        torch.set_num_threads(max(share, physical(os.sched_getaffinity(0))))
        with torch.inference_mode():
            gb_per_s = read_rate(torch.device("cpu"))
            rows, side = 512, 2048
            x, weight = torch.randn(rows, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
            packed = pack(weight)
            gflops = 2 * rows * side * side / _fastest(lambda: linear(x, packed)) / 1e9
        torch.set_num_threads(share)
        return cls(gb_per_s, gflops)


def read_rate(device: torch.device) -> float:
    """GB/s at which a device reads its memory."""
    memory = torch.ones(1 << 27, device=device)
    return memory.nbytes / _fastest(lambda: memory.sum().item()) / 1e9


def _fastest(call: Any, repeats: int = 4) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Work:
    """What the blocks of a model cost, all ranks together (attention over the cache excluded)."""

    layer_weights: int
    head_weights: int
    layers: int
    itemsize: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> Work:
        hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
        attention = hidden * config.head_dim * (heads + config.num_heads)
        if (latents := config.latents) is not None:
            attention = latents.weights(hidden, config.num_heads)
        mlp = 3 * hidden * config.intermediate_size
        if config.experts is not None:
            chosen = config.experts.top_k + config.experts.shared
            mlp = 3 * hidden * config.experts.intermediate_size * chosen
        head = hidden * config.vocab_size
        return cls(attention + mlp, head, config.num_layers, dtype.itemsize)

    def gflop(self, rows: int, logits: int) -> float:
        """Of a step of `rows` tokens; the last layer computes (nearly) only the `logits` rows."""
        full = (self.layers - 1) * rows + logits
        return 2e-9 * (self.layer_weights * full + self.head_weights * logits)

    def gigabytes(self) -> float:
        """Weights that a small step reads."""
        return 1e-9 * self.itemsize * (self.layer_weights * self.layers + self.head_weights)


def what_ran(llm: LLM) -> dict[str, Any]:
    """The parts that an engine chose."""
    worker = llm.engine.executor.worker
    return {
        "model": llm.config.model,
        "tp": llm.config.tensor_parallel_size,
        "device": str(worker.ranks.device),
        "dtype": str(worker.dtype).removeprefix("torch."),
        "seam": worker.seam.name,
        "kernels": native.isa if native.lib is not None else f"torch ({native.reason})",
        "kv_cache_tokens": worker.pools.num_pages * worker.pools.page_size,
    }


def steps(llm: LLM) -> dict[str, int]:
    """How the steps so far went."""
    return {f"steps_{how}": llm.engine.trace.steps[how] for how in ("woven", "fused", "plain")}


def write_json(file: str | None, result: dict[str, Any]) -> None:
    """Writes a result where the user asked for it; - is standard output."""
    if file == "-":
        json.dump(result, sys.stdout, indent=2)
        print()
    elif file is not None:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")


def in_turns(calls: Mapping[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The median of what each returned, in turns in which all take theirs; the first turn does not count."""
    took = [[call() for call in calls.values()] for _ in range(turns + 1)]
    return dict(zip(calls, map(median, zip(*took[1:], strict=True)), strict=True))


def tell_trace(llm: LLM) -> None:
    """Says what was traced, after the engine has closed."""
    if llm.engine.trace.told:
        print(llm.engine.trace.told, file=sys.stderr)
