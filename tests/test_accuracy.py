"""The accuracy that the library promises, against float64: every bound, every layout, on NumPy and on chip and
streamed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests import reference

EPS = 1e-5
LAYOUTS = {  # name: shape, channel axis, memory order of the axes
    "NCHW": ((8, 6, 23, 31), 1, (0, 1, 2, 3)),
    "NHWC": ((8, 23, 31, 6), 3, (0, 1, 2, 3)),
    "NCHW view of NHWC": ((8, 6, 23, 31), 1, (0, 2, 3, 1)),
    "long rows": ((3, 4, 9001), 1, (0, 1, 2)),
    "NC": ((5003, 7), 1, (0, 1)),
    "few values": ((5, 7), 1, (0, 1)),
    "wide": ((40, 1100), 1, (0, 1)),
    "CNL": ((6, 4, 999), 1, (1, 0, 2)),
}
RATIOS = [0, 1, 1e2, 1e4, 1e5, 1e6]


@pytest.fixture
def F(way):  # noqa: N802 - the functions of cupybn.functional
    return reference.OnDevice(way)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


def fill(layout, values, dtype=np.float32):
    """An array of this layout's shape and memory order; `values` gives its elements for a shape (count, C)."""
    shape, axis, order = layout
    C = shape[axis]
    moved = tuple(np.delete(shape, axis))
    data = np.moveaxis(values((int(np.prod(moved)), C)).reshape(*moved, C), -1, axis)
    dense = np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order))
    dense[...] = data
    return dense


def by_channel(array, axis):
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def check_output(y, expected, unit=2.0**-22, floor=1e-6):
    error = np.abs(y.astype(np.float64) - expected)
    assert np.all(error <= floor + unit * np.abs(expected)), f"off by {(error - unit * np.abs(expected)).max():.1e}"


def check_gradients(grads, expected, x, weight, axis, scale=1.0, eps=EPS):
    """Check that dx is within 3e-6 of the larger of dx and |weight| rstd |dy| over its channel, sums within 1e-5 of
    their terms.
    """
    rstd = 1 / np.sqrt(expected.var + eps)
    g = by_channel(expected.dresidual, axis)
    dx, dx0 = by_channel(grads.input.astype(np.float64), axis), by_channel(expected.dx, axis)
    size = np.maximum(np.abs(dx0).max(0), np.abs(weight) * rstd * np.abs(g).max(0))
    assert np.all(np.abs(dx - dx0) <= 3e-6 * scale * size)
    xhat = (by_channel(x.astype(np.float64), axis) - expected.mean) * rstd
    lost = np.finfo(grads.weight.dtype).tiny  # a GPU may round to 0 what is smaller
    assert np.all(np.abs(grads.weight - expected.dweight) <= 1e-5 * scale * np.abs(g * xhat).sum(0) + lost)
    assert np.all(np.abs(grads.bias - expected.dbias) <= 1e-5 * scale * np.abs(g).sum(0) + lost)


def check_all(F, x, axis, rng, scale=1.0, weight=None):
    """Check a training pass, running_var and the way back; then an eval pass with the exact statistics."""
    C, rtol = x.shape[axis], 1e-6 * scale
    ones, zeros = (np.full(C, v, x.dtype) for v in (1, 0))
    weight = ones if weight is None else weight
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    running_mean, running_var = zeros.copy(), ones.copy()
    y, vjp_fn = F.batch_norm_vjp(x, running_mean, running_var, weight, zeros, True, 1.0, EPS, channel_axis=axis)
    expected = reference.batch_norm(x, weight, zeros, eps=EPS, channel_axis=axis, dy=dy)
    check_output(y, expected.y, 2.0**-22 * scale, 1e-6 * scale)
    check_gradients(vjp_fn(dy), expected, x, weight, axis, scale)
    n = x.size // C
    np.testing.assert_allclose(running_var, expected.var * n / (n - 1), rtol=rtol)

    # In float64, as float32 does not hold every mean.
    running = expected.mean.astype(np.float64), expected.var.astype(np.float64)
    y, vjp_fn = F.batch_norm_vjp(x, *running, weight, zeros, eps=EPS, channel_axis=axis)
    expected = reference.batch_norm(x, weight, zeros, running=running, eps=EPS, channel_axis=axis, dy=dy)
    check_output(y, expected.y, 2.0**-22 * scale, 1e-6 * scale)
    check_gradients(vjp_fn(dy), expected._replace(mean=running[0], var=running[1]), x, weight, axis, scale)


