"""One array alone that is not aligned: whichever it is, the kernels read and write it as they do the others."""

from __future__ import annotations

import math

import cupy as cp
import numpy as np
import pytest

from cupybn._steps import cupy_ops
from cupybn._steps.bundles import Epilogue, Gradients, Running, Sums
from tests.reference import DTYPES, bits, to_numpy
from tests.steps import EPS, Arrays, Back, to_device

SHAPES = [(4, 3, 16), (3, 5, 49), (1029, 3, 1), (45, 16, 1)]
"""Shapes with rows of whole packs, and with rows of single elements."""


def cases():
    """Every shape, each dtype, and an array that lies 2, 4 or 8 bytes off: packs have so many, where rows allow it."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for nbytes in 2, 4, 8:
                if nbytes >= dtype.itemsize:
                    case = shape, dtype, nbytes // dtype.itemsize
                    yield pytest.param(*case, id=f"{shape}, {dtype.name}, {nbytes} bytes")


on_cases = pytest.mark.parametrize(("shape", "dtype", "offset"), list(cases()))
in_turns = pytest.mark.parametrize("role", ["x", "residual", "out"])
masked_or_not = pytest.mark.parametrize("noted", [False, True], ids=["", "passed"])


class Shifted(Arrays):
    """Arguments of which those named in `roles` are not aligned."""

    def __init__(self, shape, dtype, offset, *roles):
        super().__init__(np.random.default_rng(0), shape, dtype, offset, has_residual=True)
        self.roles = roles

    def get(self, *roles):
        """Arguments on the device; outputs where there are none of these names."""
        for role in roles:
            array = {"x": self.x, "dy": self.dy, "residual": self.epilogue.residual}.get(role, np.zeros_like(self.x))
            array = to_device(array, self.offset if role in self.roles else 0)
            assert (array.data.ptr % 16 != 0) == (role in self.roles)
            yield array

    def back(self, passed):
        """The arguments that all steps of the way back begin with; without a record ReLU is recomputed."""
        statistics, affine = to_device(self.statistics), to_device(self.affine)
        return Back(*self.get("dy", "x"), statistics, affine, Epilogue(None, "relu", passed))


def forward(arrays, noted, step):
    """Output and passed of a step, which is called with x, the affine and the epilogue, and the output."""
    x, residual, out = arrays.get("x", "residual", "out")
    passed = cupy_ops.empty_passed(x, residual, out) if noted else None
    if "passed" in arrays.roles:
        passed = cp.empty(passed.size + arrays.offset * x.itemsize, passed.dtype)[-passed.size :].reshape(passed.shape)
    step(x, to_device(arrays.affine), Epilogue(residual, "relu" if noted else None, passed), out)
    return out, passed


def normalize(arrays, noted):
    """Output and passed from running statistics: what each element gets depends on nothing else."""
    running = to_device(arrays.running)
    return forward(
        arrays, noted, lambda x, affine, epilogue, out: cupy_ops.bn_normalize(x, None, affine, running, epilogue, out)
    )


def backward_input(arrays, inv_count, passed=None):
    """Gradients of input and residual, with the record of a way forward or without one."""
    gradients = Gradients(*arrays.get("dx", "dresidual"))
    C = arrays.x.shape[1]
    sums = Sums(cp.arange(C, dtype=np.float64)[None], cp.ones((1, C)))
    cupy_ops.bn_backward_input(*arrays.back(passed), sums, inv_count, gradients)
    return gradients[:2]


@masked_or_not
@in_turns
@on_cases
def test_bn_normalize(shape, dtype, offset, role, noted):
    expected, _ = normalize(Shifted(shape, dtype, offset), noted)
    out, passed = normalize(Shifted(shape, dtype, offset, role), noted)
    assert bits(out) == bits(expected)
    if noted:
        width = math.gcd(offset, shape[2] if shape[2] > 1 else shape[1])
        assert passed.dtype == (np.uint8 if width > 1 else np.bool_)
        assert passed.size == out.size // width


@pytest.mark.parametrize("role", ["dy", "x", "dx", "dresidual", "passed"])
@on_cases
def test_bn_backward_input(shape, dtype, offset, role):
    """A record of packs is of a way forward whose arrays were aligned, as gradients are: dy alone can be otherwise."""
    aligned, shifted = Shifted(shape, dtype, offset), Shifted(shape, dtype, offset, role)
    records = [normalize(arrays, noted=True)[1] for arrays in (aligned, shifted if role == "passed" else aligned)]
    for inv_count in 0.0, 0.01:
        for expected, ours in [(None, None), records] if role in ("dy", "passed") else [(None, None)]:
            results = backward_input(aligned, inv_count, expected), backward_input(shifted, inv_count, ours)
            assert bits(*results[0]) == bits(*results[1])


@on_cases
def test_bn_backward_reduce(shape, dtype, offset):
    """The step alone, as where the batch is spread over ranks: the way forward, which made its record, was aligned."""
    aligned, shifted = Shifted(shape, dtype, offset), Shifted(shape, dtype, offset, "dy")
    passed = normalize(aligned, noted=True)[1]
    ours, expected = (cupy_ops.bn_backward_reduce(*arrays.back(passed)) for arrays in (shifted, aligned))
    assert bits(*ours) == bits(*expected)


@masked_or_not
@in_turns
@on_cases
@pytest.mark.usefixtures("either")
def test_bn_forward(shape, dtype, offset, role, noted):
    arrays = Shifted(shape, dtype, offset, role)

    def step(x, affine, epilogue, out):
        cupy_ops.bn_forward(x, affine, Running(), epilogue, out)

    (out, _), (expected, _) = forward(arrays, noted, step), forward(Shifted(shape, dtype, offset), noted, step)
    arrays.close(out, to_numpy(expected), 1 + np.abs(arrays.affine.weight[:, None]), 16)


@pytest.mark.parametrize(
    ("role", "noted"),
    [
        *((name, False) for name in ("dy", "x", "dx", "dresidual")),
        *((name, True) for name in ("dy", "passed", "residual")),
    ],
)
@on_cases
@pytest.mark.usefixtures("either")
def test_bn_backward(shape, dtype, offset, role, noted):
    """Sums add in another order, of packs of another width: with a record, those of the way forward that made it."""

    def backward(*roles):
        arrays = Shifted(shape, dtype, offset, *roles)
        before = Shifted(shape, dtype, offset, *({"passed", "residual"} & {*roles}))
        passed = normalize(before, noted=True)[1] if noted else None
        gradients = Gradients(*arrays.get("dx", "dresidual"), *cp.empty((2, shape[1])))
        cupy_ops.bn_backward(*arrays.back(passed), shape[1] / arrays.x.size, gradients)
        return arrays, gradients

    (_, expected), (arrays, ours) = backward(), backward(role)
    assert bits(ours.dresidual) == bits(expected.dresidual)
    arrays.close(ours.dx, to_numpy(expected.dx), np.abs(arrays.affine.weight[:, None]) * 8, 32)
    mean, var = arrays.statistics.mean, arrays.statistics.var
    terms = np.abs(arrays.dy.astype(np.float64)).sum((0, 2))
    xhat = np.abs(arrays.x.astype(np.float64) - mean[:, None]).max((0, 2)) / np.sqrt(var + EPS)
    for name, size in ("dbias", terms), ("dweight", terms * xhat):
        off = np.abs(to_numpy(getattr(ours, name)) - to_numpy(getattr(expected, name)))
        assert np.all(off <= 32 * arrays.unit * size)
