"""The dtypes that device arrays may have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_EXTENDED = {"g", "G"}  # characters of NumPy's long doubles, which CUDA does not have


def supported(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype if a device knows it: booleans, integers, floats, complex numbers, bfloat16; else an error."""
    result: np.dtype[Any] = np.dtype(dtype)
    if not result.isnative:
        raise ValueError(f"Unsupported dtype {result} with big-endian byte-order")
    known = result.kind in "biufc" and result.char not in _EXTENDED
    if not known and result.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {result}")
    return result
