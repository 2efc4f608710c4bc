"""Recalibration: running statistics become the moments of all that the layers see, as one array."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pickle
import sys
import threading
import warnings
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np
import pytest

import cupybn
from cupybn._steps import numpy_ops
from cupybn._steps.observer import Observed, Observer
from cupybn.layers.batchnorm import observers
from tests.reference import DTYPES, HALF_ULP, bits, exactly, to_numpy
from tests.test_derived_arrays import derived
from tests.test_interrupts import interrupted

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SIZES = (3, 2, 5, 2, 4)
"""Samples of the batches that most tests have."""


@pytest.fixture(autouse=True)
def no_observers():
    """Every test leaves all layers unobserved."""
    yield
    assert observers == {}


@pytest.fixture
def make(device):
    """A function that makes a layer whose arrays all differ from what they start from."""

    def make(channels=3, kind=cupybn.BatchNorm1d, **options):
        layer = kind(channels, **{"device": device} | options)
        for i, (name, array) in enumerate(layer.state_dict().items()):
            array[...] = 7 if name == "num_batches_tracked" else i + 2
        return layer

    return make


def samples(rng, shape, dtype=np.float32, mean=3.0):
    """Batches of SIZES samples, on the host; channels on axis 1 have means of their own."""
    offsets = mean * np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    return [(rng.normal(size=(n, *shape)) + offsets).astype(dtype) for n in SIZES]


def exact(arrays, axis=1):
    """Mean and unbiased variance of all values of a channel in these arrays together."""
    wide = [np.moveaxis(np.asarray(array).astype(np.longdouble), axis, 0) for array in arrays]
    values = np.concatenate([array.reshape(len(array), -1) for array in wide], axis=1)
    with np.errstate(invalid="ignore"):
        return values.mean(axis=1), values.var(axis=1, ddof=1)


def check_statistics(layer, arrays, axis=1, batches=5):
    """Check running statistics against all values in these arrays, and the counter against a number of batches."""
    mean, var = exact(arrays, axis)
    half = HALF_ULP[layer.running_mean.dtype.name]
    np.testing.assert_array_less(
        abs(to_numpy(layer.running_mean).astype(np.longdouble) - mean),
        1e-7 * np.sqrt(var) + (2**-52 + half) * abs(mean) + 1e-300,
    )
    np.testing.assert_array_less(
        abs(to_numpy(layer.running_var).astype(np.longdouble) - var), (1e-6 + half) * var + 1e-300
    )
    assert to_numpy(layer.num_batches_tracked) == batches


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
def test_all_batches_are_one_array(xp, rng, make, dtype, vectors):
    batches = samples(rng, (3, 4), dtype)
    layer = make(dtype=vectors)
    cupybn.update_bn([layer], map(xp.asarray, batches), layer)
    check_statistics(layer, batches)


@pytest.mark.parametrize("vectors", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [1e6, -1e6])
def test_large_means(xp, rng, make, vectors, mean):
    """A variance is right to 1e-6 though the means are a million standard deviations, and those of batches differ."""
    batches = samples(rng, (3, 20), mean=mean)
    batches[2] += 1
    layer = make(dtype=vectors)
    cupybn.update_bn([layer], map(xp.asarray, batches), layer)
    check_statistics(layer, batches)


def test_many_batches(rng):
    """Errors do not grow with the number of batches, nor does it matter how these are cut."""
    x = rng.normal(1e6, 1, (1200, 2)).astype(np.float32)
    for cut in (2, 3, 1000):
        layer = cupybn.BatchNorm1d(2, device="cpu", dtype=np.float64)
        cuts = [x[i : i + cut] for i in range(0, len(x), cut)]
        cupybn.update_bn([layer], cuts, layer)
        mean, var = exact([x])
        assert np.all(abs(layer.running_mean - mean) <= 2.0**-51 * mean)
        np.testing.assert_allclose(layer.running_var, var.astype(float), rtol=1e-10)
        assert layer.num_batches_tracked == len(cuts)


def test_what_is_kept_has_one_size():
    """What an observer keeps does not grow with the number of batches."""
    observer, row = Observer(), np.array([[2.0, 1.0, 3.0]])
    sizes = set()
    for _ in range(19):
        observer.add(numpy_ops, row)
        sizes.add(len(pickle.dumps(observer._total)))
    assert len(sizes) == 1
    for count in 0, 1, np.nan:  # calls of no or one value, and those of ranks that failed
        observer.add(numpy_ops, np.array([[count, 5.0, 0.0]]))
    assert observer.batches == 19
    assert [array.item() for array in observer.moments()[:3]] == [38, 1, 57]


@pytest.mark.parametrize(
    ("kind", "shape", "axis", "order"),
    [
        (cupybn.BatchNorm1d, (3,), 1, "C"),
        (cupybn.BatchNorm1d, (3, 5), 1, "F"),
        (cupybn.BatchNorm2d, (3, 2, 4), 1, "C"),
        (cupybn.BatchNorm2d, (2, 4, 3), -1, "C"),
        (cupybn.BatchNorm2d, (2, 4, 3), -1, "F"),
        (cupybn.BatchNorm3d, (2, 3, 2, 2), 2, "C"),
    ],
)
def test_layouts(xp, rng, make, kind, shape, axis, order):
    others = np.delete(shape, axis % (len(shape) + 1) - 1)
    batches = [np.moveaxis(x, 1, axis) for x in samples(rng, (3, *others))]
    assert batches[0].shape[1:] == shape
    layer = make(kind=kind, channel_axis=axis)
    cupybn.update_bn([layer], [xp.asarray(x, order=order) for x in batches], layer)
    check_statistics(layer, batches, axis)
    strided = make(kind=kind, channel_axis=axis)
    cupybn.update_bn([strided], [xp.asarray(np.repeat(x, 2, axis=0))[::2] for x in batches], strided)
    check_statistics(strided, batches, axis)


def test_constant_channels(xp, make):
    layer = make(1)
    cupybn.update_bn([layer], [xp.full((n, 1), 1e8, np.float32) for n in SIZES], layer)
    assert (layer.running_mean, layer.running_var) == (1e8, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(xp, rng, make, bad):
    """A channel that had NaN before has it no longer."""
    batches = samples(rng, (3,))
    batches[1][0, 1] = bad
    layer = make()
    layer.running_mean[...], layer.running_var[...] = bad, bad
    cupybn.update_bn([layer], map(xp.asarray, batches), layer)
    mean, var = (to_numpy(array) for array in (layer.running_mean, layer.running_var))
    assert not np.isfinite([mean[1], var[1]]).any()
    np.testing.assert_allclose([mean[::2], var[::2]], [v[::2].astype(float) for v in exact(batches)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_statistics_beyond_their_dtype_are_infinite(xp, rng, make, dtype):
    layer = make(2, dtype=dtype)
    scale = 1e4 if dtype == np.float16 else 1e20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cupybn.update_bn([layer], [xp.asarray((rng.normal(size=(4, 2)) * scale).astype(np.float32))], layer)
    assert np.isinf(to_numpy(layer.running_var).astype(np.float32)).all()
    assert np.isfinite(to_numpy(layer.running_mean).astype(np.float32)).all()


def test_arrays_stay_the_same_ones(xp, rng, make):
    """Buffers are written in place, wherever they lie, and nothing else changes."""
    layer, batches = make(), samples(rng, (3,))
    memory = xp.zeros(6, np.float64)
    layer.running_var = memory[::-2]
    layer.running_mean = derived(xp, layer.running_mean, ("view",))
    before, affine = layer.state_dict(), bits(layer.weight, layer.bias)
    with np.errstate(all="raise"):
        cupybn.update_bn([layer], map(xp.asarray, batches), layer)
    assert all(now is then for now, then in zip(layer.state_dict().values(), before.values(), strict=True))
    assert bits(layer.weight, layer.bias) == affine
    check_statistics(layer, batches)
    assert not to_numpy(memory)[::2].any()
    cupybn.update_bn([layer], [xp.asarray(batches[0])], layer)
    check_statistics(layer, batches[:1], batches=1)


def test_as_torch_does(rng):
    """Means are those of torch where batches have one size. Its variance is a mean of the batches' variances."""
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm1d(3), cupybn.BatchNorm1d(3, device="cpu")
    batches = [(rng.normal(size=(8, 3)) + i).astype(np.float32) for i in range(4)]
    torch.optim.swa_utils.update_bn(map(torch.from_numpy, batches), theirs)
    cupybn.update_bn([ours], batches, ours)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol=1e-6)
    within = np.mean([x.var(axis=0, ddof=1) for x in batches], axis=0)
    np.testing.assert_allclose(theirs.running_var.numpy(), within, rtol=1e-6)
    assert (ours.running_var > within + 0.5).all()
    check_statistics(ours, batches, batches=4)
    assert ours.num_batches_tracked == int(theirs.num_batches_tracked) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Which calls count


