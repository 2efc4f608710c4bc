"""The steps of batch norm on NumPy arrays: the specification of the CUDA kernels, and the fallback without a GPU.

Arrays have shape (N, C, L), and L = 1 where the channels are last in memory; vectors have shape (C,). Arithmetic is
float32 for data of 16 or 32 bits, float64 for float64 and for channels near the limits of float32; sums end in float64.
Each step hands a function, its core, to `tiles`, which applies it to the arrays tile by tile, on threads. What travels
together is a bundle (`bundles`).

The mean is never rounded to one float32: with ``center`` the mean so rounded and ``rest = mean - center``,

    (x - mean) * scale + bias  =  (x - center) * scale + (bias - rest * scale)

where ``x - center`` is exact wherever it matters, and the second bracket, ``shift``, is a constant of the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import write_at_once
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps.bundles import Activation, Affine, Epilogue, Gradients, Moments, Running, Statistics, Sums
from cupybn._steps.tiles import gather, tile_map, tile_sums

Array = npt.NDArray[Any]
Terms = list[tuple[Array, ...]]
"""What a core asks to be summed for each channel: tuples of an array or of two, whose product is meant."""
Column = Callable[[Array], Array]
"""Function of a tile that turns one value per channel into a column, to be broadcast against its elements."""

_quiet = np.errstate(all="ignore")  # inf and NaN are data here

SAMPLES = 16
"""Values per channel whose mean is the center of the first sums: it is off by a quarter of a standard deviation."""


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@_quiet
def bn_stats(x: Array, batches: Array | None = None, scratch: Array | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, in one part.

        mean = center + sum(d) / count,   m2 = sum(d * d) - sum(d)^2 / count,   d = x - center

    hold for any center, and rounding errors at most double if the center lies within a standard deviation of the mean.
    The mean of a few values nearly always does; where it does not, and where float32 cannot hold the squares, the
    channel is done again in float64, with its mean as the center.

    Parameters
    ----------
    x : (N, C, L) array, not empty
    batches : 0-d int64 array or None
        The counter of batches: copied into the moments.
    scratch : array of the same shape as x, or None
        Memory to work in; it is used if its dtype is that of the arithmetic.
    """
    dtype = accumulation_dtype(x.dtype)
    count = x.shape[0] * x.shape[2]
    center = _sample_mean(x)
    mean, m2 = _moments_about(center, x, dtype, scratch)
    held = (m2 / count > 1e4 * np.finfo(dtype).tiny) & (m2 < np.inf)
    if (m2 == 0).any():
        held |= (m2 == 0) & _constant(x, center, dtype)
    doubtful = np.flatnonzero(~(held & ((mean - center) ** 2 <= m2 / count)))
    if doubtful.size:
        mean[doubtful], m2[doubtful] = _moments_in_float64(x, doubtful)
    return Moments(np.array([float(count)]), mean[None], m2[None], None if batches is None else batches.copy())


@_quiet
def merge_moments(moments: Moments) -> Array:
    """Count, mean and m2 of all parts together: a row of one count, C means and C m2, as `Moments.of_rows` reads it.

    Exact where all parts have the same mean; parts without values are left out. Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances" (1979), for many parts at once.
    """
    C = moments.mean.shape[1]
    row = np.zeros((1, 1 + 2 * C))
    count = moments.count.sum()
    if count == 0:
        return row
    n, pivot = moments.count[:, None], moments.mean[np.argmax(moments.count > 0)]
    mean = pivot + (n * (moments.mean - pivot)).sum(axis=0) / count
    row[0, 0], row[0, 1 : 1 + C] = count, mean
    row[0, 1 + C :] = (moments.m2 + n * (moments.mean - mean) ** 2).sum(axis=0)
    return row


