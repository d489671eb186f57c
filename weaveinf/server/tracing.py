"""OpenTelemetry: one span a request, with what the log says of it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Traced:
    """ASGI middleware around `Guard` that sends spans to an OTLP collector (http://host:4318/v1/traces).

    A client's `traceparent` header names the parent. ValueError where OpenTelemetry is not installed.
    """

    def __init__(self, app: ASGIApp, endpoint: str) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ValueError("tracing needs OpenTelemetry: pip install 'weaveinf[otel]'") from None
        provider = TracerProvider(resource=Resource.create({"service.name": "weaveinf"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._app = app
        self._parent = propagate.extract
        self._start = provider.get_tracer("weaveinf").start_as_current_span
        self._kind = trace.SpanKind.SERVER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._start("request", context=self._parent(headers), kind=self._kind) as span:
            await self._app(scope, receive, send)
            span.set_attributes({f"weaveinf.{name}": value for name, value in scope["state"]["log"].items()})
