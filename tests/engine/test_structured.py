"""Answers under a JSON schema: they satisfy it on any number of ranks, and no schema harms the others."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer

import weaveinf
from tests.engine.harness import complete, with_engines
from tests.models.harness import make_checkpoint
from tests.ranks import pool
from weaveinf.comm.ranks import Ranks
from weaveinf.config import EngineConfig
from weaveinf.engine import structured
from weaveinf.engine.engine import Engine
from weaveinf.engine.request import Request, SamplingParams
from weaveinf.engine.structured import Constraint, Grammars
from weaveinf.llm import LLM

DEMO = Path(weaveinf.__file__).parent / "assets" / "demo"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
VOCAB = 4100
"""More than the tokenizer's 4096, and no multiple of a mask's 64 bits."""
PROMPT = [50, 60, 70]
FREE = [[9, 8, 7], [300, 400]]

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -5, "maximum": 40},
        "name": {"type": "string", "maxLength": 6},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["red", "green", 'b"lue\n', 7, None, {"a": [1]}]},
    "typed enum": {"type": "string", "enum": ["a", "ab", "abc"]},
    "boolean": {"type": "boolean"},
    "nested": {
        "type": "object",
        "properties": {"p": POINT, "q": {"type": "array", "items": POINT, "maxItems": 2}},
        "required": ["p", "q"],
    },
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 999},
        "minItems": 2,
        "maxItems": 4,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"enum": [1]}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "anyOf": {
        "anyOf": [{"type": "null"}, {"type": "array", "items": {"enum": ["u", "v"]}, "maxItems": 3}, POINT]
    },
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "pattern": {"type": "string", "pattern": r"^[a-f]{2,4}-\d{3}(x|yz)?$"},
    "length": {"type": "string", "minLength": 4, "maxLength": 9},
    "multiple": {"type": "array", "items": {"enum": [1.5, -2e3, 0]}, "minItems": 1, "maxItems": 3},
    "reference": {
        "$defs": {"leaf": {"enum": ["l"]}},
        "type": "object",
        "properties": {"l": {"$ref": "#/$defs/leaf"}},
        "required": ["l"],
    },
}
"""All of these end by themselves."""
ENDLESS: dict[str, Any] = {
    "object": {"type": "object"},
    "number": {"type": "number", "minimum": 0},
    "tree": {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "next"],
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a real tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    make_checkpoint(directory, "llama", vocab_size=VOCAB, eos_token_id=0, max_position_embeddings=512)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def grammars(path: Path) -> Iterator[Grammars]:
    made = Grammars(path, VOCAB, (0,))
    yield made
    made.close()


def under(schema: Any, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 200} | settings, json_schema=json.dumps(schema))


def on_ranks(ranks: Ranks, path: str, use: Callable[..., Any], shared: Grammars | None = None) -> Any:
    """On rank 0 `use(fresh)`; its engines share grammars, whose processes take time to start."""

    def sharing(fresh: Callable[..., Engine]) -> Any:
        grammars = shared or fresh().grammars

        def also(**settings: Any) -> Engine:
            engine = fresh(**settings)
            engine.grammars = grammars
            return engine

        try:
            return use(also)
        finally:
            if grammars is not shared:
                grammars.close()

    config = EngineConfig(model=path, dtype="float32", kv_cache_gib=0.05, max_num_seqs=16)
    return with_engines(ranks, config, sharing)


def on_one_rank(path: Path, grammars: Grammars, use: Callable[..., Any]) -> Any:
    return on_ranks(Ranks.single(torch.device("cpu")), str(path), use, grammars)


def text_of(request: Request) -> str:
    return TOKENIZER.decode(request.output_token_ids)


def assert_satisfied(request: Request, schema: Any) -> None:
    assert request.finish_reason == "stop", (request.stop_reason, text_of(request))
    jsonschema.validate(json.loads(text_of(request)), schema)


# Masks


def allowed(constraint: Constraint) -> set[int]:
    assert constraint.mask is not None
    return set(np.flatnonzero(np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")).tolist())


def follow(constraint: Constraint, token: int) -> None:
    constraint.mask = None
    constraint.grammar.ask(constraint, token)
    constraint.grammar.read(30)


def test_masks_are_what_the_texts_of_all_tokens_say(grammars: Grammars) -> None:
    texts = [TOKENIZER.decode([i]) for i in range(4096)]
    one = grammars.compile('{"enum": ["red", "reddish", 12]}').begin(ignore_eos=False)
    for so_far in ("", '"', '"re', '"red'):
        if so_far:
            follow(one, texts.index(so_far[-2:] if so_far == '"re' else so_far[-1:]))
        ways = [way[len(so_far) :] for way in ('"red"', '"reddish"', "12") if way.startswith(so_far)]
        assert allowed(one) == {
            i for i, t in enumerate(texts) if t and any(way.startswith(t) for way in ways)
        }
    follow(one, texts.index('"'))
    assert one.end == ("stop", None)


def test_the_end_is_allowed_where_the_answer_is_complete(grammars: Grammars) -> None:
    digits = {TOKENIZER.encode(str(i)).ids[0] for i in range(10)}
    grammar = grammars.compile('{"type": "integer", "minimum": 0}')
    for ignore_eos in (False, True):
        one = grammar.begin(ignore_eos)
        assert allowed(one) >= digits and 0 not in allowed(one)
        follow(one, max(digits))
        assert allowed(one) == digits | (set() if ignore_eos else {0})
    follow(one, 300)
    assert one.end is not None and one.end[0] == "abort" and "token 300 does not fit" in str(one.end[1])


def test_no_special_token_and_no_control_character_is_ever_allowed(grammars: Grammars) -> None:
    quote = TOKENIZER.encode('"').ids[0]
    one = grammars.compile('{"type": "string", "maxLength": 30}').begin(ignore_eos=False)
    follow(one, quote)
    assert one.mask is not None and len(allowed(one)) > 3000
    assert not allowed(one) & {0, 1, 2, 3, *range(4096, 64 * len(one.mask))}
    for i in allowed(one):
        assert min(TOKENIZER.decode([i])) >= " "


# Schemas that are refused
REFUSED = {
    "{": "Expecting",
    "5": "must be an object or a boolean",
    '{"type": "banana"}': "unknown type",
    '{"type": 5}': "wrong type",
    '{"type": "object", "properties": [1]}': "wrong type",
    '{"enum": 5}': "wrong type",
    '{"type": "integer", "minimum": 5, "maximum": 3}': "minimum greater",
    '{"$ref": "#"}': "Circular",
    '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}': "Circular",
    '{"$ref": "#/$defs/none"}': "Cannot find field",
    '{"$ref": "https://example.org/schema"}': "URI",
    '{"not": {}}': "'not' is not supported",
    '{"type": "array", "uniqueItems": true}': "'uniqueItems' is not supported",
    '{"enum": [1], "minimum": 0}': "'minimum' is not supported in a schema with 'enum'",
    '{"type": "string", "enum": ["a", 1]}': "1 is not of type string",
    '{"type": "object", "required": ["a"]}': "not among the properties",
    '{"allOf": [{"type": "integer"}, {"type": "number"}]}': "allOf",
    '{"oneOf": [{"type": "integer"}, {"type": "number"}]}': "oneOf",
    '{"type": "string", "pattern": "^a*$", "maxLength": 3}': "ignoring",
    '{"type": "string", "pattern": "(?=a)b"}': "[Ll]ookahead",
    '{"type": "string", "pattern": "(a)\\\\1"}': "Backreference",
    '{"type": "string", "pattern": "("}': "parenthesis",
    r'{"type": "string", "pattern": "^a\"b$"}': "nor name a quote",
    r'{"type": "string", "pattern": "^(\\\\|\\x22|[\\n])$"}': "nor name a quote",
    r'{"type": "string", "pattern": "^json_string=true\"$"}': "nor name a quote",
    '{"type": "string", "pattern": "^.{1,10000}$"}': "nor name a quote",
    '{"type": "string", "pattern": 5}': "wrong type",
    r'{"type": "object", "patternProperties": {"^\t$": true}}': "nor name a quote",
    r'{"type": "object", "propertyNames": {"type": "string", "pattern": "^[^]\"$"}}': "nor name a quote",
    '{"type": "array", "items": ' * 70 + "true" + "}" * 70: "nested",
    "[" * 30_000: "recursion",
    '{"enum": ["' + "a" * 70_000 + '"]}': "bytes",
    '"\ud800"': "json_schema",
}


@pytest.mark.parametrize("schema", REFUSED, ids=lambda schema: ascii(schema[:50]))
def test_what_cannot_be_held_to_is_refused(grammars: Grammars, schema: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[schema]) as raised:
        grammars.compile(schema)
    text = str(raised.value)
    assert text.startswith("json_schema") and len(text) < 300 and "\n" not in text and ".cc" not in text


def test_without_xgrammar_the_remedy_is_named(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match=r"pip install weaveinf\[structured\]"):
        grammars.compile('{"type": "object"}')


def test_schemas_beyond_the_limit_push_out_those_not_in_use(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "MAX_GRAMMARS", 3)
    grammars._kept.clear()
    held = grammars.compile('{"const": 0}').begin(ignore_eos=False)
    children = psutil.Process().children(recursive=True)
    for i in range(1, 8):
        grammars.compile(json.dumps({"const": i}))
    assert len(grammars._alive) == 3 and grammars.compile('{"const": 0}') is held.grammar
    psutil.wait_procs(gone := psutil.Process().children(recursive=True), timeout=1)
    assert sum(process.is_running() for process in gone) <= len(children) + 2
    followed = [grammars.compile(schema).begin(ignore_eos=False) for schema in [*grammars._kept]]
    with pytest.raises(structured.Busy, match="in use"):
        grammars.compile('{"const": 9}')
    assert [*grammars._kept.values()] == [one.grammar for one in followed]  # those in use stay known
    del followed, held
    assert grammars.compile('{"const": 9}') and len(grammars._alive) == 3
    grammars._kept.clear()


# Answers


def all_kinds(fresh: Callable[..., Engine]) -> dict[str, list[int]]:
    """Every schema, greedily and not, among requests that follow none."""
    engine = fresh(max_num_seqs=16)
    free = SamplingParams(temperature=1, seed=5, max_tokens=60, ignore_eos=True)
    alone = [complete(engine, [prompt], free)[0].output_token_ids for prompt in FREE]
    kinds = SCHEMAS | ENDLESS
    found = {}
    for temperature in (0, 1):
        params = [under(schema, temperature=temperature, seed=3) for schema in kinds.values()]
        done = complete(engine, [*FREE, *[PROMPT] * len(kinds)], [free, free, *params])
        assert [request.output_token_ids for request in done[:2]] == alone
        for (name, schema), request in zip(kinds.items(), done[2:], strict=True):
            if name in SCHEMAS or request.finish_reason != "length":
                assert_satisfied(request, schema)
            found[f"{name} {temperature}"] = request.output_token_ids
    return found


def test_answers_satisfy_their_schemas_on_one_rank_and_on_two(path: Path, grammars: Grammars) -> None:
    one = on_one_rank(path, grammars, all_kinds)
    two = pool(2).run(on_ranks, str(path), all_kinds)[0]
    assert one == two
    assert sum(one[f"{name} 0"] != one[f"{name} 1"] for name in SCHEMAS) > len(SCHEMAS) / 2


def all_settings(fresh: Callable[..., Engine]) -> None:
    engine = fresh()
    schema = SCHEMAS["nested"]

    def run(**settings: Any) -> list[Request]:
        return complete(engine, [PROMPT], under(schema, **settings))

    plain = run()[0]
    for settings in (
        {"temperature": 1, "top_p": 0.3},
        {"temperature": 1, "top_k": 3, "min_p": 0.1},
        {"repetition_penalty": 1.5, "frequency_penalty": 1, "presence_penalty": -1},
        {"min_tokens": 150, "ignore_eos": True},
        {"logit_bias": {0: 100, 5: 100, 4099: 100}},
        {"temperature": 100, "seed": 1},
    ):
        assert_satisfied(run(**settings)[0], schema)
    samples = run(n=3, temperature=1, seed=2)
    assert len({tuple(one.output_token_ids) for one in samples}) == 3
    for one in samples:
        assert_satisfied(one, schema)
    cut = run(max_tokens=7)[0]
    assert cut.finish_reason == "length" and cut.output_token_ids == plain.output_token_ids[:7]
    raw = complete(engine, [PROMPT], SamplingParams(temperature=0, max_tokens=1, logprobs=5))[0].logprobs
    ours = run(logprobs=5)[0].logprobs
    assert raw and ours and ours[0].top_ids == raw[0].top_ids and ours[0].logprob < ours[0].top_logprobs[0]
    stopped = run(stop=[":"])[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ":")
    assert stopped.output_token_ids == plain.output_token_ids[: len(stopped.output_token_ids)]
    short = fresh(num_pages=16, max_num_batched_tokens=20)
    done = complete(short, [PROMPT * 8] * 6, under(schema))
    assert short.scheduler.num_preemptions > 0
    unhurried = complete(engine, [PROMPT * 8], under(schema))[0]
    assert [one.output_token_ids for one in done] == [unhurried.output_token_ids] * 6


def test_all_settings_work_together_with_a_schema(path: Path, grammars: Grammars) -> None:
    on_one_rank(path, grammars, all_settings)


def test_offline(path: Path) -> None:
    schemas = [SCHEMAS["array"], SCHEMAS["anyOf"]]
    before = set(psutil.Process().children(recursive=True))
    with LLM(str(path), dtype="float32", kv_cache_gib=0.01, max_num_seqs=4, show_progress=False) as llm:
        outs = llm.generate(["one", "two"], [under(schema) for schema in schemas], show_progress=False)
        for out, schema in zip(outs, schemas, strict=True):
            jsonschema.validate(json.loads(out.text), schema)
        with pytest.raises(ValueError, match="json_schema"):
            llm.generate("x", SamplingParams(json_schema="{"))
    assert set(psutil.Process().children(recursive=True)) <= before


# Schemas that harm
ENDLESS_COMPILING = {"type": "string", "pattern": "^(.{1,40}){1,40}$"}
ENDLESS_MATCHING = {"type": "string", "pattern": "^((((((a|b|c|d|e|f){0,99}){0,99}){0,99}){0,99}){0,99})$"}
FREELY = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def steps_until(engine: Engine, done: Callable[[], bool], expected: list[int]) -> int:
    """How often FREE[0] is answered, as ever, until something else is done."""
    count = 0
    while not done():
        (mine,) = engine.add(FREE[0], FREELY)
        request = engine._sequences[mine].request
        while not request.finish_reason:
            engine.step()
        assert engine.take(mine).request.output_token_ids == expected
        count += 1
    return count


def harm(fresh: Callable[..., Engine]) -> None:
    engine = fresh()
    expected = complete(engine, [FREE[0]], FREELY)[0].output_token_ids
    good = complete(engine, [PROMPT], under(SCHEMAS["nested"]))[0].output_token_ids
    failures: list[str] = []

    def compile_it() -> None:
        try:
            engine.compile(json.dumps(ENDLESS_COMPILING))
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=compile_it)
    thread.start()
    assert steps_until(engine, lambda: not thread.is_alive(), expected) > 3
    assert len(failures) == 1 and "compiling took over 5 s" in failures[0]
    ids = [engine.add(PROMPT, under(schema))[0] for schema in (ENDLESS_MATCHING, SCHEMAS["nested"])]
    bad, also = (engine._sequences[i].request for i in ids)
    assert steps_until(engine, lambda: bool(bad.finish_reason), expected) > 1
    assert bad.finish_reason == "abort" and "json_schema: a token took over 1 s" in str(bad.stop_reason)
    assert also.finish_reason == "stop" and also.output_token_ids == good


@pytest.mark.slow
def test_a_schema_that_never_ends_harms_nobody_else(path: Path, grammars: Grammars) -> None:
    on_one_rank(path, grammars, harm)


def kill(fresh: Callable[..., Engine]) -> None:
    engine = fresh()
    good = complete(engine, [PROMPT], under(SCHEMAS["nested"]))[0].output_token_ids
    for whom in (1, 0):  # the schema's process, then the one that forks such
        (mine,) = engine.add(PROMPT, under(SCHEMAS["nested"]))
        for _ in range(5):
            engine.step()
        assert engine.grammars._parent is not None
        parent = psutil.Process(engine.grammars._parent.pid)
        for process in [*parent.children()] if whom else [parent, *parent.children()]:
            process.kill()
        psutil.wait_procs([parent] if not whom else [], timeout=5)
        while not engine._sequences[mine].request.finish_reason:
            engine.step()
        assert engine.take(mine).request.finish_reason == "abort"
        assert complete(engine, [PROMPT], under(SCHEMAS["nested"]))[0].output_token_ids == good


def test_a_process_that_dies_is_started_again(path: Path, grammars: Grammars) -> None:
    on_one_rank(path, grammars, kill)


# Patterns
RAW = r"^[^a]\S.[ -~]é$"
SPELT: list[Any] = [
    {"type": "string", "pattern": RAW},
    {"type": "object", "patternProperties": {RAW: {"type": "null"}}},
    {"type": "object", "propertyNames": {"type": "string", "pattern": RAW}},
]


@pytest.mark.parametrize("schema", SPELT, ids=json.dumps)
def test_what_a_pattern_lets_through_is_json(grammars: Grammars, schema: Any) -> None:
    one = grammars.compile(json.dumps(schema)).begin(ignore_eos=False)
    for token in TOKENIZER.encode('"' if schema["type"] == "string" else '{"').ids:
        follow(one, token)
    for _ in range(4):
        found = [TOKENIZER.decode([i]) for i in allowed(one)]
        assert "b" in found and not any({*text} & {'"', "\\", "\n"} for text in found)
        follow(one, TOKENIZER.encode("b").ids[0])
    for token in TOKENIZER.encode("é").ids:
        assert token in allowed(one)
        follow(one, token)