def test_every_call_of_a_layer_counts(xp, rng, make):
    """A layer that a model calls twice has seen both inputs, and layers that it does not list are as in training."""
    first, second, other = make(), make(activation="relu"), make()
    plain = make()
    batches = samples(rng, (3, 2))
    inputs = []

    def model(x):
        h = first(x, x)
        inputs.append(to_numpy(h))
        y, vjp_fn = second.vjp(h, x)
        first(y)
        inputs.append(to_numpy(y))
        vjp_fn(y)
        other(x)
        return None

    cupybn.update_bn(iter([first, second, first]), [xp.asarray(x) for x in batches], model)
    for x in batches:
        plain(xp.asarray(x))
    check_statistics(first, batches + inputs[1::2], batches=2 * len(SIZES))
    check_statistics(second, inputs[::2])
    assert bits(*other.state_dict().values()) == bits(*plain.state_dict().values())


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_results_are_those_of_training(xp, rng, make, channel_axis, activation, has_residual):
    """Outputs and gradients are those of a call that moves the running statistics."""
    options = {"kind": cupybn.BatchNorm2d, "channel_axis": channel_axis, "activation": activation}
    layer, plain = make(**options), make(**options)
    shape = (4, 3, 5, 2) if channel_axis == 1 else (4, 5, 2, 3)
    x, residual, dy = (xp.asarray(rng.normal(size=shape).astype(np.float32)) for _ in range(3))
    residual = residual if has_residual else None
    found = []

    def forward(x):
        found.append(layer(x, residual))
        y, vjp_fn = layer.vjp(x, residual)
        found.extend([y, *vjp_fn(dy)])

    cupybn.update_bn([layer], [x], forward)
    y, vjp_fn = plain.vjp(x, residual)
    for ours, theirs in zip(found, [y, y, *vjp_fn(dy)], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=2e-5, atol=2e-5)


