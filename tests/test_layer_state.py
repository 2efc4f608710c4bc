"""Unusual states of layers: frozen statistics, prefixes that repeat, interrupts, counters that have an axis."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from cupybn import BatchNorm1d, no_stats_update
from cupybn._calls import call
from cupybn._steps import cupy_ops, numpy_ops
from tests.reference import bits

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def moved(device, xp, rng, **options):
    """A layer all of whose arrays differ from those of a new one."""
    layer = BatchNorm1d(3, device=device, **options)
    layer(xp.asarray(rng.standard_normal((5, 3, 4)) * 3 + 2))
    layer.weight[...], layer.bias[...] = 5, 7
    return layer


def held(layer, *names):
    return bits(*(layer.state_dict()[name] for name in names))


def test_frozen_statistics_are_not_reset(device, xp, rng):
    """Statistics that are frozen are not reset: the flag counts as it is at the call, as in PyTorch."""
    layer, fresh = moved(device, xp, rng), BatchNorm1d(3, device=device)
    before = held(layer, *STATISTICS)
    assert before != held(fresh, *STATISTICS)
    layer.track_running_stats = False
    layer.reset_running_stats()
    assert held(layer, *STATISTICS) == before
    layer.reset_parameters()
    assert held(layer, *STATISTICS) == before
    assert held(layer, "weight", "bias") == held(fresh, "weight", "bias")
    layer.track_running_stats = True
    layer.reset_running_stats()
    assert held(layer, *STATISTICS) == held(fresh, *STATISTICS)


@pytest.mark.parametrize("name", ["bias", "running_var"])
def test_a_reset_that_fails_changes_nothing(rng, name):
    layer = moved("cpu", np, rng)
    before = held(layer, "weight", "bias", *STATISTICS)
    getattr(layer, name).flags.writeable = False
    with pytest.raises(ValueError, match=name):
        layer.reset_parameters()
    assert held(layer, "weight", "bias", *STATISTICS) == before


def test_a_list_in_the_place_of_an_array(device, xp, rng):
    """A list is no array that could be written to, but may be copied."""
    layer = moved(device, xp, rng)
    layer.running_var = [1.0, 1.0, 1.0]
    before = held(layer, "running_mean")
    with pytest.raises(TypeError, match="expected running_var to be an array"):
        layer.reset_running_stats()
    assert held(layer, "running_mean") == before
    assert copy.deepcopy(layer).running_var == layer.running_var


def test_statistics_that_were_never_tracked_are_not_made(device, xp, rng):
    layer = moved(device, xp, rng, track_running_stats=False)
    layer.track_running_stats = True
    layer.reset_running_stats()
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert held(layer, "weight", "bias") == held(moved(device, xp, rng), "weight", "bias")


def test_an_array_that_a_derived_class_keeps_elsewhere(device):
    """A property of a derived class may stand in for an array: it is set to None at first, as an attribute is."""

    class Tied(BatchNorm1d):
        weight = property(lambda self: self.kept, lambda self, array: vars(self).update(kept=array))

    layer = Tied(3, device=device)
    assert list(layer.state_dict()) == ["bias", *STATISTICS]
    layer.weight = layer.running_var
    assert layer.state_dict()["weight"] is layer.running_var


@pytest.mark.parametrize("prefix", ["bn.", "weight", "b", "."])
def test_a_prefix_twice_in_a_key(device, xp, rng, prefix):
    """A prefix that a key has twice is taken off once, and such a key belongs to something else."""
    layer = moved(device, xp, rng)
    own = {prefix + name: np.full(array.shape, 9) for name, array in layer.state_dict().items()}
    twice = {prefix + key: np.full(array.shape, 4) for key, array in own.items()}
    inside = {f"{prefix}bias{prefix}": np.zeros(8)}
    before = bits(*layer.state_dict().values())
    for others in twice, inside:
        with pytest.raises(KeyError, match="unexpected"):
            layer.load_state_dict(own | others, prefix=prefix)
        with pytest.raises(KeyError, match="missing"):
            layer.load_state_dict(others, prefix=prefix)
        layer.load_state_dict(others, strict=False, prefix=prefix)
    assert bits(*layer.state_dict().values()) == before
    layer.load_state_dict(own | twice, strict=False, prefix=prefix)
    assert all(bool((array == 9).all()) for array in layer.state_dict().values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("way", ["forward", "vjp"])
def test_a_lazy_layer_whose_first_call_is_interrupted(device, xp, rng, way, error, monkeypatch):
    """A lazy layer whose first call is interrupted is still lazy, and takes another number of features."""
    layer = BatchNorm1d(None, device=device)
    ops = numpy_ops if device == "cpu" else cupy_ops

    def interrupt(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(call, "_cache", {})  # a call like an earlier one takes no steps on CuPy arrays
        patched.setattr(ops, "bn_forward", interrupt)
        with pytest.raises(error):
            getattr(layer, way)(xp.asarray(rng.standard_normal((5, 3, 4))))
    assert layer.num_features is None
    assert layer.state_dict() == {}
    layer(xp.asarray(rng.standard_normal((5, 7, 4))))
    assert layer.num_features == 7
    assert int(layer.num_batches_tracked) == 1


def test_a_settled_layer_stays_so_when_a_call_is_interrupted(device, xp, rng, monkeypatch):
    layer = moved(device, xp, rng)
    arrays, before = layer.state_dict(), bits(*layer.state_dict().values())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(call, "_cache", {})  # a call that is like an earlier one takes no steps on a GPU
    monkeypatch.setattr(numpy_ops if device == "cpu" else cupy_ops, "bn_forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(xp.asarray(rng.standard_normal((5, 3, 4))))
    assert all(array is arrays[name] for name, array in layer.state_dict().items())
    assert bits(*arrays.values()) == before


@pytest.mark.parametrize("strict", [True, False])
def test_a_counter_of_shape_1_is_not_loaded(device, xp, rng, strict):
    layer = moved(device, xp, rng)
    before = bits(*layer.state_dict().values())
    state = {name: np.ones(array.shape) for name, array in layer.state_dict().items()}
    state["num_batches_tracked"] = np.array([4])
    with pytest.raises(ValueError, match=r"num_batches_tracked.*\(1,\)"):
        layer.load_state_dict(state, strict=strict)
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_shape_1_is_not_counted_with(device, xp, rng, momentum):
    """A counter of shape (1,) is refused, though it is one number: a state dict with it could not be loaded."""
    layer = moved(device, xp, rng, momentum=momentum)
    layer.num_batches_tracked = xp.zeros((1,), np.int64)
    before = bits(*layer.state_dict().values())
    x = xp.asarray(rng.standard_normal((5, 3, 4)))
    with pytest.raises(ValueError, match=r"num_batches_tracked.*\(1,\)"):
        layer(x)
    assert bits(*layer.state_dict().values()) == before
    layer.eval()
    layer(x)
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize("rows", [5, 5000], ids=["on chip", "streamed"])
def test_a_momentum_of_nan_is_no_cumulative_mean(device, xp, rng, rows):
    """Kernels know a momentum of None as NaN. A layer with a momentum of NaN counts its batches all the same."""
    layer = BatchNorm1d(3, momentum=float("nan"), device=device)
    layer(xp.asarray(rng.standard_normal((rows, 3))))
    assert xp.isnan(layer.running_mean).all()
    assert xp.isnan(layer.running_var).all()
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("counter", [7, np.int32(7), "seven"], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_calls_that_do_not_count_do_not_look_at_the_counter(device, xp, rng, training, counter):
    layer, x = moved(device, xp, rng).train(training), xp.asarray(rng.standard_normal((5, 3, 4)))
    with no_stats_update():
        expected = bits(layer(x))
        layer.num_batches_tracked = counter
        y, vjp_fn = layer.vjp(x)
        assert bits(y) == bits(layer(x)) == expected
    assert vjp_fn(x).input.shape == x.shape
