"""Tiny models, their steps, and looks at what a run leaves behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest

from weaveinf.cluster.launch import Cluster, launch
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.engine.step import Admission, Step

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
"""How long a test waits for what should come in far less; the machine may be busy."""


def make_model(path: Path) -> Path:
    """A directory that `load_format="dummy"` makes a two-layer model of."""
    path.mkdir(exist_ok=True)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 100,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "dtype": "float32",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(settings))
    return path


def config(model: Path, size: int) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        tensor_parallel_size=size,
        device="cpu",
        load_format="dummy",
        kv_cache_gib=0.01,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )


def start(model: Path, size: int) -> Cluster:
    return launch(config(model, size))


def step(n: int) -> Step:
    """The n-th step of one greedy request whose prompt is one token."""
    first, opens_page = n == 0, n % PAGE_SIZE == 0

    def row(value: int) -> np.ndarray:
        return np.array([value], np.int32)

    return Step(
        number=n,
        admissions=[Admission(slot=0, temperature=0.0)] if first else [],
        state_slot=row(0),
        num_computed=row(n),
        num_query=row(1),
        num_prompt_tokens=row(1),
        num_logits=row(1),
        num_targets=row(0),
        num_new_pages=row(int(opens_page)),
        output_position=row(n),
        by_reference=np.array([not first]),
        token_ids=np.array([5] if first else [], np.int64),
        new_pages=np.array([n // PAGE_SIZE] if opens_page else [], np.int64),
        targets=np.array([], np.int64),
    )


def tokens(cluster: Cluster, first: int, last: int) -> list[int]:
    """The tokens of steps first to last - 1, each collected before the next is submitted."""
    out = []
    for n in range(first, last):
        cluster.submit(step(n))
        out.append(int(cluster.collect().tokens[0]))
    return out


def children() -> list[psutil.Process]:
    """This process's ranks, in rank order."""
    mine = psutil.Process().children()
    return [p for p in mine if "weaveinf.cluster.rank" in cmdline(p)]


def cmdline(process: psutil.Process) -> list[str]:
    """Of a process; nothing of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def eventually(what: Callable[[], object]) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Footprint:
    """What this process and its ranks hold of the machine."""

    def __init__(self) -> None:
        self.segments = self._segments()
        self.sockets = self._sockets()

    @staticmethod
    def _segments() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith("weaveinf")}

    @staticmethod
    def _sockets() -> set[tuple[str, ...]]:
        return {tuple(map(str, c[:6])) for c in psutil.Process().net_connections("all")}

    def check(self) -> None:
        """Nothing is left that was not there before."""
        assert not children()
        gc.collect()  # the frames of an exception may hold a connection
        # Other engines of this machine hold names for milliseconds.
        assert eventually(lambda: self._segments() <= self.segments)
        assert eventually(lambda: self._sockets() <= self.sockets)


def patch_ranks(monkeypatch: pytest.MonkeyPatch, directory: Path, code: str) -> None:
    """Has every spawned rank run `code` before it starts; `worker` is the module it patches."""
    directory.mkdir(exist_ok=True)
    lines = ["import sys", 'if "weaveinf.cluster.rank" in sys.orig_argv:']
    body = f"import weaveinf.engine.worker as worker\n{code}"
    lines += [f"    {line}" for line in body.splitlines()]
    (directory / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PYTHONPATH", str(directory))


def run_program(
    *arguments: str, torchrun: int = 0, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Starts tests.cluster.program, alone or as ranks of torchrun, in a process group of its own."""
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        command += [f"--nproc-per-node={torchrun}", "-m"]
    return subprocess.Popen(
        [*command, "tests.cluster.program", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        process_group=0,
    )


def read_line(program: subprocess.Popen[str], word: str) -> str:
    """The rest of the program's next line that begins with `word`."""
    assert program.stdout is not None
    for line in program.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    assert program.stderr is not None
    raise AssertionError(f"the program ended before it said {word!r}: {program.stderr.read()}")
