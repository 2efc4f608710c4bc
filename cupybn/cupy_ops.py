"""The steps of batch norm on CuPy arrays: the functions of `numpy_ops`, each a launch of the kernel of its name.

Here is no arithmetic: outputs are allocated, a launch is chosen, arguments are named. Arrays are (N, C, L), contiguous;
those with L = 1 go to the kernels of ``channels_last``, the others to those of ``channels_first``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cupybn import _geometry
from cupybn._devices import empty, import_cupy
from cupybn._geometry import THREADS, Geometry
from cupybn._kernels import Kernel, kernel
from cupybn._moments import Moments, Statistics, Sums

Array = Any  # cupy.ndarray

ACTIVATIONS = {None: 0, "relu": 1}
"""As the kernels number them."""
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


def mean_and_var(moments: Moments, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """See `numpy_ops.mean_and_var`."""
    parts, C = moments.mean.shape
    mean, var = empty((C,), moments.mean, dtype), empty((C,), moments.mean, dtype)
    fields = _fields("moments", moments, Moments)
    del fields["moments_batches"]
    kernel("mean_and_var", **_macros(dtype, False, 32)).launch(
        _geometry.over_channels(C), THREADS, {**fields, "mean": mean, "var": var, "parts": parts, "C": C}
    )
    return mean, var


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
) -> Statistics:
    """See `numpy_ops.bn_normalize`."""
    plan = _choose("bn_normalize", x, out, residual)
    statistics = Statistics(empty(x.shape[1:2], x, np.float64), empty(x.shape[1:2], x, np.float64))
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
        **_fields("statistics", statistics, Statistics),
        parts=0 if moments is None else moments.mean.shape[0],
    )
    return statistics


def bn_backward_reduce(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    scratch: Array | None = None,  # noqa: ARG001
) -> Sums:
    """See `numpy_ops.bn_backward_reduce`; the sums are in parts, and no scratch is needed."""
    plan = _choose("bn_backward_reduce", x, dy, residual)
    shape = plan.geometry.parts, x.shape[1]
    sums = Sums(empty(shape, x, np.float64), empty(shape, x, np.float64))
    plan.launch(
        dy=dy,
        x=x,
        **_fields("statistics", statistics, Statistics),
        eps=eps,
        weight=weight,
        bias=bias,
        residual=residual,
        activation=ACTIVATIONS[activation],
        **_fields("sums", sums, Sums),
    )
    return sums


def bn_backward_input(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    sums: Sums | None,
    inv_count: float,
    dx: Array,
    dresidual: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> None:
    """See `numpy_ops.bn_backward_input`."""
    plan = _choose("bn_backward_input", x, dy, residual, dx, dresidual)
    plan.launch(
        dy=dy,
        x=x,
        **_fields("statistics", statistics, Statistics),
        eps=eps,
        weight=weight,
        bias=bias,
        residual=residual,
        activation=ACTIVATIONS[activation],
        **_fields("sums", sums, Sums),
        inv_count=inv_count,
        dx=dx,
        dresidual=dresidual,
        dweight=dweight,
        dbias=dbias,
        parts=0 if sums is None else sums.dy.shape[0],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Launches

SUMS = ("bn_stats", "bn_backward_reduce")
"""The steps whose result must not depend on the device."""


class _Plan(NamedTuple):
    """The kernel of a step, and how it is laid over the arrays."""

    kernel: Kernel
    geometry: Geometry

    def launch(self, **arguments: Any) -> None:
        """With these arguments, and the sizes that the geometry knows."""
        self.kernel.launch(self.geometry.grid, THREADS, arguments | self.geometry.sizes)


def _choose(step: str, x: Array, *others: Array | None) -> _Plan:
    """The launch of a step for these arrays."""
    vectorized = all(array is None or array.data.ptr % PACK == 0 for array in (x, *others))
    index_bits = 32 if max(x.size, x.shape[1] * PACK) < MOST_INT else 64  # there are up to 8 lanes for a channel
    multiprocessors = None if step in SUMS else _multiprocessors(x.data.device_id)
    return _plan(step, x.shape, x.dtype, vectorized, index_bits, multiprocessors)


@functools.lru_cache(maxsize=4096)
def _plan(
    step: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    vectorized: bool,
    index_bits: int,
    multiprocessors: int | None,
) -> _Plan:
    """Of so many arguments that programs call with the same ones again and again."""
    N, C, L = shape
    width = PACK // dtype.itemsize if vectorized else 1
    if L == 1:
        layout, geometry = "channels_last", _geometry.channels_last(N, C, width, multiprocessors)
    else:
        layout, geometry = "channels_first", _geometry.channels_first(N, C, L, width, multiprocessors)
    return _Plan(kernel(f"{layout}/{step}", **_macros(dtype, vectorized, index_bits)), geometry)


def _macros(dtype: np.dtype[Any], vectorized: bool, index_bits: int) -> dict[str, Any]:
    """What ``types.cuh`` wants to be told."""
    return {"DATA_T": dtype, "VECTORIZED": int(vectorized), "INDEX_BITS": index_bits, "THREADS": THREADS}


def _multiprocessors(device: int) -> int:
    runtime = import_cupy().cuda.runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device))


def _fields(prefix: str, value: tuple[Any, ...] | None, kind: type[Any]) -> dict[str, Any]:
    """The fields of a NamedTuple as arguments of their own; all None if there is none."""
    values = (None,) * len(kind._fields) if value is None else value
    return {f"{prefix}_{name}": field for name, field in zip(kind._fields, values, strict=True)}
