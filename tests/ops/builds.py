"""The builds of the CPU kernels that this processor can run, and inputs to try them on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weaveinf.ops import native

DTYPES = [torch.float32, torch.bfloat16]
BUILDS = native.runnable()
needs_kernels = pytest.mark.skipif(not BUILDS, reason="no CPU kernels were compiled: no C++ compiler")


def use(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """Makes the ops run on one build."""
    monkeypatch.setattr(native, "lib", native.load(build))
    monkeypatch.setattr(native, "onednn", False)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What an op must overwrite: NaN everywhere."""
    return torch.full(shape, torch.nan, dtype=dtype)


def close(got: Tensor, want: Tensor, ulps: float = 2.0, scale: float | None = None) -> None:
    """Equal within units in the last place of the dtype, at the size of the largest value."""
    size = float(want.float().abs().max()) if scale is None else scale
    tolerance = ulps * torch.finfo(got.dtype).eps * size
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=tolerance)
