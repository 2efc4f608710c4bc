"""Gradients of second order, `vjp_fn.vjp`: what users give and get, on NumPy arrays and on CuPy's."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import re
import tracemalloc
import warnings
import weakref
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from cupybn._steps.tiles import LARGE_TILE, SHORT
from tests.reference import DTYPES, arguments, bits, exactly, in_order, to_numpy
from tests.second_order import assert_second_order, second_order
from tests.test_derived_arrays import derived
from tests.test_syncbatchnorm import Alone

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)

FORMS = {
    "(N, C)": ((16, 5), 1, (0, 1)),
    "(N, C, L)": ((6, 5, 7), 1, (0, 1, 2)),
    "NCHW": ((4, 5, 3, 8), 1, (0, 1, 2, 3)),
    "NHWC": ((4, 5, 3, 8), 1, (0, 2, 3, 1)),
    "channels last": ((4, 3, 8, 5), -1, (0, 1, 2, 3)),
    "channels slowest": ((4, 5, 3, 8), 1, (1, 3, 0, 2)),
}
"""Shape, channel axis and memory order of inputs, by name."""
FUSED = {
    "nothing": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "residual, relu": {"residual": True, "activation": "relu"},
}
"""Options of calls by what is fused into them."""
NAMES = F.BatchNormGrads._fields
"""Names of cotangents, in their order."""
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


class Case(NamedTuple):
    """A call, the gradient of its output, and cotangents of all of its gradients."""

    call: dict[str, Any]
    dy: Any
    cotangents: F.BatchNormGrads

    def vjp_fn(self):
        """The function that goes back; running statistics are left alone."""
        with cupybn.no_stats_update():
            return F.batch_norm_vjp(**self.call)[1]

    def run(self, cotangents=None):
        """The gradients of grad_output, input and weight."""
        return three(self.vjp_fn(), self.dy, self.cotangents if cotangents is None else cotangents)

    def expected(self, cotangents=None):
        """Gradients by the textbook, where ReLU lets through what the output says that it does."""
        call = self.call
        with cupybn.no_stats_update():
            passed = to_numpy(F.batch_norm(**call)) > 0
        return second_order(
            call["input"],
            self.dy,
            call["weight"],
            call["bias"],
            cotangents=self.cotangents if cotangents is None else cotangents,
            running=None if call["training"] else (call["running_mean"], call["running_var"]),
            relu=passed if call.get("activation") == "relu" else False,
            channel_axis=call["channel_axis"],
        )

    def check(self, cotangents=None):
        """Compare with the textbook; twice, as the second time CuPy's launches are from a tape."""
        expected = self.expected(cotangents)
        results = [self.run(cotangents) for _ in range(2)]
        assert_second_order(results[0], expected, self.call["input"].dtype)
        assert bits(*results[1]) == bits(*results[0])

    def arrays(self):
        """All arrays that are given."""
        return [array for array in (*self.call.values(), self.dy, *self.cotangents) if hasattr(array, "dtype")]


def three(vjp_fn, dy, cotangents):
    """The gradients of grad_output, input and weight."""
    grads, second_vjp_fn = vjp_fn.vjp(dy)
    assert bits(*grads) == bits(*vjp_fn(dy))
    ddy, second = second_vjp_fn(cotangents)
    assert type(grads) is type(second) is F.BatchNormGrads
    assert second.bias is None
    assert second.residual is None
    return ddy, second.input, second.weight


def make(xp, rng, form="NCHW", dtype=np.float32, vectors=np.float32, **options) -> Case:
    """A random case in training mode, unless the options of the call say otherwise; `residual=True` draws one."""
    shape, axis, order = FORMS[form] if isinstance(form, str) else form
    call = arguments(xp, rng, shape, channel_axis=axis, dtype=dtype, vectors=vectors) | {"training": True} | options

    def tensor():
        return in_order(xp.asarray(rng.normal(size=shape).astype(dtype)), order)

    def vector(name):
        drawn = xp.asarray(rng.normal(size=shape[axis]).astype(np.float32))
        return None if call[name] is None else drawn

    call["input"] = in_order(call["input"], order)
    call["residual"] = tensor() if options.get("residual") else None
    cdresidual = None if call["residual"] is None else tensor()
    return Case(call, tensor(), F.BatchNormGrads(tensor(), vector("weight"), vector("bias"), cdresidual))


def only(cotangents, names):
    """The cotangents of these names, None for the others."""
    return F.BatchNormGrads(*(each if name in names else None for name, each in zip(NAMES, cotangents, strict=True)))


