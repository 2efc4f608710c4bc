"""Each step of batch norm on its own: the mirrors that specify the kernels, against the textbook in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cupybn import numpy_ops as ops
from cupybn._moments import Moments
from tests import reference

SHAPES = [
    (1, 3, 2),  # two values per channel
    (5, 4, 1),  # (M, C)
    (7, 3, 49),  # short rows
    (3, 2, 5001),  # long rows
    (4099, 3, 1),  # channels last, joined rows and a rest
    (20, 9, 777),
]
EPS = 1e-3


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture
def x(shape, rng):
    return rng.normal(3, 2, shape).astype(np.float32)


@pytest.fixture
def dy(shape, rng):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def residual(shape, rng):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def affine(shape, rng):
    return rng.normal(1, 1, shape[1]).astype(np.float32), rng.standard_normal(shape[1]).astype(np.float32)


def test_bn_stats(x):
    moments, expected = ops.bn_stats(x), reference.batch_norm(x)
    assert moments.count == x.size // x.shape[1]
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(moments.var, expected.var, rtol=3e-7)


@pytest.mark.parametrize("center", [1e6, np.inf, np.nan])
def test_bn_stats_where_a_few_values_mislead(x, center, monkeypatch):
    """A center far from the mean: the channel is done again."""
    monkeypatch.setattr(ops, "_sample_mean", lambda x: np.array([center] + [0.0] * (x.shape[1] - 1)))
    moments, expected = ops.bn_stats(x), reference.batch_norm(x)
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(moments.var, expected.var, rtol=1e-6)
    np.testing.assert_allclose(moments.var[0], expected.var[0], rtol=1e-13)


def test_moments_of_parts_merge_to_those_of_the_whole(x):
    whole = ops.bn_stats(x)
    cut = x.shape[0] // 3
    merged = Moments(0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    assert merged.merge(merged) is merged
    for part in (x[:cut], x[cut:]):
        if part.size:
            merged = merged.merge(ops.bn_stats(np.ascontiguousarray(part)))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-7)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=3e-7)
    np.testing.assert_allclose(merged.unbiased_var, merged.m2 / (merged.count - 1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_bn_update_running(dtype, momentum):
    moments = Moments(5, np.array([2.0, -1.0]), np.array([8.0, 0.0]))
    running_mean, running_var = np.array([10, 20], dtype), np.array([1, 3], dtype)
    ops.bn_update_running(moments, running_mean, running_var, momentum, None)
    expected_mean = np.array([(1 - momentum) * 10 + momentum * 2, (1 - momentum) * 20 - momentum])
    expected_var = np.array([(1 - momentum) + momentum * 2, (1 - momentum) * 3])
    assert running_mean.dtype == dtype
    np.testing.assert_array_equal(running_mean, expected_mean.astype(dtype))
    np.testing.assert_array_equal(running_var, expected_var.astype(dtype))


def test_bn_update_running_takes_the_mean_of_all_batches_without_momentum():
    running_mean, running_var, counter = np.zeros(1), np.ones(1), np.array(0)
    for value in 1.0, 2.0, 6.0:
        moments = Moments(2, np.array([value]), np.array([value]))
        ops.bn_update_running(moments, running_mean, running_var, None, counter)
    assert counter == 3
    np.testing.assert_allclose([running_mean[0], running_var[0]], 3)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_normalize(x, residual, affine, activation, with_residual):
    residual = residual if with_residual else None
    out = np.full_like(x, np.nan)
    ops.bn_normalize(x, ops.bn_stats(x), EPS, *affine, residual, activation, out)
    expected = reference.batch_norm(x, *affine, eps=EPS, residual=residual, relu=activation == "relu").y
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["x", "residual"])
def test_bn_normalize_in_place(x, residual, affine, target):
    moments, out = ops.bn_stats(x), np.empty_like(x)
    ops.bn_normalize(x, moments, EPS, *affine, residual, "relu", out)
    arrays = {"x": x.copy(), "residual": residual.copy()}
    ops.bn_normalize(arrays["x"], moments, EPS, *affine, arrays["residual"], "relu", arrays[target])
    np.testing.assert_array_equal(arrays[target], out)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("running", [None, (2.5, 3.5)], ids=["training", "eval"])
def test_bn_backward_reduce_and_bn_backward_input(x, dy, residual, affine, activation, running):
    C = x.shape[1]
    running = None if running is None else tuple(np.full(C, v) for v in running)
    moments = ops.bn_stats(x) if running is None else ops.constants(*running)
    expected = reference.batch_norm(
        x, *affine, running=running, eps=EPS, residual=residual, relu=activation == "relu", dy=dy
    )
    arguments = (dy, x, moments, EPS, *affine, residual, activation)
    sums = ops.bn_backward_reduce(*arguments)
    terms = np.abs(dy).sum((0, 2), dtype=np.float64)
    assert np.all(np.abs(sums.dy - expected.dbias) <= 1e-6 * terms)
    assert np.all(np.abs(sums.dy_xhat - expected.dweight) <= 3e-6 * terms)

    dx, dresidual, dweight, dbias = (np.full_like(a, np.nan) for a in (x, x, *affine))
    inv_count = 1 / moments.count if running is None else 0.0
    ops.bn_backward_input(*arguments, sums, inv_count, dx, dresidual, dweight, dbias)
    size = np.abs(expected.dx).max((0, 2)) + np.abs(affine[0]) * np.abs(dy).max((0, 2))
    assert np.all(np.abs(dx - expected.dx) <= 2e-6 * size[:, None])
    np.testing.assert_array_equal(dresidual, expected.dresidual)
    np.testing.assert_array_equal(dweight, sums.dy_xhat.astype(np.float32))
    np.testing.assert_array_equal(dbias, sums.dy.astype(np.float32))


def test_bn_backward_input_in_eval_does_not_look_at_x(x, dy, affine):
    """Statistics that do not depend on x leave dx = dy * weight * rstd, also where x is inf."""
    C = x.shape[1]
    x[0, 0, 0] = np.inf
    dx = np.empty_like(x)
    moments = ops.constants(np.zeros(C), np.full(C, 4.0))
    ops.bn_backward_input(dy, x, moments, 0.0, affine[0], None, None, None, None, 0.0, dx, None, None, None)
    np.testing.assert_allclose(dx, dy * (affine[0] / 2)[:, None], rtol=1e-6)


def test_relu_stops_inf_and_nan_in_the_gradient(rng):
    x = rng.standard_normal((4, 2, 3)).astype(np.float32)
    moments, dy = ops.bn_stats(x), np.full_like(x, np.inf)
    y = np.empty_like(x)
    ops.bn_normalize(x, moments, EPS, None, None, None, "relu", y)
    dy[y > 0] = 1
    sums = ops.bn_backward_reduce(dy, x, moments, EPS, None, None, None, "relu")
    np.testing.assert_array_equal(sums.dy, (y > 0).sum((0, 2)))
