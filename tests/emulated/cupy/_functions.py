"""CuPy's functions on device arrays, made from NumPy's of the same name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from typing import Any

import numpy as np

import cupy
from cupy._run import run
from cupy.cuda.stream import note_get


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HOST = _names(
    """
    e euler_gamma inf nan newaxis pi dtype finfo iinfo generic number integer signedinteger unsignedinteger inexact
    floating complexfloating bool bool_ int8 int16 int32 int64 intp intc int_ byte short long longlong uint8 uint16
    uint32 uint64 uintp uintc uint ubyte ushort ulong ulonglong half single double float16 float32 float64 csingle
    cdouble complex64 complex128 broadcast_shapes promote_types issubdtype isdtype isscalar iterable ndindex s_
    index_exp printoptions set_printoptions get_printoptions
    """
)
"""Names that CuPy takes from NumPy unchanged."""

VIEWS = _names(
    """
    transpose permute_dims matrix_transpose reshape ravel broadcast_to broadcast_arrays expand_dims squeeze swapaxes
    moveaxis rollaxis atleast_1d atleast_2d atleast_3d flip fliplr flipud rot90 split array_split hsplit vsplit dsplit
    diagonal real imag sliding_window_view shape ndim size may_share_memory shares_memory iscomplexobj isrealobj
    isfortran
    """
)
"""Functions that return a view where they can, and then read no element."""

DELEGATED = _names("transpose reshape ravel squeeze swapaxes diagonal")
"""Functions that call the method of their own name, by the rules of whatever class the array is of."""

CALLS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("broadcast_to", "moveaxis", "rollaxis", "split"), lambda array: array.view()),
    "permute_dims": lambda array: array.transpose(),
    "matrix_transpose": lambda array: array.swapaxes(-1, -2),
    "flip": lambda array: array[...],
    "rot90": lambda array: array[...].transpose(),
}
"""Calls that other functions make, likewise by the rules of the array's class."""

CREATION = _names("arange linspace logspace eye identity tri indices bartlett blackman hamming hanning kaiser")

WAITING = _names(
    """
    nonzero flatnonzero argwhere extract compress unique unique_all unique_counts unique_inverse unique_values
    intersect1d setdiff1d setxor1d union1d trim_zeros bincount
    """
)
"""Functions whose result has a shape that depends on the elements, so that the host waits for it."""

ABSENT = _names("isnat matvec spacing vecdot vecmat")
"""Universal functions of NumPy that CuPy does not have."""

SCATTERS = _names("add subtract maximum minimum bitwise_and bitwise_or bitwise_xor")
"""Universal functions whose `at` CuPy has."""

SCALARS = _names("allclose array_equal array_equiv count_nonzero")
"""Functions that return a Python scalar in NumPy and an array without dimensions in CuPy."""

OTHERS = _names(
    """
    all any amax amin max min argmax argmin nanmax nanmin nanargmax nanargmin ptp percentile quantile sum prod nansum
    nanprod cumsum cumprod nancumsum nancumprod cumulative_sum cumulative_prod mean median average var std nanmean
    nanmedian nanvar nanstd diff ediff1d gradient trapezoid where select choose take take_along_axis searchsorted sort
    argsort partition argpartition lexsort concatenate concat stack hstack vstack dstack column_stack append delete
    repeat tile resize roll pad clip nan_to_num round around real_if_close isclose isin dot vdot inner outer matmul
    tensordot kron cross einsum trace diag diagflat tril triu vander meshgrid interp convolve correlate corrcoef cov
    histogram digitize sinc i0 angle unwrap isneginf isposinf iscomplex isreal apply_along_axis tril_indices
    triu_indices diag_indices ravel_multi_index unravel_index packbits unpackbits fix
    """
)


@functools.cache
def lookup(name: str) -> Any:
    """The object that ``cupy.name`` is; AttributeError for what NumPy or this stand-in does not have."""
    if name in HOST:
        return getattr(np, name)
    theirs = getattr(np, name, None)
    if isinstance(theirs, np.ufunc) and name not in ABSENT:
        return ufunc(theirs)
    if theirs is None or name not in VIEWS | CREATION | WAITING | SCALARS | OTHERS:
        raise AttributeError(f"the stand-in for the module 'cupy' has no attribute {name!r}")
    return lift(theirs)


