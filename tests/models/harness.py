"""Small random checkpoints made by transformers, and all ranks of a model run in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools
from weaveinf.models.config import ModelConfig
from weaveinf.models.layers import Model
from weaveinf.models.loader import load_model
from weaveinf.ops.norm import add_rms_norm

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
# So many heads that no token's score is zero, where transformers lets chance decide which of equals it takes.
INDEXED = LATENT | {"index_n_heads": 12, "index_head_dim": 16, "index_topk": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "mixtral": MOE | {"num_local_experts": 4},
    "qwen3_moe": MOE | {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED | {"indexer_types": ["full", "shared", "full"]},
}

UNINDEXED = [family for family, values in FAMILIES.items() if "index_topk" not in values]
"""Those whose steps may be graphs."""


def make_checkpoint(path: Path, family: str, save: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Saves a random model of a family to `path`; returns transformers' own, in float32."""
    values = {"model_type": family, **SMALL, **FAMILIES[family], **changes}
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(len(family) + len(changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the initialisation, where a forgotten bias or norm would not show.
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3 if name.endswith("bias") else 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0, 0.3)
    model.save_pretrained(path, **(save or {}))
    return model


class Lockstep:
    """All ranks of a model in one process: every block on each rank, then the seam's arithmetic.

    Sequences are made of pages in a scrambled order, so that nothing works by being contiguous.
    """

    def __init__(
        self,
        path: Path,
        size: int = 1,
        dtype: torch.dtype = torch.float32,
        page_size: int = 4,
        pages: int = 64,
        max_model_len: int | None = None,
        load_format: str = "auto",
        index_keys: str = "exact",
    ) -> None:
        self.config = ModelConfig.from_path(path, max_model_len).with_index_keys(index_keys)
        self.dtype = dtype
        self.models: list[Model] = []
        for rank in range(size):
            model = load_model(path, self.config, rank, size, CPU, dtype, load_format)
            model.bind(Pools(model.pool_specs, pages, page_size, CPU))
            self.models.append(model)
        self.page_size = page_size
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def batch(self, chunks: Sequence[tuple[int, Sequence[int], int]]) -> Batch:
        """(sequence, its next tokens, how many of the last rows want logits) each."""
        ids, positions, slots, bounds, wanted = [], [], [], [0], []
        for sequence, tokens, logits in chunks:
            table = self.tables.setdefault(sequence, [])
            start = self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + len(tokens)
            for at in range(start, start + len(tokens)):
                if at // self.page_size == len(table):
                    table.append(self.free.pop())
                slots.append(table[at // self.page_size] * self.page_size + at % self.page_size)
                positions.append(at)
            ids += tokens
            bounds.append(len(ids))
            wanted += range(len(ids) - logits, len(ids))
        tables = [self.tables[sequence] for sequence, _, _ in chunks]
        widest = max(len(table) for table in tables)
        return Batch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int32),
            cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32),
            seq_lens=torch.tensor([self.lengths[s] for s, _, _ in chunks], dtype=torch.int32),
            num_prompt_tokens=torch.zeros(len(chunks), dtype=torch.int32),
            block_table=torch.tensor([t + [0] * (widest - len(t)) for t in tables], dtype=torch.int32),
            state_slot=torch.arange(len(chunks), dtype=torch.int32),
            logit_rows=torch.tensor(wanted, dtype=torch.int64),
        )

    @torch.inference_mode()
    def step(self, *chunks: tuple[int, Sequence[int], int]) -> Tensor:
        """Float32 logits [rows that want them, vocab] of one step, the shards side by side."""
        batch = self.batch(chunks)
        residual = torch.zeros(batch.num_tokens, self.config.hidden_size, dtype=self.dtype)
        x = torch.empty(0)
        for links in zip(*(model.chain for model in self.models), strict=True):
            # Poisoned: a block must fill its buffer, not add to it.
            outs = [torch.full_like(residual, torch.nan) for _ in links]
            answers = [block(x, batch, out) for (block, _), out in zip(links, outs, strict=True)]
            kept = answers[0]
            if kept is not None:
                residual, batch = residual[kept], batch.take(kept)
                outs = [out[: len(kept)] for out in outs]
            joint = links[0][1]
            x = torch.empty_like(residual)
            add_rms_norm(outs, residual, joint, x)
        return torch.cat([model.head(x) for model in self.models], dim=1)