def test_what_does_not_count(xp, rng, make):
    """Eval mode, `no_stats_update` and empty inputs: outputs are the usual ones, and nothing is seen of them."""
    layer, unseen, evaluated = make(), make(), make()
    batches = samples(rng, (3, 2))
    before = bits(*unseen.state_dict().values())
    expected = make().eval()(xp.asarray(batches[0]))

    def model(x):
        layer(x)
        layer(x[:0])
        with cupybn.no_stats_update():
            layer(10 * x)
        layer.eval()
        evaluated.eval()
        outputs.extend([layer(x), evaluated(x)])
        unseen(x[:0])
        layer.train()

    outputs = []
    cupybn.update_bn([layer, unseen, evaluated], map(xp.asarray, batches), model)
    check_statistics(layer, batches)
    assert bits(*unseen.state_dict().values()) == bits(*evaluated.state_dict().values()) == before
    assert bits(*outputs[:2]) == bits(expected, expected)
    assert layer.training
    assert evaluated.training


def test_a_layer_whose_calls_do_not_count_keeps_what_it_had(xp, make):
    """Only the device knows of a batch of several ranks that has one value for each channel, or none."""
    layer = make()
    before = bits(*layer.state_dict().values())
    ops = importlib.import_module(f"cupybn._steps.{'numpy' if xp is np else 'cupy'}_ops")

    def model(count):
        observers[id(layer)].add(ops, xp.array([[count, 5, 5, 5, 0, 0, 0]], np.float64))

    cupybn.update_bn([layer], [0, 1], model)
    assert bits(*layer.state_dict().values()) == before
    cupybn.update_bn([layer], [xp.zeros((0, 3), np.float32)], layer)  # a batch without samples is one
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("counter", [True, False])
def test_settings_do_not_matter_and_stay(xp, rng, make, momentum, training, track, counter):
    layer, batches = make(momentum=momentum, affine=False).train(training), samples(rng, (3,))
    layer.track_running_stats = track
    if not counter:
        layer.num_batches_tracked = None
    before = vars(layer).copy()
    cupybn.update_bn([layer], map(xp.asarray, batches), layer)
    assert vars(layer) == before
    if not counter:
        assert layer.num_batches_tracked is None
        layer.num_batches_tracked = len(SIZES)
    check_statistics(layer, batches)


def test_lazy_layers_settle(xp, rng, device):
    """A layer that takes its features from the first input has them afterwards; one that sees none stays lazy."""
    first, second, unseen = (cupybn.BatchNorm1d(None, device=device) for _ in range(3))
    batches = samples(rng, (3,))

    def model(x):
        first.vjp(x)
        second(first(x))

    cupybn.update_bn([first, second, unseen], map(xp.asarray, batches), model)
    check_statistics(first, [x for x in batches for _ in range(2)], batches=2 * len(SIZES))
    assert second.num_features == 3
    assert unseen.num_features is None
    assert unseen.running_mean is None


