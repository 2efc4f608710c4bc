"""Batch norm and its family as one writes them in plain NumPy or CuPy, as calls like those of `peers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybn._cli.measure import Call
from cupybn._cli.problem import DROPPED, EPS, MOMENTUM, OVER_THE_LAST_AXIS, Array, Arrays, Operation, Problem


def plain_call(xp: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call as one writes it in NumPy or CuPy. Statistics of data narrower than float32 are in float32."""
    if operation.op != "batch_norm":
        return (plain_dropout if operation.op == "dropout" else plain_norm)(xp, problem, operation, a)
    axis = problem.channel_axis % len(problem.shape)
    others = tuple(i for i in range(len(problem.shape)) if i != axis)
    wide = np.promote_types(problem.dtype, np.float32)
    count = a.x.size / problem.channels

    def column(vector: Array) -> Array:
        return vector.reshape([-1 if i == axis else 1 for i in range(len(problem.shape))])

    weight, bias, running_mean, running_var = map(column, a[3:])

    def statistics() -> tuple[Array, Array]:
        if not operation.training:
            return running_mean, running_var
        mean = a.x.mean(axis=others, dtype=wide, keepdims=True)
        var = a.x.var(axis=others, dtype=wide, keepdims=True)
        for running, batch in (running_mean, mean), (running_var, var * (count / (count - 1))):
            running *= 1 - MOMENTUM
            running += MOMENTUM * batch
        return mean, var

    def forward() -> tuple[Array, ...]:
        mean, var = statistics()
        y = (a.x - mean) * (weight / xp.sqrt(var + EPS)) + bias
        if operation.residual:
            y += a.residual
        if operation.activation:
            y = xp.maximum(y, 0)
        return (y.astype(problem.dtype, copy=False),)

    if not operation.backward:
        return forward
    mean, var = statistics()
    rstd, y = 1 / xp.sqrt(var + EPS), forward()[0]

    def backward() -> tuple[Array, ...]:
        dy = a.dy * (y > 0) if operation.activation else a.dy
        xhat = (a.x - mean) * rstd
        dbias = dy.sum(axis=others, dtype=wide, keepdims=True)
        dweight = (dy * xhat).sum(axis=others, dtype=wide, keepdims=True)
        dx = weight * rstd * (dy - (dbias + xhat * dweight) / count)
        return dx.astype(problem.dtype, copy=False), dweight, dbias, dy

    return backward


def in_groups(problem: Problem, op: str, array: Array) -> Array:
    """An array, or a vector of channels, in which the channel axis is cut in two: groups, and channels of a group."""
    axis, groups = problem.channel_axis % len(problem.shape), problem.groups or problem.channels
    if op in OVER_THE_LAST_AXIS:
        return array if array.ndim == len(problem.shape) else array.reshape([1] * axis + [-1])
    if array.ndim == 1:
        return array.reshape(
            [groups if i == axis else -1 if i == axis + 1 else 1 for i in range(len(problem.shape) + 1)]
        )
    return array.reshape([*problem.shape[:axis], groups, -1, *problem.shape[axis + 1 :]])


def axes_of_a_row(problem: Problem, op: str) -> tuple[int, ...]:
    """The axes of an array in groups over which a row goes: what shares one mean and one variance."""
    axis = problem.channel_axis % len(problem.shape)
    if op in OVER_THE_LAST_AXIS:
        return (axis,)
    return tuple(i for i in range(1, len(problem.shape) + 1) if i != axis)


def plain_norm(xp: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of instance, group, layer or RMS norm in some lines of array functions."""
    op, wide = operation.op, np.promote_types(problem.dtype, np.float32)
    x, given, residual, weight, bias = (in_groups(problem, op, array) for array in a[:5])
    row = axes_of_a_row(problem, op)
    shared = tuple(i for i in range(x.ndim) if weight.shape[i] == 1)

    def normalized() -> tuple[Array, Array]:
        if op == "rms_norm":
            rstd = 1 / xp.sqrt((x.astype(wide) ** 2).mean(axis=row, keepdims=True) + EPS)
            return x * rstd, rstd
        mean = x.mean(axis=row, dtype=wide, keepdims=True)
        rstd = 1 / xp.sqrt(x.var(axis=row, dtype=wide, keepdims=True) + EPS)
        return (x - mean) * rstd, rstd

    def forward() -> tuple[Array, ...]:
        y = normalized()[0] * weight
        if op != "rms_norm":
            y += bias
        if operation.residual:
            y += residual
        if operation.activation:
            y = xp.maximum(y, 0)
        return (y.astype(problem.dtype, copy=False).reshape(problem.shape),)

    if not operation.backward:
        return forward
    xhat, rstd = normalized()
    y = in_groups(problem, op, forward()[0])

    def backward() -> tuple[Array, ...]:
        dy = given * (y > 0) if operation.activation else given
        g = dy * weight
        dx = g - xhat * (g * xhat).mean(axis=row, dtype=wide, keepdims=True)
        if op != "rms_norm":
            dx -= g.mean(axis=row, dtype=wide, keepdims=True)
        dweight, dbias = (terms.sum(axis=shared, dtype=wide) for terms in (dy * xhat, dy))
        return (dx * rstd).astype(problem.dtype, copy=False).reshape(problem.shape), dweight, dbias, dy

    return backward


def plain_dropout(xp: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of dropout in two lines: what is kept is drawn anew by each forward pass, and kept for the way back."""
    scale = problem.dtype.type(1 / (1 - DROPPED))

    rng = xp.random.default_rng(0)

    def draw() -> Array:
        return rng.random(problem.shape, dtype=np.float32) >= DROPPED

    if operation.backward:
        kept = draw()
        return lambda: (a.dy * kept * scale,)

    def forward() -> tuple[Array, ...]:
        kept = draw()
        return a.x * kept * scale, kept

    return forward
