"""The command line's surface is frozen: an option is added here on purpose, or not at all."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.harness import make_checkpoint
from weaveinf.cli import main, parser
from weaveinf.commands import doctor

DEMO = str(Path(__file__).parents[1] / "weaveinf" / "assets" / "demo")
ENGINE = {
    "MODEL",
    "--tp",
    "--executor",
    "--placement",
    "--device",
    "--dtype",
    "--weave",
    "--selector",
    "--index-keys",
    "--max-model-len",
    "--seed",
    "--revision",
    "--kv-cache-gib",
    "--max-num-seqs",
    "--max-num-batched-tokens",
}
SAMPLING = {"--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--stop"}
SURFACE = {
    "demo": {"-p", "--prompt", "--tp"},
    "generate": ENGINE | SAMPLING | {"-p", "--prompt", "-f", "--file", "--n", "--trace", "--json"},
    "chat": ENGINE | SAMPLING | {"--system"},
    "serve": ENGINE
    | {"--load-format", "--host", "--port", "--served-model-name", "--api-key-file", "--max-waiting"}
    | {"--max-output-tokens", "--max-body-bytes", "--timeout-s", "--drain-s", "--max-restarts"}
    | {"--log-prompts", "--otlp-endpoint"},
    "bench latency": ENGINE
    | {"--load-format", "--batch", "--prompt-tokens", "--decode-tokens", "--repeats", "--trace", "--json"},
    "bench throughput": ENGINE
    | {"--load-format", "--requests", "--prompt-tokens", "--output-tokens", "--trace", "--json"},
    "bench serve": {"--url", "--model", "--clients", "--requests", "--prompt-tokens", "--output-tokens"}
    | {"--vocab-size", "--api-key-file", "--json"},
    "bench overlap": ENGINE | {"--load-format", "--tokens", "--decode", "--pairs", "--trace", "--json"},
    "bench selectors": {"--methods", "--tokens", "--batch", "--heads", "--kv-heads", "--head-dim", "--turns"}
    | {"--json"},
    "plan": {"MODEL", "--tp", "--gpu", "--tokens", "--json"},
    "calibrate": {"MODEL", "--text", "--out", "--tokens"},
    "doctor": {"--tp", "--json"},
}


def surface(top: argparse.ArgumentParser, prefix: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    options: set[str] = set()
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found |= surface(command, f"{prefix} {name}".strip())
        elif action.dest not in ("help", "version"):
            options |= set(action.option_strings) or {str(action.metavar)}
    if options:
        found[prefix] = options
    return found


def test_the_surface_is_frozen() -> None:
    assert surface(parser()) == SURFACE


def weaveinf(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weaveinf", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (["generate", "no/such/model", "-p", "x"], "no/such/model"),
        (["generate", "."], "no prompt: give -p TEXT or -f FILE"),
        (["generate", ".", "-p", "x"], "config.json does not exist"),
        (["generate", ".", "-p", "x", "--json", "/no/such/file"], "/no/such/file"),
        (["generate", ".", "-p", "x", "--top-p", "2"], "top_p must be"),
        (["generate", ".", "-p", "x", "--dtype", "int3"], "dtype='int3' is not one of"),
        (["generate", ".", "-p", "x", "--tp", "0"], "tensor_parallel_size=0"),
        (["generate", DEMO, "-p", "x", "--weave", "on"], "weave='on' is not possible with one rank"),
        (["generate", ".", "-f", "no-such-file"], "no-such-file"),
        (["bench", "latency", ".", "--batch", "0"], "--batch must be at least 1"),
        (["generate", ".", "--promt", "x"], "unrecognized arguments: --promt"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    args: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert remedy in said.err and len(said.err.strip().splitlines()) == 1
    assert said.out == ""


def test_bench_latency_writes_what_it_measured(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    file = tmp_path / "result.json"
    args = ["--batch", "3", "--prompt-tokens", "20", "--decode-tokens", "4", "--repeats", "2"]
    done = weaveinf("bench", "latency", str(tmp_path / "model"), *args, "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert (result["batch"], result["prompt_tokens"], result["seam"]) == (3, 20, "local")
    # A prefill and four decode steps, twice; the warm-up does not count.
    assert (result["steps_woven"], result["steps_fused"], result["steps_plain"]) == (0, 0, 10)
    for name in ("prefill_ms", "decode_ms", "machine_gb_per_s", "machine_gflops"):
        assert result[name] > 0
    assert "GB/s" in done.stdout and "GFLOP/s" in done.stdout and "tokens/s" in done.stdout


def test_generate_says_what_a_selector_did() -> None:
    limits = [
        "--kv-cache-gib",
        "0.05",
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "24",
        "--max-tokens",
        "3",
    ]
    args = [DEMO, *limits, "-p", "a b", "-p", "a b c d e f g h " * 4]
    done = weaveinf("generate", *args, "--selector", "lazyllm", "--json", "-")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [output["samples"][0]["pruned"] for output in result["outputs"]] == [True, False]
    chose = {"name": "lazyllm", "budget": 70, "prompts_pruned": 1, "prompts_whole": 1}
    assert result["selector"] == chose
    assert "lazyllm, budget 70: 1 prompts pruned, 1 prompts whole" in done.stderr


def test_doctor_refuses_an_nccl_of_another_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"nvidia-nccl-cu12": "2.27.3", "nvidia-nccl-cu13": "2.28.9"}
    monkeypatch.setattr(doctor, "_hardware", lambda: {"nccl": doctor._nccl()})
    monkeypatch.setattr(doctor, "_version", lambda package: installed.get(package, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    said = capsys.readouterr()
    assert end.value.code == 2 and "2.27.3 (nvidia-nccl-cu13)" in said.out
    assert "pip uninstall nvidia-nccl-cu12" in said.err and "reinstall --no-deps nvidia-nccl-cu13" in said.err
    del installed["nvidia-nccl-cu12"]
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 0


def test_doctor_names_the_kernels_and_the_seam() -> None:
    done = weaveinf("doctor", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["kernels"] and rows["seam of 2 ranks"]
