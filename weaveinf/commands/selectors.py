"""`weaveinf bench selectors`: a layer's attention over long contexts, chosen beside dense: an answer's row of
each sequence, and a chunk of one sequence's prompt.

Every row counts all that a method does for a step of a layer: looking on at the write, scoring, choosing,
finding the tokens in their pages and attending. Layers take turns, so that no cache of the processor holds a
layer's keys from one turn to the next.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.commands.report import in_turns, read_rate, write_json
from weaveinf.config import PAGE_SIZE
from weaveinf.ops import index, select
from weaveinf.ops.attention import Paged, Pair, paged_attention
from weaveinf.ops.index import IndexKeys
from weaveinf.selectors.fasa import save
from weaveinf.selectors.hisa import POOL, Hisa
from weaveinf.selectors.registry import settings
from weaveinf.selectors.segments import PerRow, RowFacts
from weaveinf.selectors.selector import Heads, Index, Selector
from weaveinf.selectors.tokenselect import CHUNK

_LAYERS = 10  # the last ones are timed: the methods' own first layers are dense
_TIMED = range(2, _LAYERS)
_STEPS = 12


class Context:
    """A batch of sequences with random keys and values in pages in random order, one layer after another."""

    def __init__(
        self, args: argparse.Namespace, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.batch, self.tokens = args.batch, tokens
        self.heads = Heads(
            num_layers=_LAYERS,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            kv_heads=range(args.kv_heads),
            ranks=1,
            max_num_seqs=args.batch,
            dtype=dtype,
            device=device,
        )
        each = -(-(tokens + _STEPS * 2) // PAGE_SIZE)
        self.table = torch.randperm(args.batch * each).to(torch.int32).view(args.batch, each)
        shape = (args.kv_heads, args.head_dim)
        self.specs = [PoolSpec(name, shape, dtype, _LAYERS) for name in ("key", "value")]
        self.pools = Pools(self.specs, args.batch * each, PAGE_SIZE, self.heads.device, True)
        noise = torch.randn(1 << 22, device=device).to(dtype)
        for name in ("key", "value"):
            for layer in _TIMED:
                flat = self.pools[name][layer].flatten()
                for at in range(0, len(flat), len(noise)):
                    flat[at : at + len(noise)] = noise[: len(flat) - at].roll(at // 7)

    def layer(self, layer: int) -> Pair:
        return self.pools["key"][layer], self.pools["value"][layer]

    def make(self, wanted: dict[str, Any]) -> Selector:
        """A method over this cache, which has seen all of it."""
        selector = settings(wanted).make(self.heads, PAGE_SIZE)
        selector.bind(Pools(selector.pools, self.pools.num_pages, PAGE_SIZE, self.heads.device, True))
        for s in range(self.batch):
            for start in range(0, self.tokens, 4096):
                rows = torch.arange(start, min(start + 4096, self.tokens), dtype=torch.int32)
                batch = self.rows(rows, s, s + 1)
                for layer in _TIMED:
                    keys = self.pools["key"][layer]
                    selector.write(layer, _written(keys, batch), keys, batch)
        return selector

    def rows(self, positions: Tensor, first: int, end: int, prompt: int = 1) -> Batch:
        """These positions of each of some sequences, whose prompts are so long."""
        count = len(positions)
        table = self.table[first:end]
        slots = table[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        every = torch.arange(first, end, dtype=torch.int32)
        return Batch(
            input_ids=torch.zeros(count * len(every), dtype=torch.int64),
            positions=positions.repeat(len(every)),
            slot_mapping=slots.flatten().int(),
            cu_seqlens_q=torch.arange(len(every) + 1, dtype=torch.int32) * count,
            seq_lens=(positions[-1:] + 1).repeat(len(every)),
            num_prompt_tokens=torch.full_like(every, prompt),
            block_table=table,
            state_slot=every,
            logit_rows=torch.arange(count * len(every)),
        ).to(self.heads.device)


def run(args: argparse.Namespace) -> None:
    if min(args.tokens) < CHUNK or args.heads % args.kv_heads:
        raise ValueError(f"--tokens must be at least {CHUNK}, --heads a multiple of --kv-heads")
    dtype = torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = read_rate(device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for tokens in args.tokens:
            context = Context(args, tokens, dtype, device)
            methods = _methods(args, Path(folder), context.heads)
            rows += _compare(context, methods, args.turns, rate)
            if "tokenselect" in args.methods:
                rows += _prompt(context, max(1, args.turns // 5))
            if "hisa" in args.methods:
                rows += _index(context, args.turns)
    about = {"batch": args.batch, "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
    about |= {"machine_gb_per_s": rate, "threads": torch.get_num_threads(), "rows": rows}
    print(_table(about))
    write_json(args.json, about)


def _methods(args: argparse.Namespace, folder: Path, heads: Heads) -> dict[str, dict[str, Any]]:
    """What is timed; FASA's planes are as good as any here."""
    file = folder / "planes.json"
    equal = torch.zeros(heads.num_layers, heads.num_heads, heads.head_dim // 2)
    save(file, "", heads.fingerprint, [*equal], heads.num_kv_heads)
    known: dict[str, dict[str, Any]] = {
        "tokenselect, no hits": {"name": "tokenselect", "threshold": 2.0},
        "tokenselect, all hits": {"name": "tokenselect", "threshold": -1.0},
        "fasa": {"name": "fasa", "table": str(file)},
        "quest": {"name": "quest"},
    }
    # Also where a method would not be worth its while: that is what is asked.
    return {t: known[t] | {"dense_below": 0} for t in known if t.split(",")[0] in args.methods}


def _compare(
    context: Context, methods: dict[str, dict[str, Any]], turns: int, rate: float
) -> list[dict[str, Any]]:
    calls = {"dense": _dense(context)} | {title: _chosen(context, m) for title, m in methods.items()}
    rows = _rows(context.tokens, calls, turns)
    heads = context.heads
    gigabytes = 2 * context.batch * context.tokens * heads.num_kv_heads * heads.head_dim * 2 / 1e9
    rows[0]["share_of_bandwidth"] = gigabytes / rows[0]["ms"] * 1e3 / rate
    return rows


def _rows(tokens: int, calls: dict[str, Callable[[], float]], turns: int) -> list[dict[str, Any]]:
    """Medians over turns, beside the first method."""
    ms = in_turns(calls, turns)
    first = next(iter(ms.values()))
    return [{"tokens": tokens, "method": t, "ms": ms[t], "times_dense": first / ms[t]} for t in ms]


def _prompt(context: Context, turns: int) -> list[dict[str, Any]]:
    """A chunk at the end of a prompt, read by TokenSelect and whole."""
    selector = context.make({"name": "tokenselect", "dense_below": 0})
    heads, layer, end = context.heads, _TIMED[0], context.tokens // CHUNK * CHUNK
    batch = context.rows(torch.arange(end - CHUNK, end, dtype=torch.int32), 0, 1, end)
    q = torch.randn(CHUNK, heads.num_heads, heads.head_dim, device=heads.device).to(heads.dtype)
    pools, out = context.layer(layer), torch.empty_like(q)
    new, paged = _written(pools[0], batch), Paged(batch.block_table, batch.cu_seqlens_q, batch.positions)
    dense = _ms(lambda: paged_attention(q, pools, paged, heads.head_dim**-0.5, out=out))
    chosen = _ms(lambda: _step(selector, layer, q, new, pools, copy(batch), out))
    of = f"{CHUNK} of a prompt"
    return _rows(context.tokens, {f"dense, {of}": dense, f"tokenselect, {of}": chosen}, turns)


def _index(context: Context, turns: int) -> list[dict[str, Any]]:
    """What an answer's row costs the indexer of DeepSeek-V3.2 in a layer: flat, and in HISA's two stages."""
    top_k, heads, dim, dtype = 2048, 64, 128, context.heads.dtype
    wanted, num_pages = Hisa(), context.pools.num_pages
    selector = wanted.make(replace(context.heads, index=Index(top_k, dim, 1)), PAGE_SIZE)
    pool = torch.randn(num_pages, PAGE_SIZE, dim).to(dtype)
    pools = Pools(selector.pools, num_pages, PAGE_SIZE, context.heads.device, True)
    pools[POOL][0].copy_(pool.float().mean(1))  # as if of whole blocks: as much to read
    selector.bind(pools)
    q, weights = torch.randn(1, heads, dim).to(dtype), torch.randn(1, heads)
    keys, own = IndexKeys(pool), torch.tensor([context.tokens - 1], dtype=torch.int32)
    slot, budget = torch.zeros(1, dtype=torch.int64), torch.tensor([wanted.budget], dtype=torch.int32)
    facts = RowFacts(*(x.int().numpy() for x in (slot, own, own, budget)))
    rows = PerRow(own, budget, context.table[:1], slot, context.tokens, facts)

    def flat() -> None:
        found = index.choose(q, weights, keys, rows.table, own + 1, rows.longest, top_k)
        select.places(found[0].unsqueeze(1), rows.table, PAGE_SIZE)

    def hisa() -> None:
        found = selector.choose_among_blocks(0, q, weights, keys, rows)
        select.places(found[0].unsqueeze(1), rows.table, PAGE_SIZE)

    return _rows(context.tokens, {"index, flat": _ms(flat), "index, hisa": _ms(hisa)}, turns)


def _now() -> float:
    """Seconds, once a device has done all it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _ms(call: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """The same, which says how long each of the `times` took that it does something."""

    def timed() -> float:
        began = _now()
        call()
        return (_now() - began) / times * 1e3

    return timed


def _queries(context: Context) -> Tensor:
    heads = context.heads
    return torch.randn(context.batch, heads.num_heads, heads.head_dim, device=heads.device).to(heads.dtype)


def _dense(context: Context) -> Callable[[], float]:
    q, out = _queries(context), torch.empty_like(_queries(context))
    batch = context.rows(torch.tensor([context.tokens - 1], dtype=torch.int32), 0, context.batch)
    paged = Paged(batch.block_table, batch.cu_seqlens_q, batch.positions)

    def call() -> None:
        for layer in _TIMED:
            paged_attention(q, context.layer(layer), paged, context.heads.head_dim**-0.5, out=out)

    return _ms(call, len(_TIMED))


def _chosen(context: Context, wanted: dict[str, Any]) -> Callable[[], float]:
    selector = context.make(wanted)
    q, out = _queries(context), torch.empty_like(_queries(context))
    at = [context.tokens - 1]

    def call() -> float:
        """A step: the answer goes on by a token, over and over in the same few places."""
        at[0] = context.tokens - 1 + (at[0] - context.tokens + 2) % _STEPS
        batch = context.rows(torch.tensor(at, dtype=torch.int32), 0, context.batch)
        pools = [context.layer(layer) for layer in _TIMED]
        new = [_written(keys, batch) for keys, _ in pools]

        def step() -> None:
            for layer, rows, of_layer in zip(_TIMED, new, pools, strict=True):
                _step(selector, layer, q, rows, of_layer, batch, out)

        return _ms(step, len(_TIMED))()

    return call


def _written(keys: Tensor, batch: Batch) -> Tensor:
    """The batch's keys, as the products made them."""
    return keys.flatten(0, 1)[batch.slot_mapping.long()]


def _step(
    selector: Selector, layer: int, q: Tensor, new: Tensor, pools: Pair, batch: Batch, out: Tensor
) -> None:
    """What a layer does with a selector, but for the model's products."""
    selector.write(layer, new, pools[0], batch)
    turn = selector.choose(layer, q, pools[0], batch)
    try:
        ballot = next(turn)
        while True:
            ballot = turn.send(ballot)  # one rank: its own vote is the sum
    except StopIteration as end:
        for segment in end.value:
            segment.attend(q, *pools, q.shape[2] ** -0.5, out)


def _table(about: dict[str, Any]) -> str:
    head = "batch {batch}, {heads} heads, {kv_heads} KV heads of {head_dim}, bfloat16, {threads} threads, "
    lines = [(head + "memory read at {machine_gb_per_s:.1f} GB/s").format(**about)]
    for row in about["rows"]:
        text = "{tokens:7d} tokens  {method:29s} {ms:8.3f} ms  {times_dense:6.2f}x".format(**row)
        if "share_of_bandwidth" in row:
            text += f"  ({row['share_of_bandwidth']:.0%} of the memory's rate)"
        lines.append(text)
    return "\n".join(lines)
