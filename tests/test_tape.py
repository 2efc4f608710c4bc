"""Calls that are played from tapes: bits and launches are those of calls that take their steps."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from tests.reference import bits, in_order
from tests.tapes import (
    CASES,
    FORMS,
    NAMES,
    SHAPE,
    C,
    Form,
    Outcome,
    act,
    alike,
    draw,
    recorded,
    spread,
    without_tapes,
)

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.mark.parametrize(("form", "back"), CASES.values(), ids=CASES)
def test_bits_and_launches(either, plays, form, back):  # noqa: ARG001
    """The first call of a form, and later ones with other arrays and numbers, do what steps do."""
    for seed in range(3):
        with without_tapes():
            expected = act(form, seed, back)
        alike(act(form, seed, back), expected)
    forward, ways_back = 2, 3 * 3 - 1  # all but the first one
    if back:
        assert len(plays) == (forward if form.taped else 0) + (ways_back if form.taped_back else 0)
    else:
        assert len(plays) == (forward if form.taped else 0)


def test_a_mixture_of_all_forms(plays):
    """Tapes of all forms lie beside each other, and each call finds its own, whatever came before."""
    rng = np.random.default_rng(3)
    forms = [form for form in FORMS.values() if form.dtype == np.float32]
    with without_tapes():
        expected = [act(form, 1, form.out is None) for form in forms]
    for _ in range(2):
        for i in rng.permutation(len(forms)):
            alike(act(forms[i], 1, forms[i].out is None), expected[i])
    assert len(plays) > len(forms)


@pytest.mark.parametrize("momentum", [np.float32(0.3), 1, True, 0, 0.0, -0.5, float("nan"), float("inf")], ids=repr)
def test_momentum_of_any_kind(plays, momentum):
    """What stands for a float is one on the tape; NaN stands for no momentum in kernels, and is none all the same."""
    for first in 0.25, momentum:
        _call._cache.clear()
        for number in first, momentum:
            found = []
            for context in without_tapes, contextlib.nullcontext:
                arrays, _ = draw(Form(), 1)
                with context():
                    y = F.batch_norm(**arrays, training=True, momentum=number)
                found.append(bits(y, *arrays.values()))
            assert found[0] == found[1]
    assert len(plays) == 2


def test_both_zeros_as_eps(plays):
    """One tape serves both zeros, as they are equal."""
    for eps in 0.0, -0.0, 0.0:
        form = Form(training=False, eps=eps)
        with without_tapes():
            expected = act(form, 2, True)
        alike(act(form, 2, True), expected)
    assert len(plays) == 2 + 3 * 3 - 1


class Temperature(cp.ndarray):
    """An array class of a program's own."""


def as_derived(array):
    return Temperature(array.shape, array.dtype, array.data, array.strides)


def every_second(array):
    """An array of the same values that is not dense."""
    wide = cp.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def backwards_in_memory(array):
    """An array of the same values in which the last axis runs backwards."""
    return array[..., ::-1].copy()[..., ::-1]


KINDS = {
    "as they are": lambda array: array,
    "derived": as_derived,
    "not dense": every_second,
    "backwards": backwards_in_memory,
    "other order": lambda array: in_order(array, (3, 2, 1, 0)),
}
"""Ways to give the values of an array, by which the library may have to make another array of it."""


def given_as(input, residual, gradient, training):
    """The bits of all results of a call whose arrays are given in these ways."""
    arrays, (dy, *_) = draw(Form(residual=True), 3)
    arrays["input"], arrays["residual"] = KINDS[input](arrays["input"]), KINDS[residual](arrays["residual"])
    y, vjp_fn = F.batch_norm_vjp(**arrays, training=training, activation="relu")
    results = [y, *vjp_fn(KINDS[gradient](dy)), *vjp_fn(dy)]
    vectors = [arrays[name] for name in NAMES]
    assert {type(array) for array in results} == {cp.ndarray}
    return [*bits(*results, *vectors), *(array.strides for array in results)]


@pytest.mark.parametrize("training", [True, False])
def test_tensors_given_in_other_ways(plays, training):
    """What has to be copied or seen as another class is so at every call, whatever calls came before."""
    ways = [("as they are",) * 3]
    ways += [tuple(kind if i == at else "as they are" for i in range(3)) for kind in KINDS for at in range(3)]
    ways += [(kind,) * 3 for kind in KINDS]
    with without_tapes():
        expected = {way: given_as(*way, training) for way in ways}
    rng = np.random.default_rng(1)
    for index in [*range(len(ways)), *rng.permutation(len(ways)), *rng.permutation(len(ways))]:
        assert given_as(*ways[index], training) == expected[ways[index]], ways[index]
    assert plays


