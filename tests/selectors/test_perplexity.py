"""The bench's perplexity is that of the tokens given, whoever reads them how."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

BENCH = Path(__file__).parents[2] / "bench"
CONTEXT, PROMPT = 90, 37


def test_forced_tokens_are_as_likely_as_transformers_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    perplexity = importlib.import_module("perplexity")
    windows = np.random.default_rng(0).integers(0, 4096, (3, CONTEXT))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(perplexity.DEMO, dtype=torch.float32).eval()
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        logprobs = theirs(ids).logits[:, PROMPT:-1].log_softmax(-1)
    wanted = math.exp(-float(logprobs.gather(2, ids[:, PROMPT + 1 :, None]).mean()))
    args = SimpleNamespace(budgets=[32, CONTEXT], windows=len(windows), prompt=PROMPT)
    found = perplexity.measure({"name": "quest", "dense_layers": 0, "dense_below": 0}, windows, args)
    assert found[0] == pytest.approx(wanted, rel=1e-4)
    assert found[CONTEXT] == pytest.approx(wanted, rel=1e-4)
    assert abs(found[32] / wanted - 1) > 1e-3  # it does leave something out
