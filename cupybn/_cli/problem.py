"""Problems to measure: operations of batch norm and its family, and arrays of a shape, memory order and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

PATTERN = 1_000_003
"""Number of random values that arrays are filled with, again and again: a prime, so that channels differ."""

EPS, MOMENTUM = 1e-5, 0.1
"""PyTorch's defaults, with which all libraries compute."""
DROPPED = 0.1
"""Probability with which dropout drops an element."""


@dataclass(frozen=True)
class Operation:
    """One pass of a function, forward or backward, with the residual and activation that are fused into it."""

    name: str
    backward: bool = False
    training: bool = True
    activation: str | None = None
    residual: bool = False
    op: str = "batch_norm"
    """One of `OPS`."""

    @property
    def passes(self) -> float:
        """Least memory traffic in sizes of x: x, y; x, dy, dx; a residual or its gradient; the record of ReLU.

        Dropout's way back reads no x: dy, dx.
        """
        return 2 + (self.backward and self.op != "dropout") + (1 + 1 / 16) * self.residual


OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "dropout")
"""Functions that can be checked and measured, by their names in `cupybn.functional`."""
FAMILY = OPS[1:]
"""Functions beside batch norm."""
FUSED = OPS[:3]
"""Functions that take a residual, an activation and a channel axis."""
OVER_THE_LAST_AXIS = ("layer_norm", "rms_norm")
"""Functions that normalize the last axis of the arrays here, each element of which has a weight: its channels."""

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
"""Operations of batch norm by their names."""
PASSES = {
    op: {name: Operation(name, backward=name == "backward", op=op) for name in ("forward", "backward")} for op in FAMILY
}
"""Operations of its family by function and name. A forward pass is that of a training step."""


def operation_of(op: str, name: str) -> Operation:
    """The operation of a function with this name."""
    return OPERATIONS[name] if op == "batch_norm" else PASSES[op][name]


@dataclass(frozen=True)
class Problem:
    """Shape, dtype and channel axis of contiguous arrays that an operation is measured on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channel_axis: int = 1
    groups: int = 0
    """Number of groups of the channels, for group norm."""
    narrow: bool = False
    """Whether weight and bias have the dtype of x, as in a model of that dtype: PyTorch's layer norm takes no others
    on a GPU. Else they are float32."""

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


def problem_of(
    op: str, shape: tuple[int, ...], dtype: np.dtype[Any], channel_axis: int = 1, groups: int = 0
) -> Problem:
    """The problem that a function is measured on."""
    if op == "batch_norm":
        return Problem(shape, dtype, channel_axis)
    axis = channel_axis if op in FUSED else len(shape) - 1
    return Problem(shape, dtype, axis, groups if op == "group_norm" else 0, narrow=True)


def label(problem: Problem, operation: Operation) -> str:
    """The name of an operation on a problem in tables."""
    if operation.op == "batch_norm":
        return f"{problem.name}, {operation.name}"
    name = problem.name if operation.op in FUSED else problem.name.partition(",")[0]
    groups = f", {problem.groups} groups" if problem.groups else ""
    return f"{name}{groups}, {operation.op} {operation.name}"


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
    vectors = [v.astype(problem.dtype if problem.narrow else v.dtype) for v in (weight, bias, mean, var)]
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
