"""Batch norm as somebody writes it who knows CuPy well: sums in two stages, elementwise kernels for the rest.

Training and backward without ReLU, for float32 and float16. The stand-in for CuPy has neither kind of kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from cupybn._cli.measure import Call
from cupybn._cli.problem import EPS, MOMENTUM, Array, Arrays, Operation, Problem

MOST_GROUPS = 1024
"""Most groups into which the first stage of a sum cuts channels-last data."""


class Kernels(NamedTuple):
    """Kernels that CuPy compiles for a dtype at the first call."""

    squares: Any
    products: Any
    normalize: Any
    gradient: Any


@functools.cache
def kernels(cupy: Any) -> Kernels:
    """The kernels, made once for this process."""
    add = ("a + b", "s = a", "0")
    return Kernels(
        cupy.ReductionKernel(
            "T x, float32 mean",
            "float32 s",
            "((float)x - mean) * ((float)x - mean)",
            *add,
            "expert_squares",
            reduce_type="float",
        ),
        cupy.ReductionKernel(
            "T dy, T x, float32 mean, float32 rstd",
            "float32 s",
            "(float)dy * ((float)x - mean) * rstd",
            *add,
            "expert_products",
            reduce_type="float",
        ),
        cupy.ElementwiseKernel(
            "T x, float32 mean, float32 scale, float32 bias",
            "T y",
            "y = ((float)x - mean) * scale + bias",
            "expert_normalize",
        ),
        cupy.ElementwiseKernel(
            "T dy, T x, float32 mean, float32 rstd, float32 scale, float32 dbias, float32 dweight",
            "T dx",
            "dx = scale * ((float)dy - dbias - ((float)x - mean) * rstd * dweight)",
            "expert_gradient",
        ),
    )


def expert_call(cupy: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """The operation as a function without arguments, like those in `cupybn._cli.peers`."""
    use = kernels(cupy)
    count = a.x.size // problem.channels
    x, dy = _grouped(problem, a.x), _grouped(problem, a.dy)
    channels_last = problem.channel_axis % len(problem.shape) != 1 or len(problem.shape) == 2
    axis, column = (1, (1, 1, -1)) if channels_last else (2, (1, -1, 1))

    def total(partial: Array) -> Array:
        return partial.sum(axis=0)

    def statistics() -> tuple[Array, Array]:
        mean = total(x.sum(axis=axis, dtype="float32")) / count
        return mean, total(use.squares(x, mean.reshape(column), axis=axis)) / count

    def forward() -> tuple[Array, ...]:
        mean, var = statistics()
        a.running_mean[...] = (1 - MOMENTUM) * a.running_mean + MOMENTUM * mean
        a.running_var[...] = (1 - MOMENTUM) * a.running_var + MOMENTUM * count / (count - 1) * var
        scale = a.weight / cupy.sqrt(var + EPS)
        y = use.normalize(x, mean.reshape(column), scale.reshape(column), a.bias.reshape(column))
        return y.reshape(problem.shape), mean, var

    if not operation.backward:
        return forward
    mean, var = statistics()
    rstd = 1 / cupy.sqrt(var + EPS)
    saved = mean.reshape(column), rstd.reshape(column)

    def backward() -> tuple[Array, ...]:
        dbias = total(dy.sum(axis=axis, dtype="float32"))
        dweight = total(use.products(dy, x, *saved, axis=axis))
        factors = (vector.reshape(column) for vector in (a.weight * rstd, dbias / count, dweight / count))
        return use.gradient(dy, x, *saved, *factors).reshape(problem.shape), dweight, dbias

    return backward


def _grouped(problem: Problem, array: Array) -> Array:
    """The data as (N, C, L), or channels last as (groups, rows, C), so that the first stage works on many groups at
    once.
    """
    if problem.channel_axis % array.ndim == 1 and array.ndim > 2:
        return array.reshape(*array.shape[:2], -1)
    rows = array.size // problem.channels
    groups = max(g for g in range(1, min(MOST_GROUPS, math.isqrt(rows) * 4) + 1) if rows % g == 0)
    return array.reshape(groups, rows // groups, problem.channels)
