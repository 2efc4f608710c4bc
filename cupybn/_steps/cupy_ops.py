"""The steps of batch norm on CuPy arrays: the functions of `numpy_ops`, each a launch of the kernel of its name.

Here is no arithmetic: outputs are allocated, a launch is chosen, arguments are named. Arrays are (N, C, L), contiguous;
those with L = 1 go to the kernels of ``channels_last``, the others to those of ``channels_first``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import empty, import_cupy
from cupybn._steps import geometry as _geometry
from cupybn._steps.bundles import Moments, Statistics, Sums
from cupybn._steps.geometry import WARP, Geometry
from cupybn._steps.launcher import Kernel, kernel
from cupybn._steps.resident import Device

Array = Any  # cupy.ndarray

ACTIVATIONS = {None: 0, "relu": 1}
"""Numbers of the activations in the kernels."""
PACK = 16
"""Bytes that one load or store moves at most."""
MOST_INT = 2**31 - 2**20
"""Elements that the kernels count with 32 bits: somewhat less than these hold, for strides over the end."""


def bn_stats(x: Array, num_batches_tracked: Array | None = None, scratch: Array | None = None) -> Moments:  # noqa: ARG001
    """See `numpy_ops.bn_stats`; the moments are in parts, and no scratch is needed."""
    plan = _choose("bn_stats", x)
    C = x.shape[1]
    moments = Moments(
        empty((plan.geometry.parts,), x, np.float64),
        empty((plan.geometry.parts, C), x, np.float64),
        empty((plan.geometry.parts, C), x, np.float64),
        None if num_batches_tracked is None else empty((), num_batches_tracked),
    )
    plan.launch(
        x=x,
        num_batches_tracked=num_batches_tracked,
        **_fields("moments", moments, Moments),
    )
    return moments


def merge_moments(moments: Moments) -> Array:
    """See `numpy_ops.merge_moments`."""
    count, mean, m2, _ = moments
    parts, C = mean.shape
    row = empty((1, 1 + 2 * C), mean, np.float64)
    _over_channels(
        "merge_moments",
        row.dtype,
        moments_count=_span(count),
        moments_mean=_span(mean),
        moments_m2=_span(m2),
        row=row,
        parts=parts,
        C=C,
        count_stride=count.strides[0] // count.itemsize,
        stride=mean.strides[0] // mean.itemsize,
    )
    return row


def mean_and_var(moments: Moments, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """See `numpy_ops.mean_and_var`."""
    count, mean_of_parts, m2, _ = moments
    parts, C = mean_of_parts.shape
    mean, var = empty((C,), m2, dtype), empty((C,), m2, dtype)
    _over_channels(
        "mean_and_var",
        dtype,
        moments_count=count,
        moments_mean=mean_of_parts,
        moments_m2=m2,
        mean=mean,
        var=var,
        parts=parts,
        C=C,
    )
    return mean, var


def bn_update_running(
    moments: Moments,
    running_mean: Array,
    running_var: Array,
    momentum: float | None,
    num_batches_tracked: Array | None,
) -> None:
    """See `numpy_ops.bn_update_running`."""
    geometry = Geometry((1,), {})
    kernel("bn_update_running", **_macros(moments.mean.dtype, 1, 32, geometry)).launch(
        geometry.grid,
        geometry.threads,
        {
            **_fields("moments", moments, Moments),
            "running_mean": running_mean,
            "running_var": running_var,
            "momentum": 0 if momentum is None else momentum,
            "num_batches_tracked": num_batches_tracked,
            "C": moments.mean.shape[1],
        },
    )


def bn_normalize(
    x: Array,
    moments: Moments | None,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float | None,
    num_batches_tracked: Array | None,
    out: Array,
    mask: Array | None,
    keep: bool = True,
) -> Statistics | None:
    """See `numpy_ops.bn_normalize`."""
    plan = _choose("bn_normalize", x, out, residual, mask=mask)
    statistics = _empty_statistics(x) if keep else None
    plan.launch(
        x=x,
        **_fields("moments", moments, Moments),
        eps=eps,
        weight=weight,
        bias=bias,
        residual=residual,
        activation=ACTIVATIONS[activation],
        running_mean=running_mean,
        running_var=running_var,
        momentum=0 if momentum is None else momentum,
        num_batches_tracked=num_batches_tracked,
        out=out,
        mask=mask,
        **_fields("statistics", statistics, Statistics),
        parts=0 if moments is None else moments.mean.shape[0],
    )
    return statistics


def bn_forward(
    x: Array,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float | None,
    num_batches_tracked: Array | None,
    out: Array,
    mask: Array | None,
    keep: bool = True,
    scratch: Array | None = None,
) -> Statistics | None:
    """See `numpy_ops.bn_forward`: one launch where a channel stays on chip, else two."""
    # Without a momentum all blocks would have to read the counter before one of them moves it.
    plan = None if momentum is None else _choose_resident("bn_forward", x, out, residual, mask=mask)
    if plan is not None:
        statistics = _empty_statistics(x) if keep else None
        plan.launch(
            x=x,
            eps=eps,
            weight=weight,
            bias=bias,
            residual=residual,
            activation=ACTIVATIONS[activation],
            running_mean=running_mean,
            running_var=running_var,
            momentum=momentum,
            num_batches_tracked=num_batches_tracked,
            out=out,
            mask=mask,
            **_fields("statistics", statistics, Statistics),
        )
        return statistics
    moments = bn_stats(x, num_batches_tracked if momentum is None else None, scratch)
    running = running_mean, running_var, momentum, num_batches_tracked
    return bn_normalize(x, moments, eps, weight, bias, residual, activation, *running, out, mask, keep)


def empty_mask(x: Array, residual: Array, out: Array) -> Array:
    """A mask of where ReLU passes: a byte for each pack, bool where packs are single elements."""
    width = _width(x, residual, out)
    return empty(x.shape, x, np.bool_) if width == 1 else empty((x.size // width,), x, np.uint8)


def bn_backward_reduce(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    activation: str | None,
    mask: Array | None,
    scratch: Array | None = None,  # noqa: ARG001
) -> Sums:
    """See `numpy_ops.bn_backward_reduce`; the sums are in parts, and no scratch is needed."""
    dy = _beside(mask, x, dy)
    plan = _choose("bn_backward_reduce", x, dy, mask=mask)
    shape = plan.geometry.parts, x.shape[1]
    sums = Sums(empty(shape, x, np.float64), empty(shape, x, np.float64))
    plan.launch(
        dy=dy,
        x=x,
        **_fields("statistics", statistics, Statistics),
        eps=eps,
        weight=weight,
        bias=bias,
        activation=ACTIVATIONS[activation],
        mask=mask,
        **_fields("sums", sums, Sums),
    )
    return sums


def merge_sums(sums: Sums, count: Array, dweight: Array | None, dbias: Array | None) -> Array:
    """See `numpy_ops.merge_sums`."""
    parts, C = sums.dy.shape
    row = empty((1, 2 * C), sums.dy, np.float64)
    _over_channels(
        "merge_sums",
        row.dtype,
        **_fields("sums", sums, Sums),
        count=count,
        dweight=dweight,
        dbias=dbias,
        row=row,
        parts=parts,
        C=C,
    )
    return row


def bn_backward_input(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    activation: str | None,
    mask: Array | None,
    sums: Sums | None,
    inv_count: float,
    dx: Array,
    dresidual: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> None:
    """See `numpy_ops.bn_backward_input`."""
    dy = _beside(mask, x, dy)
    plan = _choose("bn_backward_input", x, dy, dx, dresidual, mask=mask)
    plan.launch(
        dy=dy,
        x=x,
        **_fields("statistics", statistics, Statistics),
        eps=eps,
        weight=weight,
        bias=bias,
        activation=ACTIVATIONS[activation],
        mask=mask,
        **_fields("sums", sums, Sums),
        inv_count=inv_count,
        dx=dx,
        dresidual=dresidual,
        dweight=dweight,
        dbias=dbias,
        parts=0 if sums is None else sums.dy.shape[0],
    )


def bn_backward(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    activation: str | None,
    mask: Array | None,
    inv_count: float,
    dx: Array,
    dresidual: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    scratch: Array | None = None,
) -> None:
    """See `numpy_ops.bn_backward`: one launch where a channel of dy and x stays on chip, else two."""
    dy = _beside(mask, x, dy)
    plan = _choose_resident("bn_backward", x, dy, dx, dresidual, mask=mask)
    if plan is not None:
        plan.launch(
            dy=dy,
            x=x,
            **_fields("statistics", statistics, Statistics),
            eps=eps,
            weight=weight,
            bias=bias,
            activation=ACTIVATIONS[activation],
            mask=mask,
            inv_count=inv_count,
            dx=dx,
            dresidual=dresidual,
            dweight=dweight,
            dbias=dbias,
        )
        return
    step = (dy, x, statistics, eps, weight, bias, activation, mask)
    sums = bn_backward_reduce(*step, scratch)
    bn_backward_input(*step, sums, inv_count, dx, dresidual, dweight, dbias)


# ---------------------------------------------------------------------------------------------------------------------
# Launches

ON_CHIP = {"bn_forward": 1, "bn_backward": 2}
"""The steps that keep channels on chip, and of how many arrays."""
SUMS = ("bn_stats", "bn_backward_reduce")
"""The steps whose result must not depend on the device."""


class _Plan(NamedTuple):
    """The kernel of a step, and how it is laid over the arrays."""

    kernel: Kernel
    geometry: Geometry

    def launch(self, **arguments: Any) -> None:
        """Launch the kernel with these arguments, and the sizes that the geometry knows."""
        geometry = self.geometry
        self.kernel.launch(geometry.grid, geometry.threads, arguments | geometry.sizes, geometry.shared)


def _over_channels(step: str, dtype: np.dtype[Any], C: int, **arguments: Any) -> None:
    """Launch a step that takes a warp for each channel."""
    geometry = Geometry(_geometry.over_channels(C), {}, threads=WARP)
    kernel(step, **_macros(dtype, 1, 32, geometry)).launch(geometry.grid, geometry.threads, {**arguments, "C": C})


def _choose(step: str, x: Array, *others: Array | None, mask: Array | None = None) -> _Plan:
    """The launch of a step for these arrays."""
    multiprocessors = None if step in SUMS else _device(x.data.device_id).multiprocessors
    return _plan(step, x.shape, x.dtype, _width(x, *others, mask=mask), multiprocessors)


def _choose_resident(step: str, x: Array, *others: Array | None, mask: Array | None = None) -> _Plan | None:
    """The same for a step that keeps channels on chip, or None where it does not."""
    return _resident_plan(step, x.shape, x.dtype, _width(x, *others, mask=mask), x.data.device_id)


def _width(x: Array, *others: Array | None, mask: Array | None = None) -> int:
    """Elements of the widest packs that rows and memory consist of; a mask has a byte for each pack."""
    if mask is not None:
        return int(x.size) // int(mask.size)
    _, C, L = x.shape
    itemsize, row = x.dtype.itemsize, L if L > 1 else C
    together: int = PACK | row * itemsize | x.data.ptr  # without channels all but PACK is 0
    for array in others:
        together |= 0 if array is None else array.data.ptr
    return (together & -together) // int(itemsize)


def _beside(mask: Array | None, x: Array, dy: Array) -> Array:
    """dy, or a copy of it that is aligned if the packs of the mask want it."""
    if mask is None or dy.data.ptr % (_width(x, mask=mask) * dy.dtype.itemsize) == 0:
        return dy
    return dy.copy()


@functools.lru_cache(maxsize=4096)
def _plan(
    step: str, shape: tuple[int, int, int], dtype: np.dtype[Any], width: int, multiprocessors: int | None
) -> _Plan:
    """The plan of a step that is streamed; programs ask for the same few again and again."""
    N, C, L = shape
    if L == 1:
        layout, arrays = "channels_last", 2 if "backward" in step else 1
        geometry = _geometry.channels_last(N, C, dtype.itemsize, width, arrays, multiprocessors)
    else:
        layout = "channels_first"
        geometry = _geometry.channels_first(N, C, L, dtype.itemsize, width, multiprocessors)
    return _Plan(kernel(f"{layout}/{step}", **_macros(dtype, width, _index_bits(shape, geometry), geometry)), geometry)


@functools.lru_cache(maxsize=4096)
def _resident_plan(
    step: str, shape: tuple[int, int, int], dtype: np.dtype[Any], width: int, device_index: int
) -> _Plan | None:
    N, C, L = shape
    arguments = dtype.itemsize, width, ON_CHIP[step], _device(device_index)
    if L == 1:
        layout, geometry = "channels_last", _geometry.channels_last_resident(N, C, *arguments)
    else:
        layout, geometry = "channels_first", _geometry.channels_first_resident(N, C, L, *arguments)
    if geometry is None:
        return None
    macros = _macros(dtype, width, _index_bits(shape, geometry), geometry)
    if L > 1:
        macros["CLUSTER_BLOCKS"] = geometry.cluster
    return _Plan(kernel(f"{layout}/{step}", **macros), geometry)


def _index_bits(shape: tuple[int, int, int], geometry: Geometry) -> int:
    """Bits of the kernels' indices: strides of a block's threads go over the end by some rows."""
    N, C, L = shape
    beyond = geometry.threads * PACK // L + 2 if L > 1 else geometry.threads // geometry.sizes["tile"]
    return 32 if (N + beyond) * C * L < MOST_INT else 64


def _macros(dtype: np.dtype[Any], width: int, index_bits: int, geometry: Geometry) -> dict[str, Any]:
    """What the kernels want to be told."""
    macros = {"DATA_T": dtype, "WIDTH": width, "INDEX_BITS": index_bits, "THREADS": geometry.threads}
    return macros | ({"TEAM": geometry.team} if geometry.team else {})


@functools.cache
def _device(index: int) -> Device:
    cuda = import_cupy().cuda

    def attribute(name: str) -> int:
        return int(cuda.runtime.deviceGetAttribute(getattr(cuda.runtime, f"cudaDevAttr{name}"), index))

    return Device(
        attribute("MultiProcessorCount"),
        attribute("MaxSharedMemoryPerBlockOptin"),
        attribute("MaxSharedMemoryPerMultiprocessor"),
        clusters=int(cuda.Device(index).compute_capability) >= 90,
    )


def _empty_statistics(x: Array) -> Statistics:
    C = x.shape[1:2]
    return Statistics(empty(C, x, np.float64), empty(C, x, np.float64))


def _span(array: Array) -> Array:
    """All memory from the first element of an array to the last one, for kernels that know its strides."""
    if array.flags.c_contiguous:
        return array
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    return import_cupy().ndarray((last // array.itemsize + 1,), array.dtype, memptr=array.data)


def _fields(prefix: str, value: tuple[Any, ...] | None, kind: type[Any]) -> dict[str, Any]:
    """The fields of a NamedTuple as arguments of their own; all None if there is none."""
    values = (None,) * len(kind._fields) if value is None else value
    return {f"{prefix}_{name}": field for name, field in zip(kind._fields, values, strict=True)}