def every_second(array):
    """An array of the same values that is not dense."""
    wide = type(array)((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[...] = 0
    wide[..., ::2] = array
    return wide[..., ::2]


def backwards(array):
    """An array of the same values whose last axis runs backwards in memory."""
    return array[..., ::-1].copy()[..., ::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("fused", FUSED)
@both_modes
@pytest.mark.parametrize("form", FORMS)
def test_by_the_textbook(xp, rng, form, training, fused):
    make(xp, rng, form, training=training, **FUSED[fused]).check()


MIXED = {"weight": np.float16, "bias": ml_dtypes.bfloat16, "running_mean": np.float32, "running_var": np.float64}
"""Dtypes of vectors, all different."""


@pytest.mark.parametrize("vectors", [np.float32, MIXED], ids=["float32", "mixed"])
@both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(xp, rng, dtype, training, vectors):
    """Data of 16 bits is computed as float32 and rounded once; the gradient of weight has the dtype of weight."""
    case = make(xp, rng, dtype=dtype, vectors=vectors, training=training, **FUSED["residual, relu"])
    case.check()
    assert [array.dtype for array in case.run()] == [dtype, dtype, case.call["weight"].dtype]


@both_modes
@pytest.mark.parametrize("fused", FUSED)
def test_any_cotangent_may_be_none(xp, rng, fused, training):
    case = make(xp, rng, "(N, C, L)", training=training, **FUSED[fused])
    there = NAMES if case.call["residual"] is not None else NAMES[:3]
    for count in range(len(there) + 1):
        for names in itertools.combinations(there, count):
            case.check(only(case.cotangents, names))


@both_modes
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_without_weight_or_bias(xp, rng, training, missing):
    options = dict.fromkeys(missing)
    for fused in FUSED.values():
        case = make(xp, rng, training=training, **fused, **options)
        case.check()
        assert (case.run()[2] is None) == ("weight" in missing)


def test_cotangents_are_a_tuple_in_the_order_of_the_gradients(xp, rng):
    case = make(xp, rng, **FUSED["residual, relu"])
    assert bits(*case.run(tuple(case.cotangents))) == bits(*case.run())


def test_gradients_may_be_their_own_cotangents(xp, rng):
    """Half the sum of the squares of all gradients has the gradients themselves as cotangents."""
    case = make(xp, rng, **FUSED["residual"])  # where that of the residual is grad_output, the very array
    grads, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    assert grads.residual is case.dy
    ddy, second = second_vjp_fn(grads)
    assert_second_order((ddy, second.input, second.weight), case.expected(grads), np.float32)


@both_modes
def test_what_goes_through_a_sum_comes_back_as_it_is(xp, rng, training):
    """The gradient of a residual without ReLU is grad_output: its cotangent is added to the gradient of that."""
    case = make(xp, rng, dtype=np.float64, training=training, residual=True)
    alone, none = (case.run(only(case.cotangents, names)) for names in ("residual", ()))
    assert bits(alone[0]) == bits(case.cotangents.residual)
    for gradient in (*alone[1:], *none):
        assert not to_numpy(gradient).any()


VECTORS_GIVEN = {
    "float16": lambda vector: vector.astype(np.float16),
    "bfloat16": lambda vector: vector.astype(ml_dtypes.bfloat16),
    "float64": lambda vector: vector.astype(np.float64),
    "every second value": every_second,
    "backwards": backwards,
}
"""Ways to give a vector of cotangents."""


@pytest.mark.parametrize("given", VECTORS_GIVEN)
def test_vectors_of_cotangents_of_any_dtype_and_stride(xp, rng, given):
    """Vectors of cotangents count as the numbers that they are, whatever calls came before."""
    case = make(xp, rng, **FUSED["relu"])
    values = [
        xp.asarray((to_numpy(vector) * 16).round() / 16) for vector in case.cotangents[1:3]
    ]  # exact in all dtypes
    expected = bits(*case.run(case.cotangents._replace(weight=values[0], bias=values[1])))
    changed = [VECTORS_GIVEN[given](vector) for vector in values]
    for _ in range(2):
        for weight, bias in ((changed[0], values[1]), (values[0], changed[1]), changed, values):
            assert bits(*case.run(case.cotangents._replace(weight=weight, bias=bias))) == expected


@both_modes
@pytest.mark.parametrize("form", ["(N, C)", "NCHW"])
def test_a_mean_of_a_million_standard_deviations(xp, rng, form, training):
    """Errors are relative to terms that know of no mean: it is never rounded to one float32."""
    case = make(xp, rng, form, training=training)
    exact = rng.normal(1e6, 1, case.dy.shape).astype(np.float32)
    case.call["input"] = xp.asarray(exact)
    axes = tuple(axis for axis in range(exact.ndim) if axis != 1)
    case.call["running_mean"] = xp.asarray(exact.mean(axes, dtype=np.float64))
    case.call["running_var"] = xp.asarray(exact.var(axes, dtype=np.float64))
    case.check()


@both_modes
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["input", "dy", "cotangent"])
def test_no_other_channel_changes(xp, rng, training, value, where):
    for form in "NCHW", "channels last":
        case = make(xp, rng, form, training=training, activation="relu")
        array = {"input": case.call["input"], "dy": case.dy, "cotangent": case.cotangents.input}[where]
        axis = case.call["channel_axis"]
        before = [without_channel(result, axis) for result in case.run()]
        array[(1, 2, 1, 0) if axis == 1 else (1, 1, 0, 2)] = value  # of channel 2
        assert bits(*(without_channel(result, axis) for result in case.run())) == bits(*before)


def without_channel(array, axis):
    """All channels of an array but number 2."""
    return np.delete(to_numpy(array), 2, axis if array.ndim > 1 else 0)


def test_what_does_not_depend_on_an_infinite_input_stays_finite(xp, rng):
    """The gradient of grad_output is rstd * cdx + cdbias here, that of x is 0 * grad_output: no 0 * inf."""
    case = make(xp, rng, training=False, weight=None)
    expected = bits(*case.run())
    case.call["input"][1, 2, 1, 0] = np.inf
    assert bits(*case.run()) == expected


@both_modes
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fused", ["nothing", "residual", "residual, relu"])
@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
def test_what_nothing_depends_on_may_be_nan(xp, rng, form, fused, value, training):
    """Nothing depends on weight without a cotangent of the input's gradient; and on the input, its statistics and
    grad_output if weight's has none either.
    """
    case = make(xp, rng, form, training=training, **FUSED[fused])
    vectors, through = (only(case.cotangents, names) for names in (NAMES[1:], NAMES[2:]))
    vjp_fn = case.vjp_fn()
    expected = [[to_numpy(a) for a in three(vjp_fn, case.dy, each)] for each in (vectors, through)]
    passed = to_numpy(vjp_fn(xp.ones_like(case.dy)).residual) if fused == "residual, relu" else None

    def check(second_vjp_fn, cotangents, number, some=(0, 1, 2)):
        ddy, grads = second_vjp_fn(cotangents)
        results = ddy, grads.input, grads.weight
        for each in some:
            np.testing.assert_allclose(to_numpy(results[each]), expected[number][each], rtol=1e-6, atol=1e-6)

    _, second_vjp_fn = vjp_fn.vjp(case.dy)
    weight = case.call["weight"].copy()
    case.call["weight"][2] = value
    check(second_vjp_fn, vectors, 0)
    check(second_vjp_fn, through, 1)
    case.call["weight"][...] = weight
    case.dy[1, 2, 1, 0] = value if passed is None or passed[1, 2, 1, 0] else 1
    check(second_vjp_fn, vectors, 0, (0, 2))
    check(second_vjp_fn, through, 1)


@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
def test_statistics_that_nothing_depends_on_may_be_nan(xp, rng, form):
    case = make(xp, rng, form, residual=True)
    through = only(case.cotangents, NAMES[2:])
    expected = bits(*case.run(through))
    case.call["input"][1, 2, 1, 0] = np.nan
    assert bits(*case.run(through)) == expected


@both_modes
def test_an_infinite_grad_output_that_nothing_depends_on_does_not_matter(xp, rng, training):
    """The cotangents of bias and residual go through, whatever came back and was infinite."""
    case = make(xp, rng, training=training, residual=True)
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy * np.float32(np.inf))
    ddy, grads = second_vjp_fn(case.cotangents._replace(input=None, weight=None))
    assert np.isfinite(to_numpy(ddy)).all()
    assert not to_numpy(grads.input).any()
    assert not to_numpy(grads.weight).any()


def test_grad_output_that_relu_has_stopped_does_not_matter(xp, rng):
    """Never 0 * grad_output: where ReLU has stopped it, it may be inf."""
    for fused in "relu", "residual, relu":
        case = make(xp, rng, **FUSED[fused])
        expected = bits(*case.run())
        with cupybn.no_stats_update():
            stopped = F.batch_norm(**case.call) == 0
        case.dy[...] = xp.asarray(np.where(to_numpy(stopped), np.float32(np.inf), to_numpy(case.dy)))
        assert bits(*case.run()) == expected


@both_modes
@pytest.mark.parametrize("fused", FUSED)
def test_slopes(rng, fused, training):
    """The results are the slopes of a loss that the gradients of first order are part of."""
    case = make(np, rng, "(N, C, L)", np.float64, np.float64, training=training, **FUSED[fused])
    steps = {name: 1e-5 * rng.normal(size=case.call[name].shape) for name in ("input", "weight")}
    steps["dy"] = 1e-5 * rng.normal(size=case.dy.shape)

    def loss(name, sign):
        arrays = {name: array + sign * steps[name] for name, array in [(name, (case.call | {"dy": case.dy})[name])]}
        dy = arrays.pop("dy", case.dy)
        grads = case._replace(call=case.call | arrays).vjp_fn()(dy)
        return sum((g * c).sum() for g, c in zip(grads, case.cotangents, strict=True) if g is not None)

    for name, gradient in zip(("dy", "input", "weight"), case.run(), strict=True):
        assert (gradient * steps[name]).sum() == pytest.approx((loss(name, 1) - loss(name, -1)) / 2, rel=1e-6)


@both_modes
@pytest.mark.parametrize("fused", FUSED)
def test_as_autograd_of_pytorch(rng, fused, training):
    torch = pytest.importorskip("torch")
    case = make(np, rng, "(N, C, L)", np.float64, np.float64, training=training, **FUSED[fused])
    names = [name for name in NAMES if case.call[name] is not None]
    leaves = {name: torch.tensor(case.call[name], requires_grad=True) for name in names}
    dy = torch.tensor(case.dy, requires_grad=True)
    running = [torch.tensor(case.call[name]) for name in ("running_mean", "running_var")]
    y = torch.nn.functional.batch_norm(leaves["input"], *running, leaves["weight"], leaves["bias"], training)
    y = y + leaves.get("residual", 0)
    y = torch.relu(y) if case.call.get("activation") else y
    grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    cotangents = [torch.tensor(getattr(case.cotangents, name)) for name in names]
    second = torch.autograd.grad(grads, [dy, leaves["input"], leaves["weight"]], cotangents)
    for ours, theirs in zip(case.run(), second, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@both_modes
@pytest.mark.parametrize("form", FORMS)
def test_results_are_new_arrays_like_those_of_first_order(xp, rng, form, training):
    case = make(xp, rng, form, training=training, **FUSED["residual, relu"])
    grads = case.vjp_fn()(case.dy)
    ddy, dx, dweight = case.run()
    for ours, theirs in (ddy, grads.input), (dx, grads.input), (dweight, grads.weight):
        assert type(ours) is xp.ndarray
        assert (ours.shape, ours.dtype, ours.strides) == (theirs.shape, theirs.dtype, theirs.strides)
    assert ddy.strides == case.call["input"].strides


TENSORS_GIVEN = {
    "every second value": every_second,
    "backwards": backwards,
    "other order": lambda array: in_order(array, (3, 2, 1, 0)),
}
"""Ways to give a tensor, by which it has to be copied."""


@pytest.mark.parametrize("given", TENSORS_GIVEN)
@pytest.mark.parametrize("name", ["grad_output", "input", "residual", "all"])
def test_tensors_of_any_strides(xp, rng, name, given):
    case = make(xp, rng, **FUSED["residual, relu"])
    expected, change = bits(*case.run()), TENSORS_GIVEN[given]
    changed = case.cotangents._asdict()
    for each in ("input", "residual") if name == "all" else {name} & {"input", "residual"}:
        changed[each] = change(changed[each])
    dy = change(case.dy) if name in ("grad_output", "all") else case.dy
    for _ in range(2):
        results = case._replace(dy=dy).run(F.BatchNormGrads(**changed))
        assert bits(*results) == expected
        assert results[0].strides == results[1].strides == case.call["input"].strides


@both_modes
def test_an_input_that_is_not_dense(xp, rng, training):
    """The one copy that `vjp_fn` has is read, and results are dense."""
    case = make(xp, rng, training=training, **FUSED["residual, relu"])
    expected = bits(*case.run())
    for change in every_second, backwards:
        changed = case._replace(call=case.call | {"input": change(case.call["input"])})
        results = changed.run()
        assert bits(*results) == expected
        assert all(array.flags.c_contiguous for array in results)


@both_modes
@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 2, 2), (4, 0)], ids=str)
def test_arrays_without_elements(xp, rng, shape, training):
    case = make(xp, rng, (shape, 1, range(len(shape))), training=training, **FUSED["residual, relu"])
    keep = [xp.full(3, 7, np.float32) for _ in range(20)]  # what new memory could hold, were it not set
    del keep
    for _ in range(2):
        for cotangents in case.cotangents, (None,) * 4:
            ddy, dx, dweight = case.run(cotangents)
            assert ddy.shape == dx.shape == shape
            assert dweight.tolist() == [0] * shape[1]
    with pytest.raises(ValueError, match=r"cotangents\.weight should contain"):
        case.run(case.cotangents._replace(weight=xp.ones(7)))


