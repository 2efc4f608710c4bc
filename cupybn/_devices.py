"""Kinds of arrays and names of devices. CuPy is imported only when somebody asks for a CUDA device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import re
from collections import deque
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

_KNOWN = "'cpu', 'cuda', 'cuda:0', 'cuda:1', ..."
_INSTALL = "`pip install cupybn[cuda12]` or `cupybn[cuda13]` installs the CuPy for that version of CUDA"


def kind(array: object) -> str | None:
    """``"numpy"``, ``"cupy"``, or None for anything else."""
    cls: Any = type(array)
    return _kind_of(cls)


@functools.cache
def _kind_of(cls: Any) -> str | None:
    """Asked of the class: of an array, the interface would be made anew each time."""
    if issubclass(cls, np.ndarray):
        return None if issubclass(cls, (np.ma.MaskedArray, np.matrix)) else "numpy"  # of rules of their own
    of_cupy = cls.__module__.partition(".")[0] == "cupy" and hasattr(cls, "__cuda_array_interface__")
    return "cupy" if of_cupy else None


def describe(array: object) -> str:
    """What an error message calls an argument: its kind and where it lives."""
    known = kind(array)
    if known == "numpy":
        return "NumPy array"
    if known == "cupy":
        return f"CuPy array on {device_of(array)}"
    return type(array).__qualname__


def device_of(array: Any) -> str:
    """The device of an array: ``"cpu"`` or ``"cuda:N"``."""
    return "cpu" if kind(array) == "numpy" else f"cuda:{array.device.id}"


def resolve_device(device: str | None) -> str:
    """``"cpu"`` or ``"cuda:N"`` for the device that the user named; None is the current CUDA device if there is one.

    Raises
    ------
    ValueError
        If this is not the name of a device.
    RuntimeError
        If the device is not there: what is missing, and which extra installs it.
    """
    if device is None:
        return f"cuda:{import_cupy().cuda.runtime.getDevice()}" if not cuda_missing() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f"unknown device {device!r}: expected one of {_KNOWN}")
    if device == "cpu":
        return "cpu"
    missing = cuda_missing()
    if missing:
        raise RuntimeError(f"device {device!r} is not available: {missing}")
    runtime = import_cupy().cuda.runtime
    index = runtime.getDevice() if match[1] is None else int(match[1])
    if index >= runtime.getDeviceCount():
        raise RuntimeError(f"device {device!r} is not available: {runtime.getDeviceCount()} CUDA devices were found")
    return f"cuda:{index}"


@functools.cache
def cuda_missing() -> str:
    """Why no CUDA device can be used, and what to do about it; an empty string if one can."""
    try:
        cupy = import_cupy()
    except Exception as error:  # a CuPy that cannot be used raises anything: no library, no cache folder, a bad wheel
        return f"CuPy cannot be imported ({error!r}); {_INSTALL}"
    if not cupy.cuda.is_available():
        return f"CuPy finds no CUDA device or driver; {_INSTALL}"
    return ""


def empty(shape: tuple[int, ...], like: Any, dtype: npt.DTypeLike | None = None) -> Any:
    """A new array of the kind of another one, on the current device, and with its dtype unless told otherwise."""
    xp = np if kind(like) == "numpy" else import_cupy()
    return xp.empty(shape, like.dtype if dtype is None else dtype)


def empty_like(vector: Any) -> Any:
    """A new C-contiguous array of the same shape, dtype and kind, on the current device."""
    return empty(vector.shape, vector)


def zeros_like(vector: Any) -> Any:
    """The same, of zeros."""
    zeros = empty_like(vector)
    zeros.fill(0)
    return zeros


def copied(vector: Any) -> Any:
    """A C-contiguous copy on the current device."""
    copy = empty_like(vector)
    copy[...] = vector
    return copy


def write_at_once(written: Iterable[tuple[Any, Any]]) -> None:
    """Fill arrays with values of their own shapes and dtypes.

    Those of NumPy get all or none: an interrupt comes between two steps of Python, and this is a single one.
    """
    arrays, values = zip(*written, strict=True)
    deque(map(operator.setitem, arrays, itertools.repeat(...), values), maxlen=0)


def current(array: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of an array is the current one."""
    if kind(array) == "numpy" or array.data.device_id == import_cupy().cuda.runtime.getDevice():
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = array.device
    return device


def full(shape: tuple[int, ...], value: float, dtype: np.dtype[Any], device: str) -> Any:
    """A new array on a device."""
    if device == "cpu":
        return np.full(shape, value, dtype)
    with import_cupy().cuda.Device(_index(device)):
        return import_cupy().full(shape, value, dtype)


def transfer(array: Any, dtype: np.dtype[Any], device: str) -> Any:
    """A copy on a device, with a dtype, of anything that ``numpy.asarray`` takes, or of a CuPy array."""
    if kind(array) == "cupy" and device != "cpu":
        with import_cupy().cuda.Device(_index(device)):
            return import_cupy().array(array, dtype)
    with np.errstate(all="ignore"):  # what the dtype does not hold becomes inf
        host = np.asarray(array.get() if kind(array) == "cupy" else array).astype(dtype)
    if device == "cpu":
        return host
    with import_cupy().cuda.Device(_index(device)):
        return import_cupy().asarray(host)


def _index(device: str) -> int:
    return int(device.removeprefix("cuda:"))


@functools.cache
def import_cupy() -> ModuleType:
    """CuPy, for those who know by now that it is wanted."""
    import cupy

    return cupy  # type: ignore[no-any-return]
