"""Names of devices, and arrays on them. CuPy is imported only when somebody asks for a CUDA device."""

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

from cupybn._arrays.kinds import kind, show

_KNOWN = "'cpu', 'cuda', 'cuda:0', 'cuda:1', ..."
_INSTALL = (
    "`pip install '.[cuda12]'` or `pip install '.[cuda13]'`, in a clone of cupybn, installs the CuPy for that version "
    "of CUDA"
)


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
    return named_device(device)


def named_device(device: str) -> str:
    """The device of a name, as `resolve_device` has it: None is not one."""
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
    """What a name of a device says, if it is one."""
    return re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)


def _meant(device: object) -> str:
    """The name that was meant by a number, or by what reads like a name, as a device of PyTorch does."""
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
    """Why no CUDA device can be used, and what to do about it; an empty string if one can."""
    try:
        cupy = import_cupy()
    except Exception as error:  # a CuPy that cannot be used raises anything: no library, no cache folder, a bad wheel
        return f"CuPy cannot be imported ({error!r}); {_INSTALL}"
    try:
        if not cupy.cuda.is_available():
            return f"CuPy finds no CUDA device or driver; {_INSTALL}"
        cupy.cuda.runtime.getDevice()
    except Exception as error:  # half a CuPy: a folder of that name, an installation that broke off, a driver at fault
        place = getattr(cupy, "__file__", None) or ", ".join(getattr(cupy, "__path__", ()))
        return f"the module 'cupy' in {place} cannot be used ({error!r}); {_INSTALL}"
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