@pytest.mark.parametrize("shape", [(0, C, 2, 4), (4, C, 0, 4), (4, 0, 2, 4)], ids=str)
def test_arrays_without_elements(plays, shape):
    """Gradients of arrays without elements are zeros each time."""
    form = Form(shape=shape, residual=True, activation="relu")
    for seed in range(3):
        keep = [cp.full(C, 7, np.float32) for _ in range(20)]  # what new memory could hold, were it not set
        del keep
        arrays, (dy, *_) = draw(form, seed)
        y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, activation="relu")
        grads = vjp_fn(dy)
        assert y.shape == grads.input.shape == grads.residual.shape == shape
        for grad in grads.weight, grads.bias:
            assert grad.tolist() == [0] * shape[1]
    assert plays == []


# ---------------------------------------------------------------------------------------------------------------------
# Arrays that share memory


def vector(values, step=1):
    return spread(np.asarray(values, np.float32), step)


def apart():
    """Arguments of a call, none of which shares memory with another one."""
    arrays, (dy, *_) = draw(Form(residual=True), 5)
    return arrays | {"dy": dy}


def sharing(**same):
    """Arguments where the arrays of some names are those of other ones."""
    arrays = apart()
    return arrays | {name: arrays[other] for name, other in same.items()}


def neighbours(name, other, distance, step=1):
    """Arguments where two vectors lie in one array, some elements apart."""
    memory = vector(np.arange(1, 40) / 8)
    arrays = apart()
    size = C * step
    if distance < 0:
        name, other, distance = other, name, -distance
    arrays[name], arrays[other] = memory[:size:step], memory[distance : distance + size : step]
    return arrays


def backwards(name, other):
    """Arguments where two vectors are the same memory, one of them from its end to its begin."""
    arrays = apart()
    return arrays | {name: arrays[other][::-1]}


def crosswise(name, other):
    """Arguments where a vector that runs backwards ends within another one, far below its own address."""
    memory = vector(np.arange(1, 40) / 8)
    return apart() | {name: memory[3 : 3 + C][::-1], other: memory[4 - C : 4]}


def output_over(name):
    """Arguments where `out` has a vector within its memory."""
    arrays = apart()
    memory = cp.zeros(96 + 8, np.float32)
    memory[40 : 40 + C] = arrays[name]
    return arrays | {name: memory[40 : 40 + C], "out": memory[:96].reshape(SHAPE)}


def strided():
    """Arguments with vectors whose values are not beside each other."""
    arrays, (dy, *_) = draw(Form(residual=True, step=2), 6)
    return arrays | {"dy": dy}


def strided_and_shared():
    """Arguments where the weight is the running variance, and not beside each other: its copy has other strides."""
    arrays = strided()
    return arrays | {"weight": arrays["running_var"]}


SHARING = {
    "input and residual": lambda: sharing(residual="input"),
    "input and gradient": lambda: sharing(dy="input"),
    "residual and gradient": lambda: sharing(dy="residual"),
    "weight and bias": lambda: sharing(weight="bias"),
    "weight and running variance": lambda: sharing(weight="running_var"),
    "bias and running mean": lambda: sharing(bias="running_mean"),
    "weight and both statistics": lambda: sharing(weight="running_var", running_mean="running_var"),
    "running mean and variance": lambda: sharing(running_mean="running_var"),
    "statistics crosswise": lambda: sharing(weight="running_mean", bias="running_var"),
    "part of weight and running variance": lambda: neighbours("weight", "running_var", 1),
    "part of running variance and weight": lambda: neighbours("weight", "running_var", -2),
    "part of running mean and variance": lambda: neighbours("running_mean", "running_var", 1),
    "part of weight and bias": lambda: neighbours("weight", "bias", 1),
    "weight right before running mean": lambda: neighbours("weight", "running_mean", C),
    "weight between running variance": lambda: neighbours("weight", "running_var", 1, step=2),
    "weight is running variance backwards": lambda: backwards("weight", "running_var"),
    "part of running variance and weight backwards": lambda: crosswise("weight", "running_var"),
    "part of bias and running mean backwards": lambda: crosswise("running_mean", "bias"),
    "weight is bias backwards": lambda: backwards("weight", "bias"),
    "weight far from bias": lambda: neighbours("weight", "bias", 20),
    "output over weight": lambda: output_over("weight"),
    "output over running variance": lambda: output_over("running_var"),
    "output is input": lambda: sharing(out="input"),
    "output is residual": lambda: sharing(out="residual"),
    "strided": strided,
    "strided, weight and running variance": strided_and_shared,
    "nothing": apart,
}
MODES = {"training": {"training": True}, "eval": {}, "no update": {"training": True, "update": False}}