@both_modes
@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
def test_derived_classes(xp, rng, form, training):
    """Arrays of derived classes are arrays like others, whose own rules do not count; results are plain."""
    case = make(xp, rng, form, training=training, **FUSED["residual, relu"])
    expected = bits(*case.run())
    call = {name: derived(xp, value) if hasattr(value, "dtype") else value for name, value in case.call.items()}
    own = Case(call, derived(xp, case.dy), F.BatchNormGrads(*(derived(xp, each) for each in case.cotangents)))
    for mixed in own, own._replace(call=case.call), case._replace(cotangents=own.cotangents):
        results = mixed.run()
        assert {type(array) for array in results} == {xp.ndarray}
        assert bits(*results) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Functions


@both_modes
def test_pure(xp, rng, training):
    """Called again, and after the running statistics have moved, it returns the same; what is given stays as it is."""
    case = make(xp, rng, training=training, **FUSED["residual, relu"])
    before = bits(*case.arrays())
    grads, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    first = second_vjp_fn(case.cotangents)
    expected = bits(*grads), bits(first[0], *first[1])
    assert bits(*case.arrays()) == before
    case.call["running_mean"] += 1
    case.call["running_var"] *= 2
    case.call["residual"] += 1  # of which the record has all that matters
    other = second_vjp_fn(only(case.cotangents, ("weight",)))
    again = second_vjp_fn(case.cotangents)
    assert (bits(*grads), bits(again[0], *again[1])) == expected
    assert bits(first[0], *first[1]) == expected[1]
    assert bits(other[0]) != bits(first[0])


