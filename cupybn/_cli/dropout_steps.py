"""The steps of dropout that `check` runs, by the name of kernel, mirror and launcher, and their random arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._cli.cases import HALF_ULP
from cupybn._cli.sides import Result, Results, Side, Step
from cupybn._steps.bundles import Drops


class DropoutVariant(NamedTuple):
    """Settings that change from call to call on arrays of one shape."""

    p: float = 0.1
    swapped: bool = False

    def words(self) -> list[str]:
        """The settings in words."""
        return [f"p = {self.p:g}", *(["channels before samples"] if self.swapped else [])]


class DropoutCase:
    """Random arguments of all steps, on the host. The number of the call has 32 bits, and one more after the call."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int, variant: DropoutVariant) -> None:
        rng = np.random.default_rng(0)
        self.shape, self.offset, self.variant = shape, offset, variant
        self.x = rng.standard_normal(shape).astype(dtype)
        if variant.p == 1:  # what is dropped is 0, whatever it was
            self.x.reshape(-1)[::3] = np.nan
        self.state = np.array([2**63 + 5, 2**32 - 1], np.uint64)
        self.unit = 2 * HALF_ULP[accumulation_dtype(dtype).name]

    def drops(self, side: Side) -> Drops:
        """The bundle on a side."""
        p = self.variant.p
        return Drops(side.put(self.state), round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0)


def dropout_draw(case: DropoutCase, side: Side) -> Results:
    """The copy of the state, and what the state has become."""
    state = side.put(case.state)
    drawn = side.host(side.ops.dropout_draw(state))
    return {name: Result(_halves(array), 0, 0) for name, array in (("drawn", drawn), ("state", side.host(state)))}


def dropout(case: DropoutCase, side: Side) -> Results:
    """The output."""
    x, out = side.put(case.x.reshape(-1), case.offset), side.out(case.x.reshape(-1), case.offset)
    side.ops.dropout(x, case.drops(side), out)
    return {"y": Result(side.host(out), 1, np.abs(np.nan_to_num(case.x.reshape(-1).astype(np.float64))), exact=True)}


def dropout_channels(case: DropoutCase, side: Side) -> Results:
    """The output."""
    x, out = side.put(case.x, case.offset), side.out(case.x, case.offset)
    side.ops.dropout_channels(x, case.drops(side), case.variant.swapped, out)
    return {"y": Result(side.host(out), 1, np.abs(case.x.astype(np.float64)), exact=True)}


def _halves(array: Any) -> Any:
    """Integers of 64 bits as pairs of 32 bits, which a float64 holds."""
    return np.ascontiguousarray(array).view(np.uint32).astype(np.float64)


DROPOUT_STEPS = {
    "dropout_draw": Step(dropout_draw, (DropoutVariant(),)),
    "dropout": Step(dropout, (DropoutVariant(), DropoutVariant(0.75), DropoutVariant(1.0))),
    "dropout_channels": Step(dropout_channels, (DropoutVariant(0.4), DropoutVariant(0.4, swapped=True))),
}
