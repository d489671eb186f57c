"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), its products absorbed.

A head h of a row x attends to a cached token t, of which only a latent c_t and a rotated key r_t are kept:

    q_h, p_h = W_q norm(W_qa x)        (or W_q x)        [nope], [rope]
    c, r     = norm(W_c x), R(W_r x)        [kv_rank], [rope], one for all heads
    score    = (q_h . K_h c_t + R(p_h) . r_t) scale = ([K_h^T q_h, R(p_h)] . [c_t, r_t]) scale
    out      = W_o concat_h(V_h sum_t softmax(score) c_t)

So all heads attend over one head of keys [c_t, r_t], whose values are their first kv_rank channels. The cache
is the same on every rank; query heads are split over the ranks.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.models.indexer import Indexer
from weaveinf.models.layers import Kept, Parts
from weaveinf.models.weights import Piece, columns, rows
from weaveinf.ops.attention import Paged, paged_attention
from weaveinf.ops.linear import linear
from weaveinf.ops.norm import rms_norm
from weaveinf.ops.rope import halves, rope_, write_kv
from weaveinf.selectors.hisa import HisaSelector
from weaveinf.selectors.segments import Segment
from weaveinf.selectors.selector import Selector

POOL = "latent"
_EPS = 1e-6  # whatever the config's


