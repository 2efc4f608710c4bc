"""NaN, inf, zeros and the limits of dtypes through every kernel: what NumPy makes of them, or what must come out."""

from __future__ import annotations

import cupy as cp
import numpy as np
import pytest

import cupybn.functional as F
from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Sums
from tests.reference import DTYPES, bits, to_numpy
from tests.steps import Arrays, each_array, ways_back

SHAPES = [(4, 5, 49), (3, 5, 16), (57, 5, 1), (12, 16, 1)]
"""Rows of single elements and of whole packs; likewise channels last."""
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
"""What a GPU's arithmetic makes of all NaN: its bits, rounded up like those of a number, are those of -0."""

ANYTHING = [1, -1, np.inf, -np.inf, np.nan]

on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture(params=[1.0, 2.0**-130], ids=["", "wide"])
def var(request):
    """Two running variances: an ordinary one, and one so small that arithmetic is float64."""
    return request.param


def same(ours, theirs):
    """Check equality to the bit, but for the kind of NaN, and the sign of zeros."""
    np.testing.assert_array_equal(to_numpy(ours).astype(np.float64), to_numpy(theirs).astype(np.float64))


def on_both(call, *arrays):
    """The results of a call of the public functions, on the device and on the host."""
    return (
        call(*(None if a is None else cp.asarray(a) for a in arrays)),
        call(*(None if a is None else a.copy() for a in arrays)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize("activation", [None, "relu"])
@in_both_modes
@on_dtypes
@on_shapes
def test_nan_stays_nan(way, rng, shape, dtype, training, activation, var):
    """NaN of any payload stays NaN on its way to any dtype; where ReLU sees it, its gradient stops."""
    arrays = Arrays(rng, shape, dtype, 0)
    x, dy, mean = map(way.asarray, (arrays.x, arrays.dy, arrays.running.mean))
    var = way.full(shape[1], var)
    weight, bias = np.ones((2, shape[1]), np.float32)
    bias[0] = weight[1] = bias[2] = weight[2] = NAN
    weight, bias = map(way.asarray, (weight, bias))
    y, vjp_fn = F.batch_norm_vjp(x, mean, var, weight, bias, training, 0.1, 1e-60, activation=activation)
    nan = np.isnan(to_numpy(y).astype(np.float64))
    assert nan[:, :3].all()
    assert not nan[:, 3:].any()
    dx, dweight, dbias, _ = (None if g is None else to_numpy(g).astype(np.float64) for g in vjp_fn(dy))
    assert not np.isnan(dx[:, [0, *range(3, shape[1])]]).any()
    assert np.isnan(dx[:, 1:3]).all()
    assert not np.isnan([dweight, dbias]).any()


@pytest.mark.parametrize(
    ("dtype", "payload"),
    [(DTYPES[0], bits) for bits in (0x7FFF, 0xFFFF, 0x7E00)] + [(DTYPES[1], bits) for bits in (0x7FFF, 0xFFFF, 0x7FC0)],
    ids=str,
)
@on_shapes
def test_nan_of_16_bits_in_the_input(way, rng, shape, dtype, payload):
    """NaN arrives, also in running statistics of 16 bits, and in the gradients of what comes back."""
    nan = np.uint16(payload).view(dtype)
    arrays = Arrays(rng, shape, dtype, 0)
    arrays.x[0, 1, 0] = arrays.dy[0, 2, 0] = nan
    running = [way.zeros(shape[1], dtype) for _ in range(2)]
    weight, bias = (way.ones(shape[1], dtype) for _ in range(2))
    y, vjp_fn = F.batch_norm_vjp(way.asarray(arrays.x), *running, weight, bias, True)
    grads = [np.isnan(to_numpy(g).astype(np.float64)) for g in vjp_fn(way.asarray(arrays.dy))[:3]]
    spoilt = [np.isnan(to_numpy(v).astype(np.float64)) for v in (y, *running)]
    for array, touched in zip((*spoilt, *grads), ([1], [1], [1], [1, 2], [1, 2], [2]), strict=True):
        by_channel = array if array.ndim == 1 else array.any((0, 2))
        assert np.flatnonzero(by_channel).tolist() == touched
    assert spoilt[0][:, 1].all()


# ---------------------------------------------------------------------------------------------------------------------
# What ReLU stops


@pytest.mark.parametrize("has_residual", [False, True], ids=["recomputed", "record"])
@on_dtypes
@on_shapes
def test_relu_stops_at_exactly_zero_whatever_comes_back(way, rng, shape, dtype, has_residual, var):
    """Gradients are those of a dy that is 0 there: 0 * inf would be NaN.

    Values are integers about a running mean of 1, and rstd is a power of two: all sums are exact.
    """
    C = shape[1]
    x = rng.integers(0, 3, shape).astype(dtype)
    mean, var = np.ones(C), np.full(C, var)
    sign = np.where(np.arange(C) % 2, -1, 1)  # -0 is no more than 0
    weight, bias = (sign * np.sqrt(var)).astype(np.float32), np.zeros(C, np.float32)
    y = (x.astype(np.float64) - 1) * sign[:, None]
    residual = None
    if has_residual:
        residual = np.where(rng.random(shape) < 0.5, -y, 1).astype(dtype)
        y += residual
    assert 0.1 < np.mean(y == 0) < 0.9
    dy = rng.integers(1, 4, shape).astype(dtype)
    results = []
    for stopped in rng.choice(ANYTHING, shape), np.zeros(shape):
        dy = np.where(y > 0, dy, stopped).astype(dtype)
        given = [None if a is None else way.asarray(a) for a in (x, mean, var, weight, bias, residual, dy)]
        out, vjp_fn = F.batch_norm_vjp(*given[:5], eps=0.0, residual=given[5], activation="relu")
        same(out, np.maximum(y, 0))
        results.append(vjp_fn(given[6]))
    assert bits(*results[0]) == bits(*results[1])
    dx, dweight, dbias, dresidual = (None if g is None else to_numpy(g).astype(np.float64) for g in results[0])
    g = np.where(y > 0, dy.astype(np.float64), 0)
    same(dx, g * sign[:, None])
    assert residual is None or np.array_equal(dresidual, g)
    same(dbias, g.sum((0, 2)))
    same(dweight, ((g * (x.astype(np.float64) - 1)).sum((0, 2)) / np.sqrt(var)).astype(np.float32))


@pytest.mark.parametrize("has_residual", [False, True], ids=["recomputed", "record"])
@on_dtypes
@on_shapes
def test_relu_stops_a_constant_channel_in_training(way, rng, shape, dtype, has_residual):
    """The output of the channel is exactly bias: nothing passes where that is 0."""
    C = shape[1]
    x = rng.standard_normal(shape).astype(dtype)
    x[:, 1] = 7
    residual = way.zeros(shape, dtype) if has_residual else None
    dy = rng.standard_normal(shape).astype(dtype)
    dy[:, 1] = rng.choice(ANYTHING, dy[:, 1].shape)
    weight, bias = way.ones(C, np.float32), way.zeros(C, np.float32)
    y, vjp_fn = F.batch_norm_vjp(way.asarray(x), None, None, weight, bias, True, residual=residual, activation="relu")
    same(y[:, 1], np.zeros(shape[:1] + shape[2:]))
    dx, dweight, dbias, dresidual = (None if g is None else to_numpy(g) for g in vjp_fn(way.asarray(dy)))
    assert not dx[:, 1].any()
    assert dweight[1] == dbias[1] == 0
    assert dresidual is None or not dresidual[:, 1].any()


# ---------------------------------------------------------------------------------------------------------------------
# inf in eval


@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@on_dtypes
@on_shapes
@pytest.mark.usefixtures("either")
def test_statistics_that_are_not_numbers_of_float32(rng, shape, dtype, activation, has_residual):
    """NumPy's bits come out of var + eps = 0, infinite means and variances, weights of 0, inf among the values."""
    arrays = Arrays(rng, shape, dtype, 0, has_residual)
    x, dy = arrays.x, arrays.dy
    x[0] = np.inf
    x[1, :, ::3] = -np.inf
    dy[2, :, ::2] = 0
    mean, var = np.zeros((2, shape[1]))
    var[:5] = 0, 1, np.inf, 0, 1
    mean[:5] = 0, np.inf, 0, -np.inf, 1e35
    var[5:], mean[5:] = 1, 0
    x[2:, 0, ::2] = 0  # (x - mean) * rstd is 0 * inf
    (weight, bias, _), residual = arrays.affine, arrays.epilogue.residual
    weight[shape[1] // 2] = 0

    def both_ways(x, dy, mean, var, weight, bias, residual):
        y, vjp_fn = F.batch_norm_vjp(x, mean, var, weight, bias, eps=0.0, residual=residual, activation=activation)
        return y, *vjp_fn(dy)

    ours, theirs = on_both(both_ways, x, dy, mean, var, weight, bias, residual)
    for name, a, b in zip(("y", "dx", "dweight", "dbias", "dresidual"), ours, theirs, strict=True):
        if b is None:
            assert a is None
        elif b.ndim == 1:  # sums of another order; of xhat, 0 * inf is that of factors
            some = var > 0 if name == "dweight" else ...
            np.testing.assert_allclose(to_numpy(a)[some], b[some], rtol=1e-3, err_msg=name)
        else:
            same(a, b)


@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@on_dtypes
@pytest.mark.parametrize("shape", [(4, 5, 49), (57, 5, 1)], ids=str)
def test_special_values_anywhere(rng, shape, dtype, activation, has_residual):
    """NaN, inf, the largest and the smallest numbers, in eval: what the mirror has, but for subnormal results."""
    arrays = Arrays(rng, shape, dtype, 0, has_residual, activation)
    largest = 65504.0 if dtype.name == "float16" else 3.3e38
    values = np.array([np.nan, np.inf, -np.inf, largest, -largest, 0.0, -0.0, 2.0**-14])
    for array in (arrays.x, arrays.dy, *([arrays.epilogue.residual] if has_residual else [])):
        where = rng.random(shape) < 0.3
        array[where] = rng.choice(values, where.sum()).astype(dtype)
    arrays.affine.weight[:2], arrays.running.mean[2:4] = (1e35, -1e-35), (3e38, -1e-20)
    out, y = arrays.empty(), np.empty_like(arrays.x)
    ours, theirs = ways_back(arrays, out, y)
    expected, gradients = (Gradients(*both[:2]) for both in arrays.gradients())
    cupy_ops.bn_backward_input(*ours, None, 0.0, gradients)
    numpy_ops.bn_backward_input(*theirs, None, 0.0, expected)
    for a, b in (out, y), (gradients.dx, expected.dx), (gradients.dresidual, expected.dresidual):
        np.testing.assert_allclose(to_numpy(a).astype(np.float64), b.astype(np.float64), rtol=0, atol=2.0**-126)


# ---------------------------------------------------------------------------------------------------------------------
# Near the limits of float32

LIMITS = {  # size of mean, var, weight, bias, sum(dy), sum(dy * xhat): what float64 is for, each alone
    "ordinary": (1, 1, 1, 1, 1, 1),
    "rstd small": (1, 1e31, 1e10, 1, 1, 1e10),
    "rstd large": (1, 1e-31, 1e-10, 1, 1, 1e-10),
    "scale small": (1, 1, 1e-31, 1, 1, 1),
    "scale large": (1, 1, 1e31, 1, 1, 1),
    "mean large": (1.7e38, 1e16, 1, 1, 1, 1),
    "bias large": (1, 1, 1, 1e31, 1, 1),
    "slope small": (1, 1, 1, 1, 1, 1e-31),
    "slope large": (1, 1, 1, 1, 1, 1e32),
    "offset small": (1e-10, 1, 1, 1, 1e-31, 1e-20),  # the mean has a rest, which counts less
    "offset large": (1, 1, 1, 1, 1e32, 1),
}


@pytest.mark.parametrize("shape", [(4, 11, 49), (57, 11, 1), (16, 11, 1)], ids=str)
@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]], ids=lambda dtype: dtype.name)
def test_float64_is_taken_where_the_mirror_takes_it(rng, shape, dtype):
    """Results agree to the bit, which float32 and float64 do not."""
    mean, var, weight, bias, *sums = np.array(list(LIMITS.values())).T * rng.uniform(1, 2, (6, len(LIMITS)))
    x, dy = rng.standard_normal((2, *shape))
    if dtype == np.float32:
        x = x * np.sqrt(var[:, None]) + mean[:, None]
        x[1::2] *= -1  # as far from the mean as can be
    x, dy = x.astype(dtype), dy.astype(dtype)
    affine, running = Affine(weight.astype(np.float32), bias.astype(np.float32), 0.0), Running(mean, var)
    arguments = x, dy, affine, running, Sums(*(v[None] for v in sums))
    results = []
    for ops, xp in (numpy_ops, np), (cupy_ops, cp):
        x, dy, affine, running, sums = (each_array(xp.asarray, argument) for argument in arguments)
        y, dx = (xp.zeros(shape, dtype) for _ in range(2))
        statistics = ops.bn_normalize(x, None, affine, running, Epilogue(), y)
        ops.bn_backward_input(dy, x, statistics, affine, Epilogue(), sums, 0.1, Gradients(dx))
        results.append((y, dx))
    for theirs, ours in zip(*results, strict=True):
        for c, name in enumerate(LIMITS):
            np.testing.assert_array_equal(
                to_numpy(ours)[:, c].astype(np.float64), theirs[:, c].astype(np.float64), err_msg=name
            )


@pytest.mark.parametrize("shape", [(64, 32, 64), (512, 32)], ids=str)
def test_relu_decides_as_on_the_way_forward(way, rng, shape):
    """What ReLU passes does not depend on the size of dy, for which the way back may take float64.

    The bias takes an element of each channel to 0, but for roundings.
    """
    x = way.asarray((rng.standard_normal(shape) * 2 + 3).astype(np.float32))
    weight = way.asarray(rng.uniform(0.5, 2, shape[1]).astype(np.float32))
    bias = -F.batch_norm(x, None, None, weight, None, True)[0].reshape(shape[1], -1)[:, 0].copy()
    y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, bias, True, activation="relu")
    _, without_relu = F.batch_norm_vjp(x, None, None, weight, bias, True)
    passed = to_numpy(y) > 0
    for size in 1, 1e-32:
        dy = np.full(shape, size, np.float32)
        expected = without_relu(way.asarray(np.where(passed, dy, 0)))
        assert bits(*vjp_fn(way.asarray(dy))[:3]) == bits(*expected[:3])
