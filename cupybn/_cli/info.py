"""What is found on this machine: versions, GPUs, kernels."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cupybn
from cupybn._cli.extras import optional
from cupybn._devices import cuda_missing, import_cupy
from cupybn._kernels import KERNELS, kernel_names

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(options: argparse.Namespace) -> int:  # noqa: ARG001
    """Print a line for each thing that is found, or why it is not."""
    for name, value in lines():
        print(f"{name + ':':26}{value}")
    return 0


def lines() -> Iterator[tuple[str, str]]:
    """Names and values."""
    yield "cupybn", cupybn.__version__
    yield "Python", f"{platform.python_version()} on {platform.machine()}"
    yield "NumPy", np.__version__
    yield "bfloat16 (ml_dtypes)", getattr(optional("ml_dtypes"), "__version__", "not found; the extra bf16 installs it")
    yield "mpi4py", getattr(optional("mpi4py"), "__version__", "not found; the extra mpi installs it")
    yield "kernels", f"{len(kernel_names())} in {KERNELS}"
    missing = cuda_missing()
    if missing:
        yield "CuPy", f"cannot be used: {missing}"
        yield "GPU", "none that can be used: calls on NumPy arrays use the NumPy mirrors of the kernels"
        return
    cupy = import_cupy()
    stand_in = " (the stand-in, which runs kernels on the CPU)" if hasattr(cupy, "emulator") else ""
    yield "CuPy", f"{cupy.__version__}{stand_in}"
    runtime = cupy.cuda.runtime
    yield "CUDA driver supports", found(lambda: version(runtime.driverGetVersion()))
    yield "CUDA runtime", found(lambda: version(runtime.runtimeGetVersion()))
    yield "NVRTC", found(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion())))
    yield "NCCL", found(nccl_version)
    yield "compiled kernels", cache_folder()
    for index in range(runtime.getDeviceCount()):
        yield f"GPU {index}", describe(runtime.getDeviceProperties(index))


def nccl_version() -> str:
    """Such as 2.27.3."""
    from cupy.cuda import nccl

    if not nccl.available:
        return "not found"
    number = nccl.get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def found(get: Callable[[], str]) -> str:
    """A value, or what CuPy says where it has none: `info` is there for machines that are not set up well."""
    try:
        return get()
    except Exception as error:  # a library that cannot be loaded raises anything
        return f"not found ({error!r})"


def version(number: int) -> str:
    """A version of CUDA from how CUDA numbers it: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cache_folder() -> str:
    """Where CuPy keeps what it has compiled."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") not in ("", "0"):
        return "kept in memory alone (CUPY_CACHE_IN_MEMORY)"
    return os.environ.get("CUPY_CACHE_DIR") or str(Path.home() / ".cupy" / "kernel_cache")


def describe(properties: dict[str, Any]) -> str:
    """A GPU in a line."""
    return (
        f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}, "
        f"{properties['multiProcessorCount']} multiprocessors, {properties['totalGlobalMem'] / 2**30:.0f} GiB, "
        f"{properties['l2CacheSize'] / MIB:.0f} MiB of L2"
    )