class LatentAttention:
    """See above; of one layer, whose cached tokens are chosen by an indexer if the model has any.

    In the last layer, latents are written for all rows, but queries computed only for those whose logits are
    wanted, unless the layer reads what was chosen, for all rows, in the one before.
    """

    def __init__(self, parts: Parts, layer: int, name: str, bias: bool) -> None:
        config, share = parts.config, parts.share
        assert config.latents is not None
        self.layer, self.latents = layer, config.latents
        self.scale = (self.latents.nope + self.latents.rope) ** -0.5 * config.rope.score_factor
        self.heads = len(share.heads)
        self.last = layer == config.num_layers - 1
        self.rotary, self.scratch = parts.rotary, parts.scratch
        self.dtype, self.device = parts.weights.dtype, parts.weights.device
        self._load(parts, name, bias)
        width = self.latents.kv_rank + self.latents.rope
        specs = [PoolSpec(POOL, (1, width), self.dtype, config.num_layers)]
        self.indexer: Indexer | None = None
        self.scores = False
        """Whether the indexer is this layer's own."""
        if config.indexing is not None:
            self.scores = config.indexing.layers[layer]
            if self.scores:
                parts.shared["indexer"] = Indexer(parts, layer, f"{name}.indexer")
            self.indexer = parts.shared["indexer"]
            specs += self.indexer.pool_specs
        self.pool_specs: Sequence[PoolSpec] = specs
        self.cached = torch.empty(0)

    def _load(self, parts: Parts, name: str, bias: bool) -> None:
        config, weights, own = parts.config, parts.weights, parts.share.heads
        latents, hidden = self.latents, config.hidden_size
        rank, nope, value = latents.kv_rank, latents.nope, latents.value
        cached, wide, both = rank + latents.rope, nope + latents.rope, nope + value

        def of_heads(width: int) -> range:
            return range(own.start * width, own.stop * width)

        self.kv = weights.packed(rows(f"{name}.kv_a_proj_with_mqa.weight", cached, hidden, range(cached)))
        self.kv_bias = parts.bias(bias, Piece(f"{name}.kv_a_proj_with_mqa.bias", (cached,)))
        self.kv_norm = weights.tensor(Piece(f"{name}.kv_a_layernorm.weight", (rank,)))
        self.q_latent, self.q_latent_bias, self.q_norm = None, None, None
        q_name, q_rank = f"{name}.q_proj.weight", latents.q_rank or hidden
        if latents.q_rank is not None:
            q_name = f"{name}.q_b_proj.weight"
            self.q_latent = weights.packed(rows(f"{name}.q_a_proj.weight", q_rank, hidden, range(q_rank)))
            self.q_latent_bias = parts.bias(bias, Piece(f"{name}.q_a_proj.bias", (q_rank,)))
            self.q_norm = weights.tensor(Piece(f"{name}.q_a_layernorm.weight", (q_rank,)))
        self.q = weights.packed(rows(q_name, config.num_heads * wide, q_rank, of_heads(wide)))
        kv_b = weights.tensor(rows(f"{name}.kv_b_proj.weight", config.num_heads * both, rank, of_heads(both)))
        if not weights.survey:
            kv_b = kv_b.view(self.heads, both, rank)
            self.absorb = kv_b[:, :nope]  # K_h: [heads, nope, kv_rank]
            self.expand = kv_b[:, nope:].transpose(1, 2)  # V_h^T: [heads, kv_rank, value]
        o = columns(f"{name}.o_proj.weight", hidden, config.num_heads * value, of_heads(value))
        self.o = parts.closes(weights.packed(o), bias)
        self.o_bias = parts.row_bias(bias, f"{name}.o_proj.bias", hidden)

    def bind(self, pools: Pools, selector: Selector | None) -> None:
        """Gives the layer its pages, [num_pages, page_size, 1, kv_rank + rope], and its indexer its own."""
        self.cached = pools[POOL][self.layer]
        if self.indexer is not None and self.scores:
            assert selector is None or isinstance(selector, HisaSelector)
            self.indexer.bind(pools, selector)

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> Kept:
        self._write(x, batch)
        if self.indexer is not None and self.scores:
            self.indexer.write(x, batch)
        few = self.last and batch.logit_rows.shape[0] < batch.num_tokens
        kept = batch.logit_rows if few else None
        if kept is not None and (self.indexer is None or self.scores):
            self._attend(x[kept], batch.take(kept), out[: len(kept)], None)
        else:
            self._attend(x, batch, out, kept)
        return kept

    def _write(self, x: Tensor, batch: Batch) -> None:
        made = linear(x, self.kv, self.kv_bias)
        rank = self.latents.kv_rank
        rms_norm(made[:, :rank], self.kv_norm, _EPS, out=made[:, :rank])
        made = made.unsqueeze(1)
        self._turn(made[..., rank:], batch.positions)
        write_kv(made, made, self.cached, self.cached, batch.slot_mapping)

    def _turn(self, x: Tensor, positions: Tensor) -> None:
        """Rotates x [rows, heads, rope] in place."""
        if self.latents.interleaved:
            x.copy_(halves(x))
        rope_(x, self.rotary, positions)

    def _attend(self, x: Tensor, batch: Batch, out: Tensor, kept: Kept) -> None:
        """Attention of all rows, and the output's product, of all or those kept."""
        latents = x
        if self.q_latent is not None and self.q_norm is not None:
            latents = linear(x, self.q_latent, self.q_latent_bias)
            rms_norm(latents, self.q_norm, _EPS, out=latents)
        segments: Sequence[Segment] = ()
        if self.indexer is not None:
            indexer = self.indexer
            segments = indexer.choose(x, latents, batch) if self.scores else indexer.chosen(batch)
        count, rank = x.shape[0], self.latents.kv_rank
        shape = (self.heads, rank + self.latents.rope)
        flat = (count, prod(shape), self.dtype, self.device)
        q = self.scratch.empty("latent queries", *flat).unflatten(1, shape)
        self._queries(latents, batch.positions, q)
        mixed = self.scratch.empty("latents, mixed", *flat).unflatten(1, shape)
        self._mix(q, batch, segments, mixed)
        if kept is not None:
            mixed, out = mixed[kept], out[: len(kept)]
        values = torch.bmm(mixed[..., :rank].transpose(0, 1), self.expand)
        linear(values.transpose(0, 1).flatten(1), self.o, self.o_bias, out=out)

    def _queries(self, latents: Tensor, positions: Tensor, q: Tensor) -> None:
        """Fills q [rows, heads, kv_rank + rope]."""
        nope, rank = self.latents.nope, self.latents.kv_rank
        apart = linear(latents, self.q).unflatten(1, (self.heads, nope + self.latents.rope))
        q[..., :rank] = torch.bmm(apart[..., :nope].transpose(0, 1), self.absorb).transpose(0, 1)
        q[..., rank:] = apart[..., nope:]
        self._turn(q[..., rank:], positions)

    def _mix(self, q: Tensor, batch: Batch, segments: Sequence[Segment], out: Tensor) -> None:
        """Each row's and head's weighted latents; what comes of their rotated keys is of no use."""
        pools = self.cached, self.cached
        for segment in segments:
            segment.attend(q, *pools, self.scale, out)
        if not segments:
            paged = Paged(batch.block_table, batch.cu_seqlens_q, batch.positions, batch.seq_lens)
            paged_attention(q, pools, paged, self.scale, out=out)
