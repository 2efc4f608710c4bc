"""Group norm: neighbouring channels of a sample share a mean and a variance."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from cupybn._calls import checks
from cupybn._calls.call import Call
from cupybn._calls.flow import forward
from cupybn._calls.rows import Rows
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray


class GroupNormGrads(NamedTuple):
    """The gradients that the way back of `group_norm` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


def group_norm(
    input: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Group normalization: activation(weight * (input - mean) / sqrt(var + eps) + bias + residual).

    Mean and variance are those of each group of each sample: of C / num_groups neighbouring channels, over all
    positions. The arguments stand in the order of ``torch.nn.functional.group_norm``.

    Parameters
    ----------
    input : array of rank >= 2, float16, bfloat16, float32 or float64
        Axis 0 is that of the samples. Kinds and dtypes as for `batch_norm`.
    num_groups : int
        Divides C. 1 is layer norm over channels and positions, C is instance norm.
    weight, bias : (C,) arrays or None
        None stands for 1 and 0. These vectors may have any of the dtypes, each its own, and any stride.
    eps : float
        Added to the variance; not negative.
    residual : array of the input's shape and dtype, or None
        Added before the activation.
    activation : None or "relu"
        ReLU passes NaN on.
    channel_axis : int
        The axis of C, counted from either end; any but axis 0.
    out : array of the input's shape and dtype, or None
        Where the output goes, in any memory order. May be `input` or `residual`.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        An input that is not dense, or whose samples do not lie one after the other, is read through one copy.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, eps not a number, or num_groups or
        channel_axis not an integer.
    ValueError
        If shapes do not match, the groups do not divide the channels, eps is negative, or the activation is unknown.
        Nothing has changed then.

    References
    ----------
    Wu and He, "Group Normalization" (2018).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[[1, 2], [3, 4], [0, 0], [0, 8]]], np.float32)  # (N, C, L)
    >>> F.group_norm(x, 2).round(2)
    array([[[-1.34, -0.45],
            [ 0.45,  1.34],
            [-0.58, -0.58],
            [-0.58,  1.73]]], dtype=float32)
    """
    return forward(
        _call(input, num_groups, Affine(weight, bias, eps), Epilogue(residual, activation), channel_axis), out
    )


def group_norm_vjp(
    input: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
) -> tuple[Array, NormVjpFn[GroupNormGrads]]:
    """`group_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `group_norm`.

    Returns
    -------
    output : array
        As `group_norm`.
    vjp_fn : NormVjpFn
        ``vjp_fn(grad_output) -> GroupNormGrads(input, weight, bias, residual)``. The gradients of input and residual
        have the input's dtype and memory order, those of weight and bias their dtypes.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[[1, 2], [3, 4]]], np.float32)  # (N, C, L)
    >>> y, vjp_fn = F.group_norm_vjp(x, 1, bias=np.zeros(2, np.float32), activation="relu", residual=x)
    >>> dx, dweight, dbias, dresidual = vjp_fn(np.ones_like(y))
    >>> dbias, dresidual  # ReLU stopped the first value
    (array([1., 2.], dtype=float32), array([[[0., 1.],
            [1., 1.]]], dtype=float32))
    """
    call = _call(input, num_groups, Affine(weight, bias, eps), Epilogue(residual, activation), channel_axis)
    return forward_vjp(call, GroupNormGrads)


def _call(input: Array, num_groups: int, affine: Affine, epilogue: Epilogue, channel_axis: int) -> Call:
    """The call of a function."""
    return Call(input, affine, Running(), epilogue, True, channel_axis, None, rows_of(num_groups))


def rows_of(num_groups: Any) -> Rows:
    """Rows for so many groups; raises unless this is an int."""
    return _rows(num_groups if type(num_groups) is int else checks.as_int("num_groups", num_groups))


@functools.lru_cache(maxsize=1024)
def _rows(num_groups: int) -> Rows:
    """Rows for so many groups."""
    return Rows("group_norm", num_groups)
