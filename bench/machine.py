"""What kind of machine a benchmark ran on: its class and its measured limits, never its name."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

# The fastest arithmetic first; the names are those of /proc/cpuinfo.
INSTRUCTIONS = (
    ("AMX", "amx_bf16"),
    ("AVX-512-BF16", "avx512_bf16"),
    ("AVX-512", "avx512f"),
    ("AVX2", "avx2"),
    ("Arm-BF16", "bf16"),
    ("Arm-NEON", "asimd"),
)


def cpu_flags() -> set[str]:
    """The processor's flags as Linux lists them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def instructions() -> str:
    """The fastest class of instructions that this processor has."""
    flags = cpu_flags()
    return next((name for name, flag in INSTRUCTIONS if flag in flags), platform.machine())


def has_fast_bfloat16() -> bool:
    """Whether the processor has bfloat16 products of its own."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def describe() -> dict[str, object]:
    """Class and limits: all cores reading 512 MB, and torch's linear layer of 1024 by 1024."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    memory = torch.ones(1 << 27)
    bandwidth = memory.nbytes / fastest(memory.sum) / 1e9
    found: dict[str, object] = {"cores": cores, "instructions": instructions()}
    found["memory read, GB/s"] = round(bandwidth, 1)
    rows, side = 256, 1024
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(rows, side).to(dtype), torch.randn(side, side).to(dtype)
        product = partial(torch.nn.functional.linear, x, weight)
        name = str(dtype).removeprefix("torch.")
        gflops = 2e-9 * rows * side * side / fastest(product)
        found[f"torch {name} linear, GFLOP/s"] = round(gflops, 1)
    found["python"] = platform.python_version()
    return found
