"""How far a measured result is from the same in float64, computed on the device, some rows at a time.

A row is what shares one mean and one variance: a channel of batch norm, a group of channels of one sample for the norms
within a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupybn._cli.problem import DROPPED, EPS, OPERATIONS, OVER_THE_LAST_AXIS, Array, Arrays, Operation, Problem

MOST_ELEMENTS = 1 << 24
ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
LEAST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
"""Least numbers of each dtype that are normal: below them steps are no smaller."""
FORWARD, BACKWARD = 2e-6, 1e-5
"""Largest errors that are allowed: a share of the terms of an output, and of the largest term of a row's gradients."""
TINY = 1e-30
"""Error that is allowed where all of a row is exactly 0, as where ReLU lets nothing through."""
SIGMAS = 6
"""Standard deviations that the number of elements that dropout drops may be away from the expected one."""


class Errors(NamedTuple):
    """The largest errors of a result."""

    over_allowed: float
    """Error in units of what is allowed: a few roundings, and those of the dtype itself."""
    roundoffs: float
    """Error in units of roundoff of the dtype: of the value, at least of 1; of gradients, of a row's largest term."""


def error(xp: Any, problem: Problem, operation: Operation, a: Arrays, found: Array) -> float:
    """The largest error of a result in units of what is allowed."""
    return errors(xp, problem, operation, a, found).over_allowed


def errors(xp: Any, problem: Problem, operation: Operation, a: Arrays, found: Array) -> Errors:
    """The largest errors of a result; infinite where it is NaN."""
    of_block = _dropout if operation.op == "dropout" else _norm
    of_blocks = [of_block(xp, problem, operation, a, found, block) for block in _blocks(xp, problem, operation)]
    return Errors(*(max(math.inf if math.isnan(e) else e for e in of) for of in zip(*of_blocks, strict=True)))


def _norm(xp: Any, problem: Problem, operation: Operation, a: Arrays, found: Array, block: Block) -> Errors:
    """The errors of some rows of a norm.

    Where ReLU's argument is near 0, rounding decides whether a gradient passes: such elements are left out.
    """
    ulp, rms = ULP[problem.dtype.name], operation.op == "rms_norm"
    x, weight, bias = block.rows(a.x), block.vector(a.weight), block.vector(a.bias)
    if rms:
        mean, bias, var = 0, 0 * bias, (x**2).mean(axis=1, keepdims=True)
    elif operation.training:
        mean = x.mean(axis=1, keepdims=True)
        var = ((x - mean) ** 2).mean(axis=1, keepdims=True)
    else:
        mean, var = block.vector(a.running_mean), block.vector(a.running_var)
    rstd = 1 / xp.sqrt(var + EPS)
    xhat = (x - mean) * rstd
    y = xhat * weight + bias
    if operation.residual:
        y += block.rows(a.residual)
    counts = None
    if not operation.backward:
        expected = xp.maximum(y, 0) if operation.activation else y
        size = xp.abs(weight) * (1 + xp.abs(xhat)) + xp.abs(bias) + xp.abs(y)
        bound = FORWARD * size + ulp * xp.abs(expected)
        unit = ulp / 2 * xp.maximum(xp.abs(expected), 1)
    else:
        dy = block.rows(a.dy)
        if operation.activation:
            dy = dy * (y > 0)
            counts = xp.abs(y) > 8 * ulp * (1 + xp.abs(y))
        g = dy * weight
        centre = 0 if rms else g.mean(axis=1, keepdims=True)
        expected = (g - centre - xhat * (g * xhat).mean(axis=1, keepdims=True)) * rstd
        largest = xp.maximum(xp.abs(expected), xp.abs(g * rstd)).max(axis=1, keepdims=True)
        bound = BACKWARD * largest + ulp * xp.abs(expected)
        unit = ulp / 2 * largest
    off = xp.abs(block.rows(found) - expected)
    off = off if counts is None else xp.where(counts, off, 0)
    return Errors(*(float((off / (of + TINY)).max()) for of in (bound, unit)))


def _dropout(xp: Any, problem: Problem, operation: Operation, a: Arrays, found: Array, block: Block) -> Errors:
    """The errors of some rows of dropout: of what is kept, and of how much that is, as each library draws its own."""
    given, found = block.rows(a.dy if operation.backward else a.x), block.rows(found)
    expected, kept = given * (1 / (1 - DROPPED)), found != 0
    unit = ULP[problem.dtype.name] * xp.maximum(xp.abs(expected), LEAST[problem.dtype.name])
    off = xp.where(kept | xp.isnan(found), xp.abs(found - expected), 0) / unit
    off = float(xp.where(given == 0, 0, off).max())
    dropped = float((~kept & (given != 0)).sum()), float((given != 0).sum())
    away = abs(dropped[0] - DROPPED * dropped[1]) / math.sqrt(DROPPED * (1 - DROPPED) * max(dropped[1], 1))
    return Errors(max(off, away / SIGMAS), 2 * off)


