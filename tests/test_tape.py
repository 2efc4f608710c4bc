"""Calls that are played from tapes: bits, launches and errors are those of calls that take their steps."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from cupybn._steps import bundles as real_bundles
from cupybn._steps import launcher, plans, sources
from cupybn._steps.arguments import VECTOR, Arguments
from cupybn._steps.bundles import Sums
from cupybn._steps.geometry import PACK, ChannelsFirst, ChannelsLast
from cupybn._steps.launcher import Frame, Kernel, listening
from cupybn._steps.tape import NUMBERS, Recorder, Tape, Tapes, sources_of
from tests.reference import bits, in_order, to_numpy
from tests.steps import forget_plans

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

NAMES = ("weight", "bias", "running_mean", "running_var")
C = 3
SHAPE = (4, C, 2, 4)


@pytest.fixture(autouse=True)
def fresh(fresh_plans):
    """No tape is there when a test begins, and none is left for the next one."""


@pytest.fixture
def plays(monkeypatch):
    """The tapes that have been played to their ends, one entry for each time."""
    played, original = [], Tape.play

    def play(self, sources):
        results = original(self, sources)
        if results is not None:
            played.append(self)
        return results

    monkeypatch.setattr(Tape, "play", play)
    return played


@contextlib.contextmanager
def without_tapes():
    """A context in which every call takes its steps, and that leaves no tape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_call, "_cache", {})
        patch.setattr(Tapes, "play", lambda *_: None)
        yield


@contextlib.contextmanager
def recorded():
    """A context with a list of its launches; on a GPU that stays empty."""
    if emulator is None:
        yield []
    else:
        with emulator.record() as launches:
            yield launches


def placed(values, order=None, offset=0):
    """An array of the device whose axes are in an order of memory, some elements after an aligned address."""
    order = tuple(range(values.ndim)) if order is None else order
    host = np.ascontiguousarray(values.transpose(order))
    view = cp.empty(host.size + offset, host.dtype)[offset:].reshape(host.shape)
    view[...] = cp.asarray(host)
    return view.transpose(np.argsort(order).tolist())


def spread(values, step):
    """A vector of the device with its values some elements apart."""
    view = cp.zeros(values.size * abs(step), values.dtype)[::step]
    view[...] = cp.asarray(values)
    return view


# ---------------------------------------------------------------------------------------------------------------------
# Bits and launches


class Form(NamedTuple):
    """What calls have in common that are alike."""

    shape: tuple[int, ...] = SHAPE
    order: tuple[int, ...] | None = None  # axes in the order of memory
    dtype: Any = np.float32
    vectors: Any = np.float32  # one dtype, or those of NAMES
    step: int = 1  # elements between values of a vector
    given: tuple[str, ...] = NAMES
    residual: bool = False
    activation: str | None = None
    training: bool = True
    update: bool = True
    eps: Any = 1e-3
    offsets: tuple[int, int, int] = (0, 0, 0)  # elements of input, residual and gradient behind an aligned address
    out: str | None = None
    layer: dict | None = None  # options of a layer that makes the call
    taped: bool = True  # whether calls without a way back are played from the second one on
    taped_vjp: bool = True
    taped_back: bool = True


NC, NHWC = {"shape": (6, 8)}, {"order": (0, 2, 3, 1)}
RELU = {"residual": True, "activation": "relu"}
EVAL, LAYER = {"training": False}, {"layer": {}}
DTYPES = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
OUT = {"out": "new"}
FORMS = {
    "training": {},
    "eval": EVAL,
    "no update": {"update": False},
    "no buffers": {"given": ("weight", "bias")},
    "nothing but the input": {"given": ()},
    "no weight": {"given": NAMES[1:]} | RELU,
    "no bias, eval": {"given": ("weight", "running_mean", "running_var")} | EVAL,
    "no affine, eval": {"given": NAMES[2:]} | EVAL | RELU,
    "residual": {"residual": True},
    "relu": {"activation": "relu"},
    "residual, relu": RELU,
    "residual, relu, eval": RELU | EVAL,
    "channels last": NHWC,
    "channels last, residual, relu": NHWC | RELU,
    "channels last, eval": NHWC | EVAL | RELU,
    "(N, C)": NC | RELU,
    "(N, C), eval": NC | EVAL,
    "channels slowest": {"order": (1, 3, 0, 2)} | RELU,
    "float16": {"dtype": np.float16} | RELU,
    "bfloat16": {"dtype": ml_dtypes.bfloat16} | RELU,
    "float64": {"dtype": np.float64} | RELU,
    "vectors of all dtypes": {"vectors": DTYPES} | RELU,
    "vectors of all dtypes, eval": {"vectors": DTYPES[::-1]} | EVAL,
    "every third value": {"step": 3},
    "backwards": {"step": -2},
    "backwards, eval": {"step": -1} | EVAL,
    "eps of NumPy": {"eps": np.float32(1e-3)},
    "misaligned input": {"offsets": (1, 0, 0)} | RELU,
    "misaligned residual": {"offsets": (0, 1, 0)} | RELU,
    "misaligned gradient": {"offsets": (0, 0, 1)},
    "misaligned gradient, mask": {"offsets": (0, 0, 1), "taped_back": False} | RELU,  # it is copied
    "half a pack": {"offsets": (2, 2, 2)} | RELU,
    "misaligned, eval": {"offsets": (1, 2, 3)} | EVAL,
    "out": OUT,
    "out, eval": OUT | EVAL | RELU,
    "out is the input": {"out": "input", "taped": False},  # which moves running statistics
    "out is the input, eval": {"out": "input"} | EVAL | RELU,
    "out is the input, no buffers": {"out": "input", "given": ("weight", "bias")},
    "out is the residual, eval": {"out": "residual"} | EVAL | RELU,
    "out is the residual, no update": {"out": "residual", "update": False} | RELU,
    "out of another order": {"out": "other order", "taped": False} | EVAL,
    "layer": LAYER,
    "layer, eval": LAYER | EVAL | RELU,
    "layer, mean over all batches": {"layer": {"momentum": None}},
    "layer, mean over all batches, no update": {"layer": {"momentum": None}, "update": False},
    "layer, mean over all batches, no buffers": {"layer": {"momentum": None, "track_running_stats": False}},
    "layer without buffers": {"layer": {"track_running_stats": False}} | RELU,
    "layer without affine": {"layer": {"affine": False}},
    "frozen layer": {"layer": {"frozen": True}, "taped_vjp": False},  # a later call may move what the way back reads
}
FORMS = {name: Form(**form) for name, form in FORMS.items()}
CASES = {f"{name}, vjp": (form, True) for name, form in FORMS.items() if form.out is None}
CASES |= {name: (form, False) for name, form in FORMS.items() if "gradient" not in name}


