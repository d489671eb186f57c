"""The Triton kernels in Triton's interpreter on CPU, and compiled (not run) for a Hopper GPU.

The interpreter computes bfloat16 wrongly, so it runs float32 and float16 here; tests/gpu/ has the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
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


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weaveinf.ops import triton_attention as a, triton_elementwise as e

def build(kernel, types, constants, warps=4):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else t for n, t in zip(names, types)}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, len(made.asm["cubin"]))

for t in ("bf16", "fp32"):
    p = "*" + t
    sizes = {"HEAD_DIM": 128, "KV_HEADS": 8, "GROUP": 4, "PAGE_SIZE": 16, "BLOCK_D": 128}
    for window, splits, m in ((0, 1, 64), (4096, 8, 16)):
        kind = {"WINDOW": window, "SPLITS": splits, "BLOCK_M": m, "BLOCK_N": 64 if t == "bf16" else 32}
        types = [p, p, p, "*i32", "*i32", "*i32", p if splits == 1 else "*fp32", "*fp32", "fp32"]
        build(a._attend, types + ["i32"] * 7 + [""] * 9, {**sizes, **kind})
    build(a._join, ["*fp32", "*fp32", "*i32", p] + ["i32"] * 4 + [""] * 4,
          {"HEADS": 32, "HEAD_DIM": 128, "SPLITS": 8, "BLOCK_D": 128})
    build(e._rms_norm, [p, p, p, "fp32", "fp32"] + ["i32"] * 4 + [""] * 3,
          {"HEADS": 32, "WIDTH": 128, "BLOCK": 128})
    build(e._add_rms_norm, [(p, p), ("i32", "i32"), p, p, p, "fp32", "fp32", "fp32", "i32", "i32", "", ""],
          {"WIDTH": 5120, "BLOCK": 8192}, 16)
    build(e._rope, [p, "*fp32", "*i32", "i32", "i32", "i32", "", "", ""],
          {"HALF": 64, "BLOCK_HEADS": 32, "BLOCK_HALF": 64})
    build(e._write_kv, [p] * 4 + ["*i32"] + ["i32"] * 4 + [""] * 3,
          {"HEAD_DIM": 128, "WIDTH": 1024, "BLOCK": 1024})
    build(e._silu_mul, [p, p, "i32", "i32", "", ""], {"WIDTH": 11008, "BLOCK": 2048})
"""


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Every kernel down to a cubin for compute capability 9.0, which needs no GPU; none is run."""
    printed = run(["-c", COMPILE], tmp_path)
    assert len(printed.splitlines()) == 16
