"""Answers over HTTP are the offline API's, whole and in chunks, with every field that asks for something."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.harness import DEMO, MODEL, Server, events, until
from weaveinf import LLM, SamplingParams
from weaveinf.commands.serve import _listen
from weaveinf.server.config import ServerConfig
from weaveinf.server.protocol import ChatRequest, CompletionRequest, ResponseFormat

PROMPT = "def softmax(x):"
OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", kv_cache_gib=0.05, show_progress=False) as offline:
        yield offline


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def test_equals_the_offline_api(server: Server, llm: LLM) -> None:
    prompts = [PROMPT, "The sum of", "import torch"]
    wanted = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, logprobs=3))
    found = server.complete(prompts, max_tokens=24, logprobs=3, return_token_ids=True)["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2]
    for choice, output in zip(found, wanted, strict=True):
        assert choice["text"] == output.text
        assert choice["token_ids"] == output.token_ids
        assert choice["prompt_token_ids"] == output.prompt_token_ids
        assert choice["finish_reason"] == output.finish_reason
        assert output.logprobs is not None
        values = [entry.logprob for entry in output.logprobs]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(values, abs=1e-4)
        assert all(3 <= len(best) <= 4 for best in choice["logprobs"]["top_logprobs"])
    again = server.complete([output.prompt_token_ids for output in wanted], max_tokens=24)["choices"]
    assert [choice["text"] for choice in again] == [output.text for output in wanted]


def test_sampling_fields_reach_the_engine(server: Server, llm: LLM) -> None:
    fields = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "n": 3}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    fields |= {"stop": ["\n\n"], "min_tokens": 2, "max_tokens": 16}
    wanted = llm.generate(PROMPT, SamplingParams(logit_bias={300: 2.0}, **fields))[0].outputs
    found = server.complete(PROMPT, logit_bias={"300": 2.0}, **fields)["choices"]
    assert [choice["text"] for choice in found] == [output.text for output in wanted]
    assert len({choice["text"] for choice in found}) == 3
    assert [choice["stop_reason"] for choice in found] == [output.stop_reason for output in wanted]


def test_same_prompts_of_a_request_are_sampled_apart(server: Server) -> None:
    found = server.complete([PROMPT] * 3, temperature=1.0, max_tokens=16)["choices"]
    assert len({choice["text"] for choice in found}) == 3


def test_stream_is_the_whole_in_pieces(server: Server) -> None:
    body = {"prompt": [PROMPT, "é"], "n": 2, "seed": 3, "max_tokens": 12, "logprobs": 1}
    whole = server.post("/v1/completions", **body).json()
    with server.client.stream(
        "POST", "/v1/completions", json=body | {"stream": True, "stream_options": OPTIONS}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(response)
    assert done == "[DONE]" and usage["choices"] == []
    assert {**usage["usage"], "prompt_tokens_details": None} == {
        **whole["usage"],
        "prompt_tokens_details": None,
    }
    assert len({chunk["id"] for chunk in chunks}) == 1
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] <= usage["usage"]["completion_tokens"]
    for wanted in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == wanted["index"]]
        assert "".join(choice["text"] for choice in mine) == wanted["text"]
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == wanted["finish_reason"]
        for name in ("tokens", "text_offset"):
            joined = [value for choice in mine for value in choice["logprobs"][name]]
            assert joined == wanted["logprobs"][name]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(server: Server, llm: LLM, stream: bool) -> None:
    """What evaluation harnesses ask for: log-probabilities of the prompt's own tokens."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, prompt_logprobs=0)
    output = llm.generate(PROMPT, params)[0]
    assert output.prompt_logprobs is not None and output.logprobs is not None
    wanted = [entry and entry.logprob for entry in [*output.prompt_logprobs, *output.logprobs]]
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    if stream:
        with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            choice = events(response)[0]["choices"][0]
    else:
        choice = server.complete(**body)["choices"][0]
    assert choice["text"] == PROMPT + output.text
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is wanted[0] is None
    assert found[1:] == pytest.approx(wanted[1:], abs=1e-4)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    for at, token in zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True):
        assert choice["text"][at : at + len(token)] == token
    alone = server.complete(PROMPT, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert alone["text"] == PROMPT
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted[1:-1], abs=1e-4)


def test_chat(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tensor?"}]
    wanted = "".join(llm.chat(messages, SamplingParams(temperature=0, max_tokens=16)))
    whole = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=16, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].message.content == wanted
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    entries = whole.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode().startswith(wanted)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob <= 0 and math.isfinite(entry.logprob) for entry in entries)
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a tensor?"}]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[messages[0], {"role": "user", "content": parts}],
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert (
        chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )


async def _many(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        import asyncio

        async def one(i: int) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=f"{i}: {PROMPT}", max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(one, range(24)))


def test_many_at_once_equal_each_alone(server: Server) -> None:
    import asyncio

    together = asyncio.run(_many(server.url))
    alone = [server.text(f"{i}: {PROMPT}", max_tokens=8) for i in range(24)]
    assert together == alone


