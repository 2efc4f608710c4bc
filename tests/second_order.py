"""Gradients of the gradients of batch norm by the textbook, in longdouble and independent of the library, and the
comparison that the tests make with them.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests.reference import HALF_ULP, to_numpy

BOUNDS = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-12}
"""Errors that the contract allows for data of a dtype, relative to the sum of the terms' sizes; 16 bits are rounded
once beside that."""


class SecondOrder(NamedTuple):
    """Gradients of sum(cotangent * gradient) over all gradients of batch norm."""

    ddy: np.ndarray  # gradient of the gradient of the output; these two have the shape of x
    dx: np.ndarray
    dweight: np.ndarray  # (C,)
    terms: SecondOrder | None = None  # sums of the sizes of the terms that these are sums of


def second_order(
    x,
    dy,
    weight=None,
    bias=None,
    *,
    cotangents,
    running=None,
    eps=1e-5,
    residual=None,
    relu=False,
    channel_axis=1,
) -> SecondOrder:
    """The gradients of second order.

    Parameters
    ----------
    cotangents : (cdx, cdweight, cdbias, cdresidual)
        Cotangents of the gradients of input, weight, bias and residual; None stands for zeros.
    running : (mean, var) or None
        In eval mode.
    relu : bool or array
        Whether there is ReLU, or where it has let something through.
    """
    axis = channel_axis % np.ndim(x)
    others = tuple(i for i in range(np.ndim(x)) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(np.ndim(x))]

    def wide(array):
        return to_numpy(array).astype(np.longdouble)

    def column(vector, default):
        return np.longdouble(default) if vector is None else wide(vector).reshape(shape)

    def total(array):
        return array.sum(axis=others, keepdims=True)

    x = wide(x)
    cdx, cdweight, cdbias, cdresidual = cotangents
    u = np.zeros_like(x) if cdx is None else wide(cdx)
    s = np.zeros_like(x) if cdresidual is None else wide(cdresidual)
    p, q, w = column(cdweight, 0), column(cdbias, 0), column(weight, 1)

    n = np.longdouble(x.size // x.shape[axis])
    mean = total(x) / n if running is None else column(running[0], 0)
    centered = x - mean
    var = total(centered**2) / n if running is None else column(running[1], 0)
    r = 1 / np.sqrt(var + np.longdouble(eps))
    passed = np.ones(x.shape, bool)
    if isinstance(relu, np.ndarray):
        passed = relu
    elif relu:
        added = 0 if residual is None else wide(residual)
        passed = centered * r * w + column(bias, 0) + added > 0
    g = np.where(passed, wide(dy), 0)

    def gradients(u, g, c, w, p, added, minus):
        """The gradients, or with sizes in place of all numbers, and 1 in place of -1, the sizes of their terms.

        With c = x - mean and sums over a channel, what is differentiated is, in training,
            w * (r * (sum(u*g) - sum(u) * sum(g) / n) - r^3 * sum(u*c) * sum(g*c) / n) + p * r * sum(g*c)
            + q * sum(g) + sum(s*g),
        where dr/dx = -r^3 * c / n and the gradient of sum(g*c) is g - sum(g) / n.
        """
        sum_u, sum_g, sum_ug, sum_uc, sum_gc = (total(a) for a in (u, g, u * g, u * c, g * c))
        ddy = w * r * u + p * r * c + added
        if running is not None:
            return ddy, p * r * g, r * sum_ug
        ddy = ddy + minus * w * (r * sum_u / n + r**3 * c * sum_uc / n)
        bare = sum_ug + minus * sum_u * sum_g / n
        dx = minus * w * r**3 * c / n * bare + 3 * w * r**5 * c * sum_uc * sum_gc / n**2
        dx = dx + minus * w * r**3 / n * ((u + minus * sum_u / n) * sum_gc + (g + minus * sum_g / n) * sum_uc)
        dx = dx + p * (minus * r**3 * c * sum_gc / n + r * (g + minus * sum_g / n))
        return ddy, dx, r * bare + minus * r**3 * sum_uc * sum_gc / n

    ddy, dx, dweight = gradients(u, g, centered, w, p, q + s, -1)
    # In training x - mean is a sum of all x of the channel.
    of_c = np.abs(centered) + (0 if running is not None else total(np.abs(centered)) / n)
    sizes = gradients(np.abs(u), np.abs(g), of_c, np.abs(w), np.abs(p), np.abs(q) + np.abs(s), 1)
    return SecondOrder(np.where(passed, ddy, 0), dx, dweight.ravel(), SecondOrder(sizes[0], sizes[1], sizes[2].ravel()))


def assert_second_order(actual, expected: SecondOrder, dtype, names=("ddy", "dx", "dweight")) -> None:
    """Compare (ddy, dx, dweight) with the reference within what the contract allows for data of a dtype.

    None in place of an array is not compared.
    """
    for name, array in zip(names, actual, strict=True):
        if array is not None:
            off = excess(to_numpy(array), getattr(expected, name), getattr(expected.terms, name), dtype)
            assert np.all(off <= 1), f"{name} is off by {np.max(off)} times what is allowed"


def excess(array, expected, terms, dtype) -> np.ndarray:
    """Errors of an array divided by what is allowed. Numbers that its own dtype does not hold must be as it rounds
    them, or nearly 0.
    """
    assert array.shape == expected.shape
    with np.errstate(over="ignore"):
        rounded = expected.astype(array.dtype)
    info = ml_dtypes.finfo(array.dtype)
    least = info.smallest_subnormal if array.dtype.name == "float16" else info.tiny
    allowed = (
        BOUNDS[np.dtype(dtype).name] * terms + HALF_ULP[array.dtype.name] * np.abs(expected) + np.longdouble(least)
    )
    with np.errstate(invalid="ignore"):
        off = np.abs(array.astype(np.longdouble) - expected) / allowed
    return np.where(array == rounded, 0, np.where(np.isnan(off), np.inf, off))
