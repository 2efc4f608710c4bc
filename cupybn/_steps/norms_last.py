"""The launches of the norms for CuPy arrays with the channels last: (N, A, C, 1), where A is more than 1."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cupybn._steps.bundles import Affine, Epilogue, Gradients, Statistics, Sums
from cupybn._steps.cupy_ops import _empty
from cupybn._steps.geometry import PACK, Geometry
from cupybn._steps.launcher import kernel
from cupybn._steps.norm import Norm
from cupybn._steps.norm_geometry import Samples, is_wide, samples
from cupybn._steps.plans import MOST_INT, Plan, macros_of, properties_of

Array = Any  # cupy.ndarray

ARRAYS = {"norm_forward": 1, "norm_backward": 2}
"""The steps, and how many arrays each of them keeps on chip."""


def forward(
    x: Array, norm: Norm, affine: Affine, epilogue: Epilogue, out: Array, statistics: Statistics | None
) -> None:
    """See `numpy_norms.norm_forward`; the statistics are written where they are wanted."""
    plan = choose("norm_forward", x, norm, out, epilogue.residual, passed=epilogue.passed)
    plan.launch(x=x, affine=affine, epilogue=epilogue, out=out, statistics=statistics)


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
    """See `numpy_norms.norm_backward`; the sums are in parts, one for each block that takes the channel."""
    passed = epilogue.passed
    plan = choose("norm_backward", x, norm, dy, gradients.dx, gradients.dresidual, passed=passed)
    if passed is not None and dy.data.ptr % (x.nbytes // passed.size):
        dy = dy.copy()  # the packs of the record want one that is aligned
    sums = None
    if keep:
        both = _empty((2, plan.geometry.parts, x.shape[2]))
        sums = Sums(both[0], both[1])
    plan.launch(dy=dy, x=x, statistics=statistics, affine=affine, epilogue=epilogue, gradients=gradients, sums=sums)
    return sums


def empty_passed(x: Array, norm: Norm, residual: Array, out: Array) -> Array:
    """A record of where ReLU passes: a byte for each pack, bool where packs are single elements."""
    width = width_of(x, norm, residual, out)
    return _empty(x.shape, np.bool_) if width == 1 else _empty((x.size // width,), np.uint8)


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


def choose(step: str, x: Array, norm: Norm, *others: Array | None, passed: Array | None = None) -> Plan:
    """The launch of a step for these arrays: x, and others that are read or written in packs."""
    width = width_of(x, norm, *others, passed=passed)
    return plan_of(step, x.shape, x.dtype, norm.groups, width, x.data.device_id)


@functools.lru_cache(maxsize=4096)
def plan_of(
    step: str, shape: tuple[int, int, int, int], dtype: np.dtype[Any], groups: int, width: int, device_index: int
) -> Plan:
    """The plan of a step. It is kept: programs ask for the same few again and again."""
    N, A, C, _ = shape
    geometry = samples(N, A, C, groups, dtype.itemsize, width, ARRAYS[step], properties_of(device_index))
    macros = macros_of(dtype, width, index_bits(shape, geometry), geometry)
    macros |= {"CLUSTER_BLOCKS": geometry.cluster, "ON_CHIP": int(geometry.shared > 0)}
    return Plan(kernel(f"channels_last/{step}", **macros), geometry)


def index_bits(shape: tuple[int, int, int, int], geometry: Geometry) -> int:
    """Bits of the kernels' indices, which go beyond the end of an array by what a block's threads take at once."""
    N, A, C, _ = shape
    assert isinstance(geometry.sizes, Samples)
    beyond = geometry.threads // geometry.sizes.tile
    return 32 if (N * A + beyond) * C < MOST_INT else 64
