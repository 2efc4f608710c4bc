"""Batch norm by the textbook, in float64 and independent of the library: what the tests compare with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    """All that batch norm yields for one batch, in float64 or, for float64 data, wider; vectors have shape (C,)."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray  # biased
    dx: np.ndarray | None = None
    dweight: np.ndarray | None = None
    dbias: np.ndarray | None = None
    dresidual: np.ndarray | None = None


def batch_norm(
    x, weight=None, bias=None, *, running=None, eps=1e-5, residual=None, relu=False, channel_axis=1, dy=None
) -> Reference:
    """Forward and, with `dy`, backward. `running` is (mean, var) in eval mode and None in training."""
    x = np.asarray(x)
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    x = x.astype(wide)
    axis = channel_axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]

    def column(vector, default):
        return default if vector is None else np.asarray(vector).astype(wide).reshape(shape)

    if running is None:
        mean = x.mean(axis=others, keepdims=True)
        var = ((x - mean) ** 2).mean(axis=others, keepdims=True)
    else:
        mean, var = (column(v, None) for v in running)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    y = xhat * column(weight, 1) + column(bias, 0)
    if residual is not None:
        y = y + np.asarray(residual).astype(wide)
    passed = y > 0 if relu else np.ones(y.shape, bool)
    y = np.where(np.isnan(y) | passed, y, 0)
    result = Reference(y, mean.ravel(), var.ravel())
    if dy is None:
        return result
    g = np.where(passed, np.asarray(dy).astype(wide), 0)
    dbias, dweight = g.sum(axis=others), (g * xhat).sum(axis=others)
    dx = g * rstd * column(weight, 1)
    if running is None:
        n = x.size // x.shape[axis]
        dx -= (dbias.reshape(shape) + xhat * dweight.reshape(shape)) / n * rstd * column(weight, 1)
    return result._replace(dx=dx, dweight=dweight, dbias=dbias, dresidual=g)
