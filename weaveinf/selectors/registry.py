"""Which methods exist, and what a user's words for one mean."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from weaveinf.selectors.fasa import Fasa
from weaveinf.selectors.hisa import Hisa
from weaveinf.selectors.lazyllm import LazyLlm
from weaveinf.selectors.quest import Quest
from weaveinf.selectors.selector import Settings
from weaveinf.selectors.tokenselect import TokenSelect

_ALL = (TokenSelect, Fasa, Quest, LazyLlm, Hisa)
_MOST = 1 << 28  # sums of a few fit into int32
METHODS: dict[str, type[Any]] = {method.name: method for method in _ALL}


def settings(wanted: Mapping[str, Any]) -> Settings:
    """A method's settings by its "name" and its fields. ValueError for what there is not."""
    given = dict(wanted)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"selector={name!r} is not one of {', '.join(METHODS)}")
    method = METHODS[name]
    known = {field.name: type(field.default) for field in fields(method)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known)}")
        number = known[key] is float and isinstance(value, int) and not isinstance(value, bool)
        if not number and type(value) is not known[key]:
            raise ValueError(f"{name}: {key}={value!r} must be of type {known[key].__name__}")
        if known[key] is float and not math.isfinite(value):
            raise ValueError(f"{name}: {key}={value} must be finite")
        if known[key] is int and not 0 <= value <= _MOST:
            raise ValueError(f"{name}: {key}={value} must be from 0 to {_MOST}")
    made: Settings = method(**given)
    return made


def at_once(wanted: Mapping[str, Any] | None) -> int | None:
    """See `Settings`."""
    return settings(wanted).at_once if wanted else None
