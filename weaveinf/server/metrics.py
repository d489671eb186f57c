"""What Prometheus reads: requests as they went, and what the runtime did."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from weaveinf import __version__
from weaveinf.engine.request import Request
from weaveinf.weave.timeline import Span, hidden_seams

if TYPE_CHECKING:
    from weaveinf.server.async_engine import AsyncEngine, Job

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """One registry. `came`, `aborted` and `sampled` are called by the engine's thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"weaveinf_{name}", what, labels, buckets=buckets, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"weaveinf_{name}", what, labels, registry=registry)

        self.first = histogram("time_to_first_token_seconds", "From a request's arrival.", _LONG)
        self.gap = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _SHORT)
        self.per_token = histogram("time_per_output_token_seconds", "Mean of one, but the first.", _SHORT)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.queued = histogram("request_queue_seconds", "Before a sequence was started.", _LONG)
        self.prefill = histogram("request_prefill_seconds", "From its start to its first token.", _LONG)
        self.decode = histogram("request_decode_seconds", "From its first token to its last.", _LONG)
        self.prompts = histogram("request_prompt_tokens", "Of a finished sequence.", _TOKENS)
        self.answers = histogram("request_generation_tokens", "Of a finished sequence.", _TOKENS)
        self.steps = histogram("step_seconds", "Of the engine's steps.", _SHORT, "phase")
        self.rows = histogram("iteration_tokens", "Rows of the engine's steps.", _TOKENS, "phase")
        self.prompt_tokens = counter("prompt_tokens", "Of sequences that got their first token.")
        self.generation_tokens = counter("generation_tokens", "Sampled.")
        self.success = counter("request_success", "Sequences that ended.", "finished_reason")
        self.rejected = counter("request_rejected", "Requests that were refused.", "reason")
        self.communication = counter(
            "collective_seconds", "Of seams, in the steps that were recorded.", "op", "overlapped"
        )
        for reason in ("stop", "length", "abort"):
            self.success.labels(reason)
        self.rejected.labels("queue_full")
        self.recent = {name: deque[float](maxlen=512) for name in ("first", "gap", "whole")}
        """The latest values of three of them, for the status page."""
        self.num_tokens = {"prompt": 0, "generation": 0}
        self._times: dict[int, tuple[float, float]] = {}  # first and latest token of running sequences

    def came(self, job: Job, request: Request, tokens: int) -> None:
        """A sequence got tokens."""
        now = time.monotonic()
        first, last = self._times.get(request.id, (0.0, 0.0))
        if not first:
            first = now
            self._note("first", now - job.came)
            self.queued.observe(max(0.0, request.started - job.came))
            self.prefill.observe(now - request.started)
            self.prompt_tokens.inc(len(request.prompt_token_ids))
            self.num_tokens["prompt"] += len(request.prompt_token_ids)
        else:
            self._note("gap", now - last)
        self._times[request.id] = first, now
        self.generation_tokens.inc(tokens)
        self.num_tokens["generation"] += tokens
        if request.finish_reason is not None:
            del self._times[request.id]
            count = len(request.output_token_ids)
            self._note("whole", now - job.came)
            self.decode.observe(now - first)
            self.prompts.observe(len(request.prompt_token_ids))
            self.answers.observe(count)
            if count > 1:
                self.per_token.observe((now - first) / (count - 1))
            self.success.labels(request.finish_reason).inc()

    def _note(self, name: str, seconds: float) -> None:
        getattr(self, name).observe(seconds)
        self.recent[name].append(seconds)

    def stepped(self, phase: str, seconds: float, rows: int) -> None:
        """The engine has done a step."""
        self.steps.labels(phase).observe(seconds)
        self.rows.labels(phase).observe(rows)

    def aborted(self, ids: Iterable[int]) -> None:
        """Sequences ended because their client left, or their time was up."""
        for id_ in ids:
            self._times.pop(id_, None)
            self.success.labels("abort").inc()

    def restarted(self) -> None:
        """The engine is gone; another one numbers its sequences anew."""
        self._times.clear()

    def sampled(self, spans: list[Span]) -> None:
        """A step was recorded."""
        seams, under = hidden_seams(spans)
        self.communication.labels("seam", "yes").inc(under)
        self.communication.labels("seam", "no").inc(seams - under)


class EngineCollector:
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        at = self._engine
        yield _counter("engine_restarts", "Times the ranks were started anew.", at.num_restarts)
        if (engine := at.at_work) is None:
            return
        scheduler, trace, config = engine.scheduler, engine.trace, at.config
        worker, blocks = engine.executor.worker, engine.scheduler.blocks
        info = {
            "model_name": self._model,
            "tp": str(worker.ranks.size),
            "dtype": str(worker.dtype).removeprefix("torch."),
            "version": __version__,
            "overlap": config.weave,
            "seam": worker.seam.name,
            "selector": trace.selector or "none",
        }
        yield InfoMetricFamily("weaveinf_engine", "What runs.", info)
        label = {"model_name": self._model}
        yield _gauge("num_requests_running", "Sequences that have a place.", scheduler.num_running, label)
        yield _gauge("num_requests_waiting", "Sequences that have none yet.", scheduler.num_waiting, label)
        usage = 1 - blocks.num_free / blocks.num_blocks
        yield _gauge("kv_cache_usage_ratio", "Pages of the cache that are held.", usage)
        queried, hit = scheduler.num_prefix_queried, scheduler.num_prefix_hit
        yield _counter("prefix_cache_queries", "Tokens of sequences that were started.", queried)
        yield _counter("prefix_cache_hits", "Of them, those found in the cache.", hit)
        yield _counter("num_preemptions", "Sequences that gave up their place.", scheduler.num_preemptions)
        how = {how: trace.steps[how] for how in ("woven", "fused", "plain")}
        yield _counters("steps", "By how they ran.", "how", how)
        why = {reason: count for reason, count in list(trace.reasons.items()) if reason}
        yield _counters("overlap_fallback", "Steps that were not woven.", "reason", why)
        yield _counters("selector_choices", "What the selector counts.", "what", dict(trace.choices))


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"weaveinf_{name}", what, value)


def _counters(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"weaveinf_{name}", what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(name: str, what: str, value: float, labels: dict[str, Any] | None = None) -> Metric:
    family = GaugeMetricFamily(f"weaveinf_{name}", what, labels=list(labels or ()))
    family.add_metric([*(labels or {}).values()], value)
    return family


def together(pages: Mapping[str, str]) -> bytes:
    """One page of the pages of several engines, whose names become a label."""
    families: dict[str, Metric] = {}
    for engine, page in pages.items():
        for family in text_string_to_metric_families(page):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, sample.labels | {"engine": engine}, sample.value)
    return generate_latest(SimpleNamespace(collect=families.values))
