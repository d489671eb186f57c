"""What is told of requests: metrics under the names that dashboards know, and spans."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.server.harness import MODEL, Server, until

NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_ratio prefix_cache_queries_total
prefix_cache_hits_total
prompt_tokens_total generation_tokens_total request_success_total request_rejected_total num_preemptions_total
iteration_tokens_bucket time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket request_queue_seconds_bucket
request_prefill_seconds_bucket request_decode_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket engine_info collective_seconds_total overlap_fallback_total steps_total
step_seconds_bucket engine_restarts_total
"""


def test_the_names_and_what_they_count(server: Server) -> None:
    server.idle()
    names = ["prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count"]
    names += ["inter_token_latency_seconds_count", "prefix_cache_hits_total"]
    before = {name: server.metric(f"weaveinf_{name}") for name in names}
    prompt = "a prompt that is asked for twice, so that the second time its first pages are found again"
    usage = [server.complete(prompt, max_tokens=5, ignore_eos=True)["usage"] for _ in range(2)]
    server.idle()
    grown = {name: server.metric(f"weaveinf_{name}") - before[name] for name in names}
    assert grown == {
        "prompt_tokens_total": 2 * usage[0]["prompt_tokens"],
        "generation_tokens_total": 10,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "prefix_cache_hits_total": usage[1]["prompt_tokens_details"]["cached_tokens"],
    }
    assert grown["prefix_cache_hits_total"] > 0
    page = server.client.get("/metrics").text
    found = set(re.findall(r"^(weaveinf_\w+)", page, re.M))
    assert {f"weaveinf_{name}" for name in NAMES.split()} <= found
    assert f'model_name="{MODEL}"' in page and 'tp="2"' in page


def test_the_status_page_has_its_numbers(server: Server) -> None:
    server.complete("a", max_tokens=8)
    found = server.client.get("/status").json()
    assert found["model"] == MODEL and found["state"] == "ready" and found["tp"] == 2
    assert found["running"] == found["waiting"] == 0
    for name in ("first", "gap", "whole"):
        median, ninety, most = found["latency_ms"][name]
        assert 0 < median <= ninety <= most
    until(lambda: bool(server.complete("a") and server.client.get("/status").json()["timeline"]))
    spans = server.client.get("/status").json()["timeline"]
    assert {span["kind"] for span in spans} >= {"block", "seam"}
    assert all(0 <= span["start"] <= span["end"] for span in spans)
    assert "<title>weaveinf" in server.client.get("/").text


def test_spans_go_to_a_collector() -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            got.append(message)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    trace = "0af7651916cd43dd8448eb211c80319c"
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with Server("--otlp-endpoint", endpoint, tp=1, OTEL_BSP_SCHEDULE_DELAY="100") as server:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
        assert server.client.post("/v1/completions", json=body, headers=headers).status_code == 200
        found: list[Span] = []

        def came() -> bool:
            scopes = (scope for message in got for of in message.resource_spans for scope in of.scope_spans)
            found[:] = [span for scope in scopes for span in scope.spans if span.trace_id.hex() == trace]
            return bool(found)

        until(came)
    attributes = {pair.key: pair.value for pair in found[0].attributes}
    assert attributes["weaveinf.output_tokens"].int_value == 3
    assert attributes["weaveinf.path"].string_value == "/v1/completions"
    collector.shutdown()
