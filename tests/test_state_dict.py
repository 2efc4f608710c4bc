"""State dicts: torch's keys, what may be loaded, and that a failed load changes nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cupybn import BatchNorm1d, BatchNorm2d
from tests.reference import DTYPES, bits, to_numpy

ARRAYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def a_state(rng, features=3, prefix="", **changes):
    """A state dict of NumPy arrays, with some entries replaced or, with None, left out."""
    state = {name: rng.uniform(0.5, 2, features).astype(np.float32) for name in ARRAYS[:4]}
    state |= {"num_batches_tracked": np.array(7, np.int64)} | changes
    return {prefix + name: value for name, value in state.items() if value is not None}


def assert_holds(layer, state, prefix=""):
    """The layer's arrays are those of the state, after one rounding to the layer's dtype."""
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(to_numpy(array), np.asarray(state[prefix + name]).astype(array.dtype))


def fails(layer, state, error, **kwargs):
    """Load a state that does not fit; nothing changes. Returns the message."""
    own = layer.state_dict()
    before = bits(*own.values())
    with pytest.raises(error) as raised:
        layer.load_state_dict(state, **kwargs)
    assert raised.type is error
    assert bits(*own.values()) == before
    after = layer.state_dict()
    assert list(after) == list(own)
    assert all(after[name] is array for name, array in own.items())
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# What it holds


@pytest.mark.parametrize("prefix", ["", "bn1.", "net.0."])
def test_keys_order_and_shapes(device, prefix):
    state = BatchNorm2d(3, device=device).state_dict(prefix)
    assert type(state) is dict
    assert list(state) == [prefix + name for name in ARRAYS]
    assert [array.shape for array in state.values()] == [(3,), (3,), (3,), (3,), ()]
    assert state[prefix + "num_batches_tracked"].dtype == np.int64
    assert list(BatchNorm2d(3, device=device).state_dict(prefix=prefix)) == list(state)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"affine": False}, ARRAYS[2:]),
        ({"bias": False}, ["weight", *ARRAYS[2:]]),
        ({"track_running_stats": False}, ARRAYS[:2]),
        ({"affine": False, "track_running_stats": False}, []),
    ],
    ids=str,
)
def test_only_what_there_is(device, rng, options, names):
    layer = BatchNorm1d(3, device=device, **options)
    assert list(layer.state_dict()) == names
    state = a_state(rng)
    unexpected = [name for name in ARRAYS if name not in names]
    message = fails(layer, state, KeyError)
    assert all(name in message for name in unexpected)
    layer.load_state_dict({name: state[name] for name in names})
    assert_holds(layer, state)


def test_arrays_are_live(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    state = layer.state_dict("bn.")
    assert all(state["bn." + name] is getattr(layer, name) for name in ARRAYS)
    layer(xp.asarray(rng.normal(size=(5, 3)).astype(np.float32)))
    assert state["bn.num_batches_tracked"] == 1
    assert np.all(to_numpy(state["bn.running_mean"]) != 0)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_load_copies_and_returns_none(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng)
    own = layer.state_dict()
    before = bits(*state.values())
    assert layer.load_state_dict(state) is None
    assert_holds(layer, state)
    assert all(layer.state_dict()[name] is array for name, array in own.items())
    for array in own.values():
        array[...] = 0
    assert bits(*state.values()) == before


def test_load_from_another_layer_and_from_itself(xp, device, rng):
    source, layer = (BatchNorm1d(3, device=device) for _ in range(2))
    source.load_state_dict(a_state(rng))
    layer.load_state_dict(source.state_dict())
    wanted = bits(*source.state_dict().values())
    assert bits(*layer.state_dict().values()) == wanted
    layer.load_state_dict(layer.state_dict())
    assert bits(*layer.state_dict().values()) == wanted
    source(xp.asarray(rng.normal(size=(5, 3)).astype(np.float32)))
    assert bits(*layer.state_dict().values()) == wanted


def test_strict_is_the_second_argument(device, rng):
    layer = BatchNorm1d(3, device=device)
    layer.load_state_dict({"weight": [1, 2, 3]}, False)
    layer.load_state_dict(a_state(rng, prefix="bn."), True, "bn.")
    assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("strict", [True, False])
def test_prefix(device, rng, strict):
    """Keys that do not start with the prefix belong to others."""
    layer, state = BatchNorm1d(3, device=device), a_state(rng, prefix="bn1.")
    others = {
        "fc.weight": np.ones((2, 2)),
        "bn11.weight": np.ones(9),
        "weight": np.ones(3),
        "a.bn1.weight": np.ones(3),
        "bn1": "text",
    }
    layer.load_state_dict(others | state, strict=strict, prefix="bn1.")
    assert_holds(layer, state, "bn1.")
    assert layer.load_state_dict(layer.state_dict(prefix="x."), prefix="x.") is None
    assert_holds(layer, state, "bn1.")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "bn."])
def test_missing_counter_is_no_error(device, rng, prefix, strict):
    layer = BatchNorm1d(3, device=device)
    layer.num_batches_tracked[...] = 4
    state = a_state(rng, prefix=prefix, num_batches_tracked=None)
    layer.load_state_dict(state, strict=strict, prefix=prefix)
    assert layer.num_batches_tracked == 4
    assert_holds(layer, state | {prefix + "num_batches_tracked": 4}, prefix)


def test_not_strict_takes_what_fits(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng, bias=None, running_var=None) | {"extra": np.ones(5)}
    layer.load_state_dict(state, strict=False)
    assert_holds(layer, state | {"bias": np.zeros(3), "running_var": np.ones(3)})
    layer.load_state_dict({}, strict=False)
    assert_holds(layer, state | {"bias": np.zeros(3), "running_var": np.ones(3)})


def test_unexpected_entries_may_be_anything_when_not_strict(device, rng):
    """They are ignored: nobody asks whether they are arrays."""
    layer, state = BatchNorm1d(3, device=device), a_state(rng)
    others = {"version": "2.0", "shapes": [[1], [2, 3]], "optimizer": {"lr": 0.1}, "scheduler": None}
    layer.load_state_dict(others | state, strict=False)
    assert_holds(layer, state)
    assert "version" in fails(layer, others | state, KeyError)


@pytest.mark.parametrize("given", [*DTYPES, np.dtype(np.int32)], ids=str)
@pytest.mark.parametrize("own", DTYPES, ids=str)
def test_other_dtypes_are_cast(device, rng, own, given):
    layer = BatchNorm1d(3, device=device, dtype=own)
    state = {name: (4 * array).astype(given) for name, array in a_state(rng).items()}
    layer.load_state_dict(state)
    assert [array.dtype for array in layer.state_dict().values()] == [own] * 4 + [np.int64]
    assert layer.num_batches_tracked == 28
    assert_holds(layer, state)


def test_values_too_large_for_the_dtype_become_inf(device, rng):
    layer = BatchNorm1d(3, device=device, dtype=np.float16)
    layer.load_state_dict(a_state(rng, running_var=np.array([1.0, 1e6, 1e300])))
    np.testing.assert_array_equal(to_numpy(layer.running_var), [1, np.inf, np.inf])


def test_lists_numbers_and_views(device, rng):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, weight=[1, 2, 3], bias=(0.5, 1.5, 2.5), num_batches_tracked=5)
    state["running_mean"] = np.arange(6.0)[::-2]
    layer.load_state_dict(state)
    assert_holds(layer, state)


def test_npz(device, rng, tmp_path):
    source, layer = (BatchNorm1d(3, device=device) for _ in range(2))
    source.load_state_dict(a_state(rng))
    np.savez(tmp_path / "state.npz", **{name: to_numpy(array) for name, array in source.state_dict("bn.").items()})
    with np.load(tmp_path / "state.npz") as state:
        layer.load_state_dict(state, prefix="bn.")
    assert bits(*layer.state_dict().values()) == bits(*source.state_dict().values())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_there_and_back_with_torch(xp, device, rng, options):
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm2d(3, **options), BatchNorm2d(3, device=device, **options)
    x = rng.normal(3, 2, (4, 3, 5, 5)).astype(np.float32)
    theirs(torch.from_numpy(x))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_holds(ours, theirs.state_dict())

    ours(xp.asarray(x))
    state = {name: torch.from_numpy(to_numpy(array).copy()) for name, array in ours.state_dict().items()}
    theirs.load_state_dict(state)  # strict
    assert_holds(ours, theirs.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize("prefix", ["", "bn."])
def test_missing_and_unexpected_keys_stand_in_one_message(device, rng, prefix):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, prefix=prefix, weight=None, running_var=None, wieght=np.ones(3), gamma=np.ones(9))
    message = fails(layer, state, KeyError, prefix=prefix)
    for name in ("weight", "running_var", "wieght", "gamma"):
        assert re.search(rf"(?<![\w.]){re.escape(prefix + name)}\b", message)
    for name in ("bias", "running_mean", "num_batches_tracked"):
        assert name not in message
    assert message.index("missing") < message.index("unexpected")


def test_an_empty_state_misses_all_but_the_counter(device):
    message = fails(BatchNorm1d(3, device=device), {}, KeyError)
    assert all(name in message for name in ARRAYS[:4])
    assert "num_batches_tracked" not in message


def test_a_wrong_prefix_misses_everything(device, rng):
    message = fails(BatchNorm1d(3, device=device), a_state(rng), KeyError, prefix="bn.")
    assert all(f"bn.{name}" in message for name in ARRAYS[:4])
    assert "unexpected" not in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "bn."])
def test_all_wrong_shapes_stand_in_one_message(device, rng, prefix, strict):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, prefix=prefix, weight=np.ones(2), running_var=np.ones((3, 1)), bias=np.float32(1))
    message = fails(layer, state, ValueError, strict=strict, prefix=prefix)
    for name, shape in ("weight", (2,)), ("running_var", (3, 1)), ("bias", ()):
        assert prefix + name in message
        assert str(shape) in message
    assert str((3,)) in message
    assert "running_mean" not in message


def test_wrong_shapes_count_when_keys_are_missing_and_not_strict(device):
    message = fails(BatchNorm1d(3, device=device), {"weight": np.ones(3), "bias": np.ones(4)}, ValueError, strict=False)
    assert "bias" in message
    assert str((4,)) in message


def test_bad_keys_and_bad_shapes_stand_in_one_key_error(device, rng):
    state = a_state(rng, weight=None, gamma=np.ones(3), bias=np.ones(5), running_mean=np.ones((1, 3)))
    message = fails(BatchNorm1d(3, device=device), state, KeyError)
    for word in ("weight", "gamma", "bias", str((5,)), "running_mean", str((1, 3))):
        assert word in message
    assert "running_var" not in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("counter", [np.array([7]), np.ones(3, np.int64), [7]], ids=str)
def test_a_counter_that_is_not_0_d_has_a_wrong_shape(device, rng, counter, strict):
    message = fails(BatchNorm1d(3, device=device), a_state(rng, num_batches_tracked=counter), ValueError, strict=strict)
    assert "num_batches_tracked" in message


@pytest.mark.parametrize(
    "value",
    ["text", None, [[1.0], [2.0, 3.0]], [1j, 2j, 3j], object()],
    ids=["text", "None", "ragged", "complex", "object"],
)
def test_what_is_not_an_array_of_numbers(device, rng, value):
    """The last entry of the state, so that all others could have been loaded before it."""
    state = a_state(rng, running_var=None)
    state["running_var"] = value
    layer = BatchNorm1d(3, device=device)
    before = bits(*layer.state_dict().values())
    with pytest.raises((TypeError, ValueError)):
        layer.load_state_dict(state)
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_the_layer_that_is_read_only(rng, name):
    """As those of a layer that came through a memory map: then none of the arrays is loaded."""
    layer = BatchNorm1d(3, device="cpu")
    getattr(layer, name).flags.writeable = False
    assert "read-only" in fails(layer, a_state(rng), ValueError)


@pytest.mark.parametrize("strict", [True, False])
def test_a_failed_load_leaves_a_layer_lazy(xp, device, rng, strict):
    layer = BatchNorm1d(None, device=device)
    message = fails(layer, a_state(rng, bias=np.ones(4)), ValueError, strict=strict)
    assert "bias" in message
    fails(layer, {"gamma": np.ones(3)}, KeyError)
    assert (layer.num_features, layer.weight, layer.num_batches_tracked) == (None, None, None)
    layer(xp.ones((2, 5), np.float32))
    assert layer.num_features == 5


def test_a_lazy_layer_takes_a_state_of_the_counter_alone(xp, device):
    """It cannot know its features from that, and nothing is wrong with it when not strict."""
    layer = BatchNorm1d(None, device=device)
    layer.load_state_dict({"num_batches_tracked": np.array(3)}, strict=False)
    layer(xp.ones((2, 5), np.float32))
    assert layer.num_features == 5
