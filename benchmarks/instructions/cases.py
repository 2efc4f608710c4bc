"""The steps of batch norm with arguments to count them with, and what they must compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from cupybn import cupy_ops
from cupybn._dtypes import parameter_dtype
from cupybn._moments import Moments, Statistics, Sums
from instructions.lanes import Array
from instructions.launches import Counter

SUMS = ("bn_stats", "bn_backward_reduce")
ON_CHIP = ("bn_forward", "bn_backward")
STEPS = (*SUMS, "bn_normalize", "bn_backward_input", *ON_CHIP)
VARIANTS = {"plain": (None, False), "relu": ("relu", False), "mask": ("relu", True)}
"""The activation, and whether there is a residual: then a mask tells the way back where ReLU passes."""
EPS = 1e-5
PARTS = 4
"""Of moments and sums that steps merge."""


class Case(NamedTuple):
    """What is counted: a step on an array of so many channels; rows of one element are channels last."""

    step: str
    dtype: str
    row: int
    channels: int
    variant: str = "plain"

    @property
    def kernel(self) -> str:
        """As `cupybn._kernels` calls it."""
        return f"channels_{'last' if self.row == 1 else 'first'}/{self.step}"


class Arrays:
    """Arguments of a case with so many rows, all that a step may take, and what it gives in float64."""

    def __init__(self, case: Case, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        self.activation, self.has_residual = VARIANTS[case.variant]
        self.shape = rows, case.channels, case.row
        self._dtype = parameter_dtype(case.dtype)
        self.count = rows * case.row
        self.x, self.dy, self.residual = self._values(rng, 2, 1), self._values(rng, 1, 0), self._values(rng, 1, 0)
        self.weight, self.bias = rng.standard_normal((2, case.channels)).astype(np.float32)

    def _values(self, rng: np.random.Generator, std: float, mean: float) -> Array:
        """Random numbers, the same ones in every eighth channel."""
        rows, C, L = self.shape
        some = (rng.standard_normal((rows, min(C, 8), L), np.float32) * std + mean).astype(self._dtype)
        return np.tile(some, (1, -(-C // some.shape[1]), 1))[:, :C]

    def run(self) -> dict[str, Any]:
        """Call the step on the device; returns the arrays that it writes, by name."""
        step, C = self.case.step, self.shape[1]
        x = cupy.asarray(np.ascontiguousarray(self.x))
        if step == "bn_stats":
            return cupy_ops.bn_stats(x)._asdict()
        out, other = cupy.empty_like(x), cupy.empty_like(x) if self.has_residual else None
        weight, bias = cupy.asarray(self.weight), cupy.asarray(self.bias)
        mean, var = self._moments(self.x)
        if "backward" not in step:
            residual = cupy.asarray(np.ascontiguousarray(self.residual)) if self.has_residual else None
            mask = cupy_ops.empty_mask(x, residual, out) if self.has_residual else None
            running = cupy.zeros(C, np.float32), cupy.ones(C, np.float32), 0.1, cupy.zeros((), np.int64)
            share = self.count / PARTS
            moments = (cupy.asarray(np.tile(m, (PARTS, 1))) for m in (mean, var * share))
            given = (Moments(cupy.full(PARTS, share), *moments),) if step == "bn_normalize" else ()
            getattr(cupy_ops, step)(
                x, *given, EPS, weight, bias, residual, self.activation, *running, out, mask
            )
            return {"out": out}
        dy = cupy.asarray(np.ascontiguousarray(self.dy))
        mask = cupy_ops.empty_mask(x, dy, out) if self.has_residual else None
        if mask is not None:
            mask.fill(np.iinfo(np.uint8).max if mask.dtype == np.uint8 else True)
        first = dy, x, Statistics(cupy.asarray(mean), cupy.asarray(var)), EPS, weight, bias, self.activation, mask
        if step == "bn_backward_reduce":
            return cupy_ops.bn_backward_reduce(*first)._asdict()
        sums = [cupy.asarray(np.tile(s / PARTS, (PARTS, 1))) for s in self._sums(slice(None))]
        given = (Sums(*sums),) if step == "bn_backward_input" else ()
        vectors = cupy.empty(C, np.float32), cupy.empty(C, np.float32)
        getattr(cupy_ops, step)(*first, *given, 1 / self.count, out, other, *vectors)
        return {"dx": out}

    # -----------------------------------------------------------------------------------------------------------------
    # What is expected

    def _moments(self, x: Array) -> tuple[Array, Array]:
        wide = x.astype(np.float64)
        return wide.mean((0, 2)), wide.var((0, 2))

    def _normalized(self, channels: Any) -> tuple[Array, Array, Array]:
        """xhat, what the activation is applied to, and what it lets pass of dy; of some channels."""
        x = self.x[:, channels].astype(np.float64)
        mean, var = self._moments(x)
        xhat = (x - _column(mean)) / np.sqrt(_column(var) + EPS)
        y = xhat * _column(self.weight[channels]) + _column(self.bias[channels])
        dy = self.dy[:, channels].astype(np.float64)
        return xhat, y, np.where(y > 0, dy, 0) if self.case.variant == "relu" else dy

    def _sums(self, channels: Any) -> tuple[Array, Array]:
        xhat, _, dy = self._normalized(channels)
        return dy.sum((0, 2)), (dy * xhat).sum((0, 2))

    def _expected(self, channels: Any) -> Array:
        """The array that an elementwise step writes."""
        xhat, y, dy = self._normalized(channels)
        if "backward" not in self.case.step:
            y += self.residual[:, channels].astype(np.float64) if self.has_residual else 0
            return np.maximum(y, 0) if self.activation else y
        scale = self.weight[channels] / np.sqrt(self._moments(self.x[:, channels])[1] + EPS)
        total, projected = (_column(s) / self.count for s in self._sums(channels))
        return (dy - total - xhat * projected) * _column(scale)

    def check(self, counter: Counter, results: dict[str, Any]) -> float:
        """Compare what the executed blocks have written with what is expected.

        Returns
        -------
        The number of elements of x that they have worked on.
        """
        if self.case.step not in SUMS:
            ((_, array),) = results.items()
            values, written = counter.look(array)
            channels = np.flatnonzero(written.any((0, 2)))
            assert channels.size, "nothing was written"
            found, expected = values[:, channels].astype(np.float64), self._expected(channels)
            ulp = 2.0 ** -{"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[self.case.dtype]
            off = np.abs(found - expected) > 1e-5 + ulp * np.abs(expected)
            wrong = np.mean(off[written[:, channels]])
            assert wrong <= 1e-4, f"{wrong:.2%} of what was written is wrong"  # some signs depend on the last bit
            return float(written.sum())
        parts = [counter.look(array) for name, array in results.items() if name not in ("count", "batches")]
        channels = np.flatnonzero(parts[0][1].any(0))
        assert all(written[:, channels].all() for _, written in parts), "some part of a channel is missing"
        one, other = (values[:, channels] for values, _ in parts)
        if self.case.step == "bn_stats":
            count, written = counter.look(results["count"])
            assert written.all()
            assert count.sum() == self.count
            mean = count @ one / self.count
            found = mean, (other.sum(0) + count @ (one - mean) ** 2) / self.count
            expected = self._moments(self.x[:, channels])
        else:
            found, expected = (one.sum(0), other.sum(0)), self._sums(channels)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * self.count)
        return float(channels.size * self.count)


def _column(values: Array) -> Array:
    return values[:, None]
