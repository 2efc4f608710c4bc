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

Calls that are alike, on CuPy arrays, launch the same kernels. So the first one is recorded while it takes its steps,
and later ones play its launches without taking them again (`cupybn._steps.tape`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied, empty, empty_like, on_device_of, write_at_once, zeros_like
from cupybn._arrays.kinds import plain
from cupybn._calls import checks
from cupybn._calls.call import Call, Checked, has_form
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import cupy_ops
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics
from cupybn._steps.launcher import unheard
from cupybn._steps.observer import Observed
from cupybn._steps.ops import ops_for
from cupybn._steps.tape import Tapes, particulars_of
from cupybn.dropout.functions import (
    DropoutGrads,
    DropoutVjpFn,
    dropout,
    dropout1d,
    dropout1d_vjp,
    dropout2d,
    dropout2d_vjp,
    dropout3d,
    dropout3d_vjp,
    dropout_vjp,
)
from cupybn.statistics.moments import moments

__all__ = [
    "BatchNormGrads",
    "DropoutGrads",
    "DropoutVjpFn",
    "VjpFn",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_vjp",
    "dropout",
    "dropout1d",
    "dropout1d_vjp",
    "dropout2d",
    "dropout2d_vjp",
    "dropout3d",
    "dropout3d_vjp",
    "dropout_vjp",
    "moments",
]

Array = Any  # numpy.ndarray or cupy.ndarray


class BatchNormGrads(NamedTuple):
    """The gradients that ``vjp_fn`` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


class VjpFn:
    """Function from the gradient of a call's output to those of its arguments: what `batch_norm_vjp` returns.

    Pure: it may be called again and changes nothing. It holds input, weight, bias and mask by reference, and what it
    needs of the residual and the statistics as a copy: it stays right when the running statistics move on.

    Attributes
    ----------
    mean, var : (C,) float64 arrays
        Statistics that the call normalised with, var biased: those of the batch, or the running ones in eval mode. Each
        access makes a new copy. NaN for a batch without elements, or of which a mask has left none.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1, 10], [3, 20], [5, 60]], np.float32)  # (N, C)
    >>> y, vjp_fn = F.batch_norm_vjp(x, None, None, training=True)
    >>> vjp_fn.mean, vjp_fn.var.round(2)
    (array([ 3., 30.]), array([  2.67, 466.67]))
    >>> vjp_fn(np.array([[1, 0], [0, 0], [0, 0]], np.float32)).input.round(3)
    array([[ 0.102,  0.   ],
           [-0.204,  0.   ],
           [ 0.102,  0.   ]], dtype=float32)
    """

    __slots__ = ("__weakref__", "_saved")

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def __call__(self, grad_output: Array) -> BatchNormGrads:
        """Gradients of the arguments.

        Raises
        ------
        TypeError, ValueError
            If grad_output is not an array of the input's kind, device, dtype and shape.
        """
        saved = self._saved
        same_form = has_form(grad_output, saved.checked.form)
        if not same_form:
            checks.check_like("grad_output", grad_output, saved.input)
        with on_device_of(saved.input):
            return backward(saved, grad_output if same_form else saved.checked.layout.conform(plain(grad_output)))

    def __copy__(self) -> VjpFn:
        """Return this one: it is pure, and a copy of a function is the function itself."""
        return self

    def __deepcopy__(self, memo: object) -> VjpFn:
        return self

    @property
    def mean(self) -> Array:
        """Mean of each channel that the call normalised with: a new (C,) float64 array."""
        with on_device_of(self._saved.pairs):
            return copied(Statistics(self._saved.pairs).mean)

    @property
    def var(self) -> Array:
        """Biased variance of each channel that the call normalised with: a new (C,) float64 array."""
        with on_device_of(self._saved.pairs):
            return copied(Statistics(self._saved.pairs).var)


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
    mask: Array | None = None,
    skip_nonfinite: bool = False,
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
    mask : bool array of the input's shape without the channel axis, or one that broadcasts to it, or None
        True where there is data. What is masked out is as if it were not there, whatever input and residual hold there,
        NaN too: it is in no statistic, and its output is 0. A batch of which less than two values for each channel are
        left moves no running statistics.
    skip_nonfinite : bool
        Whether a batch leaves the running statistics alone if any channel's mean or unbiased variance is not finite in
        the dtype of its buffer. Output and gradients do not depend on it.

    Returns
    -------
    array of the input's kind, shape, dtype and memory order, or `out`
        An input that is not dense is read through one contiguous copy.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind, device and dtype, momentum or eps not a number, channel_axis
        not an integer, or training or skip_nonfinite not a bool.
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

    Sequences of different length, padded to that of the longest:

    >>> sequences = np.array([[[1, 2, 3]], [[5, 9, 9]]], np.float32)  # (N, C, L)
    >>> mask = np.arange(3) < np.array([[3], [1]])  # (N, L); the second sequence has length 1
    >>> F.batch_norm(sequences, None, None, training=True, mask=mask).round(2)
    array([[[-1.18, -0.51,  0.17]],
    <BLANKLINE>
           [[ 1.52,  0.  ,  0.  ]]], dtype=float32)
    """
    call = Call(
        input,
        Affine(weight, bias, eps),
        Running(running_mean, running_var, checks.as_float("momentum", momentum), None, skip_nonfinite),
        Epilogue(residual, activation, None, mask),
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
    mask: Array | None = None,
    skip_nonfinite: bool = False,
) -> tuple[Array, VjpFn]:
    """`batch_norm`, and the function that takes the gradient of its output to those of its arguments.

    Parameters
    ----------
    As `batch_norm`.

    Returns
    -------
    output : array
        As `batch_norm`.
    vjp_fn : VjpFn
        ``vjp_fn(grad_output) -> BatchNormGrads(input, weight, bias, residual)``. The gradients of input and residual
        have the input's dtype and memory order, those of weight and bias their dtypes. Pure: it may be called again and
        changes nothing. It holds input, weight, bias and mask by reference, and what it needs of the residual and the
        statistics as a copy: it stays right when the running statistics move on. Where the mask leaves nothing, the
        gradients of input and residual are 0, whatever grad_output holds. ``vjp_fn.mean`` and ``vjp_fn.var`` are the
        statistics that the call normalised with.

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
        Running(running_mean, running_var, checks.as_float("momentum", momentum), None, skip_nonfinite),
        Epilogue(residual, activation, None, mask),
        training,
        channel_axis,
    )
    return forward_vjp(call)


def batch_norm_backward(
    grad_output: Array,
    input: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = True,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    channel_axis: int = 1,
) -> BatchNormGrads:
    """The gradients of `batch_norm`, for code that keeps statistics from the forward pass instead of a function.

    The same bits as ``vjp_fn`` of `batch_norm_vjp` with the same arguments, given its ``vjp_fn.mean`` and
    ``vjp_fn.var``. A call with a residual or a mask needs ``vjp_fn``.

    Parameters
    ----------
    grad_output : array of the input's shape and dtype
        Gradient of the output.
    input : array of rank >= 2, float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, var : (C,) arrays
        Statistics that the forward pass normalised with, var biased. In any of the dtypes; float64 is exact. Where code
        keeps ``inv_std``, var is ``1 / inv_std**2 - eps``.
    weight, bias : (C,) arrays or None
        As for `batch_norm`. The values of bias matter only behind an activation, those of both for the dtypes of their
        gradients.
    training : bool
        Whether the statistics were those of the batch, and so depend on the input. True unless told otherwise.
    eps : float
        Added to the variance.
    activation : None or "relu"
    channel_axis : int

    Returns
    -------
    BatchNormGrads
        Gradients of input, weight and bias; None for what was not given, and for the residual.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, and if grad_output is not an array of the input's kind, device, dtype and shape.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[0], [1], [5]], np.float32)  # (N, C)
    >>> dy = np.array([[1], [0], [0]], np.float32)
    >>> weight = np.ones(1, np.float32)
    >>> y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, training=True)
    >>> grads = F.batch_norm_backward(dy, x, vjp_fn.mean, vjp_fn.var, weight)
    >>> grads.input.round(3).ravel(), grads.weight.round(3)
    (array([ 0.176, -0.22 ,  0.044], dtype=float32), array([-0.926], dtype=float32))
    """
    axis = checks.check_input(input, channel_axis)
    checks.check_bool("training", training)
    for name, vector in ("mean", mean), ("var", var):
        checks.check_array(name, vector, input)  # None, too, is an error here
        checks.check_vectors(input, axis, {name: vector}, None)
    # In eval mode the statistics are what a call takes as running ones; in training a call takes none.
    running = Running() if training else Running(mean, var)
    call = Call(input, Affine(weight, bias, eps), running, Epilogue(None, activation), training, channel_axis)
    checked = call.checked()
    if not checked.settled:
        call = call.settled()
    with on_device_of(call.input):
        call = call.conformed(checked)
        pairs = Statistics.of(mean, var).pairs
    saved = Saved(ops_for_call(call), checked, checked.tapes, call.input, pairs, call.affine, call.epilogue)
    return VjpFn(saved)(grad_output)


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
    return output, VjpFn(saved)


class Saved(NamedTuple):
    """Arrays and settings that the way back needs of the way forward."""

    ops: Any  # steps as `ops_for_call` returns them
    checked: Checked
    tapes: Tapes | None  # launches of calls that are alike; None where this one has taken its steps for itself
    input: Array  # dense
    pairs: Array  # statistics, as `Statistics` has them
    affine: Affine
    epilogue: Epilogue  # activation, passed and mask: the record has all that the way back needs of the residual
    count_left: Array | None = None  # what `Statistics` has beside the pairs


def _forward(call: Call, out: Array | None, for_vjp: bool) -> tuple[Array, Saved | None]:
    """The output and, if there will be a way back, what that needs."""
    checked = call.checked(out)
    if not checked.settled:
        call, out = call.settled(), plain(out)
    layout, tapes = checked.layout, checked.tapes
    ops: Any = cupy_ops if tapes is not None else ops_for_call(call)
    with on_device_of(call.input):
        particulars = None if tapes is None else call.particulars(out, checked, for_vjp)
        if tapes is not None and particulars is not None:
            results = tapes.play(particulars)
            if results is None:
                with tapes.recorder(particulars) as recorder:
                    results = recorder.results = _forward_steps(ops, call, out, checked, for_vjp)
            made, pairs, passed, count_left = results
            output = out if made is None else layout.back(made)
        else:
            tapes = None
            # Steps write to `out` itself where that is safe; else to a new array, which is copied in the end.
            direct = checked.direct and not call.overwritten(out, checked)
            call, write_back = call.without_overlap(checked, for_vjp)
            call = call.conformed(checked)
            with unheard():
                made, pairs, passed, count_left = _forward_steps(ops, call, out if direct else None, checked, for_vjp)
            output = out if made is None else layout.back(made)
            if out is not None and not direct:
                write_back.append((out, output))  # the last: it is right, whatever it shares with the buffers
            if write_back and ops is not None:
                write_at_once(write_back)
    if not for_vjp:
        return output, None
    _, activation, _, mask = call.epilogue
    way_back = Epilogue(None, activation, passed, mask)
    return output, Saved(ops, checked, tapes, call.input, pairs, call.affine, way_back, count_left)


def _forward_steps(ops: Any, call: Call, out: Array | None, checked: Checked, for_vjp: bool) -> list[Array | None]:
    """New output, in the order of memory, if there is no `out`; and what is saved for the way back, or None for each.

    That is `Statistics.pairs`, the record of ReLU, and `Statistics.count_left`.
    """
    layout = checked.layout
    made = layout.empty(call.input) if out is None else None
    if ops is None:
        return [made, _statistics_of_nothing(call, layout.shape[1]).pairs if for_vjp else None, None, None]
    residual, activation, _, mask = call.epilogue
    x, residual = layout.view(call.input), layout.view(residual)
    y = layout.view(out) if made is None else made.reshape(layout.shape)
    mask = None if mask is None else layout.view_mask(mask)
    recorded = for_vjp and residual is not None and activation is not None
    passed = ops.empty_passed(x, residual, y, mask) if recorded else None
    affine, running = call.affine, call.running_for_steps(checked.moves)
    epilogue = Epilogue(residual, activation, passed, mask)
    if call.training:
        scratch = y if out is None else None  # `out` may be the input or the residual, which are still read
        statistics = ops.bn_forward(x, affine, running, epilogue, y, for_vjp, scratch)
    else:
        statistics = ops.bn_normalize(x, None, affine, running, epilogue, y, for_vjp)
    if statistics is None:
        return [made, None, passed, None]
    return [made, statistics.pairs, passed, statistics.count_left]


def _statistics_of_nothing(call: Call, channels: int) -> Statistics:
    """Statistics of a call without elements: the running ones in eval mode, and NaN for a batch, which has none."""
    if not call.training:
        return Statistics.of(call.running.mean, call.running.var)
    pairs = empty((channels, 2), call.input, np.float64)
    pairs.fill(np.nan)
    return Statistics(pairs)


def backward(saved: Saved, grad_output: Array) -> BatchNormGrads:
    """The gradients of the arguments, from that of the output, which has the layout of the input."""
    _, checked, tapes, input, pairs, affine, epilogue, count_left = saved
    results: list[Array | None] | None
    if tapes is None:
        with unheard():
            results = _backward_steps(saved, grad_output)
    else:
        (weight, bias, eps), (_, _, passed, mask) = affine, epilogue
        packs = None if passed is None else passed.size
        others = pairs, passed, weight, bias, count_left
        particulars = particulars_of(("back", packs), (grad_output, input, mask), others, (eps, 0.0))
        results = tapes.play(particulars)
        if results is None:
            with tapes.recorder(particulars) as recorder:
                results = recorder.results = _backward_steps(saved, grad_output)
    dx, dresidual, dweight, dbias = results
    layout = checked.layout
    if dresidual is not None:
        dresidual = layout.back(dresidual)
    elif checked.has_residual:  # through a sum a gradient goes as it is, where neither ReLU nor a mask stops it
        dresidual = grad_output
    return BatchNormGrads(layout.back(dx), dweight, dbias, dresidual)


def _backward_steps(saved: Saved, grad_output: Array) -> list[Array | None]:
    """Gradients of input, residual, weight and bias: new arrays, in the order of memory.

    That of the residual is there if ReLU or a mask stop it somewhere.
    """
    ops, checked, _, input, pairs, affine, epilogue, count_left = saved
    layout, training = checked.layout, checked.training
    _, _, passed, mask = epilogue
    alignment = input.nbytes // passed.size if passed is not None and passed.size else 1  # bytes of a pack
    dx = layout.empty(input, alignment)
    stopped = passed is not None or (mask is not None and checked.has_residual)
    dresidual = layout.empty(input, alignment) if stopped else None
    new = zeros_like if ops is None else empty_like  # without elements no step is there to fill them, and sums are 0
    weight, bias, _ = affine
    dweight, dbias = None if weight is None else new(weight), None if bias is None else new(bias)
    results = [dx, dresidual, dweight, dbias]
    if ops is None:
        return results
    dy, x, shape = layout.view(grad_output), layout.view(input), layout.shape
    gradients = Gradients(dx.reshape(shape), None if dresidual is None else dresidual.reshape(shape), dweight, dbias)
    statistics = Statistics(pairs, count_left)
    if mask is not None:
        epilogue = epilogue._replace(mask=layout.view_mask(mask))
    if training or dweight is not None or dbias is not None:
        # 1 / the number of values per channel, or 1 where steps divide by what a mask has left; 0 stands for
        # statistics that do not depend on x.
        inv_count = 0.0
        if training and input.size > 0:
            inv_count = shape[1] / input.size if mask is None else 1.0
        ops.bn_backward(dy, x, statistics, affine, epilogue, inv_count, gradients, scratch=gradients.dx)
    else:
        ops.bn_backward_input(dy, x, statistics, affine, epilogue, None, 0.0, gradients)
    return results


def ops_for_call(call: Call) -> Any:
    """The steps for a call: those of `ops_for`, or their `Synchronized` form where the batch is spread over ranks.

    Where the layer is observed, they are `Observed`. None where the call has no elements, and there is nothing to do.
    """
    ops, layer = ops_for(call.input), call.layer
    if layer is not None and layer.group is not None:
        return Synchronized(ops, layer.group, layer.observer, call.running)
    if call.input.size == 0:
        return None
    return ops if layer is None or layer.observer is None else Observed(ops, layer.observer, call.running)
