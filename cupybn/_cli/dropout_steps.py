"""The steps of dropout that `check` runs."""

from __future__ import annotations

import numpy as np

from cupybn._cli.cases import Case
from cupybn._cli.sides import Result, Results, Side
from cupybn._steps.bundles import Drops

STATE = np.array([2**63 + 5, 2**32 - 1], np.uint64)
"""A seed, and a number of calls that has 32 bits, and one more after the call."""
P = 0.3


def dropout_draw(case: Case, side: Side) -> Results:  # noqa: ARG001
    """What is drawn, and the state after it."""
    state = side.put(STATE)
    drawn = side.host(side.dropout.dropout_draw(state))
    return {"drawn": Result(drawn, 0, 0), "state": Result(side.host(state), 0, 0)}


def dropout(case: Case, side: Side) -> Results:
    """The output, each element by itself."""
    x, out = side.put(case.x.reshape(-1), case.offset), side.out(case.x.reshape(-1), case.offset)
    side.dropout.dropout(x, _drops(side), out)
    return {"y": _result(side.host(out))}


def dropout_channels(case: Case, side: Side) -> Results:
    """The output, whole channels, in some orders of memory: those of (N, C, L), (N, L, C) and (L, C, N) arrays."""
    N, C, L = case.shape
    results = {}
    for name, shape, swapped in (
        ("channels first", (1, N, 1, C, L), False),
        ("channels last", (1, N, L, C, 1), False),
        ("samples last", (L, C, 1, N, 1), True),
    ):
        x, out = side.put(case.x.reshape(shape), case.offset), side.out(case.x.reshape(shape), case.offset)
        side.dropout.dropout_channels(x, _drops(side), swapped, out)
        results[f"y, {name}"] = _result(side.host(out))
    return results


def _drops(side: Side) -> Drops:
    """What a call has drawn."""
    return side.put_all(Drops(STATE, round(P * 2**32), 1 / (1 - P)))


def _result(y: np.ndarray) -> Result:
    """The output, in which two factors are rounded: kernels have the bits of their mirrors."""
    return Result(y, 2, np.abs(y.astype(np.float64)), exact=True)
