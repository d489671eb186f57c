"""The bench's retrieval model finds what it is asked for: dense, by every method, on one rank and on two."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.harness import complete, with_engines
from tests.ranks import pool
from weaveinf import LLM
from weaveinf.comm.ranks import Ranks
from weaveinf.commands.calibrate import calibrate
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import fingerprint
from weaveinf.selectors.selector import Heads

BENCH = Path(__file__).parents[2] / "bench"
LENGTH, CASES = 1024, 4
TENTH = LENGTH // 10
Asked = tuple[list[list[int]], list[SamplingParams]]


@pytest.fixture(scope="module")
def needles() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("needles")


@pytest.fixture(scope="module")
def model(needles: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints in float32, with FASA's table beside the first."""
    path: Path = tmp_path_factory.mktemp("retrieval")
    needles.write(path, torch.float32)
    for kind in ("deep", "indexed"):
        needles.write(path / kind, torch.float32, kind)
    calibrate(str(path), needles.calibration_text()[-LENGTH:], path / needles.TABLE)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["", pytest.param("deep", marks=pytest.mark.slow), "indexed"])
def test_exact_in_transformers(needles: Any, model: Path, which: str, dtype: torch.dtype) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model / which, dtype=dtype).eval()
    for kind in needles.HAYSTACKS:
        haystack = needles.make(kind, LENGTH, 1)
        prompts, _ = needles.requests(haystack, 0)
        for question, prompt in zip(haystack.questions, prompts, strict=True):
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompt, question.key]])).logits[0, -2:]
            said, likeliest = logits[0].argmax().tolist(), logits[1].topk(len(question.values)).indices
            assert needles.is_right(question, [said], likeliest.tolist()), question


def answers(fresh: Any, asked: Sequence[Asked]) -> list[list[tuple[list[int], list[int]]]]:
    """Of every question its tokens and which were likeliest at the last."""
    engine = fresh()
    found = []
    for prompts, params in asked:
        done = complete(engine, prompts, params)
        found.append([(request.output_token_ids, request.logprobs[-1].top_ids) for request in done])
    return found


def on_ranks(ranks: Ranks, model: str, selector: dict[str, Any] | None, asked: Sequence[Asked]) -> Any:
    settings: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": LENGTH, "dtype": "float32"}
    config = EngineConfig(model=model, selector=selector, kv_cache_gib=0.05, **settings)
    return with_engines(ranks, config, answers, asked)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        *(None, "quest", "fasa", "tokenselect", "hisa", "lazyllm"),
        pytest.param("fasa, query heads", marks=pytest.mark.slow),
    ],
)
def test_exact_with_room_for_all(needles: Any, model: Path, method: str | None, size: int) -> None:
    """And with a tenth of it, or less, a lone needle is found."""
    settings, path, whole, tenth = None, model, LENGTH, TENTH
    if method is not None:
        kind = needles.METHODS[method].kind
        path = model if kind == "llama" else model / kind
        settings = needles.settings(method, [LENGTH], path)
    if method == "lazyllm":
        settings, whole, tenth = (
            settings | {"budget": 100},
            100,
            40,
        )  # of which a sixteenth is left in the end
    wanted = [(kind, whole if method else 0) for kind in needles.HAYSTACKS]
    if method is not None:
        wanted.append(("alone", tenth))
    haystacks = [needles.make(kind, LENGTH, CASES) for kind, _ in wanted]
    asked = [needles.requests(h, budget) for h, (_, budget) in zip(haystacks, wanted, strict=True)]
    args = (str(path), settings, asked)
    if size == 1:
        found = on_ranks(Ranks.single(torch.device("cpu")), *args)
    else:
        found = pool(size).run(on_ranks, *args)[0]
    for what, haystack, said in zip(wanted, haystacks, found, strict=True):
        for question, (tokens, likeliest) in zip(haystack.questions, said, strict=True):
            assert needles.is_right(question, tokens, likeliest), what


def test_compacted_positions_find_what_lies_beyond_the_window(
    needles: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a base of 2e5 the planes that carry the match turn too far within some thousand tokens: the model
    is exact in a window of 768 tokens, and lost at ten times as many."""
    shape = importlib.import_module("retrieval_model")
    near, far, cases = 768, 8192, 8
    monkeypatch.setattr(shape, "THETA", 2e5)
    monkeypatch.setattr(shape, "CONFIG", shape.CONFIG | {"rope_theta": 2e5, "max_position_embeddings": far})
    needles.write(tmp_path / "unlimited", torch.float32)
    shape.CONFIG["max_position_embeddings"] = near
    needles.write(tmp_path / "limited", torch.float32)
    compacted = {"name": "tokenselect", "budget": 128, "sinks": 4, "local": 64, "positions": "compacted"}

    def right(model: str, selector: dict[str, Any] | None, length: int) -> int:
        settings: dict[str, Any] = {"max_num_seqs": cases, "kv_cache_gib": 0.1, "show_progress": False}
        with LLM(str(tmp_path / model), selector=selector, max_model_len=length, **settings) as llm:
            found: dict[str, int] = needles.ask(llm, needles.make("store", length, cases), None)[0]
        return found["store"]

    assert right("unlimited", None, near) == right("limited", compacted, near) == cases
    assert right("unlimited", None, far) <= cases // 2
    assert right("limited", compacted, far) == cases


def test_calibration_ranks_the_planes_that_carry_the_match(needles: Any, model: Path, tmp_path: Path) -> None:
    """In the matching layer the slow planes come first; and what was written can be read again."""
    from weaveinf.selectors import fasa

    shape = importlib.import_module("retrieval_model")
    text = needles.calibration_text()[-LENGTH:]
    found = calibrate(str(model), text, tmp_path / "table.json")
    assert [tuple(shares.shape) for shares in found] == [(shape.HEADS, shape.HALF)] * shape.LAYERS
    assert all(0 <= float(shares.min()) <= float(shares.max()) <= 1 for shares in found)
    heads = Heads(
        shape.LAYERS,
        shape.HEADS,
        shape.KV_HEADS,
        shape.HEAD_DIM,
        range(shape.KV_HEADS),
        1,
        1,
        torch.float32,
        torch.device("cpu"),
        fingerprint=fingerprint(model, ModelConfig.from_path(model)),
    )
    ranked = fasa.load(str(tmp_path / "table.json"), heads, "kv_head", shape.HALF)
    slow = shape.HALF - shape.FAST
    assert (
        ranked[shape.MATCHING_LAYER, :, :slow].sort(1).values == torch.arange(shape.FAST, shape.HALF)
    ).all()
    with pytest.raises(ValueError, match="wants at least 320"):
        calibrate(str(model), text[:300], tmp_path / "none.json")