def test_copies_made_meanwhile_are_not_observed(xp, rng, make):
    layer, copies, batches = make(), [], [xp.asarray(x) for x in samples(rng, (3,))]

    def model(x):
        layer(x)
        copies.append(copy.deepcopy(layer))
        copies[-1](x)

    cupybn.update_bn([layer], batches, model)
    assert [int(each.num_batches_tracked) for each in copies] == [8] * len(SIZES)
    other = make()
    other(batches[0])
    assert bits(*copies[0].state_dict().values()) == bits(*other.state_dict().values())


def test_calls_that_raise_do_not_count(xp, rng, make, monkeypatch):
    """A model may catch an error and go on."""
    layer, batches, fails = make(), samples(rng, (3,)), False
    ops = importlib.import_module(f"cupybn._steps.{'numpy' if xp is np else 'cupy'}_ops")
    original = ops.bn_normalize

    def failing(*arguments):
        if fails:
            raise MemoryError
        return original(*arguments)

    def model(x):
        nonlocal fails
        fails = True
        with pytest.raises(MemoryError):
            layer(10 * x)
        fails = False
        with pytest.raises(ValueError, match="expected 3 channels"):
            layer(xp.zeros((4, 2), np.float32))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x[:1])
        layer(x)

    monkeypatch.setattr(ops, "bn_normalize", failing)
    cupybn.update_bn([layer], map(xp.asarray, batches), model)
    check_statistics(layer, batches)


