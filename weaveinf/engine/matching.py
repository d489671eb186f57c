"""The program that compiles JSON schemas and follows answers through them, apart from the engine.

xgrammar is native code that a hostile schema can make run for ever, fill the memory or crash, when it
compiles and when it matches. So each schema has a process of its own, under limits of the kernel, forked
from one that has imported xgrammar already. `weaveinf.engine.structured` is the other end.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from weaveinf.engine.structured import COMPILE_S, END, ERROR, MASK, MAX_SCHEMA, MEMORY_MIB, STEP_S, words_of
from weaveinf.engine.tokenizer import load_tokenizer

Answer = tuple[int, NDArray[Any]]
"""A status; with MASK int64 [words], a bit for each token id that may follow."""

MAX_DEPTH = 64
MAX_WHITESPACE = 32
"""Characters between two parts of an answer: an unsure model writes blanks for ever."""

_SAYS_NOTHING = set(
    "title description default examples deprecated readOnly writeOnly discriminator "
    "$schema $id $comment $defs definitions".split()
)
_NUMBER = "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"
_KEYWORDS = {
    "object": "properties required additionalProperties minProperties maxProperties patternProperties "
    "propertyNames",
    "array": "items prefixItems minItems maxItems",
    "string": "minLength maxLength pattern format",
    "integer": _NUMBER,
    "number": _NUMBER,
    "boolean": "",
    "null": "",
}
_PYTHON: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_ALONE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
_CLASH = (("properties", "propertyNames"), ("properties", "patternProperties"), ("pattern", "format"))
"""Of each pair xgrammar heeds one and says nothing."""


def check(schema: Any, depth: int = 0) -> None:
    """`ValueError` for what xgrammar would ignore: an answer must satisfy all of its schema."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be an object or a boolean, got {json.dumps(schema):.40}")
    if depth > MAX_DEPTH:
        raise ValueError(f"schemas may be nested {MAX_DEPTH} deep")
    if "discriminator" in schema and "oneOf" in schema:  # it says that no two of them overlap
        schema["anyOf"] = schema.pop("oneOf")
    types = schema.get("type", "object" if "properties" in schema else [])
    types = [types] if isinstance(types, str) else types
    if unknown := [name for name in types if name not in _KEYWORDS]:
        raise ValueError(f"unknown type {json.dumps(unknown[0]):.40}")
    kind = f"of type {' or '.join(types)}" if types else "without a type"
    allowed = {"type"}.union(*(_KEYWORDS[name].split() for name in types))
    if alone := [name for name in _ALONE if name in schema]:
        kind = f"with {alone[0]!r}"
        allowed = {alone[0], "type"} if alone[0] in ("enum", "const") else {alone[0]}
    for name in sorted(schema.keys() - allowed - _SAYS_NOTHING):
        if not name.startswith("x-"):
            raise ValueError(f"{name[:40]!r} is not supported in a schema {kind}")
    for pair in _CLASH:
        if schema.keys() >= {*pair}:
            raise ValueError(f"{pair[0]!r} and {pair[1]!r} cannot be combined")
    for value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]:
        if types and not any(_is(value, name) for name in types):
            raise ValueError(f"{json.dumps(value):.40} is not of type {' or '.join(types)}")
    for name in schema.get("required", []):
        if name not in schema.get("properties", {}):
            raise ValueError(f"{json.dumps(name):.40} is required, but not among the properties")
    if "pattern" in schema:
        schema["pattern"] = _escaped(schema["pattern"])
    if patterns := schema.get("patternProperties"):
        schema["patternProperties"] = {_escaped(pattern): part for pattern, part in patterns.items()}
    below = [schema[name] for name in ("items", "additionalProperties", "propertyNames") if name in schema]
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        below += schema.get(name, [])
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        below += schema.get(name, {}).values()
    for part in below:
        check(part, depth + 1)


def _escaped(pattern: str) -> str:
    """The pattern such that answers are JSON, whatever it lets through; `ValueError` where they would not be.

    xgrammar sees to it in a pattern of ASCII that it makes an automaton of: not too large, and with a text
    that needs no escapes. Any other it takes as it is, which harms where it may mean a character to escape.
    """
    pattern = re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{{{ord(found[0]):x}}}", pattern)
    grammar = xgrammar.Grammar.from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    if "\nroot_1 ::= Regex(" not in str(grammar) and re.search(r"[\x00-\x1f\".[\\]", pattern):
        raise ValueError("a pattern may not be that large, nor name a quote, backslash or control character")
    return pattern


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _PYTHON[name]) and isinstance(value, bool) <= (name == "boolean")


