"""Batch normalization as functions of arrays: the flow of one call, from top to bottom.

input -> layout (N, C, L) -> bn_stats -> bn_normalize -> output, running statistics
grad_output -> bn_backward_reduce -> bn_backward_input -> gradients

In training the two steps each way are one, bn_forward and bn_backward: nothing happens in between, unless the batch is
spread over ranks (`_synchronized`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from cupybn._arrays.devices import current, empty_like, write_at_once, zeros_like
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._arrays.kinds import kind, plain
from cupybn._calls import checks
from cupybn._calls.call import Call, Checked
from cupybn._calls.layout import Layout
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.bundles import Statistics

__all__ = ["BatchNormGrads", "batch_norm", "batch_norm_vjp", "moments"]

Array = Any  # numpy.ndarray or cupy.ndarray


class BatchNormGrads(NamedTuple):
    """The gradients that ``vjp_fn`` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


VjpFn = Callable[[Array], BatchNormGrads]


def batch_norm(
    input: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Batch normalization: activation(weight * (input - mean) / sqrt(var + eps) + bias + residual).

    Mean and variance are those of each channel: of the batch in training, the running ones otherwise. The arguments
    stand in the order of ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    input : array of rank >= 2, float16, bfloat16, float32 or float64
        NumPy or CuPy; all arrays of a call are of one kind and on one device. Those of derived classes are arrays like
        others, but for masked arrays and matrices; what is returned is of NumPy's or CuPy's own class.
    running_mean, running_var : (C,) arrays or None
        Updated in place in training: running = (1 - momentum) * running + momentum * batch, with the unbiased variance.
        Used as they are otherwise.
    weight, bias : (C,) arrays or None
        None stands for 1 and 0. These vectors may have any of the dtypes, each its own, and any stride.
    training : bool
    momentum : float
        The weight of the new batch in the running statistics.
    eps : float
        Added to the variance. Positive in training, not negative otherwise.
    residual : array of the input's shape and dtype, or None
        Added before the activation.
    activation : None or "relu"
        ReLU passes NaN on.
    channel_axis : int
        The axis of C, counted from either end.
    out : array of the input's shape and dtype, or None
        Where the output goes, in any memory order. May be `input` or `residual`.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        An input that is not dense is read through one contiguous copy.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, momentum or eps not a number, channel_axis
        not an integer, or training not a bool.
    ValueError
        If shapes do not match; if training with a single value per channel, whose unbiased variance is not defined; if
        eps is too small; if one running buffer comes without the other, or none when training is False; if the
        activation is unknown. Nothing has changed then.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization" (2015), algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1, 10], [3, 20], [5, 60]], np.float32)  # (N, C)
    >>> running_mean, running_var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> F.batch_norm(x, running_mean, running_var, training=True, activation="relu").round(2)
    array([[0.  , 0.  ],
           [0.  , 0.  ],
           [1.22, 1.39]], dtype=float32)
    >>> running_mean, running_var
    (array([0.3, 3. ], dtype=float32), array([ 1.3, 70.9], dtype=float32))
    """
    momentum = checks.as_float("momentum", momentum)
    call = Call(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, channel_axis
    )
    return forward(call, out)


def batch_norm_vjp(
    input: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    channel_axis: int = 1,
) -> tuple[Array, VjpFn]:
    """`batch_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `batch_norm`.

    Returns
    -------
    output : array
        As `batch_norm`.
    vjp_fn : callable
        ``vjp_fn(grad_output) -> BatchNormGrads(input, weight, bias, residual)``. The gradients of input and residual
        have the input's dtype and memory order, those of weight and bias their dtypes. Pure: it may be called again and
        changes nothing. It holds input, weight and bias by reference, and what it needs of the residual and the
        statistics as a copy: it stays right when the running statistics move on.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; ``vjp_fn`` if grad_output is not an array of the input's kind, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[0], [1], [5]], np.float32)  # (N, C)
    >>> weight, bias = np.ones(1, np.float32), np.zeros(1, np.float32)
    >>> y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, bias, training=True)
    >>> dy = np.array([[1], [0], [0]], np.float32)  # of a loss that is y[0]
    >>> dx, dweight, dbias, _ = vjp_fn(dy)
    >>> dx.round(3).ravel(), dweight.round(3), dbias
    (array([ 0.176, -0.22 ,  0.044], dtype=float32), array([-0.926], dtype=float32), array([1.], dtype=float32))
    """
    momentum = checks.as_float("momentum", momentum)
    call = Call(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, channel_axis
    )
    return forward_vjp(call)


def moments(input: Array, *, channel_axis: int = 1) -> tuple[Array, Array]:
    """Mean and biased variance of each channel.

    Parameters
    ----------
    input : array of rank >= 2, not empty
    channel_axis : int

    Returns
    -------
    mean, var : (C,) arrays, float64 for float64 input and float32 otherwise

    Raises
    ------
    TypeError
        If `input` is not an array of a kind and dtype of `batch_norm`.
    ValueError
        If `input` is empty, or its rank or `channel_axis` does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> photos = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)  # (N, H, W, C)
    >>> F.moments(photos, channel_axis=-1)
    (array([10.5, 11.5, 12.5], dtype=float32), array([47.25, 47.25, 47.25], dtype=float32))
    """
    checks.check_array("input", input)
    axis = checks.check_channel_axis(channel_axis, input.ndim)
    if input.size == 0:
        raise ValueError(f"expected an input that is not empty (got shape {input.shape})")
    input = plain(input)
    ops = steps_for(input)
    layout = Layout.of(input, axis)
    with current(input):
        parts = ops.bn_stats(layout.view(layout.conform(input)))
        mean, var = ops.mean_and_var(parts, accumulation_dtype(input.dtype))
    return mean, var


# ---------------------------------------------------------------------------------------------------------------------
# The flow


def forward_vjp(call: Call) -> tuple[Array, VjpFn]:
    """The output, and the function that goes back."""
    output, saved = _forward(call, None, for_vjp=True)
    assert saved is not None

    def vjp_fn(grad_output: Array) -> BatchNormGrads:
        checks.check_like("grad_output", grad_output, saved.input)
        with current(grad_output):
            return backward(saved, plain(grad_output))

    return output, vjp_fn


def forward(call: Call, out: Array | None = None) -> Array:
    """The output."""
    output = _forward(call, out, for_vjp=False)[0]
    return output if out is None else out


class Saved(NamedTuple):
    """What the way back needs of the way forth."""

    input: Array  # dense
    weight: Array | None
    bias: Array | None
    training: bool
    eps: float
    activation: str | None
    layout: Layout
    ops: Any  # the steps; None if there is nothing to do
    statistics: Statistics | None  # of an input that is not empty
    has_residual: bool
    mask: Array | None  # where ReLU passed, if a residual had its part in it


def _forward(call: Call, out: Array | None, for_vjp: bool) -> tuple[Array, Saved | None]:
    """The output and, for the way back, what it needs."""
    checked = call.checked(out)
    with current(call.input):
        return _checked_forward(call.plain(), checked, plain(out), for_vjp)


def _checked_forward(call: Call, checked: Checked, out: Array | None, for_vjp: bool) -> tuple[Array, Saved | None]:
    """The same for arguments that fit together, on the current device."""
    layout = checked.layout
    ops = ops_for(call)
    in_place = out is not None and layout.matches(out) and not call.shares_with_vectors(out, checked)
    call, written = call.apart(checked, for_vjp)
    input: Array = layout.conform(call.input)
    eps, training, has_residual = float(call.eps), call.training, call.residual is not None
    output = out if in_place else layout.empty_like(input)
    x, residual, y = layout.view(input), layout.view(layout.conform(call.residual)), layout.view(output)
    statistics = mask = saved = None

    if ops is not None:
        if for_vjp and has_residual and call.activation is not None:
            mask = ops.empty_mask(x, residual, y)
        step = (eps, call.weight, call.bias, residual, call.activation, *call.running(), y, mask, for_vjp)
        if training:
            statistics = ops.bn_forward(x, *step, scratch=y if out is None else None)
        else:
            statistics = ops.bn_normalize(x, None, *step)

    if for_vjp:
        saved = Saved(
            input, call.weight, call.bias, training, eps, call.activation, layout, ops, statistics, has_residual, mask
        )
    if out is not None and not in_place:
        written.append((out, output))  # the last: it is right, whatever it shares with the buffers
    if ops is not None and written:
        write_at_once(written)
    return output, saved


def backward(saved: Saved, grad_output: Array) -> BatchNormGrads:
    """The gradients of the arguments, from that of the output."""
    input, weight, bias, training, eps, activation, layout, ops, statistics, has_residual, mask = saved
    grad_output = layout.conform(grad_output)
    dinput = layout.empty_like(input)
    new = zeros_like if ops is None else empty_like
    dweight, dbias = (None if vector is None else new(vector) for vector in (weight, bias))
    # What nothing masked is the gradient of the output.
    dresidual = layout.empty_like(input) if has_residual and activation is not None else grad_output

    if ops is not None:
        dy, x, dx = layout.view(grad_output), layout.view(input), layout.view(dinput)
        step = (dy, x, statistics, eps, weight, bias, activation, mask)
        gradients = (dx, layout.view(dresidual) if mask is not None else None, dweight, dbias)
        if training or dweight is not None or dbias is not None:
            inv_count = layout.shape[1] / input.size if training and input.size > 0 else 0.0
            ops.bn_backward(*step, inv_count, *gradients, scratch=dx)
        else:
            ops.bn_backward_input(*step, None, 0.0, *gradients)

    return BatchNormGrads(dinput, dweight, dbias, dresidual if has_residual else None)


def ops_for(call: Call) -> Any:
    """The steps for arrays of this kind, of one call if the batch is spread over ranks; None if there are none."""
    ops = steps_for(call.input)
    if call.group is not None:
        return Synchronized(ops, call.group)
    return ops if call.input.size > 0 else None


def steps_for(array: Array) -> ModuleType:
    """The steps for this kind of array."""
    return numpy_ops if kind(array) == "numpy" else cupy_ops
