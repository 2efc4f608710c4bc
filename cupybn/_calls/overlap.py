"""Overlap of arrays: which of a call's arrays share memory, so that writing to one changes another.

Only addresses are compared; no array on a device is read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.kinds import kind, plain

Array = Any  # numpy.ndarray or cupy.ndarray

MOST_WORK = 1000
"""Steps that NumPy may take to look for a common element of two arrays. Without an answer they count as overlapping."""


class Extent(NamedTuple):
    """Range of memory of an array: its first byte and the one after its last, relative to its element 0."""

    begin: int
    end: int

    @classmethod
    def of(cls, array: Array) -> Extent:
        """Extent of an array. With negative strides, memory begins before element 0."""
        if array.size == 0:
            return cls(0, 0)
        steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
        return cls(sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps) + array.itemsize)


def may_overlap(arrays: Sequence[Array], extents: Iterable[Extent]) -> bool:
    """Whether any two of these arrays may have an element in common: a quick test, which may err towards True.

    Extents are those of the arrays; NumPy's do without.
    """
    if isinstance(arrays[0], np.ndarray):
        # Two arrays that own their memory never share it; NumPy compares the ends of others in no time.
        if len({*map(id, arrays)}) < len(arrays):
            return True
        if all(array.flags.owndata for array in arrays):
            return False
        arrays = [*map(plain, arrays)]
        views = [array for array in arrays if not array.flags.owndata]
        return any(a is not b and np.may_share_memory(a, b) for a in views for b in arrays)
    return Spans.of(extents).overlap([array.data.ptr for array in arrays])


class Spans(NamedTuple):
    """Memory of arrays, relative to the address of each: where it begins, and its length."""

    begins: list[int] | None  # None for zeros, as there are without negative strides
    lengths: list[int]

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Spans:
        """The spans of arrays with these extents."""
        begins, ends = zip(*extents, strict=True)
        return cls([*begins] if any(begins) else None, [end - begin for begin, end in zip(begins, ends, strict=True)])

    def overlap(self, addresses: Iterable[int]) -> bool:
        """Whether the memory of two arrays at these addresses, between its ends, has a part in common."""
        begins, lengths = self
        if begins is not None:
            addresses = map(operator.add, addresses, begins)
        reached = 0
        for begin, length in sorted(zip(addresses, lengths)):  # noqa: B905 - it would take longer
            if begin < reached:
                return True
            reached = begin + length
        return False


def _span(array: Array, extent: Extent) -> tuple[int, int]:
    """Addresses at which an array on a device begins and ends."""
    address: int = array.data.ptr
    return address + extent[0], address + extent[1]


def overlapping(arrays: Mapping[str, Array], others: Mapping[Any, Array]) -> list[str]:
    """Names of the arrays that have an element in common with one of the others that has another name."""
    return [
        name
        for name, array in arrays.items()
        if any(name != other_name and _common_element(array, other) for other_name, other in others.items())
    ]


def _common_element(a: Array, b: Array) -> bool:
    """Whether two arrays have an element in common, or it would take too long to find out."""
    if kind(a) != kind(b):
        return False
    if kind(a) == "cupy":
        (begin, end), (other_begin, other_end) = _span(a, Extent.of(a)), _span(b, Extent.of(b))
        if end <= other_begin or other_end <= begin:
            return False
        a, b = _on_host(a), _on_host(b)
    try:
        return np.shares_memory(plain(a), plain(b), max_work=MOST_WORK)  # type: ignore[arg-type, unused-ignore]  # wrong in 2.4 alone
    except np.exceptions.TooHardError:
        return True


def _on_host(array: Array) -> Array:
    """NumPy array with the addresses of an array on a device. Its elements must not be read: the host cannot."""
    interface = {
        "version": 3,
        "data": (array.data.ptr, True),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.itemsize}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
