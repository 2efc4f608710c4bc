"""Chunks of an array that nobody could hold, made one after the other, whose moments are known exactly."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MOST = 20
"""Binary digits behind the point that values have at most."""
DEVIATIONS = 8
"""Standard deviations from the mean that no value is away."""
SUMMED = 1 << 16
"""Squares that are added in int64 at a time."""
LEFT = 0.7
"""Share of the positions that a mask leaves."""


class Case(NamedTuple):
    """What is to be streamed."""

    sample: tuple[int, ...]  # shape of a sample, of which a chunk has many along a first axis
    channel_axis: int  # axis of the channels in a chunk: 1, or -1
    masked: bool
    ratio: float  # mean / std of every channel
    size: float  # MB of all chunks
    chunk: float  # MB of a chunk, at most

    @property
    def name(self) -> str:
        """Shape of a chunk in words."""
        return f"({', '.join(['n', *map(str, self.sample)])})"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.sample[self.channel_axis - (self.channel_axis > 0)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return (max(1, round(1e6 * min(self.chunk, self.size) / (4 * math.prod(self.sample)))), *self.sample)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return max(1, round(1e6 * self.size / self.bytes_of_chunk))

    @property
    def bytes_of_chunk(self) -> int:
        """Number of bytes of a chunk."""
        return 4 * math.prod(self.shape)

    @property
    def steps(self) -> int:
        """Steps of the grid of values in a standard deviation, a power of two: as many as float32 holds."""
        return 1 << min(MOST, 24 - math.ceil(math.log2(abs(self.ratio) + DEVIATIONS)))

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of a chunk but that of the channels."""
        return tuple(axis for axis in range(len(self.shape)) if axis != self.channel_axis % len(self.shape))


class Exact(NamedTuple):
    """The moments of all values, without rounding: count, and mean and biased variance of each channel."""

    count: int
    mean: list[Fraction]
    var: list[Fraction]

    def errors(self, mean: Array, var: Array) -> dict[str, float]:
        """Errors of the worst channel: of the mean in standard deviations, and of the variance relative to itself."""
        return {
            "mean": max(
                abs(float(Fraction(float(found)) - right)) / math.sqrt(var_right)
                for found, right, var_right in zip(mean, self.mean, self.var, strict=True)
            ),
            "var": max(
                abs(float(Fraction(float(found)) / right - 1)) for found, right in zip(var, self.var, strict=True)
            ),
        }


class Stream:
    """The chunks of a case, each a new array, made when it is asked for and kept by nobody.

    A chunk is a block of normal values plus a shift of its own, so that neighbours differ in their means: one pass over
    memory, at the speed of a copy. Block and shifts are whole numbers of steps, the finest that float32 holds about
    this mean. So every sum, and with it the mean and the variance of all that was streamed, is known in whole numbers.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.making: list[tuple[float, float]] = []
        """Seconds that each chunk took to make, and how many of them its thread had a processor for."""
        rng = np.random.default_rng(0)
        steps = rng.standard_normal(case.shape, np.float32)
        np.rint(np.multiply(steps, case.steps, out=steps), out=steps)
        positions = [case.shape[axis] for axis in case.axes]
        self.mask = rng.random(positions, np.float32) < LEFT if case.masked else None
        """The mask of every chunk: an array of a chunk's shape without its channels."""
        self._sums = _sums_of(np.moveaxis(steps, case.channel_axis, -1), self.mask)
        self._block = np.multiply(steps, np.float32(1 / case.steps), out=steps)
        self._block += np.float32(case.ratio)

    def __iter__(self) -> Iterator[Array]:
        for i in range(self.case.chunks):
            yield self.chunk(i)

    def chunk(self, i: int) -> Array:
        """The chunk of this number."""
        start, used = time.perf_counter(), time.thread_time()
        chunk: Array = np.add(self._block, np.float32(self._shift(i) / self.case.steps))
        self.making.append((time.perf_counter() - start, time.thread_time() - used))
        return chunk

    def _shift(self, i: int) -> int:
        """Steps by which a chunk is moved: up to one standard deviation up or down."""
        return (7 * i % 32 - 16) * self.case.steps // 16

    @functools.cached_property
    def exact(self) -> Exact:
        """The moments of all chunks together."""
        count, firsts, seconds = self._sums
        shifts = [self._shift(i) for i in range(self.case.chunks)]
        n, once, squared = count * len(shifts), sum(shifts), sum(shift * shift for shift in shifts)
        steps = self.case.steps
        mean, var = [], []
        for first, second in zip(firsts, seconds, strict=True):
            total = first * len(shifts) + count * once
            squares = second * len(shifts) + 2 * first * once + count * squared
            mean.append(Fraction(self.case.ratio) + Fraction(total, n * steps))
            var.append(Fraction(n * squares - total * total, n * n * steps * steps))
        return Exact(n, mean, var)


def _sums_of(steps: Array, mask: Array | None) -> tuple[int, list[int], list[int]]:
    """How many values a channel has in a block, their sum and that of their squares; channels are the last axis."""
    firsts, seconds = [], []
    for c in range(steps.shape[-1]):
        values = (steps[..., c].ravel() if mask is None else steps[..., c][mask]).astype(np.int64)
        firsts.append(int(values.sum()))
        some = np.add.reduceat(values * values, range(0, values.size, SUMMED))
        seconds.append(sum(map(int, some)))
    return values.size, firsts, seconds
