"""Allocators of the memory of arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cupy._memory import ALIGNMENT, Allocation, MemoryPointer, UnownedMemory, usage
from cupy.cuda import runtime
from cupy.cuda._capture import check, status_of_unsafe_call

__all__ = ["MemoryPointer", "MemoryPool", "UnownedMemory", "alloc", "get_allocator", "set_allocator"]

Allocator = Callable[[int], MemoryPointer]


class MemoryPool:
    """The pool of all devices. It keeps nothing that is not in use, so that every new array is poisoned.

    CuPy's pool keeps what is freed: CUDA hears only of an allocation with which more is in use than ever before. In a
    capture that is not relaxed, such a one is forbidden.
    """

    def __init__(self) -> None:
        self._most: dict[int, int] = {}  # most bytes that each device has given

    def malloc(self, size: int) -> MemoryPointer:
        """Allocate memory of the current device."""
        size, device = int(size), runtime.getDevice()
        used = usage(device).live_bytes + size
        if used > self._most.get(device, 0):
            check(status_of_unsafe_call(device), "cudaMalloc")
            self._most[device] = used
        return MemoryPointer(Allocation(size, device), 0)

    def used_bytes(self) -> int:
        """Bytes of the current device that its arrays take, as whole blocks of 512 bytes."""
        return -(-usage(runtime.getDevice()).live_bytes // ALIGNMENT) * ALIGNMENT

    total_bytes = used_bytes

    def free_bytes(self) -> int:
        """Bytes that the pool keeps though no array needs them: none."""
        return 0

    def free_all_blocks(self, stream: object = None) -> None:  # noqa: ARG002
        """Forget what the devices have given, as if it were given back."""
        self._most.clear()


_pool = MemoryPool()
_allocator: Allocator = _pool.malloc
_inside = threading.local()
"""Holder of the allocator of the context that a thread is in, if it is in one."""


def get_allocator() -> Allocator:
    """The function that allocates the memory of arrays."""
    return _get_thread_local_allocator() or _allocator


def set_allocator(allocator: Allocator | None = None) -> None:
    """Set the function that allocates memory, which takes a number of bytes; None is the default pool."""
    global _allocator
    if _get_thread_local_allocator() is not None:
        raise ValueError("Can't change the global allocator inside `using_allocator` context manager")
    _allocator = _pool.malloc if allocator is None else allocator


def _get_thread_local_allocator() -> Allocator | None:
    """The allocator of the context that this thread is in, if it is in one."""
    return getattr(_inside, "allocator", None)


def _set_thread_local_allocator(allocator: Allocator | None) -> None:
    _inside.allocator = allocator


def alloc(size: int) -> MemoryPointer:
    """Allocate memory of the current device from the current allocator."""
    return get_allocator()(size)
