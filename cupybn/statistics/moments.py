"""Moments of a single array."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import on_device_of
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._arrays.kinds import show
from cupybn._calls import checks
from cupybn._steps.bundles import Moments
from cupybn._steps.launcher import unheard
from cupybn._steps.ops import ops_for
from cupybn.statistics.axes import as_channel_axis, check_axes, keeping_dims, sizes_along, view

Array = Any  # numpy.ndarray or cupy.ndarray


def moments(
    input: Array,
    *,
    channel_axis: int | tuple[int, ...] = 1,
    mask: Array | None = None,
    dtype: npt.DTypeLike | None = None,
    keepdims: bool = False,
) -> tuple[Array, Array]:
    """Mean and biased variance of each channel.

    Parameters
    ----------
    input : array, not empty
        Of a kind and dtype that `batch_norm` takes.
    channel_axis : int or tuple of ints
        The channel axis of an input of rank >= 2, or several axes: what shares a place along all of them shares
        statistics. With all axes of the input, each element is a channel. Where the channels of several axes do not
        lie in memory as those of one, the input is copied.
    mask : bool array or None
        True where there is data: of the input's shape without the channel axes, or one that broadcasts to it. What it
        leaves out is as if it were not there.
    dtype : float32, float64 or None
        Dtype of the results. None stands for float64 for float64 input and float32 otherwise. With float64 nothing is
        rounded on the way out, which matters where the mean is large against the standard deviation.
    keepdims : bool
        Whether the results keep all axes of the input, those of the channels as they are and others of length 1, so
        that they broadcast against it.

    Returns
    -------
    mean, var : arrays
        Of the shape that the input has along the channel axes, in the order of `channel_axis`: (C,) for a single one.
        NaN where the mask has left nothing.

    Raises
    ------
    TypeError
        If `input` is not an array of a kind and dtype of `batch_norm`, `channel_axis` neither an int nor a tuple of
        ints, `mask` no bool array beside the input, `dtype` another one, or `keepdims` no bool.
    ValueError
        If `input` is empty, its rank or `channel_axis` does not fit, or `mask` does not broadcast.

    See Also
    --------
    cupybn.StreamingMoments : The moments of many arrays, as of one.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn.functional as F
    >>> photos = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)  # (N, H, W, C)
    >>> F.moments(photos, channel_axis=-1)
    (array([10.5, 11.5, 12.5], dtype=float32), array([47.25, 47.25, 47.25], dtype=float32))
    >>> mean, var = F.moments(photos, channel_axis=(1, 2, 3), dtype=np.float64, keepdims=True)  # over photos alone
    >>> mean.shape, var.dtype
    ((1, 2, 2, 3), dtype('float64'))
    >>> F.moments(photos, channel_axis=-1, mask=np.array([[[True, False], [False, False]]]))[0]  # one place of each
    array([6., 7., 8.], dtype=float32)
    """
    axes = check_axes(input, as_channel_axis(channel_axis))
    if mask is not None:
        checks.check_mask(mask, input, axes)
    checks.check_bool("keepdims", keepdims)
    dtype = accumulation_dtype(input.dtype) if dtype is None else _as_dtype(dtype)
    if input.size == 0:
        raise ValueError(f"expected an input that is not empty (got shape {input.shape})")
    ops, shape = ops_for(input), sizes_along(input, axes)
    with on_device_of(input), unheard():
        mean, var = (array.reshape(shape) for array in ops.mean_and_var(parts_of(ops, input, axes, mask), dtype))
    if keepdims:
        return keeping_dims(mean, axes, input.ndim), keeping_dims(var, axes, input.ndim)
    return mean, var


def parts_of(ops: ModuleType, input: Array, axes: tuple[int, ...], mask: Array | None) -> Moments:
    """Moments of an array that is not empty, in the parts that `bn_stats` makes."""
    x, mask = view(input, axes, mask)
    parts: Moments = ops.bn_stats(x, mask=mask)
    return parts


def _as_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Dtype that a user chose for moments; raises unless it is float32 or float64."""
    try:
        result: np.dtype[Any] = np.dtype(dtype)
    except Exception:  # mostly TypeError, but NumPy parses texts and tuples, which raises errors of any class
        raise TypeError(f"expected dtype to be float32, float64 or None (got {show(dtype)})") from None
    if result not in (np.float32, np.float64):
        raise TypeError(f"expected dtype to be float32, float64 or None (got {result})")
    return result
