"""Selectors in the whole engine: what a request gets does not depend on ranks, halves, chunks, prefix hits,
preemption or on what else runs; and where all may be read, it is what dense attention gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import pytest
import torch
from torch import Tensor

from tests.engine.harness import complete, near_ties, with_engines
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import fingerprint
from weaveinf.selectors.fasa import save
from weaveinf.selectors.segments import Segment, Tokens, TokensOfHeads

LENGTH = 10
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
SIZES = {"num_hidden_layers": 4, "max_position_embeddings": 1536}
METHODS: dict[str, dict[str, Any]] = {
    "tokenselect": {"budget": 40, "sinks": 4, "local": 20, "threshold": 2.0},
    "compacted": {
        "name": "tokenselect",
        "budget": 40,
        "sinks": 4,
        "local": 20,
        "threshold": 2.0,
        "positions": "compacted",
    },
    "fasa": {"budget": 24, "planes": 6},
    "fasa, query heads": {"budget": 24, "planes": 6, "sets": "query_head"},
    "fasa, host": {"budget": 24, "planes": 6, "memory": "host"},
    "quest": {"budget": 64},
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(0, 61, (1100,), generator=generator).tolist()
    return [first, [*first[:600], 7, 8, 9], first[:90], [3, 4]]


def settings(name: str, folder: Path) -> dict[str, Any]:
    found = {"name": name.split(",")[0], "dense_below": 0} | METHODS[name]
    if found["name"] == "fasa":
        known = fingerprint(folder, ModelConfig.from_path(folder))
        save(folder / "planes.json", "a model", known, [*torch.rand(4, 4, 8)], 2)
        found["table"] = str(folder / "planes.json")
    return found


def test_a_table_of_another_model_is_refused_at_the_start(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", **SIZES)
    selector = settings("fasa", tmp_path)
    make_checkpoint(tmp_path, "llama", rope_theta=5e5, **SIZES)
    with pytest.raises(ValueError, match="another model"):
        on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), selector, "off")


def only_alone(fresh: Any) -> dict[str, list[list[int]]]:
    alone = fresh(max_num_seqs=1)
    return {"alone": [complete(alone, [p], GREEDY)[0].output_token_ids for p in prompts()]}


def ways(fresh: Any) -> dict[str, list[list[int]]]:
    """Greedy tokens of the prompts in every way in which an engine may come to run them."""
    found = only_alone(fresh)
    batched = fresh()
    done = complete(batched, prompts(), GREEDY)
    assert all(r.pruned is None for r in done), "nothing here leaves rows behind"
    found["batched"] = [r.output_token_ids for r in done]
    again = complete(batched, prompts(), GREEDY)
    assert again[0].num_cached >= 1024
    assert again[1].num_cached >= 512
    found["prefix hits"] = [r.output_token_ids for r in again]
    # A chunk of a prompt is shaped by tokens behind a page of it: nobody takes over pages of another chunk.
    first, other = prompts()[0][:1040], [*prompts()[0][:768], *prompts()[0][900:1040], *prompts()[0][:132]]
    shared = fresh()
    complete(shared, [first], GREEDY)
    twice = [complete(shared, [other], GREEDY)[0].output_token_ids for _ in range(2)]
    alone = fresh(max_num_seqs=1)  # engines share the ranks' memory: none is used again after another
    assert twice == [complete(alone, [other], GREEDY)[0].output_token_ids] * 2
    chunked = fresh(max_num_batched_tokens=515, max_num_seqs=4)
    found["chunked"] = [r.output_token_ids for r in complete(chunked, prompts(), GREEDY)]
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    few = [p[:n] for p, n in zip(prompts(), (150, 120, 90, 2), strict=True)]
    short = fresh(num_pages=24)
    preempted = [r.output_token_ids for r in complete(short, few, long)]
    assert short.scheduler.num_preemptions > 0
    alone = fresh(max_num_seqs=1)
    assert preempted == [complete(alone, [p], long)[0].output_token_ids for p in few]
    dense = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, selector_budget=0)
    mixed = fresh()
    found["dense"] = [r.output_token_ids for r in complete(mixed, prompts(), dense)]
    found["sparse behind dense"] = [r.output_token_ids for r in complete(mixed, prompts(), GREEDY)]
    found["dense behind sparse"] = [r.output_token_ids for r in complete(batched, prompts(), dense)]
    # An answer becomes part of a prompt, whose pages' keys were made by rows that read less.
    answer = complete(batched, prompts()[2:3], replace(GREEDY, max_tokens=40))[0].output_token_ids
    for params in (dense, GREEDY):
        both = [
            complete(e, [[*prompts()[2], *answer]], replace(params, logprobs=0)) for e in (batched, fresh())
        ]
        one, other = ([entry.logprob for entry in done[0].logprobs] for done in both)
        assert one == pytest.approx(other, abs=1e-5)
    counts = batched.trace.choices
    assert counts is batched.executor.worker.selector.counts and batched.trace.selector in METHODS
    assert min(counts["rows_dense"], counts["rows_sparse"]) > 0
    with pytest.raises(ValueError, match="selector_budget"):
        fresh().add([1, 2], SamplingParams(selector_budget=65))
    return found


def on_ranks(
    ranks: Ranks, path: str, selector: dict[str, Any], weave: str, use: Any = ways, longest: int | None = None
) -> dict[str, list[list[int]]] | None:
    config = EngineConfig(
        model=path,
        device=ranks.device.type,  # type: ignore[arg-type]
        dtype="float32",
        kv_cache_gib=0.05,
        max_num_seqs=8,
        max_num_batched_tokens=1200,
        max_model_len=longest,
        weave=weave,  # type: ignore[arg-type]
        selector=selector,
    )
    result: dict[str, list[list[int]]] | None = with_engines(ranks, config, use)
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "compacted" else n for n in METHODS]
)
def test_a_request_gets_the_same_whatever_runs_it(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path, "llama", **SIZES)
    chosen = settings(name, tmp_path)
    alone = on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), chosen, "off")
    assert alone is not None
    everything = on_ranks(
        Ranks.single(torch.device("cpu")), str(tmp_path), chosen | {"budget": 4096}, "off", only_alone
    )
    assert everything is not None
    for tokens in (alone["dense"], everything["alone"]):
        assert sum(near_ties(model, *each) for each in zip(prompts(), tokens, strict=True)) <= 1
    want = alone.pop("alone")
    if "memory" in chosen:
        near = chosen | {"memory": "device"}
        found = on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), near, "off", only_alone)
        assert found == {"alone": want}
    assert want != alone["dense"], "nothing was ever left out"
    for size, weave in ((1, "off"), (2, "off"), (2, "on"), (4, "off")):
        got = alone if size == 1 else pool(size).run(on_ranks, str(tmp_path), chosen, weave)[0]
        for how in {"alone", "batched", "prefix hits", "chunked", "sparse behind dense"} & got.keys():
            assert got[how] == want, f"{size} ranks, weave {weave}: {how}"
        assert got["dense behind sparse"] == got["dense"] == alone["dense"], f"{size} ranks, weave {weave}"


def asking(fresh: Any) -> None:
    """Two prompts that share their beginning, and one of another length, in steps of the same pages."""
    engine = fresh(num_pages=90)
    tokens = prompts()[0][: engine.model_config.max_model_len - 100]
    for some in ([tokens, tokens[:70]], [[*tokens[:80], 7, 8]]):
        complete(engine, some, GREEDY)


def reads(ranks: Ranks, path: str, selector: dict[str, Any]) -> list[dict[int, list[int]]]:
    """Of every layer's attention to something chosen, in order: what each row reads, by head of this rank of
    those that choose (-1: all together), as checksums."""
    found: list[dict[int, list[int]]] = []
    attend = Segment.attend

    def noting(self: Segment, q: Tensor, keys: Tensor, *args: Any) -> None:
        chosen = self.chosen
        if isinstance(chosen, TokensOfHeads):
            by_head = zip(chosen.places.unbind(1), chosen.counts.unbind(1), strict=True)
            rows = [
                [checksum(s[:n] // keys.shape[2]) for s, n in zip(*head, strict=True)] for head in by_head
            ]
            found.append(dict(enumerate(rows)))
        elif isinstance(chosen, Tokens):
            seq = torch.repeat_interleave(torch.arange(len(chosen.slots)), chosen.cu_seqlens.diff().long())
            ends = zip(seq, chosen.positions, strict=True)
            found.append({-1: [checksum(chosen.slots[s, : end + 1]) for s, end in ends]})
        attend(self, q, keys, *args)

    with mock.patch.object(Segment, "attend", noting):
        on_ranks(ranks, path, selector, "off", asking)
    return found


def checksum(slots: Tensor) -> int:
    return crc32(slots.int().numpy().tobytes())


def whole(by_rank: list[list[dict[int, list[int]]]], heads: int) -> list[dict[int, list[int]]]:
    """The same of all ranks together; ranks that hold the same head must agree."""
    size = len(by_rank)
    out = []
    for call in zip(*by_rank, strict=True):
        merged: dict[int, list[int]] = {}
        for rank, own in enumerate(call):
            for g, rows in own.items():
                head = g if g < 0 else rank * heads // size + g
                assert merged.setdefault(head, rows) == rows, "ranks differ"
        out.append(merged)
    return out


@pytest.mark.parametrize("name", [*METHODS, "lazyllm", "hisa"])
def test_all_ranks_read_the_same_however_many_they_are(tmp_path: Path, name: str) -> None:
    """Four ranks of two KV heads, too."""
    if name == "hisa":
        make_checkpoint(tmp_path, "deepseek_v32", max_position_embeddings=400)
        chosen: dict[str, Any] = {"name": name, "block": 16, "blocks": 3, "dense_below": 0}
    else:
        make_checkpoint(tmp_path, "llama", **SIZES)
        chosen = {"name": name, "budget": 40} if name == "lazyllm" else settings(name, tmp_path)
    want = reads(Ranks.single(torch.device("cpu")), str(tmp_path), chosen)
    assert len(want) > 3 * LENGTH
    for size in (2, 4):
        assert whole(pool(size).run(reads, str(tmp_path), chosen), len(want[0])) == want, f"{size} ranks"