def lift(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function of NumPy made into one of device arrays."""
    name = theirs.__name__

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        if name not in CREATION and args and _is_host_data(args[0]):
            raise TypeError(f"Unsupported type {type(args[0])}")
        if name in WAITING:
            note_get(name)
        if args and _is_derived(args[0]):
            if name in DELEGATED:
                return getattr(args[0], name)(*args[1:], **kwargs)
            if name in CALLS:
                CALLS[name](args[0])
        if name in SCALARS:
            return run(lambda *args, **kwargs: np.asarray(theirs(*args, **kwargs)), args, kwargs)
        return run(theirs, args, kwargs, view=name in VIEWS)

    function.__module__ = "cupy"
    return function


def _is_derived(array: Any) -> bool:
    """Whether this is a device array of a class that is derived from CuPy's own."""
    return isinstance(array, cupy.ndarray) and type(array) is not cupy.ndarray


def _is_host_data(value: Any) -> bool:
    """Whether a value is an array or a list of numbers in host memory."""
    if isinstance(value, (list, tuple)):
        return bool(value) and not any(isinstance(item, (cupy.ndarray, list, tuple)) for item in value)
    return isinstance(value, np.ndarray)


class ufunc:  # noqa: N801 - as CuPy has it
    """A universal function on device arrays and scalars."""

    def __init__(self, theirs: np.ufunc) -> None:
        self._theirs = theirs
        self.__name__, self.__doc__ = theirs.__name__, theirs.__doc__
        self.nin, self.nout = theirs.nin, theirs.nout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._theirs.signature is None and not kwargs.keys() <= {"out", "dtype", "casting"}:
            raise TypeError(f"Wrong arguments {kwargs}")
        args, outs = args[: self.nin], args[self.nin :]
        if outs:
            kwargs["out"] = outs if self.nout > 1 else outs[0]
        self._reject_host_data(args)
        out = kwargs.get("out")
        shape = (
            np.broadcast_shapes(*(getattr(x, "shape", ()) for x in args)) if self._theirs.signature is None else None
        )
        if shape is not None and isinstance(out, cupy.ndarray) and out.shape != shape:
            raise ValueError("Out shape is mismatched")
        if out is None:
            kwargs.pop("out", None)
        return run(self._theirs, args, kwargs)

    def __repr__(self) -> str:
        return f"<ufunc 'cupy_{self.__name__}'>"

    def reduce(self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        """Reduce like :meth:`numpy.ufunc.reduce`; CuPy does for sums and products alone."""
        self._expect("reduce", {"add", "multiply"})
        self._reject_host_data((array,))
        return run(self._theirs.reduce, (array, axis, dtype), {"out": out, "keepdims": keepdims})

    def accumulate(self, array: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        """Accumulate like :meth:`numpy.ufunc.accumulate`; CuPy does for sums and products alone."""
        self._expect("accumulate", {"add", "multiply"})
        self._reject_host_data((array,))
        return run(self._theirs.accumulate, (array, axis, dtype), {"out": out})

    def outer(self, A: Any, B: Any, **kwargs: Any) -> Any:
        """Combine all pairs like :meth:`numpy.ufunc.outer`."""
        self._reject_host_data((A, B))
        return run(self._theirs.outer, (A, B), kwargs)

    def at(self, a: Any, indices: Any, b: Any = None) -> None:
        """Change elements in place like :meth:`numpy.ufunc.at`; CuPy does for few functions."""
        self._expect("at", SCATTERS)

        def work(host: Any, indices: Any, b: Any, out: Any) -> None:  # noqa: ARG001
            self._theirs.at(host, indices, b)  # `host` and `out` are the same array, which is both read and written

        run(work, (a, indices, b), {"out": a})

    def _expect(self, method: str, names: Set[str]) -> None:
        if self.__name__ not in names:
            raise NotImplementedError(f"`cupy_{self.__name__}.{method}` is not supported yet")

    @staticmethod
    def _reject_host_data(args: tuple[Any, ...]) -> None:
        for arg in args:
            if not isinstance(arg, (cupy.ndarray, bool, int, float, complex, np.generic)):
                raise TypeError(f"Unsupported type {type(arg)}")


# ---------------------------------------------------------------------------------------------------------------------
# Functions of dtypes, and functions that work in place


def _dtype_of(value: Any) -> Any:
    return value.dtype if isinstance(value, cupy.ndarray) else value


def result_type(*values: Any) -> np.dtype[Any]:
    """The dtype of a result, like :func:`numpy.result_type`."""
    return np.result_type(*map(_dtype_of, values))


def can_cast(from_: Any, to: Any, casting: Any = "safe") -> bool:
    """Whether a dtype can be cast, like :func:`numpy.can_cast`."""
    return np.can_cast(_dtype_of(from_), to, casting)


def copyto(dst: Any, src: Any, casting: Any = "same_kind", where: Any = None) -> None:
    """Copy elements, like :func:`numpy.copyto`."""
    if isinstance(src, (cupy.ndarray, np.generic)) and not np.can_cast(_dtype_of(src), dst.dtype, casting):
        raise TypeError(f"Cannot cast {src.dtype!r} to {dst.dtype!r} in {casting!r} casting mode")
    if where is None:
        dst[...] = src
    else:
        run(_copy_where, (src,), {"out": dst, "where": where})


def _copy_where(src: Any, out: Any, where: Any) -> None:
    np.copyto(out, src, casting="unsafe", where=where)


def copy(a: Any, order: str = "K") -> Any:
    """A copy of an array on the current device."""
    return a.copy(order=order)


def astype(x: Any, dtype: Any, *, copy: bool = True) -> Any:
    """The array with another dtype, like :func:`numpy.astype`."""
    return x.astype(dtype, copy=copy)
