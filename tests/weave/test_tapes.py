"""Decode steps replayed from tapes give what they give without, to the bit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.harness import make_checkpoint
from tests.ops.builds import needs_kernels
from tests.ranks import pool
from tests.weave.test_graphs import decode_step
from weaveinf.cache.batch import Batch
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.ops import native
from weaveinf.ops.activation import silu_mul
from weaveinf.ops.tape import Kernel, Tape
from weaveinf.weave import tapes
from weaveinf.weave.run import run
from weaveinf.weave.tapes import Tapes

pytestmark = needs_kernels
STEPS = [(3, 20), (3, 21), (1, 5), (9, 70), (3, 22), (9, 64), (1, 40), (9, 96), (3, 100), (3, 21)]
"""Rows and context of each step."""
GROWN, WOVEN = 4, [1, 3, 9]
"""The step after which the scratch memory grows; those that are woven in a test of that."""
AS_THEY_ARE = 8
"""Steps that are not replayed: the first of a kind, on memory that has grown since, and woven ones."""


def rehearsed(ranks: Ranks, path: str, dtype: Any, woven: bool) -> tuple[list[bool], int, bool]:
    """Steps as they are and through tapes, on the same pages: whether rows and pages come out equal, how many
    steps ran as they are, and whether the worker's own steps are replayed."""
    config = EngineConfig(
        model=path,
        dtype=dtype,
        kv_cache_gib=0.01,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        weave="on" if woven else "off",
    )
    worker = Worker(config, ranks)
    seams = worker.weaver.seams
    calls = 0

    def step(halves: Sequence[Batch], ctas: tuple[int, int] = (0, 0)) -> Tensor:
        nonlocal calls
        calls += 1
        return run(worker.model.chain, halves, seams, ranks.votes, ctas)

    kept = Tapes(step, worker.model.scratch.memory)
    equal = []
    pages = [layer for name in ("key", "value") for layer in worker.pools[name]]
    with torch.inference_mode():
        for i, (rows, context) in enumerate(STEPS):
            torch.manual_seed(i)
            batch = decode_step(rows, context)
            halves = batch.split(1) if woven and i in WOVEN else (batch,)
            filled = [layer.normal_().clone() for layer in pages]
            x = step(halves).clone()
            want = [x, *[layer.clone() for layer in pages]]
            for layer, was in zip(pages, filled, strict=True):
                layer.copy_(was)
            for memory in worker.model.scratch.memory():
                memory.fill_(torch.nan)
            x = kept.run(halves, (0, 0)) if kept.takes(halves) else step(halves)
            got = [x.clone(), *pages]
            equal.append(all(map(torch.equal, got, want)))
            if i == GROWN:  # what a tape stands on is its own when a fuller step takes new memory
                step([worker.weaver.rehearsal(64, 0)])
        for rows in (64, 2):  # ranks share the products of many rows, which cannot be recorded
            worker.weaver.run(decode_step(rows, 9), 0)
    worker.close()
    own = worker.weaver.repeated
    return equal, calls - len(STEPS) - 1, isinstance(own, Tapes) and own.replays


@pytest.mark.parametrize(
    ("size", "dtype", "woven"),
    [(1, "bfloat16", False), (1, "float32", False), (2, "bfloat16", False), (2, "float32", True)],
)
def test_replayed_steps_are_those_that_run_as_they_are(
    tmp_path: Path, size: int, dtype: Any, woven: bool
) -> None:
    make_checkpoint(tmp_path, "qwen3")
    for equal, recorded, replays in pool(size).run(rehearsed, str(tmp_path), dtype, woven):
        assert all(equal) and replays
        assert recorded == AS_THEY_ARE


def test_what_torch_computes_is_not_replayed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "mixtral")
    for equal, recorded, replays in pool(2).run(rehearsed, str(tmp_path), "float32", False):
        assert all(equal) and recorded == len(STEPS) and not replays


def test_the_tape_that_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "RESIDENT", 2)
    ran: list[int] = []

    def step(halves: Sequence[Batch], ctas: tuple[int, int]) -> Tensor:
        ran.append(halves[0].num_tokens)
        return halves[0].input_ids

    kept = Tapes(step, list)
    with torch.inference_mode():
        for rows in (1, 2, 1, 3, 1, 3, 2, 2, 3):
            batch = decode_step(rows, 20)
            assert torch.equal(kept.run([batch], (0, 0)), batch.input_ids)
    assert ran == [1, 2, 3, 2]


def test_a_tape_holds_what_it_needs_and_knows_what_it_lacks() -> None:
    x = torch.randn(5, 32)
    tape = Tape()
    with tape.recording():
        out = silu_mul(x[1:].view(4, 32))
    want, at = out.clone(), out.data_ptr()
    del out
    others = [torch.full((4, 16), torch.nan) for _ in range(50)]  # what was freed would be taken by these
    assert not tape.foreign and at not in [other.data_ptr() for other in others]
    assert native.lib is not None and tape.replay(native.lib.weave_replay) == 0
    found = torch.frombuffer((ctypes.c_float * 64).from_address(at), dtype=torch.float32)
    assert torch.equal(found.view(4, 16), want)
    silu_mul(x)
    assert len(tape.calls) == 1  # nothing is noted once it is over


def test_a_tape_knows_copies_from_views() -> None:
    x = torch.randn(4, 6)
    views: list[Callable[[], object]] = [
        lambda: (x[1:], x.view(6, 4), x.t(), x.unbind(0), x.split(2), x.chunk(2, -1), x.expand(2, 4, 6)),
        lambda: (x.reshape(-1), x.contiguous(), x.to(torch.float32), x.flatten(), x.unsqueeze(1).squeeze(1)),
    ]
    others: list[Callable[[], object]] = [
        lambda: x.add_(1),
        lambda: x + 1,
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: torch.zeros(3),
        lambda: x.t().contiguous(),
        lambda: x.t().reshape(-1),
        lambda: x.to(torch.bfloat16),
        lambda: x[x > 0],
        lambda: x.clone(),
        lambda: x.new_empty(3).copy_(x[0, :3]),
    ]
    for compute in views + others:
        tape = Tape()
        with torch.inference_mode(), tape.recording():
            compute()
        assert bool(tape.foreign) == (compute in others), tape.foreign


def test_to_record_takes_no_compiler() -> None:
    code = """
import sys, torch
from weaveinf.ops.tape import Tape
with torch.inference_mode(), Tape().recording():
    torch.empty(3, 4)[1:]
sys.exit("torch._dynamo" in sys.modules)  # seconds in the midst of the first answer
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_problem_ends_a_replay() -> None:
    seen: list[int] = []

    def fails(packed: int) -> int:
        seen.append(packed)
        return len(seen)

    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(fails)
    kernel = Kernel(function, "n")
    tape = Tape()
    with tape.recording():
        kernel(1)
        kernel(2)
    assert native.lib is not None and tape.replay(native.lib.weave_replay) == 3
    assert len(seen) == 3
