"""The steps of second order on CuPy arrays: the functions of `numpy_double_backward`, each a launch of its kernel.

Here is no arithmetic, as in `cupy_ops`, whose arrays these are as well.
"""

from __future__ import annotations

from typing import Any

from cupybn._steps import plans
from cupybn._steps.bundles import Affine, Epilogue, Incoming, SecondGradients, SecondSums, Statistics
from cupybn._steps.launched import aligned_for, empty

Array = Any  # cupy.ndarray


def bn_double_backward_reduce(
    incoming: Incoming, x: Array, statistics: Statistics, affine: Affine, epilogue: Epilogue
) -> SecondSums:
    """See `numpy_double_backward.bn_double_backward_reduce`; the sums are in parts."""
    incoming = _beside(epilogue.passed, x, incoming)
    plan = plans.choose("bn_double_backward_reduce", x, incoming.dy, incoming.cdx, passed=epilogue.passed)
    sums = SecondSums(*empty((len(SecondSums._fields), plan.geometry.parts, x.shape[1])))
    plan.launch(incoming=incoming, x=x, statistics=statistics, affine=affine, epilogue=epilogue, sums=sums)
    return sums


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
    """See `numpy_double_backward.bn_double_backward_input`."""
    incoming = _beside(epilogue.passed, x, incoming)
    dy, cdx, cdresidual, _, _ = incoming
    plan = plans.choose(
        "bn_double_backward_input",
        x,
        *(dy, cdx, cdresidual, gradients.ddy, gradients.dx),
        passed=epilogue.passed,
    )
    plan.launch(
        incoming=incoming,
        x=x,
        statistics=statistics,
        affine=affine,
        epilogue=epilogue,
        sums=sums,
        inv_count=inv_count,
        gradients=gradients,
        parts=0 if sums is None else sums.dy.shape[0],
    )


def _beside(passed: Array | None, x: Array, incoming: Incoming) -> Incoming:
    """What comes in, with aligned copies of the arrays where the packs of the record want them."""
    if passed is None:
        return incoming
    dy, cdx, cdresidual, _, _ = incoming
    return incoming._replace(
        dy=aligned_for(passed, x, dy),
        cdx=None if cdx is None else aligned_for(passed, x, cdx),
        cdresidual=None if cdresidual is None else aligned_for(passed, x, cdresidual),
    )
