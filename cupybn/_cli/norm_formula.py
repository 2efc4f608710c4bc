"""The norms within a sample by the textbook in plain float64, row by row: for `check` to compare `numpy_norms` with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupybn._steps.bundles import (
    Affine,
    Doubles,
    Epilogue,
    Gradients,
    Passed,
    Running,
    Statistics,
    Sums,
    Tensor,
    Vector,
)
from cupybn._steps.norm import Norm


def norm_forward(
    x: Tensor, norm: Norm, affine: Affine, epilogue: Epilogue, out: Tensor, keep: bool = True
) -> Statistics | None:
    """activation(weight * xhat + bias + residual), and mean and variance of each row; not centered, the mean is 0."""
    pairs = [(row.mean() if norm.centered else 0.0, row) for row in _rows(x, norm)]
    statistics = Statistics(np.array([(mean, ((row - mean) ** 2).mean()) for mean, row in pairs]))
    y = preactivation(x, norm, statistics, affine, epilogue.residual)
    if epilogue.passed is not None:
        epilogue.passed[...] = y > 0
    out[...] = np.maximum(y, 0) if epilogue.activation == "relu" else y
    return statistics if keep else None


def norm_backward(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    gradients: Gradients,
    keep: bool = True,
) -> Sums | None:
    """rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat)) where g is what activation passed."""
    g, xhat = dy.astype(np.float64), normalized(x, norm, statistics, affine.eps)
    if epilogue.activation == "relu":
        y = preactivation(x, norm, statistics, affine, None)
        g = np.where(y > 0 if epilogue.passed is None else epilogue.passed, g, 0)
    terms, dx = g * _column(affine.weight), np.zeros(x.shape)
    for row, term, of_x, (_, var) in zip(
        _rows(dx, norm), _rows(terms, norm), _rows(xhat, norm), statistics.pairs, strict=True
    ):
        centered = term - term.mean() if norm.centered else term
        row[...] = (centered - of_x * (term * of_x).mean()) / np.sqrt(var + affine.eps)
    gradients.dx[...] = dx
    if gradients.dresidual is not None:
        gradients.dresidual[...] = g
    return Sums(g.sum((0, 1, 3))[None], (g * xhat).sum((0, 1, 3))[None]) if keep else None


def norm_parameters(sums: Sums, dweight: Vector | None, dbias: Vector | None) -> None:
    """The gradients of weight and bias: both sums over all parts."""
    assert dweight is not None
    assert dbias is not None
    dweight[...], dbias[...] = sums.dy_xhat.sum(axis=0), sums.dy.sum(axis=0)


def norm_update_running(statistics: Statistics, running: Running, count: float) -> None:
    """running = (1 - momentum) * running + momentum * mean over the samples, of means and of unbiased variances."""
    assert running.mean is not None
    assert running.var is not None
    assert running.momentum is not None
    C = running.mean.size
    mean, var = (values.reshape(-1, C).mean(axis=0) for values in (statistics.mean, statistics.var))
    for vector, new in (running.mean, mean), (running.var, var * count / (count - 1)):
        vector[...] = (1 - running.momentum) * vector + running.momentum * new


def empty_passed(x: Tensor, norm: Norm, residual: Tensor, out: Tensor) -> Passed:  # noqa: ARG001
    """A record with a truth value for each element, whose values are not set."""
    return np.empty(x.shape, bool)


def normalized(x: Tensor, norm: Norm, statistics: Statistics, eps: float) -> Doubles:
    """(x - mean) / sqrt(var + eps)."""
    xhat = x.astype(np.float64)
    for row, (mean, var) in zip(_rows(xhat, norm), statistics.pairs, strict=True):
        row[...] = (row - mean) / np.sqrt(var + eps)
    return xhat


def preactivation(x: Tensor, norm: Norm, statistics: Statistics, affine: Affine, residual: Tensor | None) -> Doubles:
    """weight * xhat + bias + residual."""
    y = normalized(x, norm, statistics, affine.eps) * _column(affine.weight) + _column(affine.bias)
    return y if residual is None else y + residual.astype(np.float64)


def _rows(x: Tensor, norm: Norm) -> Iterator[Doubles]:
    """The rows of an (N, A, C, B) array in float64; views of it, if it is float64."""
    wide, width = x.astype(np.float64, copy=False), x.shape[2] // norm.groups
    for sample in wide:
        for first in range(0, x.shape[2], width):
            yield sample[:, first : first + width]


def _column(vector: Vector) -> Doubles:
    """A vector over channels in the shape that fits (N, A, C, B)."""
    return vector.astype(np.float64)[:, None]
