"""The steps of batch norm on CuPy arrays: the functions of `numpy_ops`, each a launch of the kernel of its name.

Here is no arithmetic: outputs are allocated, a launch is chosen (`plans`), and the kernel gets its arguments by name.
Arrays are (N, C, L), contiguous; those with L = 1 go to the kernels of ``channels_last``, the others to those of
``channels_first``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps import plans
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Mask, Moments, Running, Statistics, Sums
from cupybn._steps.geometry import WARP, Geometry, over_channels
from cupybn._steps.launched import aligned_for, empty
from cupybn._steps.launcher import kernel

Array = Any  # cupy.ndarray


def bn_stats(
    x: Array,
    batches: Array | None = None,
    scratch: Array | None = None,  # noqa: ARG001
    mask: Mask | None = None,
) -> Moments:
    """See `numpy_ops.bn_stats`; the moments are in parts, and no scratch is needed."""
    plan = plans.choose("bn_stats", x, mask=mask)
    parts, C = plan.geometry.parts, x.shape[1]
    numbers = empty((parts * (1 + 2 * C),))
    mean_and_m2 = numbers[parts:].reshape(2, parts, C)
    before = None if batches is None else empty((), batches.dtype)
    moments = Moments(numbers[:parts], mean_and_m2[0], mean_and_m2[1], before)
    plan.launch(x=x, batches=batches, mask=mask, moments=moments)
    return moments


def merge_moments(moments: Moments) -> Array:
    """See `numpy_ops.merge_moments`."""
    count, mean, m2, _ = moments
    parts, C = mean.shape
    row = empty((1, 1 + 2 * C))
    _over_channels(
        "merge_moments",
        row.dtype,
        moments=Moments(_span(count), _span(mean), _span(m2)),
        row=row,
        parts=parts,
        C=C,
        count_stride=count.strides[0] // count.itemsize,
        stride=mean.strides[0] // mean.itemsize,
    )
    return row


def mean_and_var(moments: Moments, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """See `numpy_ops.mean_and_var`."""
    parts, C = moments.mean.shape
    mean, var = empty((C,), dtype), empty((C,), dtype)
    _over_channels("mean_and_var", dtype, moments=moments, mean=mean, var=var, parts=parts, C=C)
    return mean, var


def bn_update_running(
    moments: Moments | None, running: Running, statistics: Statistics | None = None, count: float = 0.0
) -> None:
    """See `numpy_ops.bn_update_running`."""
    geometry = Geometry((1,))
    arguments = {
        "moments": moments,
        "running": running,
        "statistics": statistics,
        "count": count,
        "C": 0 if running.mean is None else running.mean.size,
    }
    loaded = kernel("bn_update_running", **plans.macros_of(np.dtype(np.float64), 1, 32, geometry))
    loaded.launch(geometry.grid, geometry.threads, arguments)


def bn_normalize(
    x: Array,
    moments: Moments | None,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,
) -> Statistics | None:
    """See `numpy_ops.bn_normalize`."""
    plan = plans.choose("bn_normalize", x, out, epilogue.residual, passed=epilogue.passed, mask=epilogue.mask)
    statistics = _empty_statistics(x, moments is not None and epilogue.mask is not None) if keep else None
    plan.launch(
        x=x,
        moments=moments,
        affine=affine,
        running=running,
        epilogue=epilogue,
        out=out,
        statistics=statistics,
        parts=0 if moments is None else moments.mean.shape[0],
    )
    return statistics


def bn_forward(
    x: Array,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,
    scratch: Array | None = None,
) -> Statistics | None:
    """See `numpy_ops.bn_forward`: one launch where a channel stays on chip, else two.

    Whether a batch is finite is known when all channels are done: one more launch then moves the running statistics.
    """
    cumulative = running.momentum is None  # all blocks would have to read the counter before one of them moves it
    moved = Running(momentum=running.momentum) if running.skip_nonfinite else running
    residual, _, passed, mask = epilogue
    plan = None
    if not cumulative and mask is None:
        plan = plans.choose_resident("bn_forward", x, out, residual, passed=passed)
    if plan is None:
        moments = bn_stats(x, running.batches if cumulative else None, scratch, mask)
        statistics = bn_normalize(x, moments, affine, moved, epilogue, out, keep)
        if moved is not running:
            bn_update_running(Moments.of_rows(merge_moments(moments), moments.batches), running)
        return statistics
    statistics = _empty_statistics(x) if keep or moved is not running else None
    plan.launch(x=x, affine=affine, running=moved, epilogue=epilogue, out=out, statistics=statistics)
    if moved is not running:
        bn_update_running(None, running, statistics, float(x.shape[0] * x.shape[2]))
    return statistics if keep else None


def empty_passed(x: Array, residual: Array, out: Array, mask: Mask | None = None) -> Array:
    """A record of where ReLU passes: a byte for each pack, bool where packs are single elements."""
    width = plans.width_of(x, residual, out, mask=mask)
    return empty(x.shape, np.bool_) if width == 1 else empty((x.size // width,), np.uint8)


def bn_backward_reduce(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    scratch: Array | None = None,  # noqa: ARG001
) -> Sums:
    """See `numpy_ops.bn_backward_reduce`; the sums are in parts, and no scratch is needed."""
    dy = aligned_for(epilogue.passed, x, dy)
    plan = plans.choose("bn_backward_reduce", x, dy, passed=epilogue.passed, mask=epilogue.mask)
    both = empty((2, plan.geometry.parts, x.shape[1]))
    sums = Sums(both[0], both[1])
    plan.launch(dy=dy, x=x, statistics=statistics, affine=affine, epilogue=epilogue, sums=sums)
    return sums


def merge_sums(sums: Sums, count: Array, dweight: Array | None, dbias: Array | None) -> Array:
    """See `numpy_ops.merge_sums`."""
    parts, C = sums.dy.shape
    row = empty((1, 2 * C))
    _over_channels(
        "merge_sums", row.dtype, sums=sums, count=count, dweight=dweight, dbias=dbias, row=row, parts=parts, C=C
    )
    return row


def bn_backward_input(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    sums: Sums | None,
    inv_count: float,
    gradients: Gradients,
) -> None:
    """See `numpy_ops.bn_backward_input`."""
    dy = aligned_for(epilogue.passed, x, dy)
    _, _, passed, mask = epilogue
    plan = plans.choose("bn_backward_input", x, dy, gradients.dx, gradients.dresidual, passed=passed, mask=mask)
    plan.launch(
        dy=dy,
        x=x,
        statistics=statistics,
        affine=affine,
        epilogue=epilogue,
        sums=sums,
        inv_count=inv_count,
        gradients=gradients,
        parts=0 if sums is None else sums.dy.shape[0],
    )


def bn_backward(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    inv_count: float,
    gradients: Gradients,
    scratch: Array | None = None,
) -> None:
    """See `numpy_ops.bn_backward`: one launch where a channel of dy and x stays on chip, else two."""
    dy = aligned_for(epilogue.passed, x, dy)
    _, _, passed, mask = epilogue
    plan = None
    if mask is None:
        plan = plans.choose_resident("bn_backward", x, dy, gradients.dx, gradients.dresidual, passed=passed)
    if plan is None:
        sums = bn_backward_reduce(dy, x, statistics, affine, epilogue, scratch)
        bn_backward_input(dy, x, statistics, affine, epilogue, sums, inv_count, gradients)
    else:
        plan.launch(
            dy=dy,
            x=x,
            statistics=statistics,
            affine=affine,
            epilogue=epilogue,
            inv_count=inv_count,
            gradients=gradients,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and launches of these steps


def _over_channels(step: str, dtype: np.dtype[Any], C: int, **arguments: Any) -> None:
    """Launch a step that takes a warp for each channel."""
    geometry = Geometry(over_channels(C), threads=WARP)
    loaded = kernel(step, **plans.macros_of(dtype, 1, 32, geometry))
    loaded.launch(geometry.grid, geometry.threads, {**arguments, "C": C})


def _empty_statistics(x: Array, masked: bool = False) -> Statistics:
    """Statistics of the channels of x, for a kernel to fill; those of a batch that is masked have a count."""
    return Statistics(empty((x.shape[1], 2)), empty((1,)) if masked else None)


def _span(array: Array) -> Array:
    """Memory from the first element of an array to the last one, for kernels that know its strides."""
    if array.flags.c_contiguous:
        return array
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    return import_cupy().ndarray((last // array.itemsize + 1,), array.dtype, memptr=array.data)
