"""Batch normalization as functions of arrays.

Training. Channels are on axis 1, unless `channel_axis` says otherwise; the running statistics follow the batch:

>>> import numpy as np
>>> import cupybn.functional as F
>>> x = np.array([[1, 10], [3, 20], [5, 60]], np.float32)  # (N, C); CuPy arrays are taken likewise
>>> running_mean, running_var = np.zeros(2, np.float32), np.ones(2, np.float32)
>>> y = F.batch_norm(x, running_mean, running_var, training=True)
>>> running_mean
array([0.3, 3. ], dtype=float32)

Inference, with the running statistics as they are:

>>> F.batch_norm(x[:1], running_mean, running_var).round(2)
array([[0.61, 0.83]], dtype=float32)

The way back, from the gradient of the output to those of the arguments:

>>> y, vjp_fn = F.batch_norm_vjp(x, running_mean, running_var, np.ones(2, np.float32), training=True)
>>> vjp_fn(np.ones_like(y)).weight.round(2)  # of a loss that is the sum of the output
array([0., 0.], dtype=float32)

How a call goes, from top to bottom. `_forward` and `backward`, at the end of this file, are its two halves:

    arguments   -> Call.checked              -> the layout, by which the input is seen as (N, C, L)
    input       -> bn_forward in training    -> output, running statistics
                   bn_normalize in eval mode -> output
    grad_output -> bn_backward               -> gradients

Such functions are steps. Each is there twice: `numpy_ops` computes, `cupy_ops` launches a kernel. What they take
together is a bundle (`cupybn._steps.bundles`). bn_forward stands for bn_stats and then bn_normalize, bn_backward for
bn_backward_reduce and then bn_backward_input. On a GPU these two are one launch where a channel fits on chip
(`cupybn._steps.resident`); where the batch is spread over ranks, they exchange statistics or sums in between
(`cupybn._ranks.synchronized`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from cupybn._arrays.devices import empty_like, on_device_of, write_at_once, zeros_like
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._arrays.kinds import kind, plain
from cupybn._calls import checks
from cupybn._calls.call import Call, Checked
from cupybn._calls.layout import Layout
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.arguments import NAN
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics

__all__ = ["BatchNormGrads", "batch_norm", "batch_norm_vjp", "moments"]

Array = Any  # numpy.ndarray or cupy.ndarray


class BatchNormGrads(NamedTuple):
    """The gradients that ``vjp_fn`` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


