"""The cache of checked calls: after a good call, calls that differ in one part of one field are still told apart."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from cupybn._calls.call import Call, Caller, Checked
from cupybn._calls.layout import Layout
from cupybn._calls.rows import Rows
from cupybn._steps.bundles import Affine, Epilogue, Running

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)

BUNDLES = {"affine": Affine, "running": Running, "epilogue": Epilogue, "layer": Caller}
"""Fields of a call that have fields of their own."""
FIELDS = [(name, inner) for name in Call._fields for inner in (BUNDLES[name]._fields if name in BUNDLES else (None,))]
"""Names of the fields of a call, each with a field of a bundle or None."""
ARRAYS = {"input", "mean", "var", "weight", "bias", "residual", "batches", "mask"}
"""Names of the fields that are arrays."""
NO_DIFFERENCE = {"momentum", "passed", "device", "idle"}
"""Fields of which no value is wrong here: they are checked before, are not the caller's, or tell how to say what is
wrong."""


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(_call, "_cache", {})


@pytest.fixture(params=["numpy", "cupy"])
def xp(request):
    return {"numpy": np, "cupy": cp}[request.param]


class Masquerade:
    """An object with the attributes of a CuPy array, but of another class."""

    def __init__(self, array):
        self.shape, self.strides, self.dtype, self.data = array.shape, array.strides, array.dtype, array.data
        self.ndim, self.size = array.ndim, array.size


def read_only(array):
    """A view of the array that must not be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def other_order(array):
    """The array in another memory order; for a vector, as every other element of a longer one."""
    if array.ndim < 2:
        return array.repeat(2).reshape(*array.shape, 2)[..., 0]
    return array.T.copy().T


def several_devices():
    """Whether there is more than one device; the stand-in has two in these tests."""
    return cp.cuda.runtime.getDeviceCount() > 1


def elsewhere(array):
    """An array of the same shape and dtype on another device."""
    with cp.cuda.Device(1):
        return cp.zeros(array.shape, array.dtype)


def array_alternatives(array):
    """Values that each differ from the array in one thing, with the name of the difference."""
    yield "none", None
    yield "shape", array[..., :-1].copy() if array.ndim else array.reshape(1)
    yield "rank", array[None]
    yield "order", other_order(array)
    yield "dtype", array.astype(np.float16 if array.dtype == np.float32 else np.int32)
    yield "integers", array.astype(np.int32)
    yield "list", array.tolist()
    if isinstance(array, np.ndarray):
        yield "read-only", read_only(array)
        yield "noted", np.ma.MaskedArray(array)
        yield "kind", cp.asarray(array)
    else:
        yield "kind", array.get()
        yield "class", Masquerade(array)
        if several_devices():
            yield "device", elsewhere(array)


ALTERNATIVES = {
    "training": [True, False, 1, "no"],
    "momentum": [0.2],
    "eps": [0.0, -1.0, 1 + 0j, float("nan"), "1", None],
    "activation": ["gelu", ["relu"]],
    "channel_axis": [2, -3, 4, 1.0, None],
    "passed": [object()],
    "skip_nonfinite": [True, 0, np.False_, "no", None],
    "device": ["cpu"],
    "ndims": [(3, 4), (2,)],
    "group": [None, object()],
    "observer": [None, object()],
    "idle": [(object(), object())],
    "rows": [
        None,
        Rows("instance_norm"),
        Rows("instance_norm", batched=False),
        *(Rows("group_norm", n) for n in (1, 2, 3, 0)),
        *(Rows("layer_norm", None, shape) for shape in ((4,), (4, 4), (3,), ())),
        *(Rows("rms_norm", None, shape) for shape in ((4,), (3,))),
    ],
}
"""Other values for the fields that are no arrays. 1 + 0j and 1.0 are equal to the values that they replace."""


def replaced(call, **values):
    """A call with other values in fields of its own or of its bundles."""
    for name, inner in FIELDS:
        if (inner or name) in values:
            value = values[inner or name]
            call = call._replace(**{name: value if inner is None else getattr(call, name)._replace(**{inner: value})})
    return call


class Made(NamedTuple):
    """A call with its `out`, and whether it is made outside of `no_stats_update`."""

    call: Call
    out: Any = None
    moves_statistics: bool = True

    def outcome(self):
        """The result of checking the call, or the type and text of its error."""
        with contextlib.nullcontext() if self.moves_statistics else cupybn.no_stats_update():
            try:
                return self.call.checked(self.out)
            except (TypeError, ValueError) as error:
                return type(error), str(error)


