"""Pretended device memory: blocks of host memory that record which of their bytes were written."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from cupy._errors import CUDARuntimeError, DetailError

if TYPE_CHECKING:
    from cupy import ndarray
    from cupy.cuda import Stream

ALIGNMENT = 512  # bytes of which all addresses are a multiple, as in CuPy's memory pool
GUARD = 512
POISON = 0xFF  # value of unwritten bytes: such elements are NaN in every float dtype

Bytes = npt.NDArray[np.uint8]


class UninitialisedMemoryError(RuntimeError):
    """An error: a program read elements that nobody had written."""


class Allocation:
    """A block of a device's memory, between two guards.

    Attributes
    ----------
    device : int
    nbytes : int
        Size of the block, as it was asked for.
    ptr : int
        The address of the first byte, a multiple of 512.
    host : (nbytes,) uint8 array
        Bytes of the block.
    initialised : (nbytes,) uint8 array
        1 for every byte that was written, else 0.
    arrays : WeakValueDictionary
        The arrays in this memory that are alive, by their identity.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes, self.device = nbytes, device
        self._buffer = np.full(GUARD + ALIGNMENT + nbytes + GUARD, POISON, np.uint8)
        base = self._buffer.__array_interface__["data"][0]
        self.ptr = base + GUARD + -(base + GUARD) % ALIGNMENT
        self._start = self.ptr - base
        self.host: Bytes = self._buffer[self._start : self._start + nbytes]
        self.initialised: Bytes = np.zeros(nbytes, np.uint8)
        self._complete = nbytes == 0
        self.arrays: WeakValueDictionary[int, ndarray] = WeakValueDictionary()
        _keep_track(self)
        _count(device, nbytes)

    def __del__(self) -> None:
        if hasattr(self, "initialised"):  # false if the allocation itself failed
            # No lock is taken: the garbage collector may run this at any time.
            _released.append((self.device, self.nbytes))

    @property
    def complete(self) -> bool:
        """Whether every byte was written; the answer yes is kept, so that it is quick."""
        self._complete = self._complete or bool(self.initialised.all())
        return self._complete

    def visible(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of the memory between two addresses that a kernel may touch, by address."""
        return [(begin, end)]

    def guards_intact(self) -> bool:
        """Whether nothing was written right before and right after the block."""
        before, after = self._buffer[: self._start], self._buffer[self._start + self.nbytes :]
        return bool((before == POISON).all() and (after == POISON).all())


class ForeignMemory(Allocation):
    """Memory that others own: no guards, and all of it may have been written.

    What is taken for a device's memory is that of the host, as everywhere in the stand-in.
    """

    def __init__(self, ptr: int, nbytes: int, device: int, owner: object) -> None:
        self.ptr, self.nbytes, self.device, self.owner = ptr, nbytes, device, owner
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(ptr)) if nbytes else np.empty(0, "u1")
        self.initialised = np.ones(nbytes, np.uint8)
        self._complete = True
        self.arrays = WeakValueDictionary()
        if nbytes:
            _keep_track(self)

    def __del__(self) -> None:
        """Nothing is to be counted: this is not the device's own memory."""

    def guards_intact(self) -> bool:
        """Whether nothing was written around the block: nobody could tell."""
        return True


class UnownedMemory:
    """Memory that another library owns, for arrays in it."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        from cupy.cuda import runtime

        if device_id < 0 and ptr == 0:
            raise RuntimeError("UnownedMemory requires explicit device ID for a null pointer.")
        self._foreign = ForeignMemory(ptr, size, runtime.getDevice() if device_id < 0 else device_id, owner)


class MemoryPointer:
    """An address within an allocation."""

    __slots__ = ("mem", "ptr")

    def __init__(self, mem: Allocation | UnownedMemory, offset: int) -> None:
        mem = mem._foreign if isinstance(mem, UnownedMemory) else mem
        self.mem = mem
        self.ptr = mem.ptr + offset if mem.nbytes else 0  # CuPy allocates nothing for an empty array

    @property
    def device_id(self) -> int:
        """The number of the device."""
        return self.mem.device

    @property
    def device(self) -> Any:
        """The device."""
        from cupy.cuda import Device

        return Device(self.mem.device)

    def memset(self, value: int, size: int) -> None:
        """Set `size` bytes from here on."""
        from cupy.cuda import Stream, get_current_stream

        if get_current_stream().is_capturing():
            raise RuntimeError("the current stream is capturing, so synchronous API calls are disallowed")
        Stream.null._enqueue(self._memset(value, size), "memset")

    def memset_async(self, value: int, size: int, stream: Stream | None = None) -> None:
        """Set `size` bytes from here on, or note it where the stream is being captured."""
        from cupy.cuda import get_current_stream

        stream = get_current_stream() if stream is None else stream
        stream._enqueue(self._memset(value, size), "memset_async")

    def _memset(self, value: int, size: int) -> Callable[[], None]:
        if size == 0:
            return lambda: None
        found = span(self.ptr, size)
        if found is None:
            raise CUDARuntimeError(1) from DetailError(f"no {size} bytes of an array at {self.ptr:#x}")
        return lambda: found.write(np.uint8(value & 0xFF))


class Span(NamedTuple):
    """Some bytes of an allocation, which is kept alive as long as this is."""

    allocation: Allocation
    start: int
    nbytes: int

    def read(self) -> bytes:
        """The bytes; an error unless all of them were written."""
        where = slice(self.start, self.start + self.nbytes)
        if not self.allocation._complete:
            missing = self.nbytes - np.count_nonzero(self.allocation.initialised[where])
            if missing:
                raise UninitialisedMemoryError(
                    f"{missing} of {self.nbytes} bytes that were read on device {self.allocation.device} "
                    "were never written"
                )
        return self.allocation.host[where].tobytes()

    def write(self, data: npt.ArrayLike) -> None:
        """Set the bytes, and note that they were written."""
        where = slice(self.start, self.start + self.nbytes)
        self.allocation.host[where] = data
        self.allocation.initialised[where] = 1


def span(ptr: int, nbytes: int) -> Span | None:
    """The bytes from an address on, if one live allocation contains all of them."""
    allocation = find(ptr)
    if allocation is None or not 0 <= nbytes <= allocation.ptr + allocation.nbytes - ptr:
        return None
    return Span(allocation, ptr - allocation.ptr, nbytes)


def find(ptr: int) -> Allocation | None:
    """The live allocation that contains an address; the address right behind its last byte is outside."""
    if not _bounds[0] <= ptr < _bounds[1]:  # most numbers in structs are far from any address
        return None
    begins = _live.get(ptr)
    if begins is not None and begins.nbytes:
        return begins
    for reference in _live.valuerefs():  # at once: other threads may allocate
        allocation = reference()
        if allocation is not None and allocation.ptr <= ptr < allocation.ptr + allocation.nbytes:
            return allocation
    return None


def _keep_track(allocation: Allocation) -> None:
    with _lock:
        _bounds[:] = min(_bounds[0], allocation.ptr), max(_bounds[1], allocation.ptr + allocation.nbytes)
    _live[allocation.ptr] = allocation


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@dataclass
class Usage:
    """Bytes of one device's memory as they were asked for; `peak_bytes` and `total_bytes` count from the last reset."""

    live_bytes: int = 0
    peak_bytes: int = 0
    total_bytes: int = 0
    allocations: int = 0


def usage(device: int = 0) -> Usage:
    """A snapshot of what a device's arrays take now, and of the most that they took."""
    with _lock:
        _settle()
        return Usage(**vars(_usage.setdefault(device, Usage())))


def reset_usage(device: int = 0) -> None:
    """Reset the counters of a device: the peak becomes what is in use now."""
    with _lock:
        _settle()
        live = _usage.setdefault(device, Usage()).live_bytes
        _usage[device] = Usage(live, live)


def _count(device: int, nbytes: int) -> None:
    with _lock:
        _settle()
        use = _usage.setdefault(device, Usage())
        use.live_bytes += nbytes
        use.total_bytes += nbytes
        use.allocations += 1
        use.peak_bytes = max(use.peak_bytes, use.live_bytes)


def _settle() -> None:
    while _released:
        device, nbytes = _released.popleft()
        _usage[device].live_bytes -= nbytes


_lock = threading.Lock()
_live: WeakValueDictionary[int, Allocation] = WeakValueDictionary()
_bounds = [2**64, 0]
"""Addresses between which all allocations lie that there have been."""
_released: deque[tuple[int, int]] = deque()
_usage: dict[int, Usage] = {}
