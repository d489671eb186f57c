"""The Triton kernels in Triton's interpreter on CPU, and compiled (not run) for a Hopper GPU.

The interpreter computes bfloat16 wrongly, so it runs float32 and float16 here; tests/gpu/ has the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
from tests.ops.triton_checks import CASES


def run(arguments: list[str], home: Path, **environment: str) -> str:
    """Runs Python in the repository's root with its caches under `home`: what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the interpreter says of every case: dtype -> case -> traceback or nothing."""
    home = tmp_path_factory.mktemp("triton")
    printed = run(["-m", "tests.ops.triton_checks"], home, TRITON_INTERPRET="1")
    return json.loads(printed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
def test_interpreted(interpreted: dict[str, dict[str, str]], dtype: str, case: str) -> None:
    assert interpreted[dtype][case] == ""


def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel as it would be launched there, without a GPU; none is run."""
    printed = run(["-m", "tests.ops.triton_compile"], tmp_path, TRITON_CACHE_DIR=str(tmp_path))
    compiled = Counter(line.split()[0] for line in printed.splitlines())
    assert all(int(line.split()[-2]) <= 227 << 10 for line in printed.splitlines())
    assert compiled == {
        "_attend": 7,
        "_join": 7,
        "_rms_norm": 2,
        "_add_rms_norm": 2,
        "_rope": 1,
        "_write_kv": 1,
        "_silu_mul": 5,
        "_score": 10,
        "_vote": 4,
        "_top_k": 10,
        "_places": 2,
        "_bounds": 2,
        "_channels": 2,
        "_experts": 8,
        "_arrive": 16,
        "_await": 16,
        "_share": 8,
    }
    assert all(line.endswith(" wide") for line in printed.splitlines() if line.startswith("_share"))


def test_cpu_use_never_imports_triton(tmp_path: Path) -> None:
    modules = "activation, attention, index, linear, moe, norm, rope, sampling"
    printed = run(
        ["-c", f"import sys; from weaveinf.ops import {modules}; print(sorted(sys.modules))"], tmp_path
    )
    assert "'triton'" not in printed and "weaveinf.ops.norm" in printed
