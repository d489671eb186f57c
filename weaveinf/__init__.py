"""weaveinf: tensor-parallel LLM inference with communication woven under compute."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaveinf.engine.request import RequestOutput, SamplingParams
    from weaveinf.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "weaveinf.llm",
    "RequestOutput": "weaveinf.engine.request",
    "SamplingParams": "weaveinf.engine.request",
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something is used, so that `weaveinf --help` is instant."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'weaveinf' has no attribute {name!r}")
