"""The launches of the norms for CuPy arrays with the channels last: (N, A, C, 1), where A is more than 1."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Statistics, Sums
from cupybn._steps.geometry import PACK, Geometry
from cupybn._steps.launched import empty
from cupybn._steps.launcher import kernel
from cupybn._steps.norm import Norm
from cupybn._steps.plans import MOST_INT, Plan, macros_of, properties_of
from cupybn._steps.sample_geometry import Form, Samples, after_sums, is_wide, only_sums, whole

Array = Any  # cupy.ndarray

WHOLE, ONLY_SUMS, AFTER_SUMS = range(3)
"""What a launch does of a step, by its number in ``channels_last/samples.cuh``."""
ARRAYS = {"norm_forward": 1, "norm_backward": 2}
"""The steps, and how many arrays each of them keeps on chip."""


def forward(
    x: Array, norm: Norm, affine: Affine, epilogue: Epilogue, out: Array, statistics: Statistics | None
) -> None:
    """See `numpy_norms.norm_forward`: one launch where spans stay on chip, else two.

    The statistics are written where they are wanted.
    """
    plans = choose("norm_forward", x, norm, out, epilogue.residual, passed=epilogue.passed)
    parts, moments = plans[0].geometry.parts, None
    if len(plans) > 1:
        number, C = len(x) * parts, x.shape[2]
        numbers = empty((number * (1 + 2 * C),))
        mean_and_m2 = numbers[number:].reshape(2, number, C)
        moments = Moments(numbers[:number], mean_and_m2[0], mean_and_m2[1])
    for plan in plans:
        plan.launch(x=x, affine=affine, epilogue=epilogue, moments=moments, out=out, statistics=statistics, parts=parts)


def backward(
    dy: Array,
    x: Array,
    norm: Norm,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    gradients: Gradients,
    keep: bool = True,
) -> Sums | None:
    """See `numpy_norms.norm_backward`: one launch where spans stay on chip, else two. The sums are in parts."""
    passed = epilogue.passed
    plans = choose("norm_backward", x, norm, dy, gradients.dx, gradients.dresidual, passed=passed)
    if passed is not None and dy.data.ptr % (x.nbytes // passed.size):
        dy = dy.copy()  # the packs of the record want one that is aligned
    parts, sums = plans[0].geometry.parts, None
    if keep or len(plans) > 1:
        both = empty((2, len(x) * parts, x.shape[2]))
        sums = Sums(both[0], both[1])
    for plan in plans:
        plan.launch(
            dy=dy,
            x=x,
            statistics=statistics,
            affine=affine,
            epilogue=epilogue,
            gradients=gradients,
            sums=sums,
            parts=parts,
        )
    return sums if keep else None


def empty_passed(x: Array, norm: Norm, residual: Array, out: Array) -> Array:
    """A record of where ReLU passes: a byte for each pack, bool where packs are single elements."""
    width = width_of(x, norm, residual, out)
    return empty(x.shape, np.bool_) if width == 1 else empty((x.size // width,), np.uint8)


def width_of(x: Array, norm: Norm, *others: Array | None, passed: Array | None = None) -> int:
    """Elements of a pack: the widest that divides a row and fits all addresses, or what a record was made for.

    Where groups are wider than a tile, packs have no more than half of their bytes: loops over tiles take registers.
    """
    if passed is not None:
        return int(x.size) // int(passed.size)
    itemsize, C = int(x.dtype.itemsize), int(x.shape[2])
    together: int = PACK | C * itemsize | x.data.ptr
    for array in others:
        together |= 0 if array is None else array.data.ptr
    nbytes: int = together & -together  # its lowest bit: the largest power of two that divides them all
    return min(nbytes, PACK // 2 if is_wide(C // norm.groups, nbytes // itemsize, itemsize) else PACK) // itemsize


def choose(step: str, x: Array, norm: Norm, *others: Array | None, passed: Array | None = None) -> tuple[Plan, ...]:
    """The launches of a step for these arrays: x, and others that are read or written in packs."""
    width = width_of(x, norm, *others, passed=passed)
    return plans_of(step, x.shape, x.dtype, norm.groups, width, x.data.device_id)


@functools.lru_cache(maxsize=4096)
def plans_of(
    step: str, shape: tuple[int, int, int, int], dtype: np.dtype[Any], groups: int, width: int, device_index: int
) -> tuple[Plan, ...]:
    """The plans of a step. They are kept: programs ask for the same few again and again."""
    N, A, C, _ = shape
    form, device = Form(N, A, C, C // groups, dtype.itemsize, width), properties_of(device_index)

    def plan(phase: int, geometry: Geometry) -> Plan:
        macros = macros_of(dtype, width, index_bits(shape, geometry), geometry)
        if phase == WHOLE:
            macros["CLUSTER_BLOCKS"] = geometry.cluster
        return Plan(kernel(f"channels_last/{step}", **macros, PHASE=phase), geometry)

    on_chip = whole(form, ARRAYS[step], device)
    if on_chip is not None:
        return (plan(WHOLE, on_chip),)
    sums = only_sums(form)
    return plan(ONLY_SUMS, sums), plan(AFTER_SUMS, after_sums(form, sums.parts, device))


def index_bits(shape: tuple[int, int, int, int], geometry: Geometry) -> int:
    """Bits of the kernels' indices, which go beyond the end of an array by what a block's threads take at once."""
    N, A, C, _ = shape
    assert isinstance(geometry.sizes, Samples)
    beyond = geometry.threads // geometry.sizes.tile
    return 32 if (N * A + beyond) * C < MOST_INT else 64