@_quiet
def mean_and_var(moments: Moments, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, rounded to a dtype."""
    batch = Moments.of_rows(merge_moments(moments))
    return batch.mean[0].astype(dtype), (batch.m2[0] / batch.count).astype(dtype)


def _sample_mean(x: Array) -> Array:
    """The mean of a few values of each channel, spread over the array: exactly their value, if all are the same."""
    N, C, L = x.shape
    along_n = min(N, SAMPLES)
    along_l = min(L, SAMPLES // along_n)
    spread_out = x[N // (2 * along_n) :: -(-N // along_n), :, L // (2 * along_l) :: -(-L // along_l)]
    sample = spread_out.transpose(0, 2, 1).reshape(-1, C).astype(np.float64)
    first = sample[0].copy()
    sample -= first
    mean: Array = first + sample.mean(axis=0)
    return mean


def _moments_about(center: Array, x: Array, dtype: npt.DTypeLike, scratch: Array | None = None) -> tuple[Array, Array]:
    """Mean and m2, from sums about a center."""
    center = center.astype(dtype)
    scratch = _usable(scratch, dtype)

    def core(column: Column, x: Array, scratch: Array | None, center: Array) -> Terms:
        d = np.subtract(x, column(center), out=scratch, dtype=dtype)
        return [(d,), (d, d)]

    sum_d, sum_dd = tile_sums(core, [x, scratch], [center], scratch is None, 2)
    count = x.shape[0] * x.shape[2]
    return center + sum_d / count, np.maximum(sum_dd - sum_d**2 / count, 0)


def _constant(x: Array, center: Array, dtype: npt.DTypeLike) -> Array:
    """Whether all values of a channel are its center: squares of differences may be 0 though these are not."""

    def core(column: Column, x: Array, center: Array) -> Terms:
        return [(np.subtract(x, column(center), dtype=dtype) != 0,)]

    (differing,) = tile_sums(core, [x], [center.astype(dtype)], True, 1)
    constant: Array = differing == 0
    return constant


def _moments_in_float64(x: Array, channels: Array) -> tuple[Array, Array]:
    """Mean and m2 of these channels, about their first value and then about the mean."""
    count = x.shape[0] * x.shape[2]
    mean, m2 = x[0, channels, 0].astype(np.float64), np.empty(len(channels))
    for _ in range(2):
        sum_d, sum_dd = np.zeros((2, len(channels)))
        for some, (values,) in gather(channels, [x]):
            d = values.astype(np.float64) - mean[some, None]
            sum_d[some] += d.sum(axis=1)
            sum_dd[some] += np.vecdot(d, d)
        mean += sum_d / count
        m2 = np.maximum(sum_dd - sum_d**2 / count, 0)
    return mean, m2


@_quiet
def bn_update_running(moments: Moments, running: Running) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place, with the unbiased variance of the batch.

    ``momentum=None`` stands for 1 / (batches + 1), the mean over all batches. Here batches is the copy of the counter
    in the moments; one below 0, which cannot be a count, is taken for 0. The counter itself is among the running
    statistics, and goes up by one. A batch of less than two values for each channel, whose unbiased variance is not
    defined, changes nothing.

    Parameters
    ----------
    moments : Moments
        Of the batch, in one part.
    running : Running
    """
    count, mean, m2 = moments.count[0], moments.mean[0], moments.m2[0]
    if not count > 1:
        return
    momentum = running.momentum
    if momentum is None:
        assert moments.batches is not None
        momentum = 1 / (max(float(moments.batches), 0) + 1)
    written = [
        (vector, ((1 - momentum) * vector.astype(np.float64) + momentum * batch).astype(vector.dtype))
        for vector, batch in ((running.mean, mean), (running.var, m2 / (count - 1)))
        if vector is not None
    ]
    if running.batches is not None:
        written.append((running.batches, running.batches + 1))
    write_at_once(written)


@_quiet
def bn_normalize(
    x: Array,
    moments: Moments | None,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,  # noqa: ARG001
) -> Statistics:
    """out = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), then `bn_update_running`.

    Parameters
    ----------
    x, out : (N, C, L) arrays; out may be x or the residual
    moments : Moments or None
        Of the batch, in training. None normalises with the running statistics, and leaves them alone.
    affine : Affine
    running : Running
        Without arrays in training, where they are not to be moved.
    epilogue : Epilogue
        Its mask gets where ReLU passes.
    keep : bool
        Whether the result is wanted: a GPU need not write it down.

    Returns
    -------
    The statistics that x was normalised with.
    """
    if moments is None:
        assert running.mean is not None
        assert running.var is not None
        statistics = Statistics.of(running.mean.astype(np.float64), running.var.astype(np.float64))
    else:
        batch = Moments.of_rows(merge_moments(moments), moments.batches)
        statistics = Statistics.of(batch.mean[0], batch.m2[0] / batch.count)
    channels = _Channels.of(x.dtype, statistics, affine)
    residual, activation, mask = epilogue
    out_is_free = residual is None or not np.may_share_memory(out, residual)  # to compute in, before residual is read

    def core(column: Column, x: Array, residual: Array | None, out: Array, mask: Array | None, *factors: Array) -> None:
        dtype = factors[0].dtype
        y = out if out_is_free and out.dtype == dtype else np.empty(x.shape, dtype)
        _preactivation(y, x, residual, column, factors)
        if mask is not None:
            np.greater(y, 0, out=mask)
        if activation == "relu":
            row = y.shape[1:] if y.shape[2] == 1 else y.shape[2:]
            np.maximum(y, np.zeros(row, dtype), out=y)  # with a scalar NumPy takes three times as long
        if y is not out:
            np.copyto(out, y, casting="unsafe")

    for some, dtype in channels.precisions():
        arrays = [None if a is None else a[:, some] for a in (x, residual, out, mask)]
        temporaries = not out_is_free or out.dtype != dtype or activation is not None
        tile_map(core, arrays, channels.factors(some, dtype), temporaries)
    if moments is not None and running.mean is not None:
        bn_update_running(batch, running)
    return statistics


def bn_forward(
    x: Array,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,
    scratch: Array | None = None,
) -> Statistics:
    """`bn_stats`, then `bn_normalize`: batch norm in training."""
    moments = bn_stats(x, running.batches if running.momentum is None else None, scratch)
    return bn_normalize(x, moments, affine, running, epilogue, out, keep)


def empty_mask(x: Array, residual: Array, out: Array) -> Array:  # noqa: ARG001
    """A mask of where ReLU passes, one bool for each element of x, for a way back that need not know the residual."""
    return np.empty(x.shape, np.bool_)


def _preactivation(y: Array, x: Array, residual: Array | None, column: Column, factors: Sequence[Array]) -> None:
    """y = (x - center) * scale + shift + residual: the value whose sign decides what ReLU passes."""
    center, scale, shift = factors
    np.subtract(x, column(center), out=y, dtype=y.dtype)
    y *= column(scale)
    y += column(shift)
    if residual is not None:
        np.add(y, residual, out=y, dtype=y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@_quiet
def bn_backward_reduce(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    scratch: Array | None = None,
) -> Sums:
    """sum(dy) and sum(dy * xhat), xhat = (x - mean) / sqrt(var + eps), where activation passed dy, in one part.

    Parameters
    ----------
    dy, x : (N, C, L) arrays
    statistics : Statistics
    affine : Affine
        Decides what ReLU passed, where there is no mask.
    epilogue : Epilogue
        Activation, and the mask that `bn_normalize` has filled, or None.
    scratch : array of the same shape, or None
        Memory to work in; it is used if its dtype is that of the arithmetic.
    """
    channels, activation = _Channels.of(x.dtype, statistics, affine), epilogue.activation
    usable = _usable(scratch, channels.dtype)
    factors = channels.factors(slice(None), channels.dtype)
    temporaries = usable is None or activation is not None

    def products(
        column: Column, dy: Array, x: Array, mask: Array | None, usable: Array | None, *factors: Array
    ) -> Terms:
        g = _passed(dy, x, mask, column, factors, activation)
        return [(g,), (g, np.subtract(x, column(factors[0]), out=usable, dtype=factors[0].dtype))]

    def any_product(column: Column, *tile: Any) -> Terms:
        (g,), (_, d) = products(column, *tile)
        return [((g != 0) & (d != 0),)]

    arrays = [dy, x, epilogue.mask, usable]
    sum_dy, sum_dy_d = tile_sums(products, arrays, factors, temporaries, 2)
    if channels.dtype != np.float64:
        # Products too small for float32 are lost in part: that matters in sums that are no larger than this.
        least = x.shape[0] * x.shape[2] * np.finfo(channels.dtype).tiny / 8
        held = np.abs(sum_dy_d) > least
        if (sum_dy_d == 0).any():  # as where nothing comes back, which is right
            held |= (sum_dy_d == 0) & (tile_sums(any_product, arrays, factors, True, 1)[0] == 0)
        held &= np.isfinite(sum_dy) & np.isfinite(sum_dy_d)
        for chosen, dtype in (channels.wide, np.float64), (~channels.wide & ~held, channels.dtype):
            numbers = np.flatnonzero(chosen)
            if numbers.size:
                sums = _gradient_sums_in_float64(arrays[:3], channels, activation, numbers, dtype)
                sum_dy[numbers], sum_dy_d[numbers] = sums
    sum_dy_xhat = (sum_dy_d - channels.rest * sum_dy) * channels.rstd
    return Sums(sum_dy[None], sum_dy_xhat[None])


def _gradient_sums_in_float64(
    arrays: Sequence[Array | None], channels: _Channels, activation: Activation, numbers: Array, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """sum(dy) and sum(dy * (x - center)) of the channels of these numbers, from dy, x and mask.

    The dtype is that in which ReLU decides.
    """
    sum_dy, sum_dy_d = np.zeros((2, len(numbers)))
    factors = channels.factors(numbers, dtype)
    for some, (g, values, mask) in gather(numbers, arrays):
        g = _passed(g, values, mask, lambda v: v[:, None], [v[some] for v in factors], activation)
        g, d = g.astype(np.float64), values.astype(np.float64) - channels.center[numbers[some], None]
        sum_dy[some] += g.sum(axis=1)
        sum_dy_d[some] += np.vecdot(g, d)
    return sum_dy, sum_dy_d


@_quiet
def merge_sums(sums: Sums, count: Array, dweight: Array | None, dbias: Array | None) -> Array:
    """The sums of all parts divided by count, as a row that `Sums.of_rows` reads: the shares of one rank in the means.

    Those of all ranks add up to the means over the whole batch, which `bn_backward_input` takes with ``inv_count=1``.

    Parameters
    ----------
    sums : Sums
        Of the batch of this rank; no parts, if it is empty.
    count : (1,) array, float64
        The number of values for each channel in the whole batch.
    dweight, dbias : (C,) arrays or None
        Get the gradients of this rank: sum(dy * xhat) and sum(dy).
    """
    dy, dy_xhat = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
    if dweight is not None:
        dweight[...] = dy_xhat
    if dbias is not None:
        dbias[...] = dy
    row: Array = np.concatenate([dy, dy_xhat])[None] / max(count[0], 1)
    return row


@_quiet
def bn_backward_input(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    sums: Sums | None,
    inv_count: float,
    gradients: Gradients,
) -> None:
    """dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation passed dy.

    Also dresidual = dy where activation passed it, dweight = sum(dy * xhat), dbias = sum(dy).

    Parameters
    ----------
    dy, x : (N, C, L) arrays
    statistics : Statistics
    affine : Affine
    epilogue : Epilogue
        Activation, and the mask that `bn_normalize` has filled, or None.
    sums : Sums
        Of the whole batch. None only if nothing needs them: in eval mode without weight and bias.
    inv_count : float
        1 / count in training, 0 in eval mode, whose statistics do not depend on x.
    gradients : Gradients
        Get all of these.
    """
    channels, activation = _Channels.of(x.dtype, statistics, affine), epilogue.activation
    dx, dresidual, dweight, dbias = gradients
    slope = offset = np.zeros(x.shape[1])
    if sums is not None:
        sum_dy, sum_dy_xhat = sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0)
        slope = sum_dy_xhat * channels.rstd * inv_count
        offset = sum_dy * inv_count - slope * channels.rest
        if dweight is not None:
            dweight[...] = sum_dy_xhat
        if dbias is not None:
            dbias[...] = sum_dy

    def core(column: Column, *tile: Any) -> None:
        dy, x, mask, dx, dresidual, center, scale, shift, slope, offset = tile
        dy = _passed(dy, x, mask, column, (center, scale, shift), activation)
        if dresidual is not None:
            np.copyto(dresidual, dy, casting="unsafe")
        d = dx if dx.dtype == scale.dtype else np.empty(x.shape, scale.dtype)
        if inv_count == 0:  # without 0 * x: x may be inf
            np.multiply(dy, column(scale), out=d)
        else:
            np.subtract(x, column(center), out=d, dtype=d.dtype)
            d *= column(slope)
            np.subtract(dy, d, out=d)
            d -= column(offset)
            d *= column(scale)
        if d is not dx:
            np.copyto(dx, d, casting="unsafe")

    for some, dtype in channels.precisions(slope, offset):
        arrays = [None if a is None else a[:, some] for a in (dy, x, epilogue.mask, dx, dresidual)]
        vectors = [*channels.factors(some, dtype), slope[some].astype(dtype), offset[some].astype(dtype)]
        tile_map(core, arrays, vectors, temporaries=activation is not None or dx.dtype != dtype)


def bn_backward(
    dy: Array,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    inv_count: float,
    gradients: Gradients,
    scratch: Array | None = None,
) -> None:
    """`bn_backward_reduce`, then `bn_backward_input`: all gradients."""
    sums = bn_backward_reduce(dy, x, statistics, affine, epilogue, scratch)
    bn_backward_input(dy, x, statistics, affine, epilogue, sums, inv_count, gradients)


def _passed(
    dy: Array, x: Array, mask: Array | None, column: Column, factors: Sequence[Array], activation: Activation
) -> Array:
    """dy in the dtype of the arithmetic, 0 where ReLU stopped it: never 0 * dy, dy may be inf."""
    dy = dy.astype(factors[0].dtype, copy=False)
    if activation != "relu":
        return dy
    y = np.empty(x.shape, dy.dtype)
    if mask is None:
        _preactivation(y, x, None, column, factors)
        mask = y > 0
    word = np.dtype(f"i{dy.itemsize}")
    bits = np.negative(mask.view(np.int8))  # 0 or all bits set
    np.bitwise_and(dy.view(word), bits, out=y.view(word), dtype=word)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Per channel


_LARGE = 1e30
"""Size from which numbers, or their products, may be beyond float32; below its inverse they may be lost."""
_SMALL_RSTD = 1e-15
"""Least rstd of a narrow channel: (x - mean)^2 would be too large, and beyond its inverse dy * (x - mean) too small."""


class _Channels(NamedTuple):
    """Batch norm of each channel as (x - center) * scale + shift; (C,) arrays, float64."""

    center: Array
    rest: Array  # mean - center
    rstd: Array
    scale: Array
    shift: Array
    wide: Array  # whether the channel needs float64
    dtype: np.dtype[Any]  # dtype of the arithmetic of all other channels

    @classmethod
    def of(cls, x_dtype: np.dtype[Any], statistics: Statistics, affine: Affine) -> _Channels:
        """The channels of these statistics, weight, bias and eps, for data of a dtype."""
        weight, bias, eps = affine
        dtype = accumulation_dtype(x_dtype)
        rstd = 1 / np.sqrt(statistics.var + eps)
        scale = rstd if weight is None else rstd * weight.astype(np.float64)
        wide = (rstd < _SMALL_RSTD) | (rstd > 1 / _SMALL_RSTD) | _extreme(scale) | (np.abs(statistics.mean) > _LARGE)
        center = np.where(wide, statistics.mean, statistics.mean.astype(dtype))
        rest = np.where(np.isfinite(center), statistics.mean - center, 0)  # inf - inf is NaN
        shift = np.where(rest == 0, 0, -rest * scale)  # 0 * inf is NaN
        if bias is not None:
            shift += bias.astype(np.float64)
            wide |= np.abs(shift) > _LARGE
        return cls(center, rest, rstd, scale, shift, wide, dtype)

    def factors(self, some: slice | Array, dtype: npt.DTypeLike) -> list[Array]:
        """Center, scale and shift of some of the channels, in the dtype of their arithmetic."""
        return [vector[some].astype(dtype) for vector in (self.center, self.scale, self.shift)]

    def precisions(self, *more: Array) -> list[tuple[slice, npt.DTypeLike]]:
        """Ranges of channels, and the dtype of the arithmetic in each: float64 where float32 is too narrow.

        Beside the channel's own numbers, `more` vectors may be too large or too small for float32.
        """
        wide = self.wide | np.any([_extreme(v) for v in more], axis=0) if more else self.wide
        if not wide.any():
            return [(slice(None), self.dtype)]
        return [(some, self.dtype) for some in _runs(~wide)] + [(some, np.dtype(np.float64)) for some in _runs(wide)]


def _extreme(factor: Array) -> Array:
    """Whether float32 does not hold a factor, or not its products."""
    size = np.abs(factor)
    return (size > _LARGE) | (size < 1 / _LARGE) & (size > 0)


def _usable(scratch: Array | None, dtype: npt.DTypeLike) -> Array | None:
    """Memory to work in, if it is given and of the dtype of the arithmetic."""
    return None if scratch is None or scratch.dtype != dtype else scratch


def _runs(mask: Array) -> list[slice]:
    """The ranges over which `mask` is true."""
    if not mask.any():
        return []
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
