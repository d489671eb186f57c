"""The compiled CPU kernels (csrc/cpu): which builds exist, which one this processor runs.

`setup.py` compiles the same C++ source once per instruction-set level into `weaveinf/_native`. The best one
that the processor's flags allow is loaded with ctypes, so the GIL is released during every call.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path

import torch  # before our libraries, which bind to its libgomp by its soname

DIRECTORY = Path(__file__).parent.parent / "_native"
"""Where the libraries lie."""

# Best first. A level can run where /proc/cpuinfo shows all its flags.
_LEVELS: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {
        "avx512bf16": frozenset("avx512f avx512bw avx512vl avx512dq avx512_bf16 fma".split()),
        "avx512": frozenset("avx512f avx512bw avx512vl avx512dq fma".split()),
        "avx2": frozenset("avx2 fma".split()),
        "x86_64": frozenset("sse4_2".split()),
    },
    "aarch64": {
        "armv8bf16": frozenset("asimd bf16".split()),
        "armv8": frozenset("asimd".split()),
    },
}

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that the kernels take, and their codes in the C interface."""

_P, _I, _F = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "weave_packed_bytes": [_I, _I, _I],
    "weave_pack": [_P, _I, _I, _I, _I, _P, _I],
    "weave_linear": [_P, _I, _I, _I, _P, _I, _I, _P, _P, _I, _I, _I],
    "weave_linear_tiles": [_P, _P, _I, _I, _I, _P, _I, _P, _I, _I],
    "weave_rms_norm": [_P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _F, _F, _I, _I],
    "weave_add_rms_norm": [_P, _I, _P, _P, _P, _I, _I, _F, _F, _F, _I, _I],
    "weave_rope": [_P, _I, _I, _I, _I, _I, _P, _P, _I, _I],
    "weave_write_kv": [_P, _I, _P, _I, _P, _P, _P, _I, _I, _I],
    "weave_draw": [_P, _I, _I, _I, _I, _P, _P, _P, _I],
    "weave_silu_mul": [_P, _I, _P, _I, _I, _I, _I, _I],
    "weave_attention": [_P],
}


def _flags() -> frozenset[str]:
    """The processor's feature flags (empty where there is no /proc/cpuinfo)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def runnable() -> list[str]:
    """The compiled builds that this processor can run, best first."""
    flags = _flags()
    levels = _LEVELS.get(platform.machine(), {})
    return [
        name
        for name, needed in levels.items()
        if needed <= flags and (DIRECTORY / f"libweaveinf_{name}.so").exists()
    ]


def load(name: str) -> ctypes.CDLL:
    """Loads one build and declares its functions. OSError when it cannot be loaded."""
    library = ctypes.CDLL(str(DIRECTORY / f"libweaveinf_{name}.so"))
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    library.weave_packed_bytes.restype = _I
    return library


def _choose(names: Sequence[str]) -> tuple[ctypes.CDLL | None, str, str]:
    cost = "without AVX-512 bfloat16 runs several times slower on torch's paths; get g++ or clang++"
    if not names:
        missing = f"no CPU kernels were compiled for this {platform.machine()}"
        if runnable():
            missing = "the ranks' processors have no build of the CPU kernels in common"
        return None, "torch", f"{missing}: {cost}"
    try:
        return load(names[0]), names[0], ""
    except (OSError, AttributeError) as error:
        return None, "torch", f"the CPU kernels do not load ({error}): {cost}"


def abilities() -> list[str]:
    """What this process could run its products on: the loadable builds, best first, "onednn" where oneDNN
    has instructions for bfloat16, and "matrix" where these are matrix instructions."""
    builds = [name for name in runnable() if _choose([name])[0] is not None]
    return builds + ["onednn"] * ONEDNN + ["matrix"] * _MATRIX


def agree(of_all_ranks: Sequence[Sequence[str]]) -> None:
    """Keeps to what every rank is able to: what ranks compute alike must come out alike, to the bit.

    Weights that were packed before stay as they are.
    """
    global lib, isa, reason, onednn

    def all_have(ability: str) -> bool:
        return all(ability in words for words in of_all_ranks)

    lib, isa, reason = _choose([build for build in runnable() if all_have(build)])
    onednn = ONEDNN and all_have("onednn") and (lib is None or all_have("matrix"))


lib: ctypes.CDLL | None
isa: str
reason: str
lib, isa, reason = _choose(runnable())
ONEDNN: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
_MATRIX = "amx_bf16" in _flags() or platform.machine() == "aarch64"
# With AVX-512, csrc/cpu/gemm.cpp is as fast for many rows, faster for few (bench/linear.py), and can share.
onednn = ONEDNN and (lib is None or _MATRIX)
"""Whether oneDNN multiplies bfloat16."""