class Matching:
    """One schema, and the answers that follow it."""

    def __init__(self, info: xgrammar.TokenizerInfo) -> None:
        self._info = info
        self._matchers: dict[int, xgrammar.GrammarMatcher] = {}
        size, words = info.vocab_size, words_of(info.vocab_size)
        self._row = np.zeros((1, 2 * words), np.int32)
        self._filled = self._row[:, : -(-size // 32)]
        kept = np.arange(64 * words) < size  # xgrammar leaves bits behind the vocabulary as they come
        self._kept = np.packbits(kept, bitorder="little").view(np.int64)
        kept[info.stop_token_ids] = False
        self._texts = np.packbits(kept, bitorder="little").view(np.int64)

    def compile(self, schema: bytes) -> Answer:
        """What an answer may begin with."""
        loaded = json.loads(schema)
        check(loaded)
        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        self._compiled = compiler.compile_json_schema(json.dumps(loaded), max_whitespace_cnt=MAX_WHITESPACE)
        for warning in re.findall(r"Warning: (.*)", os.pread(2, 1 << 16, 0).decode(errors="replace")):
            raise ValueError(warning)  # something of the schema would be ignored
        return self._next(xgrammar.GrammarMatcher(self._compiled))

    def advance(self, sequence: int, token: int) -> Answer:
        """What may follow when a sequence goes on with this token."""
        if sequence not in self._matchers:
            self._matchers[sequence] = xgrammar.GrammarMatcher(self._compiled)
        matcher = self._matchers[sequence]
        if not matcher.accept_token(token):
            raise ValueError(f"token {token} does not fit")
        return self._next(matcher)

    def drop(self, sequence: int) -> None:
        self._matchers.pop(sequence, None)

    def _next(self, matcher: xgrammar.GrammarMatcher) -> Answer:
        matcher.fill_next_token_bitmask(self._filled)
        mask = self._row.view(np.int64)[0] & self._kept
        if (mask & self._texts).any():
            return MASK, mask
        if not matcher.is_completed():
            raise ValueError("no token of this model can follow")
        return END, mask


def vocabulary(path: Path, vocab_size: int, stop_ids: list[int]) -> xgrammar.TokenizerInfo:
    """What each token adds to the text. Special tokens are not shown, so they add nothing and are banned;
    so are control characters but line ends: xgrammar lets them into strings of bounded length.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    found = xgrammar.TokenizerInfo.from_huggingface(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend),
        vocab_size=vocab_size,
        stop_token_ids=stop_ids or None,
    )
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    texts = [
        b"" if i in special or re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]", text) else text
        for i, text in enumerate(found.decoded_vocab)
    ]
    return xgrammar.TokenizerInfo(
        texts, vocab_size=vocab_size, stop_token_ids=stop_ids, add_prefix_space=found.add_prefix_space
    )


def serve(engine: socket.socket, info: xgrammar.TokenizerInfo) -> None:
    """Compiles the schema that comes first; then follows its answers until the engine hangs up."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.memfd_create("said"), 2)  # where xgrammar warns
    matching = Matching(info)

    def reply(sequence: int, seconds: int, ask: Callable[..., Answer], *about: Any) -> None:
        _allow(seconds)
        try:
            status, payload = ask(*about)
        except Exception as error:
            status, payload = ERROR, np.frombuffer(_reason(error).encode(), np.uint8)
        engine.send(np.array([sequence, status], np.int64).tobytes() + payload.tobytes())

    reply(-1, COMPILE_S, matching.compile, engine.recv(MAX_SCHEMA))
    while message := engine.recv(1 << 20):
        for sequence, token in np.frombuffer(message, np.int64).reshape(-1, 2).tolist():
            if token < 0:
                matching.drop(sequence)
            else:
                reply(sequence, STEP_S, matching.advance, sequence, token)


def _allow(seconds: int) -> None:
    """So much more processor time; the kernel ends this process when it takes more."""
    limit = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _reason(error: Exception) -> str:
    """One line of at most 200 characters."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip() or type(error).__name__
    if isinstance(error, TypeError | AttributeError):
        return "a keyword has a value of the wrong type"
    if "bad_alloc" in text or isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_MIB} MiB; simplify it"
    return text.splitlines()[0][:200]


def main() -> None:
    """Forks a process for each socket that comes over stdin, until stdin ends."""
    path, vocab_size, *stop_ids = sys.argv[1:]
    control = socket.socket(fileno=0)
    info = vocabulary(Path(path), int(vocab_size), [*map(int, stop_ids)])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    gc.freeze()
    while fds := socket.recv_fds(control, 1, 1)[1]:
        if os.fork() == 0:
            control.close()
            with suppress(OSError):  # the engine hung up
                serve(socket.socket(fileno=fds[0]), info)
            os._exit(0)
        os.close(fds[0])


if __name__ == "__main__":
    main()
