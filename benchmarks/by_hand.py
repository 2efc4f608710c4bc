"""Batch norm as one writes it by hand with array functions: float32 in, plain formulas, and a new array for each step.

The forward pass is the one that docs/start.md shows. Shapes are kept (``keepdims``), so that all vectors are
arrays with the axes of the input: those that come in are brought into this form by `along`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def along(vector: Array, x: Array, channel_axis: int) -> Array:
    """A vector of the channels with the axes of x."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return vector.reshape(shape)


def others(x: Array, channel_axis: int) -> tuple[int, ...]:
    """The axes but that of the channels."""
    return tuple(i for i in range(x.ndim) if i != channel_axis % x.ndim)


def training(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array,
    bias: Array,
    channel_axis: int,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """The output, normalized by the batch's own statistics; running statistics are updated."""
    axes, n = others(x, channel_axis), x.size // x.shape[channel_axis]
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    running_mean *= 1 - momentum
    running_mean += momentum * mean.ravel()
    running_var *= 1 - momentum
    running_var += momentum * var.ravel() * (n / (n - 1))
    return (x - mean) / np.sqrt(var + eps) * along(weight, x, channel_axis) + along(bias, x, channel_axis)


def inference(
    x: Array, running_mean: Array, running_var: Array, weight: Array, bias: Array, channel_axis: int, eps: float = 1e-5
) -> Array:
    """The output, normalized by the running statistics."""
    mean, var, weight, bias = (along(v, x, channel_axis) for v in (running_mean, running_var, weight, bias))
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def backward(
    dy: Array, x: Array, mean: Array, var: Array, weight: Array, channel_axis: int, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """The gradients of x, weight and bias; mean and var are kept from the way forward, with the axes of x."""
    axes, n = others(x, channel_axis), x.size // x.shape[channel_axis]
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dbias, dweight = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
    dx = (dy - dbias / n - xhat * (dweight / n)) * (rstd * along(weight, x, channel_axis))
    return dx, dweight.ravel(), dbias.ravel()
