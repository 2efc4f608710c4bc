"""The part of ``cupy.cuda`` that the stand-in has."""

import contextlib
from collections.abc import Callable, Iterator

from cupy._memory import MemoryPointer, UnownedMemory
from cupy.cuda import driver, function, memory, runtime
from cupy.cuda.device import Device
from cupy.cuda.graph import Graph
from cupy.cuda.memory import MemoryPool, alloc, get_allocator, set_allocator
from cupy.cuda.pinned_memory import PinnedMemoryPointer, alloc_pinned_memory
from cupy.cuda.stream import Event, Stream, get_current_stream, get_elapsed_time

__all__ = [
    "Device",
    "Event",
    "Graph",
    "MemoryPointer",
    "MemoryPool",
    "PinnedMemoryPointer",
    "Stream",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "driver",
    "function",
    "get_allocator",
    "get_current_stream",
    "get_elapsed_time",
    "is_available",
    "runtime",
    "set_allocator",
    "using_allocator",
]


def is_available() -> bool:
    """Whether there is a device."""
    try:
        return runtime.getDeviceCount() > 0
    except runtime.CUDARuntimeError:
        return False


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> Iterator[None]:
    """A context in which this thread allocates memory by this function; None is the default pool."""
    before = memory._get_thread_local_allocator()
    memory._set_thread_local_allocator(memory._pool.malloc if allocator is None else allocator)
    try:
        yield
    finally:
        memory._set_thread_local_allocator(before)
