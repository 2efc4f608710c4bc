"""The steps of batch norm's second order that `check` runs, by the name of kernel, mirror and launcher."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cupybn._cli.cases import EPS, Case, Variant
from cupybn._cli.sides import Result, Results, Side, Step
from cupybn._cli.steps import backward_arguments
from cupybn._steps.bundles import Affine, Epilogue, Incoming, SecondGradients, SecondSums, Statistics, Tensor

Array = npt.NDArray[np.float64]


def bn_double_backward_reduce(case: Case, side: Side) -> Results:
    """The five sums, from the same statistics."""
    found = side.host_all(side.second.bn_double_backward_reduce(*_arguments(case, side)))
    dy, cdx = (np.abs(np.asarray(array, np.float64)) for array in case.incoming[:2])
    xhat = _xhat(case)
    terms = dy, dy * xhat, cdx, cdx * xhat, cdx * dy
    return {
        f"sum of {name.replace('_', ' * ')}": Result(sums.sum(axis=0), 32, sizes.sum((0, 2)))
        for name, sums, sizes in zip(found._fields, found, terms, strict=True)
    }


def bn_double_backward_input(case: Case, side: Side) -> Results:
    """The gradients, from the same statistics and sums; and those of the vectors of cotangents alone."""
    results, (_, *others) = {}, _arguments(case, side)
    dy, dy_xhat, *_ = case.second_sums
    without_cdx = SecondSums(dy, dy_xhat, *np.zeros((3, *dy.shape))) if case.training else None
    for incoming, sums, words in (
        (case.incoming, case.second_sums, ""),
        (case.incoming._replace(cdx=None, cdresidual=None), without_cdx, " of vectors"),
    ):
        ddy, dx = (side.out(case.x, case.offset) for _ in range(2))
        gradients = SecondGradients(ddy, dx, side.out(case.weight))
        given, there = side.put_all(incoming, case.offset), None if sums is None else side.put_all(sums)
        side.second.bn_double_backward_input(given, *others, there, case.inv_count, gradients)
        for name, gradient, size in zip(gradients._fields, gradients, _sizes(case, incoming, sums), strict=True):
            results[name + words] = Result(side.host(gradient), 25, size)
    return results


def _arguments(case: Case, side: Side) -> tuple[Incoming, Tensor, Statistics, Affine, Epilogue]:
    """The arguments that both steps begin with."""
    _, x, statistics, affine, epilogue = backward_arguments(case, side)
    return side.put_all(case.incoming, case.offset), x, statistics, affine, epilogue


def _sizes(case: Case, incoming: Incoming, sums: SecondSums | None) -> tuple[Array, Array, Array]:
    """The sizes of the terms that ddy, dx and dweight are sums of: of the first two the largest in each channel."""
    dy, cdx, cdresidual, cdweight, cdbias = (
        0 if array is None else np.abs(array.astype(np.float64)) for array in incoming
    )
    added_up = np.zeros((5, case.shape[1])) if sums is None else np.abs([part for (part,) in sums])
    g_sum, g_xhat, u_sum, u_xhat, u_g = added_up[..., None]
    xhat, rstd = _xhat(case), 1 / np.sqrt(case.statistics.var + EPS)[:, None]
    scale, n = np.abs(case.weight)[:, None] * rstd, case.inv_count
    along = np.asarray(cdweight)[:, None]
    ddy = scale * (cdx + n * (u_sum + xhat * u_xhat)) + along * xhat + np.asarray(cdbias)[:, None] + cdresidual
    inner = u_g + n * (u_sum * g_sum + u_xhat * g_xhat)
    of_g, of_u = along + scale * n * u_xhat, scale * n * g_xhat
    shared = of_g * g_sum + of_u * u_sum + xhat * (of_g * g_xhat + of_u * u_xhat + scale * inner)
    dx = rstd * (of_g * dy + of_u * cdx + n * shared)
    largest = (array.max((0, 2))[:, None] for array in (ddy, dx))
    return *largest, (rstd * inner)[:, 0]


def _xhat(case: Case) -> Array:
    """Sizes of the normalised input."""
    sizes: Array = np.abs(case.xhat(case.statistics))
    return sizes


_FUSED = ((None, False), ("relu", False), (None, True), ("relu", True))
SECOND_STEPS = {
    "bn_double_backward_reduce": Step(
        bn_double_backward_reduce, tuple(Variant(True, *fused) for fused in _FUSED if fused != (None, True))
    ),
    "bn_double_backward_input": Step(
        bn_double_backward_input, tuple(Variant(training, *fused) for training in (True, False) for fused in _FUSED)
    ),
}
"""The steps to check, by the name of kernel, mirror and launcher."""
