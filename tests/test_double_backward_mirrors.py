"""Both steps of second order on NumPy arrays, which specify the kernels, against the textbook; and the textbook itself.

The textbook, `second_order`, is held to complex steps through the way back, and to PyTorch's autograd.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from cupybn._steps import channels, numpy_ops, tiles
from cupybn._steps import numpy_double_backward as steps
from cupybn._steps.bundles import Affine, Epilogue, Incoming, Running, SecondGradients, SecondSums, Statistics
from tests.reference import DTYPES, bits
from tests.second_order import assert_second_order, second_order

EPS = 1e-5
SHAPES = [
    (3, 2, 1),
    (2, 3, 2),
    (7, 3, 49),  # short rows
    (3, 2, 5001),  # long rows
    (4099, 3, 1),  # channels last, joined rows and a rest
    (20, 9, 333),
]
LAYOUTS = {"channels first": (12, 50), "channels last": (600, 1)}
"""N and L of arrays."""
GATES = (None, "input", "record")
"""How the way back knows what ReLU has let through; None without ReLU."""

on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
on_gates = pytest.mark.parametrize("gate", GATES)
on_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


class Call(NamedTuple):
    """Arguments of both steps, and what the way forward has found."""

    incoming: Incoming
    x: np.ndarray
    statistics: Statistics
    affine: Affine
    epilogue: Epilogue
    training: bool
    passed: np.ndarray | None  # record of what ReLU has let through; None without ReLU

    @property
    def inv_count(self):
        return self.x.shape[1] / self.x.size if self.training else 0.0

    def sums(self):
        return steps.bn_double_backward_reduce(*self[:5])

    def results(self, sums=..., dweight=...):
        """(ddy, dx, dweight), which were full of NaN before."""
        dweight = np.full(self.x.shape[1], np.nan) if dweight is ... else dweight
        gradients = SecondGradients(*(np.full(self.x.shape, np.nan, self.x.dtype) for _ in range(2)), dweight)
        sums = self.sums() if sums is ... else sums
        steps.bn_double_backward_input(*self[:5], sums, self.inv_count, gradients)
        return gradients

    def expected(self):
        """What the textbook makes of it, given what ReLU has let through."""
        dy, cdx, cdresidual, cdweight, cdbias = self.incoming
        return second_order(
            self.x,
            dy,
            self.affine.weight,
            self.affine.bias,
            cotangents=(cdx, cdweight, cdbias, cdresidual),
            running=None if self.training else (self.statistics.mean, self.statistics.var),
            eps=self.affine.eps,
            relu=False if self.passed is None else self.passed,
        )

    def check(self, **options):
        results = self.results(**options)
        assert_second_order(results, self.expected(), self.x.dtype)
        return results


def call_of(x, incoming, affine, training, gate=None, residual=None, running=None) -> Call:
    """A call after a way forward with these arguments. `running` are the statistics in eval mode."""
    if training:
        running = numpy_ops.mean_and_var(numpy_ops.bn_stats(x), np.float64)
    passed, epilogue = None, Epilogue()
    if gate is not None:
        passed = numpy_ops.empty_passed(x, x, x)
        forward = Epilogue(residual if gate == "record" else None, "relu", passed)
        numpy_ops.bn_normalize(x, None, affine, Running(*running), forward, np.empty_like(x))
        epilogue = Epilogue(None, "relu", passed if gate == "record" else None)
    return Call(incoming, x, Statistics.of(*running), affine, epilogue, training, passed)


def random_call(rng, shape, dtype, training, gate=None, *, without=()) -> Call:
    """A call with random arguments, but for those that it is to do without."""
    C = shape[1]
    x, dy, cdx, cdresidual, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(5))
    weight, bias, cdweight, cdbias = rng.standard_normal((4, C)).astype(np.float32)
    given = {
        "cdx": cdx,
        "cdresidual": cdresidual,
        "cdweight": cdweight,
        "cdbias": cdbias,
        "weight": weight,
        "bias": bias,
    }
    given |= dict.fromkeys(without)
    affine = Affine(given.pop("weight"), given.pop("bias"), EPS)
    running = 3 + rng.standard_normal(C), rng.uniform(0.5, 2, C)
    x = (x.astype(np.float64) * 2 + 3).astype(dtype)
    return call_of(x, Incoming(dy, **given), affine, training, gate, residual, running)


# ---------------------------------------------------------------------------------------------------------------------
# The textbook


def loss(x, dy, weight, cotangents, passed, running):
    """Products of cotangents and gradients, added up; for complex numbers as well."""
    cdx, cdweight, cdbias, cdresidual = cotangents
    mean, var = running or (x.mean((0, 2)), ((x - x.mean((0, 2))[:, None]) ** 2).mean((0, 2)))
    xhat = (x - mean[:, None]) / np.sqrt(var + np.longdouble(EPS))[:, None]
    g = np.where(passed, dy, 0)
    dx = g if running else g - g.mean((0, 2))[:, None] - xhat * (g * xhat).mean((0, 2))[:, None]
    dx = dx * (weight / np.sqrt(var + np.longdouble(EPS)))[:, None]
    of_vectors = (g * xhat).sum((0, 2)) @ cdweight + g.sum((0, 2)) @ cdbias
    return (cdx * dx).sum() + (cdresidual * g).sum() + of_vectors


@in_both_modes
def test_the_textbook_is_the_slope_of_the_way_back(training, rng):
    """A complex step through the way back gives a derivative without cancellation, to all digits."""
    shape = 3, 2, 4
    x, dy, cdx, cdresidual = rng.standard_normal((4, *shape))
    weight, cdweight, cdbias = rng.standard_normal((3, 2))
    running = None if training else (rng.standard_normal(2), rng.uniform(0.5, 2, 2))
    cotangents, passed = (cdx, cdweight, cdbias, cdresidual), rng.random(shape) < 0.6

    def slopes(number):
        """Slopes of the loss along each element of one of its arguments."""
        found = np.empty(arguments[number].shape)
        for place in np.ndindex(found.shape):
            moved = [a.astype(np.clongdouble) for a in arguments]
            moved[number][place] += 1e-30j
            found[place] = loss(*moved, cotangents, passed, running).imag / 1e-30
        return found

    arguments = x, dy, weight
    results = second_order(x, dy, weight, cotangents=cotangents, relu=passed, running=running, eps=EPS)
    for number, result in enumerate((results.dx, results.ddy, results.dweight)):
        np.testing.assert_allclose(result, slopes(number), rtol=1e-12, atol=1e-14)


@in_both_modes
@on_gates
def test_pytorch_says_the_same(training, gate, rng):
    torch = pytest.importorskip("torch")
    call = random_call(rng, (5, 3, 7), np.float64, training)
    residual = rng.standard_normal(call.x.shape)
    call = call_of(call.x, call.incoming, call.affine, training, gate, residual, call.statistics.pairs.T.copy())
    dy, cdx, cdresidual, cdweight, cdbias = (torch.tensor(a.astype(np.float64)) for a in call.incoming)
    weight, bias = (torch.tensor(v.astype(np.float64), requires_grad=True) for v in call.affine[:2])
    x, added = (torch.tensor(a, requires_grad=True) for a in (call.x, residual))
    dy.requires_grad = True
    running = map(torch.tensor, call.statistics.pairs.T.copy())
    y = torch.nn.functional.batch_norm(x, *running, weight, bias, training, eps=EPS)
    y = y + added if gate == "record" else y + 0 * added
    y = y if gate is None else torch.relu(y)
    gradients = torch.autograd.grad(y, (x, weight, bias, added), dy, create_graph=True)
    if gate != "record":  # without a residual, dresidual is the gradient of y before ReLU: that of bias, not added up
        gradients = *gradients[:3], dy if gate is None else torch.where(y > 0, dy, 0)
    total = sum((g * c).sum() for g, c in zip(gradients, (cdx, cdweight, cdbias, cdresidual), strict=True))
    theirs = [g.numpy() for g in torch.autograd.grad(total, (dy, x, weight))]
    assert_second_order(theirs, call.expected(), np.float64)
    call.check()


# ---------------------------------------------------------------------------------------------------------------------
# Both steps


@on_dtypes
@on_gates
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, training, gate, dtype, rng):
    random_call(rng, shape, dtype, training, gate).check()


@on_dtypes
@on_gates
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, gate, dtype, rng):
    """Sums are within 1e-6 of the sizes of their terms, and closer in float64."""
    call = random_call(rng, shape, dtype, True, gate)
    x, dy, cdx = (a.astype(np.longdouble) for a in (call.x, call.incoming.dy, call.incoming.cdx))
    g = dy if call.passed is None else np.where(call.passed, dy, 0)
    xhat = (x - call.statistics.mean[:, None]) / np.sqrt(call.statistics.var + EPS)[:, None]
    bound = 1e-14 if dtype == np.float64 else 1e-6
    for name, terms in ("dy", g), ("dy_xhat", g * xhat), ("cdx", cdx), ("cdx_xhat", cdx * xhat), ("cdx_dy", cdx * g):
        sum_of_terms = getattr(call.sums(), name)
        assert sum_of_terms.shape == (1, shape[1])
        assert sum_of_terms.dtype == np.float64
        error = np.abs(sum_of_terms[0] - terms.sum((0, 2)))
        assert np.all(error <= bound * np.abs(terms).sum((0, 2))), name
    without = call._replace(incoming=call.incoming._replace(cdx=None)).sums()
    assert bits(*without[:2]) == bits(*call.sums()[:2])
    np.testing.assert_array_equal(without[2:], np.zeros((3, 1, shape[1])))


@on_gates
@in_both_modes
def test_every_choice_of_cotangents(training, gate, rng):
    """None stands for zeros; and where nothing depends on an argument, its gradient is 0."""
    every = "cdx", "cdresidual", "cdweight", "cdbias"
    for count in range(5):
        for without in itertools.combinations(every, count):
            call = random_call(rng, (6, 3, 5), np.float32, training, gate, without=without)
            results = call.check()
            incoming = call.incoming
            assert (np.count_nonzero(results.dweight) == 0) == (incoming.cdx is None)
            nothing = incoming.cdweight is None and (incoming.cdx is None or not training)
            assert (np.count_nonzero(results.dx) == 0) == nothing
            assert (np.count_nonzero(results.ddy) == 0) == (count == 4)


@pytest.mark.parametrize("without", [["weight"], ["bias"], ["weight", "bias"]], ids=" and ".join)
@on_gates
@in_both_modes
def test_without_weight_or_bias(training, gate, without, rng):
    random_call(rng, (6, 3, 5), np.float32, training, gate, without=without).check()


@on_dtypes
@pytest.mark.parametrize("other", [*DTYPES], ids=lambda dtype: dtype.name)
def test_vectors_of_any_dtype_and_stride(other, dtype, rng):
    call = random_call(rng, (6, 3, 5), dtype, True, "input")

    def strided(vector):
        memory = np.full(2 * len(vector), 77, other)
        memory[::-2] = vector
        return memory[::-2]

    weight, bias, eps = call.affine
    incoming = call.incoming
    incoming = incoming._replace(cdweight=strided(incoming.cdweight), cdbias=strided(incoming.cdbias))
    affine = Affine(strided(weight), strided(bias), eps)
    call = call_of(call.x, incoming, affine, True, "input")
    dweight = strided(np.full(3, np.nan))
    results = call.check(dweight=dweight)
    assert results.dweight is dweight
    np.testing.assert_array_equal(dweight.base[::2], np.full(3, 77, other))  # between its elements


@on_gates
@in_both_modes
def test_arguments_are_only_read(training, gate, rng):
    call = random_call(rng, (6, 3, 5), np.float32, training, gate)
    arrays = [*call.incoming, call.x, call.statistics.pairs, *call.affine[:2]]
    arrays += [] if call.passed is None else [call.passed]
    sums = call.sums()
    before = bits(*arrays, *sums)
    for array in *arrays, *sums:
        array.flags.writeable = False
    expected = bits(*call.results(sums))
    assert bits(*call.results(sums)) == expected
    assert bits(*arrays, *sums) == before


def test_without_dweight(rng):
    call = random_call(rng, (6, 3, 5), np.float32, True)
    assert call.results(dweight=None).dweight is None
    assert bits(*call.results(dweight=None)[:2]) == bits(*call.results()[:2])


def test_sums_in_parts_are_added(rng):
    call = random_call(rng, (6, 3, 5), np.float64, True)
    sums = call.sums()
    parts = SecondSums(*(np.concatenate([rng.standard_normal((3, 3)), field]) for field in sums))
    for field, of_parts in zip(sums, parts, strict=True):
        of_parts[3] -= of_parts[:3].sum(axis=0)
        np.testing.assert_allclose(of_parts.sum(axis=0), field[0], atol=1e-13)
    for ours, theirs in zip(call.results(parts), call.results(sums), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@on_gates
@pytest.mark.parametrize("without", [["cdx"], ["cdx", "cdweight"], []], ids=" and ".join)
def test_no_sums_are_zeros(without, gate, rng):
    call = random_call(rng, (6, 3, 5), np.float32, False, gate, without=without)
    zeros = SecondSums(*np.zeros((5, 1, 3)))
    assert bits(*call.results(None)) == bits(*call.results(zeros))
    assert bits(*call.results(None)[:2]) == bits(*call.results()[:2])  # in eval mode only dweight needs a sum


# ---------------------------------------------------------------------------------------------------------------------
# Tiles and threads


@pytest.mark.parametrize("shape", [(7, 3, 49), (3, 2, 5001), (4099, 3, 1), (2, 600, 3)], ids=str)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bfloat16", "float32"])
def test_many_tiles_on_threads(shape, dtype, monkeypatch, rng):
    """The number of threads changes no bit, and how an array is cut none of what is elementwise."""
    call = random_call(rng, shape, dtype, True, "input")
    sums = call.sums()
    whole = bits(*call.results(sums))
    monkeypatch.setattr(tiles, "SMALL", 0)
    monkeypatch.setattr(tiles, "LARGE_TILE", 500)
    results = []
    for threads in "1", "5":
        monkeypatch.setenv("CUPYBN_NUM_THREADS", threads)
        assert bits(*call.results(sums)) == whole
        results.append(bits(*call.check()))
    assert results[0] == results[1]


@on_layouts
def test_arrays_larger_than_a_tile(layout, rng):
    N, L = layout
    call = random_call(rng, (N * 60, 9, L), np.float32, True, "input")
    assert call.x.size > tiles.TILE
    call.check()


@on_gates
@on_dtypes
@pytest.mark.parametrize("shape", [(5, 4, 1), (7, 3, 49), (3, 2, 600)], ids=str)
def test_shortcuts_change_no_bit(shape, dtype, gate, monkeypatch, rng):
    """Channels are looked at closely, also where a cheap test says that there is no need."""
    calls = [random_call(rng, shape, dtype, training, gate) for training in (True, False)]
    for call in calls:
        call.incoming.dy[:, 0] = 0  # nothing comes back of this channel
    expected = [bits(*call.sums(), *call.results()) for call in calls]
    for module in steps, channels:
        monkeypatch.setattr(module, "within", lambda *_: False)
    channels._of_bytes.cache_clear()
    assert [bits(*call.sums(), *call.results()) for call in calls] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Hard numbers


USUAL = {"x": 1.0, "mean": 0.0, "weight": 1.0, "dy": 1.0, "cdx": 1.0, "cdweight": 1.0, "cdbias": 1.0, "cdresidual": 1.0}
HARD = {
    "usual": {},
    "a mean far off": {"mean": 1e6},
    "a variance beyond float32": {"x": 1e30},
    "a large mean and variance": {"x": 1e20, "mean": 1e26},
    "tiny values": {"x": 1e-24},
    "tiny weight": {"weight": 1e-20},
    "large weight": {"weight": 1e20},
    "weight beyond float32": {"weight": 1e32, "dy": 1e-10, "cdx": 1e-10},
    "tiny cdx": {"cdx": 1e-30},
    "large cdx": {"cdx": 1e30},
    "tiny dy": {"dy": 1e-30},
    "large dy": {"dy": 1e30},
    "large cdx, tiny dy": {"cdx": 1e30, "dy": 1e-30},
    "products too small": {"cdx": 1e-30, "dy": 1e-30, "cdweight": 1e-30},
    "products that are partly lost": {"cdx": 1e-22, "dy": 1e-21, "cdweight": 0.0},
    "products too small with x": {"cdx": 1e-25, "dy": 1e-25, "x": 1e-20, "weight": 1e-20},
    "products too large": {"cdx": 1e20, "dy": 1e20},
    "sums too large": {"cdx": 1e38, "dy": 1e38, "weight": 1e-20},
    "products too large with x": {"cdx": 1e25, "dy": 1e25, "x": 1e14},
    "large cdweight": {"cdweight": 1e30, "cdbias": 1e30},
    "cdweight and large x": {"cdweight": 1e-34, "x": 1e9, "cdbias": 0.0, "cdresidual": 1e-34, "cdx": 1e-26},
    "cdweight and tiny x": {"cdweight": 1e28, "x": 1e-13, "dy": 1e-8, "cdx": 1e-8},
    "tiny cdbias": {"cdbias": 1e-34, "cdresidual": 1e-34, "cdweight": 1e-34, "cdx": 1e-34},
    "all tiny": {"weight": 1e-20, "cdx": 1e-10, "dy": 1e-10, "cdweight": 1e-25, "cdbias": 1e-30, "cdresidual": 1e-30},
}
"""Channels by what is hard about them: the sizes of their numbers, where they are not usual."""


def hard_call(layout, dtype, training, gate, eps, cases) -> Call:
    """A call whose channels have numbers of these sizes; channels of the same sizes have the same numbers."""
    (N, L), C, rng = layout, len(cases), np.random.default_rng(5)
    sizes = {name: np.array([(USUAL | case)[name] for case in cases]) for name in USUAL}
    if dtype == np.float64:  # the mean itself is a float64
        sizes["mean"] = np.minimum(sizes["mean"], 100 * sizes["x"])
    drawn = {name: rng.standard_normal((N, C, L)) * sizes[name][:, None] for name in ("x", "dy", "cdx", "cdresidual")}
    drawn["x"] += sizes["mean"][:, None]
    x, dy, cdx, cdresidual = (np.clip(a, -3e38, 3e38).astype(dtype) for a in drawn.values())
    weight, cdweight, cdbias = (rng.uniform(0.5, 2, C) * sizes[name] for name in ("weight", "cdweight", "cdbias"))
    mean, var = numpy_ops.mean_and_var(numpy_ops.bn_stats(x), np.float64)
    running = mean + 0.1 * np.sqrt(var), var * 1.5
    affine, residual = Affine(weight, None, eps), rng.standard_normal(x.shape).astype(dtype)
    return call_of(x, Incoming(dy, cdx, cdresidual, cdweight, cdbias), affine, training, gate, residual, running)


@pytest.mark.parametrize("eps", [1e-5, 1e-60])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: dtype.name)
@on_gates
@in_both_modes
@on_layouts
def test_hard_numbers(layout, training, gate, dtype, eps):
    hard_call(layout, dtype, training, gate, eps, [*HARD.values()]).check()


@pytest.mark.parametrize("name", HARD)
@on_layouts
def test_hard_numbers_alone(layout, name):
    """No channel beside them asks for a closer look."""
    hard_call(layout, np.float32, True, "input", EPS, [HARD[name]]).check()


@on_gates
@in_both_modes
@on_layouts
def test_hard_channels_change_no_other_channel(layout, training, gate):
    cases = [case for hard in HARD.values() for case in ({}, hard)]
    ours, theirs = (hard_call(layout, np.float32, training, gate, EPS, c).results() for c in (cases, [{}] * len(cases)))
    for a, b in zip(ours, theirs, strict=True):
        usual = slice(0, None, 2) if a.ndim == 1 else (slice(None), slice(0, None, 2))
        assert bits(a[usual]) == bits(b[usual])


@in_both_modes
@on_layouts
def test_sums_that_float32_does_not_hold(layout, training, rng):
    """Each of the five by itself: what is too large may be all of one sign, or a single product."""
    N, L = layout
    x, dy, cdx = rng.standard_normal((3, N, 6, L)).astype(np.float32)
    for array, others, channel in (dy, (x, cdx), 0), (cdx, (x, dy), 2):
        array[:, channel] = rng.uniform(1e38, 2e38, (N, L))
        for other in others:
            other[:, channel] *= np.float32(1e-10)
    for pair, channel in ((dy, x), 1), ((cdx, x), 3), ((cdx, dy), 4):
        pair[0][2, channel, 0], pair[1][2, channel, 0] = 1e26, 1e13
    with np.errstate(over="ignore"):
        too_large = [np.isinf(terms.sum((0, 2))) for terms in (dy, dy * x, cdx, cdx * x, cdx * dy)]
    np.testing.assert_array_equal(too_large, np.eye(5, 6))
    for some in slice(None), *(slice(channel, channel + 1) for channel in range(6)):
        of_some = [np.ascontiguousarray(array[:, some]) for array in (dy, cdx, x)]
        weight, var = np.full((2, of_some[0].shape[1]), [[1e-12], [2.0]])
        incoming = Incoming(*of_some[:2], None, weight, weight)
        call = call_of(of_some[2], incoming, Affine(weight, None, EPS), training, running=(0 * var, var))
        assert all(np.isfinite(sums).all() for sums in call.sums())
        call.check()


def test_sums_of_many_products_that_float32_rounds_to_subnormal_numbers():
    """Each is off by up to 2^-150, all in one direction, so that many of them are not held by a sum of normal size."""
    count, size = 2**17, 2.0**-71 * (1 + 0.9 * 2**-8)
    signs = np.resize(np.float32([1, -1]), (1, 1, count))
    dy, cdx = np.float32(size) * signs, np.float32(2.0**-71) * signs
    call = call_of(signs, Incoming(dy, cdx, None, None, None), Affine(None, None, EPS), True)
    (found,) = call.sums().cdx_dy[0]
    assert found == pytest.approx(np.vdot(cdx.astype(np.float64), dy.astype(np.float64)), rel=1e-12, abs=0)


# ---------------------------------------------------------------------------------------------------------------------
# Gates


@in_both_modes
@pytest.mark.parametrize(
    ("size", "scale"),
    [(1.0, 1.0), (1e-33, 1.0), (1e38, 1.0), (1.0, 1e31)],
    ids=["usual", "tiny factors", "sums beyond float32", "weights beyond float32"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_decides_as_on_the_way_forward(size, scale, training, dtype, rng):
    """ReLU passes the same elements, even those that roundings make positive, whatever dtype the factors need."""
    N, C = 64, 300
    around = rng.normal(3, 2, C).astype(dtype)
    x = (around + rng.integers(-4, 5, (N, C)).astype(dtype) * np.spacing(np.abs(around)))[..., None]
    mean, var, weight = rng.standard_normal(C), rng.uniform(0.5, 2, C), rng.uniform(0.5, 2, C) * scale
    bias = -(around.astype(np.float64) - mean) / np.sqrt(var + EPS) * weight
    incoming = Incoming(np.full_like(x, size), cdbias=np.full(C, size))
    call = call_of(x, incoming, Affine(weight, bias, EPS), False, "input", running=(mean, var))
    call = call._replace(training=training)
    assert 0.3 < np.mean(call.passed) < 0.7
    in_full = second_order(x, x, weight, bias, cotangents=(None, None, weight, None), running=(mean, var), relu=True)
    assert np.any((in_full.ddy > 0) != call.passed)  # so that roundings matter
    np.testing.assert_array_equal(call.results().ddy, np.where(call.passed, incoming.cdbias[:, None], 0).astype(dtype))
    np.testing.assert_allclose(call.sums().dy[0], size * np.count_nonzero(call.passed, (0, 2)), rtol=1e-6)
    with_weight = call._replace(incoming=incoming._replace(cdweight=np.full(C, size)), training=False)
    np.testing.assert_array_equal(with_weight.results(None).ddy != 0, call.passed)


@in_both_modes
@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@on_dtypes
def test_relu_stops_what_is_not_finite(number, gate, training, dtype, rng):
    """Never 0 * dy: where ReLU has stopped dy, neither it nor the residual's cotangent matters."""
    call = random_call(rng, (6, 3, 5), dtype, training, gate)
    results = []
    for stopped in 0, number:
        for array in call.incoming.dy, call.incoming.cdresidual:
            array[~call.passed] = stopped
        results.append(bits(*call.sums(), *call.check()))
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------------------------------
# NaN and inf


