"""FASA (arXiv 2602.03152): single tokens for each KV head, by the few rotary planes that agree most with the
whole head.

Plane i of a head turns by the frequency base ** (-2 i / D); in the layout of these models it is the channels
i and i + D / 2. `weaveinf calibrate` ranks each head's planes on a text (`agreement`); the keys' channels
of the best lie side by side in a pool of their own, so that an answer's row reads only them to score every
token. Layer 0 reads all.

The paper has planes and a set of tokens for each query head. Here the queries of a KV head share theirs: the
planes of the highest mean agreement, the tokens of their soft vote (`ops.select.votes`). The paper's own are
there for comparing (`sets`): as if each query head had a KV head of its own, whose planes are kept, and whose
tokens are read, for every query head anew.

Keys and values may be in the host's memory (the paper's FASA-M), all but layer 0's: on the device are the
planes, and what is fetched for a layer, in the places of one more layer of the cache. Of 32 layers with
defaults and heads of 128, 5.3 times less is on the device. (The paper leaves only the keys' other channels on
the host. Whole keys there take as little of the device, and need no putting together.) Rows that read all
fetch all, as prompts do, in every layer.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import select
from weaveinf.selectors.by_head import ByHead, HeadsChoice
from weaveinf.selectors.segments import PerRow, TokensOfHeads
from weaveinf.selectors.selector import Budgets, Choosing, Heads, Settings

Sets = Literal["kv_head", "query_head"]
Memory = Literal["device", "host"]
POOL = "fasa planes"
MIRROR = ("fasa's fetched keys", "fasa's fetched values")
_VECTOR = 16  # channels: what the kernels take at once


@dataclass(frozen=True)
class Fasa(Settings):
    """table: the file that `weaveinf calibrate` wrote for this model. budget: cached tokens that an answer's
    rows read for each KV head; planes: how many of a head's planes score them. dense_below: cached tokens up
    to which all are read, as choosing costs more than it saves. sets: whether it is each "kv_head" that
    chooses, or each "query_head" for itself, which saves little. memory: where keys and values are, on the
    "device" or the "host"."""

    name: ClassVar[str] = "fasa"
    table: str = ""
    budget: int = 256
    planes: int = 16
    dense_below: int = 3072
    sets: Sets = "kv_head"
    memory: Memory = "device"

    def make(self, heads: Heads, page_size: int) -> FasaSelector:
        return FasaSelector(self, heads, page_size)


def agreement(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Contextual agreement (the paper's CA_K): how many of a query head's `count` best tokens each plane
    alone would find, as a share, averaged over queries.

    q: [rows, Hq, D] at the last positions of k [tokens, Hkv, D], both rotated -> float32 [Hq, D / 2].
    """
    rows, heads, dim = q.shape
    half, tokens = dim // 2, len(k)
    found = torch.zeros(heads, half)
    at = torch.arange(tokens)
    for r in range(rows):
        future = at > tokens - rows + r
        for head in range(heads):
            products = q[r, head].float() * k[:, head * k.shape[1] // heads].float()  # [tokens, D]
            by_plane = (products[:, :half] + products[:, half:]).T  # [planes, tokens]
            whole = by_plane.sum(0).masked_fill(future, -torch.inf).topk(count).indices
            best = by_plane.masked_fill(future, -torch.inf).topk(count, dim=1).indices
            marked = torch.zeros(tokens, dtype=torch.bool)
            marked[whole] = True
            found[head] += marked[best].float().mean(1)
    return found / rows


def save(path: Path, model: str, fingerprint: str, found: Sequence[Tensor], kv_heads: int) -> None:
    """Writes the table of the model of this name and fingerprint (`Heads`): for each layer, of whose query
    heads these are the agreements [Hq, D / 2], the planes of each query head and, by the mean over its
    queries, of each KV head, the best first."""

    def ranked(shares: Tensor) -> list[list[int]]:
        order: list[list[int]] = shares.argsort(dim=1, descending=True, stable=True).tolist()
        return order

    of_kv = [ranked(shares.unflatten(0, (kv_heads, -1)).mean(1)) for shares in found]
    sets = {"kv_head": of_kv, "query_head": [*map(ranked, found)]}
    path.write_text(json.dumps({"model": model, "fingerprint": fingerprint} | sets) + "\n")


def load(path: str, heads: Heads, sets: Sets, count: int) -> Tensor:
    """The `count` best planes of each layer and head of this rank, in the table's entry for such sets: int64
    [layers, Hkv, count].

    ValueError when it is missing, no such table, or of another model than this.
    """
    if not path:
        remedy = "weaveinf calibrate MODEL --out FILE, then table=FILE"
        raise ValueError(f"fasa wants the table of this model: {remedy}")
    try:
        table = json.loads(Path(path).read_text())
        ranked, name, known = np.array(table[sets], np.int64), table["model"], table["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is no table of weaveinf calibrate: {error!r}") from None
    wanted = (heads.num_layers, heads.num_kv_heads, heads.head_dim // 2)
    right = known == heads.fingerprint and ranked.shape == wanted
    if not right or not (np.sort(ranked) == np.arange(wanted[2])).all():
        raise ValueError(f"{path} is of another model, {name}: run weaveinf calibrate for this one")
    return torch.from_numpy(ranked[:, heads.kv_heads.start : heads.kv_heads.stop, :count].copy())


class FasaSelector(ByHead):
    """See `Selector`."""

    def __init__(self, settings: Fasa, heads: Heads, page_size: int) -> None:
        half = heads.head_dim // 2
        if settings.budget < 1 or not 1 <= settings.planes <= half:
            raise ValueError(
                f"fasa wants a budget of at least 1 and 1 to {half} planes, got {settings.budget} and "
                f"{settings.planes}"
            )
        for name, known in (("sets", get_args(Sets)), ("memory", get_args(Memory))):
            if (value := getattr(settings, name)) not in known:
                raise ValueError(f"fasa: {name}={value!r} must be one of {', '.join(known)}")
        budgets = Budgets(heads, 1, settings.budget, settings.budget)
        super().__init__(settings, budgets, settings.dense_below, dense_layers=1)
        self._page, self._kv_heads = page_size, len(heads.kv_heads)
        self._heads = heads = heads.apart if settings.sets == "query_head" else heads
        planes = load(settings.table, heads, settings.sets, settings.planes)
        width = -(-2 * settings.planes // _VECTOR) * _VECTOR
        self._channels = torch.full((*planes.shape[:2], width), -1, dtype=torch.int32)
        self._channels[..., : 2 * settings.planes] = torch.cat([planes, planes + half], dim=-1)
        self._channels = self._channels.to(heads.device)
        shape = (len(heads.kv_heads), width)
        self.pools = [PoolSpec(POOL, shape, heads.dtype, heads.num_layers - 1)]
        if settings.memory == "host":
            self.host_layers = range(1, heads.num_layers)
            shape = (self._kv_heads, heads.head_dim)
            self.pools += [PoolSpec(name, shape, heads.dtype, 1) for name in MIRROR]
        self._planes: list[Tensor] = []
        self._mirror: tuple[Tensor, Tensor] | None = None

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""
        self._planes = [torch.empty(0), *pools[POOL]]
        if self.host_layers:
            self._mirror = pools[MIRROR[0]][0], pools[MIRROR[1]][0]

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        found = yield from super().choose(layer, q, pool, batch)
        for segment in found:
            segment.mirror = self._mirror if layer in self.host_layers else None
        return found

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """See `Selector`."""
        if layer:
            channels = self._channels[layer]
            if len(channels) > self._kv_heads:
                keys = keys.repeat_interleave(len(channels) // self._kv_heads, 1)
            select.write_channels(keys, self._planes[layer], channels, batch.slot_mapping)

    def candidates(self, rows: PerRow) -> HeadsChoice:
        """See `ByHead`."""
        vote = self._heads.num_heads > self._heads.num_kv_heads
        return HeadsChoice(self._heads, rows, 1, (0, 0), vote)

    def chosen(self, layer: int, q: Tensor, heads: HeadsChoice) -> Generator[Tensor, Tensor, TokensOfHeads]:
        """See `ByHead`."""
        planes, channels = self._planes[layer], self._channels[layer]
        index, counts = yield from heads.choose(q, planes, channels)
        # All tokens of a KV head lie behind one another, whichever of its queries chose them.
        places = select.places(index.view(len(q), self._kv_heads, -1), heads.rows.table, self._page)
        return TokensOfHeads(places.view(index.shape), counts)
