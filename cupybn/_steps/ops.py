"""The choice between the modules with the steps."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from cupybn._steps import (
    cupy_double_backward,
    cupy_norms,
    cupy_ops,
    numpy_double_backward,
    numpy_norms,
    numpy_ops,
)

Array = Any  # numpy.ndarray or cupy.ndarray


def ops_for(array: Array) -> ModuleType:
    """The module with the steps of batch norm for arrays of this kind."""
    return numpy_ops if isinstance(array, np.ndarray) else cupy_ops


def double_backward_for(array: Array) -> ModuleType:
    """The module with the steps of batch norm's second order for arrays of this kind."""
    return numpy_double_backward if isinstance(array, np.ndarray) else cupy_double_backward


def norms_for(array: Array) -> ModuleType:
    """The module with the steps of the norms within a sample for arrays of this kind."""
    return numpy_norms if isinstance(array, np.ndarray) else cupy_norms