VjpFn = Callable[[Array], BatchNormGrads]
"""Function from the gradient of the output to those of the arguments."""


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
    call = Call(
        input,
        Affine(weight, bias, eps),
        Running(running_mean, running_var, checks.as_float("momentum", momentum)),
        Epilogue(residual, activation),
        training,
        channel_axis,
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
    call = Call(
        input,
        Affine(weight, bias, eps),
        Running(running_mean, running_var, checks.as_float("momentum", momentum)),
        Epilogue(residual, activation),
        training,
        channel_axis,
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
    axis = checks.check_input(input, channel_axis)
    if input.size == 0:
        raise ValueError(f"expected an input that is not empty (got shape {input.shape})")
    input = plain(input)
    layout, ops = Layout.of(input, axis), ops_for(input)
    with on_device_of(input):
        parts = ops.bn_stats(layout.view(layout.conform(input)))
        mean, var = ops.mean_and_var(parts, accumulation_dtype(input.dtype))
    return mean, var


# ---------------------------------------------------------------------------------------------------------------------
# The flow


def forward(call: Call, out: Array | None = None) -> Array:
    """The output of a call, which is `out` where that is given."""
    output, _ = _forward(call, out, for_vjp=False)
    return output if out is None else out  # the very array that was given, of whatever class it is


def forward_vjp(call: Call) -> tuple[Array, VjpFn]:
    """The output of a call, and the function that goes back."""
    output, saved = _forward(call, None, for_vjp=True)
    assert saved is not None

    def vjp_fn(grad_output: Array) -> BatchNormGrads:
        checks.check_like("grad_output", grad_output, saved.input)
        with on_device_of(grad_output):
            return backward(saved, plain(grad_output))

    return output, vjp_fn


class Saved(NamedTuple):
    """Arrays and settings that the way back needs of the way forward."""

    ops: Any  # steps as `ops_for_call` returns them
    checked: Checked
    input: Array  # dense
    pairs: Array | None  # those of `Statistics`; None where no step has made any: there are no elements
    affine: Affine
    epilogue: Epilogue  # activation and mask: the mask has all that the way back needs of the residual
    has_residual: bool
    training: bool


def _forward(call: Call, out: Array | None, for_vjp: bool) -> tuple[Array, Saved | None]:
    """The output and, if there will be a way back, what that needs."""
    checked = call.checked(out)
    if checked.derived:
        call, out = call.plain(), plain(out)
    layout, ops = checked.layout, ops_for_call(call)
    with on_device_of(call.input):
        # Steps write to `out` itself where that is safe. Else they write to a new array, which is copied in the end.
        direct = out is not None and layout.matches(out) and not call.vectors_overlap(out, checked)
        separate, write_back = call.without_overlap(checked, for_vjp)
        repeatable = separate is call and (out is None or direct)
        call = separate
        input: Array = layout.conform(call.input)
        output: Array = out if direct else layout.empty_like(input)
        scratch = output if out is None else None  # `out` may be the input or the residual, which are still read
        weight, bias, eps = call.affine
        affine = Affine(weight, bias, float(eps))  # users may give an eps of any class of numbers

        def steps() -> tuple[Array | None, Array | None]:
            return _forward_steps(ops, call, checked, input, affine, output, scratch, for_vjp)

        if checked.tapes is not None and repeatable:
            mean, var, momentum, batches = call.running
            cumulative = momentum is None
            tensors = input, call.epilogue.residual, output
            vectors = weight, bias, mean, var, batches if checked.moves else None
            numbers = affine.eps, NAN if momentum is None else momentum
            pairs, mask = checked.tapes.run((for_vjp, cumulative), tensors, vectors, numbers, steps)
        elif ops is not None:
            pairs, mask = steps()
        else:
            pairs = mask = None

        if out is not None and not direct:
            write_back.append((out, output))  # the last: it is right, whatever it shares with the buffers
        if ops is not None and write_back:
            write_at_once(write_back)
    if not for_vjp:
        return output, None
    way_back = Epilogue(None, call.epilogue.activation, mask)
    has_residual = call.epilogue.residual is not None
    return output, Saved(ops, checked, input, pairs, affine, way_back, has_residual, call.training)


def _forward_steps(
    ops: Any,
    call: Call,
    checked: Checked,
    input: Array,
    affine: Affine,
    output: Array,
    scratch: Array | None,
    for_vjp: bool,
) -> tuple[Array | None, Array | None]:
    """Statistics, as `Statistics.pairs`, and mask, each where there is one."""
    layout = checked.layout
    residual, activation, _ = call.epilogue
    x, residual, y = layout.view(input), layout.view(layout.conform(residual)), layout.view(output)
    mask = ops.empty_mask(x, residual, y) if for_vjp and residual is not None and activation is not None else None
    running, epilogue = call.running_for_steps(checked.moves), Epilogue(residual, activation, mask)
    if call.training:
        statistics = ops.bn_forward(x, affine, running, epilogue, y, for_vjp, layout.view(scratch))
    else:
        statistics = ops.bn_normalize(x, None, affine, running, epilogue, y, for_vjp)
    return None if statistics is None else statistics.pairs, mask


def backward(saved: Saved, grad_output: Array) -> BatchNormGrads:
    """The gradients of the arguments, from that of the output."""
    ops, checked, input, pairs, affine, epilogue, has_residual, training = saved
    layout, mask = checked.layout, epilogue.mask
    grad_output = layout.conform(grad_output)
    dinput = layout.empty_like(input)
    # Through a sum a gradient goes as it is: that of the residual is a new array only where ReLU has masked it.
    masked = epilogue.mask is not None
    dresidual = layout.empty_like(input) if masked else grad_output
    new = zeros_like if ops is None else empty_like  # without elements no step is there to fill them, and sums are 0
    dweight, dbias = (None if vector is None else new(vector) for vector in (affine.weight, affine.bias))
    gradients = Gradients(dinput, dresidual if masked else None, dweight, dbias)

    def steps() -> tuple[()]:
        _backward_steps(saved, grad_output, gradients)
        return ()

    if checked.tapes is not None:
        tensors = grad_output, input, dinput, gradients.dresidual
        others = affine.weight, affine.bias, pairs, mask, dweight, dbias
        checked.tapes.run(("back", None if mask is None else mask.size), tensors, others, (affine.eps, NAN), steps)
    elif ops is not None:
        steps()
    return BatchNormGrads(dinput, dweight, dbias, dresidual if has_residual else None)


def _backward_steps(saved: Saved, grad_output: Array, gradients: Gradients) -> None:
    """Fill the gradients."""
    ops, checked, input, pairs, affine, epilogue, _, training = saved
    layout = checked.layout
    dinput, dresidual, dweight, dbias = gradients
    dy, x, dx = layout.view(grad_output), layout.view(input), layout.view(dinput)
    statistics, gradients = Statistics(pairs), Gradients(dx, layout.view(dresidual), dweight, dbias)
    if training or dweight is not None or dbias is not None:
        # 1 / the number of values per channel; 0 stands for statistics that do not depend on x.
        inv_count = layout.shape[1] / input.size if training and input.size > 0 else 0.0
        ops.bn_backward(dy, x, statistics, affine, epilogue, inv_count, gradients, scratch=dx)
    else:
        ops.bn_backward_input(dy, x, statistics, affine, epilogue, None, 0.0, gradients)


def ops_for_call(call: Call) -> Any:
    """The steps for a call: those of `ops_for`, or their `Synchronized` form where the batch is spread over ranks.

    None where the call has no elements, and there is nothing to do.
    """
    ops = ops_for(call.input)
    if call.layer is not None and call.layer.group is not None:
        return Synchronized(ops, call.layer.group)
    return ops if call.input.size > 0 else None


def ops_for(array: Array) -> ModuleType:
    """The module with the steps for arrays of this kind."""
    return numpy_ops if kind(array) == "numpy" else cupy_ops
