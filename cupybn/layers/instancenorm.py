"""The layers of instance norm."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from cupybn._arrays.kinds import kind
from cupybn._calls import checks
from cupybn._calls.call import Call, Caller
from cupybn._calls.flow import forward
from cupybn._calls.rows import Rows, check_channel_axis
from cupybn._calls.tracking import updates_stats
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.layers.features import FeatureLayer
from cupybn.norms.instance import ROWS, ROWS_OF_A_SAMPLE, InstanceNormGrads, as_momentum
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray


class _InstanceNorm(FeatureLayer):
    """Instance normalization: each channel of each sample has its own mean and variance.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    Mean and var are those of a channel of a sample, over all its positions (var biased), in both modes. A layer with
    running statistics moves them in training mode, by the mean over the samples of the means and of the unbiased
    variances, and uses them in eval mode.

    Parameters
    ----------
    num_features : int or None
        C. None takes it from the first input.
    eps : float
        Added to the variance.
    momentum : float
        The weight of the new samples in the running statistics.
    affine : bool
        Whether the layer has a weight, and a bias unless ``bias=False``.
    track_running_stats : bool
        Whether the layer has running statistics. Read at every call: setting it to False later freezes them, and they
        are used no longer.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's arrays are. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of weight, bias and running statistics; None is float32, also for inputs of 16 bits.
    bias : bool
        Whether a layer that has a weight has a bias, too.
    channel_axis : int
        The axis of C in an input with samples, counted from either end; -1 for channels-last data. A single sample
        stands for a batch of one, and so does its axis.
    activation : None or "relu"
        What the output goes through, in the same pass over memory.

    Attributes
    ----------
    weight, bias, running_mean, running_var : (C,) arrays or None
        Start at 1, 0, 0 and 1. Updated in place, never replaced but by `to`.
    num_batches_tracked : 0-d int64 array or None
        Stays 0, as in PyTorch.
    training : bool
        The mode, which `train` and `eval` set. New layers are in training mode.

    Raises
    ------
    ValueError
        If num_features is negative or beyond what an array can hold, channel_axis is not one of an input or that of the
        samples, or the activation or the device is unknown.
    TypeError
        If num_features or channel_axis is not an integer, eps or momentum not a number, affine, track_running_stats or
        bias not a bool, or dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import InstanceNorm1d
    >>> x = np.array([[[1, 2, 3], [4, 4, 7]]], np.float32)  # (N, C, L)
    >>> layer = InstanceNorm1d(2, device="cpu")
    >>> layer(x).round(2)
    array([[[-1.22,  0.  ,  1.22],
            [-0.71, -0.71,  1.41]]], dtype=float32)
    >>> layer(x[0]).round(2)  # a single sample, (C, L)
    array([[-1.22,  0.  ,  1.22],
           [-0.71, -0.71,  1.41]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
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

    def forward(self, input: Array, residual: Array | None = None) -> Array:
        """The output; in training mode the running statistics are updated, if the layer tracks them.

        Parameters
        ----------
        input : array of a rank that the layer takes, float16, bfloat16, float32 or float64
            Of the layer's kind and on its device.
        residual : array of the input's shape and dtype, or None
            Added before the activation.

        Returns
        -------
        array of the input's kind, shape, dtype and memory order

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.instance_norm`, and if the rank is wrong, ``training`` or ``track_running_stats`` has
            been set to something else than a bool, or momentum is None where running statistics are to move. The layer
            is as it was then.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import InstanceNorm1d
        >>> layer = InstanceNorm1d(1, track_running_stats=True, device="cpu")
        >>> y = layer(np.array([[[1, 2, 3]], [[5, 5, 5]]], np.float32))
        >>> layer.running_mean, layer.running_var  # a tenth of the means 2 and 5, and of the variances 1 and 0
        (array([0.35], dtype=float32), array([0.95], dtype=float32))
        """
        if self.num_features is None:
            return self._first(input, lambda: forward(self._call(input, residual)))
        return forward(self._call(input, residual))

    def __call__(self, input: Array, residual: Array | None = None) -> Array:
        return self.forward(input, residual)

    def vjp(self, input: Array, residual: Array | None = None) -> tuple[Array, NormVjpFn[InstanceNormGrads]]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : NormVjpFn
            ``vjp_fn(grad_output) -> InstanceNormGrads(input, weight, bias, residual)``; see
            `cupybn.functional.instance_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import InstanceNorm1d
        >>> layer = InstanceNorm1d(1, affine=True, device="cpu")
        >>> y, vjp_fn = layer.vjp(np.array([[[0, 1, 5]]], np.float32))
        >>> dx, dweight, dbias, dresidual = vjp_fn(np.array([[[1, 0, 0]]], np.float32))
        >>> dx.round(3), dbias
        (array([[[ 0.176, -0.22 ,  0.044]]], dtype=float32), array([1.], dtype=float32))
        """
        if self.num_features is None:
            return self._first(input, lambda: forward_vjp(self._call(input, residual), InstanceNormGrads))
        return forward_vjp(self._call(input, residual), InstanceNormGrads)

    def _rows(self, input: Array) -> Rows:
        """Rows of an input: of a single sample, if it has the rank of one."""
        return ROWS_OF_A_SAMPLE if kind(input) is not None and input.ndim == min(self._ndims) else ROWS

    def _call(self, input: Array, residual: Array | None) -> Call:
        """The call, with the statistics and the update that follow from these modes and flags."""
        checks.check_bool("training", self.training)
        checks.check_bool("track_running_stats", self.track_running_stats)
        mean, var = self.running_mean, self.running_var
        uses_input = self.training or not self.track_running_stats or mean is None
        moves = self.training and self.track_running_stats and mean is not None
        # PyTorch takes None for a momentum of 0, and never moves them.
        unused = self.momentum is None and not (moves and updates_stats())
        running = Running(mean, var, 0.0 if unused else as_momentum(self.momentum))
        idle: tuple[Array, ...] = ()
        if uses_input and not moves:  # whether running statistics are complete is asked all the same
            checks.check_running(running, training=True)
            idle = () if mean is None else (mean, var)
            running = Running()
        return Call(
            input,
            Affine(self.weight, self.bias, self.eps),
            running,
            Epilogue(residual, self.activation),
            uses_input,
            self.channel_axis,
            Caller(self._device, self._ndims, idle),
            self._rows(input),
        )

    def _check_channel_axis(self, channel_axis: int, ndim: int) -> int:
        return check_channel_axis(channel_axis, ndim)

    def _check_input(self, input: Array) -> int:
        return self._rows(input).check_input(input, self.channel_axis, self._ndims)


class InstanceNorm1d(_InstanceNorm):
    """Instance normalization of (N, C, L) and (C, L) arrays."""

    _ndims = (2, 3)


class InstanceNorm2d(_InstanceNorm):
    """Instance normalization of (N, C, H, W) and (C, H, W) arrays."""

    _ndims = (3, 4)


class InstanceNorm3d(_InstanceNorm):
    """Instance normalization of (N, C, D, H, W) and (C, D, H, W) arrays."""

    _ndims = (4, 5)


# The text of each layer is its own first line, and the rest of what the class above says of all of them.
for _layer in (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d):
    _layer.__doc__ = f"{_layer.__doc__}\n{(_InstanceNorm.__doc__ or '').partition(chr(10))[2]}"
