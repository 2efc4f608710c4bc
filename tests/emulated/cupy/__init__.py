"""A stand-in for CuPy whose devices are made of host memory, for machines without a GPU.

With ``PYTHONPATH=tests/emulated`` a program that uses the part of CuPy which is here runs unchanged. The module
`emulator` chooses the devices and tells what the program did with them.
"""

from typing import Any

from numpy import generic

from cupy import cuda, emulator
from cupy._creation import (
    array,
    asarray,
    ascontiguousarray,
    asfortranarray,
    asnumpy,
    empty,
    empty_like,
    full,
    full_like,
    get_array_module,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from cupy._dlpack import from_dlpack
from cupy._functions import astype, can_cast, copy, copyto, lookup, result_type, ufunc
from cupy._ndarray import ndarray
from cupy._raw import RawKernel, RawModule
from cupy.cuda import MemoryPool, memory

__version__ = "14.2.0"

from cupy import lib  # imports names that `ndarray` defines

__all__ = [
    "RawKernel",
    "RawModule",
    "array",
    "asarray",
    "ascontiguousarray",
    "asfortranarray",
    "asnumpy",
    "astype",
    "can_cast",
    "copy",
    "copyto",
    "cuda",
    "empty",
    "empty_like",
    "emulator",
    "from_dlpack",
    "full",
    "full_like",
    "generic",
    "get_array_module",
    "get_default_memory_pool",
    "lib",
    "ndarray",
    "ones",
    "ones_like",
    "result_type",
    "ufunc",
    "zeros",
    "zeros_like",
]


def get_default_memory_pool() -> MemoryPool:
    """The pool that arrays come from unless `cuda.set_allocator` says otherwise."""
    return memory._pool


def __getattr__(name: str) -> Any:
    return lookup(name)
