"""The steps of batch norm on NumPy arrays: the specification of the CUDA kernels, and the fallback without a GPU.

Arrays have shape (N, C, L), and L = 1 where the channels are last in memory; vectors have shape (C,). Arithmetic is
float32 for data of 16 or 32 bits, float64 for float64 and for channels near the limits of float32; sums end in float64.
Each step hands a function, its core, to `tiles`, which applies it to the arrays tile by tile, on threads. What travels
together is a bundle (`bundles`).

A mask leaves some positions of all channels, and what it leaves out is as if it were not there. So a step with a mask
is the step on the positions that are left, an array of their own of shape (P, C, 1), and outputs are 0 everywhere else.

The mean is never rounded to one float32: `channels` says how, and what else depends on the channel alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import write_at_once
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps.bundles import Activation, Affine, Epilogue, Gradients, Mask, Moments, Running, Statistics, Sums
from cupybn._steps.channels import Channels, of_channels, preactivation, remembered, what_passed
from cupybn._steps.narrow import FLOAT64, LARGE, LEAST_VARIANCE, TINY, within
from cupybn._steps.tiles import Terms, gather, numpy_settings, tile_map, tile_sums

Array = npt.NDArray[Any]

SAMPLES = 16
"""Values per channel whose mean is the center of the first sums: it is off by a quarter of a standard deviation."""


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@numpy_settings
def bn_stats(x: Array, batches: Array | None = None, scratch: Array | None = None, mask: Mask | None = None) -> Moments:
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
    mask : (N, L) array or None
        It may leave nothing: all moments are 0 then.
    """
    if mask is not None:
        x, scratch = _left(x, mask), None
    mean, m2 = _mean_and_m2(x, scratch) if _count(x) > 0 else np.zeros((2, x.shape[1]))
    return Moments(np.array([float(_count(x))]), mean[None], m2[None], None if batches is None else batches.copy())


@numpy_settings
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
    there = moments.count != 0
    n, means, m2 = moments.count[there, None], moments.mean[there], moments.m2[there]
    pivot = means[0]
    mean = pivot + (n * (means - pivot)).sum(axis=0) / count
    row[0, 0], row[0, 1 : 1 + C] = count, mean
    row[0, 1 + C :] = (m2 + n * (means - mean) ** 2).sum(axis=0)
    return row