def use(make, back, training=False, update=True):
    """The outcome of a call with these arguments; back twice, and once more when another call has moved buffers."""
    arrays = make()
    dy, out = arrays.pop("dy"), arrays.pop("out", None)
    with recorded() as launches, contextlib.nullcontext() if update else cupybn.no_stats_update():
        if not back:
            results = [F.batch_norm(**arrays, training=training, activation="relu", out=out)]
        else:
            y, vjp_fn = F.batch_norm_vjp(**arrays, training=training, activation="relu")
            results = [y, *vjp_fn(dy), *vjp_fn(y)]
            results += [array.copy() for array in arrays.values()]
            mean, var = arrays["running_mean"], arrays["running_var"]
            F.batch_norm(arrays["input"], mean, var, training=True)
            results += vjp_fn(dy)
    results += arrays.values()
    where = [(launch.name, *launch[1:6], launch.cluster) for launch in launches]
    return Outcome(bits(*results), [None if a is None else a.strides for a in results], where)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_shared_memory_before_and_after_a_call_without(plays, back, mode):
    """A tape of arrays that lie apart is not for arrays that share memory, nor the other way round."""
    names = [*SHARING, "strided"]  # the tape for those that are strided is not for their copies
    with without_tapes():
        expected = {name: use(make, back, **mode) for name, make in SHARING.items()}
    for name in names:
        other = "strided" if name.startswith("strided,") else "nothing"
        for order in (name, other, name), (other, name):
            _call._cache.clear()
            for called in order:
                alike(use(SHARING[called], back, **mode), expected[called])
    assert plays


def test_shared_memory_all_at_once(plays):
    """All of them in one cache, over and over."""
    rng = np.random.default_rng(8)
    for back, mode in (False, MODES["eval"]), (True, MODES["training"]):
        with without_tapes():
            expected = {name: use(make, back, **mode) for name, make in SHARING.items()}
        for name in [*rng.permutation([*SHARING]), *rng.permutation([*SHARING])]:
            alike(use(SHARING[name], back, **mode), expected[name])
    assert len(plays) > 50


def counted_within(name, seed):
    """The bits of a layer whose counter lies within another one of its arrays, and of its output, after two calls."""
    arrays, _ = draw(Form(), seed)
    layer = cupybn.BatchNorm2d(C, device="cuda:0", dtype=np.float64)
    memory = cp.full(C, 1.5)
    counter = memory.view(np.int64)[1:2].reshape(())
    setattr(layer, name, memory)
    layer.num_batches_tracked = counter
    counter[...] = 4
    results = [layer(arrays["input"]), layer.vjp(arrays["input"])[0]]
    return bits(*results, *layer.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_counter_within_another_array(plays, name):
    with without_tapes():
        expected = [counted_within(name, seed) for seed in range(3)]
    assert [counted_within(name, seed) for seed in range(3)] == expected
    assert plays == []
    act(Form(layer={"dtype": np.float64}), 1, False)
    act(Form(layer={"dtype": np.float64}), 2, False)
    assert len(plays) == 1
    assert [counted_within(name, seed) for seed in range(3)] == expected
    assert len(plays) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["residual first", "input first"])
def test_each_tensor_divides_by_a_pack_for_itself(streamed, plays, order):  # noqa: ARG001
    """The sums are read in packs that fit the input alone: what fits another one of all tensors does not count."""
    forms = [Form(residual=True, offsets=offsets) for offsets in ((0, 1, 0), (1, 0, 0))]
    with without_tapes():
        expected = [act(form, 1, True) for form in forms]
    for _ in range(2):
        for index in order:
            alike(act(forms[index], 1, True), expected[index])
    assert plays
