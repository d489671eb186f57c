"""Answers that must be JSON, or calls, are; schemas that cannot be served are refused and stall nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.harness import MODEL, Server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "colour", "sizes"],
    "additionalProperties": False,
}
MESSAGES: list[Any] = [{"role": "user", "content": "A thing, please."}]
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "thing", "description": "One of all.", "schema": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema(client: openai.OpenAI, temperature: int) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=FORMAT, n=3, seed=5, temperature=temperature
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_json_object_in_a_stream(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        stream=True,
        seed=1,
        max_tokens=600,
    )
    said, reason = "", None
    for chunk in chunks:
        said += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason
    assert said.lstrip().startswith("{")
    assert reason == "length" or isinstance(json.loads(said), dict)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_calls_that_must_come(client: openai.OpenAI, stream: bool, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [TOOL, OTHER]
    asked = {"model": MODEL, "messages": MESSAGES, "tools": tools, "tool_choice": choice, "temperature": 0}
    if stream:
        chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **asked)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert not any(chunk.delta.content for chunk in chunks)
        reason = chunks[-1].finish_reason
        assert [call.index for call in calls] == list(range(len(calls)))
    else:
        whole = client.chat.completions.create(parallel_tool_calls=False, **asked).choices[0]
        calls, reason = whole.message.tool_calls, whole.finish_reason
        assert whole.message.content is None and len(calls) == 1
    assert reason == "tool_calls" and calls
    for call in calls:
        assert call.function.name == "paint"
        assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    # The next turn: the call and what came of it, in the model's template.
    told = [
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": calls[0].function.model_dump()}],
        }
    ]
    told += [{"role": "tool", "tool_call_id": "1", "content": "done"}]
    again = client.chat.completions.create(model=MODEL, messages=MESSAGES + told, max_tokens=4)
    assert again.usage is not None and again.usage.completion_tokens > 0


HOSTILE: list[Any] = [
    {"type": "nonsense"},
    {"type": "object", "properties": []},
    {"type": "string", "pattern": "(a|a)*" * 20 + "(x+x+)+y{1000}{1000}"},
    {"$ref": "https://example.com/schema.json"},
    {"anyOf": []},
]


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("schema", [*HOSTILE, nested(90)], ids=lambda schema: json.dumps(schema)[:40])
def test_a_hostile_schema_is_refused_and_the_others_go_on(server: Server, schema: Any) -> None:
    answer: list[Any] = []
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": MESSAGES, "response_format": form, "max_tokens": 8}
    thread = threading.Thread(target=lambda: answer.append(server.post("/v1/chat/completions", **body)))
    thread.start()
    assert server.complete("the others", max_tokens=20, ignore_eos=True)["usage"]["completion_tokens"] == 20
    thread.join(25)
    assert answer and answer[0].status_code == 400, answer[0].text
    error = answer[0].json()["error"]
    assert error["param"] in ("response_format", None) and len(error["message"]) < 300
    server.idle()


class Brush(BaseModel):
    colour: Literal["red", "blue"]
    width: Annotated[int, Field(ge=0, le=9)]


class Coat(BaseModel):
    brush: Brush
    under: Coat | None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Coat"}}])
def test_calls_whose_parameters_refer_to_their_parts(client: openai.OpenAI, choice: Any) -> None:
    tools = [openai.pydantic_function_tool(Brush), openai.pydantic_function_tool(Coat)]
    found = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=tools,
        tool_choice=choice,
        n=4,
        seed=1,
        parallel_tool_calls=False,
    )
    calls = [call for one in found.choices for call in one.message.tool_calls or []]
    assert any(call.function.name == "Coat" for call in calls)
    for call in calls:
        {"Brush": Brush, "Coat": Coat}[call.function.name].model_validate_json(call.function.arguments)