@numpy_settings
def mean_and_var(moments: Moments, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, rounded to a dtype; NaN where there are no values."""
    mean, var = _mean_and_var(Moments.of_rows(merge_moments(moments)))
    return mean.astype(dtype), var.astype(dtype)


def _mean_and_var(batch: Moments) -> tuple[Array, Array]:
    """Mean and biased variance of moments in one part."""
    var: Array = batch.m2[0] / batch.count
    return np.where(batch.count > 0, batch.mean[0], np.nan), var


def _count(x: Array) -> int:
    """Number of values of each channel."""
    count: int = x.shape[0] * x.shape[2]
    return count


def _usable(scratch: Array | None, dtype: npt.DTypeLike) -> Array | None:
    """Memory to work in, if it is given and of the dtype of the arithmetic."""
    return None if scratch is None or scratch.dtype != dtype else scratch


def _mean_and_m2(x: Array, scratch: Array | None) -> tuple[Array, Array]:
    """Mean and sum of squared deviations of each channel: see `bn_stats`."""
    dtype, count, center = accumulation_dtype(x.dtype), float(_count(x)), _sample_mean(x)
    mean, m2 = _moments_about(center, x, dtype, scratch)
    var, off, least = m2 / count, mean - center, LEAST_VARIANCE[dtype]
    off *= off
    if np.count_nonzero(np.maximum(off, least) < var) < len(var) or not within(1e150, m2):
        held = (var > least) & (m2 < np.inf)
        if np.count_nonzero(m2) < len(m2):
            held |= (m2 == 0) & _constant(x, center, dtype)
        doubtful = np.flatnonzero(~(held & (off <= var)))
        if doubtful.size:
            mean[doubtful], m2[doubtful] = _moments_in_float64(x, doubtful)
    return mean, m2


def _sample_mean(x: Array) -> Array:
    """The mean of a few values of each channel, spread over the array: exactly their value, if all are the same."""
    some_n, some_l = _spread_out(x.shape)
    sample = x[some_n, :, some_l].transpose(0, 2, 1).reshape(-1, x.shape[1]).astype(FLOAT64)
    first = sample[0]
    mean: Array = np.add.reduce(sample - first, 0)
    mean /= float(len(sample))
    mean += first
    return mean


@functools.lru_cache
def _spread_out(shape: tuple[int, int, int]) -> tuple[slice, slice]:
    """Ranges along N and L of the values of `_sample_mean`."""
    N, _, L = shape
    along_n = min(N, SAMPLES)
    along_l = min(L, SAMPLES // along_n)
    return slice(N // (2 * along_n), None, -(-N // along_n)), slice(L // (2 * along_l), None, -(-L // along_l))


def _moments_about(center: Array, x: Array, dtype: npt.DTypeLike, scratch: Array | None = None) -> tuple[Array, Array]:
    """Mean and m2, from sums about a center. Rounding may leave an m2 just below 0."""
    # Of 16-bit data, sums are exact about one of its numbers. About others all elements lose the same digits.
    rounded = center.astype(x.dtype).astype(dtype)
    scratch = _usable(scratch, dtype)

    def core(x: Array, scratch: Array | None, center: Array) -> Terms:
        d = np.subtract(x, center, out=scratch, dtype=dtype)
        return [(d,), (d, d)]

    sum_d, sum_dd = tile_sums(core, [x, scratch], rounded[None], scratch is None)
    count = float(_count(x))
    square = sum_d * sum_d
    square /= count
    sum_dd -= square
    sum_d /= count
    sum_d += rounded.astype(FLOAT64)
    return sum_d, sum_dd


def _constant(x: Array, center: Array, dtype: npt.DTypeLike) -> Array:
    """Whether all values of a channel are its center: squares of differences may be 0 though these are not."""

    def core(x: Array, center: Array) -> Terms:
        return [(np.subtract(x, center, dtype=dtype) != 0,)]

    (differing,) = tile_sums(core, [x], center.astype(dtype)[None], True)
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


@numpy_settings
def bn_update_running(
    moments: Moments | None, running: Running, statistics: Statistics | None = None, count: float = 0.0
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place, with the unbiased variance of the batch.

    ``momentum=None`` stands for 1 / (batches + 1), the mean over all batches. Here batches is the copy of the counter
    in the moments; one below 0, which cannot be a count, is taken for 0. The counter itself is among the running
    statistics, and goes up by one. A batch of less than two values for each channel, whose unbiased variance is not
    defined, changes nothing. With ``skip_nonfinite`` neither does one that has a mean or an unbiased variance which is
    not finite in the dtype of its running statistic, in whatever channel.

    Parameters
    ----------
    moments : Moments or None
        Of the batch, in one part. None: they are worked out from the statistics.
    running : Running
    statistics : Statistics or None
        Of the batch, where there are no moments.
    count : float
        Number of values of each channel, where there are no moments.
    """
    if moments is None:
        assert statistics is not None
        _update_running(count, statistics.mean, statistics.var * count, running.batches, running)
    else:
        _update_running(float(moments.count[0]), moments.mean[0], moments.m2[0], moments.batches, running)


def _update_running(count: float, mean: Array, m2: Array, batches: Array | None, running: Running) -> None:
    """`bn_update_running` with the moments of a batch."""
    if not count > 1:
        return
    momentum = running.momentum
    if momentum is None:
        assert batches is not None
        momentum = 1 / (max(float(batches), 0) + 1)
    written = []
    if running.mean is not None:
        assert running.var is not None
        moved, batch = np.empty((2, 2, len(mean)))
        batch[0] = mean
        np.divide(m2, count - 1, out=batch[1])
        if running.skip_nonfinite and not _finite_in(batch, running.mean.dtype, running.var.dtype):
            return
        moved[0], moved[1] = running.mean, running.var
        moved *= 1 - momentum
        batch *= momentum
        moved += batch
        written = [
            (running.mean, moved[0].astype(running.mean.dtype)),
            (running.var, moved[1].astype(running.var.dtype)),
        ]
    if running.batches is not None:
        written.append((running.batches, running.batches + 1))
    write_at_once(written)


def _finite_in(batch: Array, mean_dtype: npt.DTypeLike, var_dtype: npt.DTypeLike) -> bool:
    """Whether mean and variance of all channels, the rows of a batch, are finite when rounded to these dtypes."""
    return all(
        bool(np.isfinite(row.astype(dtype)).all()) for row, dtype in zip(batch, (mean_dtype, var_dtype), strict=True)
    )


@numpy_settings
def bn_normalize(
    x: Array,
    moments: Moments | None,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,
) -> Statistics | None:
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
        Its record gets where ReLU passes; where its mask leaves nothing, out is 0.
    keep : bool
        Whether the statistics are wanted, for a way back.

    Returns
    -------
    The statistics that x was normalised with, if they are wanted.
    """
    if moments is None:
        assert running.mean is not None
        assert running.var is not None
        statistics = Statistics.of(running.mean, running.var) if keep else None
        _normalize(x, remembered(x.dtype, running.mean, running.var, affine), epilogue, out)
        return statistics
    batch = Moments.of_rows(merge_moments(moments), moments.batches)
    channels, statistics = _channels_of_batch(x.dtype, *_mean_and_var(batch), affine, keep)
    _normalize(x, channels, epilogue, out)
    if running.mean is not None:
        _update_running(float(batch.count[0]), batch.mean[0], batch.m2[0], batch.batches, running)
    if statistics is None or epilogue.mask is None:
        return statistics
    return statistics._replace(count_left=batch.count.copy())


def _channels_of_batch(
    x_dtype: np.dtype[Any], mean: Array, var: Array, affine: Affine, keep: bool
) -> tuple[Channels, Statistics | None]:
    """Channels with the statistics of a batch and, if they are wanted for the way back, the statistics."""
    if keep:
        return remembered(x_dtype, mean, var, affine), Statistics.of(mean, var)
    return Channels.of(x_dtype, mean, var, affine), None  # the next batch has others


def _normalize(x: Array, channels: Channels, epilogue: Epilogue, out: Array) -> None:
    """`bn_normalize` with the statistics of these channels."""
    residual, activation, passed, mask = epilogue
    if mask is not None:
        left = _left(x, mask)
        y, ys = np.empty_like(left), None if passed is None else np.empty(left.shape, np.bool_)
        if left.size > 0:
            _normalize(left, channels, Epilogue(_left(residual, mask), activation, ys), y)
        _put_back([(out, y), (passed, ys)], mask)
        return
    out_is_free = residual is None or not np.may_share_memory(out, residual)  # to compute in, before residual is read

    def core(
        x: Array, residual: Array | None, out: Array, passed: Array | None, center: Array, shift: Array, scale: Array
    ) -> None:
        dtype = center.dtype
        y = out if out_is_free and out.dtype == dtype else np.empty(x.shape, dtype)
        np.subtract(x, center, out=y, dtype=dtype)
        preactivation(y, shift, scale, residual, out=y)
        if passed is not None:
            np.greater(y, 0, out=passed)
        if activation == "relu":
            row = y.shape[1:] if y.shape[2] == 1 else y.shape[2:]
            np.maximum(y, np.zeros(row, dtype), out=y)  # with a scalar NumPy takes three times as long
        if y is not out:
            np.copyto(out, y, casting="unsafe")

    arrays = [x, residual, out, passed]
    for some, dtype, _ in channels.precisions():
        temporaries = not out_is_free or out.dtype != dtype or activation is not None
        tile_map(core, of_channels(arrays, some), channels.factors(some, dtype), temporaries)


@numpy_settings
def bn_forward(
    x: Array,
    affine: Affine,
    running: Running,
    epilogue: Epilogue,
    out: Array,
    keep: bool = True,
    scratch: Array | None = None,
) -> Statistics | None:
    """`bn_stats`, then `bn_normalize`: batch norm in training."""
    if epilogue.mask is not None:
        moments = bn_stats(x, running.batches, None, epilogue.mask)
        return bn_normalize(x, moments, affine, running, epilogue, out, keep)
    mean, m2 = _mean_and_m2(x, scratch)
    # As `merge_moments` leaves a single part: NaN where the mean is infinite, and 0 without a sign.
    zero = mean - mean
    mean += zero
    m2 += zero
    count = float(_count(x))
    channels, statistics = _channels_of_batch(x.dtype, mean, m2 / count, affine, keep)
    _normalize(x, channels, epilogue, out)
    if running.mean is not None:
        _update_running(count, mean, m2, running.batches, running)
    return statistics


def empty_passed(x: Array, residual: Array, out: Array, mask: Mask | None = None) -> Array:  # noqa: ARG001
    """A record of where ReLU passes, one bool for each element of x, for a way back that need not know the residual."""
    return np.empty(x.shape, np.bool_)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@overload
def _left(array: Array, mask: Mask) -> Array: ...
@overload
def _left(array: None, mask: Mask) -> None: ...
def _left(array: Array | None, mask: Mask) -> Array | None:
    """The positions of an (N, C, L) array that a mask leaves, as a (P, C, 1) array; None for None."""
    if array is None:
        return None
    N, C, L = array.shape
    if L == 1:  # an index that is a mask takes several times as long
        return array.reshape(N, C).take(np.flatnonzero(mask), 0)[..., None]
    return array.swapaxes(1, 2)[mask][..., None]


def _put_back(pairs: Sequence[tuple[Array | None, Array | None]], mask: Mask) -> None:
    """Write arrays like those of `_left` to their positions in (N, C, L) arrays, and 0 to all others.

    Parameters
    ----------
    pairs : sequence of pairs (array, positions), or (None, None)
    mask : (N, L) array
    """
    for array, left in pairs:
        if array is not None:
            assert left is not None
            array[...] = 0
            array.swapaxes(1, 2)[mask] = left[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@numpy_settings
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
        Decides what ReLU passed, where there is no record.
    epilogue : Epilogue
        Activation, the record that `bn_normalize` has filled, or None, and the mask of the way forward, or None.
    scratch : array of the same shape, or None
        Memory to work in; it is used if its dtype is that of the arithmetic.
    """
    channels = remembered(x.dtype, statistics.mean, statistics.var, affine)
    mask = epilogue.mask
    if mask is not None:
        dy, x, scratch = _left(dy, mask), _left(x, mask), None
        epilogue = epilogue._replace(passed=_left(epilogue.passed, mask))
    if x.size == 0:
        return Sums(*np.zeros((2, 1, x.shape[1])))
    sum_dy, sum_dy_xhat = _gradient_sums(dy, x, channels, epilogue, _usable(scratch, channels.dtype))
    return Sums(sum_dy[None], sum_dy_xhat[None])


def _gradient_sums(
    dy: Array, x: Array, channels: Channels, epilogue: Epilogue, scratch: Array | None
) -> tuple[Array, Array]:
    """sum(dy) and sum(dy * xhat): see `bn_backward_reduce`. Leaves x - center in the scratch memory."""
    dtype, activation = channels.dtype, epilogue.activation
    gated = activation is not None and epilogue.passed is None
    factors = channels.factors(slice(None), dtype)[: 3 if gated else 1]

    def products(
        dy: Array, x: Array, passed: Array | None, scratch: Array | None, center: Array, *affine: Array
    ) -> Terms:
        d = np.subtract(x, center, out=scratch, dtype=dtype)
        g = what_passed(dy.astype(dtype, copy=False), d, passed, affine, activation)
        return [(g,), (g, d)]

    def any_product(*tile: Any) -> Terms:
        (g,), (_, d) = products(*tile)
        return [((g != 0) & (d != 0),)]

    arrays = [dy, x, epilogue.passed, scratch]
    sum_dy, sum_dy_d = tile_sums(products, arrays, factors, scratch is None or activation is not None)
    # Products too small for float32 are lost in part: that matters in sums that are no larger than this.
    least = _count(x) * TINY / 8
    sure = channels.wide is None and least < 1 / LARGE
    if dtype is not FLOAT64 and not (sure and within(LARGE, sum_dy, sum_dy_d, np.reciprocal(sum_dy_d))):
        held = np.abs(sum_dy_d) > least
        if np.count_nonzero(sum_dy_d) < len(sum_dy_d):  # as where nothing comes back, which is right
            held |= (sum_dy_d == 0) & (tile_sums(any_product, arrays, factors, True)[0] == 0)
        held &= np.isfinite(sum_dy) & np.isfinite(sum_dy_d)
        wide = np.zeros(len(held), np.bool_) if channels.wide is None else channels.wide
        for chosen, gate_dtype in (wide, np.dtype(np.float64)), (~wide & ~held, dtype):
            numbers = np.flatnonzero(chosen)
            if numbers.size:
                sums = _gradient_sums_in_float64(arrays[:3], channels, activation, numbers, gate_dtype)
                sum_dy[numbers], sum_dy_d[numbers] = sums
    sum_dy_d -= channels.rest * sum_dy
    sum_dy_d *= channels.rstd
    return sum_dy, sum_dy_d


def _gradient_sums_in_float64(
    arrays: Sequence[Array | None], channels: Channels, activation: Activation, numbers: Array, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """sum(dy) and sum(dy * (x - center)) of the channels of these numbers, from dy, x and record.

    The dtype is that in which ReLU decides.
    """
    sum_dy, sum_dy_d = np.zeros((2, len(numbers)))
    factors = channels.factors(numbers, dtype)
    for some, (g, values, passed) in gather(numbers, arrays):
        center, *affine = factors[:, some, None]
        d = np.subtract(values, center, dtype=dtype)
        g = what_passed(g.astype(dtype, copy=False), d, passed, affine, activation)
        g, d = g.astype(np.float64), values.astype(np.float64) - channels.center[numbers[some], None]
        sum_dy[some] += g.sum(axis=1)
        sum_dy_d[some] += np.vecdot(g, d)
    return sum_dy, sum_dy_d


@numpy_settings
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


@numpy_settings
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
        Activation, the record that `bn_normalize` has filled, or None, and the mask of the way forward, or None.
    sums : Sums
        Of the whole batch. None only if nothing needs them: in eval mode without weight and bias.
    inv_count : float
        1 / count in training, 0 in eval mode, whose statistics do not depend on x. Where the statistics know how many
        values a mask has left, it is divided by that number as well.
    gradients : Gradients
        Get all of these.
    """
    channels = remembered(x.dtype, statistics.mean, statistics.var, affine)
    added_up = None if sums is None else (sums.dy.sum(axis=0), sums.dy_xhat.sum(axis=0))
    if statistics.count_left is not None:
        inv_count /= max(float(statistics.count_left[0]), 1.0)
    mask, written = epilogue.mask, gradients
    if mask is not None:
        left = _left(x, mask)
        dresidual = None if written.dresidual is None else np.empty_like(left)
        gradients = written._replace(dx=np.empty_like(left), dresidual=dresidual)
        dy, x, epilogue = _left(dy, mask), left, epilogue._replace(passed=_left(epilogue.passed, mask))
    _input_gradient(dy, x, channels, epilogue, added_up, inv_count, gradients, None)
    if mask is not None:
        _put_back([(written.dx, gradients.dx), (written.dresidual, gradients.dresidual)], mask)


def _input_gradient(
    dy: Array,
    x: Array,
    channels: Channels,
    epilogue: Epilogue,
    sums: tuple[Array, Array] | None,
    inv_count: float,
    gradients: Gradients,
    deviations: Array | None,
) -> None:
    """All gradients from these sums: see `bn_backward_input`. Deviations are x - center, if that is at hand."""
    activation = epilogue.activation
    dx, dresidual, dweight, dbias = gradients
    slopes = None
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        if inv_count != 0:
            slopes = channels.slopes(sum_dy, sum_dy_xhat, inv_count)
        if dweight is not None:
            dweight[...] = sum_dy_xhat
        if dbias is not None:
            dbias[...] = sum_dy
    if x.size == 0:
        return

    def core(
        gate_dtype: np.dtype[Any],
        dy: Array,
        x: Array,
        d: Array | None,
        passed: Array | None,
        dx: Array,
        dresidual: Array | None,
        *columns: Any,
    ) -> None:
        # Columns are center and shift, if they are needed; scale; slope and offset, if there are any.
        scale = columns[2 if with_center else 0]
        out = dx if dx.dtype == scale.dtype else np.empty(x.shape, scale.dtype)
        if d is None and with_center:
            d = np.subtract(x, columns[0], out=out, dtype=out.dtype)
        of_gate, gate = d, [*columns[1:3]]
        if gated and gate_dtype != out.dtype:
            center, *gate = (column.astype(gate_dtype) for column in columns[:3])
            of_gate = np.subtract(x, center, dtype=gate_dtype)
        g = what_passed(dy.astype(out.dtype, copy=False), of_gate, passed, gate, activation)
        if dresidual is not None:
            np.copyto(dresidual, g, casting="unsafe")
        if slopes is not None:
            assert d is not None
            slope, offset = columns[-2:]
            np.multiply(d, slope, out=out)
            np.subtract(g, out, out=out)
            out -= offset
            out *= scale
        else:  # without 0 * x: x may be inf
            np.multiply(g, scale, out=out)
        if out is not dx:
            np.copyto(dx, out, casting="unsafe")

    gated = activation is not None and epilogue.passed is None
    for some, dtype, gate_dtype in channels.precisions(None if slopes is None else slopes[1:]):
        at_hand = deviations if dtype == channels.dtype else None
        with_center = gated or (slopes is not None and at_hand is None)
        if slopes is None:
            vectors = channels.factors(some, dtype)[0 if with_center else 2 :]
        else:
            vectors = slopes[:, some].astype(dtype)
            if with_center:
                vectors = np.concatenate([channels.factors(some, dtype)[:2], vectors])
        arrays = of_channels([dy, x, at_hand, epilogue.passed, dx, dresidual], some)
        temporaries = activation is not None or dx.dtype != dtype
        tile_map(functools.partial(core, gate_dtype), arrays, vectors, temporaries)


@numpy_settings
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
    if epilogue.mask is not None:
        sums = bn_backward_reduce(dy, x, statistics, affine, epilogue)
        bn_backward_input(dy, x, statistics, affine, epilogue, sums, inv_count, gradients)
        return
    channels = remembered(x.dtype, statistics.mean, statistics.var, affine)
    deviations = _usable(scratch, channels.dtype)
    sum_dy, sum_dy_xhat = _gradient_sums(dy, x, channels, epilogue, deviations)
    sum_dy_xhat += 0.0  # as adding up the parts leaves it: 0 without a sign
    _input_gradient(dy, x, channels, epilogue, (sum_dy, sum_dy_xhat), inv_count, gradients, deviations)
