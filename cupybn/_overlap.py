"""Which arrays of a call share memory: what is written to one of them changes the other one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cupybn._devices import kind

Array = Any  # numpy.ndarray or cupy.ndarray

MOST_WORK = 1000
"""Steps of NumPy's search for a common element, after which two arrays count as overlapping."""


def overlapping(arrays: Mapping[str, Array | None], others: Mapping[str, Array | None]) -> list[str]:
    """The names of the arrays that have an element in common with one of the others, if that has another name.

    All are of one kind. Addresses are compared: nothing on a device is read.
    """
    first = next((array for array in others.values() if array is not None), None)
    if first is None:
        return []
    place: Callable[[Array], Any] = _owner if kind(first) == "numpy" else _span
    near: Callable[[Any, Any], bool] = _may_share if kind(first) == "numpy" else _meet
    places = {name: place(array) for name, array in {**arrays, **others}.items() if array is not None}
    return [
        name
        for name, array in arrays.items()
        if array is not None
        and any(
            name != other and near(places[name], places[other]) and _common_element(array, others[other])
            for other in others
            if others[other] is not None
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Quickly, for most arrays. On the host: which array owns the memory. (Its address takes NumPy a microsecond.)


def _owner(array: Array) -> int | None:
    """The array itself, if it owns its memory; None if nothing is known."""
    return id(array) if array.flags.owndata else None


def _may_share(owner: int | None, other: int | None) -> bool:
    return owner is None or other is None or owner == other


# On a device: where it begins and ends.


def _span(array: Array) -> tuple[int, int]:
    below, above = _extent(array.shape, array.strides, array.itemsize)
    address: int = array.data.ptr
    return address - below, address + above


def _meet(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span[0] < other[1] and other[0] < span[1]


@functools.lru_cache(maxsize=4096)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The bytes of an array that lie before and behind the address of its first element."""
    if 0 in shape:
        return 0, 0
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return -sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps) + itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Exactly


def _common_element(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(_on_host(a), _on_host(b), max_work=MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _on_host(array: Array) -> Array:
    """The array, or one of NumPy at the same addresses, which cannot be read."""
    if kind(array) == "numpy":
        return array

    class Memory:
        __array_interface__ = {  # noqa: RUF012 - as NumPy wants it
            "version": 3,
            "data": (array.data.ptr, True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
        }

    return np.asarray(Memory())
