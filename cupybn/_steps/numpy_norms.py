"""The steps of instance, group, layer and RMS norm on NumPy arrays: the specification of the kernels, and the fallback.

Arrays are contiguous, of shape (N, A, C, B): A positions of a sample lie before the channel axis in memory, B behind
it. So channels first is (N, 1, C, B), channels last (N, A, C, 1), and what layer and RMS norm take is (samples, 1,
elements, 1). Row r is group ``r % groups`` of sample ``r // groups``; its K values have one mean and one variance.

Arithmetic is float32 for data of 16 or 32 bits, float64 for float64 and for rows near the limits of float32, which are
called wide; sums end in float64. As in `numpy_ops` the mean is never rounded to one float32, but split into ``center``
and ``rest``. A row has the same bits whichever rows are beside it, and however many.

Where a channel has many positions in a row, it has factors of its own in each row (`Rows.along`), as in batch norm.
Where it has few, as in layer norm, xhat is computed with the factors of the row, and then weighted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays.devices import write_at_once
from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Statistics, Sums
from cupybn._steps.narrow import FLOAT64, LEAST_VARIANCE, extreme, let_through
from cupybn._steps.norm import Norm
from cupybn._steps.numpy_ops import merge_moments
from cupybn._steps.rows import SQUARES, Memory, Piece, Rows, Work, channel_sums, row_sums, walk
from cupybn._steps.tiles import numpy_settings, super_row

Array = npt.NDArray[Any]

_NEGLIGIBLE = 2.0**-25
"""Rest of a mean, in standard deviations, that changes no digit of xhat that counts."""


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@numpy_settings
def norm_forward(
    x: Array, norm: Norm, affine: Affine, epilogue: Epilogue, out: Array, keep: bool = True
) -> Statistics | None:
    """out = activation(weight * xhat + bias + residual), xhat = (x - mean) / sqrt(var + eps) in each row.

    Not centered, xhat = x / sqrt(mean(x^2) + eps).

    Parameters
    ----------
    x, out : (N, A, C, B) arrays; out may be x or the residual
    norm : Norm
    affine : Affine
        Weight and bias of each channel.
    epilogue : Epilogue
        Its record gets where ReLU passes. It has no mask.
    keep : bool
        Whether the statistics are wanted, for a way back or for running statistics.

    Returns
    -------
    Mean and biased variance of each row, if they are wanted; 0 and mean(x^2), where it is not centered.
    """
    normalization = _Normalization.of(x, norm, affine)
    rows, memory = normalization.rows, normalization.memory
    work = Work.of(rows, x.itemsize, False)
    pairs = np.empty((rows.number, 2)) if keep or not rows.whole else None
    if not rows.whole:
        pairs = _moments_of_parts(x, normalization, work)

    # To compute in before all of x and the residual has been read.
    out_is_free = not any(a is not None and np.may_share_memory(out, a) for a in (x, epilogue.residual))

    def core(piece: Piece) -> None:
        numbers, dtype = rows.numbers(piece), normalization.dtype
        values = rows.take(x, piece, dtype, memory, "x")
        y = rows.place(out, piece, dtype, memory, "y") if out_is_free else memory.empty("y", values.shape, dtype)
        if rows.whole:
            mean, var = _moments(values, norm.centered, y)
            if pairs is not None:
                pairs[numbers, 0], pairs[numbers, 1] = mean, var
        else:
            assert pairs is not None
            mean, var = pairs[numbers].T
        _compute_output(values, piece, normalization, normalization.factors(piece, mean, var), epilogue, y)
        rows.put(out, piece, y)

    walk(core, work)
    return Statistics(pairs) if keep and pairs is not None else None


def _moments_of_parts(x: Array, normalization: _Normalization, work: Work) -> Array:
    """Mean and variance of rows that are cut, from those of their pieces, as pairs."""
    rows, memory = normalization.rows, normalization.memory
    parts = len(rows.parts())
    count, moments = np.empty(parts), np.empty((2, parts, rows.number))

    def core(piece: Piece) -> None:
        values = rows.take(x, piece, normalization.dtype, memory, "x")
        of_row = values.size // len(values)
        count[piece.part] = of_row
        mean, var = _moments(values, normalization.centered, memory.empty("y", values.shape, values.dtype))
        moments[0, piece.part, rows.numbers(piece)] = mean
        moments[1, piece.part, rows.numbers(piece)] = var * of_row

    walk(core, work)
    merged = Moments.of_rows(merge_moments(Moments(count, *moments)))
    return np.stack([merged.mean[0], merged.m2[0] / rows.length], 1)


def _moments(values: Array, centered: bool, scratch: Array) -> tuple[Array, Array]:
    """Mean and variance of each row of a piece, in float64; 0 and mean(x^2), where they are not centered.

    The scratch memory, of the shape and dtype of the piece, may be the output's, but not the input's.
    """
    values, scratch = values.reshape(len(values), -1), scratch.reshape(len(values), -1)
    mean, var = _moments_in_its_dtype(values, centered, scratch)
    if values.dtype != FLOAT64:
        held = (var > LEAST_VARIANCE[values.dtype]) & (var < np.inf)
        if not held.all():
            none = np.flatnonzero(var == 0)
            held[none] = (values[none] == (values[none, :1] if centered else 0)).all(axis=1)
            wide = np.flatnonzero(~held)
            if wide.size:
                mean[wide], var[wide] = _moments_in_its_dtype(values[wide].astype(FLOAT64), centered)
    return mean, var


def _moments_in_its_dtype(values: Array, centered: bool, scratch: Array | None = None) -> tuple[Array, Array]:
    """Mean and variance of each row, from sums about a mean that is off by no more than rounding errors.

    Where all values are the same, they differ from it by a few units in the last place, and sums of that are exact.
    """
    length = float(values.shape[1])
    if not centered:
        return np.zeros(len(values)), row_sums(values, values) / length
    center = (row_sums(values) / length).astype(values.dtype)
    d = np.subtract(values, center[:, None], out=scratch)
    off = row_sums(d) / length
    var = np.maximum(row_sums(d, d, SQUARES) / length - off * off, 0)
    return center + off, var  # NaN, where a value is infinite


def _compute_output(
    values: Array, piece: Piece, normalization: _Normalization, factors: _Factors, epilogue: Epilogue, y: Array
) -> None:
    """The output of a piece, to y, and its record."""
    residual, activation, passed, _ = epilogue
    rows, memory, wide = normalization.rows, normalization.memory, factors.wide
    added = None if residual is None else rows.take(residual, piece, y.dtype, memory, "residual")
    in_wide = normalization.preactivation_in_float64(values, piece, factors, added)
    normalization.preactivation(values, piece, factors, added, y)
    if passed is not None:
        positive = rows.place(passed, piece, np.bool_, memory, "passed")
        np.greater(y, 0, out=positive)
        if wide is not None:
            positive[wide] = in_wide > 0
        rows.put(passed, piece, positive)
    if wide is not None:
        y[wide] = in_wide
    if activation == "relu":
        np.maximum(y, np.zeros(y.shape[1:], y.dtype), out=y)  # with a scalar NumPy takes three times as long


def empty_passed(x: Array, norm: Norm, residual: Array, out: Array) -> Array:  # noqa: ARG001
    """A record of where ReLU passes, one bool for each element of x, for a way back that need not know the residual."""
    return np.empty(x.shape, np.bool_)


@numpy_settings
def norm_update_running(statistics: Statistics, running: Running, count: float) -> None:
    """running = (1 - momentum) * running + momentum * mean over the samples, in place.

    The means are those of the rows' means and of their unbiased variances; each channel is a row, as in instance norm.

    Parameters
    ----------
    statistics : Statistics
        Of the rows.
    running : Running
        Mean and variance of each channel, and momentum, which is not None.
    count : float
        Number of values of each row, more than 1.
    """
    assert running.mean is not None
    assert running.var is not None
    assert running.momentum is not None
    old = np.array([running.mean, running.var], np.float64)
    batch = statistics.pairs.reshape(-1, old.shape[1], 2).mean(axis=0).T
    batch[1] *= count / (count - 1)
    mean, var = (1 - running.momentum) * old + running.momentum * batch
    write_at_once([(running.mean, mean.astype(running.mean.dtype)), (running.var, var.astype(running.var.dtype))])


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@numpy_settings
def norm_backward(
    dy: Array,
    x: Array,
    norm: Norm,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    gradients: Gradients,
    keep: bool = True,
) -> Sums | None:
    """dx = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat)), means over the row.

    g is dy where activation passed it, else 0; it is dresidual. Not centered, there is no mean(weight * g).

    Parameters
    ----------
    dy, x : (N, A, C, B) arrays
    norm : Norm
    statistics : Statistics
        Of the rows.
    affine : Affine
    epilogue : Epilogue
        Activation and the record that `norm_forward` has filled, or None.
    gradients : Gradients
        Of x and of the residual. Those of weight and bias follow from the sums: see `norm_parameters`.
    keep : bool
        Whether the sums are wanted.

    Returns
    -------
    sum(g) and sum(g * xhat) of each channel, if they are wanted.
    """
    normalization = _Normalization.of(x, norm, affine)
    rows = normalization.rows
    back = _Backward(normalization, statistics.pairs, dy, x, epilogue, gradients)
    work = Work.of(rows, x.itemsize, keep)
    totals = np.zeros((work.bands if keep else 0, 2, x.shape[2]))
    if rows.whole:

        def core(piece: Piece) -> None:
            opened = back.open(piece)
            sums, wide = back.sums(opened)
            into = totals[piece.band][:, rows.channels(piece)] if keep else None
            if into is not None and rows.along:
                into += sums.reshape(2, piece.n.stop - piece.n.start, -1).sum(axis=1)
            back.finish(opened, back.means(opened, sums), wide, None if rows.along else into)

        walk(core, work)
    else:
        _backward_of_parts(back, work, totals)
    return Sums(totals[:, 0], totals[:, 1]) if keep else None


@numpy_settings
def norm_parameters(sums: Sums, dweight: Array | None, dbias: Array | None) -> None:
    """dweight = sum(g * xhat) and dbias = sum(g) over the whole batch, from sums in parts."""
    if dweight is not None:
        np.copyto(dweight, sums.dy_xhat.sum(axis=0), casting="unsafe")
    if dbias is not None:
        np.copyto(dbias, sums.dy.sum(axis=0), casting="unsafe")


def _backward_of_parts(back: _Backward, work: Work, totals: Array) -> None:
    """The way back where rows are cut: the sums of all pieces first, and then the gradients of all pieces."""
    rows, parts = back.normalization.rows, back.normalization.rows.parts()
    wide = np.zeros((len(parts), rows.number), np.bool_)
    sums_of = np.zeros((len(parts), 2, rows.number, max(d.stop - d.start for d, _, _ in parts) if rows.along else 1))

    def sum_up(piece: Piece) -> None:
        opened = back.open(piece)
        sums, doubtful = back.sums(opened)
        sums_of[piece.part, :, rows.numbers(piece), : sums.shape[2]] = sums
        if doubtful is not None:
            wide[piece.part, rows.numbers(piece)] = doubtful

    walk(sum_up, work)
    of_channels = np.zeros((2, rows.number, rows.D if rows.along else 1))
    for sums, (d, _, _) in zip(sums_of, parts, strict=True):
        channels = d if rows.along else slice(None)
        of_channels[:, :, channels] += sums[:, :, : of_channels[0, 0, channels].size]
    means = back.normalization.weighted_means(of_channels, slice(0, rows.N), slice(0, rows.G), slice(0, rows.D))
    in_float64: Array = np.asarray(wide.any(axis=0))
    with_sums = len(totals) > 0

    def finish(piece: Piece) -> None:
        numbers = rows.numbers(piece)
        doubtful = in_float64[numbers] if in_float64[numbers].any() else None
        into = totals[piece.band][:, rows.channels(piece)] if with_sums and not rows.along else None
        back.finish(back.open(piece), means[:, numbers], doubtful, into)

    walk(finish, work)
    if with_sums and rows.along:
        totals[0] += of_channels.reshape(2, rows.N, -1).sum(axis=1)


class _Opened(NamedTuple):
    """A piece on the way back, in the dtype of the arithmetic."""

    piece: Piece
    factors: _Factors
    values: Array
    g: Array  # dy where activation passed it
    d: Array  # x - center where channels have factors of their own, else xhat; in the memory of dx, if it can be
    weighted: Array  # weight * g, where xhat is at hand; else g


class _Backward(NamedTuple):
    """The way back, piece by piece."""

    normalization: _Normalization
    pairs: Array
    dy: Array
    x: Array
    epilogue: Epilogue
    gradients: Gradients

    def open(self, piece: Piece) -> _Opened:
        """What is needed of a piece for sums and gradients."""
        normalization = self.normalization
        rows, dtype, memory = normalization.rows, normalization.dtype, normalization.memory
        factors = normalization.factors(piece, *self.pairs[rows.numbers(piece)].T)
        values, g = rows.take(self.x, piece, dtype, memory, "x"), rows.take(self.dy, piece, dtype, memory, "dy")
        d = rows.place(self.gradients.dx, piece, dtype, memory, "dx")
        if self.epilogue.activation == "relu":
            g = let_through(g, self._passed(piece, factors, values, d), memory.empty("g", g.shape, dtype))
        if rows.along:
            normalization.deviations(values, factors, d)
            return _Opened(piece, factors, values, g, d, g)
        normalization.xhat(values, factors, d)
        return _Opened(piece, factors, values, g, d, normalization.weighted(g, piece))

    def _passed(self, piece: Piece, factors: _Factors, values: Array, scratch: Array) -> Array:
        """A record of where ReLU let a piece pass: the one that there is, or as it is decided on the way forward."""
        normalization = self.normalization
        if self.epilogue.passed is not None:
            return normalization.rows.take(self.epilogue.passed, piece, np.bool_, normalization.memory, "passed")
        in_wide = normalization.preactivation_in_float64(values, piece, factors, None)
        passed: Array = normalization.preactivation(values, piece, factors, None, scratch) > 0
        if factors.wide is not None:
            passed[factors.wide] = in_wide > 0
        return passed

    def sums(self, opened: _Opened) -> tuple[Array, Array | None]:
        """Sums of g and of g * xhat of each channel of each row; or those of weight * g of each row, with xhat at hand.

        (2, rows, channels or 1). And which rows need float64, or None.
        """
        normalization, factors = self.normalization, opened.factors
        n, channels = len(opened.g), opened.g.shape[1] if normalization.rows.along else 1
        g, d = opened.weighted.reshape(n * channels, -1), opened.d.reshape(n * channels, -1)
        sums = np.stack([row_sums(g), row_sums(g, d)]).reshape(2, n, channels)
        wide = factors.wide
        if normalization.dtype != FLOAT64:
            held = np.isfinite(sums).all(axis=0)
            small = np.abs(sums[1]) <= g.shape[1] * LEAST_VARIANCE[np.dtype(np.float32)]
            if small.any():
                held[small] = ~self._any_product(opened, small)
            if not held.all():
                doubtful = ~held.all(axis=1)
                wide = doubtful if wide is None else wide | doubtful
        if normalization.rows.along:
            sums[1] -= factors.rest[:, None] * sums[0]
            sums[1] *= factors.rstd[:, None]
        if wide is not None:
            of_channels = self._sums_in_float64(opened, wide)
            if normalization.rows.along:
                sums[:, wide] = of_channels
            else:
                weight = normalization.weight_of(opened.piece, wide)
                sums[:, wide] = (of_channels * weight).sum(axis=2, keepdims=True)
        return sums, wide

    def _any_product(self, opened: _Opened, small: Array) -> Array:
        """Whether any weight * g * xhat is not 0, for channels of rows whose sums are small."""
        normalization = self.normalization
        if normalization.rows.along:
            return np.asarray(((opened.g[small] != 0) & (opened.d[small] != 0)).any(axis=1))
        some = small[:, 0]
        there = (opened.g[some] != 0) & (opened.d[some] != 0)
        there &= normalization.weight_of(opened.piece, some)[:, :, None] != 0
        return np.asarray(there.any(axis=(1, 2)))

    def _sums_in_float64(self, opened: _Opened, wide: Array) -> Array:
        """Sums of g and of g * xhat of each channel of wide rows, (2, wide rows, channels)."""
        g = opened.g[wide].astype(FLOAT64)
        return np.stack([g.sum(axis=2), np.vecdot(g, self.normalization.xhat_in_float64(opened, wide))])

    def means(self, opened: _Opened, sums: Array) -> Array:
        """Means of weight * g and of weight * g * xhat over rows that are whole, (2, rows)."""
        piece = opened.piece
        return self.normalization.weighted_means(sums, piece.n, piece.g, piece.d)

    def finish(self, opened: _Opened, means: Array, wide: Array | None, into: Array | None) -> None:
        """Write the gradients of a piece; add sum(g) and sum(g * xhat) of its channels, with xhat at hand."""
        piece, factors, _, g, d, weighted = opened
        normalization, (dx, dresidual, _, _) = self.normalization, self.gradients
        rows, dtype = normalization.rows, normalization.dtype
        if dresidual is not None:
            rows.put(dresidual, piece, g)
        if into is not None:
            self._add_channel_sums(opened, wide, into)
        rstd = factors.rstd
        if rows.along:
            assert factors.scale is not None
            slope = rstd * rstd * means[1]
            offset = rstd * means[0] - slope * factors.rest if normalization.centered else np.zeros(len(rstd))
            if dtype != FLOAT64:
                beyond = extreme(slope) | extreme(offset)
                if beyond.any():
                    wide = beyond if wide is None else wide | beyond
            in_wide = None if wide is None else self._dx_in_float64(opened, wide, means)
            d *= _columns(slope, dtype)
            scaled = np.multiply(g, factors.scale, out=normalization.memory.empty("scaled", g.shape, dtype))
            np.subtract(scaled, d, out=d)
            if normalization.centered:
                d -= _columns(offset, dtype)
        else:
            in_wide = None if wide is None else self._dx_in_float64(opened, wide, means)
            d *= _columns(means[1], dtype)
            np.subtract(weighted, d, out=d)
            if normalization.centered:
                d -= _columns(means[0], dtype)
            d *= _columns(rstd, dtype)
        if wide is not None:
            d[wide] = in_wide
        rows.put(dx, piece, d)

    def _add_channel_sums(self, opened: _Opened, wide: Array | None, into: Array) -> None:
        """Add sum(g) and sum(g * xhat) of the channels of a piece, with xhat at hand."""
        piece, _, _, g, xhat, _ = opened
        samples = piece.n.stop - piece.n.start
        if wide is not None:
            g, xhat = g.copy(), xhat.copy()
            g[wide], xhat[wide] = 0, 0
            of_rows = np.zeros((2, len(g), g.shape[1]))
            of_rows[:, wide] = self._sums_in_float64(opened, wide)
            into += of_rows.reshape(2, samples, -1).sum(axis=1)
        for total, second in zip(into, (None, xhat), strict=True):
            sums = channel_sums(g, second, samples)
            if not np.isfinite(sums).all():
                sums = channel_sums(g.astype(FLOAT64), None if second is None else second.astype(FLOAT64), samples)
            total += sums

    def _dx_in_float64(self, opened: _Opened, wide: Array, means: Array) -> Array:
        """dx of wide rows, in float64."""
        normalization = self.normalization
        dx = opened.g[wide] * normalization.weight_of(opened.piece, wide)[:, :, None]
        dx -= normalization.xhat_in_float64(opened, wide) * _columns(means[1][wide], FLOAT64)
        if normalization.centered:
            dx -= _columns(means[0][wide], FLOAT64)
        dx *= _columns(opened.factors.rstd[wide], FLOAT64)
        return dx


# ---------------------------------------------------------------------------------------------------------------------
# Rows and channels


class _Factors(NamedTuple):
    """What takes the rows of a piece to their output, in float64 where no dtype is named."""

    mean: Array  # (rows,)
    rstd: Array  # (rows,); 1 / sqrt(var + eps)
    center: Array  # (rows, 1, 1), in the dtype of the arithmetic; the mean rounded to it
    rest: Array  # (rows,); mean - center
    scale: Array | None  # (rows, channels, 1), in the dtype of the arithmetic; weight * rstd, if channels have own ones
    shift: Array | None  # (rows, channels, 1), in the dtype of the arithmetic; bias - rest * scale
    wide: Array | None  # (rows,); whether a row needs float64. None if none does


class _Normalization(NamedTuple):
    """How the rows of an array are normalised."""

    rows: Rows
    centered: bool
    affine: Affine
    dtype: np.dtype[Any]  # dtype of the arithmetic of rows that are not wide
    joined: dict[tuple[int, int], Array]  # rows that `_by_channel` has made for whole samples
    memory: Memory

    @classmethod
    def of(cls, x: Array, norm: Norm, affine: Affine) -> _Normalization:
        """The normalization of the rows of this array."""
        rows, dtype = Rows.of(x, norm), accumulation_dtype(x.dtype)
        return cls(rows, norm.centered, affine, dtype, {}, Memory())

    def factors(self, piece: Piece, mean: Array, var: Array) -> _Factors:
        """The factors of the rows of a piece."""
        rstd = 1 / np.sqrt(var + self.affine.eps)
        center = mean.astype(self.dtype)
        rest = np.where(np.isfinite(center), mean - center, 0)  # inf - inf is NaN
        scale = shift = None
        wide = extreme(rstd)
        if self.rows.along:
            weight, bias = self._vector(self.affine.weight, piece), self._vector(self.affine.bias, piece)
            n, groups = len(mean), piece.g.stop - piece.g.start
            scale = rstd.reshape(-1, groups, 1) * (1 if weight is None else weight.reshape(groups, -1))
            shift = (0.0 if bias is None else bias.reshape(groups, -1)) - scale * rest.reshape(-1, groups, 1)
            scale, shift = scale.reshape(n, -1), shift.reshape(n, -1)
            wide |= extreme(scale).any(axis=1)
            scale, shift = _columns(scale, self.dtype), _columns(shift, self.dtype)
        else:
            rest[np.abs(rest) <= _NEGLIGIBLE * np.sqrt(var)] = 0
        needed = self.dtype != FLOAT64 and wide.any()
        return _Factors(mean, rstd, _columns(center, self.dtype), rest, scale, shift, wide if needed else None)

    def preactivation(self, values: Array, piece: Piece, factors: _Factors, residual: Array | None, y: Array) -> Array:
        """weight * xhat + bias + residual, the value whose sign decides what ReLU passes, written to y."""
        if self.rows.along:
            self.deviations(values, factors, y)
            y *= factors.scale
            y += factors.shift
        else:
            self.xhat(values, factors, y)
            self._by_channel(np.multiply, y, self.affine.weight, piece)
            self._by_channel(np.add, y, self.affine.bias, piece)
        if residual is not None:
            y += residual
        return y

    def preactivation_in_float64(self, values: Array, piece: Piece, factors: _Factors, residual: Array | None) -> Array:
        """The value of `preactivation` for wide rows, in float64; an empty array, if no row is wide."""
        wide = factors.wide
        if wide is None:
            return np.empty(0)
        y = (values[wide] - _columns(factors.mean[wide], FLOAT64)) * _columns(factors.rstd[wide], FLOAT64)
        y *= self.weight_of(piece, wide)[:, :, None]
        bias = self._vector(self.affine.bias, piece)
        if bias is not None:
            y += self._of_rows(bias, piece, wide)[:, :, None]
        if residual is not None:
            y += residual[wide]
        return np.asarray(y)

    def deviations(self, values: Array, factors: _Factors, d: Array) -> None:
        """x - center, written to d."""
        if self.centered:
            np.subtract(values, factors.center, out=d)
        else:
            np.copyto(d, values)

    def xhat(self, values: Array, factors: _Factors, xhat: Array) -> None:
        """(x - mean) * rstd, written to xhat."""
        rstd = _columns(factors.rstd, self.dtype)
        if not self.centered:
            np.multiply(values, rstd, out=xhat)
            return
        np.subtract(values, factors.center, out=xhat)
        if np.count_nonzero(factors.rest):  # where it is 0 nothing changes, not even a sign
            xhat -= _columns(factors.rest, self.dtype)
        xhat *= rstd

    def xhat_in_float64(self, opened: _Opened, wide: Array) -> Array:
        """(x - mean) * rstd of wide rows, in float64."""
        mean, rstd = opened.factors.mean[wide], opened.factors.rstd[wide]
        return np.asarray((opened.values[wide] - _columns(mean, FLOAT64)) * _columns(rstd, FLOAT64))

    def weighted(self, g: Array, piece: Piece) -> Array:
        """weight * g; g itself without a weight."""
        if self.affine.weight is None:
            return g
        weighted = self.memory.empty("weighted", g.shape, g.dtype)
        self._by_channel(np.multiply, g, self.affine.weight, piece, weighted)
        return weighted

    def weighted_means(self, sums: Array, n: slice, g: slice, d: slice) -> Array:
        """Means over rows, (2, rows), from sums of channels, which are still to be weighted, or of the rows."""
        if self.rows.along and self.affine.weight is not None:
            weight = self.affine.weight[g.start * self.rows.D : g.stop * self.rows.D].astype(FLOAT64)
            shape = 2, n.stop - n.start, g.stop - g.start, d.stop - d.start
            sums = sums.reshape(shape) * weight.reshape(shape[2:])
        means: Array = sums.reshape(2, (n.stop - n.start) * (g.stop - g.start), -1).sum(axis=2)
        means /= self.rows.length
        return means

    def weight_of(self, piece: Piece, some: Array) -> Array:
        """Weight of each channel of some rows of a piece, (some rows, channels), in float64."""
        weight = self._vector(self.affine.weight, piece)
        if weight is None:
            weight = np.ones((piece.g.stop - piece.g.start) * (piece.d.stop - piece.d.start))
        return self._of_rows(weight, piece, some)

    def _of_rows(self, vector: Array, piece: Piece, some: Array) -> Array:
        """The values that a vector of the channels of a piece has for some of its rows."""
        groups = piece.g.stop - piece.g.start
        values: Array = vector.reshape(groups, -1)[np.flatnonzero(some) % groups]
        return values

    def _vector(self, vector: Array | None, piece: Piece) -> Array | None:
        """Values for the channels of a piece, in float64; None for None."""
        return None if vector is None else vector[self.rows.channels(piece)].astype(FLOAT64)

    def _by_channel(
        self, operation: np.ufunc, values: Array, vector: Array | None, piece: Piece, out: Array | None = None
    ) -> None:
        """Multiply or add what a vector has for each channel, in place or into another array of this shape."""
        if vector is None:
            return
        out = values if out is None else out
        samples, positions = piece.n.stop - piece.n.start, values.shape[2]
        repeat = math.gcd(samples, super_row(values.size // samples))  # NumPy needs long rows to loop over
        row = self.joined.get((id(vector), repeat)) if samples > 1 else None
        if row is None:
            of_channels = vector[self.rows.channels(piece)]
            row = np.empty((repeat, len(of_channels), positions), self.dtype)
            row[...] = of_channels[:, None]
            row = row.ravel()
            if samples > 1:
                self.joined[id(vector), repeat] = row
        operation(values.reshape(-1, len(row)), row, out=out.reshape(-1, len(row)))


def _columns(values: Array, dtype: npt.DTypeLike) -> Array:
    """Values for each row, or for each channel of each row, as an array that broadcasts with a piece."""
    return values.reshape(len(values), -1, 1).astype(dtype)
