"""Which families exist. A family is one file in this package that defines `FAMILY`."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import weaveinf.models
from weaveinf.models.config import Fields, ModelConfig
from weaveinf.models.layers import AttentionBlock, Block, Parts, dense_layer

# Families that people will try, and why they are not here.
_SANDWICHES = ("Gemma2", "Gemma3", "Olmo2", "Olmo3", "Glm4")
_SANDWICH = (
    ": it normalises a block's output before the residual add, which the seams cannot do; "
    "use a family of the list"
)


@dataclass(frozen=True)
class Family:
    """What one family declares.

    `configure` reads a config.json; `layer` builds attention and MLP of one layer. Everything else,
    from the embedding to the head, is common to all families (`layers.Model`).
    """

    architecture: str
    model_type: str
    configure: Callable[[Fields], ModelConfig]
    layer: Callable[[Parts, int], tuple[AttentionBlock, Block]] = dense_layer


@cache
def families() -> dict[str, Family]:
    """All families by architecture."""
    names = sorted(module.name for module in pkgutil.iter_modules(weaveinf.models.__path__))
    modules = [importlib.import_module(f"weaveinf.models.{name}") for name in names]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.architecture: family for family in found}


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a parsed config.json.

    Raises:
        ValueError: no known one; the message lists those that are.
    """
    named = raw.get("architectures") or []
    if not isinstance(named, list):
        raise ValueError(f"{where}: architectures={named!r}, expected a list of names")
    for name in named:
        if name in families():
            return families()[name]
    if not named:
        for family in families().values():
            if family.model_type == raw.get("model_type"):
                return family
    asked = str(named[0] if named else raw.get("model_type"))
    why, known = _SANDWICH if asked.startswith(_SANDWICHES) else "", ", ".join(families())
    raise ValueError(f"{where}: architecture {asked!r} is not supported{why} ({known})")
