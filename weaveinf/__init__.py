"""weaveinf: tensor-parallel LLM inference with communication woven under compute."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaveinf.engine.request import RequestOutput, SamplingParams
    from weaveinf.llm import LLM
    from weaveinf.selectors.fasa import Fasa
    from weaveinf.selectors.hisa import Hisa
    from weaveinf.selectors.lazyllm import LazyLlm
    from weaveinf.selectors.quest import Quest
    from weaveinf.selectors.tokenselect import TokenSelect

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Fasa",
    "Hisa",
    "LazyLlm",
    "Quest",
    "RequestOutput",
    "SamplingParams",
    "TokenSelect",
    "__version__",
]

_HOMES = {
    "Fasa": "weaveinf.selectors.fasa",
    "LLM": "weaveinf.llm",
    "Hisa": "weaveinf.selectors.hisa",
    "LazyLlm": "weaveinf.selectors.lazyllm",
    "Quest": "weaveinf.selectors.quest",
    "RequestOutput": "weaveinf.engine.request",
    "SamplingParams": "weaveinf.engine.request",
    "TokenSelect": "weaveinf.selectors.tokenselect",
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something is used, so that `weaveinf --help` is instant."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'weaveinf' has no attribute {name!r}")
