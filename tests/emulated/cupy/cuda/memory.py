"""Where arrays get their memory from."""

from __future__ import annotations

from collections.abc import Callable

from cupy._memory import ALIGNMENT, Allocation, MemoryPointer, usage
from cupy.cuda import runtime

Allocator = Callable[[int], MemoryPointer]


class MemoryPool:
    """The pool of all devices. It keeps nothing that is not in use, so that every new array is poisoned."""

    def malloc(self, size: int) -> MemoryPointer:
        """Memory of the current device."""
        return MemoryPointer(Allocation(int(size), runtime.getDevice()), 0)

    def used_bytes(self) -> int:
        """What the current device's arrays take, as whole blocks of 512 bytes."""
        return -(-usage(runtime.getDevice()).live_bytes // ALIGNMENT) * ALIGNMENT

    total_bytes = used_bytes

    def free_bytes(self) -> int:
        """Bytes that are kept though no array needs them: none."""
        return 0

    def free_all_blocks(self, stream: object = None) -> None:
        """Nothing to do: nothing is kept."""


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
