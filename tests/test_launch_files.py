"""The files of launch/: each passes its tool's own validator, and says only what weaveinf understands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.harness import PATIENCE_S
from tests.server.harness import DEMO, until
from weaveinf.cli import parser
from weaveinf.config import EngineConfig
from weaveinf.server.config import ServerConfig

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FILES = sorted(LAUNCH.iterdir())
BIN = Path(sys.executable).parent
METRIC = re.compile(r"weaveinf_\w+")


def run(tool: str, *arguments: str | Path) -> str:
    """What a validator says that accepts; a test fails with what it says otherwise, or skips without it."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    if (found := shutil.which(tool, path=path)) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_shell(file: Path) -> None:
    assert os.access(file, os.X_OK) or file.suffix == ".sbatch"
    run("bash", "-n", file)
    run("shellcheck", file)


def check_slurm(file: Path) -> None:
    options = re.findall(r"^#{1,2}SBATCH --([a-z-]+)=\S+$", file.read_text(), re.M)
    assert len(options) == file.read_text().count("SBATCH --")
    assert set(options) <= {
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "output"),
        *("gpus-per-node", "signal"),
    }
    # Slurm reads no more of them after the first command.
    assert file.read_text().index("set -e") > file.read_text().rindex("#SBATCH")
    check_shell(file)


def check_docker(file: Path) -> None:
    text = file.read_text()
    assert "extra-index" not in text and text.count("--index-url") == text.count("pip install")
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.M)
    assert "HEALTHCHECK" in last and "/health'" in last
    assert ("gcc" in last) == (file.name == "cuda.Dockerfile")
    run("hadolint", file)


def check_unit(file: Path) -> None:
    text = file.read_text()
    assert {"DynamicUser=yes", "Restart=on-failure", "KillSignal=SIGTERM"} <= set(text.splitlines())
    drain, stop = re.findall(r"--drain-s (\d+)|TimeoutStopSec=(\d+)", text)
    assert int(stop[1]) > int(drain[0])
    run("systemd-analyze", "security", "--offline=true", "--threshold=20", file)


