"""The offline API as a user sees it: two real ranks on the model that comes with the package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import weaveinf
from weaveinf import LLM, SamplingParams

MODEL = str(Path(weaveinf.__file__).parent / "assets" / "demo")
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        MODEL,
        tensor_parallel_size=2,
        dtype="float32",
        kv_cache_gib=0.05,
        max_num_seqs=16,
        max_model_len=256,
        show_progress=False,
    ) as one:
        yield one


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["The class ", "Return the", llm.engine.encode("Return the"), "def f(x):"]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == ["The class ", "Return the", None, "def f(x):"]
    assert outputs[1].text == outputs[2].text
    assert outputs[1].prompt_token_ids == prompts[2]
    for output in outputs:
        assert output.finish_reason in ("stop", "length")
        assert 0 < len(output.token_ids) <= 12
        assert output.logprobs is None
    assert [llm.generate(p, GREEDY)[0].token_ids for p in prompts] == [o.token_ids for o in outputs]


def test_a_seed_gives_the_same_text_whatever_else_runs(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1, top_p=0.9, seed=7, max_tokens=12, n=2)
    alone = llm.generate("Import the", seeded)[0]
    others = SamplingParams(temperature=0.5, max_tokens=20, repetition_penalty=1.2)
    together = llm.generate(["The", "Import the", "A"], [others, seeded, others])[1]
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_stop_strings_are_cut_and_stop_tokens_end(llm: LLM) -> None:
    whole = llm.generate("The function", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0]
    stop = whole.text[4:7]
    cut = llm.generate("The function", SamplingParams(temperature=0, max_tokens=24, stop=stop))[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.find(stop)]
    token = whole.token_ids[5]
    ended = llm.generate(
        "The function", SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token])
    )[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_log_probabilities_of_prompt_and_answer_agree(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    output = llm.generate("Read all of", params)[0]
    assert output.logprobs is not None
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry.token_id == token == entry.top_ids[0]
        assert entry.logprob == entry.top_logprobs[0] < 0
    whole = [*output.prompt_token_ids, *output.token_ids]
    scored = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    assert scored.prompt_logprobs is not None and scored.prompt_logprobs[0] is None
    again = scored.prompt_logprobs[len(output.prompt_token_ids) :]
    for entry, prompt_entry in zip(output.logprobs, again, strict=True):
        assert prompt_entry is not None
        assert entry.logprob == pytest.approx(prompt_entry.logprob, abs=1e-4)


def test_a_prompt_of_one_token_has_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    for prompts in ([[5]], [[5], [7]], [[5, 9], [7]]):
        for output in llm.generate(prompts, params):
            assert output.prompt_logprobs is not None
            assert [entry is None for entry in output.prompt_logprobs] == [
                i == 0 for i in range(len(output.prompt_token_ids))
            ]


def test_a_stream_is_the_text_in_pieces(llm: LLM) -> None:
    prompts = ["The module", "A list of"]
    pieces: dict[int, list[str]] = {0: [], 1: []}
    for index, text in llm.stream(prompts, GREEDY):
        pieces[index].append(text)
    outputs = llm.generate(prompts, GREEDY)
    assert ["".join(pieces[i]) for i in (0, 1)] == [o.text for o in outputs]
    assert all(len(p) > 3 for p in pieces.values())


def test_leaving_a_stream_frees_everything(llm: LLM) -> None:
    free = llm.engine.scheduler.blocks.num_free
    for _ in llm.stream("The module", SamplingParams(max_tokens=200, ignore_eos=True)):
        break
    while llm.engine.scheduler.has_work:
        llm.engine.step()
    assert llm.engine.scheduler.blocks.num_free == free
    llm.engine.scheduler.check()


def test_chat_uses_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    assert "".join(llm.chat(messages, GREEDY))
    with pytest.raises(ValueError, match="template"):
        list(llm.chat([{"role": "nobody", "content": 3}], GREEDY))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        ([1, 2, 4096], "outside 0 to 4095"),
        ([-1], "outside 0 to 4095"),
        ([1.5], "whole"),
        ([3] * 256, "max_model_len is 256"),
    ],
)
def test_a_bad_prompt_is_named_and_harms_nobody(llm: LLM, prompt: object, words: str) -> None:
    good = llm.generate("The module", GREEDY)[0]
    with pytest.raises(ValueError, match=words) as caught:
        llm.generate(["The module", prompt], GREEDY)  # type: ignore[list-item]
    assert str(caught.value).startswith("prompt 1: ") and "\n" not in str(caught.value)
    assert llm.engine.scheduler.num_running == llm.engine.scheduler.num_waiting == 0
    assert llm.generate("The module", GREEDY)[0].token_ids == good.token_ids


def test_streams_and_threads_share_a_model(llm: LLM) -> None:
    alone = [llm.generate(p, GREEDY)[0].text for p in ("The class", "Return the", "A list")]
    outer, inner = "", ""
    for _, text in llm.stream("The class", GREEDY):
        outer += text
        inner = inner or llm.generate("Return the", GREEDY)[0].text
    assert [outer, inner] == alone[:2]
    with ThreadPoolExecutor(3) as threads:
        found = threads.map(lambda p: llm.generate(p, GREEDY)[0].text, ["The class", "Return the", "A list"])
    assert list(found) == alone
    assert not llm._inboxes


def test_nothing_stays_queued_when_a_prompt_or_params_are_wrong(llm: LLM) -> None:
    for prompts, params in ((["a", None], GREEDY), (["a", "b"], [GREEDY, {}]), ([b"a", "b"], GREEDY)):
        with pytest.raises(ValueError):
            llm.generate(prompts, params)  # type: ignore[arg-type]
    assert llm.engine.scheduler.num_waiting == 0


def test_a_fork_cannot_use_the_engine(llm: LLM) -> None:
    expected = llm.generate("The class", GREEDY)[0].text
    child = os.fork()
    if child == 0:
        try:
            llm.generate("The module", GREEDY)
        except RuntimeError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.generate("The class", GREEDY)[0].text == expected


def test_settings_are_checked_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="unknown setting 'tensor_parallel'"):
        LLM(MODEL, tensor_parallel=2)
    with pytest.raises(ValueError, match="max_model_len=1000000"):
        LLM(MODEL, max_model_len=1_000_000, show_progress=False)


def test_closing_twice_is_fine_and_a_closed_model_says_so() -> None:
    one = LLM(MODEL, dtype="float32", kv_cache_gib=0.02, show_progress=False)
    assert one.generate("The", GREEDY)[0].token_ids
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.generate("The", GREEDY)
