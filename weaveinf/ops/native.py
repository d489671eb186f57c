"""The compiled CPU kernels (csrc/cpu): which builds exist, which one this processor runs.

`setup.py` compiles the same C++ source once per instruction-set level into `weaveinf/_native`. The best one
that the processor's flags allow is loaded with ctypes, so the GIL is released during every call.
"""

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # before our libraries, which bind to its libgomp by its soname

from weaveinf.ops.tape import Kernel

DIRECTORY = Path(__file__).parent.parent / "_native"
"""Where the libraries lie."""

# Best first. A level is for processors that /proc/cpuinfo shows to have all these flags, or this maker.
_LEVELS: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {
        # Intel's dot products run at half the rate of its float32 multiplications.
        "avx512bf16": frozenset("AuthenticAMD avx512f avx512bw avx512vl avx512dq avx512_bf16 fma".split()),
        "avx512": frozenset("avx512f avx512bw avx512vl avx512dq fma".split()),
        "avx2": frozenset("avx2 fma".split()),
        "x86_64": frozenset("sse4_2".split()),
    },
    "aarch64": {"armv8bf16": frozenset("asimd bf16".split()), "armv8": frozenset("asimd".split())},
}

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that the kernels take, and their codes in the C interface."""

_LAYOUTS = {
    "weave_pack": "P4nPn",
    "weave_linear": "P3nP2n2P3n",
    "weave_linear_tiles": "2P3nPnP2n",
    "weave_rms_norm": "P2n2P5n2d2n",
    "weave_add_rms_norm": "n3P2n3d2n",
    "weave_zero": "Pn",
    "weave_embed": "3P5n",
    "weave_rope": "P5n2P2n",
    "weave_write_kv": "PnPn3P3n",
    "weave_draw": "P4n3Pn",
    "weave_silu_mul": "PnP5n",
    "weave_attention": "7P13nd",
    "weave_votes": "7P13nd",
    "weave_index": "7P10n",
    "weave_top_k": "5P4n",
    "weave_places": "3P7n",
    "weave_bounds": "4P6n",
    "weave_planes": "4P6n",
    "weave_replay": "Pn",
}
"""The arguments of the kernels: the structs of csrc/cpu, for the `struct` module."""


class Library:
    """One build of csrc/cpu; its kernels are attributes (see `Kernel`). OSError when it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.packed_bytes = library.weave_packed_bytes
        self.packed_bytes.argtypes = [ctypes.c_ssize_t] * 3
        self.packed_bytes.restype = ctypes.c_ssize_t
        for name, layout in _LAYOUTS.items():
            setattr(self, name, Kernel(getattr(library, name), layout))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Kernel: ...


def _flags() -> frozenset[str]:
    """The processor's feature flags and its maker (empty where there is no /proc/cpuinfo)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    words: set[str] = set()
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features", "vendor_id"):
            words.update(value.split())
    return frozenset(words)


def runnable() -> list[str]:
    """The compiled builds that this processor can run, best first."""
    flags = _flags()
    able = [name for name, needed in _LEVELS.get(platform.machine(), {}).items() if needed <= flags]
    return [name for name in able if (DIRECTORY / f"libweaveinf_{name}.so").exists()]


def load(name: str) -> Library:
    """Loads one build. OSError or AttributeError when it cannot be loaded."""
    return Library(DIRECTORY / f"libweaveinf_{name}.so")


def _choose(names: Sequence[str]) -> tuple[Library | None, str, str]:
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


def fields(layout: str) -> list[tuple[str, Any]]:
    """The `_fields_` of a structure, from types of ctypes and the names that have them: "int64 rows hidden,
    double eps"."""
    groups = [group.split() for group in layout.split(",")]
    return [(name, getattr(ctypes, f"c_{kind}")) for kind, *names in groups for name in names]


def pointers(*tensors: torch.Tensor | None) -> list[int]:
    """The addresses that a kernel is called with."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


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


lib: Library | None
isa: str
reason: str
lib, isa, reason = _choose(runnable())
ONEDNN: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
_MATRIX = "amx_bf16" in _flags() or platform.machine() == "aarch64"
# With AVX-512, csrc/cpu/gemm.cpp is as fast for many rows, faster for few (bench/linear.py), and can share.
onednn = ONEDNN and (lib is None or _MATRIX)
"""Whether oneDNN multiplies bfloat16."""
