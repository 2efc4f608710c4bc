"""Arguments of the steps, on the host and on the device, for tests that hold kernels to their mirrors."""

from __future__ import annotations

from typing import NamedTuple

import cupy as cp
import numpy as np

from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.bundles import Statistics
from tests.reference import HALF_ULP, to_numpy

EPS = 1e-3


def to_device(array, offset=0):
    """A copy on the device whose memory begins some elements after an aligned address."""
    if array is None:
        return None
    memory = cp.empty(array.size + offset, array.dtype)
    view = memory[offset:].reshape(array.shape)
    view[...] = cp.asarray(array)
    return view


class Arrays:
    """Random arguments of all steps, on the host and on the device."""

    def __init__(self, rng, shape, dtype, offset, has_residual=False):
        self.offset = offset
        C = shape[1]
        self.x = (rng.standard_normal(shape) * 2 + 3).astype(dtype)
        self.dy = rng.standard_normal(shape).astype(dtype)
        self.residual = rng.standard_normal(shape).astype(dtype) if has_residual else None
        self.weight, self.bias, self.mean = rng.standard_normal((3, C)).astype(np.float32)
        self.var = rng.uniform(0.5, 2, C)
        self.unit = 2 * HALF_ULP["float64" if dtype == np.float64 else "float32"]  # of the arithmetic

    def on_device(self, *names):
        return [to_device(getattr(self, name), self.offset) for name in names]

    def empty(self):
        return to_device(np.zeros_like(self.x), self.offset)

    def close(self, ours, mirrored, size, roundings):
        """Up to some roundings of terms of this size, and one of the dtype itself."""
        ours, mirrored = (np.asarray(to_numpy(a), np.float64) for a in (ours, mirrored))
        bound = roundings * self.unit * (np.abs(mirrored) + size) + 2 * HALF_ULP[self.x.dtype.name] * np.abs(mirrored)
        error = np.abs(ours - mirrored)
        assert np.all(error <= bound), f"off by {np.max(error)} where {np.min(bound)} and more is allowed"


def to_host(value):
    """A NamedTuple of arrays on the host."""
    return type(value)(*(None if field is None else to_numpy(field) for field in value))


class Way(NamedTuple):
    """The statistics and the mask that a way back starts with, on the host and on the device."""

    statistics: Statistics
    mask: np.ndarray | None

    @classmethod
    def of(cls, arrays, ops, x, weight, bias, residual, activation, out):
        """From running statistics, so that all have the same bits."""
        xp = np if ops is numpy_ops else cp
        mask = None if residual is None or activation is None else ops.empty_mask(x, residual, out)
        running = xp.asarray(arrays.mean), xp.asarray(arrays.var)
        return cls(
            ops.bn_normalize(x, None, EPS, weight, bias, residual, activation, *running, 0, None, out, mask), mask
        )


def ways(arrays, activation):
    """The first arguments of steps of the way back, on the device and on the host."""
    dy, x, residual, weight, bias = arrays.on_device("dy", "x", "residual", "weight", "bias")
    ours = Way.of(arrays, cupy_ops, x, weight, bias, residual, activation, arrays.empty())
    host = (arrays.x, arrays.weight, arrays.bias, arrays.residual, activation, np.empty_like(arrays.x))
    theirs = Way.of(arrays, numpy_ops, *host)
    return (
        (dy, x, ours.statistics, EPS, weight, bias, activation, ours.mask),
        (arrays.dy, arrays.x, theirs.statistics, EPS, arrays.weight, arrays.bias, activation, theirs.mask),
    )


def forget_plans():
    """Of devices and settings that are no more."""
    for cached in (cupy_ops._plan, cupy_ops._resident_plan, cupy_ops._device):
        cached.cache_clear()
