"""Batch norm by the textbook in plain float64: the functions of `numpy_ops`, for `check` to compare them with.

No tiles, no threads, no second thoughts about precision. Outputs are float64, so that nothing is rounded but once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._steps.bundles import Moments, Statistics, Sums

Array = npt.NDArray[Any]


def bn_stats(x: Array, num_batches_tracked: Array | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel."""
    x = x.astype(np.float64)
    count = np.array([x.size / x.shape[1]])
    mean = _total(x) / count
    m2 = _total((x - _column(mean)) ** 2)
    return Moments(count, mean[None], m2[None], None if num_batches_tracked is None else num_batches_tracked.copy())


def mean_and_var(moments: Moments, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Mean and biased variance of all parts together."""
    n = moments.count[:, None]
    mean = (n * moments.mean).sum(axis=0) / n.sum()
    var = (moments.m2 + n * (moments.mean - mean) ** 2).sum(axis=0) / n.sum()
    return mean.astype(dtype), var.astype(dtype)


def merge_moments(moments: Moments) -> Array:
    """The same, as one row: count, mean, m2."""
    count, (mean, var) = moments.count.sum(), mean_and_var(moments, np.float64)
    return np.concatenate([[count], mean, var * count])[None]


def bn_update_running(
    moments: Moments, running_mean: Array, running_var: Array, momentum: float, num_batches_tracked: Array
) -> None:
    """running = (1 - momentum) * running + momentum * batch."""
    count = moments.count.sum()
    mean, var = mean_and_var(moments, np.float64)
    for running, new in (running_mean, mean), (running_var, var * count / (count - 1)):
        running[...] = (1 - momentum) * running + momentum * new
    num_batches_tracked += 1


def empty_mask(x: Array, residual: Array, out: Array) -> Array:  # noqa: ARG001
    """Room for a truth value per element."""
    return np.empty(x.shape, bool)


def bn_normalize(
    x: Array,
    moments: Moments | None,
    eps: float,
    weight: Array,
    bias: Array,
    residual: Array | None,
    activation: str | None,
    running_mean: Array,
    running_var: Array,
    momentum: float,
    num_batches_tracked: Array | None,
    out: Array,
    mask: Array | None,
) -> Statistics:
    """activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), and the running statistics."""
    if moments is None:
        statistics = Statistics(running_mean.astype(np.float64), running_var.astype(np.float64))
    else:
        assert num_batches_tracked is not None
        statistics = Statistics(*mean_and_var(moments, np.float64))
        bn_update_running(moments, running_mean, running_var, momentum, num_batches_tracked)
    y = _preactivation(x, statistics, eps, weight, bias)
    if residual is not None:
        y += residual.astype(np.float64)
    if mask is not None:
        mask[...] = y > 0
    out[...] = np.maximum(y, 0) if activation == "relu" else y
    return statistics


def bn_forward(x: Array, *arguments: Any) -> Statistics:
    """Both steps."""
    return bn_normalize(x, bn_stats(x), *arguments)


def bn_backward_reduce(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array,
    bias: Array,
    activation: str | None,
    mask: Array | None,
) -> Sums:
    """sum(dy) and sum(dy * xhat), where activation passed dy."""
    g = _passed(dy, x, statistics, eps, weight, bias, activation, mask)
    return Sums(_total(g)[None], _total(g * _xhat(x, statistics, eps))[None])


def merge_sums(sums: Sums, count: Array, dweight: Array, dbias: Array) -> Array:
    """Both sums over all parts, divided by count, and the gradients that they are."""
    dbias[...], dweight[...] = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
    row: Array = np.concatenate([dbias, dweight])[None] / count
    return row


def bn_backward_input(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array,
    bias: Array,
    activation: str | None,
    mask: Array | None,
    sums: Sums,
    inv_count: float,
    dx: Array,
    dresidual: Array | None,
    dweight: Array,
    dbias: Array,
) -> None:
    """(dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation passed dy."""
    g = _passed(dy, x, statistics, eps, weight, bias, activation, mask)
    sum_dy, sum_dy_xhat = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
    terms = g - inv_count * (_column(sum_dy) + _xhat(x, statistics, eps) * _column(sum_dy_xhat))
    dx[...] = terms * _column(weight / np.sqrt(statistics.var + eps))
    if dresidual is not None:
        dresidual[...] = g
    dweight[...], dbias[...] = sum_dy_xhat, sum_dy


def bn_backward(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array,
    bias: Array,
    activation: str | None,
    mask: Array | None,
    *arguments: Any,
) -> None:
    """Both steps."""
    step = (dy, x, statistics, eps, weight, bias, activation, mask)
    bn_backward_input(*step, bn_backward_reduce(*step), *arguments)


def _total(x: Array) -> Array:
    """The sum of each channel, along memory: only there does NumPy add pairwise."""
    total: Array = np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(x.shape[1], -1).sum(axis=1)
    return total


def _column(vector: Array) -> Array:
    return vector[:, None]


def _xhat(x: Array, statistics: Statistics, eps: float) -> Array:
    xhat: Array = (x.astype(np.float64) - _column(statistics.mean)) / _column(np.sqrt(statistics.var + eps))
    return xhat


def _preactivation(x: Array, statistics: Statistics, eps: float, weight: Array, bias: Array) -> Array:
    return _xhat(x, statistics, eps) * _column(weight) + _column(bias)


def _passed(
    dy: Array,
    x: Array,
    statistics: Statistics,
    eps: float,
    weight: Array,
    bias: Array,
    activation: str | None,
    mask: Array | None,
) -> Array:
    dy = dy.astype(np.float64)
    if activation is None:
        return dy
    return np.where(_preactivation(x, statistics, eps, weight, bias) > 0 if mask is None else mask, dy, 0)
