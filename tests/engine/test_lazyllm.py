"""LazyLLM in the whole engine against its algorithm written down plainly, for one sequence on one rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.engine.harness import complete, near_ties, with_engines
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams
from weaveinf.engine.step import Step, StepOutput
from weaveinf.engine.worker import Worker
from weaveinf.selectors.lazyllm import LazySelector

LENGTH = 12
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
SIZES = {"num_hidden_layers": 7, "max_position_embeddings": 256}
SELECTOR = {"name": "lazyllm", "budget": 40, "stages": 3}
BEGIN = [2, 4, 6]  # of 7 layers: even parts of their first nine tenths, rounded


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (150, 61, 5, 1)]


class Oracle:
    """The paper's algorithm for one prompt; keys, values and stored hidden states by layer and position."""

    def __init__(self, model: Any, prompt: list[int], budget: int) -> None:
        self.model, self.tokens, self.prompt, self.budget = model, list(prompt), len(prompt), budget
        config = model.config
        self.heads, self.kv_heads, self.dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.kv: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in model.model.layers]
        self.stored: dict[int, dict[int, Tensor]] = {layer: {} for layer in BEGIN}
        self.revived = 0

    @torch.inference_mode()
    def step(self, live: list[int]) -> int:
        """Runs the tokens at positions `live`; the next one after the last of them."""
        latest = live[-1]
        hidden = {p: self.model.model.embed_tokens.weight[self.tokens[p]] for p in live}
        reads = list(range(self.prompt))
        weights: dict[int, float] = {}
        for number, layer in enumerate(self.model.model.layers):
            if number in BEGIN:
                reads = self.enter(number, hidden, reads, weights, latest)
            answers = list(range(self.prompt, latest + 1))
            weights = self.attend(number, layer, hidden, [*reads, *answers], latest)
            for p, x in hidden.items():
                hidden[p] = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.model.lm_head(self.model.model.norm(hidden[latest]))
        self.tokens.append(int(logits.argmax()))
        return self.tokens[-1]

    def enter(
        self, number: int, hidden: dict[int, Tensor], reads: list[int], weights: dict[int, float], latest: int
    ) -> list[int]:
        if latest < self.prompt:
            weights = weights | {latest: math.inf}
        count = -(-len(reads) * self.budget // 100)
        chosen = sorted(sorted(reads, key=lambda p: (-weights[p], p))[:count])
        for p in [p for p in hidden if p < self.prompt and p not in chosen]:
            self.stored[number][p] = hidden.pop(p)
        for p in chosen:
            if p not in self.kv[number] and p not in hidden:
                hidden[p] = self.stored[number].pop(p)
                self.revived += 1
        return chosen

    def attend(
        self, number: int, layer: Any, hidden: dict[int, Tensor], reads: list[int], latest: int
    ) -> dict[int, float]:
        """Adds attention's output to the live rows; what the latest of them attends to, by position."""
        q = {}
        for p, x in hidden.items():
            x = layer.input_layernorm(x)
            cos, sin = self.model.model.rotary_emb(x[None, None], torch.tensor([[p]]))
            projected = (getattr(layer.self_attn, f"{which}_proj")(x).view(-1, self.dim) for which in "qkv")
            q[p], k, v = projected
            q[p], k = (self.turned(y, cos[0, 0], sin[0, 0]) for y in (q[p], k))
            assert p not in self.kv[number], "a token is computed twice in a layer"
            self.kv[number][p] = k, v
        group, seen = self.heads // self.kv_heads, {}
        for p in hidden:
            at = [r for r in reads if r <= p]
            k, v = (
                torch.stack([self.kv[number][r][i] for r in at]).repeat_interleave(group, 1) for i in (0, 1)
            )
            shares = (torch.einsum("hd,khd->hk", q[p], k) * self.dim**-0.5).softmax(-1)
            if p == latest:
                seen = dict(zip(at, shares.sum(0).tolist(), strict=True))
            hidden[p] = hidden[p] + layer.self_attn.o_proj(torch.einsum("hk,khd->hd", shares, v).flatten())
        return seen

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin


def ways(fresh: Any) -> dict[str, list[list[Any]]]:
    alone, batched = fresh(max_num_seqs=1), fresh()
    found = {"alone": [complete(alone, [p], GREEDY)[0].output_token_ids for p in prompts()]}
    done = complete(batched, [*prompts(), prompts()[0]], GREEDY)
    found["batched"] = [r.output_token_ids for r in done[:-1]]
    assert all(r.pruned is True for r in done)
    assert done[-1].output_token_ids == done[0].output_token_ids
    again = complete(batched, prompts(), GREEDY)
    assert not any(r.num_cached for r in again), "a pruned prompt was offered"
    for name, params in {
        "dense": replace(GREEDY, selector_budget=0, logprobs=0),
        "all kept": replace(GREEDY, selector_budget=100, logprobs=0),
    }.items():
        done = complete(batched, prompts(), params)
        found[name] = [r.output_token_ids for r in done]
        assert all(r.pruned is (name != "dense") for r in done)
        found[name + ", log-probabilities"] = [[one.logprob for one in r.logprobs] for r in done]
    longer = complete(fresh(max_num_batched_tokens=40, max_num_seqs=4), [prompts()[0], prompts()[2]], GREEDY)
    found["longer than a step"] = [longer[0].output_token_ids]
    assert [r.pruned for r in longer] == [False, True]
    return found


def on_ranks(ranks: Ranks, path: str, weave: str, use: Any = ways) -> Any:
    config = EngineConfig(
        model=path,
        dtype="float32",
        kv_cache_gib=0.02,
        max_num_seqs=8,
        max_num_batched_tokens=400,
        weave=weave,  # type: ignore[arg-type]
        selector=SELECTOR,
    )
    return with_engines(ranks, config, use)


def endings(fresh: Any) -> None:
    """Requests end in every way, and one last comes to an engine that has nothing else."""
    engine = fresh(num_pages=18)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    first, second, aborted = (
        engine.add(prompts()[0][:length], params)[0]
        for length, params in ((100, long), (99, long), (30, GREEDY))
    )
    while engine.scheduler.has_work:
        engine.step()
        if engine.scheduler.num_in_flight and aborted is not None:
            engine.abort(aborted)
            aborted = None
    assert engine.scheduler.num_preemptions > 0
    done = [engine.take(i).request for i in (first, second)]
    assert [len(request.output_token_ids) for request in done] == [60, 60]
    assert [request.pruned for request in done] == [True, False], "the second began anew"
    complete(engine, [[1, 2, 3]], SamplingParams(max_tokens=1))


def held(ranks: Ranks, path: str) -> list[tuple[list[int], dict[int, int]]]:
    """After every step of the above: what was released before it, and the rows that each slot stores."""
    seen = []
    execute = Worker.execute

    def noting(self: Worker, step: Step) -> StepOutput:
        output = execute(self, step)
        requests = self.selector._requests  # type: ignore[union-attr]
        rows = {slot: sum(len(s.hidden) for s in r.stores) for slot, r in requests.items()}
        seen.append((step.released.tolist(), rows))
        return output

    with mock.patch.object(Worker, "execute", noting):
        on_ranks(ranks, path, "off", endings)
    return seen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("lazyllm")
    return path, make_checkpoint(path, "llama", **SIZES)


@pytest.mark.parametrize(("size", "weave"), [(1, "off"), (2, "off"), (2, "on"), (4, "off")])
def test_tokens_are_those_of_the_plain_algorithm(checkpoint: tuple[Path, Any], size: int, weave: str) -> None:
    path, model = checkpoint
    if size == 1:
        got = on_ranks(Ranks.single(torch.device("cpu")), str(path), weave)
    else:
        got = pool(size).run(on_ranks, str(path), weave)[0]
    assert got is not None
    revived = 0
    for i, prompt in enumerate(prompts()):
        oracle = Oracle(model, prompt, SELECTOR["budget"])  # type: ignore[arg-type]
        want = [oracle.step(list(range(len(prompt))))]
        want += [oracle.step([len(oracle.tokens) - 1]) for _ in range(LENGTH - 1)]
        revived += oracle.revived
        assert got["alone"][i] == want
    assert revived > LENGTH, "nothing ever came back"
    assert got["batched"] == got["alone"]
    assert got["dense"] == got["all kept"] != got["alone"]
    assert sum(near_ties(model, *each) for each in zip(prompts(), got["dense"], strict=True)) <= 1
    for one, other in zip(
        *(got[f"{name}, log-probabilities"] for name in ("dense", "all kept")), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-5)
    assert got["longer than a step"] == got["dense"][:1]


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_stored_of_what_has_ended(checkpoint: tuple[Path, Any], size: int) -> None:
    """Finished, aborted or preempted: on every rank it is gone with the next step."""
    path, _ = checkpoint
    if size == 1:
        seen = [held(Ranks.single(torch.device("cpu")), str(path))]
    else:
        seen = pool(size).run(held, str(path))
    assert all(each == seen[0] for each in seen)
    gone = [slot for released, rows in seen[0][:-1] for slot in released if slot not in rows]
    assert len(gone) == 3 and max(sum(rows.values()) for _, rows in seen[0]) > 100
    released, rows = seen[0][-1]
    assert len(released) == len(rows) == 1 and sum(rows.values()) < 9, "only the last one's"


def asking(fresh: Any) -> None:
    complete(fresh(), prompts(), GREEDY)


def test_a_token_enters_a_stage_at_most_once(checkpoint: tuple[Path, Any]) -> None:
    """And where a prompt passes, only what was in the stage before, its last token always."""
    requests: list[Any] = []
    entered: list[dict[int, list[list[int]]]] = []  # of each request, by stage, in each of its steps
    enter = LazySelector._enter

    def noting(self: LazySelector, request: Any, stage: int, own: Any, state: Tensor) -> Any:
        went, hidden = enter(self, request, stage, own, state)
        assert len(went) == len(hidden) and went.tolist() == sorted({*went.tolist()})
        if not any(request is known for known in requests):
            requests.append(request)
            entered.append({})
        at = next(i for i, known in enumerate(requests) if known is request)
        entered[at].setdefault(stage, []).append(went.tolist())
        return went, hidden

    with mock.patch.object(LazySelector, "_enter", noting):
        on_ranks(Ranks.single(torch.device("cpu")), str(checkpoint[0]), "off", asking)
    back = 0
    for prompt, stages in zip(prompts(), entered, strict=True):
        assert sorted(stages) == [1, 2, 3]
        before = {*range(len(prompt))}
        for steps in stages.values():
            every = [position for step in steps for position in step]
            assert len({*every}) == len(every), "a token is computed twice"
            assert {len(prompt) - 1} <= {*steps[0]} <= before
            assert len(steps[0]) == -(-len(before) * 40 // 100)
            before = {*steps[0]}
            back += sum(len(step) - 1 for step in steps[1:])
    assert back > LENGTH, "nothing ever came back"
