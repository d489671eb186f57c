"""Whole data sets through tensor-parallel engines, as many at a time as there is room for.

done = ray.data.read_json("prompts.jsonl").map_batches(
    Generate,
    fn_constructor_kwargs={"model": "path/or/hub-id", "tensor_parallel_size": 2},
    compute=ray.data.ActorPoolStrategy(size=4), batch_size=256, num_cpus=0,
)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from weaveinf.cluster.ray import see_all_cards, settle, share
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM


class Generate:
    """Completes batches of a `ray.data.Dataset`, for its `map_batches`.

    Reads the column `prompt_token_ids` (lists of token ids), or else `prompt` (text); keeps all columns and
    adds `text`, `token_ids` and `finish_reason` ("stop", "length" or "abort"). Each instance has an engine of
    its own, whose ranks have a placement group to themselves: the instance itself needs `num_cpus` of 0.

    Args:
        params: of every row, with `n` of 1; None: `SamplingParams()`.
        settings: of the engine, see `EngineConfig`.

    Raises:
        KeyError: a batch has neither column. Also what `settle`, `LLM` and its `generate` raise.
    """

    def __init__(self, model: str, params: SamplingParams | None = None, **settings: Any) -> None:
        size, take = settings.get("tensor_parallel_size", 1), share(settings.get("device", "auto"))
        self._group = group = placement_group([take] * size, settings.get("placement", "pack").upper())
        settle([group.ready()], f"an engine of {size} ranks, {take} each")
        engine: Any = ray.remote(_Engine)
        self._params = params
        self._engine = engine.options(
            num_cpus=take.get("CPU", 0),
            num_gpus=take.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0, True),
        ).remote(model, **settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = batch["prompt_token_ids" if "prompt_token_ids" in batch else "prompt"]
        return batch | ray.get(self._engine.generate.remote([*prompts], self._params))

    def __del__(self) -> None:
        # Ray would keep the group until the whole program ends.
        remove_placement_group(self._group)


class _Engine:
    """Rank 0, in the first bundle of its group; it goes with the `Generate` that made it."""

    def __init__(self, model: str, **settings: Any) -> None:
        if settings.get("tensor_parallel_size", 1) > 1:
            see_all_cards()
        self._llm = LLM(model, executor="ray", show_progress=False, **settings)

    def generate(self, prompts: list[Any], params: SamplingParams | None) -> dict[str, list[Any]]:
        given = [prompt if isinstance(prompt, str) else [*prompt] for prompt in prompts]
        done = self._llm.generate(given, params, show_progress=False)
        return {name: [getattr(one, name) for one in done] for name in ("text", "token_ids", "finish_reason")}
