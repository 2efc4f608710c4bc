"""The limits of float32: which numbers its arithmetic holds, and which leave doubt; and a gate that loses none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOAT64 = np.dtype(np.float64)
LARGE = 1e30
"""Size from which numbers, or their products, may be beyond float32; below its inverse they may be lost."""
TINY = float(np.finfo(np.float32).tiny)
"""Least normal number of float32."""
SMALL_RSTD = 1e-15
"""Least rstd of what is narrow: (x - mean)^2 would be too large, and beyond its inverse dy * (x - mean) too small."""
LEAST_VARIANCE = {dtype: 1e4 * float(np.finfo(dtype).tiny) for dtype in (np.dtype(np.float32), FLOAT64)}
"""Least variance that squares of differences in this dtype do not lose."""


def within(most: float, *numbers: Array) -> bool:
    """Whether no number in these arrays is larger than this, for sure: one that may be refused, NaN always is."""
    squares = 0.0
    for array in numbers:
        row = array.ravel()
        if len(row) > 1 << 13:  # for a longer one the library of linear algebra would start threads
            row = np.abs(row).max(keepdims=True)
        squares += row.dot(row)
    return bool(squares <= most * most)


def extreme(factor: Array) -> Array:
    """Whether float32 does not hold a factor, or not its products."""
    size = np.abs(factor)
    return (size > LARGE) | (size < 1 / LARGE) & (size > 0)


def let_through(dy: Array, passed: Array, out: Array | None = None) -> Array:
    """dy where it passed, else 0: never 0 * dy, dy may be inf."""
    y = np.empty(dy.shape, dy.dtype) if out is None else out
    word = np.dtype(f"i{dy.itemsize}")
    bits = np.negative(passed.view(np.int8))  # 0 or all bits set
    np.bitwise_and(dy.view(word), bits, out=y.view(word), dtype=word)
    return y
