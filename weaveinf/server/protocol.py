"""The requests, field by field: each is honoured here or refused by name."""

from __future__ import annotations

import json
import random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import from_json

from weaveinf.engine.request import MAX_LOGPROBS, MAX_N, SamplingParams

MAX_PROMPTS = 64
"""Of one request for completions."""
MAX_USER = 128

Count = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Real = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[Count], Field(min_length=1)]


def new_id() -> str:
    """32 digits that are no secret, so that the kernel need not be asked for them, which takes its time."""
    return f"{random.getrandbits(128):032x}"


class Body(BaseModel):
    """Strict: "1" is no number, and a field that is not known is an error. One that is null is not given."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}


class StreamOptions(Body):
    """Usage at the end of a stream; with continuous_usage_stats in every chunk too, as it is by then."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "selector_budget"),
)
"""Fields that are `SamplingParams`' own."""


class Sampling(Body):
    """What both kinds of completion have in common.

    Beside OpenAI's fields: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos;
    selector_budget (see `SamplingParams`); priority (lower is served first); cache_salt (prefixes are shared
    with requests of the same salt only); timeout (seconds, after which the answer is given up);
    return_token_ids. `user` is shown in the server's log.
    """

    model: str | None = None
    temperature: Real = 1.0
    top_p: Real = 1.0
    n: Count = Field(1, description=f"1 to {MAX_N}")
    stop: str | list[str] | None = None
    seed: Count | None = None
    presence_penalty: Real = 0.0
    frequency_penalty: Real = 0.0
    logit_bias: dict[str, Real] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_USER)] | None = None
    top_k: Count = 0
    min_p: Real = 0.0
    repetition_penalty: Real = 1.0
    min_tokens: Count = 0
    stop_token_ids: list[Count] = []
    ignore_eos: bool = False
    selector_budget: Count | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    return_token_ids: bool = False

    def sampling(self, **more: Any) -> SamplingParams:
        """ValueError for what is out of its bounds."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        bias = None
        if self.logit_bias is not None:
            if not all(key.isdecimal() and key.isascii() and len(key) < 12 for key in self.logit_bias):
                raise ValueError("logit_bias must map token ids to numbers")
            bias = {int(key): value for key, value in self.logit_bias.items()}
        return SamplingParams(logit_bias=bias, **{name: getattr(self, name) for name in _SAME}, **more)


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Count = 16
    echo: bool = False
    logprobs: Count | None = Field(None, description=f"0 to {MAX_LOGPROBS}")

    def params(self) -> SamplingParams:
        # OpenAI's way to have a prompt scored alone: one token is sampled, and not shown.
        most = 1 if self.max_tokens == 0 and self.echo else self.max_tokens
        scored = self.logprobs if self.echo else None
        return self.sampling(max_tokens=most, logprobs=self.logprobs, prompt_logprobs=scored)

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or (len(self.prompt) > MAX_PROMPTS and not isinstance(self.prompt[0], int)):
            raise ValueError(f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(self.prompt)}")
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One of a conversation; images and other media are not served."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: text in one piece, arguments of calls as objects."""
        said = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            said["content"] = "".join(part.text for part in self.content)
        said.setdefault("content", "")
        for call in said.get("tool_calls", ()):
            try:
                given = call["function"]["arguments"]
                call["function"]["arguments"] = from_json(given, allow_inf_nan=False)
            except ValueError:
                raise ValueError("messages: the arguments of a tool call must be JSON") from None
        return said


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """Its name and description are the client's own; answers fulfil the schema whether `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """The schema that answers must fulfil. ValueError where it is missing, or would be ignored."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError("response_format of type json_schema needs its json_schema")
            return json.dumps(self.json_schema.schema_)
        if self.json_schema is not None:
            raise ValueError(f"response_format of type {self.type} takes no json_schema")
        return '{"type": "object"}' if self.type == "json_object" else None


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @field_validator("tools")
    @classmethod
    def _some(cls, tools: list[Tool] | None) -> list[Tool] | None:
        return tools or None

    def params(self, calls: str | None) -> SamplingParams:
        """calls: the schema of an answer that must be tool calls."""
        form = self.response_format.schema_text() if self.response_format is not None else None
        if None not in (calls, form):
            raise ValueError("response_format and a tool_choice that requires calls exclude each other")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same; give one")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        best = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=most, logprobs=best, json_schema=form or calls)


class TokenizeRequest(Body):
    """`/tokenize`: of a text or of a conversation in the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None

    def texts(self) -> str | list[Message]:
        """What is given of the two. ValueError where it is both or neither, or tools have no conversation."""
        given = [one for one in (self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools need messages")
        return given[0]


class DetokenizeRequest(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[Count]