@both_modes
def test_results_share_memory_with_nothing(xp, rng, training):
    for fused in FUSED.values():
        case = make(xp, rng, training=training, **fused)
        _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
        ddy, grads = second_vjp_fn(case.cotangents)
        results = [ddy, grads.input, grads.weight]
        kept = bits(*results)
        for array in case.arrays():
            array[...] = 7
        assert bits(*results) == kept
        given = bits(*case.arrays())
        for array in results:
            others = bits(*(other for other in results if other is not array))
            array[...] = 9
            assert bits(*(other for other in results if other is not array)) == others
        assert bits(*case.arrays()) == given


def test_grad_output_is_held_by_reference(xp, rng):
    """The gradient of grad_output does not depend on it, the others are linear in it."""
    case = make(xp, rng)
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    first = second_vjp_fn(case.cotangents)
    case.dy[...] = 2 * case.dy
    second = second_vjp_fn(case.cotangents)
    assert bits(second[0]) == bits(first[0])
    np.testing.assert_allclose(to_numpy(second[1].weight), 2 * to_numpy(first[1].weight), rtol=1e-5, atol=1e-5)
    kept = weakref.ref(case.dy)
    del case
    assert kept() is not None
    del second_vjp_fn
    assert kept() is None


def test_copies_and_weak_references(xp, rng):
    case = make(xp, rng, "(N, C)")
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    assert type(second_vjp_fn) is F.SecondVjpFn
    assert copy.deepcopy([second_vjp_fn])[0] is second_vjp_fn
    assert copy.copy(second_vjp_fn) is second_vjp_fn
    assert weakref.ref(second_vjp_fn)() is second_vjp_fn
    with pytest.raises(AttributeError):
        second_vjp_fn.name = "no attributes of its own"


def test_only_batch_norm_has_a_second_order(rng):
    """A function that cannot go further has no `vjp` that would only fail."""
    x, case = rng.normal(size=(4, 6, 5)), make(np, rng)
    functions = [
        case.vjp_fn().vjp(case.dy)[1],
        F.layer_norm_vjp(x, 5)[1],
        F.rms_norm_vjp(x, 5)[1],
        F.group_norm_vjp(x, 2)[1],
        F.instance_norm_vjp(x)[1],
        F.dropout_vjp(x, generator=cupybn.Generator(1, device="cpu"))[1],
    ]
    assert [hasattr(function, "vjp") for function in functions] == [False] * 6


@pytest.mark.parametrize("name", ["BatchNorm2d", "SyncBatchNorm"])
def test_layers(xp, device, rng, name):
    """The functions that layers return have it, in both modes: the same bits as the functions' own."""
    case = make(xp, rng, **FUSED["residual, relu"])
    x, residual = case.call["input"], case.call["residual"]
    layer = getattr(cupybn, name)(5, activation="relu", device=device)
    vectors = {
        each: xp.asarray(rng.uniform(0.5, 2, 5).astype(np.float32))
        for each in ("weight", "bias", "running_mean", "running_var")
    }
    for training in True, False:
        for each, vector in vectors.items():
            getattr(layer, each)[...] = vector
        ours = three(layer.train(training).vjp(x, residual)[1], case.dy, case.cotangents)
        theirs = case._replace(call=case.call | vectors | {"training": training}).run()
        assert bits(*ours) == bits(*theirs)


def test_a_layer_that_is_observed(xp, device, rng):
    """A layer in `update_bn` hands its moments on, and is the same to all who call it."""
    case, results = make(xp, rng, activation="relu", weight=None, bias=None), []
    layer = cupybn.BatchNorm2d(5, affine=False, activation="relu", device=device)

    def forward(x):
        y, vjp_fn = layer.vjp(x)
        results.append(bits(*three(vjp_fn, case.dy, case.cotangents)))
        return y

    cupybn.update_bn([layer], [case.call["input"]] * 2, forward)
    assert results == [bits(*case.run())] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors

RIGHT = F.BatchNormGrads(np.ones((4, 3, 5), np.float32), np.ones(3, np.float32), np.ones(3, np.float32), None)
"""Cotangents for a call without a residual."""
FOUR = "input, weight, bias, residual"
WRONG = {
    "None": (
        None,
        TypeError,
        f"expected cotangents to be a BatchNormGrads or a tuple in its order: {FOUR} (got NoneType)",
    ),
    "an array": (
        RIGHT.input,
        TypeError,
        f"expected cotangents to be a BatchNormGrads or a tuple in its order: {FOUR} (got NumPy array): "
        "use (cotangents, None, None, None)",
    ),
    "a list": (
        list(RIGHT),
        TypeError,
        f"expected cotangents to be a BatchNormGrads or a tuple in its order: {FOUR} (got list): use tuple(cotangents)",
    ),
    "a dict": (
        RIGHT._asdict(),
        TypeError,
        f"expected cotangents to be a BatchNormGrads or a tuple in its order: {FOUR} (got dict)",
    ),
    "one": (
        RIGHT[:1],
        ValueError,
        f"expected cotangents of 4 gradients: {FOUR} (got 1): use None for what has none",
    ),
    "five": (
        (*RIGHT, None),
        ValueError,
        f"expected cotangents of 4 gradients: {FOUR} (got 5): use None for what has none",
    ),
    "number": ({"input": 1.0}, TypeError, "expected cotangents.input to be a NumPy or CuPy array (got float)"),
    "list": (
        {"input": [1.0]},
        TypeError,
        "expected cotangents.input to be a NumPy or CuPy array (got list): "
        "use numpy.asarray(cotangents.input, 'float32')",
    ),
    "dtype": (
        {"input": RIGHT.input.astype(np.float64)},
        TypeError,
        "expected cotangents.input of the input's dtype float32 (got float64): use cotangents.input.astype('float32')",
    ),
    "whole numbers": (
        {"input": RIGHT.input.astype(int)},
        TypeError,
        "expected cotangents.input of dtype float16, bfloat16, float32, float64 (got int64): "
        "use cotangents.input.astype(np.float32)",
    ),
    "shape": (
        {"input": RIGHT.input[:3]},
        ValueError,
        "expected cotangents.input of the input's shape (4, 3, 5) (got (3, 3, 5))",
    ),
    "shape that broadcasts": (
        {"input": RIGHT.input[:1]},
        ValueError,
        "expected cotangents.input of the input's shape (4, 3, 5) (got (1, 3, 5)): "
        "use numpy.broadcast_to(cotangents.input, (4, 3, 5))",
    ),
    "weight is a number": (
        {"weight": 1.0},
        TypeError,
        "expected cotangents.weight to be a NumPy or CuPy array (got float)",
    ),
    "weight is a bool": (
        {"weight": True},
        TypeError,
        "expected cotangents.weight to be a NumPy or CuPy array (got bool)",
    ),
    "weight of whole numbers": (
        {"weight": np.ones(3, int)},
        TypeError,
        "expected cotangents.weight of dtype float16, bfloat16, float32, float64 (got int64): "
        "use cotangents.weight.astype(np.float32)",
    ),
    "weight of other channels": (
        {"weight": np.ones(4)},
        ValueError,
        "cotangents.weight should contain 3 elements not 4",
    ),
    "bias of other channels": ({"bias": np.ones(2)}, ValueError, "cotangents.bias should contain 3 elements not 2"),
    "weight of another shape": (
        {"weight": np.ones((1, 3, 1))},
        ValueError,
        "expected cotangents.weight of shape (3,) (got (1, 3, 1)): use cotangents.weight.reshape(-1)",
    ),
    "residual": (
        {"residual": RIGHT.input},
        ValueError,
        "expected cotangents.residual to be None, as the call had no residual (got NumPy array)",
    ),
}
"""Cotangents, or what is wrong with those of RIGHT; and the error."""


