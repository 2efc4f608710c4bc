"""The layers of layer and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._calls import checks
from cupybn._calls.call import Call, Caller
from cupybn._calls.flow import forward
from cupybn._calls.rows import as_normalized_shape, check_normalized_shape
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.layers.layer import AFFINE, Layer
from cupybn.norms.layer import LAYER_NORM, RMS_NORM, LayerNormGrads, RMSNormGrads, eps_for, rows_of
from cupybn.norms.vjp import NormVjpFn, forward_vjp

Array = Any  # numpy.ndarray or cupy.ndarray


class _RowLayer(Layer):
    """A layer that normalizes the last axes of an array, and has parameters of their shape."""

    _function: str
    """Name of the function that the layer calls."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        members: tuple[str, ...],
        device: str | None,
        dtype: npt.DTypeLike | None,
    ) -> None:
        shape = as_normalized_shape(normalized_shape)
        check_normalized_shape(shape)
        checks.check_bool("elementwise_affine", elementwise_affine)
        members = members if elementwise_affine else ()
        super().__init__(members, device, parameter_dtype(np.float32 if dtype is None else dtype))
        self.normalized_shape = shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._allocate(shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return as_normalized_shape(self.normalized_shape)

    def forward(self, input: Array) -> Array:
        """The output.

        Parameters
        ----------
        input : array whose last axes are normalized_shape, float16, bfloat16, float32 or float64
            Of the layer's kind and on its device.

        Returns
        -------
        array of the input's kind, shape, dtype and memory order

        Raises
        ------
        TypeError, ValueError
            As `cupybn.functional.layer_norm`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import RMSNorm
        >>> layer = RMSNorm(3, device="cpu")
        >>> layer.weight[2] = 2
        >>> layer(np.array([[1, 1, 5]], np.float32)).round(2)
        array([[0.33, 0.33, 3.33]], dtype=float32)
        """
        return forward(self._call(input))

    def __call__(self, input: Array) -> Array:
        return self.forward(input)

    def _call(self, input: Array) -> Call:
        """The call that this layer makes."""
        eps = self.eps
        if eps is None and self._function == RMS_NORM:
            eps = eps_for(input)
        return Call(
            input,
            Affine(self.weight, self.bias, eps),  # type: ignore[arg-type]  # which `Call.check` refuses
            Running(),
            Epilogue(),
            True,
            0,
            Caller(self._device),
            rows_of(self._function, self.normalized_shape),
        )

    def reset_parameters(self) -> None:
        """Set weight and bias back to where they start."""
        self._reset(AFFINE)


class LayerNorm(_RowLayer):
    """Layer normalization of the last axes of an array.

        y = weight * (x - mean) / sqrt(var + eps) + bias

    Mean and var are those of each row (var biased). Training and eval mode do the same.

    Parameters
    ----------
    normalized_shape : int or sequence of ints
        Sizes of the last axes.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether the layer has a weight, and a bias unless ``bias=False``.
    bias : bool
        Whether a layer that has a weight has a bias, too.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's arrays are. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of weight and bias; None is float32, also for inputs of 16 bits.

    Attributes
    ----------
    normalized_shape : tuple of ints
    weight, bias : arrays of the shape normalized_shape, or None
        Start at 1 and 0. Updated in place, never replaced but by `to`.
    training : bool
        The mode, which `train` and `eval` set.

    Raises
    ------
    ValueError
        If normalized_shape is empty, or has a size that is negative or beyond what an array can hold, or the device is
        unknown.
    TypeError
        If normalized_shape is neither an int nor a sequence of ints, eps not a number, elementwise_affine or bias not a
        bool, or dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import LayerNorm
    >>> layer = LayerNorm(3, device="cpu")
    >>> layer(np.array([[1, 2, 3], [0, 0, 6]], np.float32)).round(2)
    array([[-1.22,  0.  ,  1.22],
           [-0.71, -0.71,  1.41]], dtype=float32)
    """

    _function = LAYER_NORM

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        checks.as_float("eps", eps)
        checks.check_bool("bias", bias)
        super().__init__(normalized_shape, eps, elementwise_affine, AFFINE if bias else AFFINE[:1], device, dtype)

    def vjp(self, input: Array) -> tuple[Array, NormVjpFn[LayerNormGrads]]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : NormVjpFn
            ``vjp_fn(grad_output) -> LayerNormGrads(input, weight, bias)``; see `cupybn.functional.layer_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import LayerNorm
        >>> layer = LayerNorm(2, device="cpu")
        >>> y, vjp_fn = layer.vjp(np.array([[1, 2], [3, 4]], np.float32))
        >>> dx, dweight, dbias = vjp_fn(np.ones_like(y))
        >>> dweight.round(2), dbias
        (array([-2.,  2.], dtype=float32), array([2., 2.], dtype=float32))
        """
        return forward_vjp(self._call(input), LayerNormGrads)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None})"
        )


class RMSNorm(_RowLayer):
    """Root mean square normalization of the last axes of an array.

        y = weight * x / sqrt(mean(x ** 2) + eps)

    The mean is that of each row. Training and eval mode do the same.

    Parameters
    ----------
    normalized_shape : int or sequence of ints
        Sizes of the last axes.
    eps : float or None
        Added to the mean. None is the distance from 1 to the next number: 2**-52 for float64 input, and 2**-23, that of
        float32, for all others.
    elementwise_affine : bool
        Whether the layer has a weight.
    device : "cpu", "cuda", "cuda:N" or None
        Where the layer's weight is. None is the current CUDA device if CuPy finds one, else "cpu".
    dtype : dtype or None
        Of the weight; None is float32, also for inputs of 16 bits.

    Attributes
    ----------
    normalized_shape : tuple of ints
    weight : array of the shape normalized_shape, or None
        Starts at 1. Updated in place, never replaced but by `to`.
    training : bool
        The mode, which `train` and `eval` set.

    Raises
    ------
    ValueError
        If normalized_shape is empty, or has a size that is negative or beyond what an array can hold, or the device is
        unknown.
    TypeError
        If normalized_shape is neither an int nor a sequence of ints, eps not a number, elementwise_affine not a bool,
        or dtype not float16, bfloat16, float32 or float64.
    RuntimeError
        If the device is not there.
    ImportError
        If dtype is ``"bfloat16"``, and ml_dtypes is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybn import RMSNorm
    >>> layer = RMSNorm(3, device="cpu")
    >>> layer(np.array([[1, 1, 5], [3, 3, 3]], np.float32)).round(2)
    array([[0.33, 0.33, 1.67],
           [1.  , 1.  , 1.  ]], dtype=float32)
    """

    _function = RMS_NORM

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: str | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        if eps is not None:
            checks.as_float("eps", eps)
        super().__init__(normalized_shape, eps, elementwise_affine, AFFINE[:1], device, dtype)

    def vjp(self, input: Array) -> tuple[Array, NormVjpFn[RMSNormGrads]]:
        """The output, as `forward`, and the function from the output's gradient to the others.

        Returns
        -------
        output : array
        vjp_fn : NormVjpFn
            ``vjp_fn(grad_output) -> RMSNormGrads(input, weight)``; see `cupybn.functional.rms_norm_vjp`.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybn import RMSNorm
        >>> layer = RMSNorm(2, device="cpu")
        >>> y, vjp_fn = layer.vjp(np.array([[1, 7]], np.float32))
        >>> dx, dweight = vjp_fn(np.ones_like(y))
        >>> dweight.round(2)
        array([0.2, 1.4], dtype=float32)
        """
        return forward_vjp(self._call(input), RMSNormGrads)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine})"
        )
