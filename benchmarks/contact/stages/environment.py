"""Describes the machine, and tries the mechanisms that all kernels rest on."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys

from contact.log import Log
from contact.processes import run_limited
from contact.stages import mechanisms
from contact.task import Task

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "mpiexec", "cuobjdump")
PACKAGES = (
    *("numpy", "ml_dtypes", "torch", "mpi4py", "tqdm", "matplotlib"),
    *("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis"),
)
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.sm,mig.mode.current"
ATTRIBUTES = (
    *("MultiProcessorCount", "L2CacheSize", "ClockRate", "MemoryClockRate", "GlobalMemoryBusWidth"),
    *("MaxSharedMemoryPerBlockOptin", "MaxSharedMemoryPerMultiprocessor", "ReservedSharedMemoryPerBlock"),
)


def run(task: Task) -> None:
    """Enter everything; what needs CuPy, a GPU or working kernels comes later."""
    machine(task.log)
    with task.log.checking("cupybn finds a GPU"):
        library(task.log)
    with task.log.checking("device attributes"):
        device(task.log)
    mechanisms.run(task)


def machine(log: Log) -> None:
    """Enter what is known without CuPy."""
    log.fact("executable", sys.executable)
    log.fact("processors", os.cpu_count())
    for tool in TOOLS:
        log.fact(tool, shutil.which(tool) or "not in PATH")
    if shutil.which("nvidia-smi"):
        done = run_limited(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], 10)
        log.fact("nvidia-smi", done.output.strip())
    for package in PACKAGES:
        try:
            log.fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            log.fact(package, "not installed")


def library(log: Log) -> None:
    """Enter what ``python -m cupybn info`` says."""
    from contact.insides import cuda_missing
    from cupybn._cli import info

    for name, value in info.lines():
        log.fact(name, value)
    missing = cuda_missing()
    assert not missing, missing


def device(log: Log) -> None:
    """Enter what the library's choices depend on."""
    import cupy

    runtime = cupy.cuda.runtime
    for name in ATTRIBUTES:
        log.fact(name, runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), 0))
    free, total = runtime.memGetInfo()
    log.fact("memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
