"""Who may weave, who plans, and that ranks cannot disagree about it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.engine.harness import complete, with_engines
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf.comm.collective import CollectiveSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.request import SamplingParams
from weaveinf.engine.worker import Worker
from weaveinf.weave import profile, weaver
from weaveinf.weave.profile import Profile

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [list(range(1, 60)), list(range(2, 50))]


def settings(path: str, weave: str) -> EngineConfig:
    return EngineConfig(
        model=path,
        dtype="float32",
        kv_cache_gib=0.01,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        weave=weave,  # type: ignore[arg-type]
    )


@contextmanager
def over_sockets(cache: Path) -> Iterator[None]:
    def make(ranks: Ranks, rows: int, hidden: int, dtype: torch.dtype) -> CollectiveSeam:
        return CollectiveSeam(ranks, rows, hidden, dtype, "the test wants it")

    with (
        mock.patch.object(weaver, "make_seam", make),
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)}),
    ):
        yield


def facts(ranks: Ranks, path: str, weave: str) -> tuple[str, str, int]:
    worker = Worker(settings(path, weave), ranks)
    found = worker.seam.name, worker.weaver.why, len(worker.weaver.seams)
    worker.close()
    return found


def test_what_cannot_gain_is_not_woven_and_says_why(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    shared = ("shared memory", "nothing to hide: the ranks share memory", 1)
    assert pool(2).run(facts, str(tmp_path), "auto") == [shared] * 2
    assert pool(2).run(facts, str(tmp_path), "off") == [("shared memory", "weave is off", 1)] * 2
    assert pool(2).run(facts, str(tmp_path), "on") == [("shared memory", "", 2)] * 2
    alone = Ranks.single(torch.device("cpu"))
    assert facts(alone, str(tmp_path), "auto") == ("local", "one rank", 1)
    with pytest.raises(ValueError, match="not possible with one rank"):
        Worker(settings(str(tmp_path), "on"), alone)


def answers(fresh: Any) -> tuple[list[list[int]], dict[str, int], dict[str, int]]:
    engine = fresh()
    tokens = [request.output_token_ids for request in complete(engine, PROMPTS, PARAMS)]
    return tokens, dict(engine.trace.steps), dict(engine.trace.reasons)


def automatic(ranks: Ranks, path: str, cache: str) -> Any:
    # However busy the machine is the second time, the kept profile holds.
    with over_sockets(Path(cache)), mock.patch.object(profile, "STALE_MS", math.inf):
        return with_engines(ranks, settings(path, "auto"), answers)


def test_a_profile_is_measured_once_and_kept(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    first = pool(2).run(automatic, str(tmp_path / "model"), str(tmp_path))[0]
    (file,) = (tmp_path / "weaveinf" / "profiles").iterdir()
    made = file.read_text()
    again = pool(2).run(automatic, str(tmp_path / "model"), str(tmp_path))[0]
    assert first[0] == again[0] and file.read_text() == made
    assert set(first[2]) <= {"too small to cut", "predicted slower woven", "predicted faster woven"}


def disagreeing(ranks: Ranks, path: str, cache: str) -> Any:
    """Rank 0 believes that seams are dear, the others that they cost nothing."""
    dear = 100.0 if ranks.rank == 0 else 0.0
    blocks, ones, none = (1.0, 16.0), ((1.0, 1.0),), (0.0, 0.0)
    costs = Profile(
        3, (8, 128), (0.1, 0.1), blocks, blocks, ((dear / 8, dear),), ones, ones, none, none, per_work=0.0
    )
    with over_sockets(Path(cache)), mock.patch.object(weaver.Weaver, "_profile", lambda self: costs):
        return with_engines(ranks, settings(path, "auto"), answers)


def test_ranks_with_different_profiles_run_the_same_plan(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    tokens, steps, reasons = pool(2).run(disagreeing, str(tmp_path / "model"), str(tmp_path))[0]
    assert steps["woven"] >= 1 and reasons["predicted faster woven"] == steps["woven"]
    alone = Ranks.single(torch.device("cpu"))
    whole, steps, _ = with_engines(alone, settings(str(tmp_path / "model"), "off"), answers)
    assert tokens == whole and steps == {"plain": steps["plain"]}
