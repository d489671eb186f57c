"""csrc/cuda compiled for Hopper and Blackwell, without a GPU: no spills, no more registers than a block of
its threads has, and the instructions of the switch. What it computes: tests/comm/test_symmetric.py.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from weaveinf.comm import symmetric

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
SIZES = {torch.bfloat16: (512, 2880, 8192, 16384), torch.float16: (5120,), torch.float32: (512, 16384)}


def packaged(pattern: str) -> list[Path]:
    """Files of NVIDIA's Python packages."""
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return [path for folder in folders for path in sorted(Path(folder).glob(f"cu*/{pattern}"))]


def nvrtc() -> Any:
    return next((ctypes.CDLL(str(path)) for path in packaged("lib/libnvrtc.so.*")), None)


LIBRARY = nvrtc()
TRITON = find_spec("triton")
pytestmark = pytest.mark.skipif(
    LIBRARY is None or TRITON is None, reason="needs nvidia-cuda-nvrtc, and triton for its cuobjdump"
)


def compiled(architecture: str, defines: dict[str, Any]) -> bytes:
    """seam.cu as NVRTC makes it; what it has to say is an error."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    header = (SOURCES / "ptx.cuh").read_bytes()
    LIBRARY.nvrtcCreateProgram(
        ctypes.byref(program),
        (SOURCES / "seam.cu").read_bytes(),
        b"seam.cu",
        1,
        (ctypes.c_char_p * 1)(header),
        (ctypes.c_char_p * 1)(b"ptx.cuh"),
    )
    words = [f"-arch={architecture}", "-std=c++17", *(f"-D{key}={value}" for key, value in defines.items())]
    LIBRARY.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*map(str.encode, words)))
    LIBRARY.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    LIBRARY.nvrtcGetProgramLog(program, log)
    assert log.value == b"", log.value.decode()
    LIBRARY.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    LIBRARY.nvrtcGetCUBIN(program, cubin)
    LIBRARY.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def by_nvcc(architecture: str, defines: dict[str, Any], home: Path) -> bytes:
    """The same by CUDA's own compiler, of a package or the machine's."""
    own = next((path for path in packaged("bin/nvcc")), shutil.which("nvcc"))
    if own is None:
        pytest.skip("needs nvcc (nvidia-cuda-nvcc)")
    words = [f"-arch={architecture}", "-std=c++17", "-cubin", f"-I{SOURCES}", "-Werror", "all-warnings"]
    words += [f"-D{key}={value}" for key, value in defines.items()]
    subprocess.run([own, *words, "-o", home / "nvcc.cubin", SOURCES / "seam.cu"], check=True)
    return (home / "nvcc.cubin").read_bytes()


def dump(what: str, cubin: bytes, home: Path) -> str:
    assert TRITON is not None and TRITON.origin is not None
    tool = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (home / "seam.cubin").write_bytes(cubin)
    return subprocess.run(
        [tool, what, home / "seam.cubin"], capture_output=True, text=True, check=True
    ).stdout


def cases() -> list[tuple[torch.dtype, int, int, bool, bool]]:
    found = [
        (element, hidden, ranks, multimem, False)
        for element, sizes in SIZES.items()
        for hidden, ranks, multimem in product(sizes, (2, 8), (False, True))
    ]
    return [*found, (torch.bfloat16, 8192, 1, False, False), (torch.bfloat16, 8192, 8, True, True)]


def look(cubin: bytes, case: tuple[torch.dtype, int, int, bool, bool], home: Path) -> None:
    """No spills, no more registers than there are for its threads, wide accesses, the switch's sums."""
    element, hidden, ranks, multimem, _ = case
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage", cubin, home)))
    assert usage["LOCAL"] == usage["STACK"] == "0", (case, usage)
    threads = symmetric.threads(hidden, element)
    assert int(usage["REG"]) <= min(255, 65536 // threads // 8 * 8), (case, usage)
    code = dump("-sass", cubin, home)
    assert ("LDGMC" in code) == multimem, case
    wide = re.findall(r"LDGMC\.\S*" if multimem else r"LDG\.E\.NA\.128", code)
    assert len(wide) >= (1 if multimem else ranks if ranks < 4 else 4), case
    assert re.search(r"STG\.E\.(64|128)", code), case


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_no_spills_and_the_switch_s_instructions(architecture: str, tmp_path: Path) -> None:
    for case in cases():
        look(compiled(architecture, symmetric.defines(*case)), case, tmp_path)


@pytest.mark.parametrize("architecture", ["sm_90a", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_nvcc_compiles_the_same(architecture: str, tmp_path: Path) -> None:
    for case in cases()[::3]:
        look(by_nvcc(architecture, symmetric.defines(*case), tmp_path), case, tmp_path)
