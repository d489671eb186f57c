"""What the host does for selectors on a device. There is none here: tensors of torch's meta device have no
values, so a step on them shows that the host reads none, and that all it makes is where it belongs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.selectors.harness import CPU, DIM, HEADS, KV_HEADS, LAYERS, MODEL, PAGE, Cached
from tests.selectors.test_selectors import table
from weaveinf.cache.pools import Pools, PoolSpec
from weaveinf.ops import index, select
from weaveinf.ops.attention import Paged, Pair
from weaveinf.ops.index import IndexKeys
from weaveinf.ops.select import Where
from weaveinf.selectors import segments, tokenselect
from weaveinf.selectors.fasa import Fasa
from weaveinf.selectors.hisa import STAGED, Hisa
from weaveinf.selectors.lazyllm import LazyLlm
from weaveinf.selectors.quest import Quest
from weaveinf.selectors.segments import RowFacts, Segment
from weaveinf.selectors.selector import Heads, Index
from weaveinf.selectors.tokenselect import TokenSelect

META = torch.device("meta")
CUDA = torch.device("cuda", 0)
LENGTHS, PROMPTS = [1500, 400, 90, 700], [1500, 10, 60, 40]
ROWS = [(0, 1024, 1500), (1, 398, 400), (2, 80, 81), (3, 699, 700)]
"""Of a prompt, of an answer computed again, dense ones, of an answer."""


def heads(device: torch.device, ranks: int = 1) -> Heads:
    own = range(1) if ranks > KV_HEADS else range(KV_HEADS // ranks)
    return Heads(
        LAYERS,
        HEADS,
        KV_HEADS,
        DIM,
        own,
        ranks,
        len(LENGTHS),
        torch.float32,
        device,
        Index(20, 16, 1),
        0,
        MODEL,
        rotary=torch.ones(1500, 1),
    )


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that only look at what they are given."""

    def there(*given: Any) -> None:
        assert {x.device for x in given if isinstance(x, Tensor)} == {META}

    def votes(q: Tensor, keys: Tensor, where: Where, width: int, *given: Any) -> Tensor:
        there(q, keys, *where, *given)
        return torch.empty(len(q), keys.shape[2], width, device=META)

    def top_k(scores: Tensor, ends: Tensor, wanted: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        there(scores, ends, wanted)
        assert scores.is_contiguous() and len(scores) == len(ends) == len(wanted)
        assert {ends.dtype, wanted.dtype} == {torch.int32}
        found = torch.empty(len(scores), capacity, dtype=torch.int32, device=META)
        return found, torch.empty(len(scores), dtype=torch.int32, device=META)

    def places(index: Tensor, table: Tensor, page_size: int, run: int = 1) -> Tensor:
        there(index, table)
        assert index.is_contiguous() and {index.dtype, table.dtype} == {torch.int32}
        return index.repeat_interleave(run, 2)

    def scores(q: Tensor, weights: Tensor, keys: IndexKeys, *given: Any) -> Tensor:
        there(q, weights, keys.values, *given)
        return torch.empty(len(q), given[2], device=META)

    def attention(q: Tensor, pools: Pair, paged: Paged, scale: float, *, out: Tensor) -> Tensor:
        there(q, *pools, *paged, out)
        return out

    monkeypatch.setattr(select, "votes", votes)
    monkeypatch.setattr(select, "top_k", top_k)
    monkeypatch.setattr(select, "places", places)
    monkeypatch.setattr(select, "write_bounds", there)
    monkeypatch.setattr(select, "write_channels", there)
    monkeypatch.setattr(index, "scores", scores)

    def turned(x: Tensor, rotary: Tensor, positions: Tensor) -> Tensor:
        there(x, positions)
        return x

    monkeypatch.setattr(tokenselect, "rope_", turned)
    for module in (select, segments):
        monkeypatch.setattr(module, "paged_attention", attention)


@pytest.mark.parametrize(
    "method", ["tokenselect", "tokenselect, compacted", "fasa", "fasa, query heads", "fasa, host", "quest"]
)
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_host_waits_for_nothing(tmp_path: Path, method: str, ranks: int) -> None:
    path = table(tmp_path)[0] if method.startswith("fasa") else ""
    settings: Any = {
        "tokenselect": TokenSelect(dense_below=0, budget=60, sinks=5, local=30),
        "tokenselect, compacted": TokenSelect(budget=60, sinks=5, local=30, positions="compacted"),
        "fasa": Fasa(dense_below=0, table=path, budget=50, planes=5),
        "fasa, query heads": Fasa(dense_below=0, table=path, budget=50, planes=5, sets="query_head"),
        "fasa, host": Fasa(dense_below=0, table=path, budget=50, planes=5, memory="host"),
        "quest": Quest(dense_below=0, budget=4 * PAGE),
    }[method]
    cached, of = Cached(LENGTHS, PROMPTS), heads(META, ranks)
    part = settings.make(of, PAGE)
    part.admit(1, 4 * PAGE if method == "quest" else 20)
    shape = (len(of.kv_heads), DIM)
    pools = Pools([PoolSpec("key", shape, torch.float32, LAYERS), *part.pools], cached.num_pages, PAGE, META)
    part.bind(pools)
    keys = pools["key"][2]
    whole = replace(cached.batch(ROWS), logit_rows=torch.tensor([476, 477, 479]))
    part.begin(whole, 2048)
    for batch in (half.to(META) for half in (whole, *whole.split(477))):
        part.write(2, torch.empty(batch.num_tokens, *shape, device=META), keys, batch)
        last = batch.take(batch.logit_rows)
        for some in (batch, last):
            q = torch.empty(some.num_tokens, HEADS // ranks, DIM, device=META)
            turn = part.choose(2, q, keys, some)
            ballot = None
            try:
                while True:
                    ballot = turn.send(ballot)
                    assert ballot.device == META
            except StopIteration as end:
                found: list[Segment] = end.value
            assert any(segment.chosen is not None for segment in found)
            for segment in found:
                segment.attend(q, keys, keys, 1.0, torch.empty_like(q))


def test_hisa_waits_for_nothing() -> None:
    cached = Cached(LENGTHS, PROMPTS)
    part = Hisa(32, 4, 0).make(heads(META), PAGE)
    pools = Pools(part.pools, cached.num_pages, PAGE, META)
    part.bind(pools)
    keys = IndexKeys(torch.empty(cached.num_pages, PAGE, 16, device=META))
    batch = cached.batch(ROWS).to(META)
    part.write_index(0, keys, batch)
    facts = RowFacts.of(batch, part.budgets.of_slot)
    for segment in segments.segments(batch, facts, part.kinds(facts)):
        count = segment.rows.stop - segment.rows.start
        q, weights = torch.empty(count, 3, 16, device=META), torch.empty(count, 3, device=META)
        rows = segment.per_row
        assert rows is not None
        if segment.kind == STAGED:
            chosen, counts = part.choose_among_blocks(0, q, weights, keys, rows)
        else:
            ends = rows.position + 1
            chosen, counts = index.choose(q, weights, keys, rows.table, ends, rows.longest, 20)
        assert chosen.device == counts.device == META and chosen.shape == (count, 20)


def test_lazyllm_is_refused() -> None:
    with pytest.raises(ValueError, match="runs on CPUs only"):
        LazyLlm().make(heads(CUDA), PAGE)
    LazyLlm().make(heads(CPU), PAGE)
