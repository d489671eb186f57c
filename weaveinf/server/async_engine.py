"""The engine behind an event loop: one thread steps it, and starts its ranks anew when they die."""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from weaveinf.cluster.launch import launch
from weaveinf.cluster.supervise import STUCK_S
from weaveinf.comm.errors import RankDied
from weaveinf.config import EngineConfig
from weaveinf.engine.engine import Engine, Update
from weaveinf.engine.request import SamplingParams, TokenLogprob, mix_seed
from weaveinf.engine.structured import Grammar
from weaveinf.server.config import ServerConfig
from weaveinf.server.errors import ApiError
from weaveinf.weave.timeline import Span

if TYPE_CHECKING:
    from weaveinf.server.metrics import Metrics

log = logging.getLogger("weaveinf")

IDLE_S = 0.5
"""An idle engine shows at this pace that it lives."""
SAMPLE_S = 2.0
"""At this pace a step is recorded, for the status page and the share of communication that is hidden."""

CLOSING_S = 15.0
"""So long the end of the ranks is waited for, when they cannot be reached while they load, say."""


class Piece(NamedTuple):
    """What came of one sample since its last piece; all of it where the request does not stream.

    sample: its number, counted through all prompts of its job.
    """

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(eq=False)
class Job:
    """What one HTTP request wants of the engine: `params.n` samples of each prompt.

    timeout_s: after which it is given up. What follows it is the engine's to change.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    stream: bool = False
    salt: bytes = b""
    priority: int = 0
    timeout_s: float = 600.0
    grammar: Grammar | None = None
    """Of `params.json_schema`."""

    left: int = 0
    """Samples that have not ended."""
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    prompt_logprobs: dict[int, list[TokenLogprob | None]] = field(default_factory=dict)
    """By prompt, where they were asked for, as soon as they are there."""
    num_cached: int = 0
    num_answered: int = 0
    """Tokens, of the prompts and of the answers."""
    error: Exception | None = None
    waiting: asyncio.Future[None] | None = None
    """Of whoever waits for `ready`."""
    push: Callable[[Piece], bool] | None = None
    """Sends a piece at once, past its client's task; False where it has to wait for that. None: all have to.
    The last of a sample, with its finish reason, is never given to it."""
    begun: int = 0
    shown: bool = False
    """Whether its client has got something of it, so that it cannot be begun again."""
    ended: bool = False
    came: float = field(default_factory=time.monotonic)

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def ready(self) -> bool:
        """Whether there is something for its client."""
        enough = 1 if self.stream else self.num_samples
        return len(self.pieces) >= enough or self.error is not None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done() and self.ready:
            self.waiting.set_result(None)


class AsyncEngine:
    """An engine for coroutines of one event loop.

    `state`: "loading", "ready", "restarting" (its ranks died and come anew; what no client has seen anything
    of is then begun again), "draining", or "dead" (for good; `failure` says why).
    """

    def __init__(self, config: EngineConfig, server: ServerConfig, metrics: Metrics) -> None:
        self.config = config
        self.server = server
        self.metrics = metrics
        self.state = "loading"
        self.failure: Exception | None = None
        self.num_restarts = 0
        self.timeline: list[Span] = []
        """Of the latest recorded step that was woven, or of any while there was none."""
        self.at_work: Engine | None = None
        """The engine, if there is one now."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: queue.SimpleQueue[tuple[Callable[[Engine, Job], None], Job]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()  # of the event loop
        self._running: dict[int, tuple[Job, int]] = {}  # of the engine's thread: sequences, their prompts
        self._held: list[tuple[Job, Piece]] = []  # of the latest step, until the ranks have the next one
        self._seeds = count()
        self._closing = threading.Event()
        self._turned = self._sampled = time.monotonic()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    # The event loop's side.

    async def start(self) -> None:
        """Loads. Raises what `launch` and `Engine` raise."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        while self.state == "loading":
            await self._change()
        if self.failure is not None:
            raise self.failure

    @property
    def engine(self) -> Engine:
        """The one at work. ApiError (503) while there is none, or nothing new is taken."""
        if self.at_work is None or self.state not in ("ready", "draining"):
            raise ApiError(503, f"the engine is {self.state}; come again", retry_after=5)
        return self.at_work

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return sum(job.left for job in self._jobs)

    def silent(self) -> str | None:
        """Which rank or thread has shown no sign of life for too long; None while all is well."""
        if self.state not in ("ready", "draining") or self.at_work is None:
            return f"the engine is {self.state}"
        if not self._thread.is_alive() or time.monotonic() - self._turned > STUCK_S:
            return "the engine's thread stands still"
        return self.at_work.executor.silent()

    async def run(self, job: Job) -> AsyncGenerator[list[Piece]]:
        """Runs a job and yields its pieces as they come, unless they are pushed; a sample's last never is.

        Leaving early aborts it. ValueError when it can never be served. ApiError: 429 when too many wait,
        503 when nothing is taken or its ranks died, 504 when its time is up.
        """
        if self.state == "draining":
            raise ApiError(503, "the server is shutting down", retry_after=5)
        limit = self.engine.config.max_num_seqs + self.server.max_waiting
        if job.num_samples > limit:
            raise ValueError(f"n: {job.num_samples} sequences are more than the {limit} that may run or wait")
        if self.num_open + job.num_samples > limit:
            self.metrics.rejected.labels("queue_full").inc()
            raise ApiError(429, f"{limit} sequences at most run or wait; come again later", retry_after=1)
        job.seed = mix_seed(self.config.seed, next(self._seeds))  # begun again, it draws the same
        job.left = job.num_samples
        self._jobs.add(job)
        self._calls.put((self._begin, job))
        late = ApiError(504, "the request's time is up before its answer was whole")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(job.timeout_s, self._give_up, job, late)
        try:
            while job.left:
                while not job.ready:  # what woke it may be gone again: see `_rescue`
                    job.waiting = loop.create_future()
                    await job.waiting
                if job.error is not None:
                    raise job.error
                pieces, job.pieces = job.pieces, []
                job.left -= sum(piece.finish_reason is not None for piece in pieces)
                job.shown = True
                yield pieces
        finally:
            timer.cancel()
            self._jobs.discard(job)
            job.ended, job.push = True, None
            if job.left:
                self._calls.put((self._abort, job))

    async def drain(self) -> None:
        """Takes nothing new and waits until what runs has ended, `drain_s` at most; ends the rest."""
        if self.state != "dead":
            self.state = "draining"
        deadline = time.monotonic() + self.server.drain_s
        while self._jobs and self.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.stop()

    def stop(self) -> None:
        """Ends what runs, at once."""
        for job in self._jobs:
            job.fail(ApiError(503, "the server has shut down"))

    def _give_up(self, job: Job, error: Exception) -> None:
        """Ends it at once, however long its client takes to hear of it."""
        self._jobs.discard(job)
        job.ended = True
        job.fail(error)
        self._calls.put((self._abort, job))

    def close(self) -> None:
        """Ends the ranks."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSING_S)

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def died(self) -> Exception:
        """Waits until the engine is dead; why it is."""
        while self.failure is None:
            await self._change()
        return self.failure

    def _rescue(self, error: Exception) -> None:
        """Queues again what nobody has seen anything of, once; ends the rest."""
        words = str(error) if isinstance(error, RankDied) else "it has failed"
        for job in sorted(self._jobs, key=lambda job: job.ids):
            if job.ids and (job.shown or job.begun > 1):
                self.metrics.success.labels("abort").inc(job.left)
                job.fail(ApiError(503, f"the engine stopped: {words}"))
            elif job.ids:  # those without are queued
                job.pieces, job.ids = [], []
                self._calls.put((self._begin, job))

    def _bury(self) -> None:
        for job in self._jobs:
            job.fail(ApiError(503, "the engine has failed"))

    # The engine's thread.

    def _live(self) -> None:
        while not self._closing.is_set():
            engine = None
            try:
                engine = self._start_ranks()
                self._say("ready")
                self._serve(engine)
            except BaseException as error:  # SystemExit too: of a torchrun rank that follows
                # What cannot start at all is said once, by who waits for it.
                again = engine is not None or (
                    self.num_restarts > 0 and isinstance(error, RuntimeError | OSError)
                )
                self.at_work = None
                if again:
                    log.error("the engine has failed: %s", error)
                if engine is not None:
                    with suppress(Exception):
                        engine.close()
                if not again or self.num_restarts == self.server.max_restarts or self.state == "draining":
                    self._die(error)
                    return
                self.num_restarts += 1
                self._running.clear()
                self._held.clear()
                self.metrics.restarted()
                self._say("restarting")
                # Without what the error went through, so that there is room for the next.
                self._tell(self._rescue, error.with_traceback(None))
        if self.at_work is not None:
            self.at_work.close()

    def _start_ranks(self) -> Engine:
        gc.unfreeze()
        gc.collect()  # whatever an engine before this one left
        engine = Engine(launch(self.config))
        _ = engine.tokenizer  # loaded here, so that no coroutine waits for it
        engine.trace.on_step = self.metrics.stepped
        engine.executor.on_sent = self._hand_over
        self.at_work = engine
        # What is there stays: to look through it all takes a tenth of a second in some step, and a sixth of
        # what streaming a token takes.
        gc.freeze()
        return engine

    def _say(self, state: str) -> None:
        if self.state != "draining":
            self.state = state
        self._tell(self._changed.set)

    def _die(self, error: BaseException) -> None:
        self.failure = error if isinstance(error, Exception) else RuntimeError(f"it has ended: {error}")
        self.state = "dead"
        self._tell(self._bury)
        self._say("dead")

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call, *args)

    def _serve(self, engine: Engine) -> None:
        while not self._closing.is_set():
            self._turned = time.monotonic()
            with suppress(queue.Empty):
                call, job = self._calls.get(not engine.scheduler.has_work, IDLE_S)
                while True:
                    call(engine, job)
                    call, job = self._calls.get_nowait()
            if (failure := engine.executor.failure) is not None:
                raise failure  # it died while nothing ran
            came = self._step(engine)
            self._hand_over()  # where that sent no step
            self._held = came
            if not engine.scheduler.has_work:
                self._hand_over()

    def _hand_over(self) -> None:
        if self._held:
            self._tell(self._deliver, self._held)
            self._held = []

    def _step(self, engine: Engine) -> list[tuple[Job, Piece]]:
        if self._turned - self._sampled > SAMPLE_S and engine.scheduler.has_work:
            self._sampled = self._turned
            updates, spans = engine.record_step()
            self._keep(spans)
        else:
            updates = engine.step()
        return [found for update in updates if (found := self._piece(engine, update)) is not None]

    def _keep(self, spans: list[Span]) -> None:
        woven = any(span.half for span in spans)
        if spans and (woven or not any(span.half for span in self.timeline)):
            self.timeline = spans
        self.metrics.sampled(spans)

    def _piece(self, engine: Engine, update: Update) -> tuple[Job, Piece] | None:
        request = update.request
        job, prompt = self._running[request.id]
        self.metrics.came(job, request, len(update.token_ids))
        if request.index == 0 and len(request.output_token_ids) == len(update.token_ids):  # its first
            job.num_cached += request.num_cached
            if request.prompt_logprobs is not None:
                job.prompt_logprobs[prompt] = request.prompt_logprobs
        text, tokens, logprobs = update.text, update.token_ids, request.logprobs or []
        if update.finished:
            del self._running[request.id]
            done = engine.take(request.id)
            if not job.stream:
                text, tokens = done.text, request.output_token_ids
        if not (job.stream or update.finished):
            return None
        logprobs = logprobs[len(logprobs) - len(tokens) :] if logprobs else []
        index = prompt * job.params.n + request.index
        return job, Piece(index, text, tokens, logprobs, request.finish_reason, request.stop_reason)

    def _deliver(self, updates: list[tuple[Job, Piece]]) -> None:
        for job, piece in updates:
            push = None if job.pieces or piece.finish_reason is not None else job.push
            if push is None or not push(piece):
                job.pieces.append(piece)
                job.wake()

    def _begin(self, engine: Engine, job: Job) -> None:
        if job.ended:  # its client left while it waited here
            self.metrics.success.labels("abort").inc(job.num_samples)
            return
        job.begun, job.num_cached, job.ids = job.begun + 1, 0, []
        for i, prompt in enumerate(job.prompts):
            try:
                ids = engine.add(
                    prompt, job.params, job.salt, job.priority, mix_seed(job.seed, i), job.grammar
                )
            except Exception as error:  # whatever it is, it is this request's alone
                self._abort(engine, job)
                self._tell(job.fail, error)
                return
            job.ids += ids
            self._running |= dict.fromkeys(ids, (job, i))

    def _abort(self, engine: Engine, job: Job) -> None:
        # Another engine than the one it was begun by may have given a number to another job.
        ids = [id_ for id_ in job.ids if self._running.get(id_, (None,))[0] is job]
        self.metrics.aborted(ids)
        for id_ in ids:
            del self._running[id_]
            engine.abort(id_)
