"""The real CuPy where it is installed: with a GPU all of it, without one all but what needs the driver.

Without a GPU arrays are CuPy's, but at addresses that nobody dereferences, and a launch goes through
`cupy.cuda.function.Function` up to the place where it would call the driver: all arguments have been wrapped by then.
It raises there, which costs time of its own: `launch_nothing` tells how much. Left out, beside what the driver does:

* `malloc` of the memory pool: an allocator hands out prepared addresses;
* how `RawKernel` finds the kernel of the current device, and how `cupy.cuda.runtime` asks which one that is.

The device is an H100: which kernels are chosen depends on it.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

_on_gpu = False
_function: Any = None
"""CuPy's `Function`, without a kernel."""
_error: type[Exception] = Exception
"""Class of the error that its launch ends with."""
_addresses = itertools.count(1 << 40, 1 << 32)
"""Addresses of arrays: none overlaps another one."""
PREPARED = 4096
"""Number of the addresses that the allocator hands out in turn."""
ATTRIBUTES = {
    "MultiProcessorCount": 132,
    "MaxSharedMemoryPerBlockOptin": 227 << 10,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
}
"""Attributes of an H100."""


class Stream:
    """The stream of a launch that does not take place."""

    ptr = 0


class Device(contextlib.nullcontext):
    """A device, and the context in which it is the current one."""

    compute_capability = "90"

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.id = index


class RawKernel:
    """A kernel whose launch ends where the driver would begin."""

    wraps = True
    """Whether a launch gets as far as that. Otherwise it does nothing at all."""
    launches = 0
    """Launches of all kernels, those of `launch_nothing` included."""

    def __init__(self, *_: Any) -> None:
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        """Wrap the arguments."""
        RawKernel.launches += 1
        if RawKernel.wraps:
            try:  # noqa: SIM105 - costs less than contextlib.suppress
                _function(grid, block, args, shared_mem=shared_mem, stream=Stream)
            except _error:
                pass


def prepare() -> str:
    """Replace what needs a GPU, where there is none, and say in words what is measured."""
    global _on_gpu, _function, _error
    import cupy

    _on_gpu = cupy.cuda.is_available()
    if _on_gpu:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return f"CuPy {cupy.__version__} on {name}"
    function: Any = cupy.cuda.function.Function
    _function = function.__new__(function)
    _error = _error_of_a_launch()
    _check_that_arguments_are_wrapped()
    pointers = itertools.cycle([_pointer() for _ in range(PREPARED)])
    cupy.cuda.set_allocator(lambda _: next(pointers))
    cupy.full = lambda shape, _, dtype: array(shape, dtype)
    cupy.RawKernel, cupy.cuda.Device, cupy.cuda.is_available = RawKernel, Device, lambda: True
    runtime = cupy.cuda.runtime
    runtime.getDevice, runtime.getDeviceCount = lambda: 0, lambda: 1
    values = {getattr(runtime, f"cudaDevAttr{name}"): value for name, value in ATTRIBUTES.items()}
    runtime.deviceGetAttribute = lambda attribute, _: values[attribute]
    return f"CuPy {cupy.__version__} up to the driver, without a GPU"


def _error_of_a_launch() -> type[Exception]:
    """Class of the error that a launch ends with, once its arguments have been wrapped."""
    try:
        _function((1,), (1,), (), shared_mem=0, stream=Stream)
    except Exception as error:
        return type(error)
    raise AssertionError("a launch without a kernel has succeeded")


def _check_that_arguments_are_wrapped() -> None:
    """Give a launch what CuPy does not take as an argument: it must say so before it ends."""
    try:
        RawKernel()((1,), (1,), (np.zeros(2),))
    except TypeError:
        return
    raise AssertionError("an array of two elements has been taken by value")


def _pointer() -> Any:
    """Pointer to memory of its own, which is not there."""
    from cupy.cuda.memory import MemoryPointer, UnownedMemory

    return MemoryPointer(UnownedMemory(next(_addresses), 1 << 31, None, 0), 0)


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of its own."""
    import cupy

    return cupy.zeros(shape, dtype) if _on_gpu else cupy.ndarray(shape, dtype, memptr=_pointer())


def on_gpu() -> bool:
    """Whether launches are real."""
    return _on_gpu


def launch_nothing() -> None:
    """Launch without arguments: what a launch costs that is not CuPy's way with arguments."""
    RawKernel()((1,), (32,), [], shared_mem=0)


def wait() -> None:
    """Wait until all that has been launched is done."""
    if _on_gpu:
        import cupy

        cupy.cuda.Device().synchronize()
