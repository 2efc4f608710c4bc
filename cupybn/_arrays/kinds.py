"""Kinds of arrays, NumPy's or CuPy's, and the words for them in error messages. CuPy is never imported for this."""

from __future__ import annotations

import contextlib
import functools
import numbers
from typing import Any

import numpy as np

DLPACK_ON_HOST = 1
"""Number that DLPack has for the host's memory, kDLCPU."""


def kind(array: object) -> str | None:
    """Kind of an array: ``"numpy"``, ``"cupy"``, or None for anything else."""
    cls: Any = type(array)
    return _kind_of(cls)


@functools.cache
def _kind_of(cls: Any) -> str | None:
    """Kind of an array by its class.

    Looks at the class: reading the interface of an array builds a dict at every call.
    """
    if issubclass(cls, np.ndarray):
        return None if issubclass(cls, (np.ma.MaskedArray, np.matrix)) else "numpy"  # both compute by other rules
    of_many_devices = any(base.__module__.startswith("cupyx.") for base in cls.__mro__)
    return None if of_many_devices or _cupy_class(cls) is None else "cupy"


def _cupy_class(cls: Any) -> Any:
    """The class ``cupy.ndarray`` if this is it or derived from it, else None. Found by name, without importing CuPy."""
    for base in cls.__mro__:
        if base.__name__ == "ndarray" and base.__module__.partition(".")[0] == "cupy":
            return base
    return None


@functools.cache
def is_derived(cls: Any) -> bool:
    """Whether this class is derived from ``numpy.ndarray`` or ``cupy.ndarray``, and is neither of them itself."""
    return _kind_of(cls) is not None and cls is not np.ndarray and cls is not _cupy_class(cls)


def plain(array: Any) -> Any:
    """View of an array of a derived class as a plain ``numpy.ndarray`` or ``cupy.ndarray``; other objects as they are.

    Derived classes may compute by rules of their own.
    """
    cls: Any = type(array)
    if not is_derived(cls):
        return array
    if _kind_of(cls) == "numpy":
        return np.ndarray.view(array, np.ndarray)
    return _cupy_class(cls)(array.shape, array.dtype, array.data, array.strides)


def describe(array: object) -> str:
    """Words for an argument in an error message: kind and device of an array, or the name of another class."""
    known = kind(array)
    if known == "numpy":
        return "NumPy array"
    if known == "cupy":
        return f"CuPy array on {device_of(array)}"
    return type(array).__qualname__


def show(value: object) -> str:
    """Words for a value in an error message: its ``repr`` if that is short and reads no array, else its class."""
    simple = (str, bytes, numbers.Number, type(None))
    if isinstance(value, (list, tuple)) and not all(isinstance(part, simple) for part in value):
        return type(value).__qualname__
    cls = type(value)
    if kind(value) is not None or hasattr(cls, "__dlpack__") or hasattr(cls, "__cuda_array_interface__"):
        return describe(value)
    try:
        text = repr(value)
    except Exception:  # any class raises what it likes, and Python itself does for an int of too many digits
        return cls.__qualname__
    return text if len(text) <= 80 else cls.__qualname__


def from_dlpack(name: str, value: Any) -> str:
    """Call that turns an object with ``__dlpack__`` into an array, as an error message recommends it."""
    on_host = True
    with contextlib.suppress(Exception):
        on_host = value.__dlpack_device__()[0] == DLPACK_ON_HOST
    with contextlib.suppress(Exception):
        if value.requires_grad is True:  # PyTorch exports no tensor that is part of a graph of autograd
            name += ".detach()"
    return f"{'numpy' if on_host else 'cupy'}.from_dlpack({name})"


def device_of(array: Any) -> str:
    """Device of an array: ``"cpu"`` or ``"cuda:N"``."""
    return "cpu" if kind(array) == "numpy" else f"cuda:{array.device.id}"
