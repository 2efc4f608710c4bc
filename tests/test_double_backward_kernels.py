"""The kernels of second order against the textbook, on a GPU or the stand-in: dtypes, layouts, sizes, alignments."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupybn._steps import cupy_double_backward, cupy_ops, plans
from cupybn._steps.bundles import Affine, Epilogue, Incoming, Running, SecondGradients, Statistics
from tests.reference import DTYPES, bits, to_numpy
from tests.second_order import assert_second_order, second_order
from tests.steps import EPS, forget_plans, to_device
from tests.test_kernels import SOME, cases

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="a GPU does not tell")

GATES = ("open", "input", "record")
"""Ways back: without ReLU, with one that is worked out again, and with a residual, where there is a record."""
BOTH = [(3, 6, 40), (150, 6, 1)]
"""A shape of each layout, with packs of 8 bytes for 16-bit data where it is channels last."""
in_both_layouts = pytest.mark.parametrize("shape", BOTH, ids=str)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


class Case(NamedTuple):
    """Arguments of second order on the host, for one gate."""

    x: Any
    weight: Any
    bias: Any
    dy: Any
    cotangents: tuple[Any, Any, Any, Any]  # cotangents of dx, dweight, dbias and dresidual
    residual: Any
    gate: str
    training: bool

    @classmethod
    def of(cls, rng, shape, dtype, gate="open", training=True):
        """Random arguments, with vectors of different dtypes."""
        x, dy, cdx, cdresidual, residual = rng.standard_normal((5, *shape))
        weight, bias, cdweight, cdbias = rng.standard_normal((4, shape[1]))
        cotangents = cdx, cdweight, cdbias.astype(np.float32), cdresidual
        given = cls(3 + 2 * x, weight.astype(np.float32), bias, dy, cotangents, residual, gate, training)
        return given.tensors(lambda array: array.astype(dtype))

    def tensors(self, change):
        """The case with each array of the shape of x changed by a function."""
        cdx, cdweight, cdbias, cdresidual = self.cotangents
        cdx, cdresidual = (None if a is None else change(a) for a in (cdx, cdresidual))
        x, dy, residual = map(change, (self.x, self.dy, self.residual))
        return self._replace(x=x, dy=dy, residual=residual, cotangents=(cdx, cdweight, cdbias, cdresidual))

    @property
    def running(self):
        """Mean and variance that x is normalised with, in float64."""
        x = self.x.astype(np.float64)
        if self.training:
            return x.mean((0, 2)), x.var((0, 2))
        C = x.shape[1]
        return 3 + np.linspace(-1, 1, C), np.linspace(0.5, 4, C)

    def expected(self):
        """The gradients by the textbook, and the sizes of their terms."""
        running = None if self.training else self.running
        fused = {"relu": self.gate != "open", "residual": self.residual if self.gate == "record" else None}
        vectors = {"weight": self.weight, "bias": self.bias, "cotangents": self.cotangents, "running": running}
        return second_order(self.x, self.dy, eps=EPS, **vectors, **fused)

    def run(self, offset=0, sums_given=True):
        """The gradients by the kernels, of arrays that lie some elements after an aligned address."""
        given = [None if a is None else to_device(a, offset) for a in (self.x, self.dy, *self.cotangents)]
        x, dy, cdx, cdweight, cdbias, cdresidual = given
        pairs = Statistics(to_device(np.stack(self.running, -1)))
        weight, bias = (None if v is None else to_device(v, offset) for v in (self.weight, self.bias))
        affine, passed = Affine(weight, bias, EPS), None
        if self.gate == "record":
            residual = to_device(self.residual, offset)
            out = to_device(np.zeros_like(self.x), offset)
            passed = cupy_ops.empty_passed(x, residual, out)
            running = Running(*map(to_device, self.running))
            cupy_ops.bn_normalize(x, None, affine, running, Epilogue(residual, "relu", passed), out)
        epilogue = Epilogue(None, None if self.gate == "open" else "relu", passed)
        incoming = Incoming(dy, cdx, cdresidual, cdweight, cdbias)
        before = bits(x, dy, *incoming, *affine[:2], pairs.pairs, passed)
        sums = None
        if sums_given:
            sums = cupy_double_backward.bn_double_backward_reduce(incoming, x, pairs, affine, epilogue)
        gradients = SecondGradients(*(to_device(np.full_like(self.x, 77), offset) for _ in range(2)))
        gradients = gradients._replace(dweight=None if weight is None else to_device(np.full_like(self.weight, 77)))
        count = self.x.size / self.x.shape[1]
        inv_count = 1 / count if self.training else 0.0
        cupy_double_backward.bn_double_backward_input(incoming, x, pairs, affine, epilogue, sums, inv_count, gradients)
        assert bits(x, dy, *incoming, *affine[:2], pairs.pairs, passed) == before
        return [None if g is None else to_numpy(g) for g in gradients]

    def check(self, **options):
        """Compare the kernels with the textbook."""
        assert_second_order(self.run(**options), self.expected(), self.x.dtype)


def gated(cases):
    """Each case with the gate that costs most, and some with the others."""
    for case in cases:
        for gate in GATES if case.id.startswith(SOME) else GATES[-1:]:
            yield pytest.param(*case.values, gate, id=f"{case.id}, {gate}")


@pytest.mark.parametrize(("shape", "dtype", "offset", "gate"), list(gated(cases())))
def test_bn_double_backward(rng, shape, dtype, offset, gate):
    Case.of(rng, shape, dtype, gate, training=shape[0] * shape[2] > 1).check(offset=offset)


@pytest.mark.parametrize("gate", GATES)
@in_both_layouts
def test_in_eval_mode(rng, shape, gate):
    Case.of(rng, shape, np.float32, gate, training=False).check()


@pytest.mark.parametrize("missing", range(4))
@in_both_modes
@in_both_layouts
def test_cotangents_that_are_none(rng, shape, training, missing):
    """Each alone, and all others without it."""
    case = Case.of(rng, shape, np.float32, "record", training)
    given = case.cotangents
    case._replace(cotangents=(*given[:missing], None, *given[missing + 1 :])).check()
    case._replace(cotangents=tuple(c if i == missing else None for i, c in enumerate(given))).check()


@in_both_modes
@in_both_layouts
def test_without_weight_and_bias(rng, shape, training):
    Case.of(rng, shape, np.float32, "input", training)._replace(weight=None, bias=None).check()


@in_both_layouts
def test_sums_that_are_not_needed(rng, shape):
    """Only dweight needs sums in eval mode, and it is 0 without a cotangent of dx."""
    case = Case.of(rng, shape, np.float32, training=False)
    case._replace(cotangents=(None, *case.cotangents[1:])).check(sums_given=False)
    case._replace(weight=None).check(sums_given=False)


@in_both_modes
@pytest.mark.parametrize("mean", [1e2, 1e6])
@in_both_layouts
def test_large_means(rng, shape, mean, training):
    """The mean is never rounded to one float32."""
    case = Case.of(rng, shape, np.float32, "record", training)
    case = case._replace(x=case.x + np.float32(mean))
    case.check()


@in_both_modes
@pytest.mark.parametrize("dtype", [np.float32, DTYPES[1]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("which", ["x", "dy", "cdx", "weight"])
@in_both_layouts
def test_near_the_limits_of_float32(rng, shape, which, size, dtype, training):
    """One channel is far from the others; those are as if it were not, and its own are right."""
    case = Case.of(rng, shape, np.float32, "record", training)
    factor = np.ones(shape[1], np.float32)
    factor[1] = size
    column = factor[:, None]
    plain = case.tensors(lambda a: a.astype(dtype)).run()
    if which == "x":
        case = case._replace(x=case.x * column)
    elif which == "dy":
        case = case._replace(dy=case.dy * column)
    elif which == "cdx":
        case = case._replace(cotangents=(case.cotangents[0] * column, *case.cotangents[1:]))
    else:
        case = case._replace(weight=case.weight * factor)
    case = case.tensors(lambda a: a.astype(dtype))
    found = case.run()
    assert_second_order(found, case.expected(), dtype)
    others = np.arange(shape[1]) != 1
    for ours, before in zip(found, plain, strict=True):
        pairs = (to_numpy(a).compress(others, int(a.ndim > 1)) for a in (ours, before))
        np.testing.assert_array_equal(*pairs)


@in_both_layouts
def test_factors_that_float32_does_not_hold(rng, shape):
    """Arguments and gradients are numbers of float32, the factors of dx in between are not."""
    case = Case.of(rng, shape, np.float32, "record")
    cdx, cdweight, *others = case.cotangents
    small = np.float32(1e-12)
    case = case._replace(x=3 + (case.x - 3) * np.float32(1e-3), dy=case.dy * np.float32(5e37))
    case._replace(cotangents=(cdx * small, cdweight * small, *others)).check()


@in_both_modes
@pytest.mark.parametrize("size", [1e-23, 1e-30])
@in_both_layouts
def test_products_that_float32_loses(rng, shape, size, training):
    """cdx and dy are float32, but most of their products are not, not even scaled: dweight is a float64 here."""
    case = Case.of(rng, shape, np.float32, "record", training)
    factor = np.where(np.arange(shape[1]) % 2, 1, size).astype(np.float32)[:, None]
    cdx, cdweight, *others = case.cotangents
    case = case._replace(dy=case.dy * factor, cotangents=(cdx * factor, 0 * cdweight, *others))
    case = case._replace(weight=case.weight * np.where(factor[:, 0] < 1, 1e28, 1))  # so that dx is a float32
    case.check()


@only_emulated
@pytest.mark.parametrize("nothing", ["dy", "cdx"])
@in_both_layouts
def test_where_nothing_comes_in_sums_are_taken_once(rng, shape, nothing):
    """Sums of 0 are no reason to doubt float32, as where ReLU has stopped a whole channel."""
    case = Case.of(rng, shape, np.float32)
    case.dy[:, 1:3] = 0
    case.cotangents[0][:, 2:4] = 0
    if nothing == "cdx":
        case = case._replace(cotangents=(None, *case.cotangents[1:]))
    with emulator.record() as launches:
        case.run()
    arrays, vectors = 3 if nothing == "dy" else 2, 128 * shape[1] * launches[0].grid[1]
    assert launches[0].bytes_read <= arrays * case.x.nbytes + vectors


@in_both_modes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "dy", "cdx"])
@in_both_layouts
def test_nan_and_inf_stay_in_their_channel(rng, shape, where, value, training):
    case = Case.of(rng, shape, np.float32, "input", training)
    expected = case.run()
    running = case.running
    arrays = {"x": case.x, "dy": case.dy, "cdx": case.cotangents[0]}
    arrays[where][0, 1, 0] = value
    case = type("Fixed", (Case,), {"running": running})(*case)  # the statistics of the other channels are the same
    found = case.run()
    others = np.arange(shape[1]) != 1
    for ours, before in zip(found, expected, strict=True):
        np.testing.assert_array_equal(
            ours.compress(others, int(ours.ndim > 1)), before.compress(others, int(before.ndim > 1))
        )


@in_both_layouts
def test_inf_in_eval_mode_where_nothing_depends_on_x(rng, shape):
    """No gradient depends on x without a cotangent of dweight: there is no 0 * x."""
    case = Case.of(rng, shape, np.float32, training=False)
    case = case._replace(cotangents=(case.cotangents[0], None, *case.cotangents[2:]))
    expected = case.expected()
    case.x[0, 0, 0], case.dy[-1, 0, -1] = np.inf, np.inf
    ddy, dx, _ = case.run()
    np.testing.assert_allclose(ddy, expected.ddy.astype(np.float64), rtol=1e-5, atol=1e-5)
    assert not dx.any()


@in_both_layouts
def test_stopped_elements_do_not_matter(rng, shape):
    """Elements of dy that ReLU stopped, and of the cotangent of dresidual, are as if they were not there: inf, too."""
    case = Case.of(rng, shape, np.float32, "record")
    stopped = case.expected().ddy == 0
    before = case.run()
    case.dy[stopped] = np.inf
    case.cotangents[3][stopped] = np.nan
    for ours, same in zip(case.run(), before, strict=True):
        np.testing.assert_array_equal(ours, same)


@in_both_layouts
def test_relu_decides_as_on_the_way_forward(rng, shape):
    """What ReLU passes does not depend on the size of dy and cdx, for which float64 may be needed.

    The bias takes an element of each channel to 0, but for roundings.
    """
    case = Case.of(rng, (shape[0], 64, shape[2]), np.float32, "input")
    case = case._replace(cotangents=(*case.cotangents[:3], np.full_like(case.x, 1)))
    mean, var = (v[:, None] for v in case.running)
    xhat = (case.x - mean) / np.sqrt(var + EPS)
    case = case._replace(bias=-(xhat[0] * case.weight[:, None])[:, 0])
    ddy, _, _ = case.run()
    tiny = case._replace(dy=case.dy * np.float32(1e-33))
    same, _, _ = tiny.run()
    np.testing.assert_array_equal(ddy != 0, same != 0)


@pytest.mark.parametrize("which", range(4), ids=["x", "dy", "cdx", "cdresidual"])
@pytest.mark.parametrize("gate", ["open", "record"])
@in_both_layouts
def test_one_array_alone_that_is_not_aligned(rng, shape, gate, which, monkeypatch):
    """Packs are as narrow as that array wants, or it is copied where the record has been made for wider ones."""
    case = Case.of(rng, (shape[0], 8, shape[2]), np.float16, gate)
    expected, turns = [a.astype(np.float64) for a in case.run()], itertools.count()
    shifted = {0: 0, 1: 1, 2: 2, 3: 5}[which]  # the places of these arrays in `Case.run`

    plainly = to_device

    def once(value, offset=0):
        return plainly(value, 1 if next(turns) == shifted else offset)

    monkeypatch.setattr("tests.test_double_backward_kernels.to_device", once)
    for ours, aligned in zip(case.run(), expected, strict=True):
        np.testing.assert_allclose(ours.astype(np.float64), aligned.astype(np.float64), rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Launches and traffic


def second_launches(launches):
    return [launch for launch in launches if "double_backward" in launch.name]


@only_emulated
@in_both_layouts
def test_two_launches(rng, shape):
    with emulator.record() as launches:
        Case.of(rng, shape, np.float16).run()
    assert [launch.name for launch in launches] == ["bn_double_backward_reduce", "bn_double_backward_input"]


@only_emulated
@pytest.mark.parametrize("shape", [(16, 2, 8192), (16384, 8, 1)], ids=str)
def test_the_order_of_additions_does_not_depend_on_the_device(rng, shape):
    case = Case.of(rng, shape, np.float32)
    results, grids = [], set()
    for multiprocessors in 1, 200:
        forget_plans()
        with (
            emulator.pretend(replace(emulator.H200, multiprocessors=multiprocessors)),
            emulator.record() as launches,
        ):
            found = case.run()
            results.append(bits(*found))
            grids.add(launches[-1].grid)
            assert launches[0].grid[1] > 1  # parts, which the second launch adds
    forget_plans()
    assert len(grids) == 2
    assert results[0] == results[1]
    assert_second_order(found, case.expected(), case.x.dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1 << 17), (1 << 14, 8, 1)], ids=str)
def test_sums_go_on_in_float64(shape, monkeypatch):
    """A thread that has many packs sums few of them in float32: all elements are alike, and roundings go one way."""
    original = plans.streamed_plan

    def in_one_share(*arguments):
        kernel, geometry = original(*arguments)
        name, count = ("rows", shape[0]) if shape[2] == 1 else ("packs", shape[2] // 4)
        sizes = geometry.sizes._replace(**{name: count})
        return plans.Plan(kernel, geometry._replace(grid=(geometry.grid[0], 1), sizes=sizes, parts=1))

    monkeypatch.setattr(plans, "streamed_plan", in_one_share)
    x, dy, cdx = (np.full(shape, value, np.float32) for value in (1.1, 0.7, 0.3))
    pairs = Statistics(to_device(np.tile([0.0, 1.0], (shape[1], 1))))
    incoming = Incoming(to_device(dy), to_device(cdx))
    sums = cupy_double_backward.bn_double_backward_reduce(
        incoming, to_device(x), pairs, Affine(None, None, EPS), Epilogue()
    )
    g, u, xhat = (array.astype(np.float64)[:, 0] for array in (dy, cdx, x / np.sqrt(1 + EPS)))
    for ours, terms in zip(sums, (g, g * xhat, u, u * xhat, u * g), strict=True):
        np.testing.assert_allclose(to_numpy(ours)[0], terms.sum(), rtol=2.0**-20)


@only_emulated
@pytest.mark.parametrize("gate", ["open", "record"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("shape", [(16, 8, 1024), (16384, 8, 1)], ids=str)
def test_traffic(rng, shape, dtype, gate):
    """The sums read three arrays; the gradients read three, or four with a residual, and write two."""
    case = Case.of(rng, shape, dtype, gate)
    if gate == "open":
        case = case._replace(cotangents=(*case.cotangents[:3], None))
    N, record = case.x.nbytes, case.x.nbytes // 16 if gate == "record" else 0
    if shape[2] == 1 and dtype == np.float16:
        record *= 2  # two threads of a warp, each with a half of a pack, read its byte
    with emulator.record() as launches:
        case.run()
    reduce, gradients = second_launches(launches)
    vectors = 128 * shape[1] * reduce.grid[1]  # what each block reads or writes of channels
    parts = 5 * 8 * shape[1] * reduce.grid[1] * gradients.grid[1]
    assert 3 * N + record <= reduce.bytes_read <= 3 * N + record + vectors
    assert reduce.bytes_written <= vectors
    arrays = 4 if gate == "record" else 3
    assert arrays * N + record <= gradients.bytes_read <= arrays * N + record + parts + vectors
    assert 2 * N <= gradients.bytes_written <= 2 * N + vectors
