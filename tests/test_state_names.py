"""State dicts under the names of other frameworks: which keys and shapes they have, and what is hinted at."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cupybn import BatchNorm1d, BatchNorm2d, IncompatibleKeys, SyncBatchNorm
from tests.reference import bits, to_numpy
from tests.test_state_dict import refusal

OURS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NAMES = {
    "torch": OURS,
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("scale", "bias", "mean", "var"),
    "chainer": ("gamma", "beta", "avg_mean", "avg_var", "N"),
    "onnx": ("scale", "B", "input_mean", "input_var"),
}
FOREIGN = [names for names in NAMES if names != "torch"]
every = pytest.mark.parametrize("names", NAMES)
foreign = pytest.mark.parametrize("names", FOREIGN)


def a_state(rng, names, prefix="", shape=(3,), count=7):
    """A state dict under the names of a framework, and what it says by our names."""
    ours = {name: rng.uniform(0.5, 2, shape).astype(np.float32) for name in OURS[:4]} | {OURS[4]: count}
    return {prefix + name: ours[own] for own, name in zip(OURS, NAMES[names], strict=False)}, ours


def assert_holds(layer, ours, count):
    for name in OURS[:4]:
        np.testing.assert_array_equal(to_numpy(getattr(layer, name)), ours[name].ravel())
    assert int(layer.num_batches_tracked) == count


def fails(layer, state, error, **kwargs):
    """Check that loading a state raises and changes nothing. Returns the message."""
    return str(refusal(layer, state, error, **kwargs).args[0])


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@every
@pytest.mark.parametrize("features", [3, None])
@pytest.mark.parametrize("prefix", ["", "encoder/bn1/"])
def test_there_and_back(device, rng, names, features, prefix):
    layer, again = BatchNorm2d(features, device=device), SyncBatchNorm(features, device=device)
    for each in layer, again:
        if features is not None:
            each.num_batches_tracked[...] = 4
    state, ours = a_state(rng, names, prefix)
    assert layer.load_state_dict(state, prefix=prefix, names=names) == IncompatibleKeys([], [])
    has_counter = len(NAMES[names]) == 5
    assert_holds(layer, ours, 7 if has_counter else 4 if features else 0)
    assert list(layer.state_dict(prefix, names=names)) == [prefix + name for name in NAMES[names]]
    again.load_state_dict(layer.state_dict(prefix, names=names), True, prefix, names)
    assert bits(*again.state_dict().values()) == bits(*layer.state_dict().values())


@every
def test_arrays_are_live_under_any_name(device, names):
    layer = BatchNorm1d(3, device=device)
    state = layer.state_dict(names=names)
    assert all(state[theirs] is getattr(layer, own) for own, theirs in zip(OURS, NAMES[names], strict=False))


@every
def test_only_what_there_is(device, rng, names):
    layer = BatchNorm1d(3, affine=False, device=device)
    assert list(layer.state_dict(names=names)) == list(NAMES[names][2:])
    state, _ = a_state(rng, names)
    message = fails(layer, state, KeyError, names=names)
    assert message.startswith(f"unexpected keys: {NAMES[names][0]}, {NAMES[names][1]}")


@every
def test_the_keys_that_are_returned(device, rng, names):
    layer = BatchNorm1d(3, device=device)
    state, ours = a_state(rng, names, "bn/")
    weight, bias, _, variance = NAMES[names][:4]
    for name in bias, variance:
        del state[f"bn/{name}"]
    state.pop("bn/N", None)
    state |= {"bn/extra": object(), "other/extra": object(), 4: 4}
    keys = layer.load_state_dict(state, strict=False, prefix="bn/", names=names)
    assert type(keys) is IncompatibleKeys
    assert keys == IncompatibleKeys([f"bn/{bias}", f"bn/{variance}"], ["bn/extra"])
    assert keys.missing_keys is keys[0]
    np.testing.assert_array_equal(to_numpy(layer.weight), ours["weight"])
    keys = layer.load_state_dict({4: 4, b"x": 5, weight: ours["weight"]}, strict=False, names=names)
    assert keys == (list(NAMES[names][1:4]), [4, b"x"])


def test_a_lazy_layer_that_learns_nothing_returns_the_keys(device):
    layer = BatchNorm1d(None, device=device)
    assert layer.load_state_dict({}, strict=False, names="keras") == (list(NAMES["keras"]), [])
    assert layer.num_features is None


@foreign
def test_our_counter_is_unknown_to_others(device, rng, names):
    layer = BatchNorm1d(3, device=device)
    state, _ = a_state(rng, names)
    message = fails(layer, state | {"num_batches_tracked": 3}, KeyError, names=names)
    assert message == "unexpected keys: num_batches_tracked"


@pytest.mark.parametrize("count", [5, np.int64(5), np.array(5), 5.0], ids=repr)
def test_counts_of_chainer(xp, device, rng, count):
    layer = BatchNorm1d(3, device=device)
    state, ours = a_state(rng, "chainer", count=count)
    layer.load_state_dict(state, names="chainer")
    assert_holds(layer, ours, 5)
    assert layer.load_state_dict(state | {"N": xp.asarray(6)}, names="chainer") == ([], [])
    assert_holds(layer, ours, 6)
    del state["N"]
    layer.load_state_dict(state, names="chainer")
    assert_holds(layer, ours, 6)
    for wrong in -1, 2.5, np.array([5]):
        assert "expected N " in fails(layer, state | {"N": wrong}, ValueError, names="chainer")


def test_a_counter_has_no_axes_of_one(device, rng):
    state, _ = a_state(rng, "chainer", shape=(1,))
    message = fails(BatchNorm1d(1, device=device), state | {"N": np.ones((1, 1))}, ValueError, names="chainer")
    assert message == "expected N of shape () (got (1, 1))"


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@foreign
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (1, 3), (1, 1, 1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("features", [3, None])
def test_vectors_with_axes_of_one(xp, device, rng, names, shape, features):
    layer = BatchNorm2d(features, device=device)
    state, ours = a_state(rng, names, shape=shape)
    layer.load_state_dict({name: xp.asarray(value) for name, value in state.items()}, names=names)
    assert layer.num_features == 3
    assert all(getattr(layer, name).shape == (3,) for name in OURS[:4])
    assert_holds(layer, ours, int(layer.num_batches_tracked))


@foreign
@pytest.mark.parametrize("features", [1, None])
def test_a_single_channel(device, rng, names, features):
    layer = BatchNorm2d(features, device=device)
    state, ours = a_state(rng, names, shape=(1, 1, 1, 1))
    layer.load_state_dict(state, names=names)
    assert_holds(layer, ours, int(layer.num_batches_tracked))


@foreign
@pytest.mark.parametrize(
    ("features", "shape"),
    [(3, (1, 4, 1, 1)), (3, ()), (1, ()), (6, (2, 3)), (6, (1, 2, 3, 1)), (3, (0,)), (3, (1, 1)), (0, (0, 3))],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_hold_no_vector(device, rng, names, features, shape, strict):
    state, _ = a_state(rng, names, shape=(features,))
    name = NAMES[names][2]
    message = fails(
        BatchNorm1d(features, device=device), state | {name: np.ones(shape)}, ValueError, names=names, strict=strict
    )
    assert message == f"expected {name} of shape ({features},) (got {shape})"


def test_shapes_of_torch_are_exact(device, rng):
    state, _ = a_state(rng, "torch", shape=(1, 3, 1, 1))
    for features in 3, None:
        message = fails(BatchNorm2d(features, device=device), state, ValueError)
        assert message.count("(got (1, 3, 1, 1))") == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is not known, and what was meant


@pytest.mark.parametrize(
    ("names", "end"),
    [("tensorflow", "'onnx'"), ("Keras", "; did you mean names='keras'?"), (None, "'onnx'"), (["torch"], "'onnx'")],
    ids=str,
)
def test_unknown_names(device, names, end):
    layer = BatchNorm1d(3, device=device)
    message = fails(layer, {}, ValueError, names=names)
    assert message.startswith("unknown names ")
    assert all(f"{known!r}" in message for known in NAMES)
    assert message.endswith(end)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.state_dict(names=names)


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("there", NAMES)
@pytest.mark.parametrize("features", [3, None])
def test_other_names_are_hinted_at(device, rng, given, there, features):
    layer = BatchNorm1d(features, device=device)
    state, _ = a_state(rng, there, "bn.", (3,) if there == "torch" else (1, 3, 1))
    if given == there:
        layer.load_state_dict(state, prefix="bn.", names=given)
        return
    message = fails(layer, state, KeyError, prefix="bn.", names=given)
    assert message.endswith(f"; did you mean names={there!r}?")
    layer.load_state_dict(state, prefix="bn.", names=there)


@pytest.mark.parametrize(
    "change", [{"bn.gamma": np.ones(4)}, {"bn.gamma": np.ones((2, 2))}, {"bn.extra": 1}, {"bn.gamma": None}], ids=str
)
def test_no_hint_at_names_that_would_not_do(device, rng, change):
    state = {key: value for key, value in (a_state(rng, "keras", "bn.")[0] | change).items() if value is not None}
    assert "did you mean" not in fails(BatchNorm1d(3, device=device), state, KeyError, prefix="bn.")


@every
@pytest.mark.parametrize(
    ("there", "given", "meant"),
    [
        (["module/bn1/"], "bn1/", "module/bn1/"),
        (["a/bn1/", "a/bn2/", "b/bn1/", "b/bn2/"], "", "a/bn1/"),
        (["a/bn1/", "a/bn2/", "b/bn1/", "b/bn2/"], "bn2/", "a/bn2/"),
        (["a/bn1/", "xbn2/", "a/bn2/"], "bn2/", "xbn2/"),  # the first that ends so
        (["a/bn1/", "b/bn2/"], "c/bn2/", "b/bn2/"),
        (["a/bn1/", "b/bn2/"], "bn9/", "a/bn1/"),
    ],
    ids=str,
)
def test_another_prefix_under_any_name(device, rng, names, there, given, meant):
    layer = BatchNorm1d(3, device=device)
    shape = (3,) if names == "torch" else (1, 3)
    state = {key: value for prefix in there for key, value in a_state(rng, names, prefix, shape)[0].items()}
    message = fails(layer, state, KeyError, prefix=given, names=names)
    assert message.endswith(f"; did you mean prefix={meant!r}?")
    layer.load_state_dict(state, prefix=meant, names=names)


def test_a_prefix_comes_before_other_names(device, rng):
    state = a_state(rng, "keras", "bn.")[0] | a_state(rng, "torch", "net.bn.")[0]
    message = fails(BatchNorm1d(3, device=device), state, KeyError, prefix="bn.")
    assert message.endswith("; did you mean prefix='net.bn.'?")
    assert "names=" not in message
