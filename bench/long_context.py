"""Selectors from end to end on this machine's CPU: decode steps over long contexts, and time to first token.

    .venv/bin/python bench/long_context.py [--tokens 32768] [--batch 1 4] [--prompt 4096] [--turns 7]

Random weights in bfloat16, 8 layers, hidden 1024, 16 heads, 8 KV heads of 128, one process. A decode step is
all of the model's but the head and sampling, over a cache of random contents; methods take turns. The time to
first token is the engine's, of a prompt in one step. Writes bench/results/long-context-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe

from weaveinf import LLM, SamplingParams
from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools
from weaveinf.comm.ranks import Ranks
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.selectors.fasa import save
from weaveinf.selectors.registry import settings
from weaveinf.selectors.selector import Selector

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1 << 18,
    "torch_dtype": "bfloat16",
}
STEPS = 8  # a decode step's position moves on within so many


def model(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    equal = torch.zeros(SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"], SHAPE["head_dim"] // 2)
    save(folder / "planes.json", "", "", [*equal], SHAPE["num_key_value_heads"])
    return str(folder)


def selectors(folder: Path) -> dict[str, dict[str, Any] | None]:
    return {
        "dense": None,
        "fasa": {"name": "fasa", "table": str(folder / "planes.json")},
        "quest": {"name": "quest"},
        "tokenselect, no hits": {"name": "tokenselect", "threshold": 2.0},
        "tokenselect, all hits": {"name": "tokenselect", "threshold": -1.0},
    }


class Steps:
    """Decode steps over one cache of random contents, by each method."""

    def __init__(self, path: str, wanted: dict[str, dict[str, Any] | None], tokens: int, batch: int) -> None:
        config = EngineConfig(
            model=path,
            load_format="dummy",
            max_model_len=tokens + STEPS + 1,
            max_num_seqs=batch,
            kv_cache_gib=12.0,
        )
        self.worker = Worker(config, Ranks.single(torch.device("cpu")))
        self.tapes = self.worker.weaver.repeated
        self.tokens, self.batch, self.at = tokens, batch, 0
        each = -(-(tokens + STEPS) // PAGE_SIZE)
        self.table = torch.randperm(self.worker.num_pages).int()[: batch * each].view(batch, each)
        self.methods: dict[str, Selector | None] = {}
        noise = torch.randn(1 << 22).bfloat16()
        pools = [self.worker.pools]
        for name, settings_ in wanted.items():
            selector = None
            if settings_ is not None:
                selector = settings(settings_).make(self.worker.model.heads(batch), PAGE_SIZE)
                pools.append(
                    Pools(selector.pools, self.worker.num_pages, PAGE_SIZE, torch.device("cpu"), True)
                )
                selector.bind(pools[-1])
            self.methods[name] = selector
        for pool in (pool for of in pools for spec in of.specs for pool in of[spec.name]):
            flat = pool.flatten()
            for start in range(0, len(flat), len(noise)):
                flat[start : start + len(noise)] = noise[: len(flat) - start]

    def ms(self, name: str) -> float:
        selector = self.methods[name]
        self.worker.model.bind(self.worker.pools, selector)
        self.worker.weaver.repeated = self.tapes if selector is None else None
        position = self.tokens - 1 + self.at % STEPS
        every = torch.arange(self.batch, dtype=torch.int32)
        positions = torch.full((self.batch,), position, dtype=torch.int32)
        slots = self.table[:, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        batch = Batch(
            input_ids=torch.randint(0, SHAPE["vocab_size"], (self.batch,)),
            positions=positions,
            slot_mapping=slots.int(),
            cu_seqlens_q=torch.arange(self.batch + 1, dtype=torch.int32),
            seq_lens=positions + 1,
            num_prompt_tokens=torch.ones_like(every),
            block_table=self.table,
            state_slot=every,
            logit_rows=every.long(),
        )
        began = time.perf_counter()
        self.worker.weaver.run(batch, 0)
        return (time.perf_counter() - began) * 1e3


def decode(path: str, folder: Path, tokens: int, batch: int, turns: int) -> list[str]:
    steps = Steps(path, selectors(folder), tokens, batch)
    times: dict[str, list[float]] = {name: [] for name in steps.methods}
    for turn in range(turns + 2):
        for name, ms in times.items():
            took = steps.ms(name)
            if turn > 1:
                ms.append(took)
        steps.at += 1
    dense = median(times["dense"])
    return [
        f"| {tokens} | {batch} | {name} | {median(ms):.1f} | {dense / median(ms):.2f}x |"
        for name, ms in times.items()
    ]


def first_token(path: str, prompt: int, turns: int) -> list[str]:
    """LazyLLM's time to first token, beside what its keep schedule leaves of the products."""
    methods: dict[str, dict[str, Any] | None] = {"dense": None, "lazyllm": {"name": "lazyllm"}}
    common: dict[str, Any] = {"load_format": "dummy", "max_model_len": prompt + 8, "max_num_seqs": 1}
    common |= {"max_num_batched_tokens": prompt + 8, "kv_cache_gib": 1.0, "show_progress": False}
    times: dict[str, list[float]] = {}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engines = {name: LLM(path, selector=selector, **common) for name, selector in methods.items()}
    for turn in range(turns + 1):
        for name, llm in engines.items():
            tokens = torch.randint(0, SHAPE["vocab_size"], (prompt,)).tolist()
            began = time.perf_counter()
            llm.generate([tokens], params, show_progress=False)
            if turn:
                times.setdefault(name, []).append((time.perf_counter() - began) * 1e3)
    begin = engines["lazyllm"].engine.executor.worker.selector._begin
    for llm in engines.values():
        llm.close()
    layers = SHAPE["num_hidden_layers"]
    kept = sum(0.7 ** sum(layer >= b for b in begin) for layer in range(layers)) / layers
    dense, lazy = (median(times[name]) for name in ("dense", "lazyllm"))
    return [
        f"| {prompt} | {dense:.0f} | {lazy:.0f} | {dense / lazy:.2f}x | {1 / kept:.2f}x | "
        f"{(1 - lazy / dense) / (1 - kept):.0%} |"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Selectors from end to end on a CPU.")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    lines = ["# Selectors from end to end on a CPU", "", "Decode steps:", ""]
    lines += ["| cached tokens | batch | method | ms | times as fast |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = model(folder)
        for batch in args.batch:
            with torch.inference_mode():
                lines += decode(path, folder, args.tokens, batch, args.turns)
            gc.collect()
        lines += ["", "Time to first token, LazyLLM at 70 % a stage:", ""]
        lines += ["| prompt | dense ms | lazyllm ms | times as fast | linear parts | of what they allow |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for prompt in args.prompt:
            lines += first_token(path, prompt, args.turns)
    lines += [
        "",
        "Linear parts: what the kept share of rows leaves of the products, the first stage included.",
        "",
    ]
    lines += ["Machine: " + "; ".join(f"{key}: {value}" for key, value in describe().items()), ""]
    command = f"python bench/long_context.py {' '.join(sys.argv[1:])}".strip()
    lines += [f"Command: `{command}`", ""]
    (RESULTS / f"long-context-{datetime.date.today().isoformat()}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
