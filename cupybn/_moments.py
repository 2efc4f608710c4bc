"""Moments: the form in which statistics travel from step to step, from array to array, from rank to rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel; mean and m2 are float64."""

    count: int
    mean: Array  # (C,)
    m2: Array  # (C,)  sum((x - mean)^2)

    @property
    def var(self) -> Array:
        """The biased variance, m2 / count."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Array:
        """The unbiased variance, m2 / (count - 1)."""
        return self.m2 / (self.count - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        """
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta**2 * (self.count * share))