def bases(xp):
    """Correct calls, by name; no single change turns one of them into another."""
    x, vectors = xp.zeros((3, 4, 4), np.float32), [xp.ones(4, np.float32) for _ in range(4)]
    mean, var, weight, bias = vectors
    running = Running(mean, var, 0.1, xp.zeros((), np.int64))
    epilogue = Epilogue(x.copy(), "relu", mask=xp.ones((3, 4), np.bool_))
    whole = Call(x, Affine(weight, bias, 1.0), running, epilogue, True, 1, Caller("cuda:7"))
    no_buffers = replaced(whole, mean=None, var=None, batches=None)
    one_value = replaced(whole, input=x[:1, :, :1].copy(), residual=None, mask=None, group=object())
    no_counter = replaced(whole, batches=xp.zeros((), np.int32))  # none that could be moved
    return {
        "training": Made(whole, x.copy()),
        "eval": Made(whole._replace(training=False), x.copy()),
        "eps = 0 in eval": Made(replaced(whole, training=False, eps=0.0)),
        "no buffers": Made(no_buffers),
        "one value": Made(one_value),
        "no update": Made(no_counter, moves_statistics=False),
        "observed": Made(replaced(no_counter, observer=object())),
        "instance norm": Made(replaced(whole, batches=None, mask=None, rows=Rows("instance_norm")), x.copy()),
        "instance norm in eval mode": Made(
            replaced(whole, batches=None, mask=None, training=False, rows=Rows("instance_norm"))
        ),
        "group norm": Made(replaced(no_buffers, mask=None, rows=Rows("group_norm", 2)), x.copy()),
        "layer norm": Made(
            replaced(no_buffers, mask=None, residual=None, activation=None, rows=Rows("layer_norm", None, (4,)))
        ),
    }


def alternatives(made):
    """Calls that each differ from this one in one field, with the names of field and difference."""
    for bundle, inner in FIELDS:
        name, value = inner or bundle, getattr(made.call, bundle)
        value = value if inner is None else getattr(value, inner)
        if name in ARRAYS:
            others = () if value is None else array_alternatives(value)
        else:
            others = ((repr(other), other) for other in ALTERNATIVES[name])
        for label, other in others:
            yield name, label, made._replace(call=replaced(made.call, **{name: other}))
    for label, other in () if made.out is None else array_alternatives(made.out):
        yield "out", label, made._replace(out=other)
    yield "moves_statistics", "", made._replace(moves_statistics=not made.moves_statistics)


class Pair(NamedTuple):
    """A correct call, another one, and the outcome of the other one when no call came before."""

    field: str
    label: str
    good: Made
    other: Made
    expected: Any


@pytest.fixture
def pairs(xp):
    with emulator.pretend(emulator.H200, emulator.H200) if emulator else contextlib.nullcontext():
        made = [
            Pair(field, f"{base}: {field} {what}", good, other, None)
            for base, good in bases(xp).items()
            for field, what, other in alternatives(good)
        ]
        for index, pair in enumerate(made):
            _call._cache.clear()
            made[index] = pair._replace(expected=pair.other.outcome())
        yield made


def missed(pairs):
    """The labels of the pairs whose second call gets another outcome because of the first one."""
    for pair in pairs:
        _call._cache.clear()
        assert isinstance(pair.good.outcome(), Checked), pair.label
        if pair.other.outcome() != pair.expected:
            yield pair.label


def test_a_call_like_a_good_one(pairs):
    assert list(missed(pairs)) == []


def test_every_field_has_a_wrong_value(pairs):
    """Every field but those listed above has a wrong value among the alternatives: a new field needs some, too."""
    assert {pair.field for pair in pairs} == {*(inner or name for name, inner in FIELDS), "out", "moves_statistics"}
    wrong = {pair.field for pair in pairs if not isinstance(pair.expected, Checked)}
    assert {pair.field for pair in pairs} - wrong == NO_DIFFERENCE


def without(original, index):
    """The function, but its result lacks the part at an index."""

    def shortened(*arguments):
        key = original(*arguments)
        return key if key is None else key[:index] + key[index + 1 :]

    return shortened


def test_every_part_of_the_key_counts(xp, pairs, monkeypatch):
    """Some pair gets a wrong outcome if any one part of the key is left out."""
    call, out, _ = bases(xp)["training"]
    original, key = Call._key, call._key(out)
    for index in range(len(key)):
        monkeypatch.setattr(Call, "_key", without(original, index))
        assert any(missed(pairs)), f"part {index}, {key[index]!r}, is in the key for nothing"


