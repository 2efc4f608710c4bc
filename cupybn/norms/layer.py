"""Layer and RMS norm: the last axes of an array share their statistics, whatever comes before them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._arrays.kinds import kind
from cupybn._calls.call import Call
from cupybn._calls.flow import forward
from cupybn._calls.rows import Rows, as_normalized_shape
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
"""Names of the functions, for messages."""


class LayerNormGrads(NamedTuple):
    """The gradients that the way back of `layer_norm` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None


class RMSNormGrads(NamedTuple):
    """The gradients that the way back of `rms_norm` returns; None for what was not an argument."""

    input: Array
    weight: Array | None


def layer_norm(
    input: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Layer normalization: weight * (input - mean) / sqrt(var + eps) + bias.

    Mean and variance are those of each row: of the last axes, as many as normalized_shape has. A row of output depends
    on the row of input alone, to the last bit, whatever other rows there are. The arguments stand in the order of
    ``torch.nn.functional.layer_norm``.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64
        Of any rank; its last axes have the sizes in normalized_shape. Kinds and dtypes as for `batch_norm`.
    normalized_shape : int or sequence of ints
        Sizes of the last axes.
    weight, bias : arrays of the shape normalized_shape, or None
        None stands for 1 and 0. They may have any of the dtypes, each its own, and any strides.
    eps : float
        Added to the variance; not negative.
    out : array of the input's shape and dtype, or None
        Where the output goes, in any memory order. May be `input`.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        An input that is not dense, or whose last axes are not innermost in memory, in order, is read through one copy.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, eps not a number, or normalized_shape not
        an int or a sequence of ints.
    ValueError
        If shapes do not match, or eps is negative. Nothing has changed then.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1, 2, 3], [0, 0, 6]], np.float32)
    >>> F.layer_norm(x, 3, weight=np.array([1, 1, 2], np.float32)).round(2)
    array([[-1.22,  0.  ,  2.45],
           [-0.71, -0.71,  2.83]], dtype=float32)
    """
    return forward(_call(input, rows_of(LAYER_NORM, normalized_shape), weight, bias, eps), out)


def layer_norm_vjp(
    input: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, NormVjpFn[LayerNormGrads]]:
    """`layer_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `layer_norm`.

    Returns
    -------
    output : array
        As `layer_norm`.
    vjp_fn : NormVjpFn
        ``vjp_fn(grad_output) -> LayerNormGrads(input, weight, bias)``. The gradient of the input has its dtype and
        memory order, those of weight and bias have their dtypes and the shape normalized_shape.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[0, 1, 5], [2, 2, 8]], np.float32)
    >>> y, vjp_fn = F.layer_norm_vjp(x, 3, np.ones(3, np.float32), np.zeros(3, np.float32))
    >>> dx, dweight, dbias = vjp_fn(np.array([[1, 0, 0], [0, 0, 1]], np.float32))  # of a loss that is y[0, 0] + y[1, 2]
    >>> dx.round(3)
    array([[ 0.176, -0.22 ,  0.044],
           [-0.   , -0.   ,  0.   ]], dtype=float32)
    >>> dweight.round(2), dbias
    (array([-0.93,  0.  ,  1.41], dtype=float32), array([1., 0., 1.], dtype=float32))
    """
    rows = rows_of(LAYER_NORM, normalized_shape)
    return forward_vjp(_call(input, rows, weight, bias, eps), LayerNormGrads)


def rms_norm(
    input: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """Root mean square normalization: weight * input / sqrt(mean(input ** 2) + eps).

    The mean is that of each row: of the last axes, as many as normalized_shape has. A row of output depends on the row
    of input alone, to the last bit, whatever other rows there are. The arguments stand in the order of
    ``torch.nn.functional.rms_norm``.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64
        Of any rank; its last axes have the sizes in normalized_shape. Kinds and dtypes as for `batch_norm`.
    normalized_shape : int or sequence of ints
        Sizes of the last axes.
    weight : array of the shape normalized_shape, or None
        None stands for 1. It may have any of the dtypes, and any strides.
    eps : float or None
        Added to the mean; not negative. None is the distance from 1 to the next number: 2**-52 for float64 input,
        and 2**-23, that of float32, for all others.
    out : array of the input's shape and dtype, or None
        Where the output goes, in any memory order. May be `input`.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        An input that is not dense, or whose last axes are not innermost in memory, in order, is read through one copy.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, eps not a number, or normalized_shape not
        an int or a sequence of ints.
    ValueError
        If shapes do not match, or eps is negative. Nothing has changed then.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1, 1, 5], [3, 3, 3]], np.float32)
    >>> F.rms_norm(x, 3).round(2)
    array([[0.33, 0.33, 1.67],
           [1.  , 1.  , 1.  ]], dtype=float32)
    """
    rows = rows_of(RMS_NORM, normalized_shape)
    return forward(_call(input, rows, weight, None, eps_for(input) if eps is None else eps), out)


def rms_norm_vjp(
    input: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
) -> tuple[Array, NormVjpFn[RMSNormGrads]]:
    """`rms_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `rms_norm`.

    Returns
    -------
    output : array
        As `rms_norm`.
    vjp_fn : NormVjpFn
        ``vjp_fn(grad_output) -> RMSNormGrads(input, weight)``. The gradient of the input has its dtype and memory
        order, that of the weight has its dtype and the shape normalized_shape.

    Raises
    ------
    TypeError, ValueError
        As `rms_norm`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1, 1, 5]], np.float32)
    >>> y, vjp_fn = F.rms_norm_vjp(x, 3, np.ones(3, np.float32))
    >>> dx, dweight = vjp_fn(np.array([[1, 0, 0]], np.float32))  # of a loss that is y[0, 0]
    >>> dx.round(3), dweight.round(3)
    (array([[ 0.321, -0.012, -0.062]], dtype=float32), array([0.333, 0.   , 0.   ], dtype=float32))
    """
    rows = rows_of(RMS_NORM, normalized_shape)
    return forward_vjp(_call(input, rows, weight, None, eps_for(input) if eps is None else eps), RMSNormGrads)


def eps_for(input: Array) -> float:
    """What eps=None stands for in RMS norm: the distance from 1 to the next number of what is computed in."""
    return 2.0**-52 if kind(input) is not None and accumulation_dtype(input.dtype).itemsize == 8 else 2.0**-23


def rows_of(function: str, normalized_shape: Any) -> Rows:
    """Rows of this shape; raises unless it is an int or a sequence of ints."""
    return _rows(function, as_normalized_shape(normalized_shape))


@functools.lru_cache(maxsize=1024)
def _rows(function: str, shape: tuple[int, ...]) -> Rows:
    """Rows of this shape."""
    return Rows(function, None, shape)


def _call(input: Array, rows: Rows, weight: Array | None, bias: Array | None, eps: float) -> Call:
    """The call of a function."""
    return Call(input, Affine(weight, bias, eps), Running(), Epilogue(), True, 0, None, rows)