def test_threads_may_call_a_layer_at_a_time(rng):
    layer = cupybn.BatchNorm1d(3, device="cpu", dtype=np.float64)
    batches = [rng.normal(size=(4, 3)) for _ in range(200)]

    def model(some):
        threads = [threading.Thread(target=lambda i=i: [layer(x) for x in some[i::4]]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    cupybn.update_bn([layer], [batches[:100], batches[100:]], model)
    np.testing.assert_allclose(layer.running_mean, exact(batches)[0].astype(float), rtol=1e-9, atol=1e-12)
    assert layer.num_batches_tracked == 200


def test_an_observer_takes_one_batch_at_a_time():
    """Batches of several threads merge one after the other."""
    observer, locked = Observer(), []

    class Steps:
        @staticmethod
        def merge_moments(moments):
            locked.append(observer._lock.locked())
            return numpy_ops.merge_moments(moments)

    for _ in range(4):
        observer.add(Steps, np.array([[2.0, 1.0, 3.0]]))
    assert locked == [True] * 3
    assert not observer._lock.locked()


def test_a_batch_that_cannot_be_merged_is_not_added():
    """A model may catch an error and go on, here as well."""
    observer, row = Observer(), np.array([[2.0, 1.0, 3.0]])

    class Steps:
        @staticmethod
        def merge_moments(_):
            raise MemoryError

    observer.add(numpy_ops, row)
    with pytest.raises(MemoryError):
        observer.add(Steps, 10 * row)
    assert observer.ops is numpy_ops
    assert observer.batches == 1
    assert [array.item() for array in observer.moments()[:3]] == [2, 1, 3]
    observer.add(numpy_ops, row)
    assert [array.item() for array in observer.moments()[:3]] == [4, 1, 6]


def test_the_steps_take_what_others_take():
    ours, theirs = (inspect.signature(ops.bn_forward).parameters.values() for ops in (Observed, numpy_ops))
    assert [(p.name, p.default) for p in [*ours][1:]] == [(p.name, p.default) for p in theirs]


def test_calls_around_it_are_played_as_ever(rng, make, device, plays):
    """Calls that are recorded before and after move the running statistics; those within are neither."""
    if device == "cpu":
        pytest.skip("NumPy's steps are taken at every call")
    x, counts = cupy.asarray(rng.normal(size=(4, 3, 5)).astype(np.float32)), []
    layer, plain = make(), make()
    for norm in layer, plain:
        norm(x)
        norm(x)
    played = len(plays)
    assert played > 0
    cupybn.update_bn([layer], [x, x], lambda x: counts.append((layer(x), len(plays))))
    assert [count for _, count in counts] == [played] * 2
    check_statistics(layer, [x.get()] * 2, batches=2)
    layer.load_state_dict(plain.state_dict())
    assert bits(layer(x), *layer.state_dict().values()) == bits(plain(x), *plain.state_dict().values())
    assert len(plays) == played + 2


def test_the_host_waits_for_nothing(rng, make, device):
    if device == "cpu" or not hasattr(cupy, "emulator"):
        pytest.skip("the stand-in counts how often the host waits")
    layer, lazy = make(), cupybn.BatchNorm1d(None, device=device)
    batches = [cupy.asarray(x) for x in samples(rng, (3, 2))]
    with cupy.emulator.record_syncs() as syncs:
        cupybn.update_bn([layer, lazy], batches, lambda x: lazy(layer(x)))
    assert syncs == []


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def everything(*layers):
    """All that layers hold, to compare."""
    return [(bits(*layer.state_dict().values()), vars(layer).copy()) for layer in layers]


class BrokenError(Exception):
    """What models and iterators raise here."""


@pytest.mark.parametrize("place", ["forward", "batches", "the start of batches", "writing", "statistics", "no batches"])
def test_errors_change_nothing(xp, rng, make, device, monkeypatch, place):
    """Wherever something raises, the layers are as they were, lazy ones as well."""
    layers = make(), cupybn.BatchNorm1d(None, device=device).eval(), make(momentum=None).eval()
    batches = [xp.asarray(x) for x in samples(rng, (3, 2))]
    before = everything(*layers)
    calls = 0

    def forward(x):
        nonlocal calls
        calls += 1
        for layer in layers:
            x = layer(x)
        if place == "forward" and calls == 3:
            raise BrokenError

    class Batches:
        def __iter__(self):
            if place == "the start of batches":
                raise BrokenError
            if place != "no batches":
                yield from batches
            if place == "batches":
                raise BrokenError

    def fail(*_):
        raise BrokenError

    if place == "writing":
        written, copied = [], importlib.import_module("cupybn._arrays.devices").copied

        def failing(array):
            written.append(array)
            if len(written) == 8:
                raise BrokenError
            return copied(array)

        monkeypatch.setattr("cupybn._arrays.devices.copied", failing)
    elif place == "statistics":
        monkeypatch.setattr(Observer, "moments", fail)
    with pytest.raises(ValueError if place == "no batches" else BrokenError):
        cupybn.update_bn(layers, Batches(), forward)
    assert everything(*layers) == before
    monkeypatch.undo()
    place = None
    cupybn.update_bn(layers, batches, forward)
    check_statistics(layers[0], [to_numpy(x) for x in batches])


@pytest.mark.parametrize(
    "act",
    [
        lambda layer: layer.reset_running_stats(),
        lambda layer: layer.load_state_dict({name: np.full(3, 9) for name in BUFFERS[:2]}, strict=False),
        lambda layer: copy.copy(layer)(layer.weight * layer.running_var[:, None]),
        lambda layer: layer.running_var.fill(np.nan),
        lambda layer: layer.num_batches_tracked.fill(-1),
    ],
    ids=["reset", "load", "another layer", "fill", "counter"],
)
def test_what_a_model_writes_into_buffers_is_undone(xp, rng, make, act):
    """An error restores the statistics, whoever has written to them; without one they are the new ones."""
    layer, x = make(), xp.asarray(samples(rng, (3,))[0])
    before = everything(layer)

    def model(x):
        layer(x)
        act(layer)
        if fails:
            raise BrokenError

    fails = True
    with pytest.raises(BrokenError):
        cupybn.update_bn([layer], [x], model)
    assert everything(layer) == before
    fails = False
    cupybn.update_bn([layer], [x, x], model)
    check_statistics(layer, [to_numpy(x)] * 2, batches=2)


@pytest.mark.parametrize("fails", [False, True])
def test_settings_that_a_model_sets_are_set_back(xp, rng, make, fails):
    layer, x = make(momentum=None).eval(), xp.asarray(samples(rng, (3,))[0])
    before = vars(layer).copy()

    def model(x):
        layer.train()
        layer.momentum, layer.track_running_stats = 0.5, False
        layer(x)
        if fails:
            raise BrokenError

    with pytest.raises(BrokenError) if fails else contextlib.nullcontext():
        cupybn.update_bn([layer], [x], model)
    assert vars(layer) == before


def test_the_error_of_a_model_is_the_one_that_is_raised(xp, rng, make):
    """Whether or not all that it did can be undone."""
    layer, x = make(), xp.asarray(samples(rng, (3,))[0])

    def model(x):
        layer(x)
        if xp is np:
            layer.running_mean.flags.writeable = False
        layer.num_batches_tracked.fill(0)
        raise BrokenError

    with pytest.raises(BrokenError):
        cupybn.update_bn([layer], [x], model)
    assert layer.num_batches_tracked == 7


def test_a_model_that_changes_channels_or_device(xp, rng, make):
    """What a layer has seen is of one size and on one device, that of its buffers."""
    layer, x = make(affine=False), xp.asarray(samples(rng, (3,))[0])
    before = everything(layer)

    def resize(x):
        layer(x)
        layer.running_mean, layer.running_var = xp.zeros(2, np.float32), xp.ones(2, np.float32)
        layer(x[:, :2])

    message = "expected input with 3 channels, as the batches of this update_bn before (got 2)"
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer], [x], resize)
    assert everything(layer) == before

    def resize_later(x):
        layer(x)
        layer.running_var = xp.ones(2, np.float32)

    message = "expected layers[0].running_var with 3 channels, as the batches of this update_bn before (got 2)"
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer], [x], resize_later)
    assert everything(layer) == before

    here, there = ("cpu", "cuda:0") if xp is np else ("cuda:0", "cpu")

    def move(x):
        layer(x)
        layer.to(there)

    def move_and_call(x):
        move(x)
        layer(cupy.asarray(x) if xp is np else x.get())

    for model, name in (move, "layers[0].running_mean"), (move_and_call, "input"):
        message = f"expected {name} on {here}, as the batches of this update_bn before (got one on {there})"
        with pytest.raises(TypeError, match=exactly(message)):
            cupybn.update_bn([layer], [x], model)
        assert everything(layer) == before