@on_gates
@in_both_modes
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of", ["x", "dy", "cdx", "cdresidual", "cdweight", "cdbias", "weight", "bias", "mean", "var"])
def test_what_is_not_finite_changes_no_other_channel(of, number, training, gate, rng):
    incoming, x, statistics, affine, *_ = random_call(rng, (6, 3, 5), np.float32, training)
    residual = rng.standard_normal(x.shape).astype(np.float32)
    results = []
    for changed in False, True:
        mean, var = statistics.pairs.T.copy()
        arrays = {"x": x, "mean": mean, "var": var} | incoming._asdict() | affine._asdict()
        if changed:
            arrays[of][(2, 1, 3) if arrays[of].ndim == 3 else 1] = number
        call = call_of(x, incoming, affine, training, gate, residual, (mean, var))
        results.append(call.results())
    for a, b in zip(*results, strict=True):
        others = [0, 2] if a.ndim == 1 else (slice(None), [0, 2])
        assert bits(a[others]) == bits(b[others])
    if of == "x" and training and gate is None:
        assert all(np.isnan(a[1] if a.ndim == 1 else a[:, 1]).all() for a in results[1])


@pytest.mark.parametrize("gate", [None, "record"])
@on_dtypes
def test_in_eval_without_cdweight_x_and_dy_may_be_inf(gate, dtype, rng):
    """No 0 * x and no 0 * dy: nothing depends on them, but for the gradient of weight on dy."""
    call = random_call(rng, (6, 3, 5), dtype, False, gate, without=["cdweight"])
    expected, sums = call.results(), call.sums()
    assert np.count_nonzero(expected.dx) == 0
    call.x[0], call.x[1, 0] = np.inf, np.nan
    call.incoming.dy[2] = np.inf
    for given in None, sums, call.sums():
        results = call.results(given)
        assert bits(*results[:2]) == bits(*expected[:2])
        assert given is not sums or bits(results.dweight) == bits(expected.dweight)
    call.incoming.dy[2] = 1
    dweight = call.results().dweight
    call.x[...] = 1
    np.testing.assert_allclose(dweight, call.results().dweight, rtol=1e-5)


