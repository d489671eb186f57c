"""Text comes in whole characters, and never shows any of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weaveinf.engine.detokenizer import TextStream


def byte_tokenizer() -> Tokenizer:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(max_size=3))
def test_every_text_comes_out_as_it_is(text: str, prompt: str) -> None:
    stream = TextStream(TOKENIZER, ids(prompt))
    shown = ""
    for token in ids(text):
        assert not stream.add(token)
        assert stream.text.startswith(shown) and text.startswith(stream.text)
        shown = stream.text
    stream.end()
    assert stream.text == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(TOKENIZER, ids("x"), stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    for at, token in enumerate(ids(text), 1):
        stopped = stream.add(token)
        assert (stopped is not None) == (bool(ends) and at == min(ends))
        if stopped is not None:
            assert stopped in stops and text[:at].endswith(stopped)
            break
    stream.end()
    done = text[: min(ends)] if ends else text
    begins = [done.find(stop) for stop in stops if stop in done]
    assert stream.text == (done[: min(begins)] if ends else text)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ids("x"), ["END."])
    for token in ids("the EN"):
        stream.add(token)
    assert stream.text == "the "
    stream.add(ids("d")[0])
    assert stream.text == "the ENd"


def test_half_a_character_shows_at_the_end_only() -> None:
    stream = TextStream(TOKENIZER, ids("x"))
    for token in ids("né")[:-1]:
        stream.add(token)
    assert stream.text == "n"
    stream.end()
    assert stream.text == "n\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("prompt", ["", "q"])
def test_a_leading_space_is_kept(prompt: str) -> None:
    stream = TextStream(TOKENIZER, ids(prompt))
    for token in ids(" word"):
        stream.add(token)
    stream.end()
    assert stream.text == " word"


def test_half_a_character_of_the_prompt_brings_nothing_of_it_back() -> None:
    prompt = ids("all about é")[:-1]
    stream = TextStream(TOKENIZER, prompt, ["about"])
    shown = [stream.add(token) for token in ids(" END and more")]
    stream.end()
    assert shown == [None] * len(shown) and stream.text == " END and more"
    stream = TextStream(TOKENIZER, ids("ends in \N{REPLACEMENT CHARACTER}"))
    for token in ids("ok"):
        stream.add(token)
    assert stream.text == "ok"


def test_a_token_that_changes_how_those_before_it_read_ends_nothing() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "c"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")])
    with pytest.raises(Exception, match="prefix"):
        broken = decoders.DecodeStream(skip_special_tokens=True)
        for token in (0, 1, 2):
            broken.step(tokenizer, token)
    stream = TextStream(tokenizer, [])
    for token in (0, 1, 2, 2):
        assert stream.add(token) is None
    stream.end()
    assert stream.text == "abcc"
