"""The steps of instance, group, layer and RMS norm on NumPy arrays: the specification of the kernels, and the fallback.

Arrays are contiguous, of shape (N, A, C, B): A positions of a sample lie before the channel axis in memory, B behind
it. So channels first is (N, 1, C, B), channels last (N, A, C, 1), and what layer and RMS norm take is (samples, 1,
elements, 1). Row r is group ``r % groups`` of sample ``r // groups``; its K values have one mean and one variance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import write_at_once
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics, Sums
from cupybn._steps.norm import Norm
from cupybn._steps.tiles import numpy_settings

Array = npt.NDArray[Any]

_WITHIN_A_ROW = (1, 3, 4)
"""Axes along a row of an array that `_grouped` has made."""


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@numpy_settings
def norm_forward(
    x: Array, norm: Norm, affine: Affine, epilogue: Epilogue, out: Array, keep: bool = True
) -> Statistics | None:
    """out = activation(weight * xhat + bias + residual), xhat = (x - mean) / sqrt(var + eps) in each row.

    Not centered, xhat = x / sqrt(mean(x^2) + eps).

    Parameters
    ----------
    x, out : (N, A, C, B) arrays; out may be x or the residual
    norm : Norm
    affine : Affine
        Weight and bias of each channel.
    epilogue : Epilogue
        Its record gets where ReLU passes. It has no mask.
    keep : bool
        Whether the statistics are wanted, for a way back or for running statistics.

    Returns
    -------
    Mean and biased variance of each row, if they are wanted; 0 and mean(x^2), where it is not centered.
    """
    residual, activation, passed, _ = epilogue
    statistics = _row_statistics(x, norm)
    y = _preactivation(x, _xhat(x, norm, statistics, affine.eps), affine, residual)
    if passed is not None:
        np.greater(y, 0, out=passed)
    if activation == "relu":
        np.maximum(y, 0, out=y)
    np.copyto(out, y, casting="unsafe")
    return statistics if keep else None


def _row_statistics(x: Array, norm: Norm) -> Statistics:
    """Mean and biased variance of each row; 0 and mean(x^2), where it is not centered."""
    rows = _grouped(x, norm)
    if not norm.centered:
        var = np.square(rows).mean(axis=_WITHIN_A_ROW)
        return Statistics.of(np.zeros(var.size), var.ravel())
    center = rows[:, :1, :, :1, :1]
    center = center + (rows - center).mean(axis=_WITHIN_A_ROW, keepdims=True)
    d = rows - center
    off = d.mean(axis=_WITHIN_A_ROW, keepdims=True)
    var = np.maximum(np.square(d).mean(axis=_WITHIN_A_ROW, keepdims=True) - off * off, 0)
    mean = center + off
    return Statistics.of((mean + (mean - mean)).ravel(), var.ravel())  # NaN where the mean is infinite


def _xhat(x: Array, norm: Norm, statistics: Statistics, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps), in float64."""
    mean, rstd = _of_rows(x, norm, statistics.mean), _of_rows(x, norm, _rstd(statistics, eps))
    xhat: Array = (_grouped(x, norm) - mean) * rstd
    return xhat.reshape(x.shape)


def _preactivation(x: Array, xhat: Array, affine: Affine, residual: Array | None) -> Array:
    """weight * xhat + bias + residual: the value whose sign decides what ReLU passes."""
    y = xhat * _weight(x, affine)
    if affine.bias is not None:
        y += affine.bias.astype(np.float64)[:, None]
    if residual is not None:
        y += residual.astype(np.float64)
    return y


def empty_passed(x: Array, norm: Norm, residual: Array, out: Array) -> Array:  # noqa: ARG001
    """A record of where ReLU passes, one bool for each element of x, for a way back that need not know the residual."""
    return np.empty(x.shape, np.bool_)


