"""The CUDA C++ of csrc/cuda: compiled by NVRTC through cupy for the GPU at hand when it is first wanted, and
kept on disk by cupy. No compiler has to be installed."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent.parent / "_native"
"""setup.py puts the sources there."""


def objection() -> str:
    """Why nothing can be compiled here, or nothing."""
    if importlib.util.find_spec("cupy") is None:
        major = (torch.version.cuda or "13").split(".")[0]
        return f"cupy is missing: pip install 'weaveinf[cu{major}]'"
    missing = f"{SOURCES} lacks the CUDA sources: install weaveinf anew"
    return "" if (SOURCES / "seam.cu").exists() else missing


class Kernel:
    """One kernel, which takes one structure by value.

    defines: what the source is compiled with. Raises cupy's CompileException.
    """

    def __init__(self, name: str, threads: int, **defines: Any) -> None:
        import cupy

        # One text, because cupy's cache on disk knows nothing of headers.
        header, code = ((SOURCES / file).read_text() for file in ("ptx.cuh", f"{name}.cu"))
        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in defines.items()))
        module = cupy.RawModule(code=code.replace("#include <ptx.cuh>", header), options=options)
        self._kernel = module.get_function(name)
        self._address = self._kernel.kernel.ptr
        self._threads = threads

    def __call__(self, argument: ctypes.Structure, blocks: int, rows: int = 1) -> None:
        """Launches a grid of blocks by rows on torch's current stream, which the host does not wait for."""
        from cupy_backends.cuda.api import driver

        stream = torch.cuda.current_stream().cuda_stream
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        grid, block = (blocks, rows, 1), (self._threads, 1, 1)
        driver.launchKernel(self._address, *grid, *block, 0, stream, ctypes.addressof(arguments), 0)
