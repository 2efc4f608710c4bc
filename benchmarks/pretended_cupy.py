"""A module in the place of CuPy whose arrays have no memory and whose launches do nothing: what is left is our Python.

Without CuPy and without a GPU. CuPy's own part, such as allocation and launches, is what `real_cupy` adds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

_addresses = itertools.count(1 << 40, 1 << 32)
"""Addresses of arrays: none overlaps another one."""
PREPARED = 8
"""Number of arrays of a shape and dtype that `empty` has."""


class ndarray:  # noqa: N801 - as CuPy calls it
    """An array in the place of CuPy's, with the attributes that a call looks at."""

    __module__ = "cupy"
    __cuda_array_interface__ = None

    def __init__(
        self, shape: int | tuple[int, ...], dtype: Any = "f8", memptr: Any = None, strides: Any = None
    ) -> None:
        shape = (shape,) if isinstance(shape, int) else shape
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.ndim, self.size, self.itemsize = len(shape), math.prod(shape), self.dtype.itemsize
        dense = tuple(math.prod(shape[i + 1 :]) * self.itemsize for i in range(len(shape)))
        self.strides = dense if strides is None else strides
        self.nbytes = self.size * self.itemsize
        self.flags = types.SimpleNamespace(c_contiguous=self.strides == dense)
        self.data = types.SimpleNamespace(ptr=next(_addresses), device_id=0) if memptr is None else memptr
        self.device = types.SimpleNamespace(id=0)
        self._views: dict[tuple[int, ...], ndarray] = {}

    def transpose(self, *_: Any) -> ndarray:
        """The array itself: those that are measured are contiguous, and stay so."""
        return self

    def reshape(self, *shape: Any) -> ndarray:
        """View of this shape, which is made once: the time to make one is CuPy's own."""
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        if shape == self.shape:
            return self
        view = self._views.get(shape)
        if view is None:
            view = self._views[shape] = ndarray(shape, self.dtype, self.data)
        return view

    def __getitem__(self, key: int | slice) -> ndarray:
        """View of an element of the first axis, or of several in their order."""
        first, shape = key, self.shape[1:]
        if isinstance(key, slice):
            first, stop, _ = key.indices(self.shape[0])
            shape = stop - first, *shape
        ptr = self.data.ptr + first * self.strides[0]
        return ndarray(shape, self.dtype, types.SimpleNamespace(ptr=ptr, device_id=0))


def empty(shape: int | tuple[int, ...], dtype: Any = "f8") -> ndarray:
    """An array that was made before: the time to make one is CuPy's own."""
    return next(_prepared(shape, dtype))


@functools.cache
def _prepared(shape: int | tuple[int, ...], dtype: Any) -> Iterator[ndarray]:
    """Arrays that `empty` returns in turn."""
    return itertools.cycle([ndarray(shape, dtype) for _ in range(PREPARED)])


class RawKernel:
    """A kernel that does nothing."""

    def __init__(self, *_: Any) -> None:
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        """Do nothing in the place of a launch."""


class CNumpyArray:
    """A NumPy array that goes by value."""

    def __init__(self, array: Any) -> None:
        self.array = array


class Device(contextlib.nullcontext):
    """A device, and the context in which it is the current one."""

    compute_capability = "90"

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.id = index


def prepare() -> str:
    """Put the module into the place of CuPy, and say in words what is measured with it."""
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.RawKernel = ndarray, RawKernel
    cupy.empty = empty
    cupy.full = lambda shape, _, dtype: ndarray(shape, dtype)
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0, getDeviceCount=lambda: 1, deviceGetAttribute=lambda attribute, _: attribute
    )
    runtime.cudaDevAttrMultiProcessorCount = 132  # attributes are their own numbers here
    runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin = 227 << 10
    runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor = 228 << 10
    function = types.SimpleNamespace(CNumpyArray=CNumpyArray)
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=Device, function=function, is_available=lambda: True)
    sys.modules["cupy"], sys.modules["cupy.cuda"] = cupy, cupy.cuda
    return "our own Python, on pretended arrays"


def array(shape: tuple[int, ...], dtype: Any) -> ndarray:
    """An array of its own."""
    return ndarray(shape, dtype)


def wait() -> None:
    """Wait for nothing: nothing has been launched."""
