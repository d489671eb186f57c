"""Steps replayed as CUDA graphs give what they give without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.harness import make_checkpoint
from weaveinf import LLM, SamplingParams
from weaveinf.weave.graphs import Graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_replayed_tokens_are_those_of_eager_steps(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family)
    prompts = [list(range(1, 8 + 3 * i)) for i in range(11)]
    params = [SamplingParams(temperature=0, max_tokens=4 + 5 * i, ignore_eos=True) for i in range(11)]
    answers = []
    for replay in (True, False):
        with LLM(str(tmp_path), device="cuda", dtype="float32", show_progress=False) as llm:
            weaver = llm.engine.executor.worker.weaver
            graphs = weaver.repeated
            assert isinstance(graphs, Graphs)
            if not replay:
                weaver.repeated = None
            answers.append([])
            for turn in range(4):  # prompts too: as they are, padded, captured, replayed
                # No prompt begins like one before it, so all are of the same lengths again.
                new = [[turn + 1, *prompt] for prompt in prompts]
                answers[-1] += [out.token_ids for out in llm.generate(new, params, show_progress=False)]
            assert bool(graphs._kept) == replay
            assert any(key.logits[0] < key.rows[0] for key in graphs._kept) == replay
    assert answers[0] == answers[1]
