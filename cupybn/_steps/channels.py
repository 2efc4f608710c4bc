"""Batch norm of one channel, for all channels at once: what depends on the channel alone, in float64.

The mean is never rounded to one float32: with ``center`` the mean so rounded and ``rest = mean - center``,

    (x - mean) * scale + bias  =  (x - center) * scale + (bias - rest * scale)

where ``x - center`` is exact wherever it matters, and the second bracket, ``shift``, is a constant of the channel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps.bundles import Activation, Affine
from cupybn._steps.narrow import FLOAT64, LARGE, SMALL_RSTD, extreme, let_through, within

Array = npt.NDArray[Any]

_TAME = 1e14
"""Size up to which mean, bias, rstd, scale and the inverses of the last two leave no doubt that a channel is narrow."""


class Channels(NamedTuple):
    """Batch norm of each channel as (x - center) * scale + shift, in float64."""

    table: Array  # (6, C); rows are std, rstd, 1 / scale, center, shift, scale
    rounded: Array  # (3, C); center, shift and scale in the dtype of the arithmetic
    rest: Array  # (C,); mean - center
    wide: Array | None  # (C,); whether a channel needs float64. None if none does
    dtype: np.dtype[Any]  # dtype of the arithmetic of all other channels

    @classmethod
    def of(cls, x_dtype: np.dtype[Any], mean: Array, var: Array, affine: Affine) -> Channels:
        """The channels of these vectors and eps, for data of a dtype."""
        weight, bias, eps = affine
        dtype = accumulation_dtype(x_dtype)
        C = len(mean)
        table = np.empty((6, C))
        std, rstd, inverse, center, shift, scale = table
        std[...] = var
        std += eps
        np.sqrt(std, out=std)
        np.reciprocal(std, out=rstd)
        scale[...] = 1 if weight is None else weight
        scale *= rstd
        np.reciprocal(scale, out=inverse)
        center[...] = mean
        shift[...] = 0 if bias is None else bias
        wide: Array | None = None
        if within(_TAME, table):
            center[...] = center.astype(dtype)
            rest = mean - center
        else:
            wide = (rstd < SMALL_RSTD) | (rstd > 1 / SMALL_RSTD) | extreme(scale) | (np.abs(center) > LARGE)
            np.copyto(center, center.astype(dtype), where=~wide)
            rest = np.where(np.isfinite(center), mean - center, 0)  # inf - inf is NaN
        with_rest = np.count_nonzero(rest)  # none, if the mean is a float32
        if with_rest:
            lost = -rest
            lost *= scale
            if with_rest < C:
                lost[rest == 0] = 0  # 0 * inf is NaN
            if bias is None:
                shift[...] = lost
            else:
                shift += lost
        elif bias is not None:
            shift += 0.0
        if bias is not None and wide is not None:
            wide |= np.abs(shift) > LARGE
        return cls(table, table[3:].astype(dtype), rest, wide, dtype)

    @property
    def rstd(self) -> Array:
        """1 / sqrt(var + eps)."""
        row: Array = self.table[1]
        return row

    @property
    def center(self) -> Array:
        """The mean, rounded to the dtype of the arithmetic of the channel."""
        row: Array = self.table[3]
        return row

    @property
    def scale(self) -> Array:
        """weight / sqrt(var + eps)."""
        row: Array = self.table[5]
        return row

    def slopes(self, sum_dy: Array, sum_dy_xhat: Array, inv_count: float) -> Array:
        """Factors of the way back, which takes slope * (x - center) + offset from dy and multiplies with scale.

        Rows are scale, slope and offset, (3, C).
        """
        slopes = np.empty((3, len(sum_dy)))
        slopes[0] = self.scale
        slope, offset = slopes[1:]
        np.multiply(sum_dy_xhat, self.rstd, out=slope)
        slope *= inv_count
        np.multiply(sum_dy, inv_count, out=offset)
        offset -= slope * self.rest
        return slopes

    def factors(self, some: slice | Array, dtype: npt.DTypeLike) -> Array:
        """Center, shift and scale of some channels in the dtype of the arithmetic, (3, channels)."""
        table = self.rounded if dtype == self.dtype else self.table[3:].astype(dtype, copy=False)
        return table[:, some]

    def precisions(self, factors: Array | None = None) -> list[tuple[slice, np.dtype[Any], np.dtype[Any]]]:
        """Ranges of channels, the dtype of the arithmetic in each, and that in which ReLU decides.

        The arithmetic is float64 where float32 is too narrow: for the channel's own numbers, or for further factors,
        (K, C), K of each. ReLU decides as on the way forward, which knows the channel's own numbers alone.
        """
        dtype = self.dtype
        if dtype is FLOAT64:
            return [(slice(None), dtype, dtype)]
        wide = np.zeros(len(self.rest), np.bool_) if self.wide is None else self.wide
        beyond = np.zeros_like(wide)
        if factors is not None and not within(_TAME**2, factors, np.reciprocal(factors)):
            beyond = np.logical_or.reduce(extreme(factors)) & ~wide
        if not (np.count_nonzero(wide) or np.count_nonzero(beyond)):
            return [(slice(None), dtype, dtype)]
        kinds = (~(wide | beyond), dtype, dtype), (beyond, FLOAT64, dtype), (wide, FLOAT64, FLOAT64)
        return [(some, arithmetic, gate) for flags, arithmetic, gate in kinds for some in runs(flags)]


REMEMBERED = 256
"""Most channels that are remembered: bytes of more of them take as long to compare as their factors to compute."""


def remembered(x_dtype: np.dtype[Any], mean: Array, var: Array, affine: Affine) -> Channels:
    """`Channels.of`, kept for the next calls with the same numbers.

    In inference those of a layer are the same in all calls, and the way back needs what the way forward has computed.
    What is kept is found by the bytes of the vectors, so that it does not matter who changes an array in between.
    """
    weight, bias, eps = affine
    if len(mean) > REMEMBERED or eps == 0:  # 0.0 and -0.0 are equal, but what they make is not
        return Channels.of(x_dtype, mean, var, affine)
    vectors = [None if v is None else (v.dtype, v.tobytes()) for v in (mean, var, weight, bias)]
    return _of_bytes(x_dtype, eps, *vectors)


@functools.lru_cache(maxsize=64)
def _of_bytes(x_dtype: np.dtype[Any], eps: float, *vectors: tuple[np.dtype[Any], bytes] | None) -> Channels:
    """The channels of vectors given as dtypes and bytes; arrays of the result are read-only."""
    mean, var, weight, bias = (None if v is None else np.frombuffer(v[1], v[0]) for v in vectors)
    assert mean is not None
    assert var is not None
    channels = Channels.of(x_dtype, mean, var, Affine(weight, bias, eps))
    for array in channels[:4]:
        if array is not None:
            array.flags.writeable = False
    return channels


def of_channels(arrays: list[Array | None], some: slice) -> list[Array | None]:
    """The arrays, cut to some channels."""
    return arrays if some == slice(None) else [None if a is None else a[:, some] for a in arrays]


def runs(flags: Array) -> list[slice]:
    """The ranges over which `flags` is true."""
    if not flags.any():
        return []
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# What ReLU has let through


def preactivation(d: Array, shift: Array, scale: Array, residual: Array | None, out: Array | None = None) -> Array:
    """d * scale + shift + residual, d = x - center: the value whose sign decides what ReLU passes."""
    y: Array = np.multiply(d, scale, out=out)
    y += shift
    if residual is not None:
        np.add(y, residual, out=y, dtype=y.dtype)
    return y


def passing(d: Array | None, passed: Array | None, affine: Sequence[Array]) -> Array:
    """Whether ReLU passes each element: the record, or what x - center, shift and scale say once more."""
    if passed is not None:
        return passed
    assert d is not None
    shift, scale = affine
    passes: Array = preactivation(d, shift, scale, None) > 0
    return passes


def what_passed(
    dy: Array, d: Array | None, passed: Array | None, affine: Sequence[Array], activation: Activation
) -> Array:
    """dy in the dtype of the arithmetic, 0 where ReLU stopped it: never 0 * dy, dy may be inf."""
    return let_through(dy, passing(d, passed, affine)) if activation == "relu" else dy
