"""Tool calls: what a model is allowed to say, and finding in its answer what it called."""

from __future__ import annotations

import json
import re
from typing import Any

from weaveinf.server.protocol import ChatRequest, NamedTool, Tool, new_id

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def offered(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call. ValueError when the choice names one that is not there."""
    if request.tool_choice == "none" or request.tools is None:
        if request.tools is None and request.tool_choice not in (None, "none"):
            raise ValueError("tool_choice needs tools")
        return []
    if request.tool_choice in (None, "auto") and any(tool.function.strict for tool in request.tools):
        raise ValueError("tools: strict arguments need a tool_choice that requires a call")
    if not isinstance(request.tool_choice, NamedTool):
        return request.tools
    name = request.tool_choice.function.name
    if not (named := [tool for tool in request.tools if tool.function.name == name]):
        raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
    return named


def required(request: ChatRequest, tools: list[Tool]) -> str | None:
    """The JSON schema of an answer that must be calls; None when it need not."""
    if not tools or request.tool_choice in (None, "auto"):
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _moved(tool.function.parameters or {"type": "object"}, i),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    one = isinstance(request.tool_choice, NamedTool) or not request.parallel_tool_calls
    most = {"maxItems": 1} if one else {}
    return json.dumps({"type": "array", "items": {"anyOf": calls}, "minItems": 1} | most)


def _moved(schema: Any, call: int) -> Any:
    """A tool's parameters, whose references start from their own root, below that of all calls."""
    if isinstance(schema, list):
        return [_moved(part, call) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, call) for key, part in schema.items()}
    if isinstance(to := schema.get("$ref"), str) and to.startswith("#"):
        moved["$ref"] = f"#/items/anyOf/{call}/properties/arguments{to[1:]}"
    return moved


class ToolReader:
    """Takes an answer as it comes and holds back what is, or may become, a call.

    Read are the two forms that chat templates teach: JSON between <tool_call> marks, and an answer that is
    JSON as a whole, an object or a list of objects (of a name and arguments or parameters).
    """

    def __init__(self, tools: list[Tool], parallel: bool) -> None:
        self._names = {tool.function.name for tool in tools}
        self._parallel = parallel
        self._held = ""
        self._shown = False

    def add(self, text: str) -> str:
        """What of the answer so far may be shown, beyond what was."""
        self._held += text
        start = self._held.lstrip()
        if not self._shown and (not start or start[0] in "{["):
            return ""
        at = self._held.find(_OPEN)
        if at < 0:
            overlaps = (n for n in range(len(_OPEN) - 1, 0, -1) if self._held.endswith(_OPEN[:n]))
            at = len(self._held) - next(overlaps, 0)
        show, self._held = self._held[:at], self._held[at:]
        self._shown = self._shown or bool(show)
        return show

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls."""
        held = self._held.strip()
        parts = [part.split(_CLOSE)[0] for part in held.split(_OPEN)[1:]] if _OPEN in held else [held]
        try:
            said = [json.loads(part) for part in parts] if held else []
            flat = [one for value in said for one in (value if isinstance(value, list) else [value])]
            calls = [self._call(one) for one in flat]
        except (ValueError, RecursionError):
            return self._held, []
        if not calls or None in calls:
            return self._held, []
        return "", [call for call in calls if call][: None if self._parallel else 1]

    def _call(self, said: Any) -> dict[str, Any] | None:
        name = said.get("name") if isinstance(said, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = said.get("arguments", said.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair is no text, but JSON can name it.
        arguments = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):x}", arguments)
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{new_id()[:24]}", "type": "function", "function": function}