def right_call(xp):
    return {"input": xp.asarray(RIGHT.input), "weight": xp.ones(3, np.float32), "bias": xp.ones(3, np.float32)}


def on(xp, given):
    """What is given, with arrays of another module in the place of NumPy's."""
    return xp.asarray(given) if isinstance(given, np.ndarray) else given


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "not dense"])
def test_wrong_cotangents(name, dense):
    """Twice, and after a call that was right: nothing of it is taken for granted."""
    changed, error, message = WRONG[name]
    given = RIGHT._replace(**changed) if isinstance(changed, dict) and set(changed) < set(NAMES) else changed
    call = right_call(np)
    if not dense:
        call["input"] = every_second(call["input"])
    _, second_vjp_fn = F.batch_norm_vjp(**call, running_mean=None, running_var=None, training=True)[1].vjp(RIGHT.input)
    expected = second_vjp_fn(RIGHT)
    before = bits(*call.values(), *RIGHT)
    for _ in range(2):
        with pytest.raises(error, match=exactly(message)):
            second_vjp_fn(given)
    assert bits(*call.values(), *RIGHT) == before
    again = second_vjp_fn(RIGHT)
    assert bits(again[0], *again[1]) == bits(expected[0], *expected[1])


@both_modes
@pytest.mark.parametrize("name", NAMES[1:])
def test_cotangents_of_what_was_not_there(xp, rng, name, training):
    case = make(xp, rng, training=training, **FUSED["residual, relu"])
    call = case.call | {name: None}
    given = "NumPy array" if xp is np else "CuPy array on cuda:0"
    message = f"expected cotangents.{name} to be None, as the call had no {name} (got {given})"
    for cotangents in case.cotangents, only(case.cotangents, (name,)):
        with pytest.raises(ValueError, match=exactly(message)):
            case._replace(call=call).run(cotangents)


def test_wrong_cotangents_on_a_device():
    """Nothing is launched before all is checked, and messages name CuPy."""
    import cupy

    call = right_call(cupy)
    _, vjp_fn = F.batch_norm_vjp(**call, running_mean=None, running_var=None, training=True)
    right = F.BatchNormGrads(*(on(cupy, each) for each in RIGHT))
    _, second_vjp_fn = vjp_fn.vjp(right.input)
    elsewhere = "all arrays of a call are on one device, use cupy.asarray(cotangents.{0}) or cupy.asnumpy(input)"
    wrong = [
        (RIGHT._replace(weight=None, bias=None), TypeError, "cotangents.input", elsewhere.format("input")),
        (right._replace(weight=RIGHT.weight), TypeError, "cotangents.weight", elsewhere.format("weight")),
        (right._replace(bias=RIGHT.bias), TypeError, "cotangents.bias", elsewhere.format("bias")),
        (right._replace(input=right.input[:1]), ValueError, "cotangents.input", "use cupy.broadcast_to("),
        (right._replace(residual=right.input), ValueError, "cotangents.residual", "(got CuPy array on cuda:0)"),
        (right.input, TypeError, "cotangents", "(got CuPy array on cuda:0): use (cotangents, None, None, None)"),
    ]
    second_vjp_fn(right)
    allocations = emulator.usage().allocations if emulator else 0
    with launched() as launches:
        for given, error, *parts in wrong:
            with pytest.raises(error) as caught:
                second_vjp_fn(given)
            assert all(part in str(caught.value) for part in parts), caught.value
    assert launches == []
    assert emulator is None or emulator.usage().allocations == allocations


def test_wrong_grad_output(xp, rng):
    """The errors of `vjp_fn`; also where an array has got another shape since."""
    case = make(xp, rng, "(N, C)")
    vjp_fn = case.vjp_fn()
    wrong = (
        ([1.0], TypeError, "expected grad_output to be a NumPy or CuPy array (got list)"),
        (None, TypeError, "expected grad_output to be a NumPy or CuPy array (got NoneType)"),
        (case.dy.astype(np.float64), TypeError, "expected grad_output of the input's dtype float32 (got float64)"),
        (case.dy[:2], ValueError, "expected grad_output of the input's shape (16, 5) (got (2, 5))"),
    )
    for given, error, message in wrong:
        found = []
        for function in vjp_fn, vjp_fn.vjp:
            with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
                function(given)
            found.append(str(caught.value))
        assert found[0] == found[1]
    dy = case.dy.copy()
    _, second_vjp_fn = vjp_fn.vjp(dy)
    if xp is np:  # CuPy's arrays keep their shapes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            dy.shape = (5, 16)
        with pytest.raises(
            ValueError, match=exactly("expected grad_output of the input's shape (16, 5) (got (5, 16))")
        ):
            second_vjp_fn(case.cotangents)


UNDER_A_MASK = (
    "gradients of second order (vjp_fn.vjp) are not implemented under a mask: call batch norm with the positions that "
    "it leaves, as an array of shape (positions, channels)"
)
ON_SEVERAL_RANKS = (
    "gradients of second order (vjp_fn.vjp) are not implemented for a SyncBatchNorm of several ranks in training: use "
    "layer.to_batchnorm(), which has the statistics of this rank alone, or layer.eval()"
)


