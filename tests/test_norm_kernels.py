"""The kernels of instance, group, layer and RMS norm for channels first against their mirrors, however rows are cut."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
cp = pytest.importorskip("cupy")

from cupybn._steps import cupy_norms, numpy_norms, plans  # noqa: E402
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Running, Statistics, Sums  # noqa: E402
from cupybn._steps.norm import Norm  # noqa: E402
from tests.reference import assert_close, bits, to_numpy  # noqa: E402
from tests.steps import EPS, forget_plans, to_device, to_host  # noqa: E402

LAYER = {
    "one value": (3, 1, 1, 1),
    "short": (300, 1, 128, 1),
    "odd": (7, 1, 37, 1),
    "half a pack": (5, 1, 4, 1),
    "several packs": (3, 1, 1000, 1),
    "one row": (1, 1, 4096, 1),
    "many rows": (2100, 1, 24, 1),
}
GROUPS = {
    "instance": ((2, 1, 3, 64), 3),
    "one group": ((2, 1, 6, 50), 1),
    "short runs": ((3, 1, 24, 2), 2),
    "odd runs": ((2, 1, 20, 49), 4),
    "long runs": ((1, 1, 4, 3000), 2),
    "no positions": ((9, 1, 24, 1), 3),
}
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


class Results(NamedTuple):
    """What the steps make of a case."""

    y: np.ndarray
    pairs: np.ndarray
    dx: np.ndarray
    dresidual: np.ndarray | None
    dweight: np.ndarray
    dbias: np.ndarray


class Case:
    """Random arguments of the norms' steps, on the host, and what both kinds of steps make of them."""

    def __init__(self, rng, shape, norm, dtype, *, mean=3.0, offset=0, residual=False, activation=None, vectors=None):
        self.norm, self.dtype, self.offset, self.activation = norm, np.dtype(dtype), offset, activation
        N, _, C, _ = shape
        self.x = (rng.standard_normal(shape) * 2 + mean).astype(dtype)
        self.dy = rng.standard_normal(shape).astype(dtype)
        self.residual = rng.standard_normal(shape).astype(dtype) if residual else None
        weight, bias = rng.standard_normal((2, C)).astype(np.float32 if vectors is None else vectors)
        self.affine = Affine(weight, bias if norm.centered else None, EPS)
        self.rows = N * norm.groups

    def theirs(self):
        """Results of the mirrors, which are not rounded to 16 bits."""
        dtype = np.float64 if self.dtype == np.float64 else np.float32
        return self._steps(numpy_norms, lambda of: of.astype(dtype) if isinstance(of, np.ndarray) else of, np.empty)

    def ours(self):
        return to_host(self._steps(cupy_norms, lambda value: to_device(value, self.offset), self._empty))

    def _empty(self, shape, dtype):
        return to_device(np.empty(shape, dtype), self.offset)

    def _steps(self, steps, there, empty):
        """Output, statistics, gradients of input and residual, of weight and bias."""
        x, dy, residual, affine = map(there, (self.x, self.dy, self.residual, self.affine))
        out, recorded = empty(x.shape, x.dtype), residual is not None and self.activation is not None
        passed = steps.empty_passed(x, self.norm, residual, out) if recorded else None
        statistics = steps.norm_forward(x, self.norm, affine, Epilogue(residual, self.activation, passed), out)
        gradients = Gradients(empty(x.shape, x.dtype), None if residual is None else empty(x.shape, x.dtype))
        way_back = Epilogue(None, self.activation, passed)
        sums = steps.norm_backward(dy, x, self.norm, statistics, affine, way_back, gradients)
        vectors = [empty((x.shape[2],), np.float64) for _ in range(2)]
        steps.norm_parameters(sums, *vectors)
        return Results(out, statistics.pairs, gradients.dx, gradients.dresidual, *vectors)

    def check(self):
        """Hold the kernels to the mirrors."""
        ours, theirs = self.ours(), self.theirs()
        shape = self.x.shape
        y, pairs, dx, dresidual, dweight, dbias = theirs
        N, A, C, B = shape
        of_rows = (N, A, self.norm.groups, C // self.norm.groups, B)
        mean, var = (pairs[:, k].reshape(N, 1, self.norm.groups, 1, 1) for k in range(2))
        rstd = 1 / np.sqrt(var + EPS)
        xhat = ((self.x.astype(np.float64).reshape(of_rows) - mean) * rstd).reshape(shape)
        weight = self.affine.weight.astype(np.float64)[:, None]
        least = 0.04 if self.dtype == np.float16 else 0  # float16 has steps of 6e-8 at 0
        terms = np.abs(weight) * (1 + np.abs(xhat)) + least
        for part in self.affine.bias, self.residual:
            if part is not None:
                sizes = np.abs(part.astype(np.float64))
                terms = terms + (sizes.reshape(-1, 1) if part.ndim == 1 else sizes)
        assert_close(ours[0], y, self.dtype, terms)
        np.testing.assert_allclose(ours[1][:, 1], pairs[:, 1], rtol=2e-7)
        np.testing.assert_allclose(ours[1][:, 0], pairs[:, 0], atol=2e-7 * np.sqrt(pairs[:, 1]).max() + 1e-12)
        sizes = np.abs(weight * self.dy.astype(np.float64)).reshape(of_rows) * rstd
        sizes = np.broadcast_to(sizes.max(axis=(1, 3, 4), keepdims=True), of_rows).reshape(shape)
        assert_close(ours[2], dx.astype(np.float64), self.dtype, sizes, 25)
        if dresidual is not None:
            np.testing.assert_array_equal(ours[3].astype(np.float64), dresidual)
        products = np.abs(self.dy.astype(np.float64))
        assert_close(ours[4], dweight, self.dtype, (products * (1 + np.abs(xhat))).sum(axis=(0, 1, 3)), 84)
        assert_close(ours[5], dbias, self.dtype, products.sum(axis=(0, 1, 3)), 84)


@pytest.fixture
def device(monkeypatch):
    """A function that sets properties of the GPU, by which rows are cut, and gives the plans that are made from then
    on.
    """
    real = plans.properties_of(0)
    made = []

    def pretend(**properties):
        monkeypatch.setattr(cupy_norms, "properties_of", lambda _: real._replace(**properties))
        original = cupy_norms.row_plan.__wrapped__

        def plan(*arguments):
            made.append(original(*arguments))
            return made[-1]

        monkeypatch.setattr(cupy_norms, "row_plan", plan)
        return made

    forget_plans()
    yield pretend
    monkeypatch.undo()
    forget_plans()


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", LAYER.values(), ids=LAYER)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_elements_with_weights_of_their_own(rng, shape, dtype, centered):
    Case(rng, shape, Norm(1, centered), dtype).check()


@pytest.mark.parametrize(("shape", "groups"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
def test_groups(rng, shape, groups, dtype, residual):
    Case(rng, shape, Norm(groups), dtype, residual=residual, activation="relu" if residual else None).check()


@pytest.mark.parametrize(("shape", "groups"), [((3, 1, 8, 16), 2), ((3, 1, 64, 1), 1)], ids=["runs", "elements"])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_relu_without_a_residual_and_unaligned_arrays(rng, shape, groups, offset):
    """The way back works out again what ReLU passed, whatever the widths of packs."""
    Case(rng, shape, Norm(groups), np.float16, activation="relu", offset=offset).check()


@pytest.mark.parametrize("vectors", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_dtypes_of_weight_and_bias(rng, dtype, vectors):
    Case(rng, (3, 1, 64, 1), Norm(1), dtype, vectors=vectors).check()


def test_weight_and_bias_of_two_dtypes_and_any_stride(rng):
    case = Case(rng, (3, 1, 64, 1), Norm(1), np.float32)
    wide = np.empty(128, np.float64)[::2]
    wide[...] = case.affine.weight
    case.affine = case.affine._replace(weight=wide)
    case.check()


ALL = {
    "elements": ((40, 1, 6000, 1), 1),
    "groups of elements": ((40, 1, 12000, 1), 2),
    "runs": ((2, 1, 6, 4000), 2),
    "many runs": ((2, 1, 300, 40), 2),
}
SHARED = {"by one block": 220 << 10, "by clusters": 40 << 10, "streamed": 3 << 10}
"""Bytes of shared memory of a multiprocessor with which rows are kept on chip, or are not."""


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("shape", "groups"), ALL.values(), ids=ALL)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_ways_to_cut_rows(rng, device, shape, groups, shared, activation):
    """Rows in one block, in clusters, or read twice; sums of several rows on chip, or of each row by itself."""
    clusters = plans.properties_of(0).clusters and shared != "by one block"
    if not clusters and shared == "by clusters":
        pytest.skip("a GPU without clusters")
    room = {"shared_per_block": SHARED[shared], "shared_per_multiprocessor": SHARED[shared]}
    made = device(multiprocessors=2, clusters=clusters, **room)
    case = Case(rng, shape, Norm(groups), np.float32, activation=activation)
    case.check()
    options = [plan.kernel.options for plan in made]
    assert all(f"-DON_CHIP={int(shared != 'streamed')}" in each for each in options)
    clusters = {plan.geometry.cluster for plan in made}
    assert clusters == {1} if shared == "by one block" else clusters - {1}
    if shape[3] == 1 and shared == "by one block":
        assert made[1].geometry.sizes.samples > 2


@pytest.mark.parametrize(("shape", "groups"), [((3, 1, 8, 16), 2), ((9, 1, 64, 1), 1)], ids=["runs", "elements"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_long_indices(rng, device, monkeypatch, shape, groups, dtype):
    monkeypatch.setattr(cupy_norms, "MOST_INT", 0)
    made = device()
    Case(rng, shape, Norm(groups), dtype, residual=True, activation="relu").check()
    assert all("-DINDEX_BITS=64" in plan.kernel.options for plan in made)


@pytest.mark.parametrize("factor", [1e-20, 1e20, 1e30])
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(3, 1, 64, 1), (2, 1, 4, 48)], ids=["elements", "runs"])
def test_numbers_near_the_limits_of_float32(rng, shape, centered, factor):
    """Rows of such numbers are computed in float64: output and gradients are right. Others in the array stay as they
    are, to the bit.
    """
    case = Case(rng, shape, Norm(1, centered), np.float32, mean=0.0)
    case.affine = case.affine._replace(eps=0.0)
    before = case.ours()
    case.x[0] *= np.float32(factor)
    case.dy[0] *= np.float32(min(factor, 1.0)) ** 0
    ours, theirs = case.ours(), case.theirs()
    for one, other, rtol in (ours[0], theirs[0], 1e-6), (ours[2], theirs[2], 1e-4):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6 * np.abs(other[0]).max() if rtol > 1e-5 else 1e-6)
    assert bits(ours[0][1:], ours[2][1:]) == bits(before[0][1:], before[2][1:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "groups"), [((3, 1, 64, 1), 1), ((2, 1, 6, 48), 3)], ids=["elements", "runs"])
def test_no_row_sees_another_one(rng, shape, groups, value):
    case = Case(rng, shape, Norm(groups), np.float32)
    before = case.ours()
    case.x[0, 0, 0, 0] = value
    after = case.ours()
    channels = shape[2] // groups
    for k in 0, 2:
        assert bits(after[k][1:]) == bits(before[k][1:])
        assert bits(after[k][0, :, channels:]) == bits(before[k][0, :, channels:])
        assert np.isnan(after[k][0, 0, 0, 0])


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("width", [8, 40, 128, 1000])
def test_a_row_has_the_same_bits_among_many(rng, width, centered):
    """The bits of a row of output and input's gradient do not depend on how many rows there are."""
    case = Case(rng, (333, 1, width, 1), Norm(1, centered), np.float16)
    whole, x, dy = case.ours(), case.x, case.dy
    for rows in 1, 2, 17:
        case.x, case.dy = x[:rows].copy(), dy[:rows].copy()
        few = case.ours()
        assert bits(few[0]) == bits(whole[0][:rows])
        assert bits(few[2]) == bits(whole[2][:rows])


@pytest.mark.parametrize("into", ["x", "residual"])
def test_output_in_place(rng, into):
    case = Case(rng, (3, 1, 8, 16), Norm(2), np.float32, residual=True, activation="relu")
    x, residual, affine = map(to_device, (case.x, case.residual, case.affine))
    out = x if into == "x" else residual
    cupy_norms.norm_forward(x, case.norm, affine, Epilogue(residual, "relu"), out)
    assert bits(to_numpy(out)) == bits(case.ours()[0])


@pytest.mark.parametrize("samples", [1, 2, 33, 100])
def test_running_statistics(rng, samples):
    C = 5
    statistics = Statistics(rng.standard_normal((samples * C, 2)) ** 2)
    ours = to_device(Running(np.zeros(C, np.float32), np.ones(C), 0.3))
    theirs = Running(np.zeros(C, np.float32), np.ones(C), 0.3)
    cupy_norms.norm_update_running(to_device(statistics), ours, 7.0)
    numpy_norms.norm_update_running(statistics, theirs, 7.0)
    np.testing.assert_allclose(to_numpy(ours.mean), theirs.mean, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(ours.var), theirs.var, rtol=1e-14)


@pytest.mark.parametrize("parts", [1, 31, 32, 100])
@pytest.mark.parametrize("C", [1, 32, 33, 100])
def test_parts_are_added(rng, parts, C):
    sums = Sums(*rng.standard_normal((2, parts, C)))
    dweight, dbias = map(to_device, (np.empty(C), np.empty(C)))
    cupy_norms.norm_parameters(to_device(sums), dweight, dbias)
    np.testing.assert_allclose(to_numpy(dweight), sums.dy_xhat.sum(axis=0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(to_numpy(dbias), sums.dy.sum(axis=0), rtol=1e-12, atol=1e-13)
    cupy_norms.norm_parameters(to_device(sums), None, dbias)
