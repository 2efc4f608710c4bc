"""Arguments of the steps, on the host and on the device, for tests that hold kernels to their mirrors."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from cupybn._calls import call
from cupybn._steps import cupy_dropout, cupy_norms, cupy_ops, norms_last, numpy_ops, plans
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics
from cupybn.dropout import call as dropout_call
from tests.reference import HALF_ULP, to_numpy

EPS = 1e-3


def each_array(function, value):
    """The result of a function for an array, or a bundle with its results for each array; all else stays as it is."""
    if isinstance(value, tuple):
        return type(value)(*(each_array(function, field) for field in value))
    return function(value) if isinstance(value, (np.ndarray, cp.ndarray)) else value


def to_host(value):
    """An array of the device, or a bundle of them, on the host."""
    return each_array(to_numpy, value)


def to_device(value, offset=0):
    """A copy on the device of an array or a bundle, in memory that begins some elements after an aligned address."""

    def copy(array):
        memory = cp.empty(array.size + offset, array.dtype)
        view = memory[offset:].reshape(array.shape)
        view[...] = cp.asarray(array)
        return view

    return each_array(copy, value)


class Arrays:
    """Random arguments of all steps, on the host; `on_device` copies them."""

    def __init__(self, rng, shape, dtype, offset, has_residual=False, activation=None):
        self.offset = offset
        C = shape[1]
        self.x = (rng.standard_normal(shape) * 2 + 3).astype(dtype)
        self.dy = rng.standard_normal(shape).astype(dtype)
        self.epilogue = Epilogue(rng.standard_normal(shape).astype(dtype) if has_residual else None, activation)
        weight, bias, mean = rng.standard_normal((3, C)).astype(np.float32)
        self.affine, self.running = Affine(weight, bias, EPS), Running(mean, rng.uniform(0.5, 2, C), 0.1)
        self.unit = 2 * HALF_ULP["float64" if dtype == np.float64 else "float32"]  # a unit in the last place

    @property
    def statistics(self):
        """The running statistics, as those that x was normalised with."""
        return Statistics.of(self.running.mean.astype(np.float64), self.running.var)

    def on_device(self, *names):
        """Copies of the arguments of these names."""
        return [to_device(getattr(self, name), self.offset) for name in names]

    def empty(self):
        """An array of the device for an output of the shape of x."""
        return to_device(np.zeros_like(self.x), self.offset)

    def gradients(self, dweight_dtype=np.float64):
        """Arrays for all gradients on the host and on the device, each with a number of its own that no result has."""
        C = self.x.shape[1]
        host = Gradients(*(np.full_like(self.x, 77) for _ in range(2)), np.full(C, 77, dweight_dtype), np.full(C, 77.0))
        return host, to_device(each_array(np.negative, host), self.offset)

    def close(self, ours, mirrored, size, roundings):
        """Check that arrays are equal up to some roundings of terms of a given size, and one to the dtype itself."""
        ours, mirrored = (np.asarray(to_numpy(a), np.float64) for a in (ours, mirrored))
        bound = roundings * self.unit * (np.abs(mirrored) + size) + 2 * HALF_ULP[self.x.dtype.name] * np.abs(mirrored)
        error = np.abs(ours - mirrored)
        assert np.all(error <= bound), f"off by {np.max(error)} where {np.min(bound)} and more is allowed"


class Back(NamedTuple):
    """The arguments that all steps of the way back begin with."""

    dy: Any
    x: Any
    statistics: Statistics
    affine: Affine
    epilogue: Epilogue  # the activation and the record alone


def ways_back(arrays, out=None, y=None):
    """The ways back on the device and on the host, from running statistics, so that both have the same bits.

    The ways forward write their outputs to `out` and `y`.
    """
    out, y = arrays.empty() if out is None else out, np.empty_like(arrays.x) if y is None else y
    ours = arrays.on_device("dy", "x", "affine", "running", "epilogue")
    theirs = arrays.dy, arrays.x, arrays.affine, arrays.running, arrays.epilogue
    return _way_back(cupy_ops, *ours, out), _way_back(numpy_ops, *theirs, y)


def _way_back(ops, dy, x, affine, running, epilogue, out):
    """The arguments of the way back, after a way forward that has written the record if there is one."""
    residual, activation, _, _ = epilogue
    passed = None if residual is None or activation is None else ops.empty_passed(x, residual, out)
    statistics = ops.bn_normalize(x, None, affine, running, epilogue._replace(passed=passed), out)
    return Back(dy, x, statistics, affine, Epilogue(None, activation, passed))


def forget_plans():
    """Forget all plans and tapes of launches, since they hold for the devices and settings of their time."""
    of_norms = cupy_norms.row_plan, norms_last.plans_of
    for cached in (plans.streamed_plan, plans.resident_plan, plans.properties_of, cupy_dropout._plan, *of_norms):
        cached.cache_clear()
    call._cache.clear()
    dropout_call._cache.clear()