def test_graphs_are_not_captured(rng, make, device):
    """What a graph does at its launches is not seen: a layer that is captured would have wrong statistics."""
    if device == "cpu":
        pytest.skip("CUDA graphs")
    layer, batches, graphs = make(), [cupy.asarray(x) for x in samples(rng, (3,))], []
    stream = cupy.cuda.Stream(non_blocking=True)
    before = everything(layer)
    with cupybn.no_stats_update():
        layer(batches[0])  # compiles the kernels

    def capture(x):
        with stream:
            stream.begin_capture()
            try:
                layer(x)
            finally:
                graphs.append(stream.end_capture())

    with pytest.raises(RuntimeError, match="expected the layers of update_bn to be called without a CUDA graph"):
        cupybn.update_bn([layer], batches, capture)
    assert everything(layer) == before

    def without_statistics(x):
        with cupybn.no_stats_update():
            capture(x)
        layer(x)

    cupybn.update_bn([layer], batches, without_statistics)
    check_statistics(layer, [x.get() for x in batches])


def test_frozen_layers_take_inputs_of_their_channels_alone(xp, make):
    """Channels are counted where a layer has no parameters, and its running statistics are not in use, too."""
    layer = make(affine=False)
    layer.track_running_stats = False
    before = everything(layer)
    with pytest.raises(ValueError, match=exactly("expected 3 channels (num_features) on axis 1, got 4")):
        cupybn.update_bn([layer], [xp.zeros((2, 4), np.float32)], layer)
    assert everything(layer) == before


def test_a_model_that_takes_buffers_away(xp, rng, make):
    layer, x = make(), xp.asarray(samples(rng, (3,))[0])
    before = everything(layer)

    def model(x):
        layer(x)
        layer.running_mean = None

    message = "expected layers[0] to have running statistics (got a BatchNorm1d without)"
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer], [x], model)
    assert everything(layer) == before


def test_a_layer_on_another_device(rng):
    """Everything happens on the device of the layer, whichever is the current one."""
    if not hasattr(cupy, "emulator"):
        pytest.skip("needs two devices")
    batches = samples(rng, (3,))
    with cupy.emulator.pretend(cupy.emulator.H200, cupy.emulator.H200):
        with cupy.cuda.Device(1):
            arrays = [cupy.asarray(x) for x in batches]
        layers = cupybn.BatchNorm1d(3, device="cuda:1"), cupybn.BatchNorm1d(3, device="cpu")
        with cupy.emulator.record() as launches:
            cupybn.update_bn(layers, arrays, lambda x: layers[1](x.get()) if x is arrays[0] else layers[0](x))
        assert {launch.device for launch in launches} == {1}
        check_statistics(layers[0], batches[1:], batches=4)
        check_statistics(layers[1], batches[:1], batches=1)

        def failing(x):
            layers[0](x)
            layers[0].reset_running_stats()
            raise BrokenError

        before = everything(*layers)
        with pytest.raises(BrokenError):
            cupybn.update_bn(layers, arrays, failing)
        assert everything(*layers) == before


