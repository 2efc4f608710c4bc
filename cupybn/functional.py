"""Normalization as functions of arrays: batch norm, and the rest of the family.

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

How a call goes, from its arguments to the steps and back, is said in `cupybn._calls.flow`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cupybn._arrays.devices import copied, on_device_of
from cupybn._calls import across, checks
from cupybn._calls.call import Call
from cupybn._calls.flow import WayBack, backward, forward, forward_and_saved
from cupybn._calls.saved import Saved
from cupybn._calls.second import check_second_order, double_backward
from cupybn._steps.bundles import Affine, Epilogue, Running, Statistics
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
from cupybn.norms.group import GroupNormGrads, group_norm, group_norm_vjp
from cupybn.norms.instance import InstanceNormGrads, instance_norm, instance_norm_vjp
from cupybn.norms.layer import LayerNormGrads, RMSNormGrads, layer_norm, layer_norm_vjp, rms_norm, rms_norm_vjp
from cupybn.norms.vjp import NormVjpFn
from cupybn.statistics.moments import moments

__all__ = [
    "BatchNormGrads",
    "DropoutGrads",
    "DropoutVjpFn",
    "GroupNormGrads",
    "InstanceNormGrads",
    "LayerNormGrads",
    "NormVjpFn",
    "RMSNormGrads",
    "SecondVjpFn",
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
    "group_norm",
    "group_norm_vjp",
    "instance_norm",
    "instance_norm_vjp",
    "layer_norm",
    "layer_norm_vjp",
    "moments",
    "rms_norm",
    "rms_norm_vjp",
]

Array = Any  # numpy.ndarray or cupy.ndarray


class BatchNormGrads(NamedTuple):
    """The gradients that ``vjp_fn`` returns; None for what was not an argument."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


class VjpFn(WayBack):
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

    __slots__ = ()

    def __call__(self, grad_output: Array) -> BatchNormGrads:
        """Gradients of the arguments.

        Raises
        ------
        TypeError, ValueError
            If grad_output is not an array of the input's kind, device, dtype and shape.
        """
        return BatchNormGrads(*backward(self._saved, grad_output))

    def vjp(self, grad_output: Array) -> tuple[BatchNormGrads, SecondVjpFn]:
        """The gradients of the arguments, and the function that goes back from them, to gradients of second order.

        For losses that gradients are part of, as gradient penalties and steps of meta-learning are.

        Parameters
        ----------
        grad_output : array of the input's shape and dtype

        Returns
        -------
        grads : BatchNormGrads
            What calling this function returns.
        second_vjp_fn : SecondVjpFn
            ``second_vjp_fn(cotangents) -> (grad_of_grad_output, BatchNormGrads(input, weight, None, None))``. It holds
            grad_output by reference, and what this function holds.

        Raises
        ------
        TypeError, ValueError
            If grad_output is not an array of the input's kind, device, dtype and shape.
        NotImplementedError
            If the call had a mask, or was one of a `cupybn.SyncBatchNorm` of several ranks in training.

        Examples
        --------
        >>> import numpy as np
        >>> import cupybn.functional as F
        >>> x = np.array([[0.0], [1.0], [5.0]])  # (N, C)
        >>> weight = np.ones(1)
        >>> y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, training=True)

        A penalty on the gradient of ``y[0]`` with respect to x, and its own gradients with respect to x and weight:

        >>> grads, second_vjp_fn = vjp_fn.vjp(np.array([[1.0], [0.0], [0.0]]))
        >>> penalty = (grads.input**2).sum()
        >>> cotangents = F.BatchNormGrads(2 * grads.input, None, None, None)  # of the penalty
        >>> _, second = second_vjp_fn(cotangents)
        >>> second.input.round(3).ravel(), second.weight.round(3)
        (array([ 0.047, -0.017, -0.029]), array([0.163]))
        """
        check_second_order(self._saved)
        return self(grad_output), SecondVjpFn(self._saved, grad_output)

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


class SecondVjpFn(WayBack):
    """Function from cotangents of gradients of first order to gradients of second order: what `VjpFn.vjp` returns.

    A cotangent is the gradient of a loss with respect to a gradient. Where ``grads = vjp_fn(grad_output)``, this is
    the vector-Jacobian product of the map from grad_output and the arguments of the call to grads.

    Pure: it may be called again and changes nothing. It holds grad_output, input, weight and bias by reference, and
    what it needs of the residual and the statistics as a copy. There is no third order: it has no ``vjp`` itself.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> x = np.array([[1], [2], [6]], np.float32)  # (N, C)
    >>> y, vjp_fn = F.batch_norm_vjp(x, None, None, np.ones(1, np.float32), training=True)
    >>> grads, second_vjp_fn = vjp_fn.vjp(np.array([[1], [0], [0]], np.float32))

    The gradient of weight is ``sum(grad_output * xhat)``, whose derivatives by grad_output are xhat:

    >>> grad_of_grad_output, second = second_vjp_fn((None, np.ones(1, np.float32), None, None))
    >>> grad_of_grad_output.round(3).ravel()
    array([-0.926, -0.463,  1.389], dtype=float32)
    >>> second.input.round(3).ravel(), second.weight
    (array([ 0.176, -0.22 ,  0.044], dtype=float32), array([0.], dtype=float32))
    >>> second.bias is None, second.residual is None
    (True, True)
    """

    __slots__ = ("_grad_output",)

    def __init__(self, saved: Saved, grad_output: Array) -> None:
        super().__init__(saved)
        self._grad_output = grad_output

    def __call__(
        self, cotangents: BatchNormGrads | tuple[Array | None, Array | None, Array | None, Array | None]
    ) -> tuple[Array, BatchNormGrads]:
        """Gradients of grad_output and of the arguments of the call.

        Parameters
        ----------
        cotangents : BatchNormGrads, or a tuple in its order
            Cotangents of the gradients of input, weight, bias and residual. None stands for zeros, and for what was not
            an argument. Those of input and residual are arrays of the input's shape and dtype, in any memory order;
            those of weight and bias are (C,) arrays of any of the dtypes and any stride.

        Returns
        -------
        grad_of_grad_output : array
            With the input's shape, dtype and memory order.
        grads : BatchNormGrads
            Gradients of input and weight, as ``vjp_fn`` returns them. Those of bias and residual are None: the
            gradients of first order do not depend on these, except by what ReLU lets through.

        Raises
        ------
        TypeError
            If cotangents are no tuple, or one of them is not an array of the right kind, device and dtype.
        ValueError
            If there are not four cotangents, a shape does not match, or one is given for what was not an argument.
            Nothing has changed then.
        """
        grad_of_grad_output, input, weight = double_backward(self._saved, self._grad_output, cotangents)
        return grad_of_grad_output, BatchNormGrads(input, weight, None, None)


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
        statistics that the call normalised with; ``vjp_fn.vjp`` is for gradients of second order.

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
    saved = Saved(across.ops_for_call(call), checked, checked.tapes, call.input, pairs, call.affine, call.epilogue)
    return VjpFn(saved)(grad_output)


def forward_vjp(call: Call) -> tuple[Array, VjpFn]:
    """The output of a call of batch norm, and the function that goes back."""
    output, saved = forward_and_saved(call)
    return output, VjpFn(saved)
