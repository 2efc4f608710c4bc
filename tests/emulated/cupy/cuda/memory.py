"""Where arrays get their memory from."""

from __future__ import annotations

from collections.abc import Callable

from cupy._memory import ALIGNMENT, Allocation, MemoryPointer, usage
from cupy.cuda import runtime
from cupy.cuda._capture import check, status_of_unsafe_call

Allocator = Callable[[int], MemoryPointer]


class MemoryPool:
    """The pool of all devices. It keeps nothing that is not in use, so that every new array is poisoned.

    CuPy's pool keeps what is freed: CUDA hears only of an allocation with which more is in use than ever before. In a
    capture that is not relaxed, such a one is forbidden.
    """

    def __init__(self) -> None:
        self._most: dict[int, int] = {}  # bytes that each device has given

    def malloc(self, size: int) -> MemoryPointer:
        """Memory of the current device."""
        size, device = int(size), runtime.getDevice()
        used = usage(device).live_bytes + size
        if used > self._most.get(device, 0):
            check(status_of_unsafe_call(device), "cudaMalloc")
            self._most[device] = used
        return MemoryPointer(Allocation(size, device), 0)

    def used_bytes(self) -> int:
        """What the current device's arrays take, as whole blocks of 512 bytes."""
        return -(-usage(runtime.getDevice()).live_bytes // ALIGNMENT) * ALIGNMENT

    total_bytes = used_bytes

    def free_bytes(self) -> int:
        """Bytes that are kept though no array needs them: none."""
        return 0

    def free_all_blocks(self, stream: object = None) -> None:  # noqa: ARG002
        """Forget what the devices have given."""
        self._most.clear()


_pool = MemoryPool()
_allocator: Allocator = _pool.malloc


def get_default_memory_pool() -> MemoryPool:
    """The pool that arrays come from unless `set_allocator` says otherwise."""
    return _pool


def get_allocator() -> Allocator:
    """What arrays get their memory from."""
    return _allocator


def set_allocator(allocator: Allocator | None = None) -> None:
    """Get memory of new arrays by calling this with a number of bytes; None is the default pool."""
    global _allocator
    _allocator = _pool.malloc if allocator is None else allocator


def alloc(size: int) -> MemoryPointer:
    """Memory of the current device."""
    return _allocator(size)
