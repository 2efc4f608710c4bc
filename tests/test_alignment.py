"""One array alone that is not aligned: whichever it is, the kernels read and write it as they do the others."""

from __future__ import annotations

import math

import cupy as cp
import numpy as np
import pytest

from cupybn._steps import cupy_ops
from cupybn._steps.bundles import Statistics, Sums
from tests.reference import DTYPES, bits, to_numpy
from tests.steps import EPS, Arrays, to_device

SHAPES = [(4, 3, 16), (3, 5, 49), (1029, 3, 1), (45, 16, 1)]
"""Rows of whole packs, and of single elements."""


def offsets():
    """By 2, 4 and 8 bytes, where elements are not larger: to packs of so many bytes, where rows allow it."""
    for dtype in DTYPES:
        for nbytes in 2, 4, 8:
            if nbytes >= dtype.itemsize:
                yield pytest.param(dtype, nbytes // dtype.itemsize, id=f"{dtype.name}, {nbytes} bytes")


on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_offsets = pytest.mark.parametrize(("dtype", "offset"), list(offsets()))


class Shifted(Arrays):
    """Arguments of which those named in `roles` are not aligned."""

    def __init__(self, rng, shape, dtype, offset, roles=()):
        super().__init__(rng, shape, dtype, offset, has_residual=True)
        self.roles = roles

    def get(self, role):
        """An argument on the device; an output if there is none of this name."""
        array = getattr(self, role, np.zeros_like(self.x))
        array = to_device(array, self.offset if role in self.roles else 0)
        assert array.ndim == 1 or (array.data.ptr % 16 != 0) == (role in self.roles)
        return array

    def vectors(self):
        return [cp.asarray(v) for v in (self.weight, self.bias)]

    def statistics(self):
        return Statistics(*(cp.asarray(v.astype(np.float64)) for v in (self.mean, self.var)))


def normalize(arrays, masked):
    """Of running statistics: what each element gets depends on nothing else."""
    x, residual, out = map(arrays.get, ("x", "residual", "out"))
    mask = cupy_ops.empty_mask(x, residual, out) if masked else None
    if "mask" in arrays.roles:
        mask = cp.empty(mask.size + arrays.offset * x.itemsize, mask.dtype)[-mask.size :].reshape(mask.shape)
    running = map(cp.asarray, (arrays.mean, arrays.var))
    cupy_ops.bn_normalize(
        x, None, EPS, *arrays.vectors(), residual, "relu" if masked else None, *running, 0, None, out, mask
    )
    return out, mask


def backward_input(arrays, inv_count, mask=None):
    """With the mask of a way there whose arrays were aligned, or recomputed."""
    dy, x, dx, dresidual = map(arrays.get, ("dy", "x", "dx", "dresidual"))
    C = x.shape[1]
    sums = Sums(cp.arange(C, dtype=np.float64)[None], cp.ones((1, C)))
    step = (dy, x, arrays.statistics(), EPS, *arrays.vectors(), "relu", mask)
    cupy_ops.bn_backward_input(*step, sums, inv_count, dx, dresidual, None, None)
    return dx, dresidual


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("role", ["x", "residual", "out"])
@on_offsets
@on_shapes
def test_bn_normalize(shape, dtype, offset, role, masked):
    expected, _ = normalize(Shifted(np.random.default_rng(0), shape, dtype, offset), masked)
    out, mask = normalize(Shifted(np.random.default_rng(0), shape, dtype, offset, (role,)), masked)
    assert bits(out) == bits(expected)
    if masked:
        width = math.gcd(offset, shape[2] if shape[2] > 1 else shape[1])
        assert mask.dtype == (np.uint8 if width > 1 else np.bool_)
        assert mask.size == out.size // width


@pytest.mark.parametrize("role", ["dy", "x", "dx", "dresidual", "mask"])
@on_offsets
@on_shapes
def test_bn_backward_input(shape, dtype, offset, role):
    """Masks of packs are the way there's whose arrays were aligned, as its gradients are: dy alone can be otherwise."""
    aligned, shifted = (Shifted(np.random.default_rng(0), shape, dtype, offset, roles) for roles in ((), (role,)))
    masks = [normalize(arrays, masked=True)[1] for arrays in (aligned, shifted if role == "mask" else aligned)]
    for inv_count in 0.0, 0.01:
        for expected, ours in [(None, None), masks] if role in ("dy", "mask") else [(None, None)]:
            results = backward_input(aligned, inv_count, expected), backward_input(shifted, inv_count, ours)
            assert bits(*results[0]) == bits(*results[1])


@on_offsets
@on_shapes
def test_bn_backward_reduce(shape, dtype, offset):
    """By itself, as where the batch is spread over ranks: the mask of a way there whose arrays were aligned."""
    aligned, shifted = (Shifted(np.random.default_rng(0), shape, dtype, offset, roles) for roles in ((), ("dy",)))
    mask = normalize(aligned, masked=True)[1]

    def sums(arrays):
        dy, x = map(arrays.get, ("dy", "x"))
        return cupy_ops.bn_backward_reduce(dy, x, arrays.statistics(), EPS, *arrays.vectors(), "relu", mask)

    assert bits(*sums(aligned)) == bits(*sums(shifted))


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("role", ["x", "residual", "out"])
@on_offsets
@on_shapes
@pytest.mark.usefixtures("either")
def test_bn_forward(shape, dtype, offset, role, masked):
    def forward(roles):
        arrays = Shifted(np.random.default_rng(0), shape, dtype, offset, roles)
        x, residual, out = map(arrays.get, ("x", "residual", "out"))
        mask = cupy_ops.empty_mask(x, residual, out) if masked else None
        step = (EPS, *arrays.vectors(), residual, "relu" if masked else None, None, None, 0, None)
        cupy_ops.bn_forward(x, *step, out, mask)
        return arrays, out

    (_, expected), (arrays, out) = forward(()), forward((role,))
    arrays.close(out, to_numpy(expected), 1 + np.abs(arrays.weight[:, None]), 16)


@pytest.mark.parametrize(
    ("role", "masked"),
    [("dy", False), ("x", False), ("dx", False), ("dresidual", False), ("dy", True), ("mask", True)],
)
@on_offsets
@on_shapes
@pytest.mark.usefixtures("either")
def test_bn_backward(shape, dtype, offset, role, masked):
    """Sums add in another order, of packs of another width."""

    def backward(roles):
        arrays = Shifted(np.random.default_rng(0), shape, dtype, offset, roles)
        mask = None
        if masked:
            of_mask = tuple({"mask"} & {*roles})
            mask = normalize(Shifted(np.random.default_rng(0), shape, dtype, offset, of_mask), masked=True)[1]
        dy, x, dx, dresidual = map(arrays.get, ("dy", "x", "dx", "dresidual"))
        dweight, dbias = cp.empty((2, shape[1]))
        step = (dy, x, arrays.statistics(), EPS, *arrays.vectors(), "relu", mask)
        cupy_ops.bn_backward(*step, shape[1] / x.size, dx, dresidual, dweight, dbias)
        return arrays, (dx, dresidual, dweight, dbias)

    (_, expected), (arrays, (dx, dresidual, dweight, dbias)) = backward(()), backward((role,))
    assert bits(dresidual) == bits(expected[1])
    arrays.close(dx, to_numpy(expected[0]), np.abs(arrays.weight[:, None]) * 8, 32)
    terms = np.abs(arrays.dy.astype(np.float64)).sum((0, 2))
    xhat = np.abs(arrays.x.astype(np.float64) - arrays.mean[:, None]).max((0, 2)) / np.sqrt(arrays.var + EPS)
    for ours, theirs, size in (dbias, expected[3], terms), (dweight, expected[2], terms * xhat):
        assert np.all(np.abs(to_numpy(ours) - to_numpy(theirs)) <= 32 * arrays.unit * size)