@numpy_settings
def norm_update_running(statistics: Statistics, running: Running, count: float) -> None:
    """running = (1 - momentum) * running + momentum * mean over the samples, in place.

    The means are those of the rows' means and of their unbiased variances; each channel is a row, as in instance norm.

    Parameters
    ----------
    statistics : Statistics
        Of the rows.
    running : Running
        Mean and variance of each channel, and momentum, which is not None.
    count : float
        Number of values of each row, more than 1.
    """
    assert running.mean is not None
    assert running.var is not None
    assert running.momentum is not None
    old = np.array([running.mean, running.var], np.float64)
    batch = statistics.pairs.reshape(-1, old.shape[1], 2).mean(axis=0).T
    batch[1] *= count / (count - 1)
    mean, var = (1 - running.momentum) * old + running.momentum * batch
    write_at_once(
        [
            (running.mean, mean.astype(running.mean.dtype)),
            (running.var, var.astype(running.var.dtype)),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@numpy_settings
def norm_backward(
    dy: Array,
    x: Array,
    norm: Norm,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    gradients: Gradients,
    keep: bool = True,
) -> Sums | None:
    """dx = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat)), means over the row.

    g is dy where activation passed it, else 0; it is dresidual. Not centered, there is no mean(weight * g).

    Parameters
    ----------
    dy, x : (N, A, C, B) arrays
    norm : Norm
    statistics : Statistics
        Of the rows.
    affine : Affine
    epilogue : Epilogue
        Activation and the record that `norm_forward` has filled, or None.
    gradients : Gradients
        Of x and of the residual. Those of weight and bias follow from the sums: see `norm_parameters`.
    keep : bool
        Whether the sums are wanted.

    Returns
    -------
    sum(g) and sum(g * xhat) of each channel, if they are wanted.
    """
    _, activation, passed, _ = epilogue
    xhat = _xhat(x, norm, statistics, affine.eps)
    g = dy.astype(np.float64)
    if activation == "relu":
        g = np.where(_preactivation(x, xhat, affine, None) > 0 if passed is None else passed, g, 0)
    term = g * _weight(x, affine)
    rows, rows_xhat = _grouped(term, norm), _grouped(xhat, norm)
    dx = rows - rows_xhat * (rows * rows_xhat).mean(axis=_WITHIN_A_ROW, keepdims=True)
    if norm.centered:
        dx -= rows.mean(axis=_WITHIN_A_ROW, keepdims=True)
    dx *= _of_rows(x, norm, _rstd(statistics, affine.eps))
    np.copyto(gradients.dx, dx.reshape(x.shape), casting="unsafe")
    if gradients.dresidual is not None:
        np.copyto(gradients.dresidual, g, casting="unsafe")
    return Sums(g.sum(axis=(0, 1, 3))[None], (g * xhat).sum(axis=(0, 1, 3))[None]) if keep else None


@numpy_settings
def norm_parameters(sums: Sums, dweight: Array | None, dbias: Array | None) -> None:
    """dweight = sum(g * xhat) and dbias = sum(g) over the whole batch, from sums in parts."""
    if dweight is not None:
        np.copyto(dweight, sums.dy_xhat.sum(axis=0), casting="unsafe")
    if dbias is not None:
        np.copyto(dbias, sums.dy.sum(axis=0), casting="unsafe")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and channels


def _grouped(x: Array, norm: Norm) -> Array:
    """The array as (N, A, groups, channels of a group, B), in float64."""
    N, A, C, B = x.shape
    return x.reshape(N, A, norm.groups, C // norm.groups, B).astype(np.float64, copy=False)


def _of_rows(x: Array, norm: Norm, values: Array) -> Array:
    """A value of each row, as `_grouped` needs it."""
    return values.reshape(len(x), 1, norm.groups, 1, 1)


def _rstd(statistics: Statistics, eps: float) -> Array:
    """1 / sqrt(var + eps) of each row."""
    return np.asarray(1 / np.sqrt(statistics.var + eps))


def _weight(x: Array, affine: Affine) -> Array:
    """Weight of each channel as a column, in float64."""
    weight = np.ones(x.shape[2]) if affine.weight is None else affine.weight.astype(np.float64)
    return np.asarray(weight[:, None])
