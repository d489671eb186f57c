"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp, technical report, section 2.1).

For a row x with the normed query latent c, and `ops.index` for what becomes of them:

    q = R(W_q c)        [heads, dim]
    k = R(LayerNorm(W_k x))        [dim]
    w = W_w x / sqrt(heads dim)        [heads]

R turns the first channels as attention does its own. Every rank holds all of it and computes the same. A row
with no more tokens than it may read reads all.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch, Memo
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.models.layers import Parts
from weaveinf.models.weights import Piece, rows
from weaveinf.ops import index, select
from weaveinf.ops.index import IndexKeys
from weaveinf.ops.linear import linear
from weaveinf.ops.norm import layer_norm
from weaveinf.ops.rope import halves, rope_, write_kv
from weaveinf.selectors.hisa import FLAT, STAGED, HisaSelector
from weaveinf.selectors.segments import DENSE, RowFacts, Segment, Tokens, segments

KEYS, SCALES = "index keys", "index scales"
_EPS = 1e-6  # whatever the config's


class Indexer:
    """See above; of one layer.

    Attributes:
        pool_specs: the keys of all layers' indexers, as `fp8` wants them.
    """

    def __init__(self, parts: Parts, layer: int, name: str) -> None:
        config, weights = parts.config, parts.weights
        assert config.indexing is not None and config.latents is not None
        self.config = indexing = config.indexing
        assert config.latents.q_rank is not None
        heads, dim = indexing.heads, indexing.dim
        self.layer = sum(indexing.layers[:layer])  # among those that score
        self.rope = config.latents.rope
        width = heads * dim
        self.q = weights.packed(rows(f"{name}.wq_b.weight", width, config.latents.q_rank, range(width)))
        self.k = weights.packed(rows(f"{name}.wk.weight", dim, config.hidden_size, range(dim)))
        self.k_norm = weights.tensor(Piece(f"{name}.k_norm.weight", (dim,)))
        self.k_bias = weights.tensor(Piece(f"{name}.k_norm.bias", (dim,)))
        of_heads = rows(f"{name}.weights_proj.weight", heads, config.hidden_size, range(heads))
        self.weights = weights.packed(of_heads, wide=True)
        self.rotary = parts.rotary
        self.pool_specs = self._pools(sum(indexing.layers), weights.dtype)
        self.keys = IndexKeys(torch.empty(0))
        self.selector: HisaSelector | None = None
        # One for all layers: a batch's rows are served alike in each.
        self.memo: Memo = parts.shared.setdefault("segments", Memo())

    def _pools(self, layers: int, dtype: torch.dtype) -> Sequence[PoolSpec]:
        keys = PoolSpec(KEYS, (self.config.dim,), index.FP8 if self.config.fp8 else dtype, layers)
        return [keys, PoolSpec(SCALES, (), torch.float32, layers)] if self.config.fp8 else [keys]

    def bind(self, pools: Pools, selector: HisaSelector | None) -> None:
        """Gives it its pages, and what looks at blocks of them first."""
        scales = pools[SCALES][self.layer] if self.config.fp8 else None
        self.keys = IndexKeys(pools[KEYS][self.layer], scales)
        self.selector = selector

    def write(self, x: Tensor, batch: Batch) -> None:
        """Caches the keys of rows x [rows, hidden]."""
        k = layer_norm(linear(x, self.k), self.k_norm, self.k_bias, _EPS).unsqueeze(1)
        k = self._turn(k, batch.positions)
        values, slots = self.keys.values.unsqueeze(2), batch.slot_mapping
        if self.keys.scales is None:
            write_kv(k, k, values, values, slots)
        else:
            rounded, scales = index.quantize(self._rotated(k))
            write_kv(rounded, rounded, values, values, slots)
            pool = self.keys.scales[:, :, None, None]
            write_kv(scales.unsqueeze(-1), scales.unsqueeze(-1), pool, pool, slots)
        if self.selector is not None:
            self.selector.write_index(self.layer, self.keys, batch)

    def choose(self, x: Tensor, latents: Tensor, batch: Batch) -> Sequence[Segment]:
        """What each row of a batch may read: x [rows, hidden], latents [rows, q_rank]; keys are written."""
        found: Sequence[Segment] = self.memo.get(batch, self._segments)
        if all(segment.kind == DENSE for segment in found):
            return found
        q, weights = self._queries(x, latents, batch.positions)
        for segment in found:
            if segment.per_row is None:
                continue
            rows, mine = segment.per_row, (q[segment.rows], weights[segment.rows], self.keys)
            if segment.kind == STAGED:
                assert self.selector is not None
                chosen, counts = self.selector.choose_among_blocks(self.layer, *mine, rows)
            else:
                ends = rows.position + 1
                chosen, counts = index.choose(*mine, rows.table, ends, rows.longest, self.config.top_k)
            slots = select.places(chosen.unsqueeze(1), rows.table, self.keys.page_size).squeeze(1)
            starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
            segment.chosen = Tokens(slots, starts, counts - 1)
        return found

    def chosen(self, batch: Batch) -> Sequence[Segment]:
        """What was chosen last for a batch's rows, by whatever layer."""
        found: Sequence[Segment] = self.memo.get(batch, self._segments)
        return found

    def _queries(self, x: Tensor, latents: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        heads, dim = self.config.heads, self.config.dim
        q = self._turn(linear(latents, self.q).unflatten(1, (heads, dim)), positions)
        weights = linear(x, self.weights, out_dtype=torch.float32) * (heads * dim) ** -0.5
        if not self.config.fp8:
            return q, weights
        rounded, scales = index.quantize(self._rotated(q))
        return rounded.float(), weights * scales

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.config.interleaved:
            x[..., : self.rope] = halves(x[..., : self.rope])
        return rope_(x, self.rotary, positions)

    def _rotated(self, x: Tensor) -> Tensor:
        """Nearer to what eight bits can hold, where the width allows."""
        return x if self.config.dim & (self.config.dim - 1) else index.hadamard(x)

    def _segments(self, batch: Batch) -> list[Segment]:
        if self.selector is not None:
            return self.selector.cut(batch)
        facts = RowFacts.of(batch, None)
        return segments(batch, facts, np.where(facts.position < self.config.top_k, DENSE, FLAT))
