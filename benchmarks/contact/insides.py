"""Insides of the library and of its tests that the stages use: where these move, this file follows."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupybn._arrays.devices import cuda_missing
from cupybn._arrays.dtypes import FLOATS, parameter_dtype
from cupybn._cli import check
from cupybn._cli.checked import CHECKED
from cupybn._cli.norm_cases import norm_of
from cupybn._cli.problem import FAMILY
from cupybn._ranks.engines import engine_for
from cupybn._ranks.watch import watch_of
from cupybn._steps import cupy_norms, norms_last, plans
from cupybn._steps.geometry import PACK
from cupybn._steps.launcher import Frame
from cupybn._steps.norm import Norm
from tests.nvrtc import Instance, all_instances
from tests.ranks.launch import RANK_ENVIRONMENT, find_mpiexec
from tests.reference import ROUNDINGS, assert_close, batch_norm

__all__ = [
    "ON_CHIP",
    "RANK_ENVIRONMENT",
    "ROUNDINGS",
    "SECOND_ORDER",
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
    "kernels_of_norm",
    "kernels_of_second_order",
    "watch_of",
]

Kernel = tuple[str, tuple[str, ...]]
"""The name of a kernel, and the options that it is compiled with."""
ON_CHIP = tuple(plans.ON_CHIP)
"""The steps that keep channels on chip where they fit."""
STREAMED = ("bn_stats", "bn_normalize", "bn_backward_reduce", "bn_backward_input")
"""The steps over all elements that read them from memory, but for those of second order."""
SECOND_ORDER = ("bn_double_backward_reduce", "bn_double_backward_input")
"""The streamed steps of second order, which take no mask. Neither ``check`` nor a benchmark asks for them."""
OF_NORMS = ("norm_forward", "norm_backward")
"""The steps of the norms within a sample that have a kernel for each layout."""


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
    chosen += [_streamed(step, layout, dtype, width, masked) for step in STREAMED]
    return {(plan.kernel.name, plan.kernel.options) for plan in chosen if plan is not None}


def kernels_of_second_order(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> set[Kernel]:
    """The kernels of second order that this device takes over an array (N, C, L)."""
    chosen = [_streamed(step, shape, dtype, _width(shape, dtype)) for step in SECOND_ORDER]
    return {(plan.kernel.name, plan.kernel.options) for plan in chosen}


def _streamed(step: str, shape: tuple[int, int, int], dtype: np.dtype[Any], width: int, masked: bool = False) -> Any:
    """The plan of a step that is streamed."""
    multiprocessors = None if step in plans.SUMS else plans.properties_of(0).multiprocessors
    return plans.streamed_plan(step, shape, dtype, width, multiprocessors, masked)


def _width(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> int:
    """Elements of a pack, in arrays that are aligned as CuPy allocates them."""
    _, C, L = shape
    return math.gcd(PACK, (L if L > 1 else C) * dtype.itemsize) // dtype.itemsize


def kernels_of_check() -> set[Kernel]:
    """The kernels that ``python -m cupybn check`` asks this device for, but for those that know no layout.

    Shapes of batch norm that it checks in unaligned memory as well have odd rows: the kernels are the same.
    """
    every = [shape for shapes in check.SHAPES.values() for shape in shapes]
    asked = [kernels_for(shape, 1, dtype, masked) for shape in every for dtype in dtypes() for masked in (False, True)]
    for op in FAMILY[:-1]:
        for shapes in CHECKED[op].shapes(quick=True).values():
            for (number, shape), dtype in itertools.product(enumerate(shapes), dtypes()):
                norm = norm_of(op, shape[2])
                asked += [kernels_of_norm(shape, norm, dtype, offset) for offset in ((0, 1) if number == 0 else (0,))]
    return set().union(*asked)


def kernels_of_norm(shape: tuple[int, ...], norm: Norm, dtype: np.dtype[Any], offset: int = 0) -> set[Kernel]:
    """The kernels that this device takes for a norm, forward and backward, over an array (N, A, C, B) that begins so
    many elements after an aligned address; weight and bias are of float32.
    """
    x = SimpleNamespace(shape=shape, dtype=dtype, data=SimpleNamespace(ptr=offset * dtype.itemsize))
    found: set[Kernel] = set()
    for step in OF_NORMS:
        chosen: tuple[plans.Plan, ...]
        if shape[1] > 1:
            width = norms_last.width_of(x, norm)
            chosen = norms_last.plans_of(step, shape, dtype, norm.groups, width, 0)
        else:
            width, summed = cupy_norms._width_of(x, norm), step == "norm_backward"
            vectors = np.dtype(np.float32)
            chosen = (cupy_norms.row_plan(step, shape, norm, dtype, width, vectors, summed, 0),)
        found |= {(plan.kernel.name, plan.kernel.options) for plan in chosen}
    return found


def has_clusters() -> bool:
    """Whether this device runs blocks in clusters."""
    return plans.properties_of(0).clusters


def instances_here() -> list[Instance]:
    """All instances of kernels that the library may ask this device for, the most used first."""
    return list(all_instances(90 if has_clusters() else 80))


def is_stand_in() -> bool:
    """Whether CuPy is the one of ``tests/emulated``."""
    import cupy

    return hasattr(cupy, "emulator")
