"""Pinned memory: host memory that a device copies to and from directly. Here it is host memory like any other."""

from __future__ import annotations

import ctypes

from cupy._memory import POISON
from cupy.cuda import runtime
from cupy.cuda._capture import check, status_of_unsafe_call

__all__ = ["PinnedMemoryPointer", "alloc_pinned_memory"]


class PinnedMemoryPointer(bytearray):
    """A buffer of host memory, from which NumPy arrays can be made."""

    @property
    def ptr(self) -> int:
        """The address of the first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self)) if self else 0

    def size(self) -> int:
        """The number of bytes."""
        return len(self)


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    """Allocate host memory, filled with the same poison as a device's."""
    check(status_of_unsafe_call(runtime.getDevice()), "cudaHostAlloc")
    return PinnedMemoryPointer(bytes([POISON]) * size)
