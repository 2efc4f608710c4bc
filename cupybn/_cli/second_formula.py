"""Second order of batch norm by the textbook in plain float64, for `check` to compare its steps with.

What is differentiated is the way back of each channel, as functions of dy, x and weight: with g = dy where activation
passed it, r = 1 / sqrt(var + eps) and n = count,

    dx = weight * r * (g - sum(g) / n - xhat * sum(g * xhat) / n),   dweight = sum(g * xhat),   dbias = sum(g),

and g itself, the gradient of the residual. In eval mode there are no sums in dx, and xhat depends on x alone.
"""

from __future__ import annotations

import numpy as np

from cupybn._cli.formula import column, passed_of, total, xhat_of
from cupybn._steps.bundles import Affine, Doubles, Epilogue, Incoming, SecondGradients, SecondSums, Statistics, Tensor


def bn_double_backward_reduce(
    incoming: Incoming, x: Tensor, statistics: Statistics, affine: Affine, epilogue: Epilogue
) -> SecondSums:
    """The sums of g, cdx and of their products with xhat, and of cdx * g."""
    g, xhat = passed_of(incoming.dy, x, statistics, affine, epilogue), xhat_of(x, statistics, affine)
    cdx = _float64(incoming.cdx)
    return SecondSums(*(total(terms)[None] for terms in (g, g * xhat, cdx, cdx * xhat, cdx * g)))


def bn_double_backward_input(
    incoming: Incoming,
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    epilogue: Epilogue,
    sums: SecondSums | None,
    inv_count: float,
    gradients: SecondGradients,
) -> None:
    """The gradients of sum(cdx * dx) + sum(cdweight * dweight) + sum(cdbias * dbias) + sum(cdresidual * g).

    In training sum(cdx * dx) is weight * r * inner. Of r the gradient with respect to x is -r^2 * xhat / n; of a sum
    over a * xhat, as they stand in inner and in dweight, it is r * (a - sum(a) / n - xhat * sum(a * xhat) / n).
    """
    dy, cdx, cdresidual, cdweight, cdbias = incoming
    g, xhat = passed_of(dy, x, statistics, affine, epilogue), xhat_of(x, statistics, affine)
    rstd = 1 / np.sqrt(statistics.var + affine.eps)
    scale = column(affine.weight * rstd)
    added_up = np.zeros((5, x.shape[1])) if sums is None else [of_parts.sum(axis=0) for of_parts in sums]
    g_sum, g_xhat, u_sum, u_xhat, u_g = map(column, added_up)
    u = np.zeros(x.shape) if cdx is None else _float64(cdx)
    back = scale * (u - inv_count * (u_sum + xhat * u_xhat)) + column(cdweight) * xhat + column(cdbias)
    if cdresidual is not None:
        back += cdresidual
    gradients.ddy[...] = passed_of(back, x, statistics, affine, epilogue)
    inner = u_g - inv_count * (u_sum * g_sum + u_xhat * g_xhat)
    # The a of all these sums together, and its own sums.
    along = column(cdweight) * g - scale * inv_count * (u_xhat * g + g_xhat * u)
    along_sum = column(cdweight) * g_sum - scale * inv_count * (u_xhat * g_sum + g_xhat * u_sum)
    along_xhat = column(cdweight) * g_xhat - 2 * scale * inv_count * u_xhat * g_xhat
    of_rstd = -inv_count * xhat * scale * inner
    gradients.dx[...] = column(rstd) * (along - inv_count * (along_sum + xhat * along_xhat) + of_rstd)
    assert gradients.dweight is not None
    gradients.dweight[...] = rstd * inner[:, 0]


def _float64(array: Tensor) -> Doubles:
    return array.astype(np.float64)
