"""Host memory that a device can copy to and from without a detour: here, host memory like any other."""

from __future__ import annotations

import ctypes

from cupy._memory import POISON
from cupy.cuda import runtime
from cupy.cuda._capture import check, status_of_unsafe_call


class PinnedMemoryPointer(bytearray):
    """A buffer that NumPy's arrays can be made of."""

    @property
    def ptr(self) -> int:
        """The address of the first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self)) if self else 0

    def size(self) -> int:
        """The number of bytes."""
        return len(self)


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    """So many bytes, poisoned as those of devices are."""
    check(status_of_unsafe_call(runtime.getDevice()), "cudaHostAlloc")
    return PinnedMemoryPointer(bytes([POISON]) * size)
