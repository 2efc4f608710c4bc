"""Totals: moments of all that was added, as one array's, however many parts it has come in."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied, module_of
from cupybn._steps.bundles import Moments
from cupybn._steps.tiles import numpy_settings

Array = Any  # numpy.ndarray or cupy.ndarray


class Total(NamedTuple):
    """Moments of all values that were added. It is never changed: what is added to it makes a new one.

    Its means are relative to a pivot, the mean of the first part that had values. So each addition rounds at the size
    of the distance from there, not at that of the mean itself, and a hundred thousand of them do no harm.
    """

    row: Array  # (1, 1 + 2 C), as `merge_moments` makes it, but for the means, which are relative to the pivot
    pivot: Array  # (C,) float64

    @classmethod
    def of(cls, row: Array) -> Total:
        """Total of a single part, from the row that `merge_moments` has made. It takes the row for its own."""
        pivot = copied(row[0, _means(row)])
        row[0, _means(row)] = 0
        return cls(row, pivot)

    @numpy_settings
    def plus(self, ops: ModuleType, other: Total) -> Total:
        """Total of the values of both, on their device: neither is read by the host."""
        module, means = module_of(self.row), _means(self.row)
        # A mask may have left nothing so far. Only the device knows.
        pivot = module.where(self.row[0, :1] > 0, self.pivot, other.pivot)
        rows = module.concatenate((self.row, other.row))
        rows[1, means] += other.pivot - pivot
        return Total(ops.merge_moments(Moments.of_rows(rows)), pivot)

    def __deepcopy__(self, memo: object) -> Total:
        """Return this one, as it is never changed."""
        return self

    @numpy_settings
    def moments(self) -> Moments:
        """Moments of all values, in one part, with means as they are."""
        row = copied(self.row)
        row[0, _means(row)] += self.pivot
        return Moments.of_rows(row)

    @numpy_settings
    def var(self, ddof: float) -> Array:
        """Sum of squared deviations of each channel, divided by count - ddof; NaN where that is nothing or less."""
        left, m2 = self.row[0, :1] - ddof, self.row[0, _means(self.row).stop :]
        return m2 / module_of(self.row).where(left > 0, left, np.nan)


def _means(row: Array) -> slice:
    """Place of the means in a row."""
    return slice(1, 1 + row.shape[1] // 2)