class Outcome(NamedTuple):
    """What a call left behind: bits of all arrays and strides of results, and the launches."""

    bits: list[bytes | None]
    strides: list[Any]
    launches: list[tuple]


def draw(form, seed):
    """Arrays for a call of a form by their names, and other gradients of its output."""
    rng = np.random.default_rng(seed)
    x, residual, *dys = ((rng.standard_normal(form.shape) * 2 + 1).astype(form.dtype) for _ in range(5))
    offsets = form.offsets
    arrays = {"input": placed(x, form.order, offsets[0])}
    if form.residual:
        arrays["residual"] = placed(residual, form.order, offsets[1])
    dtypes = form.vectors if isinstance(form.vectors, tuple) else [form.vectors] * len(NAMES)
    for name, dtype in zip(NAMES, dtypes, strict=True):
        if name in form.given:
            arrays[name] = spread(rng.uniform(0.5, 2, form.shape[1]).astype(dtype), form.step)
    return arrays, [placed(dy, form.order, offsets[2]) for dy in dys]


def out_of(form, arrays):
    """The `out` of a call with these arrays."""
    if form.out in (None, "input", "residual"):
        return arrays.get(form.out)
    x = arrays["input"]
    return in_order(cp.zeros_like(x), (3, 2, 1, 0)) if form.out == "other order" else cp.zeros_like(x)


def layer_of(form, arrays, momentum):
    """The layer that makes a call with these arrays."""
    options = {"momentum": momentum, "activation": form.activation, "eps": form.eps} | form.layer
    frozen = options.pop("frozen", False)
    layer = cupybn.BatchNorm2d(form.shape[1], device="cuda:0", **options)
    layer.train(form.training)
    layer.track_running_stats = layer.track_running_stats and not frozen
    for name in NAMES:
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = arrays[name]
    return layer


def act(form, seed, back, alone=True):
    """The outcome of a call of a form with other arrays and another momentum for each seed.

    Launches are listed unless other threads may launch, too.
    """
    arrays, dys = draw(form, seed)
    momentum = 0.1 + seed / 10
    out = out_of(form, arrays)
    context = contextlib.nullcontext() if form.update else cupybn.no_stats_update()
    with recorded() if alone else contextlib.nullcontext([]) as launches:
        if form.layer is not None:
            layer = layer_of(form, arrays, momentum)
            with context:
                run = layer.vjp if back else lambda *given: (layer(*given), None)
                y, vjp_fn = run(arrays["input"], arrays.get("residual"))
            held = layer.state_dict()
        else:
            rest = {"momentum": momentum, "training": form.training, "activation": form.activation, "eps": form.eps}
            given = {"running_mean": None, "running_var": None} | arrays | rest
            with context:
                y, vjp_fn = F.batch_norm_vjp(**given) if back else (F.batch_norm(**given, out=out), None)
            held = arrays
        results = [y, *held.values()]
        if back:
            results += [grad for dy in (dys[0], dys[0], dys[1]) for grad in vjp_fn(dy)]
    assert out is None or back or y is out
    where = [(launch.name, *launch[1:6], launch.cluster) for launch in launches]
    return Outcome(bits(*results), [None if a is None else a.strides for a in results], where)


def alike(ours, theirs):
    """Check that two outcomes are one."""
    assert ours.strides == theirs.strides
    assert ours.launches == theirs.launches
    assert ours.bits == theirs.bits