def second_order(xp: Any, problem: Problem, a: Arrays, found: tuple[Array, Any]) -> Errors:
    """The largest errors of the gradients of dy, input and weight that belong to one cotangent, that of dx.

    The cotangent is the residual of the arrays; `found` is what a second vjp function returns in training mode.
    """
    ulp = ULP[problem.dtype.name]
    ddy, (dx, dweight, *_) = found
    worst = [0.0, 0.0]
    for block in _blocks(xp, problem, OPERATIONS["backward"]):
        x, g, u, weight = block.rows(a.x), block.rows(a.dy), block.rows(a.residual), block.vector(a.weight)
        x -= x.mean(axis=1, keepdims=True)
        rstd = 1 / xp.sqrt((x**2).mean(axis=1, keepdims=True) + EPS)
        xhat = x * rstd
        A, B, U, V, W = (term.mean(axis=1, keepdims=True) for term in (g, g * xhat, u, u * xhat, u * g))
        Q = W - A * U - B * V
        factor_u, factor_g = -weight * rstd**2 * B, -weight * rstd**2 * V
        centre, slope = factor_u * U + factor_g * A, factor_u * V + factor_g * B + weight * rstd**2 * Q
        terms_of_ddy = weight * rstd * xp.stack([u, -U + 0 * u, -xhat * V])
        terms_of_dx = xp.stack([factor_u * u, factor_g * g, -centre + 0 * u, -xhat * slope])
        of_weight = rstd * xp.stack([W, -A * U, -B * V]) * x.shape[1]
        triples = (
            (block.rows(ddy), terms_of_ddy, ulp),
            (block.rows(dx), terms_of_dx, ulp),
            (block.vector(dweight), of_weight, ULP["float32"]),
        )
        for array, terms, of_dtype in triples:
            expected = terms.sum(axis=0)
            largest = xp.abs(terms).sum(axis=0).max(axis=1, keepdims=True)
            off = xp.abs(array - expected)
            bounds = BACKWARD * largest + of_dtype * xp.abs(expected), of_dtype / 2 * largest
            errors_here = [float((off / (bound + TINY)).max()) for bound in bounds]
            worst = [max(e, math.inf if math.isnan(f) else f) for e, f in zip(worst, errors_here, strict=True)]
    return Errors(*worst)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Block(NamedTuple):
    """Some rows of a problem."""

    rows: Callable[[Array], Array]
    """Function that takes them out of an array, in float64, a row for each."""
    vector: Callable[[Array], Array]
    """Function that returns a vector of channels in float64, in a shape that goes with the rows."""


def _blocks(xp: Any, problem: Problem, operation: Operation) -> Iterator[Block]:
    """All rows of a problem, block by block: channels of batch norm, samples of the others."""
    axis = problem.channel_axis % len(problem.shape)
    size, cut_axis = math.prod(problem.shape), axis if operation.op == "batch_norm" else 0
    step = max(1, MOST_ELEMENTS * problem.shape[cut_axis] // max(size, 1))
    for start in range(0, problem.shape[cut_axis], step):
        part = (slice(None),) * cut_axis + (slice(start, start + step),)
        yield Block(
            lambda array, part=part: _rows(xp, problem, operation, _wide(array, part)),
            lambda vector, part=part: _vector(xp, problem, operation, vector, part),
        )


def _rows(xp: Any, problem: Problem, operation: Operation, values: Array) -> Array:
    """Values as a matrix of rows."""
    axis = problem.channel_axis % values.ndim
    if operation.op in (*OVER_THE_LAST_AXIS, "dropout"):
        return values.reshape(-1, values.shape[-1])
    if operation.op == "batch_norm":
        return xp.ascontiguousarray(xp.moveaxis(values, axis, 0)).reshape(values.shape[axis], -1)
    groups = problem.groups or problem.channels
    return xp.ascontiguousarray(xp.moveaxis(values, axis, 1)).reshape(len(values) * groups, -1)


def _vector(xp: Any, problem: Problem, operation: Operation, vector: Array, part: tuple[slice, ...]) -> Array:
    """A vector of channels in a shape that goes with the rows of a part."""
    if operation.op == "batch_norm":
        return _wide(vector, part[-1:])[:, None]
    wide = _wide(vector, ())
    if operation.op in OVER_THE_LAST_AXIS:
        return wide
    samples = len(range(*part[0].indices(problem.shape[0])))
    positions = math.prod(problem.shape) // problem.shape[0] // problem.channels
    repeated = xp.broadcast_to(wide[None, :, None], (samples, problem.channels, positions))
    return repeated.reshape(samples * (problem.groups or problem.channels), -1)


def _wide(array: Array, part: tuple[slice, ...]) -> Array:
    """A part of an array in float64."""
    if array.dtype.name == "bfloat16":
        values = (array.view(np.uint16)[part].astype(np.uint32) << 16).view(np.float32)
    else:
        values = array[part]
    return values.astype(np.float64)
