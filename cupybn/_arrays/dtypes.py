"""Dtypes that batch norm takes, and dtypes that it computes in."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.kinds import show

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Names of the dtypes that batch norm takes."""
BITS_OF_BFLOAT16 = np.dtype("V2")
"""Dtype that a bfloat16 array has after NumPy has read it from a file: two bytes without a meaning."""


@functools.cache
def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether batch norm takes this dtype. Cached, since NumPy computes ``dtype.name`` anew each time."""
    return dtype.name in FLOATS


@functools.cache
def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Dtype that sums are kept in: float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if dtype.name == "float64" else np.float32)


def parameter_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Dtype that a user chose for a layer. The name ``"bfloat16"`` needs ml_dtypes, which is imported for it.

    Raises
    ------
    TypeError
        If this is none of ``FLOATS``.
    ImportError
        If this is ``"bfloat16"`` and ml_dtypes is missing.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError(
                "dtype='bfloat16' needs ml_dtypes: `pip install '.[bf16]'`, in a clone of cupybn, installs it"
            ) from error
        dtype = ml_dtypes.bfloat16
    try:
        result: np.dtype[Any] = np.dtype(dtype)
    except Exception:  # mostly TypeError, but NumPy parses texts and tuples, which raises errors of any class
        name = (dtype if isinstance(dtype, str) else show(dtype)).removeprefix("torch.")
        way_out = f"; did you mean dtype={name!r}?" if name in FLOATS else ""
        raise TypeError(f"expected dtype to be one of {', '.join(FLOATS)} (got {show(dtype)}){way_out}") from None
    if result.name not in FLOATS:
        raise TypeError(f"expected dtype to be one of {', '.join(FLOATS)} (got {result.name})")
    return result


def bfloat16_of(bits: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
    """Array of the numbers that have these bits as bfloat16: float32, which holds them all, if ml_dtypes is missing."""
    try:
        import ml_dtypes
    except ImportError:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(ml_dtypes.bfloat16)
