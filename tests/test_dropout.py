"""Dropout as users call it: what is dropped, where the output goes, and what the way back makes of it."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import Generator
from cupybn._steps import cupy_dropout, numpy_dropout
from cupybn.dropout import call as dropout_call
from cupybn.dropout.generator import defaults
from tests import philox
from tests.reference import DTYPES, bits, exactly, in_order, to_numpy

SEED = 0x123456789ABCDEF0
SHAPES = {"1d": (3, 5, 6), "2d": (3, 5, 4, 7), "3d": (2, 3, 4, 2, 3)}
FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
ORDERS = {2: [(0, 1), (1, 0)], 3: [*itertools.permutations(range(3))], 4: [*itertools.permutations(range(4))]}


def draw(xp, rng, shape, dtype=np.float32):
    return xp.asarray(rng.standard_normal(shape).astype(dtype))


def generator_of(device, calls=0):
    generator = Generator(SEED, device=device)
    generator.state[1:].fill(calls)
    return generator


def state_of(generator):
    return to_numpy(generator.state).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What is dropped


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_elements_are_those_of_the_formula(xp, device, rng, dtype):
    """Each call drops other ones; the output has the input's dtype, shape and memory order."""
    generator = generator_of(device, calls=2**32 - 1)
    for call, p in enumerate((0.5, 0.1, 0.75, 2**-33, 1 - 2**-53, 1e-300, np.float32(0.3), True * 0.25)):
        x = draw(xp, rng, (7, 9, 5), dtype)
        y = F.dropout(x, p, generator=generator)
        number = 2**32 - 1 + call
        assert bits(y) == bits(philox.expected(to_numpy(x), philox.places(x), float(p), number, SEED))
        assert type(y) is type(x)
        assert (y.dtype, y.shape, y.strides) == (x.dtype, x.shape, x.strides)
        assert state_of(generator) == [SEED, number + 1]


@pytest.mark.parametrize("ndim", ORDERS)
def test_elements_are_counted_in_the_order_of_memory(xp, device, rng, ndim):
    generator = generator_of(device)
    for call, order in enumerate(ORDERS[ndim]):
        x = in_order(draw(xp, rng, (3, 5, 4, 2)[:ndim]), order)
        y, vjp_fn = F.dropout_vjp(x, 0.4, generator=generator)
        assert bits(y) == bits(philox.expected(to_numpy(x), philox.places(x), 0.4, call, SEED))
        dy = draw(xp, rng, x.shape)  # which lies in another order
        dx = vjp_fn(dy).input
        assert bits(dx) == bits(philox.expected(to_numpy(dy), philox.places(x), 0.4, call, SEED))
        assert y.strides == dx.strides == x.strides


def test_no_axes(xp, device):
    generator = generator_of(device)
    found = [float(F.dropout(xp.full((), 3.0), 0.5, generator=generator)) for _ in range(20)]
    assert found == [0.0 if philox.word(0, call, SEED) < 2**31 else 6.0 for call in range(20)]


