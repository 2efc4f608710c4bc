"""Show what is found on this machine: versions, GPUs, kernels."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cupybn
from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._cli.extras import optional
from cupybn._steps.sources import KERNELS, kernel_names
from cupybn._steps.tiles import num_threads

MIB = 1 << 20

USAGE = "[options]"
MISSING = {
    "ml_dtypes": "not found, `pip install '.[bf16]'` installs it",
    "mpi4py": "not found, `pip install '.[mpi]'` installs it",
    "safetensors": "not found, `pip install '.[safetensors]'` installs it",
}
"""Texts in place of the versions of optional libraries that are missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `info` to its parser."""
    parser.add_argument("--json", action="store_true", help="one JSON object, with null for what is not there")


def run(options: argparse.Namespace) -> int:
    """Print a line for each thing that is looked for: what was found, or why nothing was. Returns the exit status."""
    if options.json:
        print(json.dumps(facts(), indent=2))
        return 0
    for name, value in lines():
        print(f"{name + ':':26}{value}")
    return 0


def facts() -> dict[str, Any]:
    """Facts about this machine, under the same keys on every machine; None for what is not there."""
    missing = cuda_missing()
    threads, wrong = None, {}
    try:
        threads = num_threads()
    except ValueError as error:
        wrong["threads"] = str(error)
    here: dict[str, Any] = {
        "cupybn": cupybn.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "numpy": np.__version__,
        "ml_dtypes": getattr(optional("ml_dtypes"), "__version__", None),
        "mpi4py": getattr(optional("mpi4py"), "__version__", None),
        "safetensors": getattr(optional("safetensors"), "__version__", None),
        "threads": threads,
        "kernels": len(kernel_names()),
        "kernel_folder": str(KERNELS),
        "cupy_missing": missing or None,
    }
    on_gpu = dict.fromkeys(("cupy", "stand_in", "cuda_driver", "cuda_runtime", "nvrtc", "nccl", "kernel_cache"))
    known = {**here, **on_gpu, **({"not_found": {}, "gpus": []} if missing else cupy_facts())}
    known["not_found"] |= wrong
    return known


def cupy_facts() -> dict[str, Any]:
    """Facts that need a CuPy that finds a GPU."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    found: dict[str, str] = {}
    not_found: dict[str, str] = {}
    versions: dict[str, Callable[[], str]] = {
        "cuda_driver": lambda: version(runtime.driverGetVersion()),
        "cuda_runtime": lambda: version(runtime.runtimeGetVersion()),
        "nvrtc": lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "nccl": nccl_version,
    }
    for name, get in versions.items():
        try:
            found[name] = get()
        except Exception as error:  # a library that cannot be loaded raises anything
            not_found[name] = repr(error)
    return {
        "cupy": cupy.__version__,
        "stand_in": hasattr(cupy, "emulator"),
        **found,
        "kernel_cache": cache_folder(),
        "not_found": not_found,
        "gpus": [gpu(runtime.getDeviceProperties(index)) for index in range(runtime.getDeviceCount())],
    }


def lines() -> Iterator[tuple[str, str]]:
    """Yield names and values of the facts as people read them."""
    known = facts()
    yield "cupybn", known["cupybn"]
    yield "Python", f"{known['python']} on {known['machine']}"
    yield "NumPy", known["numpy"]
    yield "bfloat16 (ml_dtypes)", known["ml_dtypes"] or MISSING["ml_dtypes"]
    yield "mpi4py", known["mpi4py"] or MISSING["mpi4py"]
    yield "safetensors", known["safetensors"] or MISSING["safetensors"]
    yield "threads on the CPU", str(known["threads"] or f"none: {known['not_found']['threads']}")
    yield "kernels", f"{known['kernels']} in {known['kernel_folder']}"
    if known["cupy_missing"]:
        yield "CuPy", f"cannot be used: {known['cupy_missing']}"
        yield "GPU", "none that can be used: calls on NumPy arrays use the NumPy mirrors of the kernels"
        return
    stand_in = " (the stand-in, which runs kernels on the CPU)" if known["stand_in"] else ""
    yield "CuPy", f"{known['cupy']}{stand_in}"
    for name, key in (
        ("CUDA driver supports", "cuda_driver"),
        ("CUDA runtime", "cuda_runtime"),
        ("NVRTC", "nvrtc"),
        ("NCCL", "nccl"),
    ):
        yield name, known[key] or f"not found ({known['not_found'][key]})"
    yield "compiled kernels", known["kernel_cache"]
    for index, properties in enumerate(known["gpus"]):
        yield f"GPU {index}", describe(properties)


def nccl_version() -> str:
    """Version of NCCL, such as 2.27.3."""
    from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError("this CuPy was built without it")
    number = nccl.get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def version(number: int) -> str:
    """Version of CUDA from the number that CUDA has for it: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cache_folder() -> str:
    """Folder in which CuPy keeps compiled kernels."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") not in ("", "0"):
        return "kept in memory alone (CUPY_CACHE_IN_MEMORY)"
    return os.environ.get("CUPY_CACHE_DIR") or str(Path.home() / ".cupy" / "kernel_cache")


def gpu(properties: dict[str, Any]) -> dict[str, Any]:
    """Facts about one GPU."""
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
    }


def describe(gpu: dict[str, Any]) -> str:
    """Facts about one GPU in a line of text."""
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['l2_bytes'] / MIB:.0f} MiB of L2"
    )
