"""Arguments of kernels that a program has wrapped itself, as CuPy wraps what it is given."""

from __future__ import annotations

from typing import Any

__all__ = ["CNumpyArray", "CPointer"]


class CPointer:
    """Something that a kernel is launched with as it is."""


class CNumpyArray(CPointer):
    """The memory of a NumPy array, whose first bytes a kernel gets by value: as many as its parameter has.

    They are read at the launch, not when this is made.
    """

    def __init__(self, v: Any) -> None:
        v.__array_interface__["data"][0]  # as in CuPy, whatever has none of these is refused
        self._val = v
