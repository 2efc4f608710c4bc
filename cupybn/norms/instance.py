"""Instance norm: each channel of each sample has its own mean and variance."""

from __future__ import annotations

from typing import Any, NamedTuple

from cupybn._calls import checks
from cupybn._calls.call import Call
from cupybn._calls.flow import forward
from cupybn._calls.rows import Rows
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray

ROWS = Rows("instance_norm")
"""Rows of a batch: the positions of a channel."""
ROWS_OF_A_SAMPLE = Rows("instance_norm", batched=False)
"""Rows of a single sample, which has no axis of the batch."""


class InstanceNormGrads(NamedTuple):
    """The gradients that the way back of `instance_norm` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


def instance_norm(
    input: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Instance normalization: activation(weight * (input - mean) / sqrt(var + eps) + bias + residual).

    Mean and variance are those of each channel of each sample, over all positions, or the running ones. The arguments
    stand in the order of ``torch.nn.functional.instance_norm``.

    Parameters
    ----------
    input : array of rank >= 2, float16, bfloat16, float32 or float64
        Axis 0 is that of the samples. Kinds and dtypes as for `batch_norm`.
    running_mean, running_var : (C,) arrays or None
        With input statistics moved in place: running = (1 - momentum) * running + momentum * mean over the samples, of
        the means and of the unbiased variances. Else used as they are.
    weight, bias : (C,) arrays or None
        None stands for 1 and 0. These vectors may have any of the dtypes, each its own, and any stride.
    use_input_stats : bool
        Whether mean and variance are those of the input.
    momentum : float
        The weight of the new samples in the running statistics.
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
        If an argument is not an array of the right kind, device and dtype, momentum or eps not a number, channel_axis
        not an integer, or use_input_stats not a bool.
    ValueError
        If shapes do not match; if there is a single position and the statistics are those of the input, as its unbiased
        variance is not defined; if eps is negative; if one running buffer comes without the other, or none when
        use_input_stats is False; if the activation is unknown. Nothing has changed then.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization" (2016).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[[1, 2, 3], [4, 4, 7]], [[0, 0, 6], [1, 1, 1]]], np.float32)  # (N, C, L)
    >>> F.instance_norm(x).round(2)
    array([[[-1.22,  0.  ,  1.22],
            [-0.71, -0.71,  1.41]],
    <BLANKLINE>
           [[-0.71, -0.71,  1.41],
            [ 0.  ,  0.  ,  0.  ]]], dtype=float32)
    >>> running_mean, running_var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> y = F.instance_norm(x, running_mean, running_var)
    >>> running_mean  # of the means 2 and 2, and of 5 and 1, a tenth
    array([0.2, 0.3], dtype=float32)
    """
    call = Call(
        input,
        Affine(weight, bias, eps),
        Running(running_mean, running_var, as_momentum(momentum)),
        Epilogue(residual, activation),
        use_input_stats,
        channel_axis,
        None,
        ROWS,
    )
    return forward(call, out)


def instance_norm_vjp(
    input: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
) -> tuple[Array, NormVjpFn[InstanceNormGrads]]:
    """`instance_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `instance_norm`.

    Returns
    -------
    output : array
        As `instance_norm`.
    vjp_fn : NormVjpFn
        ``vjp_fn(grad_output) -> InstanceNormGrads(input, weight, bias, residual)``. The gradients of input and residual
        have the input's dtype and memory order, those of weight and bias their dtypes.

    Raises
    ------
    TypeError, ValueError
        As `instance_norm`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[[0, 1, 5]]], np.float32)  # (N, C, L)
    >>> y, vjp_fn = F.instance_norm_vjp(x, weight=np.ones(1, np.float32))
    >>> dx, dweight, dbias, dresidual = vjp_fn(np.array([[[1, 0, 0]]], np.float32))  # of a loss that is y[0, 0, 0]
    >>> dx.round(3).ravel(), dweight.round(3), dbias
    (array([ 0.176, -0.22 ,  0.044], dtype=float32), array([-0.926], dtype=float32), None)
    """
    call = Call(
        input,
        Affine(weight, bias, eps),
        Running(running_mean, running_var, as_momentum(momentum)),
        Epilogue(residual, activation),
        use_input_stats,
        channel_axis,
        None,
        ROWS,
    )
    return forward_vjp(call, InstanceNormGrads)


def as_momentum(momentum: Any) -> float:
    """Momentum as a float; None, by which layers of batch norm count their batches, is an error."""
    if momentum is None:
        raise TypeError(
            "expected momentum to be a float (got None): instance norm counts no batches; 1 / n with the n-th batch is "
            "the mean over n"
        )
    return checks.as_float("momentum", momentum)
