"""The dtypes that batch norm takes, and those that it computes in."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.kinds import show

FLOATS = ("float16", "bfloat16", "float32", "float64")
BITS_OF_BFLOAT16 = np.dtype("V2")
"""The dtype of a bfloat16 array that NumPy has read from a file."""


@functools.cache
def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether batch norm takes this dtype; NumPy works its name out anew each time."""
    return dtype.name in FLOATS


@functools.cache
def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if dtype.name == "float64" else np.float32)


def parameter_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype that a layer was asked for; ``"bfloat16"`` is known by name once ml_dtypes is there.

    Raises
    ------
    TypeError
        If this is not one of the four.
    ImportError
        If it is ``"bfloat16"``, and ml_dtypes is missing.
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
    except Exception:  # a TypeError mostly, but text and tuples are parsed, and raise what they like
        name = (dtype if isinstance(dtype, str) else show(dtype)).removeprefix("torch.")
        way_out = f"; did you mean dtype={name!r}?" if name in FLOATS else ""
        raise TypeError(f"expected dtype to be one of {', '.join(FLOATS)} (got {show(dtype)}){way_out}") from None
    if result.name not in FLOATS:
        raise TypeError(f"expected dtype to be one of {', '.join(FLOATS)} (got {result.name})")
    return result
