"""The layer of group norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._calls import checks
from cupybn._calls.call import Call, Caller
from cupybn._calls.flow import forward
from cupybn._calls.rows import check_num_groups
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.layers.layer import AFFINE, Layer
from cupybn.norms.group import GroupNormGrads, rows_of
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray


class GroupNorm(Layer):
    """Group normalization of (N, C, ...) arrays: neighbouring channels of a sample share a mean and a variance.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    Mean and var are those of C / num_groups channels of a sample, over all positions (var biased). Training and eval
    mode do the same.

    Parameters
    ----------
    num_groups : int
        Divides num_channels.
    num_channels : int
        Number of channels, C.
    eps : float
        Added to the variance.
    affine : bool
        Whether the layer has a weight, and a bias unless ``bias=False``.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's arrays are. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of weight and bias; None is float32, also for inputs of 16 bits.
    bias : bool
        Whether a layer that has a weight has a bias, too.
    channel_axis : int
        The axis of C, counted from either end; -1 for channels-last data.
    activation : None or "relu"
        What the output goes through, in the same pass over memory.

    Attributes
    ----------
    weight, bias : (C,) arrays or None
        Start at 1 and 0. Updated in place, never replaced but by `to`.
    training : bool
        The mode, which `train` and `eval` set.

    Raises
    ------
    ValueError
        If the groups do not divide the channels, num_channels is negative or beyond what an array can hold, or the
        activation or the device is unknown.
    TypeError
        If num_groups, num_channels or channel_axis is not an integer, eps not a number, affine or bias not a bool, or
        dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import GroupNorm
    >>> layer = GroupNorm(2, 4, device="cpu")
    >>> x = np.array([[[1, 2], [3, 4], [0, 0], [0, 8]]], np.float32)  # (N, C, L)
    >>> layer(x).round(2)
    array([[[-1.34, -0.45],
            [ 0.45,  1.34],
            [-0.58, -0.58],
            [-0.58,  1.73]]], dtype=float32)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        activation: str | None = None,
    ) -> None:
        num_groups = checks.as_int("num_groups", num_groups)
        num_channels = checks.as_size("num_channels", num_channels)
        check_num_groups(num_groups)
        if num_channels % num_groups != 0:
            raise ValueError(f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")
        checks.as_float("eps", eps)
        checks.check_bool("affine", affine)
        checks.check_bool("bias", bias)
        checks.as_int("channel_axis", channel_axis)
        checks.check_activation(activation)
        members = (AFFINE if bias else AFFINE[:1]) if affine else ()
        super().__init__(members, device, parameter_dtype(np.float32 if dtype is None else dtype))
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self.channel_axis = channel_axis
        self.activation = activation
        self._allocate((num_channels,))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_channels,)

    def forward(self, input: Array, residual: Array | None = None) -> Array:
        """The output.

        Parameters
        ----------
        input : array of rank >= 2, float16, bfloat16, float32 or float64
            Of the layer's kind and on its device.
        residual : array of the input's shape and dtype, or None
            Added before the activation.

        Returns
        -------
        array of the input's kind, shape, dtype and memory order

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.group_norm`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import GroupNorm
        >>> layer = GroupNorm(1, 2, activation="relu", device="cpu")
        >>> x = np.array([[1, 3]], np.float32)  # (N, C)
        >>> layer(x, residual=x).round(2)
        array([[0., 4.]], dtype=float32)
        """
        return forward(self._call(input, residual))

    def __call__(self, input: Array, residual: Array | None = None) -> Array:
        """Return the output, as `forward`."""
        return self.forward(input, residual)

    def vjp(self, input: Array, residual: Array | None = None) -> tuple[Array, NormVjpFn[GroupNormGrads]]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : NormVjpFn
            ``vjp_fn(grad_output) -> GroupNormGrads(input, weight, bias, residual)``; see
            `cupybn.functional.group_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import GroupNorm
        >>> layer = GroupNorm(1, 2, device="cpu")
        >>> y, vjp_fn = layer.vjp(np.array([[[1, 2], [3, 4]]], np.float32))
        >>> vjp_fn(np.ones_like(y)).bias
        array([2., 2.], dtype=float32)
        """
        return forward_vjp(self._call(input, residual), GroupNormGrads)

    def _call(self, input: Array, residual: Array | None) -> Call:
        """The call that this layer makes."""
        return Call(
            input,
            Affine(self.weight, self.bias, self.eps),
            Running(),
            Epilogue(residual, self.activation),
            True,
            self.channel_axis,
            Caller(self._device),
            rows_of(self.num_groups),
        )

    def reset_parameters(self) -> None:
        """Set weight and bias back to where they start."""
        self._reset(AFFINE)

    def __repr__(self) -> str:
        text = (
            f"{type(self).__name__}({self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}"
        )
        if self.channel_axis != 1:
            text += f", channel_axis={self.channel_axis}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text + ")"
