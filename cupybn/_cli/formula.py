"""Batch norm by the textbook in plain float64: the steps, for `check` to compare those of `numpy_ops` with.

No tiles, no threads, no second thoughts about precision. Outputs are float64, so that nothing is rounded but once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cupybn._steps.bundles import (
    Affine,
    Counter,
    Doubles,
    Epilogue,
    Gradients,
    Mask,
    Moments,
    Passed,
    Running,
    Statistics,
    Sums,
    Tensor,
    Vector,
)


def bn_stats(x: Tensor, batches: Counter | None = None, mask: Mask | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel."""
    x = x.astype(np.float64)
    count = np.array([x.size / x.shape[1] if mask is None else float(np.count_nonzero(mask))])
    mean = total(_left(x, mask)) / count
    m2 = total(_left((x - column(mean)) ** 2, mask))
    return Moments(count, mean[None], m2[None], None if batches is None else batches.copy())


def mean_and_var(moments: Moments, dtype: npt.DTypeLike) -> tuple[Vector, Vector]:
    """Mean and biased variance of all parts together."""
    n = moments.count[:, None]
    mean = (n * moments.mean).sum(axis=0) / n.sum()
    var = (moments.m2 + n * (moments.mean - mean) ** 2).sum(axis=0) / n.sum()
    return mean.astype(dtype), var.astype(dtype)


def merge_moments(moments: Moments) -> Doubles:
    """Count, mean and m2 of all parts together, as one row."""
    count, (mean, var) = moments.count.sum(), mean_and_var(moments, np.float64)
    return np.concatenate([[count], mean, var * count])[None]


def bn_update_running(moments: Moments, running: Running) -> None:
    """running = (1 - momentum) * running + momentum * batch, and a batch more; nothing if means are not finite."""
    assert running.mean is not None
    assert running.var is not None
    assert running.momentum is not None
    count = moments.count.sum()
    if running.skip_nonfinite and not np.isfinite(moments.mean).all():
        return
    mean, var = mean_and_var(moments, np.float64)
    for vector, new in (running.mean, mean), (running.var, var * count / (count - 1)):
        vector[...] = (1 - running.momentum) * vector + running.momentum * new
    if running.batches is not None:
        running.batches[...] += 1


def empty_passed(x: Tensor, residual: Tensor, out: Tensor, mask: Mask | None = None) -> Passed:  # noqa: ARG001
    """A record with a truth value for each element, whose values are not set."""
    return np.empty(x.shape, bool)


def bn_normalize(
    x: Tensor, moments: Moments | None, affine: Affine, running: Running, epilogue: Epilogue, out: Tensor
) -> Statistics:
    """activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), and the running statistics."""
    if moments is None:
        assert running.mean is not None
        assert running.var is not None
        statistics = Statistics.of(running.mean.astype(np.float64), running.var.astype(np.float64))
    else:
        statistics = Statistics.of(*mean_and_var(moments, np.float64))
        if epilogue.mask is not None:
            statistics = statistics._replace(count_left=moments.count.sum()[None])
        bn_update_running(moments, running)
    y = _preactivation(x, statistics, affine)
    if epilogue.residual is not None:
        y += epilogue.residual.astype(np.float64)
    if epilogue.passed is not None:
        epilogue.passed[...] = _left(y, epilogue.mask) > 0
    out[...] = _left(np.maximum(y, 0) if epilogue.activation == "relu" else y, epilogue.mask)
    return statistics


def bn_forward(x: Tensor, affine: Affine, running: Running, epilogue: Epilogue, out: Tensor) -> Statistics:
    """`bn_stats` and `bn_normalize`, one after the other."""
    return bn_normalize(x, bn_stats(x, mask=epilogue.mask), affine, running, epilogue, out)


def bn_backward_reduce(dy: Tensor, x: Tensor, statistics: Statistics, affine: Affine, epilogue: Epilogue) -> Sums:
    """sum(dy) and sum(dy * xhat), where activation passed dy."""
    g = passed_of(dy, x, statistics, affine, epilogue)
    return Sums(total(g)[None], total(g * _left(xhat_of(x, statistics, affine), epilogue.mask))[None])


def merge_sums(sums: Sums, count: Doubles, dweight: Vector, dbias: Vector) -> Doubles:
    """Both sums over all parts, divided by count; undivided they are the gradients of bias and weight."""
    dbias[...], dweight[...] = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
    return np.concatenate([dbias, dweight])[None] / count


def bn_backward_input(
    dy: Tensor,
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    sums: Sums,
    inv_count: float,
    gradients: Gradients,
) -> None:
    """(dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation passed dy."""
    g = passed_of(dy, x, statistics, affine, epilogue)
    sum_dy, sum_dy_xhat = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
    if statistics.count_left is not None:
        inv_count = inv_count / statistics.count_left[0]
    terms = g - inv_count * (column(sum_dy) + xhat_of(x, statistics, affine) * column(sum_dy_xhat))
    dx = terms * column(affine.weight / np.sqrt(statistics.var + affine.eps))
    gradients.dx[...] = _left(dx, epilogue.mask)
    if gradients.dresidual is not None:
        gradients.dresidual[...] = g
    assert gradients.dweight is not None
    assert gradients.dbias is not None
    gradients.dweight[...], gradients.dbias[...] = sum_dy_xhat, sum_dy


def bn_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    inv_count: float,
    gradients: Gradients,
) -> None:
    """`bn_backward_reduce` and `bn_backward_input`, one after the other."""
    sums = bn_backward_reduce(dy, x, statistics, affine, epilogue)
    bn_backward_input(dy, x, statistics, affine, epilogue, sums, inv_count, gradients)


def _left(x: Tensor, mask: Mask | None) -> Tensor:
    """The elements that a mask leaves, 0 for the others."""
    return x if mask is None else np.where(mask[:, None], x, 0)


def total(x: Tensor) -> Doubles:
    """The sum of each channel, along memory: only there does NumPy add pairwise."""
    return np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(x.shape[1], -1).sum(axis=1)


def column(vector: Vector) -> Doubles:
    """A vector over channels in the shape that fits (N, C, L)."""
    return vector[:, None]


def xhat_of(x: Tensor, statistics: Statistics, affine: Affine) -> Doubles:
    """The normalised input."""
    return (x.astype(np.float64) - column(statistics.mean)) / column(np.sqrt(statistics.var + affine.eps))


def _preactivation(x: Tensor, statistics: Statistics, affine: Affine) -> Doubles:
    return xhat_of(x, statistics, affine) * column(affine.weight) + column(affine.bias)


def passed_of(dy: Tensor, x: Tensor, statistics: Statistics, affine: Affine, epilogue: Epilogue) -> Doubles:
    """The elements of dy that activation passed and a mask has left, 0 for the others."""
    dy = _left(dy.astype(np.float64), epilogue.mask)
    if epilogue.activation is None:
        return dy
    passed = _preactivation(x, statistics, affine) > 0 if epilogue.passed is None else epilogue.passed
    return np.where(passed, dy, 0)
