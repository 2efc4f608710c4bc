"""Problems to measure: operations of batch norm, and arrays of a shape, memory order and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

PATTERN = 1_000_003
"""Number of random values that arrays are filled with, again and again: a prime, so that channels differ."""


@dataclass(frozen=True)
class Operation:
    """One pass of batch norm, forward or backward, with the residual and activation that are fused into it."""

    name: str
    backward: bool = False
    training: bool = True
    activation: str | None = None
    residual: bool = False

    @property
    def passes(self) -> float:
        """Least memory traffic in sizes of x: x, y; x, dy, dx; a residual or its gradient; the record of ReLU."""
        return 2 + self.backward + (1 + 1 / 16) * self.residual


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("training"),
        Operation("inference", training=False),
        Operation("backward", backward=True),
        Operation("training + ReLU", activation="relu"),
        Operation("backward + ReLU", backward=True, activation="relu"),
        Operation("training + add + ReLU", activation="relu", residual=True),
        Operation("backward + add + ReLU", backward=True, activation="relu", residual=True),
    )
}
"""Operations by their names."""


@dataclass(frozen=True)
class Problem:
    """Shape, dtype and channel axis of contiguous arrays that an operation is measured on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channel_axis: int = 1

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.shape[self.channel_axis]

    @property
    def nbytes(self) -> int:
        """Size of x in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def name(self) -> str:
        """Name of this problem in tables."""
        axis, last = self.channel_axis % len(self.shape), len(self.shape) - 1
        order = "" if axis == 1 else ", channels last" if axis == last else f", channel axis {axis}"
        return f"{'x'.join(map(str, self.shape))} {self.dtype.name}{order}"


class Arrays(NamedTuple):
    """Arguments of a forward and of a backward pass."""

    x: Array
    dy: Array
    residual: Array
    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array


def make_arrays(problem: Problem, xp: Any, sets: int = 1) -> list[Arrays]:
    """Sets of random arguments, all with the same values. Filled on the device: a host is slow at gigabytes."""
    rng = np.random.default_rng(0)
    pattern = [
        xp.asarray((rng.standard_normal(PATTERN) * std + mean).astype(problem.dtype))
        for std, mean in ((2, 1), (1, 0), (1, 0))
    ]
    weight, var = rng.uniform(0.5, 1.5, (2, problem.channels)).astype(np.float32)
    bias, mean = rng.standard_normal((2, problem.channels)).astype(np.float32)
    vectors = weight, bias, mean, var
    return [
        Arrays(*(_fill(xp, p, problem.shape) for p in pattern), *(xp.asarray(v.copy()) for v in vectors))
        for _ in range(sets)
    ]


def _fill(xp: Any, pattern: Array, shape: tuple[int, ...]) -> Array:
    """Array of this shape, filled with a pattern again and again."""
    array = xp.empty(shape, pattern.dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, pattern.size):
        part = flat[start : start + pattern.size]
        part[...] = pattern[: part.size]
    return array
