"""Each step of batch norm on its own: the mirrors that specify the kernels, against the textbook in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cupybn._steps import numpy_ops as ops
from cupybn._steps.bundles import Moments, Statistics, Sums
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


def statistics_of(x):
    return Statistics(*ops.mean_and_var(ops.bn_stats(x), np.float64))


def normalize(x, affine, residual, activation, out, mask=None):
    """In training, without running statistics."""
    moments = ops.bn_stats(x)
    return ops.bn_normalize(x, moments, EPS, *affine, residual, activation, None, None, None, None, out, mask)


def test_bn_stats(x):
    moments, expected = ops.bn_stats(x), reference.batch_norm(x)
    assert moments.count.tolist() == [x.size // x.shape[1]]
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    mean, var = ops.mean_and_var(moments, np.float64)
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(var, expected.var, rtol=3e-7)


def test_bn_stats_copies_the_counter(x):
    counter = np.array(7)
    moments = ops.bn_stats(x, counter)
    counter += 1
    assert moments.batches == 7


@pytest.mark.parametrize("center", [1e6, np.inf, np.nan])
def test_bn_stats_where_a_few_values_mislead(x, center, monkeypatch):
    """A center far from the mean: the channel is done again, about its mean, as the first value may be far from it."""
    monkeypatch.setattr(ops, "_sample_mean", lambda x: np.array([center] + [0.0] * (x.shape[1] - 1)))
    x[0, 0, 0] += 1e5
    (mean, var), expected = statistics_of(x), reference.batch_norm(x)
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(var, expected.var, rtol=1e-6)
    np.testing.assert_allclose(var[0], expected.var[0], rtol=1e-13)


def test_moments_of_parts_merge_to_those_of_the_whole(x):
    """Parts of different sizes, also of one sample."""
    n = x.shape[0]
    cuts = sorted({0, n // 7, n // 3, n - 1, n})
    parts = [ops.bn_stats(np.ascontiguousarray(x[i:j])) for i, j in itertools.pairwise(cuts) if i < j]
    merged = Moments(*(np.concatenate(field) for field in list(zip(*parts, strict=True))[:3]))
    row = ops.merge_moments(merged)
    np.testing.assert_allclose(row, ops.merge_moments(ops.bn_stats(x)), rtol=3e-7)
    np.testing.assert_array_equal(ops.merge_moments(Moments.of_rows(row)), row)


def test_merge_of_parts_of_one_mean_is_exact():
    """Also if a part has no values: its mean counts for nothing."""
    mean = np.full((6, 3), 0.1)
    mean[0] = 0
    moments = Moments.of_rows(ops.merge_moments(Moments(np.array([0, 3.0, 1, 7, 2, 11]), mean, np.zeros((6, 3)))))
    assert moments.count == 24
    np.testing.assert_array_equal(moments.mean, mean[1:2])
    np.testing.assert_array_equal(moments.m2, 0)


@pytest.mark.parametrize("parts", [0, 2])
def test_merge_of_nothing_is_nothing(parts):
    nothing = Moments(np.zeros(parts), np.zeros((parts, 3)), np.zeros((parts, 3)))
    np.testing.assert_array_equal(ops.merge_moments(nothing), np.zeros((1, 7)))


def test_merge_sums(rng):
    dy, dy_xhat = rng.standard_normal((2, 5, 3))
    dweight, dbias = np.empty((2, 3))
    row = ops.merge_sums(Sums(dy, dy_xhat), np.array([4.0]), dweight, dbias)
    np.testing.assert_array_equal((dbias, dweight), (dy.sum(axis=0), dy_xhat.sum(axis=0)))
    np.testing.assert_array_equal(Sums.of_rows(row), (dbias[None] / 4, dweight[None] / 4))
    nothing = ops.merge_sums(Sums(dy[:0], dy_xhat[:0]), np.array([0.0]), dweight, None)
    np.testing.assert_array_equal(nothing, np.zeros((1, 6)))
    np.testing.assert_array_equal(dweight, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_bn_update_running(dtype, momentum):
    batch = Moments(np.array([5.0]), np.array([[2.0, -1.0]]), np.array([[8.0, 0.0]]))
    running_mean, running_var = np.array([10, 20], dtype), np.array([1, 3], dtype)
    ops.bn_update_running(batch, running_mean, running_var, momentum, None)
    expected_mean = np.array([(1 - momentum) * 10 + momentum * 2, (1 - momentum) * 20 - momentum])
    expected_var = np.array([(1 - momentum) + momentum * 2, (1 - momentum) * 3])
    assert running_mean.dtype == dtype
    np.testing.assert_array_equal(running_mean, expected_mean.astype(dtype))
    np.testing.assert_array_equal(running_var, expected_var.astype(dtype))


def test_bn_update_running_takes_the_mean_of_all_batches_without_momentum():
    running_mean, running_var, counter = np.zeros(1), np.ones(1), np.array(0)
    for value in 1.0, 2.0, 6.0:
        batch = Moments(np.array([2.0]), np.array([[value]]), np.array([[value]]), counter)
        ops.bn_update_running(batch, running_mean, running_var, None, counter)
    assert counter == 3
    np.testing.assert_allclose([running_mean[0], running_var[0]], 3)


@pytest.mark.parametrize("count", [0, 1, np.nan])
def test_bn_update_running_leaves_all_alone_without_a_variance(count):
    running_mean, running_var, counter = np.zeros(1), np.ones(1), np.array(0)
    batch = Moments(np.array([float(count)]), np.array([[5.0]]), np.array([[0.0]]))
    ops.bn_update_running(batch, running_mean, running_var, 0.1, counter)
    assert (running_mean, running_var, counter) == (0, 1, 0)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_normalize(x, residual, affine, activation, with_residual):
    residual = residual if with_residual else None
    out = np.full_like(x, np.nan)
    statistics = normalize(x, affine, residual, activation, out)
    np.testing.assert_array_equal(statistics, statistics_of(x))
    expected = reference.batch_norm(x, *affine, eps=EPS, residual=residual, relu=activation == "relu").y
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["x", "residual"])
def test_bn_normalize_in_place(x, residual, affine, target):
    out = np.empty_like(x)
    normalize(x, affine, residual, "relu", out)
    arrays = {"x": x.copy(), "residual": residual.copy()}
    normalize(arrays["x"], affine, arrays["residual"], "relu", arrays[target])
    np.testing.assert_array_equal(arrays[target], out)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("running", [None, (2.5, 3.5)], ids=["training", "eval"])
def test_bn_backward_reduce_and_bn_backward_input(x, dy, residual, affine, activation, running):
    C = x.shape[1]
    running = None if running is None else tuple(np.full(C, v) for v in running)
    statistics = statistics_of(x) if running is None else Statistics(*running)
    expected = reference.batch_norm(
        x, *affine, running=running, eps=EPS, residual=residual, relu=activation == "relu", dy=dy
    )
    mask = ops.empty_mask(x, residual, x)
    ops.bn_normalize(x, None, EPS, *affine, residual, activation, *statistics, None, None, np.empty_like(x), mask)
    arguments = (dy, x, statistics, EPS, *affine, activation, mask)
    sums = ops.bn_backward_reduce(*arguments)
    terms = np.abs(dy).sum((0, 2), dtype=np.float64)
    assert np.all(np.abs(sums.dy[0] - expected.dbias) <= 1e-6 * terms)
    assert np.all(np.abs(sums.dy_xhat[0] - expected.dweight) <= 3e-6 * terms)

    dx, dresidual, dweight, dbias = (np.full_like(a, np.nan) for a in (x, x, *affine))
    inv_count = C / x.size if running is None else 0.0
    ops.bn_backward_input(*arguments, sums, inv_count, dx, dresidual, dweight, dbias)
    size = np.abs(expected.dx).max((0, 2)) + np.abs(affine[0]) * np.abs(dy).max((0, 2))
    assert np.all(np.abs(dx - expected.dx) <= 2e-6 * size[:, None])
    np.testing.assert_array_equal(dresidual, expected.dresidual)
    np.testing.assert_array_equal(dweight, sums.dy_xhat[0].astype(np.float32))
    np.testing.assert_array_equal(dbias, sums.dy[0].astype(np.float32))


def test_bn_backward_input_in_eval_does_not_look_at_x(x, dy, affine):
    """Statistics that do not depend on x leave dx = dy * weight * rstd, also where x is inf."""
    C = x.shape[1]
    x[0, 0, 0] = np.inf
    dx = np.empty_like(x)
    statistics = Statistics(np.zeros(C), np.full(C, 4.0))
    ops.bn_backward_input(dy, x, statistics, 0.0, affine[0], None, None, None, None, 0.0, dx, None, None, None)
    np.testing.assert_allclose(dx, dy * (affine[0] / 2)[:, None], rtol=1e-6)


def test_relu_stops_inf_and_nan_in_the_gradient(rng):
    x = rng.standard_normal((4, 2, 3)).astype(np.float32)
    y, dy = np.empty_like(x), np.full_like(x, np.inf)
    statistics = normalize(x, (None, None), None, "relu", y)
    dy[y > 0] = 1
    sums = ops.bn_backward_reduce(dy, x, statistics, EPS, None, None, "relu", None)
    np.testing.assert_array_equal(sums.dy[0], (y > 0).sum((0, 2)))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_bn_forward_and_bn_backward_are_their_steps(x, dy, residual, affine, activation):
    C = x.shape[1]
    ours, theirs = ([np.full(C, 0.5), np.full(C, 2.0), np.array(3), np.empty_like(x)] for _ in range(2))
    masks = [ops.empty_mask(x, residual, x) for _ in range(2)]
    fused = ops.bn_forward(x, EPS, *affine, residual, activation, *ours[:2], None, *ours[2:], masks[0])
    moments = ops.bn_stats(x, theirs[2])
    ops.bn_normalize(x, moments, EPS, *affine, residual, activation, *theirs[:2], None, *theirs[2:], masks[1])
    for a, b in zip((*ours, masks[0]), (*theirs, masks[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours[2] == 4

    step = (dy, x, fused, EPS, *affine, activation, masks[0])
    ours, theirs = ([np.full_like(a, np.nan) for a in (x, x, *affine)] for _ in range(2))
    ops.bn_backward(*step, C / x.size, *ours)
    ops.bn_backward_input(*step, ops.bn_backward_reduce(*step), C / x.size, *theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
