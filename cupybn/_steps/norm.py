"""The choice among the norms within a sample: instance, group, layer and RMS norm are one thing.

An array has C channels, in groups. A *row* is one group of one sample, all positions of its channels: what shares one
mean and one variance. Instance norm has as many groups as channels. Layer and RMS norm have a single group, of which
each normalized element is a channel with one position. RMS norm is not centered.
"""

from __future__ import annotations

from typing import NamedTuple


class Norm(NamedTuple):
    """Norm within a sample."""

    groups: int  # groups of channels, each of which is a row in each sample
    centered: bool = True  # whether a row's mean is taken off it; False for RMS norm
