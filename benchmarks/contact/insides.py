"""Insides of the library and of its tests that the stages use: where these move, this file follows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybn._arrays.devices import cuda_missing
from cupybn._arrays.dtypes import FLOATS, parameter_dtype
from cupybn._cli import check
from cupybn._ranks.engines import engine_for
from cupybn._ranks.watch import watch_of
from cupybn._steps import plans
from cupybn._steps.geometry import PACK
from cupybn._steps.launcher import Frame
from tests.nvrtc import Instance, all_instances
from tests.ranks.launch import RANK_ENVIRONMENT, find_mpiexec
from tests.reference import ROUNDINGS, assert_close, batch_norm

__all__ = [
    "OF_NORMS",
    "ON_CHIP",
    "RANK_ENVIRONMENT",
    "ROUNDINGS",
    "STREAMED",
    "Frame",
    "assert_close",
    "batch_norm",
    "cuda_missing",
    "dtypes",
    "engine_for",
    "find_mpiexec",
    "has_clusters",
    "how_on_chip",
    "instances_here",
    "is_stand_in",
    "kernels_for",
    "kernels_of_check",
    "watch_of",
]

Kernel = tuple[str, tuple[str, ...]]
"""The name of a kernel, and the options that it is compiled with."""
ON_CHIP = tuple(plans.ON_CHIP)
"""The steps that keep channels on chip where they fit."""
STREAMED = (*plans.SUMS, "bn_normalize", "bn_backward_input")
"""The steps over all elements that read them from memory."""
OF_NORMS = ("/norm_forward", "/norm_backward")
"""Ends of the names of kernels of the norms within a sample, whose macros depend on more than an `Instance` says."""


def dtypes() -> list[np.dtype[Any]]:
    """The dtypes that batch norm takes."""
    return [parameter_dtype(name) for name in FLOATS]


def how_on_chip(step: str, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> str:
    """Text that says how this device takes a step: blocks x threads on chip, or streamed; and the bytes of a pack."""
    width = _width(shape, dtype)
    plan = plans.resident_plan(step, shape, dtype, width, 0)
    how = "streamed" if plan is None else f"{plan.geometry.cluster} x {plan.geometry.team or plan.geometry.threads}"
    return f"{how} by {width * dtype.itemsize} bytes"


def kernels_for(shape: tuple[int, ...], channel_axis: int, dtype: np.dtype[Any], masked: bool = False) -> set[Kernel]:
    """The kernels that this device takes for any step over arrays of this shape, with a mask or without one."""
    axis = channel_axis % len(shape)
    layout = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    width = _width(layout, dtype)
    chosen: list[Any] = [plans.resident_plan(step, layout, dtype, width, 0) for step in ON_CHIP if not masked]
    for step in STREAMED:
        multiprocessors = None if step in plans.SUMS else plans.properties_of(0).multiprocessors
        chosen.append(plans.streamed_plan(step, layout, dtype, width, multiprocessors, masked))
    return {(plan.kernel.name, plan.kernel.options) for plan in chosen if plan is not None}


def _width(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> int:
    """Elements of a pack, in arrays that are aligned as CuPy allocates them."""
    _, C, L = shape
    return math.gcd(PACK, (L if L > 1 else C) * dtype.itemsize) // dtype.itemsize


def kernels_of_check() -> set[Kernel]:
    """The kernels that ``python -m cupybn check`` asks this device for, but for those on vectors of channels.

    Shapes that it checks in unaligned memory as well have odd rows: the kernels are the same.
    """
    every = [shape for shapes in check.SHAPES.values() for shape in shapes]
    asked = [kernels_for(shape, 1, dtype, masked) for shape in every for dtype in dtypes() for masked in (False, True)]
    return set().union(*asked)


def has_clusters() -> bool:
    """Whether this device runs blocks in clusters."""
    return plans.properties_of(0).clusters


def instances_here() -> list[Instance]:
    """All instances of kernels that the library may ask this device for, the most used first.

    Those of the norms within a sample are not among them: the stage that measures these compiles what it needs.
    """
    found = all_instances(90 if has_clusters() else 80)
    return [instance for instance in found if not instance.kernel.endswith(OF_NORMS)]


def is_stand_in() -> bool:
    """Whether CuPy is the one of ``tests/emulated``."""
    import cupy

    return hasattr(cupy, "emulator")