@pytest.mark.slow
def test_priorities_order_those_who_wait() -> None:
    """With one place, the urgent request overtakes those that came before it."""
    import threading

    with Server("--max-num-seqs", "1", tp=1) as server:
        ends: list[int] = []

        def ask(number: int, priority: int) -> None:
            server.complete(f"{number}", max_tokens=400, ignore_eos=True, priority=priority)
            ends.append(number)

        threads = [threading.Thread(target=ask, args=(i, p)) for i, p in enumerate([0, 5, 5, -1])]
        for thread in threads:
            thread.start()
            while server.metric(f'weaveinf_num_requests_running{{model_name="{MODEL}"}}') == 0:
                pass
        for thread in threads:
            thread.join()
        assert ends.index(3) < max(ends.index(1), ends.index(2))


def test_tokenize_and_back(server: Server, llm: LLM) -> None:
    found = server.post("/tokenize", prompt=PROMPT).json()
    assert found["tokens"] == llm.engine.encode(PROMPT) and found["count"] == len(found["tokens"])
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": PROMPT}
    messages = [{"role": "user", "content": "Hello"}]
    assert server.post("/tokenize", messages=messages).json()["tokens"] == llm.engine.render_chat(messages)


def test_models_version_and_log(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert set(server.client.get("/version").json()) == {"version"}
    body = {"prompt": "secret words", "max_tokens": 2, "user": "somebody"}
    answer = server.client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-17"})
    assert answer.headers["x-request-id"] == "mine-17"
    until(lambda: any('"mine-17"' in line for line in server.lines))
    line = json.loads(next(line for line in server.lines if '"mine-17"' in line))
    assert line["path"] == "/v1/completions" and line["status"] == 200 and line["user"] == "somebody"
    assert (line["output_tokens"] == 2 and line["prompt_tokens"] == 2) or line["prompt_tokens"] > 0
    assert not any("secret words" in line for line in server.lines)


def test_a_streams_first_tokens_wait_for_no_acknowledgement() -> None:
    with _listen(ServerConfig(port=0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_prompt_that_is_only_scored(server: Server) -> None:
    """The token that is sampled for it is neither shown nor counted, nor what ended it."""
    asked = {"prompt": "The class", "max_tokens": 0, "echo": True, "logprobs": 0, "logit_bias": {"0": 100}}
    for found in (server.complete(**asked), events(server.post("/v1/completions", **asked, **USAGE))[-2]):
        assert found["usage"]["completion_tokens"] == 0
        assert all(choice["finish_reason"] == "length" for choice in found["choices"])
    assert server.complete(**asked)["choices"][0]["text"] == "The class"


USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("max_tokens", [0, 8])
def test_offsets_point_into_the_text(server: Server, max_tokens: int) -> None:
    """Also where characters take several tokens, and where special tokens are shown, or not."""
    asked = {"max_tokens": max_tokens, "echo": True, "logprobs": 0, "ignore_eos": True, "temperature": 1}
    for prompt in (
        "Die Größe – “naïve” 日本語 🎉 ist",
        "<|user|>\nhi<|end|>",
        [1, 202, 593, 3],
        "plain words",
    ):
        (choice,) = server.complete(prompt, **asked, seed=3)["choices"]
        text, found = choice["text"], choice["logprobs"]
        assert isinstance(prompt, list) or text.startswith(prompt)
        offsets = [*found["text_offset"], len(text)]
        assert offsets == sorted(offsets) and offsets[0] == 0
        for token, start, end in zip(found["tokens"], offsets, offsets[1:], strict=False):
            if "\N{REPLACEMENT CHARACTER}" not in token:
                assert text[start:end] in (token, "")


def test_stop_strings_wait_for_min_tokens(server: Server) -> None:
    asked = {"prompt": "The class", "max_tokens": 30, "seed": 1, "temperature": 0, "return_token_ids": True}
    (free,) = server.complete(**asked, ignore_eos=True)["choices"]
    letter = free["text"].strip()[0]
    (held,) = server.complete(**asked, ignore_eos=True, min_tokens=20, stop=[letter])["choices"]
    assert held["token_ids"] == free["token_ids"][: len(held["token_ids"])] and len(held["token_ids"]) >= 20
    assert letter in held["text"]


def test_the_model_alone(server: Server) -> None:
    one = server.client.get(f"/v1/models/{MODEL}")
    assert one.json() == server.client.get("/v1/models").json()["data"][0]
    assert server.client.get("/v1/models/org/other").status_code == 404


def test_null_is_as_not_given(server: Server, client: openai.OpenAI) -> None:
    wanted = server.text(PROMPT, max_tokens=4, seed=1)
    fields = CompletionRequest.model_fields.keys() - {"prompt", "max_tokens", "temperature"}
    assert server.text(PROMPT, max_tokens=4, **dict.fromkeys(fields | {"suffix"})) == wanted
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    first = client.chat.completions.create(messages=messages, **asked).choices[0].message
    messages += [first.model_dump(), messages[0]]
    again = client.chat.completions.create(messages=messages, stop=None, tools=None, logprobs=None, **asked)
    assert again.choices[0].message.content
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    said = ChatRequest.model_validate({"messages": [called], "n": None}).messages[0].plain()
    assert said == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert server.post("/tokenize", prompt=PROMPT, messages=None, tools=None).status_code == 200
    schema = {"const": None, "default": None}
    form = ResponseFormat.model_validate(
        {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    )
    assert json.loads(form.schema_text() or "") == schema