def test_every_part_of_a_form_counts(xp, pairs, monkeypatch):
    name = "_numpy_form" if xp is np else "_cupy_form"
    original = getattr(_call, name)
    *others, last = range(len(original(xp.zeros(3))))
    for index in others:
        monkeypatch.setattr(_call, name, without(original, index))
        assert any(missed(pairs)), f"part {index} is in the form for nothing"
    if xp is cp and not several_devices():
        pytest.skip("there is no other device for the last part, the device, to tell from")
    monkeypatch.setattr(_call, name, without(original, last))
    assert any(missed(pairs)), "the last part is in the form for nothing"


def test_a_gradient_has_the_form_of_the_input_in_every_part(xp):
    """Whatever differs from the input in one thing is looked at; each part of a form tells some of it."""
    with emulator.pretend(emulator.H200, emulator.H200) if emulator else contextlib.nullcontext():
        x = xp.zeros((3, 4, 4), np.float32)
        form = _call.form_of(x)
        assert _call.has_form(x.copy(), form)
        assert not _call.has_form(x, None)
        differing = []
        for label, other in array_alternatives(x):
            assert not _call.has_form(other, form), label
            if isinstance(other, type(x)):
                parts = zip(_call.form_of(other)[1], form[1], strict=True)
                differing.append([i for i, (ours, theirs) in enumerate(parts) if ours != theirs])
        assert {parts[0] for parts in differing if len(parts) == 1} >= {1} | (
            {3} if xp is np or several_devices() else set()
        )
        assert {part for parts in differing for part in parts} >= {0, 1, 2}


class Unreadable:
    """An object of which nothing can be read, but what class it says it is of."""

    def __init__(self, cls):
        self._cls = cls

    @property
    def __class__(self):
        return self._cls

    def __getattr__(self, name):
        raise RuntimeError(name)


def test_of_other_classes_nothing_is_read(xp):
    """A gradient that is no array may say that it is one, and raise for whatever it is asked."""
    x = xp.zeros((3, 4, 4), np.float32)
    _, vjp_fn = F.batch_norm_vjp(x, None, None, training=True)
    vjp_fn(x)
    for other in Unreadable(type(x)), Unreadable(str), None, 1.5, [x]:
        with pytest.raises(TypeError, match=r"^expected grad_output to be a NumPy or CuPy array \(got "):
            vjp_fn(other)


def test_errors_are_not_kept(pairs):
    for pair in pairs:
        _call._cache.clear()
        assert pair.other.outcome() == pair.other.outcome() == pair.expected
        assert isinstance(pair.expected, Checked) or not _call._cache


def test_calls_without_a_key_are_not_kept(xp):
    """A counter of any class is right where nothing is counted; what is odd in other calls may be wrong."""
    good = replaced(bases(xp)["no update"].call, batches=7)
    with pytest.raises(AttributeError):
        good._key(None)
    assert isinstance(Made(good, moves_statistics=False).outcome(), Checked)
    assert not _call._cache


def test_so_many_calls_and_no_more(xp, monkeypatch):
    monkeypatch.setattr(_call, "MOST_CACHED", 4)
    sizes = []
    for shape in list(itertools.product((2, 3, 4), (1, 2, 5), (2, 3))) * 2:
        x = xp.zeros(shape, np.float32)
        call = Call(x, Affine(None, None, 1.0), Running(), Epilogue(), True, 1)
        assert call.checked() is call.checked()
        assert call.checked().layout == Layout.of(x, 1)
        sizes.append(len(_call._cache))
    assert max(sizes) == 4
    assert sizes.count(1) > 5  # the cache was emptied and filled again


def test_the_second_time_nothing_is_checked(xp, monkeypatch):
    expected = {base: made.outcome() for base, made in bases(xp).items()}
    monkeypatch.setattr(Call, "check", lambda *_: pytest.fail("checked again"))
    for base, made in bases(xp).items():
        again = made._replace(call=replaced(made.call, momentum=0.7))
        assert again.outcome() == expected[base]


def test_which_calls_have_tapes(xp):
    """CuPy's alone, of dense arrays with elements, whose batch is neither spread over ranks, which exchange messages,
    nor observed.
    """
    call, out, _ = bases(xp)["training"]
    assert (call.checked(out).tapes is not None) == (xp is cp)
    x, residual = call.input, call.epilogue.residual
    wide = xp.zeros((3, 4, 8), np.float32)[..., ::2]
    empty = x[:0].copy()
    others = [{"group": object()}, {"observer": object()}]
    others += [{"input": wide}, {"residual": wide}, {"input": empty, "residual": empty, "mask": None}]
    others += [{"mask": mask} for mask in (other_order(call.epilogue.mask), xp.ones(4, np.bool_))]
    assert [replaced(call, **other).checked().tapes for other in others] == [None] * len(others)
    assert (replaced(call, input=x.copy(), residual=residual.copy()).checked().tapes is not None) == (xp is cp)
