"""The blocks that the families are made of, and the chain that joins them (DESIGN section 1).

A block turns normalised rows `x`, the same on every rank, into this rank's partial sums:
`block(x, batch, out)` fills `out` and returns None, or fills `out[:len(kept)]` and returns the
ascending row indices `kept` that go on. (The embedding has no use for `x`.) Query heads, the MLP's
width and the vocabulary are split over the ranks; what a rank lacks, the seam's sum over ranks adds.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.comm.seam import Joint
from weaveinf.models.config import ModelConfig
from weaveinf.models.weights import Piece, Weights, columns, rows
from weaveinf.ops.activation import silu_mul
from weaveinf.ops.attention import Paged, paged_attention
from weaveinf.ops.embedding import embed
from weaveinf.ops.linear import PackedWeight, linear
from weaveinf.ops.moe import ExpertWeights, moe, route
from weaveinf.ops.norm import rms_norm
from weaveinf.ops.rope import rope_, write_kv
from weaveinf.selectors.selector import Heads, Index, Selector

T = TypeVar("T")
_KEPT = 32  # row counts of either half, for each kind of block
Kept = Tensor | None
Ran = Kept | Generator[Tensor, Tensor, Kept]
Block = Callable[[Tensor, Batch, Tensor], Ran]


class Scratch:
    """Memory that a block needs only while it runs, shared by all blocks of a model.

    Layers repeat the same shapes, so what was made for the previous block serves the next. A block
    that votes must not count on it across the vote: another half's blocks may run meanwhile.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._made: dict[tuple[Any, int], Any] = {}

    def get(self, key: Any, count: int, make: Callable[[int], T]) -> T:
        """What `make(count)` returned, made anew only when `count` was not among the latest."""
        made = self._made.get((key, count))
        if made is None:
            if len(self._made) > _KEPT:
                self._made.clear()
            self._made[key, count] = made = make(count)
        return made

    def empty(self, name: str, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised [count, width]; the memory grows to the largest ever asked and is kept."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count * width:
            self._made.clear()  # views of the memory that is given up
            self._flat[name] = flat = torch.empty(count * width, dtype=dtype, device=device)
        return flat[: count * width].view(count, width)

    def memory(self) -> list[Tensor]:
        """All that it has handed out last: who holds it may go on to use it when more is needed elsewhere."""
        return list(self._flat.values())


class Share:
    """The part of every layer that one rank of `size` owns."""

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.heads = self.of(config.num_heads)
        kv = config.num_kv_heads
        # More ranks than KV heads: each rank keeps a copy of the one that its query heads read.
        self.kv_heads = self.of(kv) if size <= kv else range(rank * kv // size, rank * kv // size + 1)
        self.vocab_shard = -(-config.vocab_size // size)
        self.vocab_start = rank * self.vocab_shard
        self.vocab = range(config.vocab_size)[self.vocab_start :][: self.vocab_shard]

    def of(self, total: int) -> range:
        """This rank's share of `total` things, which the ranks divide evenly."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)


@dataclass
class Parts:
    """What every block is built from: config, share, weights; and the scratch memory they share."""

    config: ModelConfig
    share: Share
    weights: Weights
    rotary: Tensor
    scratch: Scratch
    closing: list[PackedWeight] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    """What blocks leave for those of later layers, by names of their own."""

    def closes(self, weight: PackedWeight, bias: bool) -> PackedWeight:
        """Notes a weight whose product is all of a block's partial sums."""
        if not bias:
            self.closing.append(weight)
        return weight

    def bias(self, wanted: bool, *pieces: Piece) -> Tensor | None:
        return self.weights.tensor(*pieces) if wanted else None

    def row_bias(self, wanted: bool, name: str, n: int) -> Tensor | None:
        """The bias of a layer whose inputs are split: rank 0 alone adds it to its partial sums."""
        bias = self.bias(wanted, Piece(name, (n,)))
        return bias if self.share.rank == 0 else None

    def norm(self, name: str) -> Joint:
        weight = self.weights.tensor(Piece(name, (self.config.hidden_size,)))
        return Joint(weight, self.config.rms_norm_eps)


class Embedding:
    """Rows of the embedding table; a token of another rank's vocabulary shard gives zeros."""

    def __init__(self, parts: Parts, name: str) -> None:
        share, config = parts.share, parts.config
        self.first = share.vocab_start
        self.table = parts.weights.tensor(rows(name, config.vocab_size, config.hidden_size, share.vocab))

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        embed(batch.input_ids, self.table, self.first, out)


class AttentionBlock(Protocol):
    """A layer's first block, which reads the cache.

    Attributes:
        pool_specs: what all layers of its kind keep for every token or page.
    """

    pool_specs: Sequence[PoolSpec]

    def bind(self, pools: Pools, selector: Selector | None) -> None:
        """Gives the layer its part of the pools, and what chooses of them."""
        ...

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> Ran: ...


class _Heads(NamedTuple):
    """Scratch of an attention block: one row per token, and its views per head."""

    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    qk: Tensor
    q_rows: Tensor
    kv_rows: Tensor
    mixed: Tensor
    mixed_heads: Tensor


class Attention:
    """Causal attention with grouped queries and rotary positions:

        q, k, v = W_q x, W_k x, W_v x           (+ biases; with q/k norm: q, k = norm(q), norm(k))
        out     = W_o softmax(R(q) R(k)^T / sqrt(head_dim)) v

    over the cached keys of the sequence, its window if it has one. In the last layer, keys and
    values are written for all rows, but queries computed only for those whose logits are wanted.
    """

    def __init__(self, parts: Parts, layer: int, name: str) -> None:
        config, share, weights = parts.config, parts.share, parts.weights
        self.layer = layer
        self.dim = dim = config.head_dim
        self.scale = dim**-0.5
        self.window = config.windows[layer]
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = len(share.heads), len(share.kv_heads)
        self.last = layer == config.num_layers - 1
        self.rotary, self.scratch = parts.rotary, parts.scratch
        self.dtype, self.device = weights.dtype, weights.device

        def cut(which: str, total: int, own: range) -> tuple[Piece, Piece]:
            span = range(own.start * dim, own.stop * dim)
            bias = Piece(f"{name}.{which}_proj.bias", (total * dim,), (slice(span.start, span.stop),))
            return rows(f"{name}.{which}_proj.weight", total * dim, config.hidden_size, span), bias

        q, q_bias = cut("q", config.num_heads, share.heads)
        k, k_bias = cut("k", config.num_kv_heads, share.kv_heads)
        v, v_bias = cut("v", config.num_kv_heads, share.kv_heads)
        # One product makes q, k and v; in the last layer q is apart, for its fewer rows.
        self.qkv = weights.packed(k, v) if self.last else weights.packed(q, k, v)
        biases = (k_bias, v_bias) if self.last else (q_bias, k_bias, v_bias)
        self.qkv_bias = parts.bias(config.qkv_bias, *biases)
        self.q = weights.packed(q) if self.last else None
        self.q_bias = parts.bias(config.qkv_bias, q_bias) if self.last else None
        self.q_norm = parts.bias(config.qk_norm, Piece(f"{name}.q_norm.weight", (dim,)))
        self.k_norm = parts.bias(config.qk_norm, Piece(f"{name}.k_norm.weight", (dim,)))
        span = range(share.heads.start * dim, share.heads.stop * dim)
        o = columns(f"{name}.o_proj.weight", config.hidden_size, config.num_heads * dim, span)
        self.o = parts.closes(weights.packed(o), config.output_bias)
        self.o_bias = parts.row_bias(config.output_bias, f"{name}.o_proj.bias", config.hidden_size)
        self.keys = self.values = torch.empty(0)
        self.selector: Selector | None = None
        self.rotates = True
        shape = (self.kv_heads, dim)
        self.pool_specs: Sequence[PoolSpec] = [
            PoolSpec(pool, shape, self.dtype, config.num_layers) for pool in ("key", "value")
        ]

    def bind(self, pools: Pools, selector: Selector | None) -> None:
        """Gives the layer its pages, [num_pages, page_size, kv_heads, head_dim], and what chooses of them."""
        self.keys, self.values = pools["key"][self.layer], pools["value"][self.layer]
        self.selector = selector
        self.rotates = selector is None or not selector.unrotated

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> Ran:
        s = self.scratch.get("attention, keys" if self.last else "attention", x.shape[0], self._heads)
        linear(x, self.qkv, self.qkv_bias, out=s.kv_rows if self.last else s.qkv)
        if self.q_norm is not None and self.k_norm is not None:
            if not self.last:
                rms_norm(s.q, self.q_norm, self.eps, out=s.q)
            rms_norm(s.k, self.k_norm, self.eps, out=s.k)
        if self.rotates:
            rope_(s.k if self.last else s.qk, self.rotary, batch.positions)
        write_kv(s.k, s.v, self.keys, self.values, batch.slot_mapping)
        if self.selector is not None:
            self.selector.write(self.layer, s.k, self.keys, batch)
        if self.q is None:
            return self._attend(s, batch, out, None)
        kept = batch.logit_rows if batch.logit_rows.shape[0] < batch.num_tokens else None
        # Rows of a prompt that choose together need the queries of all of them.
        if kept is None or (self.selector is not None and self.selector.row_align > 1):
            return self._attend(self._last_queries(x, batch, self.q), batch, out, kept)
        batch = batch.take(kept)
        done = self._attend(self._last_queries(x[kept], batch, self.q), batch, out[: len(kept)], None)
        return _returning(done, kept) if isinstance(done, Generator) else kept

    def _last_queries(self, x: Tensor, batch: Batch, w_q: PackedWeight) -> _Heads:
        s = self.scratch.get("attention, queries", x.shape[0], self._heads)
        linear(x, w_q, self.q_bias, out=s.q_rows)
        if self.q_norm is not None:
            rms_norm(s.q, self.q_norm, self.eps, out=s.q)
        if self.rotates:
            rope_(s.q, self.rotary, batch.positions)
        return s

    def _attend(self, s: _Heads, batch: Batch, out: Tensor, kept: Kept) -> Ran:
        """Attention and the output's product; of all rows, or of those kept."""
        if self.selector is not None:
            return self._attend_to_some(s, batch, out, kept, self.selector)
        paged = Paged(batch.block_table, batch.cu_seqlens_q, batch.positions, batch.seq_lens)
        paged_attention(s.q, (self.keys, self.values), paged, self.scale, self.window, s.mixed_heads)
        linear(s.mixed, self.o, self.o_bias, out=out)
        return None

    def _attend_to_some(
        self, s: _Heads, batch: Batch, out: Tensor, kept: Kept, selector: Selector
    ) -> Generator[Tensor, Tensor, Kept]:
        # While a vote is under way, another half may use the scratch memory: the queries go along.
        q = s.q.clone()
        for segment in (yield from selector.choose(self.layer, q, self.keys, batch)):
            segment.attend(q, self.keys, self.values, self.scale, s.mixed_heads)
        mixed, out = (s.mixed, out) if kept is None else (s.mixed[kept], out[: len(kept)])
        linear(mixed, self.o, self.o_bias, out=out)
        return kept

    def _heads(self, count: int) -> _Heads:
        h, kv, d = self.heads, self.kv_heads, self.dim
        qkv = self.scratch.empty("attention", count, (h + 2 * kv) * d, self.dtype, self.device)
        mixed = self.scratch.empty("attention, mixed", count, h * d, self.dtype, self.device)
        split = qkv.view(count, h + 2 * kv, d)
        of_heads = split[:, :h], split[:, h : h + kv], split[:, h + kv :], split[:, : h + kv]
        return _Heads(qkv, *of_heads, qkv[:, : h * d], qkv[:, h * d :], mixed, mixed.view(count, h, d))


def _returning(block: Generator[Tensor, Tensor, Kept], kept: Tensor) -> Generator[Tensor, Tensor, Kept]:
    yield from block
    return kept


class Mlp:
    """The gated MLP: out = W_down (silu(W_gate x) * W_up x), its width split over the ranks."""

    def __init__(self, parts: Parts, name: str) -> None:
        config, weights = parts.config, parts.weights
        hidden, inner = config.hidden_size, config.intermediate_size
        own = parts.share.of(inner)
        span = (slice(own.start, own.stop),)
        up = [f"{name}.{which}_proj" for which in ("gate", "up")]
        self.gate_up = weights.packed(*(rows(f"{n}.weight", inner, hidden, own) for n in up))
        self.gate_up_bias = parts.bias(config.mlp_bias, *(Piece(f"{n}.bias", (inner,), span) for n in up))
        down = columns(f"{name}.down_proj.weight", hidden, inner, own)
        self.down = parts.closes(weights.packed(down), config.mlp_bias)
        self.down_bias = parts.row_bias(config.mlp_bias, f"{name}.down_proj.bias", hidden)
        self.width = len(own)
        self.scratch, self.dtype, self.device = parts.scratch, weights.dtype, weights.device

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        both, inner = self.scratch.get("mlp", x.shape[0], self._widths)
        linear(x, self.gate_up, self.gate_up_bias, out=both)
        silu_mul(both, out=inner)
        linear(inner, self.down, self.down_bias, out=out)

    def _widths(self, count: int) -> tuple[Tensor, Tensor]:
        both = self.scratch.empty("mlp", count, 2 * self.width, self.dtype, self.device)
        return both, self.scratch.empty("mlp, inner", count, self.width, self.dtype, self.device)


class ExpertMlp:
    """The mixture: out = sum of p_e Mlp_e(x) over the top_k experts e of softmax(W_router x).

    Every rank routes alike and holds its share of every expert's width. `projections` names gate,
    up and down within an expert. Checkpoints keep experts one by one, or fused as
    `experts.gate_up_proj` [count, 2 width, hidden], `experts.down_proj` [count, hidden, width].
    """

    def __init__(self, parts: Parts, name: str, projections: tuple[str, str, str]) -> None:
        config, weights = parts.config, parts.weights
        assert config.experts is not None
        self.experts = experts = config.experts
        hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
        own = parts.share.of(inner)
        self.router = weights.packed(rows(f"{name}.gate.weight", count, hidden, range(count)), wide=True)
        gate_up, down = [], []
        fused = weights.has(f"{name}.experts.gate_up_proj")
        names = [f"{name}.experts.{{}}.{which}.weight" for which in projections]
        for e in range(count):
            if fused:
                both, only = f"{name}.experts.gate_up_proj", slice(e, e + 1)
                shape = (count, 2 * inner, hidden)
                spans = (slice(at + own.start, at + own.stop) for at in (0, inner))
                halves = [Piece(both, shape, (only, span)) for span in spans]
                tall = (only, slice(None), slice(own.start, own.stop))
                back = Piece(f"{name}.experts.down_proj", (count, hidden, inner), tall)
            else:
                halves = [rows(n.format(e), inner, hidden, own) for n in names[:2]]
                back = columns(names[2].format(e), hidden, inner, own)
            gate_up.append(weights.packed(*halves))
            down.append(weights.packed(back))
        self.gate_up, self.down = ExpertWeights(gate_up), ExpertWeights(down)

    def __call__(self, x: Tensor, batch: Batch, out: Tensor) -> None:
        weights, ids = self._route(linear(x, self.router, out_dtype=torch.float32))
        moe(x, self.gate_up, self.down, weights, ids, out)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of each row's experts, as `moe` takes them."""
        return route(logits, self.experts.top_k, self.experts.renormalize)


class Head:
    """Logits of this rank's vocabulary shard: float32 [rows, vocab_shard], padding at -inf."""

    def __init__(self, parts: Parts, name: str) -> None:
        config, share = parts.config, parts.share
        piece = rows(name, config.vocab_size, config.hidden_size, share.vocab)
        self.real = len(share.vocab)
        self.padded = share.vocab_shard > self.real
        self.weight = parts.weights.packed(piece, pad=share.vocab_shard - self.real, wide=True)

    def __call__(self, x: Tensor) -> Tensor:
        logits = linear(x, self.weight, out_dtype=torch.float32)
        if self.padded:
            logits[:, self.real :] = -torch.inf
        return logits


def dense_layer(parts: Parts, i: int) -> tuple[Attention, Mlp]:
    """Attention and MLP of layer i, as most families have them."""
    name = f"model.layers.{i}"
    return Attention(parts, i, f"{name}.self_attn"), Mlp(parts, f"{name}.mlp")


class Model:
    """One rank's share of a model: the chain of its blocks and joints, and the head behind it.

    Attributes:
        chain: (block, joint) pairs; the joint is the norm that follows the block.
        head: rows [rows, hidden] of the last seam -> float32 [rows, vocab_shard].
        vocab_start, vocab_shard: this rank's token ids are the range of that start and length.
        scratch: what all blocks share.
        closing: the weights of products that are all of a block's partial sums, without a bias.
        pool_specs: the pools that `bind` wants.
    """

    def __init__(self, parts: Parts, layer: Callable[[Parts, int], tuple[AttentionBlock, Block]]) -> None:
        """Builds embedding, layers, head; `layer(parts, i)` gives attention and MLP of layer i."""
        config, share = parts.config, parts.share
        norm = "model.layers.{}.input_layernorm.weight"
        after = "model.layers.{}.post_attention_layernorm.weight"
        embedding = Embedding(parts, "model.embed_tokens.weight")
        self.config = config
        self.chain: list[tuple[Block, Joint]] = [(embedding, parts.norm(norm.format(0)))]
        self._attentions: list[AttentionBlock] = []
        for i in range(config.num_layers):
            attention, mlp = layer(parts, i)
            last = i == config.num_layers - 1
            self.chain.append((attention, parts.norm(after.format(i))))
            self.chain.append((mlp, parts.norm("model.norm.weight" if last else norm.format(i + 1))))
            self._attentions.append(attention)
        # A file's own head counts even where the config ties it, as in transformers.
        own = not config.tie_word_embeddings or parts.weights.has("lm_head.weight")
        self.head = Head(parts, "lm_head.weight" if own else "model.embed_tokens.weight")
        self.closing = parts.closing
        self.scratch, self._rotary = parts.scratch, parts.rotary
        self.vocab_start, self.vocab_shard = share.vocab_start, share.vocab_shard
        self.pool_specs = self._attentions[0].pool_specs
        self._share, self._dtype, self._device = share, parts.weights.dtype, parts.weights.device

    def heads(self, max_num_seqs: int, fingerprint: str = "") -> Heads:
        """What a selector must know, to choose for so many requests at a time."""
        config, index = self.config, None
        if (own := config.indexing) is not None:
            index = Index(own.top_k, own.dim, sum(own.layers))
        return Heads(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            kv_heads=self._share.kv_heads,
            ranks=self._share.size,
            max_num_seqs=max_num_seqs,
            dtype=self._dtype,
            device=self._device,
            index=index,
            rank=self._share.rank,
            fingerprint=fingerprint,
            rotary=self._rotary,
            max_tokens=config.max_model_len,
        )

    def bind(self, pools: Pools, selector: Selector | None = None) -> None:
        """Gives every attention layer its pages, and what chooses of them; needed before the first run."""
        for attention in self._attentions:
            attention.bind(pools, selector)
