"""Each step of batch norm on its own: the mirrors that specify the kernels, against the textbook in float64."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from cupybn._steps import channels, tiles
from cupybn._steps import numpy_ops as ops
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Statistics, Sums
from tests import reference
from tests.reference import bits

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
    weight, bias = rng.normal(1, 1, shape[1]), rng.standard_normal(shape[1])
    return Affine(weight.astype(np.float32), bias.astype(np.float32), EPS)


def statistics_of(x):
    return Statistics.of(*ops.mean_and_var(ops.bn_stats(x), np.float64))


def normalize(x, affine, epilogue, out):
    """Batch norm in training, without running statistics."""
    return ops.bn_normalize(x, ops.bn_stats(x), affine, Running(), epilogue, out)


def textbook(x, affine, **options):
    """Batch norm by the textbook, with this weight, bias and eps."""
    weight, bias, eps = affine
    return reference.batch_norm(x, weight, bias, eps=eps, **options)


def empty_gradients(x, affine):
    """Arrays for all gradients, with values that none of them has."""
    return Gradients(*(np.full_like(a, np.nan) for a in (x, x, affine.weight, affine.bias)))


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
    """A channel whose center is far from the mean is done again, about its mean: its first value may be far, too."""
    monkeypatch.setattr(ops, "_sample_mean", lambda x: np.array([center] + [0.0] * (x.shape[1] - 1)))
    x[0, 0, 0] += 1e5
    (mean, var), expected = statistics_of(x).pairs.T, reference.batch_norm(x)
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(var, expected.var, rtol=1e-6)
    np.testing.assert_allclose(var[0], expected.var[0], rtol=1e-13)


def test_moments_of_parts_merge_to_those_of_the_whole(x):
    """Parts may be of different sizes, also of one sample."""
    n = x.shape[0]
    cuts = sorted({0, n // 7, n // 3, n - 1, n})
    parts = [ops.bn_stats(np.ascontiguousarray(x[i:j])) for i, j in itertools.pairwise(cuts) if i < j]
    merged = Moments(*(np.concatenate(field) for field in list(zip(*parts, strict=True))[:3]))
    row = ops.merge_moments(merged)
    np.testing.assert_allclose(row, ops.merge_moments(ops.bn_stats(x)), rtol=3e-7)
    np.testing.assert_array_equal(ops.merge_moments(Moments.of_rows(row)), row)


def test_merge_of_parts_of_one_mean_is_exact():
    """The mean of a part without values counts for nothing."""
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
    running = Running(np.array([10, 20], dtype), np.array([1, 3], dtype), momentum)
    ops.bn_update_running(batch, running)
    expected_mean = np.array([(1 - momentum) * 10 + momentum * 2, (1 - momentum) * 20 - momentum])
    expected_var = np.array([(1 - momentum) + momentum * 2, (1 - momentum) * 3])
    assert running.mean.dtype == dtype
    np.testing.assert_array_equal(running.mean, expected_mean.astype(dtype))
    np.testing.assert_array_equal(running.var, expected_var.astype(dtype))


def test_bn_update_running_takes_the_mean_of_all_batches_without_momentum():
    running = Running(np.zeros(1), np.ones(1), None, np.array(0))
    for value in 1.0, 2.0, 6.0:
        batch = Moments(np.array([2.0]), np.array([[value]]), np.array([[value]]), running.batches)
        ops.bn_update_running(batch, running)
    assert running.batches == 3
    np.testing.assert_allclose([running.mean[0], running.var[0]], 3)


@pytest.mark.parametrize("count", [0, 1, np.nan])
def test_bn_update_running_leaves_all_alone_without_a_variance(count):
    running = Running(np.zeros(1), np.ones(1), 0.1, np.array(0))
    batch = Moments(np.array([float(count)]), np.array([[5.0]]), np.array([[0.0]]))
    ops.bn_update_running(batch, running)
    assert running == (0, 1, 0.1, 0, False)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_normalize(x, residual, affine, activation, with_residual):
    residual = residual if with_residual else None
    out = np.full_like(x, np.nan)
    statistics = normalize(x, affine, Epilogue(residual, activation), out)
    np.testing.assert_array_equal(statistics.pairs, statistics_of(x).pairs)
    expected = textbook(x, affine, residual=residual, relu=activation == "relu").y
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["x", "residual"])
def test_bn_normalize_in_place(x, residual, affine, target):
    out = np.empty_like(x)
    normalize(x, affine, Epilogue(residual, "relu"), out)
    arrays = {"x": x.copy(), "residual": residual.copy()}
    normalize(arrays["x"], affine, Epilogue(arrays["residual"], "relu"), arrays[target])
    np.testing.assert_array_equal(arrays[target], out)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("running", [None, (2.5, 3.5)], ids=["training", "eval"])
def test_bn_backward_reduce_and_bn_backward_input(x, dy, residual, affine, activation, running):
    C = x.shape[1]
    running = None if running is None else tuple(np.full(C, v) for v in running)
    statistics = statistics_of(x) if running is None else Statistics.of(*running)
    expected = textbook(x, affine, running=running, residual=residual, relu=activation == "relu", dy=dy)
    epilogue = Epilogue(residual, activation, ops.empty_passed(x, residual, x))
    ops.bn_normalize(x, None, affine, Running(statistics.mean, statistics.var), epilogue, np.empty_like(x))
    epilogue = epilogue._replace(residual=None)
    sums = ops.bn_backward_reduce(dy, x, statistics, affine, epilogue)
    terms = np.abs(dy).sum((0, 2), dtype=np.float64)
    assert np.all(np.abs(sums.dy[0] - expected.dbias) <= 1e-6 * terms)
    assert np.all(np.abs(sums.dy_xhat[0] - expected.dweight) <= 3e-6 * terms)

    gradients = empty_gradients(x, affine)
    inv_count = C / x.size if running is None else 0.0
    ops.bn_backward_input(dy, x, statistics, affine, epilogue, sums, inv_count, gradients)
    size = np.abs(expected.dx).max((0, 2)) + np.abs(affine.weight) * np.abs(dy).max((0, 2))
    assert np.all(np.abs(gradients.dx - expected.dx) <= 2e-6 * size[:, None])
    np.testing.assert_array_equal(gradients.dresidual, expected.dresidual)
    np.testing.assert_array_equal(gradients.dweight, sums.dy_xhat[0].astype(np.float32))
    np.testing.assert_array_equal(gradients.dbias, sums.dy[0].astype(np.float32))


def test_bn_backward_input_in_eval_does_not_look_at_x(x, dy, affine):
    """Statistics that do not depend on x leave dx = dy * weight * rstd, also where x is inf."""
    C = x.shape[1]
    x[0, 0, 0] = np.inf
    dx = np.empty_like(x)
    statistics = Statistics.of(np.zeros(C), np.full(C, 4.0))
    ops.bn_backward_input(dy, x, statistics, Affine(affine.weight, None, 0.0), Epilogue(), None, 0.0, Gradients(dx))
    np.testing.assert_allclose(dx, dy * (affine.weight / 2)[:, None], rtol=1e-6)


def test_relu_stops_inf_and_nan_in_the_gradient(rng):
    x = rng.standard_normal((4, 2, 3)).astype(np.float32)
    y, dy = np.empty_like(x), np.full_like(x, np.inf)
    affine, epilogue = Affine(None, None, EPS), Epilogue(activation="relu")
    statistics = normalize(x, affine, epilogue, y)
    dy[y > 0] = 1
    sums = ops.bn_backward_reduce(dy, x, statistics, affine, epilogue)
    np.testing.assert_array_equal(sums.dy[0], (y > 0).sum((0, 2)))


def small_maps(monkeypatch):
    """Cut what is elementwise into tiles of some elements; sums keep their tiles, which decide over their bits."""
    plan = tiles.plan

    def cut(shape, contiguous, most, *columns):
        return plan(shape, contiguous, 50 if columns else most, *columns)

    monkeypatch.setattr(tiles, "plan", cut)


def no_shortcut(monkeypatch):
    """Look closely at each channel, also where a cheap test says that there is no need."""
    for module in ops, channels:
        monkeypatch.setattr(module, "within", lambda *_: False)
    channels._of_bytes.cache_clear()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("otherwise", [small_maps, no_shortcut])
@pytest.mark.parametrize("shape", [(5, 4, 1), (7, 3, 49), (3, 2, 600), (64, 9, 1)], indirect=True, ids=str)
def test_all_ways_to_the_same_bits(otherwise, activation, dtype, x, dy, residual, affine, monkeypatch):
    """How an array is walked, and how closely channels are looked at, changes no bit, in training and in eval mode."""
    x, dy, residual = (a.astype(dtype) for a in (x, dy, residual))
    x[:, 0] = 3  # a dead channel
    affine.weight[1] = 0
    affine.bias[0] = -0.0
    C = x.shape[1]

    def everything():
        results = []
        for training in True, False:
            running = Running(np.linspace(-1, 1, C), np.linspace(0, 2, C), 0.1)
            passed, out = ops.empty_passed(x, residual, x), np.empty_like(x)
            epilogue = Epilogue(residual, activation, passed if activation else None)
            if training:
                statistics = ops.bn_forward(x, affine, running, epilogue, out)
            else:
                statistics = ops.bn_normalize(x, None, affine, running, epilogue, out)
            gradients = empty_gradients(x, affine)
            back = Epilogue(None, activation, epilogue.passed)
            ops.bn_backward(dy, x, statistics, affine, back, C / x.size * training, gradients, gradients.dx)
            results += [out, passed if activation else out, statistics.pairs, *running[:2], *gradients]
        return bits(*results)

    expected = everything()
    otherwise(monkeypatch)
    assert everything() == expected


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_what_bn_backward_keeps_between_its_steps_changes_no_bit(activation, noted, x, dy, affine, rng):
    """The scratch memory has x - center in it: of all channels but those that need float64."""
    dy[:, 0] *= np.float32(1e-38)
    x[:, 1] *= np.float32(1e20)
    passed = rng.random(x.shape) < 0.5 if noted else None
    epilogue, count = Epilogue(None, activation, passed), x.size // x.shape[1]
    statistics = statistics_of(x)
    results = []
    for scratch in None, np.empty_like(x), "dx":
        gradients = empty_gradients(x, affine)
        memory = gradients.dx if isinstance(scratch, str) else scratch
        ops.bn_backward(dy, x, statistics, affine, epilogue, 1 / count, gradients, memory)
        results.append(bits(*(a for a in gradients)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("last", [0.25, 0.1])
@pytest.mark.parametrize("bias", [None, -0.0, 0.0])
def test_a_zero_of_the_output_has_no_sign(bias, last):
    """Zeros where x is the mean are +0, for any sign of the weight, whether or not some mean is no float32."""
    mean, weight = np.array([0.5, 0.0, last]), np.array([-2.0, 2.0, 0.0], np.float32)
    affine = Affine(weight, None if bias is None else np.full(3, bias, np.float32), EPS)
    x, out = np.array([0.5, -0.0, last], np.float32)[None, :, None], np.empty((1, 3, 1), np.float32)
    ops.bn_normalize(x, None, affine, Running(mean, mean), Epilogue(), out)
    np.testing.assert_array_equal(out, 0)
    assert not np.signbit(out).any()


@pytest.mark.parametrize("value", [np.inf, -0.0])
def test_steps_and_their_sum_agree_on_special_values(value, x, dy, affine):
    """An infinite mean, and zeros with a sign, come out of one call as they come out of two."""
    x[:, 0], C = value, x.shape[1]
    out, y, epilogue = np.empty_like(x), np.empty_like(x), Epilogue()
    ours, theirs = Running(np.zeros(C), np.ones(C), 0.1), Running(np.zeros(C), np.ones(C), 0.1)
    fused = ops.bn_forward(x, affine, ours, epilogue, out)
    statistics = ops.bn_normalize(x, ops.bn_stats(x), affine, theirs, epilogue, y)
    np.testing.assert_array_equal(fused.pairs, statistics.pairs)
    np.testing.assert_array_equal(ours[:2], theirs[:2])
    np.testing.assert_array_equal(out, y)
    assert not np.signbit(fused.pairs[fused.pairs == 0]).any()

    statistics = Statistics.of(np.zeros(C), np.full(C, np.inf))  # a gradient of weight that is 0 whatever its sums are
    gradients = empty_gradients(x, affine)
    ops.bn_backward(dy, np.abs(y), statistics, affine, epilogue, 0.0, gradients)
    np.testing.assert_array_equal(gradients.dweight[1:], 0)
    assert not np.signbit(gradients.dweight[1:]).any()


def test_a_single_part_is_merged_in_bn_forward(x, affine, monkeypatch):
    """Merging one part takes the sign of zeros, and makes an infinite mean NaN; so does a call without parts."""
    mean, m2 = np.linspace(1, 2, 2 * x.shape[1]).reshape(2, -1)
    mean[:2], m2[:2] = (np.inf, -0.0), (1, -0.0)
    monkeypatch.setattr(ops, "_mean_and_m2", lambda *_: (mean.copy(), m2.copy()))
    fused = ops.bn_forward(x, affine, Running(), Epilogue(), np.empty_like(x))
    statistics = normalize(x, affine, Epilogue(), np.empty_like(x))
    assert bits(fused.pairs) == bits(statistics.pairs)
    assert np.isnan(fused.pairs[0]).all()


@pytest.mark.parametrize("value", [1e35, -1e35, 1e-35, 0.0, np.inf, np.nan])
@pytest.mark.parametrize("of", ["mean", "var", "weight", "bias", "var and weight", "m2", "slope", "dy"])
def test_a_short_cut_is_not_taken_where_a_number_is_extreme(of, value, rng, monkeypatch):
    """One channel that a cheap test has to notice: all results are those of a close look at every channel."""
    x, dy = rng.standard_normal((2, 6, 3, 5)).astype(np.float32)
    vectors = dict(zip(("mean", "var", "weight", "bias"), rng.uniform(0.5, 2, (4, 3)), strict=True))
    if of in vectors:
        vectors[of][1] = value
    if of == "var and weight":  # whose quotient is not extreme
        vectors["var"][1], vectors["weight"][1] = value**2, value
    with np.errstate(over="ignore", invalid="ignore"):
        x[:, 1] *= np.float32(value / 1e10 if of == "m2" else 1)
        dy[:, 1] *= np.float32(value * 1000 if of == "dy" else 1)
        np.testing.assert_allclose(ops.bn_stats(x).m2[0], x.var(axis=(0, 2), dtype=np.float64) * 30, rtol=1e-6)
    affine = Affine(vectors["weight"], vectors["bias"], 0.0)
    statistics = Statistics.of(vectors["mean"], vectors["var"])
    sums = Sums(*rng.standard_normal((2, 1, 3)))
    if of == "slope":
        sums.dy_xhat[0, 1] = value

    def everything():
        gradients, y = empty_gradients(x, affine), np.empty_like(x)
        ops.bn_normalize(x, None, affine, Running(vectors["mean"], vectors["var"]), Epilogue(), y)
        ours = ops.bn_backward_reduce(dy, x, statistics, affine, Epilogue())
        ops.bn_backward_input(dy, x, statistics, affine, Epilogue(), sums, 0.1, gradients)
        return [np.nan_to_num(a, nan=7) for a in (y, *ops.bn_stats(x)[:3], *ours, *gradients)]

    expected = everything()
    no_shortcut(monkeypatch)
    for a, b in zip(everything(), expected, strict=True):
        assert bits(a) == bits(b)


def test_numbers_within_a_size_for_sure():
    for length in 10, 10**4:  # two ways to find out
        numbers = np.zeros((3, length))
        assert ops.within(1e14, numbers)
        for value in 2e14, -2e14, np.inf, np.nan, 1e200:
            numbers[1, 7] = value
            with np.errstate(over="ignore", invalid="ignore"):
                assert not ops.within(1e14, numbers)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_bn_forward_and_bn_backward_are_their_steps(x, dy, residual, affine, activation):
    C = x.shape[1]
    ours, theirs = (Running(np.full(C, 0.5), np.full(C, 2.0), None, np.array(3)) for _ in range(2))
    ours_last, theirs_last = (Epilogue(residual, activation, ops.empty_passed(x, residual, x)) for _ in range(2))
    out, y = (np.empty_like(x) for _ in range(2))
    fused = ops.bn_forward(x, affine, ours, ours_last, out)
    moments = ops.bn_stats(x, theirs.batches)
    ops.bn_normalize(x, moments, affine, theirs, theirs_last, y)
    for a, b in (ours.mean, theirs.mean), (ours.var, theirs.var), (ours_last.passed, theirs_last.passed), (out, y):
        np.testing.assert_array_equal(a, b)
    assert ours.batches == theirs.batches == 4

    epilogue = ours_last._replace(residual=None)
    ours, theirs = (empty_gradients(x, affine) for _ in range(2))
    ops.bn_backward(dy, x, fused, affine, epilogue, C / x.size, ours)
    sums = ops.bn_backward_reduce(dy, x, fused, affine, epilogue)
    ops.bn_backward_input(dy, x, fused, affine, epilogue, sums, C / x.size, theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def memory():
    """What is remembered of channels: nothing, before a test and after it."""
    channels._of_bytes.cache_clear()
    yield channels._of_bytes
    channels._of_bytes.cache_clear()


NUMBERS = [1.5, -0.0, 0.0, np.nan, -1.5]


@pytest.mark.parametrize("of", ["mean", "var", "weight", "bias"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_channels_are_those_of_the_numbers_that_vectors_have_now(of, dtype, memory):
    """Channels are remembered by what is in the vectors, to the last bit, and by their dtypes."""
    vectors = {name: np.full(6, 2, dtype)[::2] for name in ("mean", "var", "weight", "bias")}
    results = []
    for _ in range(2):
        for number in NUMBERS:
            vectors[of][1] = number
            for weight in vectors["weight"], None:
                affine = Affine(weight, vectors["bias"], EPS)
                mean, var = vectors["mean"], vectors["var"]
                with np.errstate(all="ignore"):
                    ours = channels.remembered(np.dtype(np.float32), mean, var, affine)
                    expected = channels.Channels.of(np.dtype(np.float32), mean, var, affine)
                assert bits(*ours.table) == bits(*expected.table)
                results.append(ours)
    half = len(results) // 2
    assert all(a is b for a, b in zip(results[:half], results[half:], strict=True))
    assert memory.cache_info().misses == half - (len(NUMBERS) - 1) * (of == "weight")


def test_channels_of_other_arguments_are_others(memory):
    """Equal bytes are not enough: of a float32 and an integer number, of a missing weight and a missing bias."""
    ones, zeros = np.ones(4, np.float16), np.zeros(2, np.float32)
    float32, float64 = np.dtype(np.float32), np.dtype(np.float64)
    calls = [
        (float32, ones, ones, Affine(None, None, EPS)),
        (float64, ones, ones, Affine(None, None, EPS)),
        (float32, ones, ones, Affine(None, None, 2 * EPS)),
        (float32, ones, ones, Affine(ones, None, EPS)),
        (float32, ones, ones, Affine(None, ones, EPS)),
        (float32, ones.view(np.float32), zeros, Affine(None, None, EPS)),
        (float32, ones.view(ml_dtypes.bfloat16), ones, Affine(None, None, EPS)),
        (float32, zeros, ones.view(np.float32), Affine(None, None, EPS)),
    ]
    for _ in range(2):
        for call in calls:
            ours, expected = channels.remembered(*call), channels.Channels.of(*call)
            assert ours.dtype == expected.dtype
            assert bits(*ours[:3]) == bits(*expected[:3])
    assert memory.cache_info()[:2] == (len(calls), len(calls))


@pytest.mark.usefixtures("memory")
def test_an_eps_of_zero_has_a_sign():
    zeros = -np.zeros(3)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = [channels.remembered(np.dtype(np.float32), zeros, zeros, Affine(None, None, eps)) for eps in (0.0, -0.0)]
    assert [np.signbit(row.table[0]).all() for row in rows] == [False, True]


def test_what_is_remembered_is_bounded_and_read_only(memory):
    def remembered(C, first, var=1.0):
        return channels.remembered(np.dtype(np.float32), np.full(C, first), np.full(C, var), Affine(None, None, EPS))

    for first in range(200):
        remembered(4, first)
    assert memory.cache_info().currsize == memory.cache_info().maxsize <= 64
    remembered(channels.REMEMBERED + 1, 1e6)
    assert memory.cache_info().misses == 200  # a large one is not kept
    with np.errstate(all="ignore"):
        ours = remembered(4, 1e6, 1e35)
    for array in ours[:4]:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_threads_share_what_is_remembered(rng, memory):
    """Calls on threads of their own, with a few sets of statistics in turn: the results of each are its own."""
    x = rng.standard_normal((6, 5, 4)).astype(np.float32)
    affine, sets = Affine(np.ones(5), np.zeros(5), EPS), list(rng.uniform(1, 2, (3, 2, 5)))

    def normalized(index):
        out = np.empty_like(x)
        ops.bn_normalize(x, None, affine, Running(*sets[index % 3]), Epilogue(), out, keep=False)
        return bits(out)

    expected = [normalized(index) for index in range(3)]
    memory.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(normalized, range(300))) == expected * 100


def test_statistics_only_where_they_are_wanted(x, affine):
    """Output and running statistics are the same without them."""
    C, results = x.shape[1], []
    for keep in True, False:
        running, out, y = Running(np.full(C, 0.5), np.full(C, 2.0), 0.1), np.empty_like(x), np.empty_like(x)
        trained = ops.bn_forward(x, affine, running, Epilogue(), out, keep)
        normalized = ops.bn_normalize(x, None, affine, running, Epilogue(), y, keep)
        assert (trained is None) == (normalized is None) == (not keep)
        results.append(bits(out, y, running.mean, running.var))
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(4, 8, 49), (64, 9, 1), (512, 1, 1), (1, 2, 511)], indirect=True, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_callers_size_of_buffers_changes_no_bit(x, dtype):
    """Small arrays are summed with whatever buffers there are."""
    x, results = x.astype(dtype), []
    for size in 8192, 16:
        with np.errstate():  # restores the size of buffers, too
            np.setbufsize(size)
            results.append(bits(*ops.bn_stats(x)[1:3]))
    assert results[0] == results[1]
