"""Calls in the forms that chat templates teach are found, whole and in pieces; anything else stays text."""

from __future__ import annotations

import json

import pytest

from weaveinf.server.protocol import ChatRequest
from weaveinf.server.tools import ToolReader, offered, required

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "time")
]


def request(**more: object) -> ChatRequest:
    message = {"role": "user", "content": "a"}
    return ChatRequest.model_validate({"messages": [message], "tools": TOOLS} | more)


CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'
CASES = [
    (f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
    (
        f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        "Let me see.\n",
        ["weather"] * 2,
    ),
    ('{"name": "time", "parameters": {"zone": 1}}', "", ["time"]),
    (f"  [{CALL}, {CALL}]", "", ["weather", "weather"]),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ("[1, 2]", "[1, 2]", []),
    ('{"name": ["time"]}', '{"name": ["time"]}', []),
    ("{not json", "{not json", []),
    ("a < b <tool", "a < b <tool", []),
    ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    ("plain words", "plain words", []),
    ("", "", []),
    ("[" * 5000, "[" * 5000, []),
    ('{"name": "time", "arguments": {"at": 1e999}}', '{"name": "time", "arguments": {"at": 1e999}}', []),
    ('{"name": "time", "arguments": {"at": NaN}}', '{"name": "time", "arguments": {"at": NaN}}', []),
]


@pytest.mark.parametrize(("text", "content", "names"), CASES, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("step", [1, 3, 10**6])
def test_calls_are_found(text: str, content: str, names: list[str], step: int) -> None:
    reader = ToolReader(offered(request()), parallel=True)
    shown = "".join(reader.add(text[at : at + step]) for at in range(0, len(text), step))
    rest, calls = reader.end()
    assert shown + rest == content
    assert [call["function"]["name"] for call in calls] == names
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)


def test_strict_arguments_are_not_promised_where_they_cannot_be_kept() -> None:
    strict = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="strict"):
        offered(request(tools=[strict]))
    assert offered(request(tools=[strict], tool_choice="required"))


def test_text_is_shown_as_it_comes() -> None:
    reader = ToolReader(offered(request()), parallel=True)
    assert reader.add("The answer ") == "The answer "
    assert reader.add("is <to") == "is "
    assert reader.add("ken>") == "<token>"


def test_one_call_where_no_more_are_wanted() -> None:
    reader = ToolReader(offered(request()), parallel=False)
    reader.add(f"[{CALL}, {CALL}]")
    assert len(reader.end()[1]) == 1


def test_what_must_be_called() -> None:
    assert required(request(), offered(request())) is None
    named = request(tool_choice={"type": "function", "function": {"name": "time"}})
    assert [tool.function.name for tool in offered(named)] == ["time"]
    schema = json.loads(required(named, offered(named)) or "")
    assert schema["maxItems"] == 1 and schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "time"}
    assert offered(request(tool_choice="none")) == []
    with pytest.raises(ValueError, match="tool_choice names 'x'"):
        offered(request(tool_choice={"type": "function", "function": {"name": "x"}}))


def test_references_in_parameters_lead_where_these_are_put() -> None:
    part = {"type": "object", "properties": {"again": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/x"}]}}}
    tree = {"type": "function", "function": {"name": "tree", "parameters": {**part, "$defs": {"x": {}}}}}
    asked = request(tools=[*TOOLS, tree], tool_choice="required")
    schema = json.loads(required(asked, offered(asked)) or "")
    again = schema["items"]["anyOf"][2]["properties"]["arguments"]["properties"]["again"]["anyOf"]
    for reference, target in zip(again, (tree["function"]["parameters"], {}), strict=True):  # type: ignore[index]
        at = schema
        for step in reference["$ref"].removeprefix("#/").split("/"):
            at = at[int(step) if isinstance(at, list) else step]
        assert at.keys() == target.keys()


@pytest.mark.parametrize("arguments", [{"zone": "\ud800é"}, '{"zone": "\ud800é"}'], ids=["object", "text"])
def test_half_of_a_surrogate_pair_goes_out_as_json_names_it(arguments: object) -> None:
    reader = ToolReader(offered(request()), parallel=True)
    reader.add(json.dumps({"name": "time", "arguments": arguments}))
    assert reader.end()[1][0]["function"]["arguments"] == r'{"zone": "\ud800é"}'
