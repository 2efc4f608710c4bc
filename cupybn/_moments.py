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


class Statistics(NamedTuple):
    """Mean and biased variance of each channel: copies, so that what used them stays right. float64."""

    mean: Array  # (C,)
    var: Array  # (C,)


class Sums(NamedTuple):
    """What the gradients need of the whole batch, in P parts that are still to be added. float64."""

    dy: Array  # (P, C)  sum(dy), the gradient of bias
    dy_xhat: Array  # (P, C)  sum(dy * xhat), the gradient of weight
