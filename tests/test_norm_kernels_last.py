"""The kernels of the norms for channels last against their mirrors: every dtype, pack, size of groups and cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cupybn._steps import geometry, norms_last, numpy_norms, plans, sample_geometry
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Statistics
from cupybn._steps.norm import Norm
from tests.reference import DTYPES, HALF_ULP, bits, to_numpy

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="a GPU does not tell")

from tests.steps import EPS, forget_plans, to_device, to_host  # noqa: E402 - imports CuPy

SHAPES = {  # N, A, C, groups, and what is special
    "instance": (3, 70, 24, 24),
    "groups within packs": (2, 9, 48, 24),
    "packs of two groups": (2, 35, 80, 8),
    "groups of three": (2, 67, 24, 8),
    "groups in the last span": (2, 5, 104, 13),
    "one channel": (3, 40, 1, 1),
    "odd channels": (3, 21, 15, 5),
    "one position": (3, 1, 24, 3),
    "one value": (2, 1, 8, 8),
    "few positions": (2, 3, 16, 2),
    "one group": (2, 300, 40, 1),
    "groups of several tiles": (2, 19, 320, 2),
    "tiles of several groups": (2, 10, 264, 8),
    "odd groups of several tiles": (1, 9, 105, 3),
    "one long group": (1, 5, 1024, 1),
}
WAYS = {"on chip": 8, "one block": 1, "streamed": 0}
"""Blocks that keep a span on chip; none where it is streamed, by a block for every few positions."""
FEW = {"LEAST_SUMMED": 64, "LEAST_MAPPED": 64, "ROWS_PER_PART": 1}
"""Elements of a share, and positions for each part that a block adds up, so that small arrays have several shares."""
NEVER_IDLE = {"LEAST": 10**9, "SOON": 10**9}
"""Limits with which spans stay on chip, however few there are."""
SOME = ("instance", "packs of two groups", "groups of several tiles")
"""Shapes for every dtype, and every way."""
ALL = {"on chip": "float16", "streamed": "float32"}
"""Ways that are tried with all shapes, each in one dtype."""
FUSED = {"": (None, False), "relu": ("relu", False), "record": ("relu", True), "residual": (None, True)}
"""Activation, and whether there is a residual. With both the way back reads a record."""


def cases():
    for way in WAYS:
        for name, shape in SHAPES.items():
            for dtype in DTYPES:
                if dtype.name == ALL.get(way) or (name in SOME and (dtype == np.float16 or way == "on chip")):
                    for fused in FUSED if name in SOME and dtype == np.float16 else ("record",):
                        label = f"{name}, {dtype.name}, {way}"
                        yield pytest.param(shape, dtype, 0, way, fused, id=f"{label}, {fused}" if fused else label)
                    if name in SOME and dtype.name == ALL.get(way):
                        yield pytest.param(shape, dtype, 1, way, "record", id=f"{name}, {dtype.name}, {way}, unaligned")


@pytest.fixture
def take(monkeypatch):
    """A function that makes all launches take a way of WAYS from now on."""

    def take(way):
        blocks = WAYS[way]
        if blocks > 1 and not plans.properties_of(0).clusters:
            pytest.skip("a GPU without clusters")
        monkeypatch.setattr(sample_geometry, "BLOCKS", (blocks,) if blocks else ())
        for name, number in (FEW if way == "streamed" else NEVER_IDLE).items():
            monkeypatch.setattr(sample_geometry, name, number)
        norms_last.plans_of.cache_clear()

    norms_last.plans_of.cache_clear()
    yield take
    norms_last.plans_of.cache_clear()


class Case:
    """Arguments of both ways of a norm on the host and on the device, and what the mirrors make of them."""

    def __init__(self, rng, shape, dtype, offset=0, fused="record", affine=True, scale=2.0):
        N, A, C, groups = shape
        self.norm, self.offset, self.dtype = Norm(groups), offset, np.dtype(dtype)
        self.activation, has_residual = FUSED[fused]
        self.x = (rng.standard_normal((N, A, C, 1)) * scale + 3).astype(dtype)
        self.dy, residual = rng.standard_normal((2, N, A, C, 1)).astype(dtype)
        self.residual = residual if has_residual else None
        weight, bias = rng.standard_normal((2, C)).astype(np.float32)
        self.affine = Affine(weight, bias, EPS) if affine else Affine(None, None, EPS)
        self.unit = 2 * HALF_ULP["float64" if dtype == np.float64 else "float32"]

    def mirror(self):
        """The mirrors' results: out, statistics, gradients and sums. No element is so near to 0 that the signs that
        ReLU sees may differ and matter."""
        y = np.empty(self.x.shape)
        numpy_norms.norm_forward(self.x, self.norm, self.affine, Epilogue(self.residual), y)
        self.dy[np.abs(y) < 1e-3] = 0
        out, passed = np.empty_like(self.x), None
        if self.residual is not None and self.activation:
            passed = numpy_norms.empty_passed(self.x, self.norm, self.residual, out)
        epilogue = Epilogue(self.residual, self.activation, passed)
        statistics = numpy_norms.norm_forward(self.x, self.norm, self.affine, epilogue, out)
        gradients = Gradients(np.empty_like(self.x), np.empty_like(self.x))
        sums = numpy_norms.norm_backward(
            self.dy, self.x, self.norm, statistics, self.affine, epilogue._replace(residual=None), gradients
        )
        return out, statistics, gradients, sums

    def on_device(self, value):
        return None if value is None else to_device(value, self.offset)

    def forward(self, into=None):
        """The device's output, statistics, and the record if there is one. The output goes to `into`, if given."""
        x, residual = self.on_device(self.x), self.on_device(self.residual)
        out = {None: self.on_device(np.zeros_like(self.x)), "x": x, "residual": residual}[into]
        passed = None
        if residual is not None and self.activation:
            passed = norms_last.empty_passed(x, self.norm, residual, out)
        statistics = Statistics(cp.empty((len(self.x) * self.norm.groups, 2)))
        epilogue = Epilogue(residual, self.activation, passed)
        norms_last.forward(x, self.norm, self.on_device(self.affine), epilogue, out, statistics)
        return out, statistics, passed

    def backward(self, statistics, passed=None, dresidual=True, keep=True):
        """The device's gradients and sums, from these statistics."""
        x, dy = self.on_device(self.x), self.on_device(self.dy)
        dx, of_residual = self.on_device(np.zeros_like(self.x)), self.on_device(np.zeros_like(self.x))
        gradients = Gradients(dx, of_residual if dresidual else None)
        epilogue = Epilogue(None, self.activation, passed)
        sums = norms_last.backward(
            dy, x, self.norm, to_device(statistics), self.on_device(self.affine), epilogue, gradients, keep
        )
        return gradients, sums

    def rows(self, values):
        """The array as (N, A, groups, channels of a group), in float64."""
        N, A, C, _ = self.x.shape
        return np.asarray(values, np.float64).reshape(N, A, self.norm.groups, C // self.norm.groups)

    def close(self, ours, mirrored, size, roundings):
        """Check that arrays are equal up to some roundings of terms of a given size, and one to the dtype itself."""
        ours, mirrored = self.rows(to_numpy(ours)), self.rows(mirrored)
        bound = roundings * self.unit * (np.abs(mirrored) + size) + 2 * HALF_ULP[self.dtype.name] * np.abs(mirrored)
        error = np.abs(ours - mirrored)
        assert np.all(error <= bound), f"off by {np.max(error - bound)} more than is allowed"


def of_rows(case, values):
    """A value of each row, to be broadcast."""
    return values.reshape(len(case.x), 1, case.norm.groups, 1)


@pytest.mark.parametrize(("shape", "dtype", "offset", "way", "fused"), list(cases()))
def test_forward_and_backward(rng, shape, dtype, offset, way, fused, take):
    take(way)
    case = Case(rng, shape, dtype, offset, fused)
    y, theirs, expected, sums = case.mirror()

    out, ours, passed = case.forward()
    mean, var = to_host(ours).pairs.T
    allowed = 4 * case.unit * np.sqrt(theirs.var) + 2 * HALF_ULP["float64"] * np.abs(theirs.mean)
    assert np.all(np.abs(mean - theirs.mean) <= allowed)
    np.testing.assert_allclose(var, theirs.var, rtol=8 * case.unit)
    case.close(out, y, 1 + np.abs(case.rows(np.broadcast_to(case.affine.weight[:, None], case.x.shape))), 16)

    gradients, parts = case.backward(theirs, passed)
    g, rstd = case.rows(expected.dresidual), 1 / np.sqrt(theirs.var + EPS)
    np.testing.assert_array_equal(case.rows(to_numpy(gradients.dresidual)), g)
    weighted = g * case.affine.weight.reshape(1, 1, case.norm.groups, -1)
    case.close(gradients.dx, expected.dx, of_rows(case, rstd) * np.abs(weighted).max((1, 3), keepdims=True), 16)
    xhat = (case.rows(case.x) - of_rows(case, theirs.mean)) * of_rows(case, rstd)
    sizes = np.abs(g).sum((0, 1)).ravel()  # xhat is off by what the mean is off, in standard deviations
    for a, b, terms in zip(to_host(parts), sums, (g, g * xhat), strict=True):
        assert np.all(np.abs(a.sum(0) - b[0]) <= case.unit * (32 * np.abs(terms).sum((0, 1)).ravel() + 4 * sizes))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_wanted_is_left_alone(rng, way, take):
    """The other results have the same bits without statistics, sums, and the residual's gradient."""
    take(way)
    case = Case(rng, SHAPES["packs of two groups"], np.float16, fused="relu", affine=False)
    y, statistics, expected, _ = case.mirror()
    out, *_ = case.forward()
    case.close(out, y, 2, 16)
    bare = cp.empty_like(out)
    norms_last.forward(case.on_device(case.x), case.norm, case.affine, Epilogue(None, "relu"), bare, None)
    assert bits(bare) == bits(out)
    (dx, *_), _ = case.backward(statistics)
    (alone, *_), nothing = case.backward(statistics, dresidual=False, keep=False)
    assert nothing is None
    assert bits(alone) == bits(dx)
    case.close(dx, expected.dx, 8, 16)


@pytest.mark.parametrize("shape", SOME)
@pytest.mark.parametrize("into", ["x", "residual"])
@pytest.mark.parametrize("way", WAYS)
def test_in_place(rng, way, into, shape, take):
    take(way)
    case = Case(rng, SHAPES[shape], np.float16)
    assert bits(*case.forward(into)[::2]) == bits(*case.forward()[::2])


@pytest.mark.parametrize("way", ["on chip", "streamed"])
@pytest.mark.parametrize("odd", [1e25, 1e-25, np.nan, np.inf])
def test_what_is_odd_of_one_row_changes_no_other_one(rng, odd, way, take):
    """Numbers near the limits of float32 are computed in float64, and those that are not finite stay in their row."""
    take(way)
    case = Case(rng, SHAPES["instance"], np.float32, affine=False)
    case.affine = case.affine._replace(eps=0.0)
    results = {}
    for name in "usual", "odd":
        if name == "odd":
            case.x[1, :, 5] *= odd
        out, statistics, passed = case.forward()
        gradients, sums = case.backward(to_host(statistics), passed)
        results[name] = [to_numpy(a).copy() for a in (out, gradients.dx, gradients.dresidual)]
        results[name] += [np.moveaxis(statistics.pairs.get().reshape(3, 24, 2), 2, 1)]
        results[name] += [np.reshape(a.get(), (3, -1, 24)) for a in sums]
    one = np.arange(24) == 5
    for usual, odd_ones in zip(results["usual"], results["odd"], strict=True):
        assert bits(odd_ones[[0, 2]]) == bits(usual[[0, 2]])
        assert bits(odd_ones[1][:, ~one]) == bits(usual[1][:, ~one])
    if not np.isfinite(odd):
        assert np.isnan(results["odd"][3][1, 1, 5])
        return
    y, dx = (results["odd"][i][1, :, 5] for i in (0, 1))
    np.testing.assert_allclose(y, results["usual"][0][1, :, 5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx * odd, results["usual"][1][1, :, 5], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["on chip", "streamed"])
@pytest.mark.parametrize("value", [7.0, 1e4, 1e30])
def test_constant_rows_give_the_bias(rng, value, way, take):
    take(way)
    case = Case(rng, SHAPES["packs of two groups"], np.float32, fused="")
    case.x[...] = value
    case.x[..., :10, :] = rng.standard_normal((2, 35, 10, 1))  # the first group is no constant
    out, statistics, _ = case.forward()
    np.testing.assert_array_equal(to_numpy(out)[:, :, 10:, 0], np.broadcast_to(case.affine.bias[10:], (2, 35, 70)))
    np.testing.assert_array_equal(to_host(statistics).pairs.reshape(2, 8, 2)[:, 1:, 1], 0)
    dx = case.backward(to_host(statistics))[0].dx
    assert np.all(np.isfinite(to_numpy(dx)))


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
@pytest.mark.parametrize("way", ["on chip", "streamed"])
def test_means_far_above_the_deviations(rng, scale, way, take):
    """Groups whose channels all have a mean of up to a million standard deviations, one of them elsewhere, with an
    outlier."""
    take(way)
    case = Case(rng, SHAPES["packs of two groups"], np.float32, fused="", scale=3 * scale, affine=False)
    case.affine = case.affine._replace(eps=0.0)
    case.x[0, 3, 2] = 4
    y = np.empty(case.x.shape)
    statistics = numpy_norms.norm_forward(case.x, case.norm, case.affine, Epilogue(), y)
    out, ours, _ = case.forward()
    assert np.all(np.abs(to_numpy(out) - y) <= 1e-6 + 2**-22 * np.abs(y))
    np.testing.assert_allclose(to_host(ours).var, statistics.var, rtol=1e-6)

    case.dy += y.astype(np.float32)  # which makes mean(dy * xhat) about 1
    dx = np.empty(case.x.shape)
    numpy_norms.norm_backward(case.dy, case.x, case.norm, statistics, case.affine, Epilogue(), Gradients(dx))
    off = np.abs(case.rows(to_numpy(case.backward(statistics)[0].dx)) - case.rows(dx))
    size = np.maximum(np.abs(case.rows(dx)), np.abs(case.rows(case.dy)) / of_rows(case, np.sqrt(statistics.var)))
    assert np.all(off <= 3e-6 * size.max((1, 3), keepdims=True))


def test_more_samples_than_a_side_of_a_grid_has_blocks(rng, take, monkeypatch):
    take("one block")
    monkeypatch.setattr(geometry, "MOST_GRID_X", 3)
    case = Case(rng, (7, 2, 8, 2), np.float16)
    out, statistics, passed = case.forward()
    gradients, sums = case.backward(to_host(statistics), passed)
    for n in range(7):
        alone = Case(rng, (1, 2, 8, 2), np.float16)
        alone.affine, alone.x, alone.dy = case.affine, case.x[n : n + 1], case.dy[n : n + 1]
        alone.residual = case.residual[n : n + 1]
        y, kept, record = alone.forward()
        theirs, parts = alone.backward(to_host(kept), record)
        assert bits(y, kept.pairs) == bits(out[n : n + 1], statistics.pairs[2 * n : 2 * n + 2])
        assert bits(*theirs[:2], *parts) == bits(*(a[n : n + 1] for a in (*gradients[:2], *sums)))


@pytest.mark.parametrize("way", ["on chip", "streamed"])
def test_indices_of_64_bits_give_the_same_bits(rng, way, take, monkeypatch):
    take(way)
    case = Case(rng, SHAPES["packs of two groups"], np.float16)
    results = []
    for most in norms_last.MOST_INT, 0:
        monkeypatch.setattr(norms_last, "MOST_INT", most)
        norms_last.plans_of.cache_clear()
        out, statistics, passed = case.forward()
        gradients, sums = case.backward(to_host(statistics), passed)
        results.append(bits(out, statistics.pairs, *gradients[:2], *sums))
    assert results[0] == results[1]


def test_all_blocks_of_a_cluster_have_the_same_statistics_and_sums(rng, take):
    """Elements that are alike stay so, whichever block keeps them."""
    take("on chip")
    case = Case(rng, (2, 300, 40, 4), np.float32, fused="", affine=False)
    case.x[...] = rng.choice(rng.standard_normal(4), case.x.shape)
    case.dy = case.x**3
    out, statistics, _ = case.forward()
    dx = case.backward(to_host(statistics))[0].dx
    rows = case.rows(case.x)
    for result in case.rows(to_numpy(out)), case.rows(to_numpy(dx)):
        for n, g in np.ndindex(2, 4):
            assert np.unique(result[n, :, g]).size == np.unique(rows[n, :, g]).size == 4


# ---------------------------------------------------------------------------------------------------------------------
# Launches


@only_emulated
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("groups", [64, 8, 1])
@pytest.mark.parametrize(("way", "passes"), [("on chip", (2, 3)), ("streamed", (3, 5))])
def test_traffic(rng, way, passes, groups, dtype, take, monkeypatch):
    """Passes over the tensor, of samples that are kept on chip or streamed; a residual is one more."""
    take(way)
    if way == "streamed":  # shares of a usual size, on a device with room for few blocks: each adds up all parts
        monkeypatch.undo()
        monkeypatch.setattr(sample_geometry, "BLOCKS", ())
    monkeypatch.setattr(emulator, "devices", [replace(emulator.H200, multiprocessors=1)])
    forget_plans()
    norms_last.plans_of.cache_clear()
    for fused, more in ("relu", 0), ("record", 1):
        case = Case(rng, (1, 2048, 64, groups), dtype, fused=fused)
        with emulator.record() as launches:
            _, statistics, passed = case.forward()
            case.backward(to_host(statistics), passed, dresidual=bool(more))
        for step, expected in zip(("norm_forward", "norm_backward"), passes, strict=True):
            some = [launch for launch in launches if launch.name == step]
            assert len(some) == (1 if way == "on chip" else 2)
            moved = sum(launch.bytes_read + launch.bytes_written for launch in some) / case.x.nbytes
            assert moved == pytest.approx(expected + more, rel=0.1)