VIEWS = {
    "every second": lambda x: x[:, ::2],
    "backwards": lambda x: x[::-1, ::-1],
    "broadcast": lambda x: x[:1, :1],
    "transposed and strided": lambda x: x[::2].T,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_inputs_that_are_not_dense_are_counted_as_a_dense_copy(xp, device, rng, view):
    x = view(draw(xp, rng, (6, 8)))
    if x.size == 1:
        x = xp.broadcast_to(x, (6, 8))
    before = bits(x)
    y, vjp_fn = F.dropout_vjp(x, 0.4, generator=generator_of(device))
    assert bits(y) == bits(philox.expected(to_numpy(x), philox.places(x), 0.4, 0, SEED))
    assert bits(vjp_fn(x).input) == bits(y)
    assert bits(x) == before
    assert y.flags.c_contiguous or y.T.flags.c_contiguous


@pytest.mark.parametrize("name", SHAPES)
def test_channels_are_those_of_the_formula(xp, device, rng, name):
    """Memory order is any, and channels are on any axis but the first."""
    shape = SHAPES[name]
    function, with_vjp = getattr(F, f"dropout{name}"), getattr(F, f"dropout{name}_vjp")
    generator, calls = generator_of(device), itertools.count()
    for order in [*itertools.permutations(range(len(shape)))][:: 1 if len(shape) < 5 else 7]:
        for axis in (1, -1, 2, -len(shape) + 1):
            x = in_order(draw(xp, rng, shape), order)
            numbers = philox.channel_numbers(shape, axis)
            y = function(x, 0.4, channel_axis=axis, generator=generator)
            assert bits(y) == bits(philox.expected(to_numpy(x), numbers, 0.4, next(calls), SEED))
            y, vjp_fn = with_vjp(x, 0.4, channel_axis=axis, generator=generator)
            call, dy = next(calls), draw(xp, rng, shape)
            assert bits(y) == bits(philox.expected(to_numpy(x), numbers, 0.4, call, SEED))
            dx = vjp_fn(dy).input
            assert bits(dx) == bits(philox.expected(to_numpy(dy), numbers, 0.4, call, SEED))
            assert y.strides == dx.strides == x.strides


@pytest.mark.parametrize(("name", "shape"), [("dropout1d", (5, 6)), ("dropout3d", (5, 2, 3, 4))])
def test_a_single_sample_is_a_batch_of_one(xp, device, rng, name, shape):
    """A channel axis of a sample is that of the batch."""
    function = getattr(F, name)
    for order in itertools.permutations(range(len(shape))):
        x = in_order(draw(xp, rng, shape), order)
        for axis in [*range(1, len(shape) + 1), *range(-len(shape), 0)]:
            y = function(x, 0.5, channel_axis=axis, generator=generator_of(device))
            batch = function(x[None], 0.5, channel_axis=axis, generator=generator_of(device))
            assert bits(y) == bits(batch[0])
            numbers = philox.channel_numbers((1, *shape), axis)[0]
            assert bits(y) == bits(philox.expected(to_numpy(x), numbers, 0.5, 0, SEED))
            assert y.strides == x.strides


@pytest.mark.parametrize("shape", [(4, 1, 6), (1, 4, 6), (4, 5, 1), (1, 1, 6), (1, 1, 1)])
def test_axes_of_length_one(xp, device, rng, shape):
    for order in itertools.permutations(range(3)):
        x = in_order(draw(xp, rng, shape), order)
        for axis in 1, 2:
            y = F.dropout1d(x, 0.5, channel_axis=axis, generator=generator_of(device))
            numbers = philox.channel_numbers(shape, axis)
            assert bits(y) == bits(philox.expected(to_numpy(x), numbers, 0.5, 0, SEED))


def test_the_same_on_every_device_and_with_every_dtype(rng):
    """An array may begin elsewhere, as a part of another one."""
    cp = pytest.importorskip("cupy")
    x = rng.standard_normal(1001)
    found = set()
    for xp, device in (np, "cpu"), (cp, "cuda:0"):
        for dtype in DTYPES:
            for offset in 0, 1, 3:
                array = xp.asarray(np.concatenate([np.ones(offset), x]).astype(dtype))[offset:]
                y = F.dropout(array, 0.5, generator=generator_of(device))
                found.add(bits(to_numpy(y) != 0)[0])
    assert len(found) == 1


def test_rates(xp, device):
    """The share that is dropped is p: of 2^18 elements no more than 5 standard deviations off, exactly as many as the
    same words make by NumPy's own arithmetic on all of them at once.
    """
    n = 1 << 18
    words = np.stack(numpy_dropout._philox(np.arange(n // 4, dtype=np.uint64), 0, SEED), -1).reshape(-1)
    for p in (0.1, 0.5, 0.9):
        y = to_numpy(F.dropout(xp.ones(n, np.float32), p, generator=generator_of(device)))
        kept = np.count_nonzero(y)
        assert kept == np.count_nonzero(words >= round(p * 2**32))
        assert abs(kept - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
        assert set(np.unique(y)) == {0, np.float32(1 / (1 - p))}


def test_what_is_dropped_is_zero_whatever_it_was(xp, device):
    for value in (np.nan, np.inf, -np.inf, -3.0, -0.0):
        for p in (0.5, 1, 1 - 2**-53):
            for dtype in DTYPES:
                x = xp.asarray(np.full(64, value).astype(dtype))
                y, vjp_fn = F.dropout_vjp(x, p, generator=generator_of(device))
                gone = philox.dropped(np.arange(64), p, 0, SEED) if p < 1 else np.ones(64, bool)
                for array in to_numpy(y), to_numpy(vjp_fn(x).input):
                    assert gone.any()
                    assert not array.view(f"u{dtype.itemsize}")[gone].any()
                    np.testing.assert_array_equal(array[~gone].astype(np.float64), np.full((~gone).sum(), 2 * value))


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing is drawn


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", [{"training": False}, {"p": 0}, {"p": 0.0}, {"training": np.False_}], ids=str)
def test_what_is_kept_as_it_is_is_the_input_itself(xp, device, rng, name, options):
    x = draw(xp, rng, (2, 3, 4) if name == "dropout1d" else (2, 3, 4, 5))
    generator, out, before = generator_of(device), xp.empty_like(x), bits(x)
    assert getattr(F, name)(x, generator=generator, **options) is x
    assert getattr(F, name)(x, generator=generator, inplace=True, **options) is x
    assert getattr(F, name)(x, generator=generator, out=x, **options) is x
    assert getattr(F, name)(x, generator=generator, out=out, **options) is out
    y, vjp_fn = getattr(F, f"{name}_vjp")(x, generator=generator, **options)
    assert y is x
    dy = in_order(draw(xp, rng, x.shape), range(x.ndim)[::-1])
    assert bits(vjp_fn(dy).input) == bits(dy)
    assert vjp_fn(dy).input.strides == x.strides
    assert bits(x, out) == before * 2
    assert state_of(generator) == [SEED, 0]


def test_all_is_dropped_with_p_one(xp, device, rng):
    generator, x = generator_of(device), in_order(draw(xp, rng, (3, 4, 5)), (2, 0, 1))
    y, vjp_fn = F.dropout_vjp(x, 1, generator=generator)
    for array in y, vjp_fn(x).input, F.dropout1d(x, 1.0, generator=generator):
        assert not to_numpy(array).view(np.uint32).any()
        assert (array.strides, array.dtype) == (x.strides, x.dtype)
    out = xp.ones((3, 4, 10), np.float32)[..., ::2]
    assert F.dropout(x, 1, generator=generator, out=out) is out
    assert not to_numpy(out).any()
    assert F.dropout(x, 1, inplace=True, generator=generator) is x
    assert not to_numpy(x).any()
    assert state_of(generator) == [SEED, 0]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs(xp, device, shape):
    generator, x = generator_of(device), xp.empty(shape, np.float32)
    for name in "dropout", "dropout1d":
        y, vjp_fn = getattr(F, f"{name}_vjp")(x, 0.5, generator=generator)
        assert (y.shape, vjp_fn(y).input.shape) == (shape, shape)
        out = xp.empty(shape, np.float32)
        assert getattr(F, name)(x, 0.5, generator=generator, out=out) is out
        with pytest.raises(ValueError, match="between 0 and 1"):
            getattr(F, name)(x, 2, generator=generator)
    with pytest.raises(ValueError, match="expected 4D input"):
        F.dropout2d(x)
    assert state_of(generator) == [SEED, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Where the output goes

OUTS = {
    "as the input": lambda xp, x: xp.empty_like(x),
    "another order": lambda xp, x: xp.empty(x.shape[::-1], x.dtype).transpose(*range(x.ndim)[::-1]),
    "strided": lambda xp, x: xp.empty((*x.shape[:-1], 3 * x.shape[-1]), x.dtype)[..., ::3],
    "backwards": lambda xp, x: xp.empty_like(x)[::-1],
    "the input": lambda _, x: x,
}


@pytest.mark.parametrize("name", ["dropout", "dropout1d"])
@pytest.mark.parametrize("make", OUTS.values(), ids=OUTS)
def test_out(xp, device, rng, name, make):
    """Three calls with arrays of the same forms: the first takes its steps, later ones may be played."""
    generator = generator_of(device)
    for call in range(3):
        x = draw(xp, rng, (3, 5, 8), ml_dtypes.bfloat16 if call == 2 else np.float32)
        numbers = philox.places(x) if name == "dropout" else philox.channel_numbers(x.shape, 1)
        expected = philox.expected(to_numpy(x), numbers, 0.4, call, SEED)
        out = make(xp, x)
        assert getattr(F, name)(x, 0.4, generator=generator, out=out) is out
        assert bits(out) == bits(expected)


@pytest.mark.parametrize("name", ["dropout", "dropout1d"])
def test_inplace(xp, device, rng, name):
    generator = generator_of(device)
    for call, view in enumerate((lambda x: x, lambda x: x, lambda x: x[:, ::2], lambda x: x.T, lambda x: x[::-1])):
        x = view(draw(xp, rng, (4, 6, 8)))
        numbers = philox.places(x) if name == "dropout" else philox.channel_numbers(x.shape, 1)
        expected = philox.expected(to_numpy(x), numbers, 0.4, call, SEED)
        y, vjp_fn = getattr(F, f"{name}_vjp")(x, 0.4, inplace=True, generator=generator)
        assert y is x
        assert bits(x) == bits(expected)
        dy = draw(xp, rng, x.shape)
        assert bits(vjp_fn(dy).input) == bits(philox.expected(to_numpy(dy), numbers, 0.4, call, SEED))


class Derived(np.ndarray):
    """An array that computes by rules of its own."""

    def __array_ufunc__(self, *_, **__):
        raise AssertionError("arithmetic of a derived class")


def test_derived_arrays(rng):
    """Results are NumPy's own arrays, but for what was given to be returned."""
    x = rng.standard_normal((3, 4)).astype(np.float32)
    expected = F.dropout(x, 0.5, generator=generator_of("cpu"))
    derived = x.view(Derived)
    y, vjp_fn = F.dropout_vjp(derived, 0.5, generator=generator_of("cpu"))
    assert type(y) is type(vjp_fn(derived).input) is np.ndarray
    assert bits(y, vjp_fn(derived).input) == bits(expected) * 2
    assert F.dropout(derived, 0.5, training=False) is derived
    out = np.empty_like(x).view(Derived)
    assert F.dropout(derived, 0.5, generator=generator_of("cpu"), out=out) is out
    assert out.tobytes() == expected.tobytes()
    assert F.dropout(derived, 0.5, inplace=True, generator=generator_of("cpu")) is derived
    assert derived.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_the_order_of_bytes_changes_nothing(rng, dtype):
    x = rng.standard_normal((5, 7)).astype(dtype)
    y, vjp_fn = F.dropout_vjp(x, 0.5, generator=generator_of("cpu"))
    assert y.dtype == vjp_fn(x).input.dtype == x.dtype
    native = x.astype(x.dtype.newbyteorder("="))
    wanted = philox.expected(native, philox.places(x), 0.5, 0, SEED)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(vjp_fn(x).input, wanted)


@pytest.mark.skipif(not hasattr(pytest.importorskip("cupy"), "emulator"), reason="there may be a single GPU")
def test_the_device_of_the_input_need_not_be_the_current_one(rng):
    """Launches, results and new generators are on the input's device."""
    import cupy as cp

    with cp.emulator.pretend(cp.emulator.H200, cp.emulator.T4):
        cupybn.manual_seed(SEED)
        host = draw(np, rng, (3, 5, 40))
        for current, other in (0, 1), (1, 0):
            with cp.cuda.Device(other):
                x = cp.asarray(host)
            with cp.cuda.Device(current):
                explicit = Generator(SEED, device=f"cuda:{other}")
                assert repr(explicit) == f"Generator(device='cuda:{other}')"
                assert state_of(explicit.manual_seed(SEED)) == [SEED, 0]
                for function, generator in itertools.product((F.dropout_vjp, F.dropout1d_vjp), (explicit, None)):
                    with cp.emulator.record() as launches:
                        y, vjp_fn = function(x, 0.5, generator=generator)
                        dx = vjp_fn(x).input
                    assert {launch.device for launch in launches} == {other}
                    assert y.device.id == dx.device.id == other
                    assert bits(y) == bits(dx)
                assert state_of(explicit) == [SEED, 2]
                layer = cupybn.Dropout(0.5, seed=SEED, device=f"cuda:{other}")
                wanted = philox.expected(host, philox.places(x), 0.5, 0, SEED)
                assert bits(layer(x)) == bits(wanted)
                for moved in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
                    assert moved.generator.state.device.id == other
    defaults._generators.clear()


# ---------------------------------------------------------------------------------------------------------------------
# The way back


@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
def test_the_way_back_is_pure(xp, device, rng, name):
    """Whatever has become of generator and input, and however often it is called."""
    generator = generator_of(device)
    x, dy = draw(xp, rng, (2, 3, 4, 5)), draw(xp, rng, (2, 3, 4, 5))
    vjp_fn = getattr(F, f"{name}_vjp")(x, 0.5, generator=generator)[1]
    numbers = philox.places(x) if name == "dropout" else philox.channel_numbers(x.shape, 1)
    wanted = bits(philox.expected(to_numpy(dy), numbers, 0.5, 0, SEED))
    before = bits(dy)
    for _ in range(3):
        getattr(F, name)(x, 0.5, generator=generator)
        assert bits(vjp_fn(dy).input) == wanted
    state = state_of(generator)
    assert state == [SEED, 4]
    generator.manual_seed(1)
    x.fill(np.nan)
    for function in vjp_fn, copy.copy(vjp_fn), copy.deepcopy(vjp_fn):
        assert bits(function(dy).input) == wanted
    assert bits(dy) == before
    assert state_of(generator) == [1, 0]
    assert isinstance(vjp_fn(dy), cupybn.DropoutGrads)


def test_the_way_back_keeps_no_array(xp, device, rng):
    """Neither the input nor the output: what is kept are two numbers."""
    import gc
    import weakref

    x = draw(xp, rng, (4, 6))
    y, vjp_fn = F.dropout_vjp(x, 0.5, generator=generator_of(device))
    gone = [weakref.ref(x), weakref.ref(y)] if device == "cpu" else []
    del x, y
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert vjp_fn(xp.ones((4, 6), np.float32)).input.shape == (4, 6)
    assert vjp_fn(xp.ones((6, 4), np.float32).T).input.shape == (4, 6)


@pytest.mark.parametrize("options", [{}, {"training": False}, {"p": 1}], ids=str)
def test_gradients_are_checked(xp, device, rng, options):
    x = draw(xp, rng, (4, 6))
    _, vjp_fn = F.dropout_vjp(x, generator=generator_of(device), **options)
    with pytest.raises(ValueError, match=exactly("expected grad_output of the input's shape (4, 6) (got (4, 5))")):
        vjp_fn(x[:, :5])
    with pytest.raises(TypeError, match="expected grad_output of the input's dtype float32"):
        vjp_fn(x.astype(np.float64))
    with pytest.raises(TypeError, match="expected grad_output to be a NumPy or CuPy array"):
        vjp_fn(1.0)
    if device == "cpu":
        cp = pytest.importorskip("cupy")
        with pytest.raises(TypeError, match="expected grad_output to be a NumPy array like input"):
            vjp_fn(cp.ones((4, 6), np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors(xp, device, rng):
    """What each wrong argument raises; arrays and generator are as they were."""
    x, generator = draw(xp, rng, (2, 3, 4)), generator_of(device)
    x4 = draw(xp, rng, (2, 3, 4, 5))
    before = bits(x, x4)
    p_error = "dropout probability has to be between 0 and 1, but got "
    wrong = [
        (F.dropout, (x, 1.1), {}, ValueError, p_error + "1.1"),
        (F.dropout, (x, -0.5), {"training": False}, ValueError, p_error + "-0.5"),
        (F.dropout1d, (x, float("nan")), {}, ValueError, p_error + "nan"),
        (F.dropout, (x, None), {}, TypeError, "expected p to be a float (got None)"),
        (F.dropout, (x, "0.5"), {}, TypeError, "expected p to be a float (got '0.5')"),
        (F.dropout, (x, 0.5, None), {}, TypeError, "expected training to be a bool (got None)"),
        (F.dropout, (x, 0.5, True, 1), {}, TypeError, "expected inplace to be a bool (got 1)"),
        (F.dropout1d, (x4,), {}, ValueError, "expected 2D or 3D input (got 4D input)"),
        (F.dropout1d, (x[0, 0],), {"training": False}, ValueError, "expected 2D or 3D input (got 1D input)"),
        (F.dropout2d, (x,), {"p": 0}, ValueError, "expected 4D input (got 3D input)"),
        (F.dropout3d, (x,), {}, ValueError, "expected 4D or 5D input (got 3D input)"),
        (F.dropout2d, (x4,), {"channel_axis": 4}, ValueError, "expected channel_axis in [-4, 4) for 4D input (got 4)"),
        (
            *(F.dropout2d, (x4,), {"channel_axis": 0}, ValueError),
            "expected channel_axis to be another axis than that of the batch, 0 (got 0)",
        ),
        (
            *(F.dropout3d, (x4,), {"channel_axis": -5}, ValueError),
            "expected channel_axis to be another axis than that of the batch, 0 (got -5)",
        ),
        (
            F.dropout2d,
            (x4,),
            {"channel_axis": 1.0},
            TypeError,
            "expected channel_axis to be an int (got 1.0): use int(channel_axis)",
        ),
        (
            *(F.dropout, (x,), {"inplace": True, "out": xp.empty_like(x)}, ValueError),
            "expected out=None with inplace=True, which writes to input (got both): use one of them",
        ),
        (
            *(F.dropout, (xp.broadcast_to(x, (5, 2, 3, 4)),), {"inplace": True, "training": False}, ValueError),
            None,
        ),
        (F.dropout, (x,), {"out": xp.empty((2, 3), np.float32)}, ValueError, None),
        (F.dropout, (x,), {"out": xp.empty((2, 3, 4), np.float64)}, TypeError, None),
        (F.dropout, (x.tolist(),), {}, TypeError, None),
        (F.dropout, (x.astype(np.int64),), {"training": False}, TypeError, None),
        (F.dropout, (x.astype(np.complex64),), {"p": 0}, TypeError, None),
        (
            *(F.dropout, (x,), {"generator": 7, "training": False}, TypeError),
            "expected generator to be a cupybn.Generator or None (got 7); did you mean cupybn.Generator(7)?",
        ),
        (F.dropout, (x,), {"generator": np.random.default_rng(0)}, TypeError, None),
    ]
    for function, args, options, error, message in wrong:
        with pytest.raises(error, match=None if message is None else exactly(message)):
            function(*args, **{"generator": generator} | options)
        if "out" not in options:
            vjp = getattr(F, f"{function.__name__}_vjp")
            with pytest.raises(error, match=None if message is None else exactly(message)):
                vjp(*args, **{"generator": generator} | options)
    assert bits(x, x4) == before
    assert state_of(generator) == [SEED, 0]


def test_calls_that_are_alike_are_told_apart(xp, device, rng):
    """What has been checked of one call says nothing about another one, though 1, 1.0 and True are equal."""
    x, generator = draw(xp, rng, (2, 3, 4)), generator_of(device)
    F.dropout1d(x, 1, True, False, channel_axis=1, generator=generator, out=xp.empty_like(x))
    F.dropout1d(x, 1, True, False, channel_axis=1, generator=generator)
    F.dropout1d(xp.copy(x), 1, True, True, channel_axis=1, generator=generator)
    for wrong in {"training": 1}, {"inplace": 0}, {"inplace": 1}, {"channel_axis": 1.0}, {"channel_axis": True}:
        with pytest.raises(TypeError):
            F.dropout1d(x, **{"p": 1, "training": True, "inplace": False, "generator": generator} | wrong)
    repeated = xp.broadcast_to(x[:1], (2, 3, 4))
    F.dropout1d(repeated, 1)
    with pytest.raises(ValueError, match=r"expected input to (have memory for each element|be writeable)"):
        F.dropout1d(repeated, 1, inplace=True)
    assert F.dropout1d(x, 0, generator=generator) is x
    assert F.dropout1d(x, True, generator=generator) is not x
    assert state_of(generator) == [SEED, 0]


def test_what_is_read_only_is_not_written(rng):
    x = draw(np, rng, (2, 3))
    x.flags.writeable = False
    generator = generator_of("cpu")
    for training in True, False:
        with pytest.raises(ValueError, match="expected input to be writeable"):
            F.dropout(x, 0.5, training, inplace=True, generator=generator)
        with pytest.raises(ValueError, match="expected out to be writeable"):
            F.dropout(x.copy(), 0.5, training, generator=generator, out=x)
    assert F.dropout(x, 0.5, generator=generator).shape == (2, 3)
    assert state_of(generator) == [SEED, 1]


def test_generators_are_on_the_device_of_the_input(rng):
    cp = pytest.importorskip("cupy")
    x = draw(np, rng, (2, 3))
    host, device = generator_of("cpu"), generator_of("cuda:0")
    for training in True, False:
        message = 'expected generator on cpu, as input is (got one on cuda:0): use generator.to("cpu")'
        with pytest.raises(TypeError, match=exactly(message)):
            F.dropout(x, 0.5, training, generator=device)
        with pytest.raises(TypeError, match="expected generator on cuda:0, as input is"):
            F.dropout(cp.asarray(x), 0.5, training, generator=host)
        layer = cupybn.Dropout(seed=7, device="cuda:0").train(training)
        with pytest.raises(TypeError, match=r"as the layer is on cuda:0 .* or layer\.to"):
            layer(x)
    assert state_of(host) == state_of(device) == [SEED, 0]


@pytest.mark.parametrize("out", [False, True])
def test_a_step_that_fails_leaves_the_generator_as_it_was(xp, device, rng, out, monkeypatch):
    generator, x = generator_of(device), draw(xp, rng, (4, 6))
    target = xp.ones((6, 4), np.float32).T if out else None

    def fails(*_):
        raise MemoryError("out of memory")

    ops = numpy_dropout if device == "cpu" else cupy_dropout
    with monkeypatch.context() as patch:
        if out:
            patch.setattr("cupybn.dropout.functions.write_at_once", fails)
        else:
            patch.setattr(ops, "dropout", fails)
        for _ in range(2):
            with pytest.raises(MemoryError):
                F.dropout(x, 0.5, generator=generator, out=target)
    assert state_of(generator) == [SEED, 0]
    assert bits(F.dropout(x, 0.5, generator=generator)) == bits(F.dropout(x, 0.5, generator=generator_of(device)))


def test_an_interrupt_leaves_the_generator_as_it_was(rng):
    """Lines are all but a few: where the state has just moved, and where all is done."""
    from tests.test_interrupts import interrupted

    x, moved, at = draw(np, rng, (4, 6)), 0, 1
    while True:
        generator = generator_of("cpu")
        if not interrupted(lambda generator=generator: F.dropout(x, 0.5, generator=generator), at):
            break
        moved += state_of(generator) != [SEED, 0]
        at += 1
    assert at > 40
    assert moved <= 5


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def test_later_calls_are_played(rng, plays):
    """Whatever the addresses, and with the same bits; calls with another p have a tape of their own."""
    cp = pytest.importorskip("cupy")
    for name, order in ("dropout", (0, 1, 2, 3)), ("dropout", (0, 2, 3, 1)), ("dropout2d", (0, 2, 3, 1)):
        generator, calls = generator_of("cuda:0"), itertools.count()
        plays.clear()
        for p in 0.5, 0.3, 0.5, 0.3:
            x, dy = (in_order(draw(cp, rng, (2, 3, 4, 5)), order) for _ in "ab")
            numbers = philox.places(x) if name == "dropout" else philox.channel_numbers(x.shape, 1)
            y, vjp_fn = getattr(F, f"{name}_vjp")(x, p, generator=generator)
            call = next(calls)
            assert bits(y) == bits(philox.expected(to_numpy(x), numbers, p, call, SEED))
            assert bits(vjp_fn(dy).input) == bits(philox.expected(to_numpy(dy), numbers, p, call, SEED))
            assert y.strides == x.strides
        assert len(plays) == 4
        kernels = [[launch.kernel.name for launch in tape.launches] for tape in plays]
        assert kernels == [["dropout_draw", name.replace("2d", "_channels")], [name.replace("2d", "_channels")]] * 2
        for inplace in False, True, True:
            x = draw(cp, rng, (2, 3, 4, 5))
            wanted = philox.expected(to_numpy(x), philox.places(x), 0.5, next(calls), SEED)
            y = F.dropout(x, 0.5, inplace=inplace, generator=generator)
            assert bits(y) == bits(wanted)
            assert (y is x) == inplace
        offset = draw(cp, rng, 121)[1:].reshape(2, 3, 4, 5)  # other packs
        wanted = philox.expected(to_numpy(offset), philox.places(offset), 0.5, next(calls), SEED)
        assert bits(F.dropout(offset, 0.5, generator=generator)) == bits(wanted)
        for behind in 0, 0, 1, 2, 0:  # elements of `out` and of the gradient behind an aligned address
            x = draw(cp, rng, (2, 3, 4, 5))
            out, dy = (draw(cp, rng, 120 + behind)[behind:].reshape(2, 3, 4, 5) for _ in "ab")
            wanted = philox.expected(to_numpy(x), philox.places(x), 0.5, next(calls), SEED)
            assert bits(F.dropout(x, 0.5, generator=generator, out=out)) == bits(wanted)
            vjp_fn, call = F.dropout_vjp(x, 0.5, generator=generator)[1], next(calls)
            assert bits(vjp_fn(dy).input) == bits(philox.expected(to_numpy(dy), philox.places(x), 0.5, call, SEED))


@pytest.mark.parametrize("inside", ["recorded", "played"])
@pytest.mark.parametrize("own", [True, False], ids=["a generator", "none"])
def test_each_launch_of_a_graph_draws_anew(rng, inside, own):
    """Each has its own way back, whatever is drawn in between."""
    cp = pytest.importorskip("cupy")
    generator = generator_of("cuda:0") if own else None
    cupybn.manual_seed(SEED)
    x, dy = (draw(cp, rng, (3, 40, 11)) for _ in "ab")
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()

    def step():
        y, vjp_fn = F.dropout_vjp(x, 0.5, generator=generator)
        z, back = F.dropout1d_vjp(y, 0.25, generator=generator)
        return y, z, vjp_fn(back(dy).input).input

    with stream, cp.cuda.using_allocator(pool.malloc):
        step()  # compiles, draws twice
        if inside == "recorded":
            dropout_call._cache.clear()
        stream.begin_capture()
        results = step()
        graph = stream.end_capture()
        stream.synchronize()
    host, dy_host, calls = to_numpy(x), to_numpy(dy), itertools.count(2)
    for launch in range(4):
        with stream:
            if launch == 2:
                F.dropout(x, 0.5, generator=generator)
                next(calls)
            graph.launch(stream)
        stream.synchronize()
        first, second = next(calls), next(calls)
        y = philox.expected(host, philox.places(x), 0.5, first, SEED)
        numbers = philox.channel_numbers(x.shape, 1)
        dz = philox.expected(dy_host, numbers, 0.25, second, SEED)
        dx = philox.expected(dz, philox.places(x), 0.5, first, SEED)
        assert bits(*results) == bits(y, philox.expected(y, numbers, 0.25, second, SEED), dx)


def test_threads_share_a_generator_without_drawing_twice():
    """Each call of each thread has a number of its own, on the host."""
    generator, x = generator_of("cpu"), np.ones(64, np.float32)
    found, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        found.extend([F.dropout(x, 0.5, generator=generator).tobytes() for _ in range(50)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state_of(generator) == [SEED, 200]
    wanted = {philox.expected(x, np.arange(64), 0.5, call, SEED).tobytes() for call in range(200)}
    assert len(wanted) == 200
    assert set(found) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Layers

LAYERS = {
    "Dropout": (cupybn.Dropout, F.dropout, (4, 6)),
    "Dropout1d": (cupybn.Dropout1d, F.dropout1d, (2, 3, 6)),
    "Dropout2d": (cupybn.Dropout2d, F.dropout2d, (2, 3, 2, 5)),
    "Dropout3d": (cupybn.Dropout3d, F.dropout3d, (2, 3, 2, 2, 5)),
}
each_layer = pytest.mark.parametrize(("make", "function", "shape"), LAYERS.values(), ids=LAYERS)


@each_layer
def test_layers_call_the_functions(xp, device, rng, make, function, shape):
    layer, generator = make(0.3, seed=SEED, device=device), generator_of(device)
    x, dy = draw(xp, rng, shape), draw(xp, rng, shape)
    vjp = getattr(F, f"{function.__name__}_vjp")
    assert bits(layer(x)) == bits(function(x, 0.3, generator=generator))
    assert bits(layer.forward(x)) == bits(function(x, 0.3, generator=generator))
    (y, vjp_fn), (wanted, wanted_back) = layer.vjp(x), vjp(x, 0.3, generator=generator)
    assert bits(y, vjp_fn(dy).input) == bits(wanted, wanted_back(dy).input)
    assert state_of(layer.generator) == [SEED, 3]
    assert layer.eval()(x) is x
    assert layer.vjp(x)[0] is x
    assert layer.train() is layer
    layer.p, layer.inplace = 0.9, True
    wanted = function(x, 0.9, generator=generator)
    assert layer(x) is x
    assert bits(x) == bits(wanted)
    if make is not cupybn.Dropout:
        layer.channel_axis = -1
        wanted = function(x, 0.9, generator=generator, channel_axis=-1)
        assert bits(layer(x)) == bits(wanted)


@each_layer
def test_state_of_layers(device, make, function, shape):  # noqa: ARG001
    layer = make(0.25, seed=7, device=device)
    assert (layer.p, layer.inplace, layer.seed, layer.device, layer.training) == (0.25, False, 7, device, True)
    assert layer.state_dict() == {}
    assert layer.state_dict("a.", device="cpu", names="keras") == {}
    members = [layer.parameters(), layer.named_parameters(), layer.buffers(), layer.named_buffers()]
    assert [*itertools.chain(*members)] == []
    assert layer.load_state_dict({}) == ([], [])
    assert layer.load_state_dict({"other.weight": 1}, prefix="drop.") == ([], [])
    with pytest.raises(KeyError, match="unexpected keys: weight"):
        layer.load_state_dict({"weight": np.ones(3)})
    assert layer.load_state_dict({"weight": np.ones(3)}, strict=False) == ([], ["weight"])
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert repr(other) == repr(layer)
        assert other.device == device
        assert other.generator is not layer.generator
        other.generator.state[1:].fill(5)
        assert state_of(layer.generator) == [7, 0]


def test_text_of_layers():
    texts = {
        "Dropout(p=0.5, inplace=False)": cupybn.Dropout(device="cpu"),
        "Dropout(p=0.1, inplace=True, seed=7)": cupybn.Dropout(0.1, True, seed=7, device="cpu"),
        "Dropout1d(p=0.5, inplace=False)": cupybn.Dropout1d(device="cpu"),
        "Dropout2d(p=0.5, inplace=False, channel_axis=-1)": cupybn.Dropout2d(channel_axis=-1, device="cpu"),
        "Dropout3d(p=1, inplace=False, seed=0, channel_axis=4)": cupybn.Dropout3d(
            1, seed=0, channel_axis=4, device="cpu"
        ),
    }
    for text, layer in texts.items():
        assert repr(layer) == text


def test_errors_of_layers():
    p_error = "dropout probability has to be between 0 and 1, but got 1.1"
    wrong = [
        (cupybn.Dropout, {"p": 1.1}, ValueError, p_error),
        (cupybn.Dropout2d, {"p": 1.1}, ValueError, p_error),
        (cupybn.Dropout, {"p": None}, TypeError, "expected p to be a float (got None)"),
        (cupybn.Dropout, {"inplace": 0}, TypeError, "expected inplace to be a bool (got 0)"),
        (cupybn.Dropout, {"seed": -1}, ValueError, "expected seed in [0, 2**64) (got -1)"),
        (cupybn.Dropout, {"seed": 1.0}, TypeError, "expected seed to be an int (got 1.0): use int(seed)"),
        (cupybn.Dropout1d, {"channel_axis": 3}, ValueError, "expected channel_axis in [-3, 3) for 3D input (got 3)"),
        (cupybn.Dropout2d, {"channel_axis": 0}, ValueError, None),
        (cupybn.Dropout3d, {"channel_axis": -5}, ValueError, None),
        (cupybn.Dropout3d, {"channel_axis": "1"}, TypeError, None),
        (cupybn.Dropout, {"device": "gpu"}, ValueError, None),
    ]
    for make, options, error, message in wrong:
        with pytest.raises(error, match=None if message is None else exactly(message)):
            make(**{"device": "cpu"} | options)
    layer, x = cupybn.Dropout(seed=7, device="cpu"), np.ones(4, np.float32)
    layer.p = 1.1
    for training in True, False:
        with pytest.raises(ValueError, match=exactly(p_error)):
            layer.train(training)(x)
    layer.p, layer.training = 0.5, "yes"
    with pytest.raises(TypeError, match="expected training to be a bool"):
        layer(x)
    layer.training, layer.generator = True, 3
    with pytest.raises(TypeError, match="expected generator to be a"):
        layer(x)


def test_layers_without_a_seed_take_arrays_of_any_device(rng):
    cp = pytest.importorskip("cupy")
    layer = cupybn.Dropout()
    assert layer.generator is None
    x = draw(np, rng, (4, 6))
    cupybn.manual_seed(SEED)
    for xp in np, cp:
        assert bits(layer(xp.asarray(x))) == bits(philox.expected(x, philox.places(x), 0.5, 0, SEED))


def test_layers_move_with_their_generators():
    pytest.importorskip("cupy")
    layer = cupybn.Dropout(seed=7, device="cpu")
    layer(np.ones(4, np.float32))
    state = layer.generator.state
    assert layer.to(dtype="float16") is layer
    assert layer.generator.state is state
    assert layer.cuda() is layer
    assert (layer.device, layer.generator.device) == ("cuda:0", "cuda:0")
    assert state_of(layer.generator) == [7, 1]
    assert layer.cpu().generator.device == "cpu"
    for device, error in ("gpu", ValueError), ("cuda:99", RuntimeError):
        with pytest.raises(error):
            layer.to(device)
    assert (layer.device, layer.generator.device) == ("cpu", "cpu")


def test_layers_may_share_a_generator(rng):
    shared = generator_of("cpu")
    layers = [cupybn.Dropout(0.5, device="cpu") for _ in range(2)]
    x = draw(np, rng, (4, 6))
    for call, layer in enumerate(layers):
        layer.generator = shared
        assert bits(layer(x)) == bits(philox.expected(x, philox.places(x), 0.5, call, SEED))