@pytest.mark.parametrize("progress", [False, True])
def test_interrupts(xp, rng, make, device, progress):
    """Ctrl-C at any line of this part of the library leaves everything as it was."""
    package = Path(cupybn.__file__).parent
    parts = ("models", "_steps/observer.py", "layers/writing.py", "layers/batchnorm.py")
    library = tuple(str(package / part) for part in parts)
    batches = [xp.asarray(x) for x in samples(rng, (3,))[::2]]
    at, step, more = 1, 1 if device == "cpu" and not progress else 23, True
    while more:
        layers = make(), cupybn.BatchNorm1d(None, device=device).eval()
        before = everything(*layers)

        def act(layers=layers):
            cupybn.update_bn(layers, batches, lambda x: layers[1](layers[0](x)), progress=progress)

        more = interrupted(act, at, library)
        assert observers == {}, f"at line {at}"
        if more:
            assert everything(*layers) == before, f"at line {at}"
        at += step
    assert at > 200
    check_statistics(layers[0], [to_numpy(x) for x in batches], batches=len(batches))


@pytest.mark.parametrize("track", [True, False])
def test_batches_of_one_value(xp, make, track):
    """The mode is not the caller's choice here, and so no message recommends another one."""
    layer = make().eval()
    layer.track_running_stats = track
    message = (
        "Expected more than 1 value per channel when training, got input size (1, 3); leave this batch out of "
        "update_bn, or join it with another one"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer], [xp.ones((1, 3), np.float32)], layer)


def test_one_at_a_time(xp, rng, make):
    """A layer is in one recalibration at a time, in whichever thread; another layer may be in one within it."""
    layer, other, batches = make(), make(), [xp.asarray(x) for x in samples(rng, (3,))]
    message = "layers[1] is in the midst of another update_bn: call one after the other"

    def model(x):
        layer(x)
        before = everything(layer, other)
        with pytest.raises(RuntimeError, match=exactly(message)):
            cupybn.update_bn([other, layer], batches, other)
        assert everything(layer, other) == before
        cupybn.update_bn([other], [x, x], lambda x: other(layer(x)))

    cupybn.update_bn([layer], batches, model)
    check_statistics(layer, [to_numpy(x) for x in batches for _ in range(3)], batches=3 * len(SIZES))


def test_one_that_is_too_early_undoes_nothing(xp, rng, make):
    """What happens to a layer that another recalibration is in the midst of, as in another thread, stays."""
    layer, x = make().eval(), xp.asarray(samples(rng, (3,))[0])

    class Batches:
        def __iter__(self):
            layer.running_mean.fill(99)
            layer.momentum = 0.25
            return iter([x])

    def model(x):
        layer(x)
        with pytest.raises(RuntimeError, match="in the midst of another update_bn"):
            cupybn.update_bn([layer], Batches(), layer)
        seen.append((layer.training, layer.momentum, *to_numpy(layer.running_mean)))

    seen = []
    cupybn.update_bn([layer], [x], model)
    assert seen == [(True, 0.25, 99, 99, 99)]
    assert layer.momentum == 0.1
    check_statistics(layer, [to_numpy(x)], batches=1)


def wrong(error, message, **given):
    return pytest.param(error, message, given, id=message[:60])


NO_LAYERS = "expected layers to be an iterable of batch norm layers "


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        wrong(TypeError, f"{NO_LAYERS}(got a BatchNorm1d): use [layer]", layers=lambda layer: layer),
        wrong(TypeError, f"{NO_LAYERS}(got a dict): use layers.values()", layers=lambda layer: {"bn": layer}),
        wrong(TypeError, f"{NO_LAYERS}(got None)", layers=lambda _: None),
        wrong(
            TypeError,
            "expected layers[1] to be a batch norm layer of cupybn (got 'bn')",
            layers=lambda layer: [layer, "bn"],
        ),
        wrong(
            ValueError,
            "expected one layer or more (got none): has an iterator been used up?",
            layers=lambda _: iter([]),
        ),
        wrong(
            ValueError,
            "expected layers[1] to have running statistics (got a BatchNorm2d without)",
            layers=lambda layer: [layer, cupybn.BatchNorm2d(3, track_running_stats=False, device="cpu")],
        ),
        wrong(
            ValueError,
            "expected layers[0] to have running statistics (got a BatchNorm2d without)",
            layers=lambda _: [cupybn.BatchNorm2d(None, track_running_stats=False, device="cpu")],
        ),
        wrong(TypeError, "expected batches to be an iterable (got 3)", batches=3),
        wrong(ValueError, "expected one batch or more (got none): has an iterator been used up?", batches=()),
        wrong(TypeError, "expected forward to be callable (got None)", forward=None),
        wrong(TypeError, "expected progress to be a bool (got 1)", progress=1),
    ],
)
def test_wrong_arguments(error, message, given):
    layer = cupybn.BatchNorm1d(3, device="cpu").eval()
    layers = given.pop("layers", lambda layer: [layer])(layer)
    called = []
    arguments = {"batches": [np.ones((2, 3), np.float32)], "forward": called.append} | given
    with pytest.raises(error, match=exactly(message)):
        cupybn.update_bn(layers, **arguments)
    assert called == []
    assert not layer.training


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_buffers_that_are_missing(make, name):
    layer = make()
    setattr(layer, name, None)
    with pytest.raises(
        ValueError, match=exactly("expected layers[0] to have running statistics (got a BatchNorm1d without)")
    ):
        cupybn.update_bn([layer], [1], print)


