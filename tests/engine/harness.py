"""An engine over the ranks of a test pool, and what transformers says about its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from weaveinf.comm import aid
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine.engine import Engine
from weaveinf.engine.request import Request, SamplingParams
from weaveinf.engine.step import Step, StepOutput
from weaveinf.engine.worker import Worker


class PoolExecutor:
    """Rank 0 of ranks that are there already; the others follow. Two steps are under way, as on a GPU."""

    ahead = 1
    failure: Exception | None = None
    on_sent: Callable[[], None] | None = None

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._queue: deque[Step] = deque()

    def silent(self) -> str | None:
        return None

    def submit(self, step: Step) -> None:
        words = step.pack()
        if self.worker.ranks.size > 1:
            self.worker.ranks.control.send(words)
        self._queue.append(replace(Step.unpack(words), why=step.why))

    def collect(self) -> StepOutput:
        return self.worker.execute(self._queue.popleft())

    def close(self) -> None:
        if self.worker.ranks.size > 1:
            self.worker.ranks.control.send(END)


END = torch.empty(0, dtype=torch.int64).numpy()


def with_engines(ranks: Ranks, config: EngineConfig, use: Callable[..., Any], *args: Any) -> Any:
    """On rank 0 `use(fresh, *args)`, where `fresh(pages=..., **settings)` makes an engine of its own
    over the same loaded ranks; the other ranks follow. Two ranks share the products of all their rows."""
    worker = Worker(config, ranks)
    try:
        if ranks.rank:
            with mock.patch.object(aid, "WORTH", 1):
                worker.follow()
            return None
        executor = PoolExecutor(worker)
        pages = worker.num_pages

        def fresh(num_pages: int = pages, **settings: Any) -> Engine:
            worker.num_pages, worker.config = num_pages, replace(config, **settings)
            return Engine(executor)

        try:
            with mock.patch.object(aid, "WORTH", 1):
                return use(fresh, *args)
        finally:
            executor.close()
    finally:
        worker.close()


def complete(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """Runs all prompts together to their ends."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [i for prompt, own in zip(prompts, each, strict=True) for i in engine.add(prompt, own)]
    waiting = set(ids)
    for _ in range(100_000):
        if not waiting:
            break
        waiting -= {update.request.id for update in engine.step() if update.finished}
    assert not waiting, f"requests {waiting} never ended"
    while engine.scheduler.has_work:
        engine.step()
    engine.scheduler.check()
    return [engine.take(i).request for i in ids]


@torch.inference_mode()
def near_ties(model: Any, prompt: Sequence[int], outputs: Sequence[int]) -> int:
    """Checks greedy tokens against transformers' logits, each after all tokens before it.

    Returns how many differ from its choice where its best two logits are closer than 1e-4 of the
    logits' spread; any other difference fails.
    """
    ids = torch.tensor([[*prompt, *outputs]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    ties = 0
    for at, (row, token) in enumerate(zip(logits, outputs, strict=True)):
        if int(row.argmax()) == token:
            continue
        gap = float(row.max() - row[token])
        spread = float(row.max() - row.min())
        if not gap < 1e-4 * spread:  # no assert: python -O would take it away here
            raise AssertionError(
                f"output {at}: token {token} is {gap:.3g} below the best, spread {spread:.3g}"
            )
        ties += 1
    return ties
