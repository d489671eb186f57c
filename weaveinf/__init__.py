"""weaveinf: tensor-parallel LLM inference with communication woven under compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaveinf.engine.request import RequestOutput, SamplingParams
    from weaveinf.llm import LLM
    from weaveinf.selectors.registry import Fasa, Hisa, LazyLlm, Quest, TokenSelect

__version__ = "0.1.0"
__all__ = ["LLM", "Fasa", "Hisa", "LazyLlm", "Quest", "RequestOutput", "SamplingParams", "TokenSelect"]

_HOMES = {
    "engine.request": ("RequestOutput", "SamplingParams"),
    "llm": ("LLM",),
    "selectors.registry": ("Fasa", "Hisa", "LazyLlm", "Quest", "TokenSelect"),
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something is used, so that `weaveinf --help` is instant."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"weaveinf.{home}"), name)
    raise AttributeError(f"module 'weaveinf' has no attribute {name!r}")
