"""Compiles csrc/cpu into weaveinf/_native: one library per instruction-set level (see ops/native.py); puts
csrc/cuda beside them, which is compiled where it runs (ops/cuda.py).

Without a C++ compiler the package installs all the same and says in one line what that costs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
FLAGS = (
    "-std=gnu++17 -O2 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-fvisibility=default -Wall -Wno-psabi -Wno-unknown-pragmas -Wno-ignored-attributes"
).split()
MEETING = ("shm.cpp", "streams.cpp")
"""How ranks meet; the rest is arithmetic, compiled once for each level."""
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
LEVELS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "x86_64": ["-msse4.2"],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    },
    "aarch64": {"armv8": ["-march=armv8-a"], "armv8bf16": ["-march=armv8.2-a+bf16"]},
}


class BuildKernels(build_ext):
    """Compiles with whatever C++ compiler there is; a failure costs speed, not the install."""

    def run(self) -> None:
        target = (ROOT if self.inplace else Path(self.build_lib)) / "weaveinf" / "_native"
        target.mkdir(parents=True, exist_ok=True)
        for source in CUDA.iterdir():
            shutil.copyfile(source, target / source.name)
        compiler = shlex.split(os.environ.get("CXX", ""))
        if not compiler:
            found = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
            compiler = [found] if found else []
        if not compiler:
            say("no C++ compiler found")
            return
        shared = [SOURCES / name for name in MEETING]
        kernels = sorted(set(SOURCES.glob("*.cpp")) - set(shared))
        libraries = {
            f"libweaveinf_{level}.so": (kernels, flags)
            for level, flags in LEVELS.get(platform.machine(), {}).items()
        }
        libraries["libweaveinf_shm.so"] = (shared, ["-O3", "-lrt", "-pthread"])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_library, compiler, sources, flags, target / name)
                for name, (sources, flags) in libraries.items()
            ]
        for name, job in zip(libraries, jobs, strict=True):
            if error := job.result():
                say(f"{name} was not built ({error})")

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "weaveinf" / "_native").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for folder in (SOURCES, CUDA) for p in folder.iterdir()]


def compile_library(compiler: list[str], sources: list[Path], flags: list[str], target: Path) -> str | None:
    """Builds one library; returns the compiler's first error line, or None. Replaces it atomically."""
    new = target.with_suffix(".new")
    command = [*compiler, *FLAGS, *map(str, sources), *flags, "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return next((line for line in lines if "error" in line), lines[-1] if lines else "?")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    new.replace(target)
    return None


def say(problem: str) -> None:
    print(
        f"weaveinf: {problem}: the package works, but its CPU kernels are missing, and bfloat16 "
        "on a CPU without AVX-512 will run several times slower.",
        file=sys.stderr,
    )


setup(ext_modules=[Extension("weaveinf._native.kernels", sources=[])], cmdclass={"build_ext": BuildKernels})
