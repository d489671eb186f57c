"""FASA (arXiv 2602.03152): single tokens for each KV head, by the few rotary planes that agree most with the
whole head.

Plane i of a head turns by the frequency base ** (-2 i / D); in the layout of these models it is the channels
i and i + D / 2. `weaveinf calibrate` ranks each KV head's planes on a text (`agreement`); the keys' channels
of the best lie side by side in a pool of their own, so that an answer's row reads only them to score every
token. Of the paper's sets, one for each query head, those of a KV head's queries are one here, by their soft
vote (`ops.select.votes`), as a set for each would read the whole key after all. Layer 0 reads all.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import select
from weaveinf.selectors.by_head import ByHead, HeadsChoice
from weaveinf.selectors.selector import Budgets, Heads, PerRow, TokensOfHeads

POOL = "fasa planes"
_VECTOR = 16  # channels: what the kernels take at once


@dataclass(frozen=True)
class Fasa:
    """table: the file that `weaveinf calibrate` wrote for this model. budget: cached tokens that an answer's
    rows read for each KV head; planes: how many of a head's planes score them. dense_below: cached tokens up
    to which all are read, as choosing costs more than it saves."""

    name: ClassVar[str] = "fasa"
    table: str = ""
    budget: int = 256
    planes: int = 16
    dense_below: int = 3072

    def make(self, heads: Heads, page_size: int) -> FasaSelector:
        return FasaSelector(self, heads, page_size)


def agreement(q: Tensor, k: Tensor, kv_heads: int, count: int) -> Tensor:
    """Contextual agreement (the paper's CA_K): how many of a head's `count` best tokens each plane alone
    would find, as a share, averaged over queries and over the heads of a KV head.

    q: [rows, Hq, D] at the last positions of k [tokens, Hkv, D], both rotated -> float32 [Hkv, D / 2].
    """
    rows, heads, dim = q.shape
    half, tokens = dim // 2, len(k)
    found = torch.zeros(kv_heads, half)
    at = torch.arange(tokens)
    for r in range(rows):
        future = at > tokens - rows + r
        for head in range(heads):
            kv = head // (heads // kv_heads)
            products = q[r, head].float() * k[:, kv].float()  # [tokens, D]
            by_plane = (products[:, :half] + products[:, half:]).T  # [planes, tokens]
            whole = by_plane.sum(0).masked_fill(future, -torch.inf).topk(count).indices
            best = by_plane.masked_fill(future, -torch.inf).topk(count, dim=1).indices
            marked = torch.zeros(tokens, dtype=torch.bool)
            marked[whole] = True
            found[kv] += marked[best].float().mean(1)
    return found * kv_heads / (rows * heads)


def save(path: Path, model: str, ranked: Sequence[Sequence[Sequence[int]]]) -> None:
    """Writes a table: for each layer and KV head of `model`, its planes, the best first."""
    path.write_text(json.dumps({"model": model, "planes": ranked}) + "\n")


def load(path: str, heads: Heads, count: int) -> Tensor:
    """The `count` best planes of each layer and KV head of this rank: int64 [layers, Hkv, count].

    ValueError when it is missing, no such table, or of other sizes than this model's.
    """
    if not path:
        raise ValueError(
            "fasa wants the table of this model: weaveinf calibrate MODEL --out FILE, then table=FILE"
        )
    try:
        ranked = np.array(json.loads(Path(path).read_text())["planes"], np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of weaveinf calibrate: {error}") from None
    wanted = (heads.num_layers, heads.num_kv_heads, heads.head_dim // 2)
    if ranked.shape != wanted or not (np.sort(ranked) == np.arange(wanted[2])).all():
        raise ValueError(
            f"{path} is of another model: layers, KV heads, planes are {ranked.shape}, not {wanted}"
        )
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
        super().__init__(settings, settings.dense_below, dense_layers=1)
        self.budgets = Budgets(heads, 1, settings.budget, settings.budget)
        self._settings, self._heads, self._page = settings, heads, page_size
        planes = load(settings.table, heads, settings.planes)
        width = -(-2 * settings.planes // _VECTOR) * _VECTOR
        self._channels = torch.full((*planes.shape[:2], width), -1, dtype=torch.int32)
        self._channels[..., : 2 * settings.planes] = torch.cat([planes, planes + half], dim=-1)
        shape = (len(heads.kv_heads), width)
        self.pools = [PoolSpec(POOL, shape, heads.dtype, heads.num_layers)]
        self._planes: list[Tensor] = []

    def bind(self, pools: Pools) -> None:
        """See `Selector`."""
        self._planes = pools[POOL]

    def write(self, layer: int, keys: Tensor, pool: Tensor, batch: Batch) -> None:
        """See `Selector`."""
        if layer:
            select.write_channels(keys, self._planes[layer], self._channels[layer], batch.slot_mapping)

    def candidates(self, rows: PerRow) -> HeadsChoice:
        """See `ByHead`."""
        return HeadsChoice(self._heads, rows, rows.position + 1, rows.budget, (0, 0), True)

    def chosen(self, layer: int, q: Tensor, heads: HeadsChoice) -> Generator[Tensor, Tensor, TokensOfHeads]:
        """See `ByHead`."""
        planes, channels = self._planes[layer], self._channels[layer]
        index, counts = yield from heads.choose(q, planes, self._settings.budget, channels)
        return TokensOfHeads(select.places(index, heads.rows.table, self._page), counts)
