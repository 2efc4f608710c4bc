"""The layers of batch norm: which of what they hold between calls a call uses."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from cupybn._calls import checks
from cupybn._calls.call import Call, Caller
from cupybn._calls.flow import forward
from cupybn._calls.tracking import updates_stats
from cupybn._ranks.group import Group
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn._steps.observer import Observer
from cupybn.functional import VjpFn, forward_vjp
from cupybn.layers.features import FeatureLayer

Array = Any  # numpy.ndarray or cupy.ndarray

observers: dict[int, Observer] = {}
"""What gets the moments that a layer sees in training, instead of its running statistics, by the id of the layer.

Not an attribute: a copy of a layer is not observed.
"""


class _BatchNorm(FeatureLayer):
    """Batch normalization with learnable weight and bias and with running statistics.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training mode mean and var are those of the batch (var biased), and the running statistics follow them:
    running = (1 - momentum) * running + momentum * batch, with the unbiased variance. In eval mode the running
    statistics are used as they are. A layer without them uses the batch in both modes.

    Parameters
    ----------
    num_features : int or None
        C. None takes it from the first input.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the new batch in the running statistics; None for the plain mean over all batches.
    affine : bool
        Whether the layer has a weight, and a bias unless ``bias=False``.
    track_running_stats : bool
        Whether the layer has running statistics. Read at every call: setting it to False later freezes them.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's arrays are. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of weight, bias and running statistics; None is float32, also for inputs of 16 bits.
    bias : bool
        Whether a layer that has a weight has a bias, too.
    channel_axis : int
        The axis of C, counted from either end; -1 for channels-last data.
    activation : None or "relu"
        What the output goes through, in the same pass over memory.
    skip_nonfinite : bool
        Whether a batch leaves running statistics and counter alone if any channel's mean or unbiased variance is not
        finite in their dtype. Read at every call.

    Attributes
    ----------
    weight, bias, running_mean, running_var : (C,) arrays or None
        Start at 1, 0, 0 and 1. Updated in place, never replaced but by `to`.
    num_batches_tracked : 0-d int64 array or None
        How many batches the running statistics have followed.
    training : bool
        The mode, which `train` and `eval` set. New layers are in training mode.

    Raises
    ------
    ValueError
        If num_features is negative or beyond what an array can hold, no rank of the layer has the channel_axis, or the
        activation or the device is unknown.
    TypeError
        If num_features or channel_axis is not an integer, eps or momentum not a number, affine, track_running_stats,
        bias or skip_nonfinite not a bool, or dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import BatchNorm1d
    >>> x = np.array([[1, 10], [3, 20], [5, 60]], np.float32)  # (N, C)
    >>> layer = BatchNorm1d(2, device="cpu")
    >>> layer(x).round(2)  # training mode
    array([[-1.22, -0.93],
           [ 0.  , -0.46],
           [ 1.22,  1.39]], dtype=float32)
    >>> layer.running_mean, layer.num_batches_tracked
    (array([0.3, 3. ], dtype=float32), array(1))
    >>> layer.eval()(x[:1]).round(2)  # with the running statistics, which one batch has moved by a tenth
    array([[0.61, 0.83]], dtype=float32)
    """

    _process_group: Group | None = None
    """Group of processes that the batch is spread over in training; None for a single one."""

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            device,
            dtype,
            bias,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            channel_axis=channel_axis,
            activation=activation,
        )
        checks.check_bool("skip_nonfinite", skip_nonfinite)
        self.skip_nonfinite = skip_nonfinite

    # -----------------------------------------------------------------------------------------------------------------
    # Calls

    def forward(self, input: Array, residual: Array | None = None, mask: Array | None = None) -> Array:
        """The output; in training mode the running statistics are updated.

        Parameters
        ----------
        input : array of a rank that the layer takes, float16, bfloat16, float32 or float64
            Of the layer's kind and on its device.
        residual : array of the input's shape and dtype, or None
            Added before the activation.
        mask : bool array of the input's shape without the channel axis, or one that broadcasts to it, or None
            True where there is data; what is masked out is as if it were not there, and its output is 0.

        Returns
        -------
        array of the input's kind, shape, dtype and memory order

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.batch_norm`, and if the rank is wrong, or ``training``, ``track_running_stats`` or
            ``skip_nonfinite`` has been set to something else than a bool. The layer is as it was then.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import BatchNorm1d
        >>> sequences = np.array([[[1, 2, 3]], [[5, 9, 9]]], np.float32)  # (N, C, L)
        >>> mask = np.arange(3) < np.array([[3], [1]])  # (N, L); the second sequence has length 1
        >>> layer = BatchNorm1d(1, momentum=1.0, device="cpu")
        >>> layer(sequences, mask=mask).round(2)
        array([[[-1.18, -0.51,  0.17]],
        <BLANKLINE>
               [[ 1.52,  0.  ,  0.  ]]], dtype=float32)
        >>> layer.running_mean  # of 1, 2, 3 and 5
        array([2.75], dtype=float32)
        """
        return self._run(forward, input, residual, mask)

    def __call__(self, input: Array, residual: Array | None = None, mask: Array | None = None) -> Array:
        if mask is None:  # derived classes may have a `forward` that takes none
            return self.forward(input, residual)
        return self.forward(input, residual, mask)

    def vjp(self, input: Array, residual: Array | None = None, mask: Array | None = None) -> tuple[Array, VjpFn]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : callable
            ``vjp_fn(grad_output) -> BatchNormGrads(input, weight, bias, residual)``; see
            `cupybn.functional.batch_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import BatchNorm1d
        >>> layer = BatchNorm1d(1, activation="relu", device="cpu")
        >>> x = np.array([[0], [1], [5]], np.float32)
        >>> y, vjp_fn = layer.vjp(x, residual=x)
        >>> dx, dweight, dbias, dresidual = vjp_fn(np.ones_like(y))
        >>> dbias, dresidual.ravel()  # ReLU stopped the first row
        (array([2.], dtype=float32), array([0., 1., 1.], dtype=float32))
        >>> for parameter, grad in zip(layer.parameters(), (dweight, dbias)):
        ...     parameter -= 0.1 * grad  # in place: the layer keeps its arrays
        >>> layer.bias
        array([-0.2], dtype=float32)
        """
        return self._run(forward_vjp, input, residual, mask)

    def _call(self, input: Array, *others: Array | None) -> Call:
        """The call, with the statistics and the update that PyTorch chooses for these modes and flags."""
        residual, mask = others
        checks.check_bool("training", self.training)
        checks.check_bool("track_running_stats", self.track_running_stats)
        momentum = None if self.momentum is None else checks.as_float("momentum", self.momentum)
        skip_nonfinite = self.skip_nonfinite
        running = Running(self.running_mean, self.running_var, momentum, self.num_batches_tracked, skip_nonfinite)
        observer = observers.get(id(self)) if observers and self.training and updates_stats() else None
        idle: tuple[Array, ...] = ()
        counted = momentum is not None or running.batches is not None
        if self.training and observer is None and not (self.track_running_stats and counted):
            # Frozen statistics, or a mean over all batches that nobody counts: the call goes without them. Whether they
            # are complete is asked all the same, here; the counter stays for the advice that messages give.
            checks.check_running(running, training=True)
            idle = () if running.mean is None else running[:2]
            running = Running(momentum=momentum, batches=running.batches, skip_nonfinite=skip_nonfinite)
        return Call(
            input,
            Affine(self.weight, self.bias, self.eps),
            running,
            Epilogue(residual, self.activation, None, mask),
            self.training or self.running_mean is None,
            self.channel_axis,
            Caller(self._device, self._ndims, idle, self._process_group if self.training else None, observer),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # State and text

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or pickle; those of older versions have no `skip_nonfinite`."""
        super().__setstate__({"skip_nonfinite": False} | state)

    def _extras(self) -> str:
        text = super()._extras()
        return f"{text}, skip_nonfinite={self.skip_nonfinite}" if self.skip_nonfinite else text


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) and (N, C, L) arrays."""

    _ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) arrays."""

    _ndims = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays."""

    _ndims = (5,)


# The text of each layer is its own first line, and the rest of what the class above says of all of them.
for _layer in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _layer.__doc__ = f"{_layer.__doc__}\n{(_BatchNorm.__doc__ or '').partition(chr(10))[2]}"
