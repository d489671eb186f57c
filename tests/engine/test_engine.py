"""What the engine makes of what the ranks give back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import complete, with_engines
from tests.models.harness import make_checkpoint
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_checkpoint(directory, "llama")
    return directory


def engine_on_one_rank(path: Path, use: Any) -> Any:
    config = EngineConfig(model=str(path), dtype="float32", kv_cache_gib=0.01, max_num_seqs=4)
    return with_engines(Ranks.single(torch.device("cpu")), config, use)


def test_a_request_whose_logits_are_nan_is_aborted_and_no_other(path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def use(fresh: Any) -> None:
        engine = fresh()
        good = complete(engine, [[5, 6, 7]], params)[0].output_token_ids
        head = engine.executor.worker.model.head
        calls = 0

        def broken(x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            logits = head(x)
            if calls == 3:
                logits[1] = torch.nan
            return logits

        engine.executor.worker.model.head = broken
        one, two = complete(engine, [[5, 6, 7], [9, 9]], params)
        engine.executor.worker.model.head = head
        assert one.output_token_ids == good and one.finish_reason == "length"
        assert two.finish_reason == "abort" and len(two.output_token_ids) == 2
        assert "logits" in str(two.stop_reason)

    engine_on_one_rank(path, use)


def test_a_request_larger_than_the_cache_is_refused_at_once(path: Path) -> None:
    def use(fresh: Any) -> None:
        engine = fresh(num_pages=3)
        with pytest.raises(ValueError, match="cache holds 48"):
            engine.add([1] * 40, SamplingParams(max_tokens=20))
        assert not engine.scheduler.has_work
        assert len(complete(engine, [[1] * 30], SamplingParams(max_tokens=18, ignore_eos=True))) == 1

    engine_on_one_rank(path, use)


def test_an_abort_frees_pages_and_the_rest_goes_on(path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    def use(fresh: Any) -> None:
        engine = fresh()
        expected = complete(engine, [[3, 4]], params)[0].output_token_ids
        (kept,), (gone,) = engine.add([3, 4], params), engine.add([8], params)
        for _ in range(5):
            engine.step()
        engine.abort(gone)
        finished = False
        while not finished:
            for update in engine.step():
                assert update.request.id == kept
                finished = update.finished
        assert engine.take(kept).request.output_token_ids == expected
        while engine.scheduler.has_work:
            engine.step()
        engine.scheduler.check()
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks

    engine_on_one_rank(path, use)


def test_how_steps_went_is_counted(path: Path) -> None:
    def use(fresh: Any) -> None:
        engine = fresh()
        before = engine.trace.steps["plain"]
        complete(engine, [[3, 4]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        assert engine.trace.steps["plain"] - before == 5
        assert "plain" in engine.trace.summary() and engine.trace.reasons["one rank"] >= 5
        assert engine.trace.median_ms("decode") > 0

    engine_on_one_rank(path, use)
