"""`weaveinf doctor`: what this machine has, which seam and kernels will be used, and why."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from weaveinf import __version__
from weaveinf.comm import segment
from weaveinf.commands.report import Machine, write_json
from weaveinf.ops import cuda, flash_attention, native

PACKAGES = "torch triton transformers safetensors tokenizers numpy cupy-cuda12x cupy-cuda13x".split()


def run(args: argparse.Namespace) -> None:
    if args.tp < 1:
        raise ValueError("--tp must be at least 1")
    rows = _software() | _hardware() | _choices(args.tp)
    width = max(map(len, rows))
    if args.json != "-":
        for name, value in rows.items():
            print(f"{name:{width}}  {value}")
    write_json(args.json, rows)
    if objection := _nccl_objection():
        raise ValueError(objection)


def _software() -> dict[str, Any]:
    rows = {"weaveinf": __version__, "python": platform.python_version()}
    return rows | {package: _version(package) or "not installed" for package in PACKAGES}


def _hardware() -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    rows = {
        "processor": f"{platform.machine()}, {_cpu_name()}",
        "cores": f"{len(cores)} usable, {psutil.cpu_count(logical=False)} physical on the machine",
        "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "/dev/shm": _shared_memory(),
        "gpus": _gpus(),
        "nccl": _nccl(),
    }
    for dtype in (torch.float32, torch.bfloat16):
        machine = Machine.measure(dtype)
        name = str(dtype).removeprefix("torch.")
        rows[f"{name} product"] = f"{machine.gflops:.0f} GFLOP/s with {torch.get_num_threads()} threads"
    rows["memory read"] = f"{machine.gb_per_s:.1f} GB/s"
    return rows


def _nccl() -> str:
    """Which one is loaded, and from where."""
    if torch.version.cuda is None:
        return "not needed: this torch has no CUDA"
    package = f"nvidia-nccl-cu{torch.version.cuda.split('.')[0]}"
    loaded = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{loaded} ({package if _version(package) else 'not of a package'})"


def _nccl_objection() -> str:
    """Both builds of NCCL lie in one place: what was installed last is loaded, whatever torch wants."""
    if torch.version.cuda is None:
        return ""
    major = torch.version.cuda.split(".")[0]
    other = f"nvidia-nccl-cu{'12' if major == '13' else '13'}"
    if not (found := _version(other)):
        return ""
    remedy = f"pip uninstall {other}; pip install --force-reinstall --no-deps nvidia-nccl-cu{major}"
    return f"{other} {found} is installed, but torch is built for CUDA {major}: {remedy}"


def _version(package: str) -> str:
    """Of an installed package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _choices(size: int) -> dict[str, Any]:
    """What the ranks would choose; at start-up each probes for itself and all vote."""
    kernels = f"{native.isa} build of csrc/cpu" if native.lib else f"torch: {native.reason}"
    if torch.cuda.is_available():
        kernels = f"Triton{'; FlashAttention 3 where it is faster' if flash_attention.library else ''}"
    if size == 1:
        seam = "local: one rank has nothing to sum"
    elif torch.cuda.is_available():
        seam = "multimem where a switch joins the GPUs, else peer if they map each other's memory, else NCCL"
        if objection := cuda.objection():
            seam = f"peer, in Triton, if the GPUs map each other's memory, else NCCL: {objection}"
    elif reason := segment.reason or native.reason:
        seam = f"collective over TCP: {reason}"
    elif size > segment.MAX_RANKS:
        seam = f"collective over TCP: shared memory takes up to {segment.MAX_RANKS} ranks"
    else:
        seam = "shared memory, for ranks on this host; collective over TCP across hosts"
    return {"kernels": kernels, f"seam of {size} ranks": seam}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return f"not there ({error.strerror}): ranks will use the collective seam"
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
