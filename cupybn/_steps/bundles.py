"""What travels between the steps: statistics that merge, and sums that add up."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray or cupy.ndarray


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each channel, in P parts that are still to be merged.

    Parts are those of the blocks of a grid or of the ranks of a cluster; NumPy's steps make one. All are float64.
    """

    count: Array  # (P,)
    mean: Array  # (P, C)
    m2: Array  # (P, C)  sum((x - mean)^2)
    batches: Array | None = None
    """0-d int64: the number of batches before this one, for whoever moves the counter and needs its old value."""

    @classmethod
    def of_rows(cls, rows: Array, batches: Array | None = None) -> Moments:
        """The moments in the rows that `merge_moments` makes, (P, 1 + 2 C): what ranks send each other."""
        C = rows.shape[1] // 2
        return cls(rows[:, 0], rows[:, 1 : 1 + C], rows[:, 1 + C :], batches)


class Statistics(NamedTuple):
    """Mean and biased variance of each channel: copies, so that what used them stays right. float64."""

    mean: Array  # (C,)
    var: Array  # (C,)


class Sums(NamedTuple):
    """What the gradients need of the whole batch, in P parts that are still to be added. float64."""

    dy: Array  # (P, C)  sum(dy), the gradient of bias
    dy_xhat: Array  # (P, C)  sum(dy * xhat), the gradient of weight

    @classmethod
    def of_rows(cls, rows: Array) -> Sums:
        """The sums in the row that `merge_sums` makes, (1, 2 C)."""
        C = rows.shape[1] // 2
        return cls(rows[:, :C], rows[:, C:])