@pytest.mark.parametrize(("form", "back"), CASES.values(), ids=CASES)
def test_bits_and_launches(either, plays, form, back):  # noqa: ARG001
    """The first call of a form, and later ones with other arrays and numbers, do what steps do."""
    for seed in range(3):
        with without_tapes():
            expected = act(form, seed, back)
        alike(act(form, seed, back), expected)
    forward, ways_back = 2, 3 * 3 - 1  # all but the first one
    if back:
        assert len(plays) == (forward if form.taped_vjp else 0) + (
            ways_back if form.taped_vjp and form.taped_back else 0
        )
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
    """They are equal, so that one tape serves them."""
    for eps in 0.0, -0.0, 0.0:
        form = Form(training=False, eps=eps)
        with without_tapes():
            expected = act(form, 2, True)
        alike(act(form, 2, True), expected)
    assert len(plays) == 2 + 3 * 3 - 1


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
    """The same, but that the weight is the running variance: the library takes a copy of it, whose values are."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Errors after good calls


def good_arguments():
    """Arguments of a call that is right, on the first of two devices."""
    arrays, _ = draw(Form(residual=True), 4)
    rest = {"training": True, "momentum": 0.1, "eps": 1e-3, "activation": "relu", "channel_axis": 1}
    return arrays | rest


class Proxy:
    """An object that says of itself that it is of another class, as proxies do, and has all that this one has."""

    def __init__(self, wrapped):
        self._wrapped = wrapped

    @property
    def __class__(self):
        return type(self._wrapped)

    def __getattr__(self, name):
        return getattr(self._wrapped, name)


class Broken:
    """An object of which nothing can be read."""

    @property
    def shape(self):
        raise RuntimeError("nothing can be read")


def elsewhere(array):
    """An array of the same shape and dtype on the other device."""
    with cp.cuda.Device(1):
        return cp.ones(array.shape, array.dtype)


def wrong_arrays(array):
    """What is wrong in the place of an array, by name."""
    yield "shape", array[..., :-1].copy()
    yield "rank", array[None].copy()
    yield "integers", array.astype(np.int32)
    yield "host", array.get()
    yield "list", array.tolist()
    yield "number", 1.0
    yield "proxy", Proxy(array)
    yield "broken", Broken()
    yield "elsewhere", elsewhere(array)


WRONG = {
    "training": [1, None, "yes"],
    "momentum": [None, "0.1", 1 + 0j, cp.zeros(())],
    "eps": [0.0, -1.0, "1e-3", None, float("nan"), 1e-3 + 0j],
    "activation": ["gelu", 1, ["relu"]],
    "channel_axis": [4, -5, 1.0, None, (1,), True],
}


def wrong_calls():
    """Calls that are wrong in one argument: its name, what is wrong, and a function of good arguments."""
    for name in ("input", "residual", *NAMES, "out", "grad_output"):
        good = good_arguments()
        of = good["input"] if name in ("out", "grad_output") else good[name]
        for what, value in wrong_arrays(of):
            yield name, what, value
        if name in ("residual", "out", "grad_output"):
            yield name, "dtype", of.astype(np.float16)
        if name == "out" or name.startswith("running"):
            yield name, "one memory for all", cp.broadcast_to(of[:1, ..., :1] if of.ndim > 1 else of[:1], of.shape)
    yield "running_mean", "missing", None
    yield "running_var", "missing", None
    yield "input", "missing", None
    for name, values in WRONG.items():
        for value in values:
            yield name, repr(value), value


def error_of(make):
    """Type and text of the error that a call raises; None if it raises none."""
    try:
        make()
    except Exception as error:
        return type(error), str(error)
    return None


def attempts(good, vjp_fn, name, value, out=None):
    """What a wrong value is given to."""
    if name == "grad_output":
        yield lambda: vjp_fn(value)
        return
    wrong = good | {name: value}
    yield lambda: F.batch_norm(**({"out": out} | wrong))
    if name != "out":
        yield lambda: F.batch_norm_vjp(**wrong)


@only_emulated
def test_every_wrong_call_raises_after_a_thousand_good_ones(plays):
    """The same errors as ever, nothing is launched or changed, and the next good call is played."""
    with emulator.pretend(emulator.H200, emulator.H200):
        good = good_arguments()
        arrays = [value for value in good.values() if isinstance(value, cp.ndarray)]
        out, dy = cp.empty_like(good["input"]), good["input"].copy()
        _, vjp_fn = F.batch_norm_vjp(**good)
        wrong, expected = list(wrong_calls()), []
        for name, what, value in wrong:
            for attempt in attempts(good, vjp_fn, name, value, out):
                _call._cache.clear()
                expected.append((name, what, error_of(attempt)))
        assert [(name, what) for name, what, error in expected if error is None] == []
        _call._cache.clear()
        for _ in range(1000):
            F.batch_norm(**good, out=out)
        for _ in range(3):
            _, vjp_fn = F.batch_norm_vjp(**good)
            vjp_fn(dy)
        assert len(plays) == 999 + 2 + 2
        found = []
        before = bits(*arrays, out, dy)
        with emulator.record() as launches:
            for name, what, value in wrong:
                found += [(name, what, error_of(attempt)) for attempt in attempts(good, vjp_fn, name, value, out)]
        assert launches == []
        assert found == expected
        assert bits(*arrays, out, dy) == before
        F.batch_norm(**good, out=out)
        vjp_fn(dy)
        assert len(plays) == 999 + 2 + 2 + 2


@only_emulated
def test_every_wrong_call_of_a_layer_raises_after_good_ones(plays):
    with emulator.pretend(emulator.H200, emulator.H200):
        layer = cupybn.BatchNorm2d(C, device="cuda:0")
        arrays, _ = draw(Form(residual=True), 1)
        x, residual = arrays["input"], arrays["residual"]
        changes = [("residual", what, value) for what, value in wrong_arrays(residual)]
        changes += [("input", what, value) for what, value in wrong_arrays(x)]
        changes += [("input", "channels", cp.ones((4, 5, 2, 4), np.float32)), ("input", "one value", x[:1, :, :1, :1])]
        for name in NAMES:
            changes += [(name, what, value) for what, value in wrong_arrays(getattr(layer, name))]
        counter = layer.num_batches_tracked
        changes += [("num_batches_tracked", what, value) for what, value in (
            ("dtype", counter.astype(np.int32)), ("shape", counter.reshape(1)), ("host", counter.get()), ("int", 3),
            ("elsewhere", elsewhere(counter)), ("proxy", Proxy(counter)),
        )]  # fmt: skip
        changes += [("running_mean", "missing", None), ("running_var", "missing", None)]
        changes += [(name, repr(value), value) for name in WRONG for value in WRONG[name]]
        changes = [change for change in changes if change[:2] != ("momentum", "None")]  # which is right for a layer

        def error(name, value):
            given = {"input": x, "residual": residual}
            before = getattr(layer, name, None)
            if name in given:
                given[name] = value
            else:
                setattr(layer, name, value)
            try:
                return error_of(lambda: layer(**given)), error_of(lambda: layer.vjp(**given))
            finally:
                if name not in given:
                    setattr(layer, name, before)

        expected = []
        for name, what, value in changes:
            _call._cache.clear()
            expected.append((name, what, error(name, value)))
        assert [(name, what) for name, what, errors in expected if None in errors] == []
        _call._cache.clear()
        for _ in range(20):
            layer(x, residual)
            layer.vjp(x, residual)
        before = bits(*layer.state_dict().values(), x, residual)
        with emulator.record() as launches:
            assert [(name, what, error(name, value)) for name, what, value in changes] == expected
        assert launches == []
        assert bits(*layer.state_dict().values(), x, residual) == before
        assert len(plays) == 38
        layer(x, residual)
        assert len(plays) == 39


# ---------------------------------------------------------------------------------------------------------------------
# Frames: threads, launches within launches, interrupts


def kernels_of(tape):
    return [launch.kernel for launch in tape.launches]


def tapes():
    """All tapes that there are, and None for calls that cannot be told again."""
    found = []
    for checked in _call._cache.values():
        found += [] if checked.tapes is None else checked.tapes.values()
    return found


@pytest.fixture
def frames(monkeypatch):
    """The frames that are made from now on; no kernel has one in the beginning."""
    made = []

    class Counted(Frame):
        def __init__(self, ranges):
            super().__init__(ranges)
            made.append(weakref.ref(self))

    monkeypatch.setattr(launcher, "Frame", Counted)
    launcher.kernel.cache_clear()
    yield made
    launcher.kernel.cache_clear()


def interrupting(monkeypatch, kind, inside):
    """Let `inside` be called where a launch of this kernel is about to be handed to CuPy, its frame being filled."""
    original = Kernel.run

    def run(self, grid, block, frame, shared):
        if self.name.endswith(kind):
            inside()
        original(self, grid, block, frame, shared)

    monkeypatch.setattr(Kernel, "run", run)


def test_threads_that_make_the_same_call(either, plays):  # noqa: ARG001
    """Eight threads play the same tapes at once, each for its own arrays."""
    form = Form(residual=True, activation="relu")
    with without_tapes():
        expected = [act(form, seed, True).bits for seed in range(8)]
    act(form, 9, True)
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        return [act(form, seed, True, alone=False).bits for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for seed, outcomes in enumerate(pool.map(work, range(8))):
            assert outcomes == [expected[seed]] * 10
    assert len(plays) == 2 + 8 * 10 * 4


@pytest.mark.parametrize("first", ["recorded", "played"])
def test_a_thread_that_launches_while_another_one_does(monkeypatch, frames, first):
    """A whole call comes in between when the arguments of another call of that form lie in their frame."""
    form = Form()
    with without_tapes():
        expected = [act(form, seed, False).bits for seed in range(2)]
    if first == "played":
        act(form, 5, False)
    frames.clear()
    found, busy = {}, threading.Lock()

    def work():
        found["other"] = act(form, 1, False, alone=False).bits

    def inside():
        if busy.acquire(blocking=False):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(work).result()

    interrupting(monkeypatch, "bn_forward", inside)
    found["own"] = act(form, 0, False, alone=False).bits
    assert [found["own"], found["other"]] == expected
    assert len(frames) <= 2
    monkeypatch.undo()
    assert act(form, 0, False).bits == expected[0]


@only_emulated
@pytest.mark.parametrize("first", ["recorded", "played"])
def test_a_launch_within_a_launch(monkeypatch, plays, frames, first, either):  # noqa: ARG001
    """What hooks into launches may call the library: each call has its own arguments, three deep."""
    form = Form()
    with without_tapes():
        expected = [act(form, seed, True).bits for seed in range(4)]
    if first == "played":
        act(form, 5, True)
    found, seeds, original = {}, [1, 2, 3], cp.RawKernel.__call__

    def call(self, *args, **options):
        if seeds:
            seed = seeds.pop()
            found[seed] = act(form, seed, True).bits
        original(self, *args, **options)

    monkeypatch.setattr(cp.RawKernel, "__call__", call)
    found[0] = act(form, 0, True).bits
    assert [found[seed] for seed in range(4)] == expected
    assert len(frames) <= 4 * len({kernel for tape in tapes() for kernel in kernels_of(tape)})


def test_as_many_frames_as_launches_at_once(frames):
    form = Form()
    for seed in range(5):
        act(form, seed, True)
        act(form._replace(training=False), seed, True)
    used = {kernel for tape in tapes() for kernel in kernels_of(tape)}
    assert len(frames) == len(used)
    assert all(len(kernel._frames) == 1 for kernel in used)


@only_emulated
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_error_of_a_launch(streamed, monkeypatch, frames, plays, at, error):  # noqa: ARG001
    """It goes to the caller, no tape is kept of it, and the next calls are right; one frame at most is lost."""
    form = Form()
    with without_tapes():
        expected = act(form, 0, True)
    for first in True, False:
        left, original = at, cp.RawKernel.__call__

        def call(self, *args, original=original, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            original(self, *args, **options)

        made, before = len(frames), len(tapes())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cp.RawKernel, "__call__", call)
            with pytest.raises(error):
                act(form, 7, True)
        assert listening.listener is None
        if first:
            assert len(tapes()) == before + at // 2
        plays.clear()
        for _ in range(2):
            alike(act(form, 0, True), expected)
        assert len(frames) <= made + (5 if first else 1)


FLOW = tuple(sys.modules[name].__file__ for name in ("cupybn.functional", Tape.__module__, Kernel.__module__))
"""Files of which each line of a call is interrupted."""


def traced(call, at=None):
    """The lines of FLOW that a call executes, in their order; Ctrl-C comes at the one of a number."""
    lines, outside = [], sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in FLOW:
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(outside)
    return lines


def first_and_last(lines):
    """Numbers at which each line comes first, and at which it comes last."""
    return sorted({lines.index(line) for line in lines} | {len(lines) - 1 - lines[::-1].index(line) for line in lines})


@pytest.mark.parametrize("first", ["recorded", "played"])
def test_an_interrupt_at_any_line(streamed, frames, first):  # noqa: ARG001
    """After it nobody listens, nothing is kept of its arrays, and the next call is right; one frame at most is lost."""
    form = Form()

    def there_and_back(seed):
        arrays, (dy, *_) = draw(form, seed)
        alive = weakref.ref(arrays["input"])

        def call():
            y, vjp_fn = F.batch_norm_vjp(**arrays, training=True)
            return bits(y, *arrays.values(), *vjp_fn(dy))

        return call, alive

    with without_tapes():
        expected = there_and_back(0)[0]()
    if first == "played":
        there_and_back(6)[0]()
    lines = traced(there_and_back(6)[0])
    for at in first_and_last(lines):
        if first == "recorded":
            _call._cache.clear()
        made = len(frames)
        call, alive = there_and_back(6)
        assert traced(call, at) == lines[: at + 1]
        del call
        assert listening.listener is None
        assert alive() is None, f"at {lines[at]}"
        assert there_and_back(0)[0]() == expected, f"at {lines[at]}"
        assert len(frames) <= made + 1, f"at {lines[at]}"
    assert None not in tapes()


# ---------------------------------------------------------------------------------------------------------------------
# Streams, graphs and devices


@only_emulated
def test_launches_go_to_the_current_stream(either):  # noqa: ARG001
    form = Form()
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(3)]
    for first in streams[0], streams[1]:
        _call._cache.clear()
        for stream in first, streams[0], streams[1], streams[2], cp.cuda.Stream.null:
            arrays, (dy, *_) = draw(form, 1)
            with emulator.record() as launches, stream:
                _, vjp_fn = F.batch_norm_vjp(**arrays, training=True)
                vjp_fn(dy)
            assert {launch.stream for launch in launches} == {stream.ptr}


@pytest.mark.parametrize("inside", ["recorded", "played"])
def test_graphs_replay_what_was_captured(either, inside, plays):  # noqa: ARG001
    """A graph keeps the arguments of its launches, whatever the frames hold later."""
    form = Form(residual=True, activation="relu")
    arrays, (dy, *_) = draw(form, 1)
    other, (other_dy, *_) = draw(form, 2)
    with without_tapes():
        expected = act(form, 2, True).bits
        later = [[to_numpy(a).copy() for a in draw(form, seed)[0].values()] for seed in (3, 4)]

    def both(arrays, dy, momentum):
        y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, momentum=momentum, eps=form.eps, activation="relu")
        return y, vjp_fn(dy)

    keep = both(other, other_dy, 0.5)  # compiles, and CuPy's pool has enough memory from now on
    plays.clear()
    if inside == "recorded":
        _call._cache.clear()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        y, grads = both(arrays, dy, 0.25)
        graph = stream.end_capture()
    assert len(plays) == (0 if inside == "recorded" else 2)
    for values in later:
        assert act(form, 2, True).bits == expected  # in the same frames
        for array, value in zip(arrays.values(), values, strict=True):
            array[...] = cp.asarray(value)
        copies = {name: array.copy() for name, array in arrays.items()}
        with cp.cuda.Stream.null:
            graph.launch()
        stream.synchronize()
        with without_tapes():
            again = both(copies, dy, 0.25)
        assert bits(y, *grads, *arrays.values()) == bits(again[0], *again[1], *copies.values())
    assert len(plays) > 0
    assert keep


@only_emulated
def test_two_devices(plays):
    """Calls of one form on two devices have tapes of their own, whichever device is current."""
    form = Form(shape=(5, 2, 55, 20), residual=False)  # which takes more shared memory than a block has by itself
    no_clusters = replace(emulator.H200, compute_capability="80")
    with emulator.pretend(no_clusters, no_clusters):
        with without_tapes():
            expected = act(form, 1, True).bits
        launcher.kernel.cache_clear()  # shared memory has been asked for on one device
        forget_plans()
        for number, current in (0, 1), (1, 0), (0, 1), (1, 0), (1, 1), (0, 0):
            with cp.cuda.Device(number):
                arrays, (dy, other_dy, _) = draw(form, 1)
            with cp.cuda.Device(current), emulator.record() as launches:
                y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, momentum=0.2, eps=form.eps)
                grads = [*vjp_fn(dy), *vjp_fn(dy), *vjp_fn(other_dy)]
            assert {launch.device for launch in launches} == {number}
            assert max(launch.shared_mem for launch in launches) > launcher.SHARED
            assert {grad.device.id for grad in (y, *grads) if grad is not None} == {number}
            assert bits(y, *arrays.values(), *grads) == expected
        assert len(plays) == 2 * 2 + 4 * 4
        back = [kernel for tape in tapes() for kernel in kernels_of(tape) if kernel.name.endswith("bn_backward")]
        assert {frozenset(kernel._shared) for kernel in back} == {frozenset((0, 1))}
    launcher.kernel.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@only_emulated
def test_a_tape_holds_no_array(either):  # noqa: ARG001
    """Whatever the first call was given or has made is gone when its caller lets go of it."""
    form = Form(residual=True, activation="relu")
    act(form, 0, True)  # what the first call of all loads stays
    _call._cache.clear()
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        before = emulator.usage().live_bytes
        for seed in range(2):
            arrays, dys = draw(form, seed)
            y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, activation="relu")
            grads = vjp_fn(dys[0])
            alive = [weakref.ref(a) for a in (*arrays.values(), *dys, y, *grads)]
            assert emulator.usage().live_bytes > before
            del arrays, dys, y, vjp_fn, grads
            assert [reference for reference in alive if reference() is not None] == []
            assert emulator.usage().live_bytes == before
    finally:
        gc.enable()
    assert len(tapes()) == 2
    assert None not in tapes()


@only_emulated
@pytest.mark.parametrize("way", ["on chip", "streamed"])
@pytest.mark.parametrize(
    ("form", "forward", "vjp", "back"),
    [
        (Form(), 1, 2, 3),
        (Form(training=False), 1, 2, 3),
        (Form(given=NAMES[2:]), 1, 2, 1),
        (Form(given=NAMES[2:], training=False), 1, 2, 1),
        (Form(given=NAMES[1:]), 1, 2, 2),
        (Form(activation="relu"), 1, 2, 3),
        (Form(residual=True), 1, 2, 3),
        (Form(residual=True, activation="relu"), 1, 3, 4),
        (Form(out="new"), 0, None, None),
    ],
    ids=["training", "eval", "no affine", "no affine, eval", "bias", "relu", "residual", "residual, relu", "out"],
)
def test_allocations_of_a_played_call(way, request, plays, form, forward, vjp, back):
    """A result each, and one array for all that launches hand each other where there are two of them."""
    request.getfixturevalue("fresh_plans" if way == "on chip" else "streamed")
    more = way == "streamed" and form.training
    rest = {"training": form.training, "activation": form.activation}
    for time in range(3):
        arrays, (dy, *_) = draw(form, time)
        out = out_of(form, arrays)
        counts = [emulator.usage().allocations]
        y = F.batch_norm(**arrays, **rest, out=out)
        counts.append(emulator.usage().allocations)
        if vjp is not None:
            y, vjp_fn = F.batch_norm_vjp(**arrays, **rest)
            counts.append(emulator.usage().allocations)
            grads = vjp_fn(dy)
            counts.append(emulator.usage().allocations)
    found = np.diff(counts).tolist()
    back_more = way == "streamed" and (form.training or "weight" in form.given)
    assert found == ([forward + more] if vjp is None else [forward + more, vjp + more, back + back_more])
    assert len(plays) == 2 * len(found)
    assert vjp is None or grads.input.shape == y.shape


@pytest.fixture
def shift():
    """A list with the bytes behind an aligned address at which new memory begins; they take turns."""
    cuda, shifts, before = cp.cuda, [0], cp.cuda.get_allocator()

    def allocate(size):
        shifts.append(shifts.pop(0))
        return cuda.MemoryPointer(before(size + PACK).mem, shifts[-1]) if size else before(size)

    cuda.set_allocator(allocate)
    yield shifts
    cuda.set_allocator(before)


def test_memory_of_another_alignment(either, plays, shift):  # noqa: ARG001
    """New arrays that do not begin where packs do are never given to a tape, nor made one of."""
    offset = PACK // 2
    form = Form(residual=True, activation="relu")
    shift[:] = [offset]
    with without_tapes():
        misaligned = act(form, 1, True)
    for _ in range(3):
        alike(act(form, 1, True), misaligned)
    assert plays == []
    assert set(tapes()) <= {None}
    shift[:] = [0]
    _call._cache.clear()
    with without_tapes():
        aligned = act(form, 1, True)
    for _ in range(2):
        alike(act(form, 1, True), aligned)
    count = len(plays)
    assert count > 0
    shift[:] = [offset]
    for _ in range(2):
        alike(act(form, 1, True), misaligned)
    assert len(plays) == count
    shift[:] = [0]
    alike(act(form, 1, True), aligned)
    assert len(plays) == count + 4


@pytest.mark.parametrize("turns", [[0, 8], [8, 0, 0], [0, 0, 0, 8, 8], [0, 0, 8]], ids=str)
def test_memory_of_changing_alignment(either, shift, turns):  # noqa: ARG001
    """Where only some of the new arrays begin where packs do, results are right."""
    form = Form(residual=True, activation="relu")
    arrays, (dy, *_) = draw(form, 1)
    host = {name: to_numpy(array) for name, array in arrays.items()}
    rest = {"training": True, "activation": "relu", "momentum": 0.0}
    y, vjp_fn = F.batch_norm_vjp(**host, **rest)
    expected = y, *vjp_fn(to_numpy(dy))
    for i in range(12):
        shift[:] = turns if i % 4 else [0]
        y, vjp_fn = F.batch_norm_vjp(**arrays, **rest)
        for ours, theirs in zip((y, *vjp_fn(dy)), expected, strict=True):
            np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Recorders


@pytest.fixture
def looks(monkeypatch):
    """One entry for each time that a recorder has tried to make a tape."""
    found, original = [], Recorder._tape

    def tape(self):
        found.append(original(self))
        return found[-1]

    monkeypatch.setattr(Recorder, "_tape", tape)
    return found


def test_what_cannot_be_told_is_tried_once(plays, looks):
    """A gradient that is copied, as the mask has wider packs, is in no array of the call."""
    form = FORMS["misaligned gradient, mask"]
    with without_tapes():
        expected = act(form, 1, True)
    looks.clear()
    for _ in range(4):
        alike(act(form, 1, True), expected)
    assert [tape is None for tape in looks] == [False, True]
    assert len(plays) == 3
    assert sorted(tape is None for tape in tapes()) == [False, True]


def made_of(listed, results=(), given=(), key="a key"):
    """The tape, if there is one, of launches of the kernel `merge_sums`, each with these arguments by name."""
    found = Tapes()
    merge = launcher.kernel("merge_sums", **plans.macros_of(np.dtype(np.float64), 1, 32, plans.Geometry((1,))))
    with found.recorder((key, [array.data.ptr for array in given], (0.0, 0.0))) as recorder:
        for arguments in listed:
            merge.launch((1,), 32, arguments)
        recorder.results = list(results)
    assert list(found) == [key]
    return found[key]


def merging(rng, **others):
    """Arguments of `merge_sums`, by name."""
    sums = Sums(*(cp.asarray(rng.standard_normal((1, C))) for _ in range(2)))
    return {
        "sums": sums, "count": cp.zeros(1), "dweight": cp.zeros(C), "dbias": None, "row": cp.zeros((1, 2 * C)),
        "parts": 1, "C": C,
    } | others  # fmt: skip


def parameters(arguments):
    """All arrays among the arguments."""
    return [*arguments["sums"], *(arguments[name] for name in ("count", "dweight", "row"))]


def test_every_address_is_told(rng):
    """Words of a tape are those of the arrays, by the numbers of given arrays, and of results behind them."""
    arguments = merging(rng)
    arrays = parameters(arguments)
    tape = made_of([arguments], given=arrays[:3], results=[None, arrays[3], None, arrays[4]])
    (launch,) = tape.launches
    places = launch.kernel.arguments.places
    assert {word: (number, offset) for word, number, offset in launch.addresses} == {
        places["sums.dy"]: (0, 0),
        places["sums.dy_xhat"]: (1, 0),
        places["count"]: (2, 0),
        places["dweight"]: (3, 0),
        places["row"]: (4, 0),
    }
    assert [made and (made.shape, made.dtype) for made in tape.results] == [
        None, ((C,), np.float64), None, ((1, 2 * C), np.float64)
    ]  # fmt: skip
    assert tape.words == 0
    assert launch.numbers == []


@pytest.mark.parametrize("missing", range(5))
def test_one_address_that_is_not_told(rng, missing):
    arguments = merging(rng)
    arrays = parameters(arguments)
    assert made_of([arguments], given=[a for i, a in enumerate(arrays) if i != missing]) is None
    assert made_of([merging(rng, dweight=None), arguments], given=arrays) is None


def test_addresses_within_arrays(rng):
    """What begins within a result is told by its distance from the begin; within what was given it is not."""
    memory = cp.zeros(4 * C)
    arguments = merging(rng, dweight=memory[C : 2 * C])
    arrays = parameters(arguments)
    rest = [a for a in arrays if a is not arguments["dweight"]]
    tape = made_of([arguments], given=rest, results=[memory])
    word = tape.launches[0].kernel.arguments.places["dweight"]
    assert (word, 4, 8 * C) in tape.launches[0].addresses
    assert made_of([arguments], given=[*rest, memory]) is None
    behind = made_of([arguments | {"dweight": memory[C:][:C]}], given=rest, results=[memory[:C]])
    assert behind is None


def test_a_result_that_begins_between_packs(rng):
    arguments = merging(rng, dweight=cp.zeros(C + 1)[1:])
    given = [a for a in parameters(arguments) if a is not arguments["dweight"]]
    assert made_of([arguments], given=given, results=[arguments["dweight"]]) is None
    assert made_of([arguments | {"dweight": cp.zeros(C)}], given=given, results=[]) is None


@only_emulated
def test_nothing_is_kept_of_a_call_that_raises(monkeypatch):
    form = Form()
    original = cp.RawKernel.__call__

    def fail(*_args, **_options):
        raise RuntimeError("no")

    for _ in range(2):
        monkeypatch.setattr(cp.RawKernel, "__call__", fail)
        with pytest.raises(RuntimeError, match="no"):
            act(form, 1, False)
        assert tapes() == []
        assert listening.listener is None
    monkeypatch.setattr(cp.RawKernel, "__call__", original)
    act(form, 1, False)
    assert [len(tape.launches) for tape in tapes()] == [1]


def foreign_calls(x, running_mean, running_var, dy):
    """Functions that launch by no tape, with arrays that another call has, too."""
    layer = cupybn.BatchNorm2d(C, device="cuda:0")
    layer.track_running_stats = False
    layer.running_mean, layer.running_var = running_mean, running_var
    _, frozen_back = layer.vjp(x)
    return {
        "moments": lambda: F.moments(x),
        "training": lambda: F.batch_norm(x, running_mean, running_var, training=True, out=x),
        "back": lambda: frozen_back(dy),
    }


@only_emulated
@pytest.mark.parametrize("name", ["moments", "training", "back"])
def test_a_call_in_the_midst_of_another_one_is_not_on_its_tape(monkeypatch, name, either):  # noqa: ARG001
    """Hooks may call the library with arrays of the call that is recorded: its tape has its own launches only."""
    form = Form()
    arrays, dys = draw(form, 1)
    statistics = arrays["running_mean"], arrays["running_var"]
    foreign = foreign_calls(arrays["input"], *statistics, dys[0])[name]
    call = {"training": True, "eps": form.eps}
    with without_tapes():
        act(form, 2, True)
        expected = act(form, 2, True)
    original, busy = cp.RawKernel.__call__, []

    def hooked(self, *args, **options):
        if not busy:
            busy.append(True)
            foreign()
            busy.clear()
        original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cp.RawKernel, "__call__", hooked)
        _, vjp_fn = F.batch_norm_vjp(**arrays, **call)
        vjp_fn(dys[0])
    assert listening.listener is None
    lengths = [len(tape.launches) for tape in tapes()]
    assert len(lengths) == 2
    assert lengths == [len(expected.launches) // 4] * 2  # there once, back three times
    alike(act(form, 2, True), expected)


@only_emulated
def test_an_interrupt_that_a_hook_keeps_to_itself(monkeypatch):
    """A call that is interrupted in the midst of another one takes the listener with it: there is no tape of a part."""
    form = Form()
    original, busy = cp.RawKernel.__call__, []

    def hooked(self, *args, **options):
        if not busy:
            busy.append(True)
            with contextlib.suppress(KeyboardInterrupt):
                act(form._replace(training=False), 3, False)
        original(self, *args, **options)

    def interrupt(*_):
        raise KeyboardInterrupt

    with without_tapes():
        expected = act(form, 1, False)
    with monkeypatch.context() as patch:
        patch.setattr(cp.RawKernel, "__call__", hooked)
        patch.setattr(launcher.Hearing, "__exit__", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            act(form, 1, False)
    listening.reference = None
    for _ in range(2):
        alike(act(form, 1, False), expected)


def test_recorders_within_recorders():
    outer, inner = Recorder(Tapes(), ("outer", [], (0.0, 0.0))), Recorder(Tapes(), ("inner", [], (0.0, 0.0)))
    assert listening.listener is None
    with outer:
        assert listening.listener is outer
        with launcher.unheard():
            assert listening.listener is None
            with inner:
                assert listening.listener is inner
                inner.results = []
            assert listening.listener is None
        assert listening.listener is outer
        outer.results = []
    assert listening.listener is None
    with launcher.unheard():
        assert listening.listener is None


def test_a_listener_hears_its_own_thread_alone():
    form = Form()
    recorder = Recorder(Tapes(), ("key", [], (0.0, 0.0)))
    with recorder:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(act, form, 1, True).result()
        recorder.results = []
    assert recorder._heard == []
    assert recorder._tapes["key"].launches == []


def test_a_recorder_that_hears_no_more_makes_no_tape():
    found = Tapes()
    with found.recorder(("key", [], (0.0, 0.0))) as recorder:
        recorder.results = []
        listening.reference = None
    assert found == {}


def test_a_listener_that_is_gone():
    """An interrupt may keep a recorder from taking its leave: nobody listens when it is gone."""
    recorder = Recorder(Tapes(), ("key", [], (0.0, 0.0)))
    recorder.__enter__()
    del recorder
    assert listening.listener is None
    act(Form(), 1, False)
    listening.reference = None
    assert [len(tape.launches) for tape in tapes()] == [1]


def test_sources():
    """Calls have one tape if their arrays are in the same places twice, and their tensors begin alike."""
    memory = cp.zeros(32, np.float32)
    a, b, c, d = (memory[i : i + 4] for i in (0, 4, 8, 12))
    numbers = 0.1, 0.2
    key, addresses, kept = sources_of("kind", (a, None, b), (c, None, d), numbers)
    assert addresses == [x.data.ptr for x in (a, b, c, d)]
    assert kept == numbers
    assert sources_of("kind", (b, None, a), (d, c, None), (0.3, 0.4))[0] == key
    others = [
        sources_of("other", (a, None, b), (c, None, d), numbers),
        sources_of("kind", (a, None, a), (c, None, d), numbers),
        sources_of("kind", (a, None, b), (c, None, c), numbers),
        sources_of("kind", (a, None, b), (a, None, d), numbers),
        sources_of("kind", (a, None, b), (b, None, d), numbers),
        sources_of("kind", (memory[1:5], None, memory[5:9]), (c, None, d), numbers),
        sources_of("kind", (a, None, memory[6:10]), (c, None, d), numbers),
    ]
    assert len({key, *(other[0] for other in others)}) == 1 + len(others)
    assert sources_of("kind", (a, None, b), (memory[9:13], None, memory[13:17]), numbers)[0] == key


# ---------------------------------------------------------------------------------------------------------------------
# Words


STRUCTS = {
    "Affine": [("weight", VECTOR), ("bias", VECTOR), ("eps", "f8")],
    "Running": [("mean", VECTOR), ("var", VECTOR), ("momentum", "f8"), ("batches", "u8")],
    "Epilogue": [("residual", "u8"), ("activation", "i8"), ("mask", "u8")],
    "Moments": [("count", "u8"), ("mean", "u8"), ("m2", "u8"), ("batches", "u8")],
    "Statistics": [("pairs", "u8")],
    "Sums": [("dy", "u8"), ("dy_xhat", "u8")],
    "Gradients": [("dx", "u8"), ("dresidual", "u8"), ("dweight", VECTOR), ("dbias", VECTOR)],
    "Vector": VECTOR,
    "ChannelsFirst": [(name, "i8") for name in ChannelsFirst._fields],
    "ChannelsLast": [(name, "i8") for name in ChannelsLast._fields],
}
"""Fields of all structs that kernels take, with their dtypes: pointers are u8."""
TYPES = {"double": "f8", "long long": "i8"}


def field_of(parameter):
    return np.dtype(STRUCTS.get(parameter.type, TYPES.get(parameter.type, "u8")))


def value_for(dtype, name, drawn):
    """A value of its own for a word, and the value that is to be found there."""
    if dtype == VECTOR:
        base = cp.zeros(40, np.float32)[len(drawn) :: 2][:5]
        drawn.append(base)
        return base, (base.data.ptr, 8, 2)
    if name.endswith("activation"):
        return "relu", 1
    if dtype == np.float64:
        drawn.append(None)
        return 0.5 + len(drawn), 0.5 + len(drawn)
    if dtype == np.int64:
        drawn.append(None)
        return 1000 + len(drawn), 1000 + len(drawn)
    return None, None


@pytest.mark.parametrize("name", sources.kernel_names())
def test_words_of_every_kernel(name):
    """Values land where the fields of a struct with the kernel's parameters are, one behind the other."""
    dtype = np.dtype(np.float32)
    pointees = {
        "data_t*": dtype, "double*": np.dtype(np.float64), "long long*": np.dtype(np.int64), "mask_t*": np.dtype(bool)
    }  # fmt: skip
    signature = sources.signature(name)
    whole = np.dtype([(parameter.name, field_of(parameter)) for parameter in signature])
    arguments, drawn, expected, arrays = Arguments(name, signature, pointees), [], {}, {}
    given, bundles = {}, vars(real_bundles) | {"ChannelsFirst": ChannelsFirst, "ChannelsLast": ChannelsLast}

    def value(full_name, declared, dtype):
        if declared.type in pointees:
            array = cp.zeros((), pointees[declared.type])
            expected[full_name] = array.data.ptr
        else:
            array, expected[full_name] = value_for(dtype, full_name, drawn)
        if isinstance(array, cp.ndarray):
            arrays[full_name] = array
        return array

    for parameter in signature:
        of = whole[parameter.name]
        if parameter.fields:
            fields = {f.name: value(f"{parameter.name}.{f.name}", f, of[f.name]) for f in parameter.fields}
            assert list(fields) == list(of.names)
            given[parameter.name] = bundles[parameter.type](**fields)
        else:
            given[parameter.name] = value(parameter.name, parameter, of)
    listed = arguments.listed(given)
    words = arguments.packed(listed, 0)
    found = np.frombuffer(words, whole)
    assert found.size == 1

    for parameter, (start, stop) in zip(signature, arguments.ranges, strict=True):
        of, begin = whole.fields[parameter.name]
        assert (start * 8, stop * 8) == (begin, begin + of.itemsize)
    for full_name, wanted in expected.items():
        outer, _, inner = full_name.partition(".")
        of, begin = whole.fields[outer]
        if inner:
            begin += of.fields[inner][1]
        assert arguments.places[full_name] * 8 == begin, full_name
        at = found[0][outer][inner] if inner else found[0][outer]
        assert (at.item() if at.dtype.names else at) == wanted, full_name
    assert arguments.places.keys() == expected.keys()
    assert dict(arguments.arrays(listed)) == {arguments.places[full_name]: a for full_name, a in arrays.items()}
    nothing = {parameter.name: None if parameter.nullable else given[parameter.name] for parameter in signature}
    there = [n for n in arrays if nothing[n.partition(".")[0]] is not None]
    assert [word for word, _ in arguments.arrays(arguments.listed(nothing))] == [
        word for word, _ in arguments.arrays(listed) if word in {arguments.places[n] for n in there}
    ]


def test_numbers_of_a_tape_are_doubles_that_kernels_take():
    """Each name in NUMBERS is that of a double of some kernel, where a number of 1 / channels' sizes is not."""
    declared = {}
    for name in sources.kernel_names():
        for parameter in sources.signature(name):
            for field in parameter.fields or (parameter,):
                full_name = f"{parameter.name}.{field.name}" if parameter.fields else field.name
                if field.type == "double":
                    declared.setdefault(full_name, []).append(name)
    assert {*declared} == {*NUMBERS, "inv_count"}  # the last one is one over the elements of a channel
