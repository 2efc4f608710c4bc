"""The steps of instance, group, layer and RMS norm on CuPy arrays: the functions of `numpy_norms`, each as launches.

Arrays are (N, A, C, B), contiguous, with A == 1 (channels first: the kernels of ``channels_first``) or B == 1 (channels
last). Here is no arithmetic: see `cupy_ops`, whose way this is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps import norms_last
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics, Sums
from cupybn._steps.geometry import PACK, WARP, Geometry
from cupybn._steps.launched import empty
from cupybn._steps.launcher import kernel
from cupybn._steps.norm import Norm
from cupybn._steps.plans import MOST_INT, Plan, macros_of, properties_of
from cupybn._steps.row_geometry import Norms, row_geometry, width_of_rows

Array = Any  # cupy.ndarray

ADDING_THREADS = 1024
"""Threads per block of `norm_parameters`: 32 warps, each of which adds up a 32nd of the parts."""
MOVING_THREADS = 256
"""Threads per block of `norm_update_running`."""


def norm_forward(
    x: Array, norm: Norm, affine: Affine, epilogue: Epilogue, out: Array, keep: bool = True
) -> Statistics | None:
    """See `numpy_norms.norm_forward`."""
    statistics = Statistics(empty((x.shape[0] * norm.groups, 2))) if keep else None
    if _is_last(x):
        norms_last.forward(x, norm, affine, epilogue, out, statistics)
        return statistics
    width = _width_of(x, norm, out, epilogue.residual, passed=epilogue.passed)
    parameters = _parameters(affine, x, width)
    plan = row_plan("norm_forward", x.shape, norm, x.dtype, width, _dtype_of(parameters, x), False, x.data.device_id)
    plan.launch(x=x, affine=parameters, epilogue=epilogue, out=out, statistics=statistics)
    return statistics


def norm_backward(
    dy: Array,
    x: Array,
    norm: Norm,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    gradients: Gradients,
    keep: bool = True,
) -> Sums | None:
    """See `numpy_norms.norm_backward`; the sums are in parts."""
    if _is_last(x):
        return norms_last.backward(dy, x, norm, statistics, affine, epilogue, gradients, keep)
    width = _width_of(x, norm, dy, gradients.dx, gradients.dresidual, passed=epilogue.passed)
    if dy.data.ptr % (width * x.dtype.itemsize):
        dy = dy.copy()  # the packs of the record want one that is aligned
    parameters = _parameters(affine, x, width)
    plan = row_plan("norm_backward", x.shape, norm, x.dtype, width, _dtype_of(parameters, x), keep, x.data.device_id)
    sums = None
    if keep:
        both = empty((2, plan.geometry.parts, x.shape[2]))
        sums = Sums(both[0], both[1])
    plan.launch(dy=dy, x=x, statistics=statistics, affine=parameters, epilogue=epilogue, gradients=gradients, sums=sums)
    return sums


def norm_parameters(sums: Sums, dweight: Array | None, dbias: Array | None) -> None:
    """See `numpy_norms.norm_parameters`."""
    parts, C = sums.dy.shape
    _launch(
        "norm_parameters",
        Geometry((math.ceil(C / WARP),), threads=ADDING_THREADS),
        {"sums": sums, "dweight": dweight, "dbias": dbias, "parts": parts, "C": C},
    )


def norm_update_running(statistics: Statistics, running: Running, count: float) -> None:
    """See `numpy_norms.norm_update_running`."""
    assert running.mean is not None
    C = running.mean.size
    _launch(
        "norm_update_running",
        Geometry((math.ceil(C * WARP / MOVING_THREADS),), threads=MOVING_THREADS),
        {
            "statistics": statistics,
            "running": running,
            "count": count,
            "N": statistics.pairs.shape[0] // C,
            "C": C,
        },
    )


def empty_passed(x: Array, norm: Norm, residual: Array, out: Array) -> Array:
    """A record of where ReLU passes: a byte for each pack, bool where packs are single elements."""
    if _is_last(x):
        return norms_last.empty_passed(x, norm, residual, out)
    width = _width_of(x, norm, residual, out)
    return empty(x.shape, np.bool_) if width == 1 else empty((x.size // width,), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def _is_last(x: Array) -> bool:
    """Whether channels are last in memory."""
    return bool(x.shape[1] > 1)


@functools.lru_cache(maxsize=4096)
def row_plan(
    step: str,
    shape: tuple[int, int, int, int],
    norm: Norm,
    dtype: np.dtype[Any],
    width: int,
    parameter_dtype: np.dtype[Any],
    summed: bool,
    device_index: int,
) -> Plan:
    """The plan of a step for rows. It is kept: programs ask for the same few again and again."""
    N, _, C, L = shape
    channels = C // norm.groups
    elementwise = L == 1
    norms = Norms(
        N,
        norm.groups,
        1 if elementwise else channels,
        channels if elementwise else L,
        elementwise,
        dtype.itemsize,
        width,
        2 if step == "norm_backward" else 1,
        summed,
    )
    geometry, on_chip, at_once = row_geometry(norms, properties_of(device_index))
    beyond = 2 * geometry.threads * PACK
    macros = macros_of(dtype, width, 32 if N * C * L + beyond < MOST_INT else 64, geometry)
    macros["CLUSTER_BLOCKS"] = geometry.cluster
    macros["CENTERED"] = int(norm.centered)
    macros["ELEMENTWISE"] = int(elementwise)
    macros["ON_CHIP"] = int(on_chip.rows)
    macros["SUMS_ON_CHIP"] = int(on_chip.sums)
    macros["ROWS_AT_ONCE"] = at_once
    macros["PARAMETER_T"] = parameter_dtype
    return Plan(kernel(f"channels_first/{step}", **macros), geometry)


def _width_of(x: Array, norm: Norm, *others: Array | None, passed: Array | None = None) -> int:
    """Elements of a pack, or what a record was made for."""
    if passed is not None:
        return int(x.size) // int(passed.size)
    _, _, C, L = x.shape
    addresses = [array.data.ptr for array in (x, *others) if array is not None]
    return width_of_rows(L if L > 1 else C // norm.groups, x.dtype.itemsize, *addresses)


def _parameters(affine: Affine, x: Array, width: int) -> Affine:
    """Weight and bias as kernels take them: contiguous, aligned, and of one dtype, that of x or float32.

    Others are copied and rounded to the dtype of the arithmetic.
    """
    given = [vector for vector in (affine.weight, affine.bias) if vector is not None]
    dtypes = {vector.dtype for vector in given}
    if dtypes <= {x.dtype} or dtypes == {np.dtype(np.float32)}:
        alignment = min(PACK, width * given[0].dtype.itemsize) if given and x.shape[3] == 1 else 1
        if all(vector.flags.c_contiguous and vector.data.ptr % alignment == 0 for vector in given):
            return affine
        dtype = given[0].dtype
    else:
        dtype = accumulation_dtype(x.dtype)
    cupy = import_cupy()

    def copied(vector: Array | None) -> Array | None:
        return None if vector is None else cupy.array(vector, dtype, order="C")

    return Affine(copied(affine.weight), copied(affine.bias), affine.eps)


def _dtype_of(affine: Affine, x: Array) -> np.dtype[Any]:
    """Dtype of weight and bias; that of x if there is neither."""
    given = affine.weight if affine.weight is not None else affine.bias
    return x.dtype if given is None else given.dtype  # type: ignore[no-any-return]


def _launch(step: str, geometry: Geometry, arguments: dict[str, Any]) -> None:
    """Launch a step that knows no layout."""
    loaded = kernel(step, **macros_of(np.dtype(np.float64), 1, 32, geometry))
    loaded.launch(geometry.grid, geometry.threads, arguments)