@both_modes
@pytest.mark.parametrize("shape", [(4, 3, 8), (3, 8), (1,)], ids=str)
def test_masks_have_no_second_order(xp, rng, shape, training):
    """Nothing else is wrong then: what is no array is not even looked at, and `vjp_fn` goes on."""
    mask = rng.random(shape) < 0.8
    case = make(xp, rng, training=training, mask=xp.asarray(mask))
    vjp_fn = case.vjp_fn()
    expected = bits(*vjp_fn(case.dy))
    for given in case.dy, "no array":
        with pytest.raises(NotImplementedError, match=exactly(UNDER_A_MASK)):
            vjp_fn.vjp(given)
    assert bits(*vjp_fn(case.dy)) == expected


def test_positions_that_a_mask_leaves_have_one(rng):
    """What the message recommends computes what a mask would: the slopes of a loss, by finite differences."""
    x, dy, cotangent = rng.normal(size=(3, 6, 5, 4))
    mask, step = rng.random((6, 4)) < 0.7, 1e-6 * rng.normal(size=x.shape)

    def loss(x):
        _, vjp_fn = F.batch_norm_vjp(x, None, None, training=True, mask=mask)
        return (vjp_fn(dy).input * cotangent).sum()

    left = [np.moveaxis(array, 1, -1)[mask] for array in (x, dy, cotangent, step)]
    _, vjp_fn = F.batch_norm_vjp(left[0], None, None, training=True)
    _, second = vjp_fn.vjp(left[1])[1]((left[2], None, None, None))
    assert (second.input * left[3]).sum() == pytest.approx((loss(x + step) - loss(x - step)) / 2, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_of_several_ranks_have_none_in_training(xp, device, rng, masked):
    """Nothing is sent, as the other ranks may not ask; the next way back finds them where they were."""
    case, engine = make(xp, rng, residual=True, activation="relu"), Alone()
    layer = cupybn.SyncBatchNorm(5, activation="relu", device=device, comm=engine)
    x, residual = case.call["input"], case.call["residual"]
    mask = xp.ones((4, 3, 8), bool) if masked else None
    _, vjp_fn = layer.vjp(x, residual, mask)
    engine.messages.clear()
    for given in case.dy, "no array":
        with pytest.raises(NotImplementedError, match=exactly(UNDER_A_MASK if masked else ON_SEVERAL_RANKS)):
            vjp_fn.vjp(given)
    assert engine.messages == []
    vjp_fn(case.dy)
    assert len(engine.messages) == 1
    if not masked:
        for way_out in layer.eval(), layer.to_batchnorm().train():
            three(way_out.vjp(x, residual)[1], case.dy, case.cotangents)
    assert len(engine.messages) == 1


def test_layers_of_several_ranks_without_elements(xp, device):
    """The error is the same where a rank has no samples, or there are no channels and nothing would be exchanged."""
    for shape in (0, 3), (4, 0):
        _, vjp_fn = cupybn.SyncBatchNorm(shape[1], device=device, comm=Alone()).vjp(xp.ones(shape, np.float32))
        with pytest.raises(NotImplementedError, match=exactly(ON_SEVERAL_RANKS)):
            vjp_fn.vjp(xp.ones(shape, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# On a device

needs_the_stand_in = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")
TWO = ["bn_double_backward_reduce", "bn_double_backward_input"]
"""The kernels of second order."""


def launched():
    """A context with a list of its launches; on a GPU that stays empty."""
    return emulator.record() if emulator else contextlib.nullcontext([])


@needs_the_stand_in
@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
@both_modes
def test_launches(rng, plays, training, weight, form):
    """One that sums and one that writes; the sums are left out where no gradient needs them."""
    case = make(cp, rng, form, training=training, **FUSED["residual, relu"], **({} if weight else {"weight": None}))
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    plays.clear()
    there = [name for name, cotangent in case.cotangents._asdict().items() if cotangent is not None]
    for count in range(len(there) + 1):
        for names in itertools.combinations(there, count):
            cotangents = only(case.cotangents, names)
            needed = ("input" in names and (training or weight)) or (training and "weight" in names)
            for played in False, True:
                before, times = emulator.usage().allocations, len(plays)
                with emulator.record_syncs() as waits, emulator.record() as launches:
                    ddy, grads = second_vjp_fn(cotangents)
                assert waits == []
                assert [launch.name for launch in launches] == TWO[not needed :]
                # ddy, dx, dweight, and one array with all sums; nothing else.
                assert emulator.usage().allocations - before == 2 + weight + needed
                assert len(plays) - times == played
    assert ddy.strides == grads.input.strides == case.call["input"].strides


@needs_the_stand_in
def test_traffic(rng):
    """x, dy, cdx are read by both launches, and cdresidual by the second, which writes two arrays."""
    case = make(cp, rng, ((8, 4, 64, 16), 1, (0, 1, 2, 3)), residual=True)
    nbytes, (_, second_vjp_fn) = case.dy.nbytes, case.vjp_fn().vjp(case.dy)
    for names, reads in (("weight",), (2, 2)), (("input",), (3, 3)), (NAMES, (3, 4)):
        with emulator.record() as launches:
            second_vjp_fn(only(case.cotangents, names))
        for launch, read, written in zip(launches, reads, (0, 2), strict=True):
            assert read * nbytes <= launch.bytes_read <= (read + 0.1) * nbytes
            assert written * nbytes <= launch.bytes_written <= (written + 0.1) * nbytes


@contextlib.contextmanager
def without_tapes():
    """A context in which every call takes its steps, and that leaves no tape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_call, "_cache", {})
        patch.setattr(_call.Call, "particulars", lambda *_: None)
        yield


def odd(array, elements):
    """An array of the same values and memory order that begins some elements after an aligned address."""
    memory = cp.empty(array.size + elements, array.dtype)[elements:]
    order = sorted(range(array.ndim), key=lambda i: -array.strides[i])
    view = memory.reshape([array.shape[i] for i in order]).transpose(np.argsort(order).tolist())
    view[...] = array
    return view


ALIKE = {
    "as it is": lambda case: case,
    "no cotangent": lambda case: case._replace(cotangents=only(case.cotangents, ())),
    "that of the input alone": lambda case: case._replace(cotangents=only(case.cotangents, ("input",))),
    "that of weight alone": lambda case: case._replace(cotangents=only(case.cotangents, ("weight",))),
    "that of bias alone": lambda case: case._replace(cotangents=only(case.cotangents, ("bias",))),
    "that of the residual alone": lambda case: case._replace(cotangents=only(case.cotangents, ("residual",))),
    "vectors of float16": lambda case: with_vectors(case, lambda vector: vector.astype(np.float16)),
    "vectors of float64": lambda case: with_vectors(case, lambda vector: vector.astype(np.float64)),
    "every second value": lambda case: with_vectors(case, every_second),
    "backwards": lambda case: with_vectors(case, backwards),
    "one vector twice": lambda case: cotangents_of(case, bias=case.cotangents.weight),
    "weight as its own cotangent": lambda case: cotangents_of(case, weight=case.call["weight"]),
    "grad_output as cotangent": lambda case: cotangents_of(case, input=case.dy),
    "input as cotangent": lambda case: cotangents_of(case, input=case.call["input"]),
    "one cotangent twice": lambda case: cotangents_of(case, residual=case.cotangents.input),
    "not dense": lambda case: cotangents_of(case, input=every_second(case.cotangents.input)),
    "misaligned cotangent": lambda case: cotangents_of(case, input=odd(case.cotangents.input, 1)),
    "misaligned residual's": lambda case: cotangents_of(case, residual=odd(case.cotangents.residual, 2)),
    "misaligned grad_output": lambda case: case._replace(dy=odd(case.dy, 1)),
}
"""Cases that are alike but for cotangents and grad_output, made of one."""


def cotangents_of(case, **changed):
    return case._replace(cotangents=case.cotangents._replace(**changed))


def with_vectors(case, change):
    return cotangents_of(case, weight=change(case.cotangents.weight), bias=change(case.cotangents.bias))


@needs_the_stand_in
@pytest.mark.parametrize(
    ("form", "fused", "training"),
    [
        ("NCHW", "residual, relu", True),
        ("NCHW", "residual, relu", False),
        ("NCHW", "residual", True),
        ("(N, C)", "residual, relu", True),
        ("(N, C)", "residual", False),
    ],
)
def test_tapes(rng, plays, form, fused, training):
    """Calls in any order launch what they do without tapes, and return the same bits."""
    cases = [make(cp, rng, form, training=training, **FUSED[fused]) for _ in range(2)]
    every = [(number, change(case)) for number, case in enumerate(cases) for change in ALIKE.values()]
    with without_tapes():
        vjp_fns = [case.vjp_fn() for case in cases]
        expected = [outcome(vjp_fns[number], case) for number, case in every]
    assert plays == []
    vjp_fns = [case.vjp_fn() for case in cases]
    plays.clear()
    for index in [*range(len(every)), *rng.permutation(len(every))]:
        number, case = every[index]
        assert outcome(vjp_fns[number], case) == expected[index], [*ALIKE][index % len(ALIKE)]
    # Two ways back each time. The first call of a form takes its steps, and each one does where packs of the record
    # want an aligned copy.
    assert len(plays) > 2.5 * len(every)


def outcome(vjp_fn, case):
    """Bits and strides of the gradients of second order, and the launches that they took."""
    _, second_vjp_fn = vjp_fn.vjp(case.dy)
    with emulator.record() as launches:
        ddy, grads = second_vjp_fn(case.cotangents)
    results = ddy, grads.input, grads.weight
    return (
        bits(*results),
        [array.strides for array in results],
        [(launch.name, *launch[1:6]) for launch in launches],
    )


@needs_the_stand_in
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_records_of_packs_of_any_width(rng, plays, order):
    """Calls that differ only in where the residual begins have records of other packs, and tapes of their own."""
    case = make(cp, rng, **FUSED["residual, relu"])
    shifted = [case._replace(call=case.call | {"residual": odd(case.call["residual"], n)}) for n in (0, 1, 2)]
    with without_tapes():
        expected = [outcome(each.vjp_fn(), each) for each in shifted]
    for _ in range(2):
        for number in order:
            assert outcome(shifted[number].vjp_fn(), shifted[number]) == expected[number]
    assert len(plays) == 3 * 3


@needs_the_stand_in
@both_modes
def test_results_begin_where_packs_of_a_record_do(rng, training):
    """Whatever memory an allocator hands out: what packs write is right, and the same."""
    case = make(cp, rng, training=training, **FUSED["residual, relu"])
    expected = bits(*case.run())
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    before = cp.cuda.get_allocator()
    with cp.cuda.using_allocator(lambda size: cp.cuda.MemoryPointer(before(size + 16).mem, 8) if size else before(0)):
        for _ in range(2):
            ddy, grads = second_vjp_fn(case.cotangents)
            assert bits(ddy, grads.input, grads.weight) == expected


@needs_the_stand_in
def test_a_tape_holds_no_array(rng):
    """Whatever the first call was given or has made is gone when its caller lets go of it."""
    case = make(cp, rng, **FUSED["residual, relu"])
    case.run()
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        before = emulator.usage().live_bytes
        _call._cache.clear()
        for _ in range(2):
            results = case.run()
            assert emulator.usage().live_bytes > before
            del results
            assert emulator.usage().live_bytes == before
    finally:
        gc.enable()


@needs_the_stand_in
def test_other_devices(rng):
    """Results are on the device of the input, which need not be the current one; cotangents must be there as well."""
    case = make(np, rng, **FUSED["residual, relu"])
    expected = case.expected()
    with emulator.pretend(emulator.H200, emulator.H200):
        with cp.cuda.Device(1):
            there = Case(
                {name: on(cp, value) for name, value in case.call.items()},
                cp.asarray(case.dy),
                F.BatchNormGrads(*(on(cp, each) for each in case.cotangents)),
            )
        for _ in range(2):
            with emulator.record() as launches:
                results = there.run()
            assert {launch.device for launch in launches} == {1}
            assert [array.device.id for array in results] == [1, 1, 1]
            assert_second_order([array.get() for array in results], expected, np.float32)
        for name in NAMES:
            here = cp.asarray(getattr(case.cotangents, name))
            with emulator.record() as launches, pytest.raises(TypeError, match=f"cotangents.{name} .*cuda:1 .*cuda:0"):
                there.vjp_fn().vjp(there.dy)[1](there.cotangents._replace(**{name: here}))
            assert not any(launch.name in TWO for launch in launches)


@needs_the_stand_in
def test_streams_and_graphs(rng):
    """Launches are on the current stream, and can be captured: what a graph then computes follows its arrays."""
    case = make(cp, rng, **FUSED["residual, relu"])
    expected = case.run()
    _, second_vjp_fn = case.vjp_fn().vjp(case.dy)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream, emulator.record() as launches:
        second_vjp_fn(case.cotangents)
        assert {launch.stream for launch in launches} == {stream.ptr}
        stream.begin_capture()
        ddy, grads = second_vjp_fn(case.cotangents)
        graph = stream.end_capture()
    results = ddy, grads.input, grads.weight
    kept = [array.copy() for array in case.cotangents]
    for array in case.cotangents:
        array *= 2
    cp.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for ours, array in zip(results, expected, strict=True):  # linear in the cotangents
        np.testing.assert_array_equal(to_numpy(ours), 2 * to_numpy(array))
    for array, then in zip(case.cotangents, kept, strict=True):
        array[...] = then
    graph.launch(stream)
    stream.synchronize()
    assert bits(*results) == bits(*expected)


# ---------------------------------------------------------------------------------------------------------------------
# Memory of NumPy's arrays

BUFFER = 8 * SHORT if np.lib.NumpyVersion(np.__version__) < "2.3.0" else 0
"""Bytes of the buffer of an iterator of NumPy's that count as allocated: NumPy before 2.3 makes it anew each time."""


@pytest.mark.parametrize(("shape", "axis"), [((16, 64, 56, 56), 1), ((16384, 256), 1)], ids=str)
def test_temporaries(rng, monkeypatch, shape, axis):
    """Beside the two results there are some tiles to work in, however large the arrays are."""
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "1")
    x = rng.standard_normal(shape).astype(np.float32)
    vectors = [np.ones(shape[axis], np.float32) for _ in range(4)]
    for options in {"training": True}, {"training": False}, {"training": True, "activation": "relu"}:
        _, vjp_fn = F.batch_norm_vjp(x, *vectors, channel_axis=axis, **options)
        _, second_vjp_fn = vjp_fn.vjp(x)
        cotangents = x, vectors[0], vectors[0], None
        second_vjp_fn(cotangents)  # what is made once and kept, threads and caches, does not count
        tracemalloc.start()
        try:
            second_vjp_fn(cotangents)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        tiles = (most - 2 * x.nbytes - BUFFER) / (LARGE_TILE * x.itemsize)
        assert tiles <= 3, f"{tiles:.1f} tiles"


# ---------------------------------------------------------------------------------------------------------------------
# A step of WGAN-GP by hand

PENALTY = 10.0
"""Weight of the gradient penalty in the loss of the critic."""
PARAMETERS = ("W1", "b1", "weight", "bias", "W2", "b2")


def critic(x, W1, b1, weight, bias, W2, b2):
    """Scores of samples, by a linear layer, batch norm with ReLU and another linear layer; and what the way back
    needs.
    """
    h = x @ W1 + b1
    a, vjp_fn = F.batch_norm_vjp(h, None, None, weight, bias, training=True, activation="relu")
    return (a @ W2 + b2)[:, 0], a, vjp_fn


def add(gradients, **more):
    for name, gradient in more.items():
        gradients[name] = gradients[name] + gradient


def penalty_by_hand(x, gradients, parameters, scale):
    """The mean of (norm of the gradient at x - 1)^2; its gradients, scaled, are added to those of the parameters."""
    W1, _, _, _, W2, _ = parameters.values()
    _, _, vjp_fn = critic(x, **parameters)
    # Forward: the gradient of the sum of all scores with respect to x.
    ones = np.ones((len(x), 1))
    da = ones @ W2.T
    first, second_vjp_fn = vjp_fn.vjp(da)
    dx = first.input @ W1.T
    norm = np.sqrt((dx**2).sum(1))
    # Back: a name with a c in front is the gradient of the penalty with respect to what has the name.
    cdx = (scale * 2 * (norm - 1) / norm / len(x))[:, None] * dx
    cda, second = second_vjp_fn((cdx @ W1, None, None, None))
    add(gradients, W1=cdx.T @ first.input + x.T @ second.input, b1=second.input.sum(0), weight=second.weight)
    add(gradients, W2=cda.T @ ones)  # da is ones @ W2.T
    return ((norm - 1) ** 2).mean()


def loss_by_hand(real, fake, between, parameters):
    """The loss of the critic, and its gradients with respect to all parameters."""
    gradients = dict.fromkeys(PARAMETERS, 0.0)
    loss = 0.0
    for x, sign in (fake, 1.0), (real, -1.0):
        scores, a, vjp_fn = critic(x, **parameters)
        loss += sign * scores.mean()
        dscores = np.full((len(x), 1), sign / len(x))
        grads = vjp_fn(dscores @ parameters["W2"].T)
        add(gradients, W2=a.T @ dscores, b2=dscores.sum(0), weight=grads.weight, bias=grads.bias)
        add(gradients, W1=x.T @ grads.input, b1=grads.input.sum(0))
    loss += PENALTY * penalty_by_hand(between, gradients, parameters, PENALTY)
    return loss, gradients


@pytest.fixture
def samples(rng):
    """Real samples, fake ones and some between them, and the parameters of a critic."""
    real, fake = rng.normal(size=(2, 32, 3)) + np.array([0.0, 1.0])[:, None, None]
    share = rng.random((32, 1))
    shapes = {"W1": (3, 8), "b1": 8, "weight": 8, "bias": 8, "W2": (8, 1), "b2": 1}
    return (real, fake, share * real + (1 - share) * fake), {name: rng.normal(size=n) for name, n in shapes.items()}


def test_a_step_of_wgan_gp_by_finite_differences(rng, samples):
    batches, parameters = samples
    loss, gradients = loss_by_hand(*batches, parameters)
    assert loss > 0
    for name in PARAMETERS:
        step = 1e-6 * rng.normal(size=parameters[name].shape)
        above, below = (
            loss_by_hand(*batches, parameters | {name: parameters[name] + sign * step})[0] for sign in (1, -1)
        )
        assert gradients[name].shape == step.shape
        assert (gradients[name] * step).sum() == pytest.approx((above - below) / 2, rel=1e-6, abs=1e-12)


def test_a_step_of_wgan_gp_by_autograd_of_pytorch(samples):
    torch = pytest.importorskip("torch")
    batches, parameters = samples
    loss, gradients = loss_by_hand(*batches, parameters)
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in parameters.items()}
    real, fake, between = map(torch.tensor, batches)
    between.requires_grad_()

    def critic(x):
        h = x @ leaves["W1"] + leaves["b1"]
        y = torch.nn.functional.batch_norm(h, None, None, leaves["weight"], leaves["bias"], True)
        return (torch.relu(y) @ leaves["W2"] + leaves["b2"])[:, 0]

    (dx,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    theirs = critic(fake).mean() - critic(real).mean() + PENALTY * ((dx.norm(dim=1) - 1) ** 2).mean()
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-12)
    for name, leaf in leaves.items():
        expected = leaf.grad.numpy()
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)
