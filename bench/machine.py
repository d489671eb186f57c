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

MAKERS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


def cpu_says(names: set[str]) -> set[str]:
    """The words of these fields (in lower case) of the first processor as Linux lists it; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return set()
    fields = (line.partition(":") for line in text.splitlines())
    return {word for key, _, value in fields if key.strip().lower() in names for word in value.split()}


def instructions() -> str:
    """The fastest class of instructions that this processor has, and who made it where that is known."""
    flags = cpu_says({"flags", "features"})
    found = next((name for name, flag in INSTRUCTIONS if flag in flags), platform.machine())
    maker = MAKERS.get("".join(cpu_says({"vendor_id"})))
    return f"{found} {maker}" if maker else found


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def linear_gflops(dtype: torch.dtype) -> float:
    """What torch's linear layer of 1024 by 1024 reaches on all cores."""
    rows, side = 256, 1024
    x, weight = torch.randn(rows, side).to(dtype), torch.randn(side, side).to(dtype)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Its first calls make threads and wake the cores: five of them once took float32 for the slower one.
    return 2e-9 * rows * side * side / fastest(partial(torch.nn.functional.linear, x, weight), repeats=100)


def describe() -> dict[str, object]:
    """Class and limits: all cores reading 512 MB, and multiplying."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    memory = torch.ones(1 << 27)
    bandwidth = memory.nbytes / fastest(memory.sum) / 1e9
    found: dict[str, object] = {"cores": cores, "instructions": instructions()}
    found["memory read, GB/s"] = round(bandwidth, 1)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"torch {name} linear, GFLOP/s"] = round(linear_gflops(dtype), 1)
    found["python"] = platform.python_version()
    return found