@pytest.mark.parametrize("ratio", RATIOS)
def test_large_means(F, layout, ratio, rng):
    x = fill(layout, lambda s: rng.standard_normal(s) + ratio * np.linspace(-1, 1, s[1]))
    check_all(F, x, layout[1], rng)


def outliers():
    """Cases of (way, ratio, place, size). The streamed kernels get a few, as all ways treat a channel alike."""
    for ratio, place, size in itertools.product(
        [0, 1e4, 1e6], ["first", "middle", "last", "every sample"], [1e1, 1e3, 1e6]
    ):
        for way in "NumPy", "on chip", "streamed":
            if way != "streamed" or (ratio, size) in ((0, 1e6), (1e6, 1e1)):
                yield pytest.param(way, ratio, place, size, id=f"{way}-{ratio:g}-{place}-{size:g}")


@pytest.mark.parametrize(("way", "ratio", "place", "size"), list(outliers()), indirect=["way"])
def test_outliers(F, layout, ratio, place, size, rng):
    def values(shape):
        v = rng.standard_normal(shape) + ratio
        n = shape[0]
        rows = {"first": [0], "middle": [n // 2], "last": [n - 1], "every sample": slice(0, n, -(-n // 4))}[place]
        v[rows] = np.linspace(-size, size, shape[1])
        return v

    check_all(F, fill(layout, values), layout[1], rng)


def test_padded_with_zeros(F, layout, rng):
    def values(shape):
        v = rng.standard_normal(shape) + 1e4
        v[: shape[0] // 8 + 1] = 0
        return v

    check_all(F, fill(layout, values), layout[1], rng)


@pytest.mark.parametrize("low", [0.1, 1e3 + 0.1])
def test_two_values(F, layout, low, rng):
    """Rounding errors of equal summands do not cancel, and the bounds hold nevertheless."""
    check_all(F, fill(layout, lambda s: low + 0.3 * rng.integers(0, 2, s)), layout[1], rng)


@pytest.mark.parametrize("every", [2, 3, 8, 50])
@pytest.mark.parametrize("value", [0.7, 1.8598399, 1e4])
def test_values_among_zeros(F, layout, every, value):
    """The bounds hold for equal values among zeros: their rounding errors are equal, and a few values do not tell the
    mean.
    """

    def values(shape):
        v = np.full(shape, value)
        v[every // 2 :: every] = 0
        return v

    check_all(F, fill(layout, values), layout[1], np.random.default_rng(0))


def test_drifting_data(F, layout, rng):
    """The bounds hold for data that drifts, whose mean no few values tell."""
    check_all(F, fill(layout, lambda s: np.linspace(-1e3, 1e4, s[0])[:, None] + rng.standard_normal(s)), layout[1], rng)


@pytest.mark.parametrize("value", [0, 7, -0.1, 1e4, 1e8 + 8, 3e19, -1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_channel_gives_exactly_bias(F, layout, value, dtype, rng):
    x = fill(layout, lambda s: np.full(s, value), dtype)
    C = x.shape[layout[1]]
    weight, bias = rng.standard_normal((2, C)).astype(dtype)
    y = F.batch_norm(x, None, None, weight, bias, True, channel_axis=layout[1])
    assert np.array_equal(by_channel(y, layout[1]), np.broadcast_to(bias, (x.size // C, C)))
    mean, var = F.moments(x, channel_axis=layout[1])
    assert np.all(mean == dtype(value))
    assert np.all(var == 0)


@pytest.mark.parametrize("size", [1e15, 1e19, 1e25, 1e30, 1e37])
@pytest.mark.parametrize("offset", [0, 10])
def test_huge_values(F, layout, size, offset, rng):
    """Nothing overflows on the way to a y that float32 holds; running_var is inf where float32 does not hold it."""
    axis = layout[1]
    x = fill(layout, lambda s: (rng.standard_normal(s) + offset) * size)
    dy = rng.standard_normal(x.shape).astype(np.float32) * np.float32(size**0.5)
    C = x.shape[axis]
    weight = rng.random(C, np.float32) + 1
    running_mean, running_var = np.zeros((2, C), np.float32)
    y, vjp_fn = F.batch_norm_vjp(x, running_mean, running_var, weight, weight, True, 1.0, channel_axis=axis)
    expected = reference.batch_norm(x, weight, weight, channel_axis=axis, dy=dy)
    check_output(y, expected.y, 2.0**-21, 4e-6)
    check_gradients(vjp_fn(dy), expected, x, weight, axis)
    n = x.size // C
    var = expected.var * n / (n - 1)
    np.testing.assert_allclose(running_var, np.where(var > np.finfo(np.float32).max, np.inf, var), rtol=1e-6)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_values_near_the_limits_of_float32_among_others(F, layout, activation, rng):
    """Channels that need float64 give accurate results beside others in the same packs."""
    axis = layout[1]

    def values(shape):
        v = rng.standard_normal(shape)
        v[:, ::2] = v[:, ::2] * 1e27 + 1e31
        v[:, 3] *= 1e-25
        return v

    x = fill(layout, values)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    weight, bias = np.full((2, x.shape[axis]), [[1.5], [0.25]], np.float32)
    options = {"eps": 1e-60, "channel_axis": axis}
    y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, bias, True, activation=activation, **options)
    expected = reference.batch_norm(x, weight, bias, dy=dy, relu=activation is not None, **options)
    check_output(y, expected.y, 2.0**-21, 2e-6)
    check_gradients(vjp_fn(dy), expected, x, weight, axis, eps=1e-60)


@pytest.mark.parametrize("std", [1e-3, 1e-10, 1e-17, 1e-19, 3e-20, 1e-22, 1e-30])
def test_tiny_values(F, layout, std, rng):
    """Tiny values give accurate results though float32 does not hold their squares."""
    axis = layout[1]
    x = fill(layout, lambda s: rng.standard_normal(s) * std)
    running_mean, running_var = np.zeros((2, x.shape[axis]))
    y = F.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, eps=1e-70, channel_axis=axis)
    expected = reference.batch_norm(x, eps=1e-70, channel_axis=axis)
    check_output(y, expected.y)
    n = x.size // x.shape[axis]
    np.testing.assert_allclose(running_var, expected.var * n / (n - 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "mean", "var", "weight", "bias"),
    [
        (3.4e38, -0.9e38, 1e20, 1, 0),
        (3.4e38, 0, 1, 2, -3.4e38),
        (1e-30, 0, 1e-60, 1, 0),
        (1e35, 0, 1e30, 1e-30, 0),
        (1e38, 1e39, 1e74, 1, 0),
    ],
)
def test_nothing_overflows_on_the_way_in_eval(F, value, mean, var, weight, bias):
    x = np.full((3, 1, 5), value, np.float32)
    y = F.batch_norm(x, *(np.array([v], np.float64) for v in (mean, var, weight, bias)), eps=0.0)
    exact = (np.float64(x) - mean) / np.sqrt(var) * weight + bias
    np.testing.assert_allclose(y, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("std", "dy_size", "weight"), [(1e14, 1e-28, 1e12), (1e12, 1e20, 1e-30), (1e38, 1, 1e10), (1e10, 1e30, 1)]
)
def test_gradients_with_factors_that_float32_does_not_hold(F, layout, std, dy_size, weight, rng):
    axis = layout[1]
    x = fill(layout, lambda s: rng.uniform(-1.7, 1.7, s) * std)
    dy = (rng.standard_normal(x.shape) * dy_size).astype(np.float32)
    weight = np.full(x.shape[axis], weight, np.float32)
    grads = F.batch_norm_vjp(x, None, None, weight, np.zeros_like(weight), training=True, channel_axis=axis)[1](dy)
    check_gradients(grads, reference.batch_norm(x, weight, dy=dy, channel_axis=axis), x, weight, axis)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("along", ["dy", "xhat"])
def test_sums_that_float32_does_not_hold(F, layout, along, sign, rng):
    axis = layout[1]
    x = fill(layout, lambda s: rng.standard_normal(s) * 1e10)
    dy = (sign * rng.uniform(1e38, 2e38, x.shape)).astype(np.float32)
    if along == "xhat":
        dy = np.copysign(dy, sign * x)
    weight = np.ones(x.shape[axis])
    grads = F.batch_norm_vjp(x, None, None, weight, weight, True, channel_axis=axis)[1](dy)
    check_gradients(grads, reference.batch_norm(x, weight, weight, channel_axis=axis, dy=dy), x, weight, axis)


@pytest.mark.parametrize(("xhat", "dy_size"), [(0, 2e38), (1e6, 1e35)])
def test_one_sum_alone_that_float32_does_not_hold(F, layout, xhat, dy_size, rng):
    axis = layout[1]
    x = fill(layout, lambda s: xhat * rng.uniform(1, 2, s))
    dy = (dy_size * rng.uniform(0.5, 1, x.shape)).astype(np.float32)
    mean, var = np.zeros(x.shape[axis]), np.ones(x.shape[axis])
    grads = F.batch_norm_vjp(x, mean, var, var, mean, channel_axis=axis)[1](dy)
    expected = reference.batch_norm(x, var, mean, running=(mean, var), channel_axis=axis, dy=dy)
    check_gradients(grads, expected._replace(mean=mean, var=var), x, var, axis)


@pytest.mark.parametrize(
    ("std", "dy_size", "eps"),
    [
        *((1e-30, 1e-9, 1e-70), (1e-20, 1e-20, 1e-42), (3e-20, 1, 1e-70)),
        *((1e-13, 1e-27, 1e-40), (1e-13, 1e-31, 1e-40), (1e-13, 1e-27, EPS), (1e-6, 1e-33, EPS)),
    ],
)
def test_gradients_of_tiny_values(F, layout, std, dy_size, eps, rng):
    """Tiny values give accurate gradients though float32 does not hold their products."""
    axis = layout[1]
    x = fill(layout, lambda s: rng.standard_normal(s) * std)
    dy = rng.standard_normal(x.shape).astype(np.float32) * np.float32(dy_size)
    weight = np.ones(x.shape[axis], np.float32)
    grads = F.batch_norm_vjp(x, None, None, weight, weight, True, eps=eps, channel_axis=axis)[1](dy)
    expected = reference.batch_norm(x, weight, weight, eps=eps, channel_axis=axis, dy=dy)
    check_gradients(grads, expected, x, weight, axis, eps=eps)


def test_one_huge_channel_leaves_the_others_alone(F, layout, rng):
    axis = layout[1]
    x = fill(layout, lambda s: rng.standard_normal(s))
    odd = x.copy(order="K")
    np.moveaxis(odd, axis, 0)[2] *= np.float32(1e30)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    weight = np.ones(x.shape[axis], np.float32)
    others = np.arange(x.shape[axis]) != 2
    for a, b in zip(*(run(F, v, weight, dy, axis) for v in (x, odd)), strict=True):
        assert np.array_equal(a[..., others], b[..., others])


def run(F, x, weight, dy, axis):
    y, vjp_fn = F.batch_norm_vjp(x, None, None, weight, weight, True, activation="relu", channel_axis=axis)
    grads = vjp_fn(dy)
    return by_channel(y, axis), by_channel(grads.input, axis), grads.weight, grads.bias


@pytest.mark.parametrize("ratio", [0, 1e3])
def test_float64(F, layout, ratio, rng):
    """Float64 data keeps the same bounds relative to its own rounding, if the mean may be rounded to float64."""
    x = fill(layout, lambda s: rng.standard_normal(s) + ratio, np.float64)
    check_all(F, x, layout[1], rng, scale=2.0**-29 * max(1, 4 * ratio))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_data_is_rounded_once(F, layout, dtype, rng):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    axis = layout[1]
    x = fill(layout, lambda s: rng.standard_normal(s) * 3 + 100, dtype)
    weight, bias = rng.standard_normal((2, x.shape[axis])).astype(np.float32)
    residual = rng.standard_normal(x.shape).astype(dtype)
    y = F.batch_norm(x, None, None, weight, bias, True, residual=residual, activation="relu", channel_axis=axis)
    assert y.dtype == x.dtype
    exact = reference.batch_norm(x, weight, bias, residual=residual, relu=True, channel_axis=axis).y
    # Before it is rounded, y is within 2e-6 of the exact value: it lies between the roundings of both ends.
    low, high = ((exact + d).astype(dtype) for d in (-2e-6 * (1 + np.abs(exact)), 2e-6 * (1 + np.abs(exact))))
    assert np.all((y >= np.maximum(low, 0).astype(dtype)) & (y <= high))
