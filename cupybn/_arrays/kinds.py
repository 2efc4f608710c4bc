"""Kinds of arrays: NumPy's or CuPy's, plain or derived, and what messages call them, without an import of CuPy."""

from __future__ import annotations

import contextlib
import functools
import numbers
from typing import Any

import numpy as np

DLPACK_ON_HOST = 1
"""The kind of device that DLPack calls kDLCPU."""


def kind(array: object) -> str | None:
    """``"numpy"``, ``"cupy"``, or None for anything else."""
    cls: Any = type(array)
    return _kind_of(cls)


@functools.cache
def _kind_of(cls: Any) -> str | None:
    """Asked of the class: of an array, the interface would be made anew each time."""
    if issubclass(cls, np.ndarray):
        return None if issubclass(cls, (np.ma.MaskedArray, np.matrix)) else "numpy"  # of rules of their own
    of_many_devices = any(base.__module__.startswith("cupyx.") for base in cls.__mro__)
    return None if of_many_devices or _cupy_class(cls) is None else "cupy"


def _cupy_class(cls: Any) -> Any:
    """``cupy.ndarray`` if this is it or a class derived from it, else None. CuPy is not imported to find out."""
    for base in cls.__mro__:
        if base.__name__ == "ndarray" and base.__module__.partition(".")[0] == "cupy":
            return base
    return None


@functools.cache
def is_derived(cls: Any) -> bool:
    """Whether this is a class of arrays, but not that of NumPy or CuPy itself."""
    return _kind_of(cls) is not None and cls is not np.ndarray and cls is not _cupy_class(cls)


def plain(array: Any) -> Any:
    """The same memory as an array of the class of its kind: derived classes may compute by rules of their own.

    Anything else is returned as it is.
    """
    cls: Any = type(array)
    if not is_derived(cls):
        return array
    if _kind_of(cls) == "numpy":
        return np.ndarray.view(array, np.ndarray)
    return _cupy_class(cls)(array.shape, array.dtype, array.data, array.strides)


def describe(array: object) -> str:
    """What an error message calls an argument: its kind and where it lives."""
    known = kind(array)
    if known == "numpy":
        return "NumPy array"
    if known == "cupy":
        return f"CuPy array on {device_of(array)}"
    return type(array).__qualname__


def show(value: object) -> str:
    """What an error message says of a value: its text if that is short, and no array is read for it, or its class."""
    simple = (str, bytes, numbers.Number, type(None))
    if isinstance(value, (list, tuple)) and not all(isinstance(part, simple) for part in value):
        return type(value).__qualname__
    cls = type(value)
    if kind(value) is not None or hasattr(cls, "__dlpack__") or hasattr(cls, "__cuda_array_interface__"):
        return describe(value)
    try:
        text = repr(value)
    except Exception:  # whatever it raises, be it for a number of too many digits
        return cls.__qualname__
    return text if len(text) <= 80 else cls.__qualname__


def from_dlpack(name: str, value: Any) -> str:
    """How to make an array of what knows DLPack: part of an error message."""
    on_host = True
    with contextlib.suppress(Exception):
        on_host = value.__dlpack_device__()[0] == DLPACK_ON_HOST
    with contextlib.suppress(Exception):
        if value.requires_grad is True:  # PyTorch does not hand these out
            name += ".detach()"
    return f"{'numpy' if on_host else 'cupy'}.from_dlpack({name})"


def device_of(array: Any) -> str:
    """The device of an array: ``"cpu"`` or ``"cuda:N"``."""
    return "cpu" if kind(array) == "numpy" else f"cuda:{array.device.id}"
