"""Names of devices, and arrays on them. CuPy is imported only if a CUDA device or a CuPy array comes up."""

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

from cupybn._arrays.kinds import kind, plain, show

_KNOWN = "'cpu', 'cuda', 'cuda:0', 'cuda:1', ..."
"""Names of devices, for error messages."""
_INSTALL = (
    "`pip install '.[cuda12]'` or `pip install '.[cuda13]'`, in a clone of cupybn, installs the CuPy for that version "
    "of CUDA"
)
"""Advice for error messages where there is no usable CuPy."""


def resolve_device(device: str | None) -> str:
    """Full name, ``"cpu"`` or ``"cuda:N"``, of the device that a user chose. None is the current CUDA device, if any.

    Raises
    ------
    ValueError
        If this is not the name of a device.
    RuntimeError
        If the device is not available. The message says what is missing, and which extra installs it.
    """
    if device is None:
        return f"cuda:{import_cupy().cuda.runtime.getDevice()}" if not cuda_missing() else "cpu"
    return named_device(device)


def named_device(device: str) -> str:
    """Full name of a device, like `resolve_device`, but None is an error."""
    match = _match(device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f"unknown device {show(device)}: expected one of {_KNOWN}{_meant(device)}")
    if device == "cpu":
        return "cpu"
    missing = cuda_missing()
    if missing:
        raise RuntimeError(f"device {device!r} is not available: {missing}")
    runtime = import_cupy().cuda.runtime
    index = runtime.getDevice() if match[1] is None else int(match[1])
    if index >= runtime.getDeviceCount():
        found = ", ".join(f"'cuda:{i}'" for i in range(runtime.getDeviceCount()))
        raise RuntimeError(f"device {device!r} is not available: the CUDA devices are {found}")
    return f"cuda:{index}"


def _match(name: str) -> re.Match[str] | None:
    """Match with the number of the CUDA device as its group; None if this is not the name of a device."""
    return re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)


def _meant(device: object) -> str:
    """Hint at the name that was meant by a number, a device of CuPy or PyTorch, or a misspelt name, if it is clear."""
    cls = type(device)
    if cls.__module__.partition(".")[0] == "cupy":
        device = getattr(device, "id", None)
    if isinstance(device, (int, np.integer)):
        name = f"cuda:{device}"
    elif isinstance(device, str) or cls.__name__ == "device":
        name = ""
        with contextlib.suppress(Exception):
            name = str(device).strip().lower().replace("gpu", "cuda").replace(" ", ":")
    else:
        return ""
    return f"; did you mean {name!r}?" if _match(name) else ""


@functools.cache
def cuda_missing() -> str:
    """Reason why no CUDA device can be used, and what to do about it; an empty string if one can."""
    try:
        cupy = import_cupy()
    except Exception as error:  # any class: a library or the cache folder may be missing, the wheel may be damaged
        return f"CuPy cannot be imported ({error!r}); {_INSTALL}"
    try:
        if not cupy.cuda.is_available():
            return f"CuPy finds no CUDA device or driver; {_INSTALL}"
        cupy.cuda.runtime.getDevice()
    except Exception as error:  # the module may be a folder of that name or half installed, or the driver may fail
        place = getattr(cupy, "__file__", None) or ", ".join(getattr(cupy, "__path__", ()))
        return f"the module 'cupy' in {place} cannot be used ({error!r}); {_INSTALL}"
    return ""


def module_of(array: Any) -> ModuleType:
    """The module, NumPy or CuPy, that an array is of."""
    return np if isinstance(array, np.ndarray) else import_cupy()


def empty(shape: tuple[int, ...], like: Any, dtype: npt.DTypeLike | None = None) -> Any:
    """New array, uninitialised, of the kind of ``like`` and on the current device; of its dtype if none is given."""
    return module_of(like).empty(shape, like.dtype if dtype is None else dtype)


def empty_like(vector: Any) -> Any:
    """New array, uninitialised and C-contiguous, with the shape, dtype and kind of this one, on the current device."""
    return empty(vector.shape, vector)


def zeros_like(vector: Any) -> Any:
    """New C-contiguous array of zeros with the shape, dtype and kind of this one, on the current device."""
    zeros = empty_like(vector)
    zeros.fill(0)
    return zeros


def copied(vector: Any) -> Any:
    """C-contiguous copy on the current device."""
    copy = empty_like(vector)
    copy[...] = vector
    return copy


def write_at_once(written: Iterable[tuple[Any, Any]]) -> None:
    """Copy values into arrays, given as pairs (array, value) of one shape and dtype.

    Ctrl-C leaves NumPy arrays all written or all unwritten: Python handles it between two instructions of its
    interpreter, and here a single one writes everything.
    """
    arrays, values = zip(*written, strict=True)
    deque(map(operator.setitem, arrays, itertools.repeat(...), values), maxlen=0)


_HERE = contextlib.nullcontext()
"""Context that changes nothing."""


def on_device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """Context in which the device of this array is the current CUDA device; for NumPy arrays it changes nothing."""
    if isinstance(array, np.ndarray) or array.data.device_id == import_cupy().cuda.runtime.getDevice():
        return _HERE
    device: contextlib.AbstractContextManager[Any] = array.device
    return device


def full(shape: tuple[int, ...], value: float, dtype: np.dtype[Any], device: str) -> Any:
    """New array on a device, filled with a value."""
    if device == "cpu":
        return np.full(shape, value, dtype)
    with import_cupy().cuda.Device(_index(device)):
        return import_cupy().full(shape, value, dtype)


def transfer(array: Any, dtype: np.dtype[Any], device: str) -> Any:
    """Copy, on a device and with a dtype, of a CuPy array or anything that ``numpy.asarray`` takes."""
    array = plain(array)
    if kind(array) == "cupy" and device != "cpu":
        with import_cupy().cuda.Device(_index(device)):
            return import_cupy().array(array, dtype, order="C")  # CuPy brings a view from another GPU in no other order
    with np.errstate(all="ignore"):  # numbers too large for the dtype become inf, without a warning
        host = np.asarray(array.get() if kind(array) == "cupy" else array).astype(dtype)
    if device == "cpu":
        return host
    with import_cupy().cuda.Device(_index(device)):
        return import_cupy().asarray(host)


def _index(device: str) -> int:
    """Number of a CUDA device from its full name."""
    return int(device.removeprefix("cuda:"))


@functools.cache
def import_cupy() -> ModuleType:
    """The module CuPy, imported on first use: call this only once it is clear that a GPU is wanted."""
    import cupy

    return cupy  # type: ignore[no-any-return]
