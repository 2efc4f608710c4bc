"""Arrays that launches need beside those that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import import_cupy
from cupybn._steps import plans
from cupybn._steps.launcher import listening

Array = Any  # cupy.ndarray


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> Array:
    """New array, uninitialised, on the current device, which is that of the arrays of a step."""
    array = import_cupy().empty(shape, dtype)
    listener = listening.listener
    if listener is not None:
        listener.made(array)
    return array


def aligned_for(passed: Array | None, x: Array, array: Array) -> Array:
    """The array, which is like x; an aligned copy of it if the packs of the record want one."""
    if passed is None or array.data.ptr % (plans.width_of(x, passed=passed) * array.dtype.itemsize) == 0:
        return array
    return array.copy()
