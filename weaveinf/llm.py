"""The offline API: a model, its ranks and its engine behind one object."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from tqdm import tqdm

from weaveinf.cluster.launch import launch
from weaveinf.config import EngineConfig
from weaveinf.engine.engine import Engine, Update
from weaveinf.engine.request import CompletionOutput, RequestOutput, SamplingParams
from weaveinf.selectors.registry import settings as selector_settings

Prompt = str | Sequence[int]


class LLM:
    """A language model, ready to generate.

    Starts `tensor_parallel_size` ranks, of which the calling process is the first, and ends them with
    `close()`, at the end of a `with` block or of the process. Under torchrun the ranks are torchrun's:
    rank 0 returns from the constructor, the others serve it and exit. Steps run in the threads that ask
    for them, which may share one object; a thread may run several streams at a time: they are served
    together. While it is open, torch has in this process the cores that are its rank's share.

    Args:
        model: a directory in the Hugging Face layout, or a hub id.
        settings: any other field of `EngineConfig`, which describes them.

    Raises:
        ValueError: for settings or a checkpoint that cannot work, saying what to do.
        RankDied: when a rank ends before it is ready.
    """

    def __init__(self, model: str, *, show_progress: bool = True, **settings: Any) -> None:
        unknown = set(settings) - set(EngineConfig.__dataclass_fields__)
        if unknown:
            known = ", ".join(sorted(EngineConfig.__dataclass_fields__))
            raise ValueError(f"unknown setting {min(unknown)!r}; there are: {known}")
        self.config = EngineConfig(model=str(model), **settings)
        if self.config.selector is not None:
            selector_settings(self.config.selector)  # better refused before ranks are started
        self._lock = threading.RLock()  # a signal's handler may close it in the midst of a step
        self._inboxes: dict[int, deque[Update]] = {}
        executor = launch(self.config, _LoadingBar() if show_progress else None)
        try:
            self.engine = Engine(executor)
        except BaseException:
            executor.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs come in the prompts' order.

        Args:
            prompts: text, token ids, or a list of either.
            params: one for all prompts or one for each; None: `SamplingParams()`.

        Raises:
            ValueError: when a prompt cannot be served (empty, too long, ids outside the vocabulary),
                naming it, before any is started.
            RankDied: when a rank ends; this object is closed then.
        """
        answers = self._add(prompts, params)
        with tqdm(
            total=sum(len(answer.ids) for answer in answers),
            desc="generating",
            unit="seq",
            disable=not show_progress or len(answers) < 8,
        ) as bar:
            for update in self._run(answers):
                bar.update(update.finished)
        return [answer.output(self.engine) for answer in answers]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Like `generate`, but yields (index of the prompt, text that came next) as it comes.

        The pieces of one prompt, joined, are its text. With `n` above 1 only the first sample is
        shown. Leaving the loop early aborts what is still running. RuntimeError when the model's
        logits leave no token to choose.
        """
        answers = self._add(prompts, params)
        index = {answer.ids[0]: i for i, answer in enumerate(answers)}
        for update in self._run(answers):
            if update.text and update.request.id in index:
                yield index[update.request.id], update.text
        for output in [answer.output(self.engine) for answer in answers]:
            if output.finish_reason == "abort":
                raise RuntimeError(f"an answer was aborted: {output.stop_reason}")

    def chat(self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None) -> Iterator[str]:
        """Answers a conversation, in the model's own chat template, piece by piece.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
        """
        for _, text in self.stream([self.engine.render_chat(messages)], params):
            yield text

    def close(self) -> None:
        """Ends the ranks, after the step that a thread may be running. May be called again."""
        with self._lock:
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Answer]:
        batch = _as_batch(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise ValueError(f"{len(batch)} prompts but {len(params)} params: give one, or one each")
        if not all(isinstance(own, SamplingParams) for own in params):
            raise ValueError("params must be SamplingParams, one for all prompts or one for each")
        answers: list[_Answer] = []
        for schema in {own.json_schema for own in params}:
            if schema is not None:
                self.engine.compile(schema)  # without the lock: others' steps go on
        with self._lock:
            try:
                for prompt, own in zip(batch, params, strict=True):
                    text = prompt if isinstance(prompt, str) else None
                    ids = self.engine.encode(prompt) if isinstance(prompt, str) else prompt
                    answers.append(_Answer(text, self.engine.add(ids, own)))
            except BaseException as error:
                self._abort(answers)
                if isinstance(error, ValueError) and len(batch) > 1:
                    raise ValueError(f"prompt {len(answers)}: {error}") from None
                raise
        return answers

    def _run(self, answers: Sequence[_Answer]) -> Iterator[Update]:
        waiting = {id_ for answer in answers for id_ in answer.ids}
        inbox: deque[Update] = deque()
        self._inboxes |= dict.fromkeys(waiting, inbox)
        try:
            while waiting:
                if not inbox:
                    self._step(inbox)
                while inbox:
                    update = inbox.popleft()
                    if update.finished:
                        waiting.discard(update.request.id)
                    yield update
        finally:
            with self._lock:
                for answer in answers:
                    for id_ in answer.ids:
                        self._inboxes.pop(id_, None)
                if waiting:
                    self._abort(answers)

    def _step(self, inbox: deque[Update]) -> None:
        """One step for whoever waits, unless another thread's step has filled this inbox meanwhile."""
        with self._lock:
            if inbox:
                return
            for update in self.engine.step():
                if (owner := self._inboxes.get(update.request.id)) is not None:
                    owner.append(update)

    def _abort(self, answers: Sequence[_Answer]) -> None:
        for answer in answers:
            for id_ in answer.ids:
                self.engine.abort(id_)


class _Answer:
    """The sequences of one prompt."""

    def __init__(self, prompt: str | None, ids: list[int]) -> None:
        self.prompt = prompt
        self.ids = ids

    def output(self, engine: Engine) -> RequestOutput:
        done = [engine.take(id_) for id_ in self.ids]
        first = done[0].request
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    index=one.request.index,
                    text=one.text,
                    token_ids=list(one.request.output_token_ids),
                    finish_reason=one.request.finish_reason,
                    stop_reason=one.request.stop_reason,
                    logprobs=one.request.logprobs,
                    pruned=one.request.pruned,
                )
                for one in done
            ],
            prompt_logprobs=first.prompt_logprobs,
        )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    batch = list(prompts)
    if batch and isinstance(batch[0], Integral):
        return [batch]  # type: ignore[list-item]
    for i, prompt in enumerate(batch):
        if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
            raise ValueError(f"prompt {i} must be text or a list of token ids, got {prompt!r:.60}")
    return batch  # type: ignore[return-value]


class _LoadingBar:
    """A progress bar over the bytes of rank 0's shard."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc="loading", unit="B", unit_scale=True)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