def check_ray_cluster(file: Path) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load(file.read_text())
    util.validate_config(util.prepare_config(config))
    head, worker = (config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert f"--node-ip-address={config['provider']['head_ip']}" in head
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def check_serve(config: Any) -> None:
    schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema
    schema.model_validate(config)
    (app,) = config["applications"]
    assert app["import_path"] == "weaveinf.server.ray_app:build"
    if schema.model_validate(config).http_options.host not in ("127.0.0.1", "localhost"):
        assert app["args"]["api_key_file"]


def check_kuberay(file: Path) -> None:
    """The operator's own schema is nowhere to be had; its fields here are those of its API reference."""
    service = yaml.safe_load(file.read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    spec = service["spec"]
    assert spec.keys() == {"serveConfigV2", "rayClusterConfig", "excludeHeadPodFromServeSvc"}
    check_serve(yaml.safe_load(spec["serveConfigV2"]))
    cluster = spec["rayClusterConfig"]
    assert cluster.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"}
    sizes = {"groupName", "replicas", "minReplicas", "maxReplicas"}
    assert workers.keys() == head.keys() | sizes
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes = pytest.importorskip("kubernetes_validate")
        kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


def check_prometheus(file: Path) -> None:
    (job,) = yaml.safe_load(file.read_text())["scrape_configs"]
    assert job.keys() == {"job_name", "scrape_interval", "authorization", "static_configs"}
    assert job["authorization"].keys() == {"credentials_file"}


def check_grafana(file: Path) -> None:
    board = json.loads(file.read_text())
    panels, variables = board["panels"], board["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "model_name", "instance"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (at["x"] + dx, at["y"] + dy)
        for at in (panel["gridPos"] for panel in panels)
        for dx in range(at["w"])
        for dy in range(at["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    targets = [target for panel in panels for target in panel["targets"]]
    chosen = [part["datasource"] for part in [*panels, *targets, *variables[1:]]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in chosen)
    promql = pytest.importorskip("promql_parser")
    for target in targets:
        promql.parse(target["expr"].replace("$__rate_interval", "1m"))


def check_readme(file: Path) -> None:
    named = set(re.findall(r"\]\(([\w.]+)\)", file.read_text()))
    assert named == {other.name for other in FILES} - {file.name}


CHECKS: dict[str, Callable[[Path], None]] = {
    ".sh": check_shell,
    ".sbatch": check_slurm,
    ".Dockerfile": check_docker,
    ".service": check_unit,
    "ray_cluster.yaml": check_ray_cluster,
    "ray_serve.yaml": lambda file: check_serve(yaml.safe_load(file.read_text())),
    "rayservice.yaml": check_kuberay,
    "prometheus.yml": check_prometheus,
    "grafana.json": check_grafana,
    "README.md": check_readme,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_validator_accepts(file: Path) -> None:
    CHECKS[file.name if file.name in CHECKS else file.suffix](file)


def test_ray_serve_knows_every_argument() -> None:
    ray_app = pytest.importorskip("weaveinf.server.ray_app")
    service = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    kinds = (EngineConfig, ServerConfig, ray_app.Scale)
    known = {name for kind in kinds for name in kind.__dataclass_fields__}
    (other,) = yaml.safe_load((LAUNCH / "ray_serve.yaml").read_text())["applications"]
    assert app["args"].keys() | other["args"].keys() <= known
    # A pod has room for the ranks of one replica, each of which takes a processor of Ray's.
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["rayStartParams"]["num-cpus"] == str(app["args"]["tensor_parallel_size"])
    assert workers["replicas"] == app["args"]["max_replicas"]


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    # It wants the program to be there.
    unit = tmp_path / "weaveinf.service"
    unit.write_text((LAUNCH / unit.name).read_text().replace("/opt/weaveinf/bin/weaveinf", "/bin/true"))
    assert run("systemd-analyze", "verify", unit) == ""


def commands(file: Path) -> Iterator[str]:
    """Every weaveinf command of a file, in comments and in Docker's JSON form too."""
    text = re.sub(r"\\\n(# *)?", " ", file.read_text())
    for line in text.splitlines():
        if line.startswith("CMD ["):
            yield shlex.join(json.loads(line.removeprefix("CMD ")))
        yield from re.findall(r"(?:weaveinf|weaveinf:\w+) +(serve +\S[^`'#;|]*|--version)", line)


COMMANDS = [(file.name, command.strip()) for file in FILES for command in commands(file)]


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[": ".join(pair) for pair in COMMANDS])
def test_weaveinf_understands(name: str, command: str) -> None:
    words = shlex.split(command.replace('"$@"', "MODEL"))
    if words == ["--version"]:
        return
    args = parser().parse_args(words)
    assert args.host in (None, "127.0.0.1") or args.api_key_file is not None


def test_commands_are_found() -> None:
    started = {file.name for file in FILES if file.suffix in (".sh", ".sbatch", ".service", ".Dockerfile")}
    assert started <= {name for name, _ in COMMANDS}


def test_the_image_is_built_of_what_is_let_in(tmp_path: Path) -> None:
    first, *rules = (ROOT / ".dockerignore").read_text().split("*\n", 1)[1].splitlines()
    allowed = [rule.removeprefix("!") for rule in (first, *rules) if rule.startswith("!")]
    built = shutil.ignore_patterns("_native", "__pycache__")
    for name in allowed:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
        else:
            shutil.copy(ROOT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"CXX": "false"}  # what compiling gives is not of interest
    subprocess.run([*pip, "-w", "out", "."], cwd=tmp_path, env=environment, check=True, timeout=60)
    (wheel,) = (tmp_path / "out").iterdir()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("weaveinf/")}
    tracked = subprocess.check_output(["git", "ls-files", "weaveinf"], cwd=ROOT, text=True)
    assert set(tracked.splitlines()) <= packed


def test_the_lock_has_all_that_the_images_install() -> None:
    """pip takes what a constraint does not name at any version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    named_elsewhere = {"torch", "triton"}
    extras = project["optional-dependencies"]
    wanted = list(map(Requirement, [*project["dependencies"], *extras["ray"], *extras["structured"]]))
    seen = set()
    while wanted:
        requirement = wanted.pop()
        for extra in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needed = map(Requirement, requires(name) or ())
            except PackageNotFoundError:
                continue
            wanted += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    # What a CUDA build of torch brings is torch's to choose.
    names = {name for name, _ in seen if not name.startswith(("cuda-", "nvidia-"))}
    assert names - named_elsewhere <= set(map(canonicalize_name, locked))


def test_torchrun_serves_what_the_dashboard_shows_and_drains(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    command = [LAUNCH / "torchrun.sh", DEMO, "--port", "0", "--api-key-file", tmp_path / "key"]
    command += ["--dtype", "float32", "--kv-cache-gib", "0.05", "--selector", "tokenselect:dense_below=8"]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(list(map(str, command)), stderr=out, stdout=out, env=environment, cwd=ROOT)
    try:
        until(lambda: "listening on" in log.read_text())
        (url,) = re.findall(r"listening on (http://\S+)", log.read_text())
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            until(lambda: client.get("/ready").status_code == 200, log.read_text())
            assert client.get("/metrics").status_code == 401
            client.headers["Authorization"] = "Bearer sesame"
            asked = {"prompt": "def", "max_tokens": 200, "ignore_eos": True}
            assert client.post("/v1/completions", json=asked).status_code == 200
            check_dashboard(client.get("/metrics").text)
            with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        # torchrun's own status after a signal is 1, whatever that of its ranks.
        server.wait(PATIENCE_S)
    finally:
        server.kill()
    assert "died" not in log.read_text()


def check_dashboard(page: str) -> None:
    """Every metric that the dashboard names is exposed, with the labels that it is asked by."""
    exposed: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
        for end in ends.get(family.type, [""]):
            exposed[family.name + end] = set()
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    board = (LAUNCH / "grafana.json").read_text()
    assert set(METRIC.findall(board)) <= exposed.keys()
    used = re.findall(r"by \((\w+)\) \(rate\((weaveinf_\w+)", board)
    for metric, matchers in re.findall(r"(weaveinf_\w+)\{([^}]*)\}", board):
        used += [(label, metric) for label in re.findall(r"(\w+)=", matchers)]
    for label, metric in used:
        # Prometheus itself adds the instance; a label is seen once there was something to count.
        assert label == "instance" or label in exposed[metric] or not exposed[metric], (label, metric)
