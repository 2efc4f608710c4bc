"""The random arguments of what `check` computes of batch norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._cli import formula
from cupybn._steps.bundles import Affine, Epilogue, Incoming, Moments, Running, SecondSums, Statistics, Sums

Array = npt.NDArray[Any]

EPS, MOMENTUM = 1e-3, 0.1
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
NEAR = 0.05
"""Distance from 0 within which no values before ReLU are: rounded to the other side, all of dy would be the error."""


class Variant(NamedTuple):
    """Settings that change from call to call on arrays of one shape."""

    training: bool = True
    activation: str | None = None
    has_residual: bool = False
    masked: bool = False

    def words(self) -> list[str]:
        """The settings in words."""
        return [
            "training" if self.training else "eval",
            self.activation or "no activation",
            *(["residual"] if self.has_residual else []),
            *(["masked"] if self.masked else []),
        ]


class Case:
    """Random arguments of all steps, on the host. They are finite: `given` hides what a mask leaves out."""

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[Any], offset: int, variant: Variant) -> None:
        rng = np.random.default_rng(0)
        self.shape, self.dtype, self.offset = shape, dtype, offset
        self.training, activation, self.has_residual, masked = variant
        C = shape[1]
        self.weight = (rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C)).astype(np.float32)
        self.bias, mean = rng.standard_normal((2, C)).astype(np.float32)
        self.statistics = Statistics.of(mean.astype(np.float64), rng.uniform(0.5, 2, C))
        self.affine = Affine(self.weight, self.bias, EPS)
        self.running = Running(
            self.statistics.mean, self.statistics.var, MOMENTUM, np.array(2) if self.training else None
        )
        self.x = (rng.standard_normal(shape) * 2 + 3).astype(dtype)
        self.dy = rng.standard_normal(shape).astype(dtype)
        self.epilogue = Epilogue(rng.standard_normal(shape).astype(dtype) if self.has_residual else None, activation)
        self._keep_away_from_zero()
        self.mask = _some_of(rng, shape) if masked else None
        self.epilogue = self.epilogue._replace(mask=self.mask)
        self.count = self.x.size / C if self.mask is None else float(np.count_nonzero(self.mask))
        self.inv_count = 1 / self.count if self.training else 0.0
        parts = rng.integers(2, 9, 3).astype(np.float64)
        self.moments = Moments(parts, *rng.uniform(1, 2, (2, 3, C)))
        self.sums = Sums(*rng.standard_normal((2, 1, C)) * self.count)
        cdx, cdresidual = rng.standard_normal((2, *shape)).astype(dtype)
        self.incoming = Incoming(self.dy, cdx, cdresidual if self.has_residual else None, *rng.standard_normal((2, C)))
        self.second_sums = SecondSums(*rng.standard_normal((5, 1, C)) * self.count)

    def given(self, array: Array) -> Array:
        """An (N, C, L) array as steps are given it: what a mask leaves out is NaN."""
        return array if self.mask is None else np.where(self.mask[:, None], array, np.nan).astype(array.dtype)

    def statistics_given(self) -> tuple[Statistics, float]:
        """The statistics as steps of the way back are given them, and 1 / count: under a mask the count is theirs."""
        if self.mask is None or not self.training:
            return self.statistics, self.inv_count
        return self.statistics._replace(count_left=np.array([self.count])), 1.0

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

    def before_activation(self, statistics: Statistics) -> Array:
        """The values that ReLU looks at, in float64."""
        y: Array = self.xhat(statistics) * self.weight[:, None] + self.bias[:, None]
        residual = self.epilogue.residual
        return y if residual is None else y + residual.astype(np.float64)

    def xhat(self, statistics: Statistics) -> Array:
        """The normalised input, in float64."""
        mean, rstd = statistics.mean[:, None], 1 / np.sqrt(statistics.var + EPS)[:, None]
        xhat: Array = (self.x.astype(np.float64) - mean) * rstd
        return xhat

    def batch_statistics(self) -> Statistics:
        """Mean and variance of x, in float64."""
        return Statistics.of(*formula.mean_and_var(formula.bn_stats(self.x, mask=self.mask), np.float64))

    def terms(self, statistics: Statistics) -> Array:
        """The size of the terms that each output is a sum of."""
        sizes: Array = np.abs(self.weight)[:, None] * (1 + np.abs(self.xhat(statistics))) + np.abs(self.bias)[:, None]
        residual = self.epilogue.residual
        return sizes if residual is None else sizes + np.abs(residual.astype(np.float64))

    def gradient_terms(self, sums: Sums | None = None) -> Array:
        """The size of the terms that the gradient of the input is a sum of: in each channel, the largest one."""
        xhat, scale = np.abs(self.xhat(self.statistics)), np.abs(self.weight) / np.sqrt(self.statistics.var + EPS)
        g = np.abs(self.dy.astype(np.float64))
        sum_dy, sum_dy_xhat = (
            (g.sum((0, 2)), (g * xhat).sum((0, 2))) if sums is None else map(np.abs, (s[0] for s in sums))
        )
        sizes = g + self.inv_count * (sum_dy[:, None] + xhat * sum_dy_xhat[:, None])
        largest: Array = (sizes.max((0, 2)) * scale)[:, None]
        return largest

    def _keep_away_from_zero(self) -> None:
        near = np.abs(self.before_activation(self.statistics)) < NEAR
        if self.epilogue.residual is not None:
            self.epilogue.residual[near] += np.asarray(4 * NEAR, self.dtype)
        else:
            step = (4 * NEAR * np.sqrt(self.statistics.var + EPS) / self.weight)[:, None]
            self.x = np.where(near, self.x.astype(np.float64) + step, self.x.astype(np.float64)).astype(self.dtype)


def _some_of(rng: np.random.Generator, shape: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """A mask that leaves most positions of an array, and not less than two."""
    mask = rng.random((shape[0], shape[2])) < 0.8
    mask.flat[:2] = True
    return mask
