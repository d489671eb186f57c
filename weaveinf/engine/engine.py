"""Rank 0's side of generation: requests in, steps out to the ranks, text back."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from weaveinf.cache.blocks import BlockAllocator
from weaveinf.config import PAGE_SIZE
from weaveinf.engine.detokenizer import TextStream
from weaveinf.engine.executor import Executor
from weaveinf.engine.request import Request, SamplingParams, make_requests, mix_seed
from weaveinf.engine.scheduler import Scheduler
from weaveinf.engine.step import Step
from weaveinf.engine.structured import Grammar, Grammars
from weaveinf.engine.tokenizer import FILES, TextTokenizer, load_tokenizer
from weaveinf.selectors.selector import Selector
from weaveinf.weave.timeline import Recorder, Span


@dataclass(slots=True)
class Update:
    """What a step brought one sequence: tokens, the text that may be shown now, its end."""

    request: Request
    token_ids: list[int]
    text: str
    finished: bool


@dataclass(slots=True)
class _Sequence:
    request: Request
    stream: TextStream | None

    @property
    def text(self) -> str:
        return self.stream.text if self.stream else ""


class Engine:
    """Runs requests on an executor's ranks. One thread calls it.

    Where the executor gains by it, a step is submitted before the tokens of the one before it are known
    (DESIGN section 4), so that there are two under way.
    """

    def __init__(self, executor: Executor) -> None:
        worker = executor.worker
        self.executor = executor
        self.config = worker.config
        self.model_config = worker.model_config
        self.trace = worker.trace
        self.scheduler = Scheduler(
            BlockAllocator(worker.num_pages, PAGE_SIZE, secrets.token_bytes(32)),
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_model_len=self.model_config.max_model_len,
            eos_token_ids=self.model_config.eos_token_ids,
            **self._selecting(worker.selector),
        )
        self._path = worker.path
        self.grammars = Grammars(worker.path, self.model_config.vocab_size, self.model_config.eos_token_ids)
        self._ids = count()
        self._seeds = count()
        self._sequences: dict[int, _Sequence] = {}
        self._under_way: deque[Step] = deque()

    @staticmethod
    def _selecting(selector: Selector | None) -> dict[str, Any]:
        """What the scheduler must know of it."""
        if selector is None:
            return {}

        def shape(request: Request, end: int) -> bytes:
            budget = selector.budgets.resolved(request.params.selector_budget)
            prompt, align = request.prompt_token_ids, selector.row_align
            found = selector.shape(len(prompt), end, budget)
            if not found or align == 1:
                return found
            # A chunk's rows choose together: tokens behind a page shape it too.
            chunk = (end - 1) // align * align
            return found + np.array(prompt[chunk : chunk + align], np.int64).tobytes()

        return {"row_align": selector.row_align, "shape": shape, "publishes": selector.publishes}

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """Loaded when first needed; None when the model has none and takes token ids only."""
        return load_tokenizer(self._path)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. `ValueError` where the model has no tokenizer, or no room for it."""
        return self._required_tokenizer().encode(text, self.model_config.max_model_len)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        text = self._required_tokenizer().render_chat(messages, tools)
        # The template writes the special tokens itself.
        return self._required_tokenizer().encode(text, self.model_config.max_model_len, special=False)

    def _required_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self._path} has no tokenizer ({', '.join(FILES)}): give prompts as token ids")
        return self.tokenizer

    def compile(self, json_schema: str) -> Grammar:
        """The grammar of a JSON schema. Any thread may call it; it takes seconds where it has to start.

        Raises:
            ValueError: naming json_schema, when there can be none; Busy when there may be one later.
        """
        self._required_tokenizer()
        return self.grammars.compile(json_schema)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        salt: bytes = b"",
        priority: int = 0,
        seed: int | None = None,
        grammar: Grammar | None = None,
    ) -> list[int]:
        """Queues a prompt; returns the ids of its `params.n` sequences.

        salt: prefix pages are shared with prompts of the same salt only. priority: lower comes first. seed:
        where `params` names none; None: the engine's next one. grammar: of `params.json_schema`; None: it is
        compiled now.

        Raises:
            ValueError: when it can never be served; nothing is queued then.
        """
        if selector := self.executor.worker.selector:
            selector.budgets.resolved(params.selector_budget)
            reach = self.model_config.rope.max_positions
            if params.selector_budget == 0 and self.model_config.max_model_len > reach:
                raise ValueError(
                    f"selector_budget=0: with max_model_len above the {reach} positions that this model's "
                    "rotary embedding reaches, no request may read all; leave it out"
                )
        elif params.selector_budget:
            raise ValueError(
                f"selector_budget={params.selector_budget} without a selector: every token is read"
            )
        fallback = mix_seed(self.config.seed, next(self._seeds)) if seed is None else seed
        vocab_size = self.model_config.vocab_size
        ids = [next(self._ids) for _ in range(params.n)]
        requests = make_requests(ids[0], prompt_token_ids, params, vocab_size, fallback, salt, priority)
        streams = [self._stream(request) for request in requests]
        if grammar is None and params.json_schema is not None:
            grammar = self.compile(params.json_schema)
        for request, stream in zip(requests, streams, strict=True):
            self.scheduler.add(request)
            if grammar is not None:
                request.constraint = grammar.begin(params.ignore_eos)
            self._sequences[request.id] = _Sequence(request, stream)
        return ids

    def abort(self, request_id: int) -> None:
        """Ends a sequence, if it has not ended by itself, and forgets it."""
        self.scheduler.abort(request_id)
        self._sequences.pop(request_id, None)

    def take(self, request_id: int) -> _Sequence:
        """A finished sequence, which the engine forgets."""
        return self._sequences.pop(request_id)

    def step(self) -> list[Update]:
        """Lets the ranks do one step; returns what came of it, or of one before it."""
        ended = [(request, list[int]()) for request in self.scheduler.constrain()]
        step = self.scheduler.schedule()
        if step is not None:
            plan = self.executor.worker.weaver.plan(step.num_computed, step.num_query, step.num_prompt_tokens)
            step.cut, step.seam_ctas, step.why = plan.cut, plan.seam_ctas, plan.why
            self.executor.submit(step)
            self._under_way.append(step)
        events: list[tuple[Request, list[int]]] = []
        if self._under_way and (step is None or len(self._under_way) > self.executor.ahead):
            output = self.executor.collect()
            events = self.scheduler.update(self._under_way.popleft(), output)
        return [
            self._update(self._sequences[request.id], tokens)
            for request, tokens in ended + events
            if request.id in self._sequences
        ]

    def record_step(self) -> tuple[list[Update], list[Span]]:
        """A step, and what rank 0 did in it when; no spans where all steps are traced into a file."""
        worker = self.executor.worker
        if self.config.trace is not None:
            return self.step(), []
        worker.weaver.recorder = recorder = Recorder(worker.ranks.device)
        updates = self.step()
        worker.weaver.recorder = None
        return updates, [span for spans in recorder.read() for span in spans]

    def close(self) -> None:
        """Ends the ranks; may be called again."""
        self.grammars.close()
        self.executor.close()

    def _stream(self, request: Request) -> TextStream | None:
        stop: tuple[str, ...] = request.params.stop  # type: ignore[assignment]
        if self.tokenizer is None:
            if stop:
                raise ValueError("stop strings need a tokenizer, which this model does not have")
            return None
        return TextStream(self.tokenizer.backend, request.prompt_token_ids, stop)

    def _update(self, sequence: _Sequence, tokens: list[int]) -> Update:
        request, stream = sequence.request, sequence.stream
        finished = request.finish_reason is not None
        if stream is None:
            return Update(request, tokens, "", finished)
        before = len(stream.text)
        for at, token in enumerate(tokens):
            # A token that itself ended the request is not text.
            if finished and token in request.stop_ids and at == len(tokens) - 1:
                continue
            num_output = len(request.output_token_ids) - len(tokens) + at + 1
            if stop := stream.add(token, num_output >= request.params.min_tokens):
                self.scheduler.finish(request, "stop", stop)
                # A limit may have ended it with the token that completes the string.
                request.finish_reason, request.stop_reason = "stop", stop
                finished = True
                break
        if finished:
            stream.end()
        return Update(request, tokens, stream.text[before:], finished)
