"""Ranks as Ray actors, on a real cluster: two nodes of two processors each, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import weaveinf
from tests.cluster.harness import cmdline, config, eventually, make_model, tokens
from tests.models.harness import make_checkpoint
from tests.ray_cluster import ray_cluster
from weaveinf import LLM, SamplingParams
from weaveinf.cluster import supervise
from weaveinf.cluster.launch import launch
from weaveinf.comm.errors import RankDied

ray = pytest.importorskip("ray")
from weaveinf.cluster import ray as actors  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_gib": 0.05, "show_progress": False}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    with ray_cluster(2, num_cpus=2) as one:
        yield one


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def actor_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "ray::_Actor" in "".join(cmdline(p))]


def groups() -> list[dict[str, Any]]:
    return [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: Any) -> Iterator[None]:
    yield
    assert eventually(lambda: not actor_processes())
    assert eventually(lambda: not groups())
    assert eventually(lambda: ray.available_resources().get("CPU") == 4)
    assert eventually(
        lambda: not [n for n in os.listdir("/dev/shm") if n.startswith(f"weaveinf-{os.getpid()}")]
    )


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (700, 90, 3)]


@pytest.mark.parametrize("selector", [None, "tokenselect:budget=40,sinks=4,local=20,dense_below=0"])
def test_two_nodes_give_the_answers_of_one_rank(
    tmp_path: Path, selector: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path, "llama", num_hidden_layers=4, max_position_embeddings=1024)
    with LLM(str(tmp_path), selector=selector, **SMALL) as llm:
        expected = [out.token_ids for out in llm.generate(prompts(), GREEDY)]
    with LLM(
        str(tmp_path),
        selector=selector,
        executor="ray",
        placement="spread",
        tensor_parallel_size=2,
        weave="on",
        **SMALL,
    ) as llm:
        (group,) = groups()
        assert len(set(group["bundles_to_node_id"].values())) == 2
        assert group["bundles_to_node_id"][0] == ray.get_runtime_context().get_node_id()
        assert [out.token_ids for out in llm.generate(prompts(), GREEDY)] == expected
        assert llm.engine.trace.steps["woven"] > 0
    assert "token" not in caplog.text  # both nodes ask for one


@pytest.mark.slow
def test_ranks_of_a_node_are_neighbours(model: Path) -> None:
    settings = replace(config(model, 4), executor="ray", placement="spread")
    host = actors.connect()
    placed = actors.Actors(settings, host, 0)
    try:
        nodes = [placed._places[rank][1].node for rank in placed.ranks]
        here = ray.get_runtime_context().get_node_id()
        assert nodes[0] == here != nodes[1] == nodes[2]
        assert not placed.ended(1)
    finally:
        placed.signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_node_is_filled_first_and_the_store_is_private(model: Path) -> None:
    cluster = launch(replace(config(model, 2), executor="ray"))
    assert set(groups()[0]["bundles_to_node_id"].values()) == {ray.get_runtime_context().get_node_id()}
    assert len(tokens(cluster, 0, 3)) == 3
    store = cluster._driver._store
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert [a.ip for a in listening if a.port == store.port] == [ray.util.get_node_ip_address()]  # type: ignore[union-attr]
    cluster.close()
    assert not [p for p in actor_processes() if "run" in "".join(cmdline(p))]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"its actor on [\d.]+ is gone: [^\n]*worker process has died[^\n]*"),
        (signal.SIGSTOP, "no sign of life for 4 s; it hangs or is stopped"),
    ],
)
@pytest.mark.slow
def test_an_actor_that_ends_or_hangs_ends_all(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, words: str
) -> None:
    monkeypatch.setattr(supervise, "LOST_S", 4.0)
    cluster = launch(replace(config(model, 2), executor="ray", placement="spread"))
    tokens(cluster, 0, 3)
    (rank,) = actor_processes()
    rank.send_signal(number)
    assert eventually(lambda: cluster.failure)  # known without a step
    with pytest.raises(RankDied, match=f"^rank 1 died: {words}$"):
        tokens(cluster, 3, 4)


@pytest.mark.slow
def test_no_place_says_what_there_is(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(actors, "PLACING_S", 6.0)
    words = (
        r"no place for 5 ranks of .*CPU.* within 6 s; free are 2 of 2 CPU and 0 of 0 GPU on [\d.]+; 2 of 2"
    )
    with pytest.raises(TimeoutError, match=words):
        launch(replace(config(model, 5), executor="ray"))
    assert "waiting for Ray to place 5 ranks" in capfd.readouterr().err


@pytest.mark.slow
def test_a_group_that_is_there_is_used(model: Path) -> None:
    def inside() -> tuple[list[int], int]:
        cluster = launch(replace(config(model, 3), executor="ray"))
        try:
            return tokens(cluster, 0, 4), len(groups())
        finally:
            cluster.close()

    alone = launch(config(model, 1))
    expected = tokens(alone, 0, 4)
    alone.close()
    group = ray.util.placement_group([{"CPU": 1}] * 3, "PACK")
    held = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        group, 0, placement_group_capture_child_tasks=True
    )
    try:
        found = ray.get(ray.remote(inside).options(scheduling_strategy=held).remote(), timeout=60)
        assert found == (expected, 1)
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.slow
def test_an_open_cluster_is_told_and_a_forgotten_engine_ends(model: Path) -> None:
    program = f"""
import ray
from dataclasses import replace
from pathlib import Path
from tests.cluster.harness import config, tokens
from weaveinf.cluster import supervise
from weaveinf.cluster.launch import launch
ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
cluster = launch(replace(config(Path({str(model)!r}), 2), executor="ray"))
print("tokens", *tokens(cluster, 0, 3))
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0 and "tokens" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "asks for no token" in line]
    assert "RAY_AUTH_MODE=token" in line


@pytest.mark.slow
def test_a_node_with_another_token_cannot_join(cluster: Any) -> None:
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        f"--address={cluster.address}",
        "--num-cpus=1",
    ]
    environment = {**os.environ, "RAY_AUTH_TOKEN": "w" * 32}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode != 0 and "oken" in done.stdout + done.stderr
    assert len(ray.nodes()) == 2


@pytest.mark.slow
def test_a_data_set_goes_through_a_group(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import ray.data

    from weaveinf.server.ray_data import Generate

    demo = str(Path(weaveinf.__file__).parent / "assets" / "demo")
    texts = [f"The number {i} " for i in range(12)]
    small = {key: value for key, value in SMALL.items() if key != "show_progress"} | {"max_model_len": 128}
    with LLM(demo, **SMALL, max_model_len=128) as llm:
        expected = {text: llm.generate(text, GREEDY)[0] for text in texts}
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = (
        ray.data.from_items([{"prompt": text, "row": i} for i, text in enumerate(texts)])
        .repartition(4)
        .map_batches(
            Generate,
            fn_constructor_args=(demo, GREEDY),
            fn_constructor_kwargs={**small, "tensor_parallel_size": 2},
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_size=3,
            num_cpus=0,
        )
        .take_all()
    )
    assert sorted(row["row"] for row in done) == [*range(12)]
    for row in done:
        one = expected[row["prompt"]]
        assert (row["text"], [*row["token_ids"]], row["finish_reason"]) == (one.text, one.token_ids, "length")
