"""The dtypes that batch norm takes, and those that it computes in."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

FLOATS = ("float16", "bfloat16", "float32", "float64")


@functools.cache
def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether batch norm takes this dtype; NumPy works its name out anew each time."""
    return dtype.name in FLOATS


@functools.cache
def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if dtype.name == "float64" else np.float32)


def parameter_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype that a layer was asked for; ``"bfloat16"`` is known by name once ml_dtypes is there."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    result: np.dtype[Any] = np.dtype(dtype)
    if result.name not in FLOATS:
        raise TypeError(f"expected a dtype of {', '.join(FLOATS)} (got {result.name})")
    return result
