"""Calls that are wrong, after good ones that were played from tapes: they raise what they ever raised."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from tests.reference import bits
from tests.tapes import (
    NAMES,
    C,
    Form,
    draw,
)

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

pytestmark = pytest.mark.usefixtures("fresh_plans")


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
    """Errors are the same as ever, nothing is launched or changed, and the next good call is played."""
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
