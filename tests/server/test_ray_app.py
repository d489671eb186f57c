"""The application under Ray Serve: two engines on a real cluster of three nodes, and one that leaves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.harness import eventually
from tests.ray_cluster import ray_cluster
from tests.server.harness import DEMO, MODEL
from weaveinf import LLM, SamplingParams

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(3, num_cpus=1) as one:
        yield one


@contextmanager
def serving(**scale: str) -> Iterator[httpx.Client]:
    """The demo's model on the cluster, and a client of it."""
    from weaveinf.server.ray_app import build

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    text = {"model": DEMO, "served_model_name": MODEL, "device": "cpu", "dtype": "float32"}
    text |= {"kv_cache_gib": "0.05", "max_model_len": "512"}
    serve.run(build(text | scale), name=MODEL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as one:
            yield one
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def client(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("the-key\n")
    with serving(min_replicas="2", max_replicas="2", api_key_file=str(keys)) as one:
        one.headers["Authorization"] = "Bearer the-key"
        yield one


def complete(client: httpx.Client, prompt: str, **body: Any) -> httpx.Response:
    given = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True} | body
    return client.post("/v1/completions", json=given)


def engines() -> dict[str, str]:
    """The nodes of the engines that serve, by replica."""
    from ray.serve.context import _get_global_client

    application = _get_global_client().get_serve_details()["applications"][MODEL]
    replicas = application["deployments"]["Replica"]["replicas"]
    return {one["replica_id"]: one["node_id"] for one in replicas if one["state"] == "RUNNING"}


def seen(client: httpx.Client, name: str, **labels: str) -> set[float]:
    """A metric of each engine."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == f"weaveinf_{name}" and labels.items() <= sample.labels.items():
                engine = sample.labels["engine"]
                found[engine] = found.get(engine, 0.0) + sample.value
    assert len(found) == 2
    return {*found.values()}


def test_answers_are_those_of_one_engine(client: httpx.Client) -> None:
    prompts = [f"The number {i} is " for i in range(4)]
    with LLM(DEMO, device="cpu", dtype="float32", max_model_len=512, kv_cache_gib=0.05) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        expected = [out.text for out in llm.generate(prompts, params, show_progress=False)]
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda prompt: complete(client, prompt), prompts)]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == expected
    given = {"prompt": prompts[0], "temperature": 0, "max_tokens": 8, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=given) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]" and len(events) > 4
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == expected[0]


def test_refusals_are_the_servers_own(client: httpx.Client) -> None:
    assert complete(client, "x", nonsense=1).json()["error"]["param"] == "nonsense"
    kind = {"content-type": "application/json"}
    for content, status in ((b"{" * 9, 400), (b" " * (5 << 20), 413)):
        assert client.post("/v1/completions", content=content, headers=kind).status_code == status
    assert client.get("/nowhere").status_code == 404


def test_every_route_but_the_probes_needs_the_key(client: httpx.Client) -> None:
    other = {"Authorization": "Bearer another"}
    for path in ("/metrics", "/status", "/version", "/v1/models", "/openapi.json"):
        assert client.get(path).status_code == 200
        assert client.get(path, headers=other).status_code == 401
    assert client.get("/health", headers=other).status_code == 200


def test_prompts_of_one_beginning_meet_in_one_cache(client: httpx.Client) -> None:
    beginnings = [f"In part {i} " + "of the whole story " * 30 for i in range(8)]
    for beginning in beginnings:
        complete(client, beginning + "one")
    for beginning in beginnings:
        used = complete(client, beginning + "two").json()["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] > 0
    assert 0 not in seen(client, "prompt_tokens_total")


def test_many_of_one_beginning_are_shared(client: httpx.Client) -> None:
    before = seen(client, "prompt_tokens_total")
    with ThreadPoolExecutor(32) as pool:
        answers = [*pool.map(lambda _: complete(client, "Once upon a time", max_tokens=100), range(32))]
    assert {answer.status_code for answer in answers} == {200}
    assert not before & seen(client, "prompt_tokens_total")


def test_a_client_that_leaves_ends_its_request(client: httpx.Client) -> None:
    given = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=given) as answer:
        lines = answer.iter_lines()
        next(lines)
    assert eventually(lambda: seen(client, "request_success_total", finished_reason="abort") == {0, 1})
    assert seen(client, "num_requests_running") == {0}


def test_a_node_leaves_and_the_rest_keep_serving(cluster: Any, client: httpx.Client) -> None:
    before = engines()
    assert len(set(before.values())) == 2
    head = ray.get_runtime_context().get_node_id()
    lost = next(node for node in before.values() if node != head)
    (node,) = [node for node in cluster.worker_nodes if node.node_id == lost]
    cluster.remove_node(node, allow_graceful=False)
    statuses = []

    def healed() -> bool:
        statuses.append(complete(client, f"{len(statuses)} is ").status_code)
        now = engines()
        return len(now) == 2 and lost not in now.values()

    assert eventually(healed)
    assert statuses.count(200) > len(statuses) / 2 and set(statuses) <= {200, 500, 503}, statuses
    assert [complete(client, f"{i} is ").status_code for i in range(8)] == [200] * 8


@pytest.mark.parametrize(
    ("given", "words"),
    [({"colour": 1}, "unknown setting 'colour'"), ({"seed": "-1"}, "seed=-1"), ({"port": "x"}, "integer")],
)
def test_wrong_settings_are_named(given: dict[str, Any], words: str) -> None:
    from weaveinf.server.ray_app import build

    with pytest.raises(ValueError, match=words):
        build({"model": DEMO, **given})


def test_it_is_built_before_a_cluster_is_joined() -> None:
    """As `serve run` does, in a process of its own."""
    line = f"from weaveinf.server.ray_app import build; print(build({{'model': {DEMO!r}}}))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=120)
    assert "Application" in done.stdout, done.stderr


def test_the_file_for_deployment_is_one(cluster: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    from weaveinf.server.ray_app import build

    text = (Path(DEMO).parents[2] / "launch" / "ray_serve.yaml").read_text()
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == f"{build.__module__}:build"
    assert isinstance(build(application.args), serve.Application)
