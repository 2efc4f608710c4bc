"""Arrays of the stand-in that are larger than memory: they have addresses for all elements, and memory for some."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

import cupy as cp
import numpy as np
import numpy.typing as npt
from cupy import _memory

PACK = 16
"""Bytes that a kernel moves at once: with an element it reads its neighbours in the same pack."""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

Ranges = list[tuple[int, int]]
"""Places in memory, as pairs of a first place and the one after a last place, in order; no two pairs touch."""


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The places in some ranges, which may touch and overlap, in as few ranges as can be."""
    result: Ranges = []
    for begin, end in sorted(ranges):
        first, before = result.pop() if result and begin <= result[-1][1] else (begin, end)
        result.append((first, max(end, before)))
    return result


class Sparse(_memory.Allocation):
    """Memory of a device of which kernels may touch some parts; an access to the rest is out of bounds.

    Attributes
    ----------
    parts : Ranges
        Addresses that kernels may touch.
    """

    def __init__(self, nbytes: int, device: int = 0) -> None:
        self.nbytes, self.device = nbytes, device
        self.host, self.initialised = _reserve(nbytes), _reserve(nbytes)
        self.ptr = self.host.__array_interface__["data"][0]  # where a page begins
        self.parts: Ranges = []
        self._complete = False
        self.arrays = WeakValueDictionary()
        _memory._keep_track(self)

    def __del__(self) -> None:
        """Nothing is given back: this memory was not counted."""

    def visible(self, begin: int, end: int) -> Ranges:
        """The parts between two addresses, as far as they lie there."""
        return [(max(begin, a), min(end, b)) for a, b in self.parts if a < end and begin < b]


def _reserve(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, for which the system provides memory when they are touched, in small pages."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def sparse(shape: tuple[int, ...], dtype: npt.DTypeLike, parts: Iterable[tuple[int, int]], offset: int = 0) -> Any:
    """An array of which some elements have memory: those of the given ranges of places, and their neighbours in packs.

    What they hold is poison, and reading it before it is written is an error.

    Parameters
    ----------
    offset : int
        Elements between the begin of memory, which is aligned, and that of the array.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=object))
    memory = Sparse((size + offset) * dtype.itemsize + PACK)
    for begin, end in merged(parts):
        assert 0 <= begin < end <= size
        first = (begin + offset) * dtype.itemsize // PACK * PACK
        last = -(-(end + offset) * dtype.itemsize // PACK) * PACK
        memory.host[first:last] = _memory.POISON
        memory.parts.append((first + memory.ptr, last + memory.ptr))
    memory.parts = merged(memory.parts)
    return cp.ndarray(shape, dtype, _memory.MemoryPointer(memory, offset * dtype.itemsize))


def fill(array: Any, draw: Callable[[int], npt.NDArray[Any]]) -> Any:
    """Set all elements that have memory, neighbours as well, to what `draw` returns for a number of elements."""
    memory, flat = array._allocation, array._host.reshape(-1)
    for begin, end in memory.parts:
        memory.initialised[begin - memory.ptr : end - memory.ptr] = 1
        first, last = (at // array.itemsize for at in (begin - array.data.ptr, end - array.data.ptr))
        elements = flat[max(first, 0) : last]
        elements[...] = draw(elements.size)
    return array


def written(array: Any) -> Ranges:
    """The places in memory of the elements that were written."""
    memory = array._allocation
    ranges = []
    for begin, end in memory.parts:
        flags = memory.initialised[begin - memory.ptr : end - memory.ptr].astype(np.int8)
        edges = np.flatnonzero(np.diff(flags, prepend=0, append=0)) + begin - array.data.ptr
        ranges += [(int(a), int(b)) for a, b in edges.reshape(-1, 2) // array.itemsize]
    return merged(ranges)