@on_dtypes
@pytest.mark.parametrize("gate", [None, "record"])
@in_both_modes
def test_dy_may_be_inf_where_nothing_depends_on_it(training, gate, dtype, rng):
    """The gradient of dy does not depend on it; and without cdx that of weight, and without cdweight that of x."""
    for without in [], ["cdx"], ["cdx", "cdweight"]:
        call = random_call(rng, (6, 3, 5), dtype, training, gate, without=without)
        expected = call.results()
        call.incoming.dy[...] = np.inf
        results = call.results()
        assert bits(results.ddy) == bits(expected.ddy)
        if "cdx" in without:
            np.testing.assert_array_equal(results.dweight, 0)
        if "cdweight" in without:
            np.testing.assert_array_equal(results.dx, 0)


@in_both_modes
@pytest.mark.parametrize("gate", [None, "record"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_x_and_weight_may_be_nan_where_nothing_depends_on_them(number, gate, training, rng):
    """Nothing depends on weight without cdx, and on x if there is no cdweight either: statistics may be NaN, too."""

    def check(call, expected):
        for a, b in zip(call.results(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    for without in ["cdx"], ["cdx", "cdweight"]:
        call = random_call(rng, (6, 3, 5), np.float32, training, gate, without=without)
        expected = call.results()
        call.affine.weight[1] = number
        check(call, expected)
    call.x[1] = number
    call.statistics.pairs[2] = np.nan
    check(call, expected)


@on_dtypes
def test_in_eval_an_element_of_cdx_is_of_one_of_ddy(dtype, rng):
    """An element of cdx is part of one element of ddy, and of the gradient of its channel's weight."""
    call = random_call(rng, (6, 3, 5), dtype, False)
    expected = call.results()
    call.incoming.cdx[2, 1, 3] = np.nan
    results = call.results()
    for a, b, place in zip(results, expected, [(2, 1, 3), None, 1], strict=True):
        spoilt = np.zeros(a.shape, bool)
        if place is not None:
            spoilt[place] = True
        assert np.array_equal(np.isnan(a.astype(np.float64)), spoilt)
        assert bits(a[~spoilt]) == bits(b[~spoilt])