def test_buffers_that_cannot_be_written():
    """What would raise at the end raises before anything runs."""
    layer, called = cupybn.BatchNorm1d(3, device="cpu"), []
    layer.running_var.flags.writeable = False
    message = "expected layers[0].running_var to be writeable (got a read-only array): use a writeable one"
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer], [1], called.append)
    layer = cupybn.BatchNorm1d(3, device="cpu")
    layer.num_batches_tracked = 3
    with pytest.raises(TypeError, match=r"expected layers\[0\].num_batches_tracked to be an array \(got int\)"):
        cupybn.update_bn([layer], [1], called.append)
    layer.num_batches_tracked = np.zeros((), np.int32)
    with pytest.raises(TypeError, match="expected num_batches_tracked to be an int64 array"):
        cupybn.update_bn([layer], [1], called.append)
    assert called == []


def test_buffers_of_two_layers(xp, make):
    """Layers that share buffers would each overwrite what the other has seen."""
    layer, other = make(), make()
    copied = cupybn.SyncBatchNorm.from_batchnorm(layer)
    message = (
        "expected layers with running statistics of their own (got layers[0] and layers[2], which share running_mean, "
        "running_var, num_batches_tracked): give one of them"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        cupybn.update_bn([layer, other, copied], [1], print)
    memory = xp.ones(5, np.float32)
    layer.running_mean, other.running_var = memory[:3], memory[2:]
    with pytest.raises(ValueError, match="which share running_var"):
        cupybn.update_bn([layer, other], [1], print)
    layer, other = make(), make()
    layer.running_mean, other.running_mean = memory[:3], xp.asarray(memory[::2])[:0:-1]
    other.running_mean = xp.ones(6, np.float32)[::2]
    layer.weight = layer.running_var  # in one layer anything may be shared
    x = xp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    cupybn.update_bn([layer, other], [x], lambda x: other(layer(x)))
    assert layer.num_batches_tracked == other.num_batches_tracked == 1


# ---------------------------------------------------------------------------------------------------------------------
# The progress bar


def test_progress(capsys):
    layer, x = cupybn.BatchNorm1d(1, device="cpu"), np.arange(4, dtype=np.float32).reshape(4, 1)
    cupybn.update_bn([layer], [x] * 3, layer, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3 [" in err
    assert "batch/s]" in err
    assert err.endswith("\n")
    cupybn.update_bn([layer], iter([x] * 3), layer, progress=True)  # which does not know its length
    assert "3batch [" in capsys.readouterr().err
    cupybn.update_bn([layer], [x] * 3, layer)
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_closed_after_an_error(capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    layer, x = cupybn.BatchNorm1d(1, device="cpu"), np.arange(4, dtype=np.float32).reshape(4, 1)

    def model(_):
        raise BrokenError

    with pytest.raises(BrokenError):
        cupybn.update_bn([layer], [x] * 3, model, progress=True)
    assert len(tqdm._instances) == 0
    assert capsys.readouterr().err.endswith("\n")


def test_without_tqdm(monkeypatch):
    """Nothing runs where the progress bar cannot be shown."""
    layer, called = cupybn.BatchNorm1d(1, device="cpu"), []
    monkeypatch.setitem(sys.modules, "tqdm", None)  # which Python takes for a module that cannot be imported
    message = "progress=True needs tqdm: `pip install '.[cli]'`, in a clone of cupybn, installs it"
    with pytest.raises(ImportError, match=exactly(message)):
        cupybn.update_bn([layer], [1], called.append, progress=True)
    assert called == []
