"""Selectors on a GPU: the tokens are those of a CPU, and the host waits for nothing as it issues a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_selectors import METHODS, SIZES, on_ranks, only_alone, settings
from tests.models.harness import make_checkpoint
from weaveinf.comm.ranks import Ranks
from weaveinf.weave.weaver import Weaver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("name", [*METHODS, "hisa"])
def test_tokens_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    if name == "hisa":
        make_checkpoint(tmp_path, "deepseek_v32", max_position_embeddings=1536)
        chosen: dict[str, Any] = {"name": name, "block": 16, "blocks": 4, "dense_below": 0}
    else:
        make_checkpoint(tmp_path, "llama", **SIZES)
        chosen = settings(name, tmp_path)
    want = on_ranks(Ranks.single(torch.device("cpu")), str(tmp_path), chosen, "off", only_alone)
    run = Weaver.run

    def watched(*given: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Weaver, "run", watched)
    got = on_ranks(Ranks.single(torch.device("cuda", 0)), str(tmp_path), chosen, "off", only_alone)
    assert got == want
