"""The steps of batch norm with arguments to count them with, and what they must compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._steps import cupy_double_backward, cupy_ops
from cupybn._steps.bundles import (
    Affine,
    Epilogue,
    Gradients,
    Incoming,
    Moments,
    Running,
    SecondGradients,
    SecondSums,
    Statistics,
    Sums,
)
from instructions.lanes import Array
from instructions.launches import Counter
from tests.reference import HALF_ULP
from tests.second_order import second_order

SUMS = ("bn_stats", "bn_backward_reduce", "bn_double_backward_reduce")
ON_CHIP = ("bn_forward", "bn_backward")
STEPS = (*SUMS, "bn_normalize", "bn_backward_input", "bn_double_backward_input", *ON_CHIP)
VARIANTS = {"plain": (None, False), "relu": ("relu", False), "record": ("relu", True)}
"""Variants of the steps: the activation, and whether there is a residual. With one, the ways back read a record."""
EPS = 1e-5
PARTS = 4
"""Parts of the moments and sums that steps merge."""
PERIOD = 8
"""Channels with random numbers of their own; the next ones repeat these numbers."""
CLOSE = 1e-4
"""Distance from 0 up to which float32 may see a value of y on the other side of 0."""


class Case(NamedTuple):
    """A case to count: a step on an array of so many channels, with the channels last if rows have one element."""

    step: str
    dtype: str
    row: int
    channels: int
    variant: str = "plain"

    @property
    def kernel(self) -> str:
        """The name of the kernel, as `cupybn._steps.launcher` has it."""
        return f"channels_{'last' if self.row == 1 else 'first'}/{self.step}"


class Arrays:
    """Arguments of a case with so many rows, all that a step may take, and what it gives in float64.

    Channels repeat: there are numbers for the first few.
    """

    def __init__(self, case: Case, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.case, self.count = case, rows * case.row
        self._activation, self._has_residual = VARIANTS[case.variant]
        self._shape = rows, min(case.channels, PERIOD), case.row
        self._x, self._dy, self._residual = self._values(rng, 2, 1), self._values(rng, 1, 0), self._values(rng, 1, 0)
        self._weight, self._bias = rng.standard_normal((2, self._shape[1])).astype(np.float32)
        self._mean, self._var = (f(self._x.astype(np.float64), (0, 2)) for f in (np.mean, np.var))
        self._xhat = (self._x - _column(self._mean)) / np.sqrt(_column(self._var) + EPS)
        self._y = self._xhat * _column(self._weight) + _column(self._bias)
        self._dy[np.abs(self._y) < CLOSE] = 0  # the sign of y depends on roundings there
        self._cdx, self._cdresidual = self._values(rng, 1, 0), self._values(rng, 1, 0)
        self._cdweight, self._cdbias = rng.standard_normal((2, self._shape[1])).astype(np.float32)

    def _values(self, rng: np.random.Generator, std: float, mean: float) -> Array:
        values = rng.standard_normal(self._shape, np.float32) * std + mean
        return values.astype(parameter_dtype(self.case.dtype))

    def _repeat(self, values: Array) -> Any:
        """An array of the device with all channels of the case, made of an array or vector with the first few."""
        axis, C = min(1, values.ndim - 1), self.case.channels
        times = [1] * values.ndim
        times[axis] = -(-C // values.shape[axis])
        return cupy.asarray(np.ascontiguousarray(np.tile(values, times)[(slice(None),) * axis + (slice(C),)]))

    def run(self) -> dict[str, Any]:
        """Call the step on the device; returns the arrays that it writes, by name."""
        step, C = self.case.step, self.case.channels
        x = self._repeat(self._x)
        if step == "bn_stats":
            return cupy_ops.bn_stats(x)._asdict()
        out = cupy.empty_like(x)
        affine = Affine(self._repeat(self._weight), self._repeat(self._bias), EPS)
        if "backward" not in step:
            residual = self._repeat(self._residual) if self._has_residual else None
            passed = cupy_ops.empty_passed(x, residual, out) if self._has_residual else None
            running = Running(cupy.zeros(C, np.float32), cupy.ones(C, np.float32), 0.1, cupy.zeros((), np.int64))
            epilogue = Epilogue(residual, self._activation, passed)
            if step == "bn_forward":
                cupy_ops.bn_forward(x, affine, running, epilogue, out)
            else:
                share = self.count / PARTS
                moments = Moments(cupy.full(PARTS, share), self._parts(self._mean), self._parts(self._var * share))
                cupy_ops.bn_normalize(x, moments, affine, running, epilogue, out)
            return {"out": out}
        dy = self._repeat(self._dy)
        passed = cupy_ops.empty_passed(x, dy, out) if self._has_residual else None
        if passed is not None:
            passed.fill(np.iinfo(np.uint8).max if passed.dtype == np.uint8 else True)
        statistics = Statistics.of(self._repeat(self._mean), self._repeat(self._var))
        epilogue = Epilogue(None, self._activation, passed)
        if "double" in step:
            return self._run_second_order(dy, x, statistics, affine, epilogue)
        if step == "bn_backward_reduce":
            return cupy_ops.bn_backward_reduce(dy, x, statistics, affine, epilogue)._asdict()
        dresidual = cupy.empty_like(x) if self._has_residual else None
        gradients = Gradients(out, dresidual, cupy.empty(C, np.float32), cupy.empty(C, np.float32))
        if step == "bn_backward":
            cupy_ops.bn_backward(dy, x, statistics, affine, epilogue, 1 / self.count, gradients)
        else:
            sums = Sums(*(self._parts(total / PARTS) for total in self._sums()))
            cupy_ops.bn_backward_input(dy, x, statistics, affine, epilogue, sums, 1 / self.count, gradients)
        return {"dx": out} | ({"dresidual": dresidual} if self._has_residual else {})

    def _run_second_order(
        self, dy: Any, x: Any, statistics: Statistics, affine: Affine, epilogue: Epilogue
    ) -> dict[str, Any]:
        """Call a step of second order; returns the arrays that it writes, by name."""
        cdresidual = self._repeat(self._cdresidual) if self._has_residual else None
        vectors = self._repeat(self._cdweight), self._repeat(self._cdbias)
        incoming = Incoming(dy, self._repeat(self._cdx), cdresidual, *vectors)
        if self.case.step in SUMS:
            sums = cupy_double_backward.bn_double_backward_reduce(incoming, x, statistics, affine, epilogue)
            return sums._asdict()
        sums = SecondSums(*(self._parts(total / PARTS) for total in self._sums()))
        gradients = SecondGradients(cupy.empty_like(x), cupy.empty_like(x), cupy.empty(x.shape[1], np.float32))
        cupy_double_backward.bn_double_backward_input(
            incoming, x, statistics, affine, epilogue, sums, 1 / self.count, gradients
        )
        return {"ddy": gradients.ddy, "dx": gradients.dx}

    def _parts(self, values: Array) -> Any:
        """Rows for all parts, each with the same vector."""
        return self._repeat(np.tile(values, (PARTS, 1)))

    # -----------------------------------------------------------------------------------------------------------------
    # The expected results

    def _passed(self) -> Array:
        """The elements of dy that the activation lets pass, else 0; the record of these cases lets all of them pass."""
        dy = self._dy.astype(np.float64)
        return np.where(self._y > 0, dy, 0) if self.case.variant == "relu" else dy

    def _sums(self) -> tuple[Array, ...]:
        """The sums of a way back, in the order of their bundle."""
        dy, cdx = self._passed(), self._cdx.astype(np.float64)
        terms = (dy, dy * self._xhat, cdx, cdx * self._xhat, cdx * dy)
        return tuple(term.sum((0, 2)) for term in (terms if "double" in self.case.step else terms[:2]))

    def _expected(self, name: str) -> Array:
        """The values of an array that an elementwise step writes, in float64."""
        if name == "dresidual":
            return self._passed()
        if name == "out":
            y = self._y + self._residual.astype(np.float64) if self._has_residual else self._y
            return np.maximum(y, 0) if self._activation else y
        if "double" in self.case.step:
            cotangents = self._cdx, self._cdweight, self._cdbias, self._cdresidual if self._has_residual else None
            passed = self._y > 0 if self.case.variant == "relu" else np.full(self._shape, True)
            found = second_order(self._x, self._dy, self._weight, eps=EPS, cotangents=cotangents, relu=passed)
            return getattr(found, name).astype(np.float64)
        total, projected = (_column(s) / self.count for s in self._sums())
        scale = self._weight / np.sqrt(self._var + EPS)
        return (self._passed() - total - self._xhat * projected) * _column(scale)

    def check(self, counter: Counter, results: dict[str, Any]) -> float:
        """Compare what the executed blocks have written with what is expected.

        Returns
        -------
        The number of elements of x that they have worked on.
        """
        if self.case.step not in SUMS:
            for name, array in results.items():
                values, written = counter.look(array)
                channels = np.flatnonzero(written.any((0, 2)))
                assert channels.size, "nothing was written"
                expected = self._expected(name)[:, channels % self._shape[1]]
                off = np.abs(values[:, channels].astype(np.float64) - expected)
                bound = 1e-5 + HALF_ULP[self.case.dtype] * 2 * np.abs(expected)
                wrong = np.mean((off > bound)[written[:, channels]])
                assert wrong == 0, f"{wrong:.2%} of what was written is wrong: {name}"
            return float(written.sum())
        parts = [counter.look(array) for name, array in results.items() if name not in ("count", "batches")]
        channels = np.flatnonzero(parts[0][1].any(0))
        assert channels.size, "nothing was written"
        assert all(written[:, channels].all() for _, written in parts), "some part of a channel is missing"
        ours = [values[:, channels] for values, _ in parts]
        if self.case.step == "bn_stats":
            count, written = counter.look(results["count"])
            assert written.all()
            assert count.sum() == self.count
            one, other = ours
            mean = count @ one / self.count
            found = [mean, (other.sum(0) + count @ (one - mean) ** 2) / self.count]
            expected: tuple[Array, ...] = (self._mean, self._var)
        else:
            found, expected = [values.sum(0) for values in ours], self._sums()
        for sums, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(sums, theirs[channels % self._shape[1]], rtol=1e-5, atol=1e-7 * self.count)
        return float(channels.size * self.count)


def _column(values: Array) -> Array:
    return values[:, None]
