"""Moments of one array: over one channel axis or several, under masks, in a dtype of one's choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn.statistics.axes import view
from tests.reference import DTYPES, HALF_ULP, bits, exactly, in_order, to_numpy
from tests.test_derived_arrays import derived

SHAPE = (2, 3, 4, 5)
AXES = [(1,), (-1,), (0, 1), (1, 0), (1, 3), (-1, 1), (2, 3), (0, 2, 3), (3, 1, 0), (0, 1, 2, 3), (2, -4, 1, -1)]


def reference(x, axes, mask=None):
    """Mean and biased variance over all axes but these, in the order of these, in long double."""
    x = np.asarray(x).astype(np.longdouble)
    axes = [axis % x.ndim for axis in axes]
    others = [i for i in range(x.ndim) if i not in axes]
    values = x.transpose(others + axes)
    left = values.reshape(-1, *values.shape[len(others) :])
    if mask is not None:
        left = left[np.broadcast_to(mask, values.shape[: len(others)]).ravel()]
    return left.mean(0), left.var(0)


def check(results, expected, dtype, data_dtype):
    """Compare with the promised accuracy, and one rounding to the dtype of the results."""
    (mean, var), (expected_mean, expected_var) = results, expected
    assert mean.dtype == var.dtype == dtype
    assert mean.shape == var.shape == expected_mean.shape
    half, std = HALF_ULP[np.dtype(dtype).name], np.sqrt(expected_var)
    roundings = 1e-14 if data_dtype == np.float64 else 1e-7
    bound = roundings * std + (2.0**-52 + half) * abs(expected_mean)
    assert np.all(abs(to_numpy(mean) - expected_mean) <= bound)
    relative = 1e-13 * (1 + abs(expected_mean) / std.clip(1e-300)) if data_dtype == np.float64 else 1e-6
    assert np.all(abs(to_numpy(var) - expected_var) <= (relative + half) * expected_var)


def data(rng, dtype=np.float32, shape=SHAPE):
    """Values around 3, on the host."""
    return rng.normal(3, 1, shape).astype(dtype)


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)], ids=str)
def test_axes(xp, rng, axes, order):
    """What shares a place along all channel axes shares statistics, in any memory order; results are in the tuple's."""
    x = data(rng)
    given = in_order(xp.asarray(x), order)
    check(F.moments(given, channel_axis=axes), reference(x, axes), np.float32, np.float32)
    strided = xp.asarray(np.repeat(x, 2, axis=2))[:, :, ::2]
    check(F.moments(strided, channel_axis=axes), reference(x, axes), np.float32, np.float32)
    np.testing.assert_array_equal(to_numpy(given), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(xp, rng, dtype):
    x = data(rng, dtype)
    for axes in (1,), (3, 1):
        expected = reference(x, axes)
        default = np.float64 if dtype == np.float64 else np.float32
        check(F.moments(xp.asarray(x), channel_axis=axes), expected, default, dtype)
        for wanted in np.float32, "float32", np.float64, np.dtype("float64"):
            check(F.moments(xp.asarray(x), channel_axis=axes, dtype=wanted), expected, np.dtype(wanted), dtype)


def test_one_axis_of_a_tuple_is_that_axis(xp, rng):
    x = xp.asarray(data(rng))
    assert bits(*F.moments(x, channel_axis=(-2,))) == bits(*F.moments(x, channel_axis=2))


def test_a_statistic_for_each_element(xp, rng):
    """Each element is its own mean, and has variance 0, where all axes are channel axes, whatever the rank."""
    x = data(rng)
    for i in range(1, 5):
        some = x.reshape(-1, *SHAPE[5 - i :]) if i > 1 else x.ravel()
        mean, var = F.moments(xp.asarray(some), channel_axis=tuple(range(i)))
        np.testing.assert_array_equal(to_numpy(mean), some)
        assert not to_numpy(var).any()
        mean, _ = F.moments(xp.asarray(some), channel_axis=tuple(range(i))[::-1])
        np.testing.assert_array_equal(to_numpy(mean), some.T)


def test_axes_of_length_one(xp, rng):
    x = data(rng, shape=(1, 4, 1, 3))
    for axes in [(0, 2), (2, 1), (1, 3), (0, 3, 2)]:
        check(F.moments(xp.asarray(x), channel_axis=axes), reference(x, axes), np.float32, np.float32)


@pytest.mark.parametrize("axes", [1, -1, *AXES], ids=str)
def test_keepdims(xp, rng, axes):
    """Results have the input's rank, and what is normalized by them has mean 0 and variance 1."""
    x = xp.asarray(data(rng, np.float64))
    mean, var = F.moments(x, channel_axis=axes, keepdims=True)
    flat = F.moments(x, channel_axis=axes)
    channels = {axis % 4 for axis in (axes if isinstance(axes, tuple) else (axes,))}
    assert mean.shape == var.shape == tuple(n if i in channels else 1 for i, n in enumerate(SHAPE))
    if len(channels) == 4:
        assert bool((mean == x).all())
        return
    normalized = (x - mean) / var**0.5
    again = F.moments(normalized, channel_axis=axes)
    np.testing.assert_allclose(to_numpy(again[0]), 0, atol=1e-14)
    np.testing.assert_allclose(to_numpy(again[1]), 1, rtol=1e-13)
    assert sorted(to_numpy(mean).ravel()) == sorted(to_numpy(flat[0]).ravel())


def test_what_lies_in_memory_as_it_should_is_not_copied(rng):
    """Channel axes whose channels are those of one axis are a view; a mask of the input's order is one, too."""
    x, mask = data(rng), np.ones((2, 5), bool)
    for axes, order in itertools.product(AXES, [(0, 1, 2, 3), (1, 2, 0, 3), (0, 3, 1, 2)]):
        given = in_order(x, order)
        seen, _ = view(given, tuple(axis % 4 for axis in axes), None)
        together = [order.index(axis % 4) for axis in axes]
        if together == list(range(together[0], together[0] + len(axes))):
            assert np.shares_memory(seen, given), (axes, order)
    _, seen_mask = view(in_order(x, (0, 3, 1, 2)), (1, 2), mask)
    assert seen_mask.shape == (10, 1)
    assert np.shares_memory(seen_mask, mask)


@pytest.mark.parametrize("scale", [1, 1e3, 1e6])
def test_float64_moments_normalize_as_training_does(xp, rng, scale):
    """Nothing is rounded on the way from `moments` to `batch_norm`, which has the accuracy of training mode then."""
    x = rng.normal(scale, 1, (64, 3, 5)).astype(np.float32)
    given = xp.asarray(x)
    y = to_numpy(F.batch_norm(given, *F.moments(given, dtype=np.float64)))
    mean, var = reference(x, (1,))
    expected = (x - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    assert np.all(abs(y - expected) <= 1e-6 + 2.0**-22 * abs(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(xp, rng, bad):
    x = data(rng)
    clean = [to_numpy(array) for array in F.moments(xp.asarray(x), channel_axis=(2, 1))]
    x[1, 2, 0, 3] = bad
    spoilt = [to_numpy(array) for array in F.moments(xp.asarray(x), channel_axis=(2, 1))]
    for before, after in zip(clean, spoilt, strict=True):
        assert not np.isfinite(after[0, 2])
        after[0, 2] = before[0, 2]
        np.testing.assert_array_equal(after, before)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("axes", [1, -1, (1, 2), (3, 0), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("bad", [1e30, np.nan])
def test_masks(xp, rng, axes, bad):
    """What a mask leaves out is as if it were not there, whatever stands there."""
    x = data(rng, shape=(4, 3, 4, 5))
    several = axes if isinstance(axes, tuple) else (axes,)
    channels = [axis % 4 for axis in several]
    others = [i for i in range(4) if i not in channels]
    sizes = [x.shape[i] for i in others]
    mask = rng.random(sizes) < 0.6
    mask.flat[:2] = True, False
    expected = reference(x, several, mask)
    left = np.broadcast_to(np.expand_dims(mask, tuple(sorted(channels))), x.shape)
    x[~left] = bad
    given = xp.asarray(x)
    for order in itertools.permutations(range(4)) if xp is np else [(0, 1, 2, 3), (3, 1, 2, 0)]:
        results = F.moments(in_order(given, order), channel_axis=axes, mask=xp.asarray(mask))
        check(results, expected, np.float32, np.float32)
    mean, var = F.moments(given, channel_axis=axes, mask=xp.asarray(mask), keepdims=True, dtype=np.float64)
    assert mean.shape == var.shape == tuple(n if i in channels else 1 for i, n in enumerate(x.shape))


def test_masks_that_broadcast(xp, rng):
    """A mask of fewer axes, or with axes of length 1, holds for all along the others; any strides do."""
    x = data(rng)
    given = xp.asarray(x)
    for shape in [(), (5,), (4, 5), (1, 5), (4, 1), (2, 1, 1), (2, 4, 5)]:
        mask = np.asarray(rng.random(shape) < 0.7)
        mask.flat[0] = True
        whole = np.broadcast_to(mask, (2, 4, 5))
        check(F.moments(given, mask=xp.asarray(mask)), reference(x, (1,), whole), np.float32, np.float32)
    mask = np.repeat(rng.random((5, 4, 2)) < 0.5, 2, axis=0)
    transposed = xp.asarray(mask)[::2].transpose(2, 1, 0)
    check(F.moments(given, mask=transposed), reference(x, (1,), mask[::2].T), np.float32, np.float32)
    assert bits(*F.moments(given, mask=derived(xp, transposed))) == bits(*F.moments(given, mask=transposed))
    everything = F.moments(given, mask=xp.asarray(np.True_))
    check(everything, reference(x, (1,)), np.float32, np.float32)


@pytest.mark.filterwarnings("error")
def test_a_mask_that_leaves_nothing(xp, rng):
    """No values have no mean and no variance, which is NaN and no warning; the same where all left is one value."""
    x = xp.asarray(data(rng))
    for axes in 1, (3, 1):
        shape = (3,) if axes == 1 else (5, 3)
        for dtype in np.float32, np.float64:
            for statistic in F.moments(x, channel_axis=axes, mask=xp.zeros((), bool), dtype=dtype):
                assert statistic.shape == shape
                assert statistic.dtype == dtype
                assert np.isnan(to_numpy(statistic)).all()
    one = np.zeros((2, 4, 5), bool)
    one[1, 2, 3] = True
    mean, var = F.moments(x, mask=xp.asarray(one))
    np.testing.assert_array_equal(to_numpy(mean), to_numpy(x)[1, :, 2, 3])
    assert not to_numpy(var).any()


# ---------------------------------------------------------------------------------------------------------------------
# Errors


INTS = "expected channel_axis to be an int"


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ((), ValueError, "expected channel_axis to have one axis or more (got ()): use reshape(-1, 1) for one channel"),
        ((1, 1), ValueError, "expected channel_axis to have different axes (got (1, 1))"),
        ((1, -3), ValueError, "expected channel_axis to have different axes (got (1, -3))"),
        ((0, 4), ValueError, "expected channel_axis of axes in [-4, 4) for 4D input (got (0, 4))"),
        ((-5, 1), ValueError, "expected channel_axis of axes in [-4, 4) for 4D input (got (-5, 1))"),
        ([1, 2], TypeError, f"{INTS} or a tuple of ints (got [1, 2]): use tuple(channel_axis)"),
        ((1, 2.0), TypeError, "expected channel_axis[1] to be an int (got 2.0): use int(channel_axis[1])"),
        ((True, 2), TypeError, "expected channel_axis[0] to be an int (got True)"),
        (((1, 2),), TypeError, "expected channel_axis[0] to be an int (got (1, 2))"),
        (None, TypeError, f"{INTS} (got None)"),
        ("1", TypeError, f"{INTS} (got '1')"),
    ],
)
def test_wrong_axes(xp, axes, error, message):
    x = xp.ones(SHAPE, np.float32)
    with pytest.raises(error, match=exactly(message)):
        F.moments(x, channel_axis=axes)
    with pytest.raises(error, match=exactly(message)):
        cupybn.StreamingMoments(axes).update(x)


@pytest.mark.parametrize(
    ("axes", "error"),
    [((), ValueError), ((1, 1), ValueError), ([1], TypeError), ((1, 2.0), TypeError), ("1", TypeError)],
)
def test_axes_that_are_wrong_for_every_array(axes, error):
    """Objects do not wait for an array to say so."""
    with pytest.raises(error, match=r"^expected channel_axis"):
        cupybn.StreamingMoments(axes)


def test_axes_of_an_array_without_any(xp):
    with pytest.raises(ValueError, match=exactly("expected channel_axis of an input with axes (got (0,))")):
        F.moments(xp.ones((), np.float32), channel_axis=(0,))


def test_integers_of_numpy_are_axes(rng):
    x = data(rng)
    axes = np.int64(3), np.uint8(1)
    assert bits(*F.moments(x, channel_axis=axes)) == bits(*F.moments(x, channel_axis=(3, 1)))


@pytest.mark.parametrize("axes", [(1,), (1, 2)])
def test_batch_norm_takes_one_axis(xp, axes):
    x, vector = xp.ones(SHAPE, np.float32), xp.ones(3, np.float32)
    expected = f"{INTS} (got {axes}): make these axes one, use input.transpose(...).reshape(...)"
    for call in (
        lambda: F.batch_norm(x, vector, vector, channel_axis=axes),
        lambda: F.batch_norm_vjp(x, vector, vector, channel_axis=axes),
        lambda: F.batch_norm_backward(x, x, vector, vector, channel_axis=axes),
        lambda: cupybn.BatchNorm2d(3, channel_axis=axes, device="cpu"),
    ):
        with pytest.raises(TypeError, match=exactly(expected)):
            call()


@pytest.mark.parametrize("dtype", ["int", "bfloat16", np.float16, int, ">f4", "f8,f8", "nonsense", [], 3])
def test_wrong_dtypes(xp, dtype):
    with pytest.raises(TypeError, match=r"^expected dtype to be float32, float64 or None \(got .+\)$") as raised:
        F.moments(xp.ones((2, 3), np.float32), dtype=dtype)
    assert not str(raised.value).endswith("(got float32)")  # as if the one with its bytes turned round were right


def wrong(error, message, **given):
    return pytest.param(error, message, given, id=message[:60])


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        wrong(TypeError, "expected keepdims to be a bool (got 1)", keepdims=1),
        wrong(
            TypeError,
            "expected mask of dtype bool, True for data (got float32): use mask.astype(bool)",
            mask=lambda xp: xp.ones((2, 4, 5), np.float32),
        ),
        wrong(
            ValueError,
            "expected mask of shape (2, 4, 5), the input's without axis 1, or one that broadcasts to it "
            "(got (2, 1, 4, 5)): use mask.squeeze(1)",
            mask=lambda xp: xp.ones((2, 1, 4, 5), bool),
        ),
        wrong(
            ValueError,
            "expected mask of shape (4, 5), the input's without axes (0, 1), or one that broadcasts to it "
            "(got (2, 4, 5))",
            mask=lambda xp: xp.ones((2, 4, 5), bool),
            channel_axis=(0, 1),
        ),
    ],
)
def test_wrong_arguments(xp, error, message, given):
    given = {name: value(xp) if callable(value) else value for name, value in given.items()}
    with pytest.raises(error, match=exactly(message)):
        F.moments(xp.ones(SHAPE, np.float32), **given)


def test_no_values(xp):
    """An array without elements has no moments, and raises, unlike one whose elements a mask leaves out."""
    for shape, axes in [((0, 3), 1), ((2, 0), 1), ((2, 0, 3), (0, 2)), ((0,), (0,))]:
        for mask in None, xp.ones((), bool):
            message = f"expected an input that is not empty (got shape {shape})"
            with pytest.raises(ValueError, match=exactly(message)):
                F.moments(xp.ones(shape, np.float32), channel_axis=axes, mask=mask)
