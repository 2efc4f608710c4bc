"""The random arguments of what `check` computes of the norms within a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._cli import norm_formula
from cupybn._cli.cases import EPS, HALF_ULP, MOMENTUM, NEAR
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics, Sums
from cupybn._steps.norm import Norm

Array = npt.NDArray[Any]


class NormVariant(NamedTuple):
    """Settings that change from call to call on arrays of one shape."""

    op: str
    activation: str | None = None
    has_residual: bool = False

    def words(self) -> list[str]:
        """The settings in words."""
        return [self.op, self.activation or "no activation", *(["residual"] if self.has_residual else [])]


def norm_of(op: str, C: int) -> Norm:
    """The norm that a function is; group norm makes groups of as few channels as there can be, but of two at least."""
    if op == "instance_norm":
        return Norm(C)
    if op == "group_norm":
        return Norm(C // next(size for size in range(2, C + 1) if C % size == 0) if C > 1 else 1)
    return Norm(1, centered=op == "layer_norm")


class NormCase:
    """Random arguments of all steps, on the host, with the statistics that x has."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int, variant: NormVariant) -> None:
        rng = np.random.default_rng(0)
        self.shape, self.offset, self.has_residual = shape, offset, variant.has_residual
        self.dtype, C = dtype, shape[2]
        self.norm = norm_of(variant.op, C)
        self.weight = (rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C)).astype(np.float32)
        self.bias = rng.standard_normal(C).astype(np.float32)
        self.affine = Affine(self.weight, self.bias, EPS)
        self.x = (rng.standard_normal(shape) * 2 + 3).astype(dtype)
        residual = rng.standard_normal(shape).astype(dtype) if self.has_residual else None
        self.epilogue = Epilogue(residual, variant.activation)
        none = Epilogue()
        found = norm_formula.norm_forward(self.x, self.norm, self.affine, none, np.zeros(shape))
        assert found is not None
        self.statistics: Statistics = found
        self.xhat = norm_formula.normalized(self.x, self.norm, self.statistics, EPS)
        self.before_activation = norm_formula.preactivation(self.x, self.norm, self.statistics, self.affine, residual)
        dy = rng.standard_normal(shape)  # 0 where ReLU may pass it or not, as y is rounded
        self.dy = np.where(np.abs(self.before_activation) < NEAR, 0, dy).astype(dtype)
        self.count = self.x.size / len(self.statistics.pairs)
        self.running = Running(rng.standard_normal(C), rng.uniform(0.5, 2, C), MOMENTUM)
        self.sums = Sums(*rng.standard_normal((2, 1, C)))

    @property
    def noted(self) -> bool:
        """Whether the way back needs a record that the way forward writes."""
        return self.has_residual and self.epilogue.activation is not None

    @property
    def unit(self) -> float:
        """A unit in the last place of the arithmetic; more for sums of many float64, which nothing wider adds up."""
        dtype = accumulation_dtype(self.dtype)
        many = max(1.0, self.count**0.5 / 16) if dtype == np.float64 else 1.0
        return 2 * HALF_ULP[dtype.name] * many

    def terms(self) -> Array:
        """The size of the terms that each output is a sum of."""
        sizes: Array = np.abs(self.weight)[:, None] * (1 + np.abs(self.xhat)) + np.abs(self.bias)[:, None]
        residual = self.epilogue.residual
        return sizes if residual is None else sizes + np.abs(residual.astype(np.float64))

    def gradient_terms(self) -> Array:
        """The size of the terms that the gradient of the input is a sum of: in each row, the largest one."""
        N, A, C, B = self.shape
        g = np.abs(self.dy.astype(np.float64)) * np.abs(self.weight)[:, None]
        rows = (N, A, self.norm.groups, C // self.norm.groups, B)
        g, xhat = g.reshape(rows), np.abs(self.xhat).reshape(rows)
        axes = (1, 3, 4)
        sizes = g + g.mean(axes, keepdims=True) + xhat * (g * xhat).mean(axes, keepdims=True)
        largest = sizes.max(axes, keepdims=True) / np.sqrt(self.statistics.var + EPS).reshape(N, 1, -1, 1, 1)
        whole: Array = np.broadcast_to(largest, rows).reshape(self.shape)
        return whole

    def gradients(self, side: Any) -> Gradients:
        """The arrays on a side that a step of the way back writes to."""
        dx, dresidual = (side.out(self.x, self.offset) for _ in range(2))
        return Gradients(dx, dresidual if self.noted else None)
