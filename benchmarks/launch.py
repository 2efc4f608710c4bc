"""Host time of a call on CuPy arrays: its checks, plans and checked launches, without CuPy and without a GPU.

    python benchmarks/launch.py

Arrays are objects with the attributes of CuPy's arrays; allocation and the launch itself do nothing: add CuPy's own
time for those. Microseconds for one call, the least of several rounds.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import timeit
import types
from typing import Any

import numpy as np

CALLS, ROUNDS = 200, 90


_addresses = itertools.count(1 << 40, 1 << 32)
"""Addresses of arrays: none overlaps another one."""


class ndarray:  # noqa: N801 - as CuPy calls it
    """An array in the place of CuPy's, with the attributes that a call looks at."""

    __module__ = "cupy"
    __cuda_array_interface__ = None

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.ndim, self.size, self.itemsize = len(shape), math.prod(shape), self.dtype.itemsize
        self.strides = tuple(math.prod(shape[i + 1 :]) * self.itemsize for i in range(len(shape)))
        self.nbytes = self.size * self.itemsize
        self.flags = types.SimpleNamespace(c_contiguous=True)
        self.data = types.SimpleNamespace(ptr=next(_addresses), device_id=0)
        self.device = types.SimpleNamespace(id=0)

    def transpose(self, *_: Any) -> ndarray:
        """The array itself: those below are contiguous, and stay so."""
        return self

    def reshape(self, shape: tuple[int, ...]) -> ndarray:
        """The array itself if it has this shape, else the one that `cupy.empty` returns for it."""
        return self if shape == self.shape else sys.modules["cupy"].empty(shape, self.dtype)


class RawKernel:
    """A kernel that does nothing."""

    def __init__(self, *_: Any) -> None:
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        """Do nothing in the place of a launch."""


def pretend_cupy() -> None:
    """Put a module into the place of CuPy."""
    cupy: Any = types.ModuleType("cupy")
    cupy.empty = functools.cache(ndarray)  # one array for each shape: the time to make one is CuPy's own
    runtime = types.SimpleNamespace(getDevice=lambda: 0, deviceGetAttribute=lambda attribute, _: attribute)
    runtime.cudaDevAttrMultiProcessorCount = 132  # attributes are their own numbers here
    runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin = 227 << 10
    runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor = 228 << 10
    device = types.SimpleNamespace(compute_capability="90")
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda _: device)
    cupy.RawKernel = RawKernel
    sys.modules["cupy"], sys.modules["cupy.cuda"] = cupy, cupy.cuda


def main() -> None:
    pretend_cupy()
    from cupybn import functional
    from cupybn._steps import cupy_ops, launcher
    from cupybn._steps.bundles import Affine, Epilogue, Running

    x, vectors, counter = ndarray((32, 64, 56, 56), "f4"), [ndarray((64,), "f4") for _ in range(4)], ndarray((), "i8")
    flat, y = ndarray((32, 64, 3136), "f4"), ndarray((32, 64, 3136), "f4")
    moments = cupy_ops.bn_stats(flat, counter)
    mean, var, weight, bias = vectors
    launches = []
    launch = launcher.Kernel.launch
    launcher.Kernel.launch = lambda *args: launches.append(args)
    affine, running = Affine(weight, bias, 1e-5), Running(mean, var, 0.1, counter)
    cupy_ops.bn_normalize(flat, moments, affine, running, Epilogue(), y)
    launcher.Kernel.launch = launch
    _, vjp_fn = functional.batch_norm_vjp(x, *vectors, True)
    cases = {
        f"checked launch of bn_normalize, {len(launches[0][3])} arguments": lambda: launch(*launches[0]),
        "batch_norm, training": lambda: functional.batch_norm(x, *vectors, True),
        "batch_norm, inference": lambda: functional.batch_norm(x, *vectors),
        "vjp_fn": lambda: vjp_fn(x),
    }
    for name, call in cases.items():
        call()
        print(f"{min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6:6.1f} us  {name}")


if __name__ == "__main__":
    main()
