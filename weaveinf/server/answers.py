"""What clients receive: OpenAI's objects, whole or in chunks, made of the engine's pieces."""

from __future__ import annotations

import time
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from weaveinf.engine.request import TokenLogprob
from weaveinf.engine.tokenizer import TextTokenizer
from weaveinf.server.async_engine import Job, Piece
from weaveinf.server.errors import ApiError
from weaveinf.server.protocol import ChatRequest, CompletionRequest, Tool, new_id
from weaveinf.server.tools import ToolReader

Object = dict[str, Any]


def head(names: tuple[str, str, str], model: str, stream: bool) -> Object:
    """What all objects of an answer begin with."""
    prefix, whole, chunk = names
    id_, now = f"{prefix}-{new_id()}", int(time.time())
    return {"id": id_, "object": chunk if stream else whole, "created": now, "model": model}


def usage(job: Job) -> Object:
    """The tokens of a job."""
    prompt, answer = sum(map(len, job.prompts)), job.num_answered
    found = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return found | {"prompt_tokens_details": {"cached_tokens": job.num_cached}}


class Spelling:
    """Log-probabilities in OpenAI's two forms; tokens of a model without a tokenizer are their numbers."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer

    def chat(self, entries: Sequence[TokenLogprob]) -> Object:
        """Of `/v1/chat/completions`."""

        def one(token: int, logprob: float) -> Object:
            spelt = self._bytes(token)
            return {"token": spelt.decode(errors="replace"), "logprob": logprob, "bytes": list(spelt)}

        def among(entry: TokenLogprob) -> Object:
            best = [one(*two) for two in zip(entry.top_ids, entry.top_logprobs, strict=True)]
            return one(entry.token_id, entry.logprob) | {"top_logprobs": best}

        return {"content": [*map(among, entries)]}

    def completion(
        self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], place: Place, echoed: str
    ) -> Object:
        """Of `/v1/completions`; `echoed`: what the text begins with. None: nothing predicts the token."""
        tokens = [self.text(token) for token in ids]
        offsets = [place.of(self._bytes(token), self._is_shown(token, place.at, echoed)) for token in ids]
        best = [
            entry
            and dict(zip(map(self.text, entry.top_ids), entry.top_logprobs, strict=True))
            | {self.text(entry.token_id): entry.logprob}
            for entry in entries
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [entry and entry.logprob for entry in entries],
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _is_shown(self, token: int, at: int, echoed: str) -> bool:
        """Special tokens are where the client wrote them."""
        special = self._tokenizer is not None and token in self._tokenizer.special_ids
        return not special or echoed.startswith(self.text(token), at)

    def text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        return str(token).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token)


class Place:
    """Where in a text its tokens begin, in characters; one that goes on with a character begins behind those
    that are whole.

    `at`: the next one.
    """

    def __init__(self) -> None:
        self.at = 0
        self._decode = getincrementaldecoder("utf-8")("replace").decode

    def of(self, spelt: bytes, is_shown: bool) -> int:
        at = self.at
        self.at += len(self._decode(spelt)) if is_shown else 0
        return at


class CompletionAnswer:
    """Of `/v1/completions`; a choice of a whole answer and of a chunk look alike."""

    names = ("cmpl", "text_completion", "text_completion")

    def __init__(
        self, request: CompletionRequest, job: Job, texts: Sequence[str], tokenizer: TextTokenizer | None
    ) -> None:
        self.request = request
        self.job = job
        self._texts = texts
        self._spelling = Spelling(tokenizer)
        self._places: dict[int, Place] = {}  # by choice
        self._late: dict[int, list[Piece]] = {}  # pieces that came before the prompt's log-probabilities

    def choices(self, piece: Piece) -> list[Object]:
        """What a piece has to show."""
        if self.job.params.prompt_logprobs is None:
            return [self._choice(piece)]
        late = self._late.setdefault(piece.sample, [])
        late.append(piece)
        if piece.sample // self.job.params.n not in self.job.prompt_logprobs:
            return []
        return [self._choice(one) for one in self._late.pop(piece.sample)]

    def _choice(self, piece: Piece) -> Object:
        request, prompt = self.request, piece.sample // self.job.params.n
        text, ids, entries = piece.text, piece.token_ids, list[TokenLogprob | None](piece.logprobs)
        reason, echoed = finish_reason(piece), ""
        if request.max_tokens == 0:
            text, ids, entries, reason = "", [], [], reason and "length"
        self.job.num_answered += len(ids)
        first = piece.sample not in self._places
        place = self._places.setdefault(piece.sample, Place())
        if request.echo and first:
            echoed, ids = self._texts[prompt], self.job.prompts[prompt] + ids
            entries = self.job.prompt_logprobs.get(prompt, []) + entries
        choice: Object = {"index": piece.sample, "text": echoed + text, "logprobs": None}
        if request.logprobs is not None:
            choice["logprobs"] = self._spelling.completion(ids, entries, place, echoed)
        choice |= {"finish_reason": reason, "stop_reason": piece.stop_reason}
        return choice | (_ids(self.job, piece.sample, ids, first) if request.return_token_ids else {})


class ChatAnswer:
    """Of `/v1/chat/completions`."""

    names = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(
        self, request: ChatRequest, job: Job, tools: list[Tool], tokenizer: TextTokenizer | None
    ) -> None:
        self.request = request
        self.job = job
        self._tools = tools
        self._spelling = Spelling(tokenizer)
        self._readers: dict[int, ToolReader] = {}

    def choices(self, piece: Piece) -> list[Object]:
        """What a piece has to show: the whole message, or what a chunk adds to it."""
        self.job.num_answered += len(piece.token_ids)
        first = piece.sample not in self._readers
        reader = self._readers.setdefault(
            piece.sample, ToolReader(self._tools, self.request.parallel_tool_calls)
        )
        content, calls = piece.text, list[Object]()
        reason = finish_reason(piece)
        if self._tools:
            content = reader.add(piece.text)
            if reason is not None:
                rest, calls = reader.end()
                content += rest
        message: Object = {"role": "assistant"} if first else {}
        if content or first:
            message["content"] = content if content or not calls else None
        if calls:
            numbered = [{"index": i} | call for i, call in enumerate(calls)]
            message["tool_calls"] = numbered if self.job.stream else calls
            reason = "tool_calls" if reason == "stop" else reason
        shows = message or reason is not None or (piece.token_ids and self.request.return_token_ids)
        if not shows and not piece.logprobs:
            return []
        choice: Object = {"index": piece.sample, "delta" if self.job.stream else "message": message}
        choice["logprobs"] = self._spelling.chat(piece.logprobs) if self.request.logprobs else None
        choice |= {"finish_reason": reason, "stop_reason": piece.stop_reason}
        if self.request.return_token_ids:
            choice |= _ids(self.job, piece.sample, piece.token_ids, first)
        return [choice]


Answer = CompletionAnswer | ChatAnswer


def _ids(job: Job, sample: int, ids: list[int], first: bool) -> Object:
    return {"token_ids": ids} | ({"prompt_token_ids": job.prompts[sample // job.params.n]} if first else {})


def finish_reason(piece: Piece) -> str | None:
    """ApiError (500) where the engine could not go on with it."""
    if piece.finish_reason == "abort":
        raise ApiError(500, f"the answer was aborted: {piece.stop_reason}")
    return piece.finish_reason
