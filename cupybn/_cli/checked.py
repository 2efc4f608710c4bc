"""The functions that `check` knows: their steps, the shapes that these run on, and the modules that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cupybn._cli import dropout_formula, formula, norm_formula, second_formula
from cupybn._cli.cases import Case
from cupybn._cli.dropout_steps import DROPOUT_STEPS, DropoutCase
from cupybn._cli.norm_cases import NormCase
from cupybn._cli.norm_steps import norm_steps
from cupybn._cli.problem import FAMILY, FUSED, OPS
from cupybn._cli.second_steps import SECOND_STEPS
from cupybn._cli.sides import Side, Step
from cupybn._cli.steps import STEPS
from cupybn._steps import (
    cupy_double_backward,
    cupy_dropout,
    cupy_norms,
    cupy_ops,
    numpy_double_backward,
    numpy_dropout,
    numpy_norms,
    numpy_ops,
)

Shapes = dict[str, list[tuple[int, ...]]]
"""Shapes by layout. The first of each is checked in unaligned memory as well."""


class Checked(NamedTuple):
    """A function of the library, as `check` sees it."""

    steps: dict[str, Step]
    case: Callable[..., Any]
    """Class of the random arguments: of a shape, a dtype, an offset in memory and a variant."""
    axes: str
    """The axes of the shapes, in words."""
    quick: Shapes
    """Shapes that ``--quick`` checks."""
    more: Shapes
    """Shapes that are checked beside them without ``--quick``."""
    sides: tuple[Side, Side, Side]
    """Kernels, mirrors and the formula."""

    def shapes(self, quick: bool) -> Shapes:
        """The shapes to check."""
        return self.quick if quick else {layout: shapes + self.more[layout] for layout, shapes in self.quick.items()}


def _sides(kernels: Any, mirrors: Any, formula: Any) -> tuple[Side, Side, Side]:
    return Side(kernels, "kernels"), Side(mirrors, "mirrors"), Side(formula, "formula")


def _norm(op: str) -> Checked:
    """One of the norms within a sample. What is normalized over the last axis has one position."""
    quick: Shapes = {"channels_first": [(5, 1, 40, 1), (3, 1, 1027, 1)], "channels_last": []}
    more: Shapes = {"channels_first": [(70, 1, 9, 1), (2, 1, 8200, 1), (1, 1, 40000, 1)], "channels_last": []}
    if op in FUSED:
        quick = {
            "channels_first": [(3, 1, 6, 49), (2, 1, 4, 64)],
            "channels_last": [(3, 37, 6, 1), (2, 45, 64, 1)],
        }
        more = {
            "channels_first": [(70, 1, 2, 40), (2, 1, 130, 3), (2, 1, 4, 4099), (1, 1, 2, 30000)],
            "channels_last": [(2, 1029, 3, 1), (2, 45, 320, 1), (2, 9001, 6, 1)],
        }
    return Checked(norm_steps(op), NormCase, "(N, A, C, B)", quick, more, _sides(cupy_norms, numpy_norms, norm_formula))


CHECKED = {
    "batch_norm": Checked(
        STEPS | SECOND_STEPS,
        Case,
        "(N, C, L)",
        {"channels_first": [(6, 5, 49), (4, 3, 64)], "channels_last": [(37, 3, 1), (45, 64, 1)]},
        {
            "channels_first": [(300, 2, 40), (2, 130, 3), (2, 2, 4099), (1, 1, 2)],
            "channels_last": [(1029, 3, 1), (45, 301, 1), (9001, 6, 1), (2, 1, 1)],
        },
        (
            Side(cupy_ops, "kernels", cupy_double_backward),
            Side(numpy_ops, "mirrors", numpy_double_backward),
            Side(formula, "formula", second_formula),
        ),
    ),
    **{op: _norm(op) for op in FAMILY if op != "dropout"},
    "dropout": Checked(
        DROPOUT_STEPS,
        DropoutCase,
        "(O, A, M, B, I)",
        {"channels_first": [(1, 3, 1, 7, 33), (1, 4, 1, 64, 1)]},
        {"channels_first": [(1, 5, 9, 6, 1), (2, 3, 4, 5, 6), (1, 2, 1, 3, 4096)]},
        _sides(cupy_dropout, numpy_dropout, dropout_formula),
    ),
}
"""What is checked of each function."""
assert tuple(CHECKED) == OPS
