"""How far a measured result is from batch norm in float64, computed on the device, some channels at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybn._cli.peers import EPS
from cupybn._cli.problem import Array, Arrays, Operation, Problem

MOST_ELEMENTS = 1 << 24
ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
FORWARD, BACKWARD = 2e-6, 1e-5
"""Largest errors that are allowed: a share of the terms of an output, and of the largest gradient of a channel."""


def error(xp: Any, problem: Problem, operation: Operation, a: Arrays, found: Array) -> float:
    """The largest error of a result, in units of what is allowed: a few roundings, and those of the dtype itself.

    Where ReLU's argument is near 0, rounding decides whether a gradient passes: such elements are left out.
    """
    ulp = ULP[problem.dtype.name]
    step = max(1, MOST_ELEMENTS * problem.channels // max(found.size, 1))
    worst = 0.0
    for start in range(0, problem.channels, step):
        channels = slice(start, start + step)

        def rows(array: Array, channels: slice = channels) -> Array:
            return _rows(xp, array, channels, problem.channel_axis)

        weight, bias, running_mean, running_var = (v[channels].astype(np.float64)[:, None] for v in a[3:])
        x = rows(a.x)
        if operation.training:
            mean = x.mean(axis=1, keepdims=True)
            var = ((x - mean) ** 2).mean(axis=1, keepdims=True)
        else:
            mean, var = running_mean, running_var
        rstd = 1 / xp.sqrt(var + EPS)
        xhat = (x - mean) * rstd
        y = xhat * weight + bias
        if operation.residual:
            y += rows(a.residual)
        counts = None
        if not operation.backward:
            expected = xp.maximum(y, 0) if operation.activation else y
            size = xp.abs(weight) * (1 + xp.abs(xhat)) + xp.abs(bias) + xp.abs(y)
            bound = FORWARD * size + ulp * xp.abs(expected)
        else:
            dy = rows(a.dy)
            if operation.activation:
                dy = dy * (y > 0)
                counts = xp.abs(y) > 8 * ulp * (1 + xp.abs(y))
            sums = dy.mean(axis=1, keepdims=True), (dy * xhat).mean(axis=1, keepdims=True)
            expected = (dy - sums[0] - xhat * sums[1]) * (weight * rstd)
            bound = BACKWARD * xp.abs(expected).max(axis=1, keepdims=True) + ulp * xp.abs(expected)
        share = xp.abs(rows(found) - expected) / bound
        here = float((share if counts is None else xp.where(counts, share, 0)).max())
        worst = max(worst, math.inf if math.isnan(here) else here)
    return worst


def _rows(xp: Any, array: Array, channels: slice, axis: int) -> Array:
    """Some channels of an array in float64, a row for each."""
    is_bfloat16 = array.dtype.name == "bfloat16"
    values = (array.view(np.uint16) if is_bfloat16 else array)[(slice(None),) * (axis % array.ndim) + (channels,)]
    values = xp.ascontiguousarray(xp.moveaxis(values, axis, 0)).reshape(values.shape[axis], -1)
    if is_bfloat16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
