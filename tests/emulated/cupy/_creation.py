"""Functions that create device arrays."""

# The parameters are CuPy's, whether they are used here or not.
# ruff: noqa: ARG001

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import cupy
from cupy import _dtypes
from cupy._run import _leaves, run
from cupy.cuda.stream import note_set

Shape = int | tuple[int, ...]
DType = npt.DTypeLike | None


def empty(shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> Any:
    """A new array whose elements are not initialised."""
    return cupy.ndarray(shape, dtype, order=order)


def full(shape: Shape, fill_value: Any, dtype: DType = None, order: str = "C") -> Any:
    """A new array of one value."""
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, cupy.ndarray) else np.asarray(fill_value).dtype
    array = empty(shape, dtype, order)
    array.fill(fill_value)
    return array


def zeros(shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> Any:
    """A new array of zeros."""
    return full(shape, 0, dtype, order)


def ones(shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> Any:
    """A new array of ones."""
    return full(shape, 1, dtype, order)


def empty_like(
    prototype: Any, dtype: DType = None, order: str = "K", subok: bool | None = None, shape: Shape | None = None
) -> Any:
    """A new array with the shape, dtype and order of another one, not initialised."""
    if not isinstance(prototype, cupy.ndarray):
        raise TypeError(f"Unsupported type {type(prototype)}")
    dtype = prototype.dtype if dtype is None else _dtypes.supported(dtype)
    pattern = np.empty_like(prototype._host, dtype, order.upper(), shape=shape)  # type: ignore[call-overload]
    return cupy.ndarray(pattern.shape, dtype, strides=pattern.strides)


def full_like(
    a: Any,
    fill_value: Any,
    dtype: DType = None,
    order: str = "K",
    subok: bool | None = None,
    shape: Shape | None = None,
) -> Any:
    """A new array of one value with the shape, dtype and order of another one."""
    array = empty_like(a, dtype, order, subok, shape)
    array.fill(fill_value)
    return array


def zeros_like(
    a: Any, dtype: DType = None, order: str = "K", subok: bool | None = None, shape: Shape | None = None
) -> Any:
    """Zeros with the shape, dtype and order of another array."""
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(
    a: Any, dtype: DType = None, order: str = "K", subok: bool | None = None, shape: Shape | None = None
) -> Any:
    """Ones with the shape, dtype and order of another array."""
    return full_like(a, 1, dtype, order, subok, shape)


def array(
    obj: Any,
    dtype: DType = None,
    copy: bool | None = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> Any:
    """An array on the current device with the elements of an array or of nested lists."""
    if isinstance(obj, cupy.ndarray):
        result = _from_device(obj, dtype, copy, order)
    elif isinstance(obj, (list, tuple)) and any(isinstance(leaf, cupy.ndarray) for leaf in _leaves(obj)):
        result = run(lambda obj: np.array(obj, dtype), (obj,))
    else:
        host = np.array(obj, dtype, order=order.upper())  # type: ignore[call-overload]
        note_set()
        result = cupy.ndarray(host.shape, host.dtype, strides=_dense_strides(host, order))
        result._host[...] = host
        result._mark()
    return result.reshape((1,) * (ndmin - result.ndim) + result.shape) if ndmin > result.ndim else result


def asarray(
    a: Any,
    dtype: DType = None,
    order: str | None = None,
    *,
    copy: bool | None = None,
    blocking: bool = False,
) -> Any:
    """The array itself if it is on a device and has this dtype and order, else a copy on the current device."""
    return array(a, dtype, copy, order or "K")


def ascontiguousarray(a: Any, dtype: DType = None) -> Any:
    """The array itself if it is contiguous in C's order, else a copy that is."""
    return asarray(a, dtype, "C")


def asfortranarray(a: Any, dtype: DType = None) -> Any:
    """The array itself if it is contiguous in Fortran's order, else a copy that is."""
    return asarray(a, dtype, "F")


def asnumpy(a: Any, stream: Any = None, order: Any = "C", out: Any = None, *, blocking: bool = True) -> Any:
    """The elements as a NumPy array."""
    if isinstance(a, cupy.ndarray):
        return a.get(stream, order, out, blocking)
    if out is None:
        return np.asarray(a, order=order)
    np.copyto(out, a)
    return out


def get_array_module(*args: Any) -> Any:
    """This module if any argument is a device array, else NumPy."""
    return cupy if any(isinstance(arg, cupy.ndarray) for arg in args) else np


def _from_device(obj: Any, dtype: DType, copy: bool | None, order: str) -> Any:
    dtype = obj.dtype if dtype is None else _dtypes.supported(dtype)
    if not copy:
        return obj.astype(dtype, order, copy=False)
    here = obj if obj._allocation.device == cupy.cuda.runtime.getDevice() else obj.copy(order)
    return here.astype(dtype, order)


def _dense_strides(host: Any, order: str) -> tuple[int, ...]:
    return np.empty_like(host, order=order.upper()).strides  # type: ignore[call-overload,no-any-return]
