"""Each method's choices against brute force in float64, on one rank and on several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.selectors import harness
from tests.selectors.harness import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MODEL,
    PAGE,
    STRETCH,
    Cached,
    Group,
    best,
    part_of,
    soft_vote,
    sums,
    turned,
)
from weaveinf.cache.pools import PoolSpec, bytes_per_page
from weaveinf.ops import select
from weaveinf.selectors import registry, tokenselect
from weaveinf.selectors.fasa import Fasa, Memory, Sets, agreement, load, save
from weaveinf.selectors.lazyllm import LazyLlm
from weaveinf.selectors.quest import Quest
from weaveinf.selectors.selector import Heads, Settings
from weaveinf.selectors.tokenselect import CHUNK, TokenSelect

SIZES = [1, 2, 4, 8]


def table(path: Path, model: str = MODEL) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A table, and the planes in it of layer 2: of KV heads and of query heads."""
    torch.manual_seed(9)
    found = torch.rand(LAYERS, HEADS, DIM // 2)
    save(path / "planes.json", "a model", model, [*found], KV_HEADS)
    of_kv = found[2].view(KV_HEADS, HEADS // KV_HEADS, -1).sum(1).argsort(1, descending=True)
    return str(path / "planes.json"), of_kv, found[2].argsort(1, descending=True)


@pytest.mark.parametrize("size", SIZES)
def test_quest_takes_the_pages_with_the_highest_bounds(size: int) -> None:
    cached = Cached([301, 200, 63], [290, 100, 10])
    group = Group(cached, Quest(dense_below=0, budget=4 * PAGE), size)
    group.write(cached.batch([(s, 0, n - 2) for s, n in enumerate(cached.lengths)]))
    for back in (2, 1):  # two steps: the last page grows
        batch = cached.batch([(s, n - back, n - back + 1) for s, n in enumerate(cached.lengths)])
        group.write(batch)
        got = group.choose(batch)
        for s, n in enumerate(cached.lengths):
            position = n - back
            last = position // PAGE
            keys, q = cached.keys[s][: position + 1], cached.queries[s][position]
            if position < 4 * PAGE:
                assert got[s] == [None] * KV_HEADS
                continue
            pages = [keys[p * PAGE : (p + 1) * PAGE] for p in range(1, last)]
            low = torch.stack([page.amin(0) for page in pages])
            high = torch.stack([page.amax(0) for page in pages])
            both = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
            votes = sums(both, torch.cat([high, low], -1))
            for g in range(KV_HEADS):
                chosen = {0, last} | best(votes[g], 2, 1)
                assert got[s][g] == {
                    t for p in chosen for t in range(p * PAGE, (p + 1) * PAGE) if t <= position
                }


@pytest.mark.parametrize(("method", "dense"), [("quest", 2), ("quest", LAYERS + 1), ("fasa", 1)])
def test_dense_layers_read_all_and_keep_nothing(tmp_path: Path, method: str, dense: int) -> None:
    cached = Cached([301], [290])
    settings: Settings = Quest(dense_below=0, budget=4 * PAGE, dense_layers=dense)
    if method == "fasa":
        settings = Fasa(dense_below=0, table=table(tmp_path)[0], budget=50, planes=5)
    group = Group(cached, settings)
    assert [spec.layers for spec in part_of(group).pools] == [max(0, LAYERS - dense)]
    for layer in range(LAYERS):
        group.write(cached.batch([(0, 0, 301)]), layer)
        (chosen,) = group.choose(cached.batch([(0, 300, 301)]), layer)
        assert (chosen == [None] * KV_HEADS) == (layer < dense)


def test_a_recycled_page_keeps_nothing() -> None:
    cached = Cached([160, 160], [10, 10])
    cached.table[1] = cached.table[0]  # the second request gets the first one's pages
    group = Group(cached, Quest(dense_below=0, budget=3 * PAGE))
    alone = Group(cached, Quest(dense_below=0, budget=3 * PAGE))
    group.write(cached.batch([(0, 0, 160)]))
    for start, end in ((0, 70), (70, 71), (71, 160)):
        group.write(cached.batch([(1, start, end)]))
    alone.write(cached.batch([(1, 0, 160)]))
    batch = cached.batch([(1, 159, 160)])
    assert group.choose(batch) == alone.choose(batch)


@pytest.mark.parametrize("size", SIZES)
def test_fasa_takes_the_best_tokens_of_its_planes(tmp_path: Path, size: int) -> None:
    path, planes, _ = table(tmp_path)
    cached = Cached([301, 40, 200], [290, 20, 100])
    group = Group(cached, Fasa(dense_below=0, table=path, budget=50, planes=5), size)
    group.write(cached.batch([(s, 0, n) for s, n in enumerate(cached.lengths)]))
    # Two rows of one sequence, as after a preemption: neither sees what comes later.
    batch = cached.batch([(0, 300, 301), (1, 39, 40), (2, 150, 152)])
    got = group.choose(batch)
    assert got[1] == [None] * KV_HEADS
    for row, s, position in ((0, 0, 300), (2, 2, 150), (3, 2, 151)):
        half = planes[:, :5]
        channels = torch.cat([half, half + DIM // 2], -1)
        keys = cached.keys[s][: position + 1].gather(2, channels.expand(position + 1, -1, -1))
        q = cached.queries[s][position].gather(1, channels.repeat_interleave(HEADS // KV_HEADS, 0))
        votes = soft_vote(q, keys, DIM**-0.5)
        assert got[row] == [best(votes[g], 50) for g in range(KV_HEADS)]


@pytest.mark.parametrize("size", SIZES)
def test_fasa_s_query_heads_take_tokens_of_their_own(tmp_path: Path, size: int) -> None:
    """As the paper has it: the best by each head's own planes, without a vote."""
    path, _, planes = table(tmp_path)
    cached = Cached([301, 200], [290, 100])
    group = Group(cached, Fasa(dense_below=0, table=path, budget=50, planes=5, sets="query_head"), size)
    group.write(cached.batch([(s, 0, n) for s, n in enumerate(cached.lengths)]))
    got = group.choose(cached.batch([(0, 300, 301), (1, 150, 152)]))
    for row, s, position in ((0, 0, 300), (1, 1, 150), (2, 1, 151)):
        for head in range(HEADS):
            channels = torch.cat([planes[head, :5], planes[head, :5] + DIM // 2])
            keys = cached.keys[s][: position + 1, head // (HEADS // KV_HEADS), channels]
            scores = keys.double() @ cached.queries[s][position, head, channels].double()
            assert got[row][head] == best(scores, 50)


def test_one_query_for_each_kv_head_makes_the_sets_of_fasa_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "HEADS", KV_HEADS)
    save(tmp_path / "planes.json", "", MODEL, [*torch.rand(LAYERS, KV_HEADS, DIM // 2)], KV_HEADS)
    cached = Cached([301], [290])
    got = []
    for sets in get_args(Sets):
        settings = Fasa(dense_below=0, table=str(tmp_path / "planes.json"), budget=50, planes=5, sets=sets)
        group = Group(cached, settings, 2)
        group.write(cached.batch([(0, 0, 301)]))
        got.append(group.choose(cached.batch([(0, 300, 301)])))
    assert got[0] == got[1]
    assert got[0] != [[None] * KV_HEADS]


@pytest.mark.parametrize("sets", get_args(Sets))
def test_what_rows_read_is_fetched_from_the_host(tmp_path: Path, sets: Sets) -> None:
    """Whatever is not fetched is NaN: rows that choose, and rows of prompts and of short answers, which read
    all of their sequences."""
    path, *_ = table(tmp_path)
    cached = Cached([301, 40, 200, 70], [290, 20, 100, 70])
    outs = []
    for memory in get_args(Memory):
        settings = Fasa(dense_below=0, table=path, budget=50, planes=5, sets=sets, memory=memory)
        group = Group(cached, settings)
        group.write(cached.batch([(s, 0, n) for s, n in enumerate(cached.lengths)]))
        batch = cached.batch([(0, 299, 301), (3, 60, 70), (1, 39, 40), (2, 199, 200)])
        torch.manual_seed(4)
        q, keys = torch.randn(batch.num_tokens, HEADS, DIM), group.pools[0]["key"][2]
        values, out = torch.randn_like(keys), torch.full_like(q, torch.nan)
        turn = part_of(group).choose(2, q, keys, batch)
        with pytest.raises(StopIteration) as end:
            next(turn)  # one rank has nobody to vote with
        for segment in end.value.value:
            segment.attend(q, keys, values, DIM**-0.5, out)
        outs.append(out)
    assert not outs[0].isnan().any()
    assert torch.equal(*outs)


def test_on_the_host_keys_and_values_take_little_of_the_device(tmp_path: Path) -> None:
    """Of a layer that chooses 32 of 256 channels; of 32 layers more than what the paper's formula for FASA-M
    gives (2 / (0.25 + 0.075 + 0.1), 4.7 times less), with layer 0 and what is fetched."""
    layers, kv_heads, dim = 32, 8, 128
    save(tmp_path / "planes.json", "", "", [torch.zeros(32, dim // 2)] * layers, kv_heads)
    heads = Heads(layers, 32, kv_heads, dim, range(kv_heads), 1, 1, torch.bfloat16, torch.device("cpu"))
    made = Fasa(table=str(tmp_path / "planes.json"), memory="host").make(heads, PAGE)
    pool = PoolSpec("key", (kv_heads, dim), torch.bfloat16, layers, host=made.host_layers)
    device, host = bytes_per_page([pool, pool, *made.pools], PAGE)
    layer = 2 * pool.bytes_per_page(PAGE)
    assert host == (layers - 1) * layer
    assert device == 2 * layer + (layers - 1) * layer * 32 // 256
    assert layers * layer / device > 5.3


def test_attention_by_query_heads_reads_what_they_chose() -> None:
    torch.manual_seed(3)
    rows, n, pages = 3, 21, 7
    q = torch.randn(rows, HEADS, DIM)
    keys, values = torch.randn(2, pages, PAGE, KV_HEADS, DIM)
    kv = torch.arange(HEADS) // (HEADS // KV_HEADS)
    slots = torch.rand(rows, HEADS, pages * PAGE).argsort(-1)[..., :n]
    counts = torch.randint(1, n + 1, (rows, HEADS), dtype=torch.int32)
    out = torch.full_like(q, torch.nan)
    select.attend_by_head(q, keys, values, (slots * KV_HEADS + kv[:, None]).int(), counts, 0.2, out)
    for row in range(rows):
        for head in range(HEADS):
            at = slots[row, head, : counts[row, head]]
            k, v = (pool.flatten(0, 1)[at, kv[head]].double() for pool in (keys, values))
            wanted = (k @ q[row, head].double() * 0.2).softmax(0) @ v
            torch.testing.assert_close(out[row, head].double(), wanted, atol=1e-5, rtol=1e-5)


def test_fasa_with_all_planes_is_the_oracle(tmp_path: Path) -> None:
    path, *_ = table(tmp_path)
    cached = Cached([120], [20])
    group = Group(cached, Fasa(dense_below=0, table=path, budget=30, planes=DIM // 2))
    group.write(cached.batch([(0, 0, 120)]))
    votes = soft_vote(cached.queries[0][119], cached.keys[0], DIM**-0.5)
    assert group.choose(cached.batch([(0, 119, 120)])) == [[best(v, 30) for v in votes]]


def test_a_plane_that_carries_the_scores_agrees_most() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(6, HEADS, DIM) * 0.01, torch.randn(90, KV_HEADS, DIM) * 0.01
    for g in range(KV_HEADS):
        for channel in (3 + g, 3 + g + DIM // 2):
            k[:, g, channel] += torch.randn(90)
            q[:, g * 2 : g * 2 + 2, channel] += torch.randn(6, 2)
    found = agreement(q, k, 8)
    assert found.argmax(1).tolist() == [3, 3, 4, 4, 5, 5, 6, 6]
    assert (found.amax(1) > 0.9).all()


def test_scores_of_true_planes_do_not_depend_on_where_a_text_begins() -> None:
    """Both positions of a query and a key move together: planes i and i + D / 2 turn alike, neighbours do
    not."""
    torch.manual_seed(2)
    q, k = torch.randn(2, DIM, dtype=torch.float64)
    angles = 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        a, b = x.chunk(2)
        cos, sin = (angles * position).cos(), (angles * position).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    def products(shift: int) -> torch.Tensor:
        return turned(q, 70 + shift) * turned(k, 11 + shift)

    here, there = products(0), products(8000)
    planes = [(x[: DIM // 2] + x[DIM // 2 :]) for x in (here, there)]
    torch.testing.assert_close(*planes, atol=1e-9, rtol=0)
    neighbours = [x.view(-1, 2).sum(1) for x in (here, there)]
    assert float((neighbours[0] - neighbours[1]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no table"),
        ("{", "is no table"),
        (json.dumps({"planes": [[[0, 1]]]}), "is no table"),
        ('{"model": "x", "fingerprint": "", "kv_head": [[[Infinity]]]}', "is no table"),
        ("[" * 100000, "is no table"),
        (json.dumps({"model": "x", "fingerprint": MODEL, "kv_head": [[[0, 1]]]}), "another model, x"),
    ],
)
def test_fasa_refuses_what_is_no_table_of_the_model(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "planes.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words):
        Group(Cached([20], [10]), Fasa(dense_below=0, table=str(file)))


def test_fasa_refuses_the_table_of_another_model_of_these_sizes(tmp_path: Path) -> None:
    path, *_ = table(tmp_path, "another fingerprint")
    with pytest.raises(ValueError, match="another model, a model: run weaveinf calibrate"):
        Group(Cached([20], [10]), Fasa(dense_below=0, table=path))


def test_a_table_is_the_same_each_time_and_ranks_have_their_parts_of_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    q, k = torch.randn(5, HEADS, DIM), torch.randn(80, KV_HEADS, DIM)
    assert torch.equal(agreement(q, k, 8), agreement(q, k, 8))
    path, of_kv, of_query = table(tmp_path)
    for size in SIZES:
        for heads in Group(Cached([20], [10]), Fasa(table=path), size).heads:
            assert torch.equal(load(path, heads, "kv_head", 5)[2], of_kv[list(heads.kv_heads), :5])
            own = of_query[list(heads.apart.kv_heads), :5]
            assert torch.equal(load(path, heads.apart, "query_head", 5)[2], own)


def test_planes_lie_beside_the_keys_whatever_was_in_their_pages(tmp_path: Path) -> None:
    path, planes, _ = table(tmp_path)
    cached = Cached([160, 150], [10, 10], dtype=torch.bfloat16)
    cached.table[1] = cached.table[0]  # the second request gets the first one's pages
    group = Group(cached, Fasa(table=path, planes=5))
    for s, start, end in ((0, 0, 160), (1, 0, 70), (1, 70, 71), (1, 71, 150)):
        group.write(cached.batch([(s, start, end)]))
    channels = torch.cat([planes[:, :5], planes[:, :5] + DIM // 2], -1).expand(150, -1, -1)
    (pool,) = group.pools[0][part_of(group).pools[0].name][2 - 1 :]
    kept = pool.flatten(0, 1)[cached.slots(1)][..., :10]
    assert torch.equal(kept, cached.keys[1].gather(2, channels))


@pytest.mark.parametrize("method", ["quest", "fasa", "tokenselect"])
def test_where_pages_lie_does_not_matter(tmp_path: Path, method: str) -> None:
    settings: dict[str, Settings] = {
        "quest": Quest(dense_below=0, budget=4 * PAGE),
        "fasa": Fasa(dense_below=0, table=table(tmp_path)[0], budget=50, planes=5),
        "tokenselect": SMALL,
    }
    found = []
    for order in (1, 2):
        cached = Cached([301], [100])
        torch.manual_seed(order)
        cached.table[0] = torch.randperm(cached.num_pages)[: cached.table.shape[1]]
        group = Group(cached, settings[method])
        group.write(cached.batch([(0, 0, 301)]))
        found.append(group.choose(cached.batch([(0, 290, 301)])))
    assert found[0] == found[1] and None not in found[0][0]


SMALL = TokenSelect(dense_below=0, budget=60, sinks=5, local=30, threshold=2.0)


def middle(cached: Cached, s: int, q: torch.Tensor, seen: int, settings: TokenSelect = SMALL) -> set[int]:
    """The sinks and the best of the middle."""
    end = seen - settings.local
    votes = soft_vote(q, cached.keys[s][settings.sinks : end], 1.0).sum(0)
    votes = votes.bfloat16() if settings.positions == "compacted" else votes
    return {*range(settings.sinks)} | best(votes, settings.budget, settings.sinks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [95, 96, 97, 400])
def test_tokenselect_takes_the_tokens_with_most_votes(size: int, length: int) -> None:
    cached = Cached([length, 300], [40, 60])
    group = Group(cached, SMALL, size)
    group.write(cached.batch([(0, 0, length), (1, 0, 300)]))
    got = group.choose(cached.batch([(0, length - 1, length), (1, 297, 300)]))
    rows = [(0, 0, length - 1), (1, 1, 297), (2, 1, 298), (3, 1, 299)]
    for row, s, position in rows:
        n = position + 1
        if n <= 95:
            assert got[row] == [None] * KV_HEADS
            continue
        want = middle(cached, s, cached.queries[s][position], n) | {*range(n - 30, n)}
        assert got[row] == [want] * KV_HEADS


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (14, 2), (16, 2)])
def test_groups_of_any_size_vote(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int) -> None:
    monkeypatch.setattr(harness, "HEADS", heads)
    monkeypatch.setattr(harness, "KV_HEADS", kv_heads)
    cached = Cached([217], [40])
    group = Group(cached, SMALL)
    group.write(cached.batch([(0, 0, 217)]))
    want = middle(cached, 0, cached.queries[0][216], 217) | {*range(217 - 30, 217)}
    assert group.choose(cached.batch([(0, 216, 217)])) == [[want] * kv_heads]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("cuts", [(), (512,), (512, 1024), (1024,)])
def test_a_prompt_chooses_by_chunks_wherever_it_is_cut(size: int, cuts: tuple[int, ...]) -> None:
    length = 2 * CHUNK + 100
    cached = Cached([length, 40], [length, 40])
    group = Group(cached, SMALL, size)
    got = []
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        batch = cached.batch([(0, start, end)])
        group.write(batch)
        got += group.choose(batch)
    assert got[:CHUNK] == [[None] * KV_HEADS] * CHUNK
    for start, end in ((CHUNK, 2 * CHUNK), (2 * CHUNK, length)):
        mean = cached.queries[0][start:end].float().mean(0)
        kept = middle(cached, 0, mean, start)
        for position in {start, start + 1, end - 1}:
            assert got[position] == [kept | {*range(start - 30, position + 1)}] * KV_HEADS


COMPACTED = replace(SMALL, positions="compacted", dense_below=8192)


def at_distance(cached: Cached, s: int, positions: range, first: int) -> torch.Tensor:
    """The mean query of rows that vote from `first` on; a key at position 0 is STRETCH times itself."""
    rows = [turned(cached.queries[s][p], first + i) for i, p in enumerate(positions)]
    return STRETCH * torch.stack(rows).mean(0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [95, 96, 97, 400])
def test_compacted_positions_vote_at_a_distance(size: int, length: int) -> None:
    cached = Cached([length], [40])
    group = Group(cached, COMPACTED, size)
    group.write(cached.batch([(0, 0, length)]))
    want = {*range(length)}
    if length > 95:
        asks = at_distance(cached, 0, range(length - 1, length), SMALL.local)
        want = middle(cached, 0, asks, length, COMPACTED) | {*range(length - 30, length)}
    assert group.choose(cached.batch([(0, length - 1, length)])) == [[want] * KV_HEADS]


def test_rows_of_a_chunk_vote_from_their_places_in_it() -> None:
    length = CHUNK + 100
    cached = Cached([length], [length])
    group = Group(cached, COMPACTED)
    batch = cached.batch([(0, 0, length)])
    group.write(batch)
    got = group.choose(batch)
    kept = middle(cached, 0, at_distance(cached, 0, range(CHUNK, length), SMALL.local), CHUNK, COMPACTED)
    for position in (0, 1, CHUNK - 1):
        assert got[position] == [{*range(position + 1)}] * KV_HEADS
    for position in (CHUNK, CHUNK + 1, length - 1):
        assert got[position] == [kept | {*range(CHUNK - 30, position + 1)}] * KV_HEADS


@pytest.mark.parametrize("step", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_stands_side_by_side(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, step: int
) -> None:
    """Of answers, of a chunk of a prompt and of those who read all; some sequences have no rows."""
    monkeypatch.setattr(
        select, "slices", lambda n, _: [slice(i, min(i + step, n)) for i in range(0, n, step)]
    )
    lengths = [300, 96, 40, 50, CHUNK + 37, 200]
    cached = Cached(lengths, [40, 20, 40, 50, CHUNK + 37, 20], dtype=dtype)
    group = Group(cached, replace(COMPACTED, budget=4096))
    for slot in range(len(lengths)):  # less than there is room for, which is more than the rotary table has
        part_of(group).admit(slot, COMPACTED.budget)
    group.write(cached.batch([(s, 0, n) for s, n in enumerate(lengths)]))
    rows = [(0, 299, 300), (1, 95, 96), (2, 30, 40), (3, 50, 50), (4, CHUNK, CHUNK + 37), (5, 50, 52)]
    batch = cached.batch(rows)
    sets = group.choose(batch)
    at = [(s, p) for s, first, end in rows for p in range(first, end)]
    q = torch.stack([cached.queries[s][p] for s, p in at])
    pool = torch.full_like(group.pools[0]["key"][2], torch.nan)
    values = [torch.randn(n, KV_HEADS, DIM).to(dtype) for n in lengths]
    for s, each in enumerate(values):
        pool.flatten(0, 1)[cached.slots(s)] = each
    out = torch.full_like(q, torch.nan)
    # A share is off by what its score is, and that is rounded in float32 as often as a head has channels.
    tolerance = 4 * torch.finfo(dtype).eps + 4 * DIM * torch.finfo(torch.float32).eps
    for segment in group.segments[0]:
        segment.attend(q, group.pools[0]["key"][2], pool, DIM**-0.5, out)
    for (s, position), read, got in zip(at, sets, out, strict=True):
        assert read[0] is not None
        tokens = sorted(read[0])
        assert tokens[-1] == position
        keys = torch.stack([turned(cached.keys[s][p], i) for i, p in enumerate(tokens)]).to(dtype)
        asks = turned(cached.queries[s][position], len(tokens) - 1).to(dtype)
        grouped = asks.double().view(KV_HEADS, -1, DIM)
        shares = (torch.einsum("ghd,kgd->ghk", grouped, keys.double()) * DIM**-0.5).softmax(-1)
        want = torch.einsum("ghk,kgd->ghd", shares, values[s][tokens].double()).flatten(0, 1)
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


def test_equal_keys_tie_where_positions_do_not_tell_them_apart() -> None:
    """As those of a token's own kind in the first layer, but for how their products were rounded."""
    cached = Cached([300], [40])
    cached.keys[0][5:270] = cached.keys[0][5] * (1 + 1e-7 * torch.randn(265, 1, 1))
    group = Group(cached, COMPACTED)
    group.write(cached.batch([(0, 0, 300)]))
    assert group.choose(cached.batch([(0, 299, 300)])) == [[{*range(65), *range(270, 300)}] * KV_HEADS]


def test_a_query_votes_on_its_own_kv_head() -> None:
    """h // group, where the authors' code has h % kv_heads: only head 1's own KV head holds the needle."""
    cached = Cached([200], [10])
    cached.queries[0].zero_()
    cached.keys[0].mul_(0.01)
    cached.queries[0][199, 1] = 30 * torch.ones(DIM)
    cached.keys[0][77, 1 // (HEADS // KV_HEADS)] = torch.ones(DIM)
    cached.keys[0][88, 1 % KV_HEADS] = torch.ones(DIM)
    group = Group(cached, TokenSelect(dense_below=0, budget=1, sinks=1, local=1, threshold=2.0))
    group.write(cached.batch([(0, 0, 200)]))
    assert group.choose(cached.batch([(0, 199, 200)])) == [[{0, 77, 199}] * KV_HEADS]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_selection_cache(monkeypatch: pytest.MonkeyPatch, size: int, on_device: bool) -> None:
    if on_device:  # nobody looks which rows miss
        monkeypatch.setattr(tokenselect, "_asked", lambda miss: slice(None))
    cached = Cached([400, 300], [40, 40])
    cached.queries[0][301] = cached.queries[0][300] * 1.5  # the same direction
    cached.queries[0][302] = -cached.queries[0][300]
    cached.queries[1][201] = -cached.queries[1][200]
    always = TokenSelect(dense_below=0, budget=60, sinks=5, local=30, threshold=0.999)
    group = Group(cached, always, size)
    group.write(cached.batch([(0, 0, 400), (1, 0, 300)]))
    rows = [group.choose(cached.batch([(0, 300 + i, 301 + i), (1, 200 + i, 201 + i)])) for i in range(3)]
    kept = middle(cached, 0, cached.queries[0][300], 301)
    assert rows[0][0] == [kept | {*range(271, 301)}] * KV_HEADS
    assert rows[1][0] == [kept | {*range(272, 302)}] * KV_HEADS  # a hit: only the latest tokens are others
    new = middle(cached, 0, cached.queries[0][302], 303)
    assert rows[2][0] == [new | {*range(273, 303)}] * KV_HEADS
    other = middle(cached, 1, cached.queries[1][201], 202)
    assert rows[1][1] == [other | {*range(172, 202)}] * KV_HEADS  # each row of a batch by itself
    counts = {(int(part.counts["choices_kept"]), int(part.counts["choices_made"])) for part in group.parts}
    assert len(counts) == 1


@pytest.mark.parametrize(("threshold", "made"), [(-1.0, 1), (2.0, 9)])
def test_a_threshold_that_all_or_none_reach(threshold: float, made: int) -> None:
    """The first choice for ever, or a new one each time."""
    cached = Cached([300], [40])
    group = Group(cached, TokenSelect(dense_below=0, budget=60, sinks=5, local=30, threshold=threshold))
    group.write(cached.batch([(0, 0, 300)]))
    for n in range(201, 210):
        asked = 200 if made == 1 else n - 1
        want = middle(cached, 0, cached.queries[0][asked], asked + 1) | {*range(n - 30, n)}
        assert group.choose(cached.batch([(0, n - 1, n)])) == [[want] * KV_HEADS]
    assert part_of(group).counts == {"choices_kept": 9 - made, "choices_made": made}


def test_a_choice_is_nobody_elses() -> None:
    """A new request in the slot, one position further with the same query: nothing is taken over."""
    cached = Cached([300], [40])
    cached.queries[0][201] = cached.queries[0][200]
    group = Group(cached, TokenSelect(dense_below=0, budget=60, sinks=5, local=30, threshold=-1.0))
    group.write(cached.batch([(0, 0, 300)]))
    group.choose(cached.batch([(0, 200, 201)]))
    assert part_of(group).admit(0, -1) is None
    got = group.choose(cached.batch([(0, 201, 202)]))
    assert got == [[middle(cached, 0, cached.queries[0][201], 202) | {*range(172, 202)}] * KV_HEADS]


def test_budgets_are_the_requests_own() -> None:
    cached = Cached([300, 300, 300], [40, 40, 40])
    group = Group(cached, SMALL)
    for slot, budget in enumerate((0, 20, -1)):
        part_of(group).admit(slot, budget)
    group.write(cached.batch([(s, 0, 300) for s in range(3)]))
    got = group.choose(cached.batch([(s, 299, 300) for s in range(3)]))
    local = {*range(270, 300)}
    assert got[0] == [None] * KV_HEADS
    small = TokenSelect(dense_below=0, budget=20, sinks=5, local=30)
    assert got[1] == [middle(cached, 1, cached.queries[1][299], 300, small) | local] * KV_HEADS
    assert got[2] == [middle(cached, 2, cached.queries[2][299], 300) | local] * KV_HEADS


@pytest.mark.parametrize("method", ["quest", "fasa", "tokenselect"])
def test_a_small_budget_takes_little_of_an_engine_that_allows_much(tmp_path: Path, method: str) -> None:
    """What is set aside for a row would be gigabytes otherwise."""
    most = 1 << 28
    settings: dict[str, Settings] = {
        "quest": Quest(dense_below=0, budget=most),
        "fasa": Fasa(dense_below=0, table=table(tmp_path)[0], budget=most, planes=5),
        "tokenselect": replace(SMALL, budget=most),
    }
    cached = Cached([300], [40])
    group = Group(cached, settings[method])
    part_of(group).admit(0, 4 * PAGE)
    group.write(cached.batch([(0, 0, 300)]))
    (read,) = group.choose(cached.batch([(0, 299, 300)]))
    assert all(tokens is not None and 3 * PAGE < len(tokens) < 8 * PAGE for tokens in read)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Quest(dense_below=0, budget=PAGE), "budget=16 must be at least 32"),
        (TokenSelect(dense_below=0, budget=0), "budget and local from 1"),
        (TokenSelect(dense_below=0, local=0), "budget and local from 1"),
        (TokenSelect(positions="other"), "must be one of original, compacted"),  # type: ignore[arg-type]
        (Fasa(), "wants the table of this model"),
        (Fasa(dense_below=0, table="x", planes=99), "1 to 16 planes, got 256 and 99"),
        (Fasa(dense_below=0, table="x", budget=0), "a budget of at least 1"),
        (LazyLlm(budget=0), "1 to 100 percent"),
        (LazyLlm(budget=101), "1 to 100 percent"),
        (LazyLlm(stages=0), "stages=0"),
        (Fasa(dense_below=0, table="x", sets="head"), "sets='head' must be one of"),  # type: ignore[arg-type]
        (Fasa(dense_below=0, table="x", memory="disk"), "memory='disk' must be"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(settings: Settings, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Group(Cached([20], [10]), settings)
    assert "\n" not in str(error.value)


def test_what_there_is_not_is_refused() -> None:
    for wanted, words in (
        ({"name": "h2o"}, "selector='h2o' is not one of tokenselect"),
        ({"name": "quest", "sinks": 3}, "quest has no setting 'sinks'; it has budget"),
        ({"name": "quest", "budget": "many"}, "budget='many' must be of type int"),
        ({"name": "quest", "budget": -1}, "budget=-1 must be from 0"),
        ({"name": "tokenselect", "threshold": float("nan")}, "threshold=nan must be finite"),
        ({"name": ["quest"]}, "is not one of tokenselect"),
    ):
        with pytest.raises(ValueError, match=words):
            registry.settings(wanted)
    assert registry.settings({"name": "tokenselect", "threshold": -1}).budget == 2048
