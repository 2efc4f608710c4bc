"""The steps of batch norm's gradients of second order on NumPy arrays: the specification of their CUDA kernels.

What the way back has computed may be differentiated once more. A loss of its gradients, given by a cotangent of each
(`Incoming`), has a gradient with respect to what the way back has taken: dy, x and weight. For one channel, with
u = cdx, g = dy where activation has passed it, r = 1 / sqrt(var + eps), w = weight and ic = 1 / count, or 0 in eval
mode, whose statistics do not depend on x, the way back was

    dx = w * r * (g - sum(g) * ic - xhat * sum(g * xhat) * ic),   dweight = sum(g * xhat),   dbias = sum(g),

and dresidual = g. With A = sum(g), B = sum(g * xhat), U = sum(u), V = sum(u * xhat), W = sum(u * g) and

    Q = W - (A * U + B * V) * ic,   m_u = -w * r * B * ic,   m_g = cdweight - w * r * V * ic

the gradients of second order are

    ddy = w * r * (u - U * ic) + m_g * xhat + cdbias + cdresidual    where activation has passed dy, else 0,
    dx = r * (m_u * (u - U * ic) + m_g * (g - A * ic) - xhat * (m_u * V + m_g * B + w * r * Q) * ic),
    dweight = r * Q.

On bias and residual depends what activation passes, and nothing else. Precision is looked after as in `numpy_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._steps.bundles import Activation, Affine, Epilogue, Incoming, SecondGradients, SecondSums, Statistics
from cupybn._steps.channels import Channels, of_channels, passing, remembered, what_passed
from cupybn._steps.narrow import FLOAT64, LARGE, TINY, let_through, within
from cupybn._steps.tiles import Terms, gather, numpy_settings, tile_map, tile_sums

Array = npt.NDArray[Any]


@numpy_settings
def bn_double_backward_reduce(
    incoming: Incoming, x: Array, statistics: Statistics, affine: Affine, epilogue: Epilogue
) -> SecondSums:
    """Sums of dy where activation passed it, of cdx, and of the products of these two and xhat, in one part.

    Parameters
    ----------
    incoming : Incoming
        Where it has no cdx, the sums of that are 0.
    x : (N, C, L) array, not empty
    statistics : Statistics
        Those of the way forward.
    affine : Affine
        Decides what ReLU passed, where there is no record.
    epilogue : Epilogue
        Activation, and the record that the way forward has filled, or None.
    """
    channels = remembered(x.dtype, statistics.mean, statistics.var, affine)
    sums = np.zeros((5, x.shape[1]))
    about_center = _sums(incoming, x, channels, epilogue)
    sums[: len(about_center)] = about_center
    for plain, product in (0, 1), (2, 3):
        sums[product] -= channels.rest * sums[plain]
        sums[product] *= channels.rstd
    return SecondSums(*sums[:, None])


def _sums(incoming: Incoming, x: Array, channels: Channels, epilogue: Epilogue) -> Array:
    """The five sums with x - center in place of xhat, or the first two where there is no cdx: see the step."""
    dtype, activation = channels.dtype, epilogue.activation
    gated = activation is not None and epilogue.passed is None
    factors = channels.factors(slice(None), dtype)[: 3 if gated else 1]

    def products(dy: Array, x: Array, cdx: Array | None, passed: Array | None, center: Array, *affine: Array) -> Terms:
        d = np.subtract(x, center, dtype=dtype)
        g = what_passed(dy.astype(dtype, copy=False), d, passed, affine, activation)
        if cdx is None:
            return [(g,), (g, d)]
        u = cdx.astype(dtype, copy=False)
        return [(g,), (g, d), (u,), (u, d), (u, g)]

    def any_product(*tile: Any) -> Terms:
        return [((first != 0) & (second != 0),) for first, second in (term for term in products(*tile) if term[1:])]

    arrays = [incoming.dy, x, incoming.cdx, epilogue.passed]
    sums = np.array(tile_sums(products, arrays, factors, True))
    of_products = sums[[1] if incoming.cdx is None else [1, 3, 4]]
    # Products too small for float32 are lost in part: that matters in sums that are no larger than this.
    least = x.shape[0] * x.shape[2] * TINY / 8
    sure = channels.wide is None and least < 1 / LARGE
    if dtype is not FLOAT64 and not (sure and within(LARGE, sums, np.reciprocal(of_products))):
        held = np.abs(of_products) > least
        if np.count_nonzero(of_products) < of_products.size:  # as where nothing comes back, which is right
            held |= (of_products == 0) & (np.array(tile_sums(any_product, arrays, factors, True)) == 0)
        all_held = held.all(axis=0) & np.isfinite(sums).all(axis=0)
        wide = np.zeros(len(all_held), np.bool_) if channels.wide is None else channels.wide
        for chosen, gate_dtype in (wide, FLOAT64), (~wide & ~all_held, dtype):
            numbers = np.flatnonzero(chosen)
            if numbers.size:
                sums[:, numbers] = _sums_in_float64(arrays, channels, activation, numbers, gate_dtype)
    return sums


def _sums_in_float64(
    arrays: Sequence[Array | None], channels: Channels, activation: Activation, numbers: Array, dtype: npt.DTypeLike
) -> Array:
    """The sums that `_sums` takes of the channels of these numbers, from dy, x, cdx and record.

    The dtype is that in which ReLU decides.
    """
    sums = np.zeros((2 if arrays[2] is None else 5, len(numbers)))
    factors = channels.factors(numbers, dtype)
    for some, (g, values, u, passed) in gather(numbers, arrays):
        center, *affine = factors[:, some, None]
        d = np.subtract(values, center, dtype=dtype)
        g = what_passed(g.astype(dtype, copy=False), d, passed, affine, activation)
        g, d = g.astype(np.float64), values.astype(np.float64) - channels.center[numbers[some], None]
        sums[0, some] += g.sum(axis=1)
        sums[1, some] += np.vecdot(g, d)
        if u is not None:
            u = u.astype(np.float64)
            sums[2, some] += u.sum(axis=1)
            sums[3, some] += np.vecdot(u, d)
            sums[4, some] += np.vecdot(u, g)
    return sums


@numpy_settings
def bn_double_backward_input(
    incoming: Incoming,
    x: Array,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    sums: SecondSums | None,
    inv_count: float,
    gradients: SecondGradients,
) -> None:
    """The gradients of second order: the formulas are at the top.

    Parameters
    ----------
    incoming : Incoming
    x : (N, C, L) array, not empty
    statistics, affine, epilogue
        As `bn_double_backward_reduce` takes them.
    sums : SecondSums or None
        None stands for zeros. In eval mode nothing needs them but the gradient of weight, where there is a cdx.
    inv_count : float
        1 / count in training, 0 in eval mode.
    gradients : SecondGradients
        Get all of these; they share no memory with the arguments.
    """
    channels = remembered(x.dtype, statistics.mean, statistics.var, affine)
    recorded, relu, training = epilogue.passed, epilogue.activation == "relu", inv_count != 0
    of_x = incoming.cdweight is not None or (training and incoming.cdx is not None)  # else x may be inf: no 0 * x
    added_up = np.zeros((5, x.shape[1])) if sums is None else np.array([of_parts.sum(axis=0) for of_parts in sums])
    factors, dweight = _factors(incoming, channels, added_up, inv_count, of_x)
    if gradients.dweight is not None:
        gradients.dweight[...] = dweight
    with_d = of_x or (relu and recorded is None)

    def core(
        dy: Array,
        x: Array,
        cdx: Array | None,
        cdresidual: Array | None,
        passed: Array | None,
        ddy: Array,
        dx: Array,
        *columns: Array,
    ) -> None:
        k_u, k_x, k_0, m_u, m_x, m_0 = columns[3:]
        to_dy, to_x = (out if out.dtype == dtype else np.empty(x.shape, dtype) for out in (ddy, dx))
        d = np.subtract(x, columns[0], out=to_x, dtype=dtype) if with_d else None
        passes = None
        if relu:
            center, *gate = (column.astype(gate_dtype, copy=False) for column in columns[:3])
            of_gate = d if gate_dtype == dtype or passed is not None else np.subtract(x, center, dtype=gate_dtype)
            passes = passing(of_gate, passed, gate)
        if of_x:
            assert d is not None
            np.multiply(d, k_x, out=to_dy)
            to_dy += k_0
            g = dy.astype(dtype, copy=False)
            if passes is not None:
                g = let_through(g, passes)
            if training:
                to_x *= m_x  # which is d until here
                to_x += m_0
                to_x += g * k_x
            else:
                np.multiply(g, k_x, out=to_x)
        else:
            to_dy[...] = k_0
            to_x[...] = 0
        if cdx is not None:
            u = cdx.astype(dtype, copy=False)
            to_dy += u * k_u
            if training:
                to_x += u * m_u
        if cdresidual is not None:
            np.add(to_dy, cdresidual, out=to_dy, dtype=dtype)
        if passes is not None:
            let_through(to_dy, passes, out=to_dy)
        for out, computed in (ddy, to_dy), (dx, to_x):
            if computed is not out:
                np.copyto(out, computed, casting="unsafe")

    arrays = [incoming.dy, x, incoming.cdx, incoming.cdresidual, recorded, gradients.ddy, gradients.dx]
    for some, dtype, gate_dtype in channels.precisions(factors):
        of_gate = channels.factors(some, gate_dtype).astype(dtype, copy=False)
        vectors = np.concatenate([of_gate, factors[:, some].astype(dtype, copy=False)])
        tile_map(core, of_channels(arrays, some), vectors, temporaries=True)


def _factors(incoming: Incoming, channels: Channels, sums: Array, inv_count: float, of_x: bool) -> tuple[Array, Array]:
    """Factors of each channel, (6, C), with which both gradients are sums of products, and the gradient of weight.

    Rows are k_u, k_x, k_0, m_u, m_x and m_0 in

        ddy = k_u * u + k_x * (x - center) + k_0 + cdresidual,   dx = m_u * u + k_x * g + m_x * (x - center) + m_0,

    where xhat = (x - center - rest) * r. This k_x is r * m_g of the formulas at the top, both times. `of_x` is whether
    anything depends on x: where nothing does, its statistics may be NaN.
    """
    rstd, rest = channels.rstd, channels.rest
    factors = np.zeros((6, len(rest)))
    k_u, k_x, k_0, m_u, m_x, m_0 = factors
    A, B, U, V, W = sums
    Q = dweight = np.zeros(len(rest))
    if incoming.cdweight is not None:
        k_x[...] = incoming.cdweight
    if incoming.cdbias is not None:
        k_0[...] = incoming.cdbias
    if incoming.cdx is not None:  # else nothing depends on weight, which may be NaN, and no weight's gradient on dy
        k_u[...] = channels.scale
        Q = W if inv_count == 0 else W - (A * U + B * V) * inv_count
        dweight = Q * rstd
    if of_x:
        if inv_count != 0:
            m_u[...] = -k_u * B * inv_count
            k_x -= k_u * V * inv_count
            k_0 -= k_u * U * inv_count
            m_x[...] = -(m_u * V + k_x * B + k_u * Q) * inv_count * rstd**2
            m_0[...] = -(m_u * U + k_x * A) * inv_count * rstd - m_x * rest
            m_u *= rstd
        k_x *= rstd
        k_0 -= k_x * rest
    return factors, dweight
