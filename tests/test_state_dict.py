"""State dicts: torch's keys, what may be loaded, and that a load which fails changes nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import ml_dtypes
import numpy as np
import pytest

from cupybn import BatchNorm1d, BatchNorm2d, IncompatibleKeys
from tests.reference import DTYPES, bits, to_numpy

ARRAYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def a_state(rng, features=3, prefix="", **changes):
    """A state dict of NumPy arrays, with some entries replaced or, by None, left out."""
    state = {name: rng.uniform(0.5, 2, features).astype(np.float32) for name in ARRAYS[:4]}
    state |= {"num_batches_tracked": np.array(7, np.int64)} | changes
    return {prefix + name: value for name, value in state.items() if value is not None}


def assert_holds(layer, state, prefix=""):
    """Check that the layer's arrays are those of the state, rounded once to the layer's dtype."""
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(to_numpy(array), np.asarray(state[prefix + name]).astype(array.dtype))


def refusal(layer, state, error, **kwargs):
    """Check that loading a state raises and changes nothing. Returns the error."""
    own = layer.state_dict()
    before = bits(*own.values())
    with pytest.raises(error) as raised:
        layer.load_state_dict(state, **kwargs)
    assert raised.type is error
    assert bits(*own.values()) == before
    after = layer.state_dict()
    assert list(after) == list(own)
    assert all(after[name] is array for name, array in own.items())
    return raised.value


def fails(layer, state, error, **kwargs):
    """Check that loading a state raises and changes nothing. Returns the message."""
    return str(refusal(layer, state, error, **kwargs))


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


def test_load_copies_and_returns_the_keys(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng)
    own = layer.state_dict()
    before = bits(*state.values())
    assert layer.load_state_dict(state) == IncompatibleKeys([], [])
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
    """Keys without the prefix belong to others, and are ignored."""
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
    assert layer.load_state_dict(layer.state_dict(prefix="x."), prefix="x.") == ([], [])
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
    """Unexpected entries may be anything when not strict: they are not even asked whether they are arrays."""
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
    first = "2.12" if "bias" in options else None  # the version of torch that added the argument
    torch = pytest.importorskip("torch", minversion=first)
    theirs, ours = torch.nn.BatchNorm2d(3, **options), BatchNorm2d(3, device=device, **options)
    x = rng.normal(3, 2, (4, 3, 5, 5)).astype(np.float32)
    theirs(torch.from_numpy(x))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_holds(ours, theirs.state_dict())

    ours(xp.asarray(x))
    state = {name: torch.from_numpy(to_numpy(array).copy()) for name, array in ours.state_dict().items()}
    theirs.load_state_dict(state)  # strict, as by default
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


def test_no_other_prefix_when_not_strict(device, rng):
    """A caller who allows keys to be missing is not asked whether others were meant, nor are others read for that."""
    state = {"weight": np.ones(4)} | a_state(rng, prefix="bn.")
    message = fails(BatchNorm1d(3, device=device), state, ValueError, strict=False)
    assert message == "expected weight of shape (3,) (got (4,))"
    selective = Selective(a_state(rng, prefix="bn."), state)
    BatchNorm1d(3, device=device).load_state_dict(selective, strict=False)
    assert selective.readable == set(state)


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
    """A value that is no array of numbers is an error that changes nothing, even as the last entry of the state."""
    state = a_state(rng, running_var=None)
    state["running_var"] = value
    layer = BatchNorm1d(3, device=device)
    before = bits(*layer.state_dict().values())
    with pytest.raises((TypeError, ValueError)):
        layer.load_state_dict(state)
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_the_layer_that_is_read_only(rng, name):
    """If an array of the layer is read-only, as from a memory map, none of the arrays is loaded."""
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
    """A lazy layer takes a state of the counter alone when not strict, though that does not tell its features."""
    layer = BatchNorm1d(None, device=device)
    layer.load_state_dict({"num_batches_tracked": np.array(3)}, strict=False)
    layer(xp.ones((2, 5), np.float32))
    assert layer.num_features == 5


# ---------------------------------------------------------------------------------------------------------------------
# What is read


class Selective(Mapping):
    """A state dict that allows each entry to be read once, and only those that a load needs."""

    def __init__(self, state, readable):
        self.state, self.readable = state, set(readable)

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, key):
        self.readable.remove(key)
        return self.state[key]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("features", [3, None])
def test_only_what_is_the_layers_is_read(device, rng, strict, features):
    layer, state = BatchNorm1d(features, device=device), a_state(rng, prefix="bn.")
    others = {"fc.weight": 1, "bn": 2, "weight": 3, "a.bn.weight": 4, 5: 5, b"bn.weight": 6, None: 7, ("bn.",): 8}
    layer.load_state_dict(Selective(others | state, state), strict, "bn.")
    assert_holds(layer, state, "bn.")


def test_unexpected_entries_are_not_read(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng, bias=None, prefix="bn.")
    given = state | {"bn.gamma": 1, "bn.bn.bias": 2}
    layer.load_state_dict(Selective(given, state), strict=False, prefix="bn.")
    assert_holds(layer, state | {"bn.bias": np.zeros(3)}, "bn.")
    state["bn.bias"] = np.ones(3)
    message = fails(layer, Selective(state | given, state), KeyError, prefix="bn.")
    assert message == "'unexpected keys: bn.gamma, bn.bn.bias'"


def test_files_that_hold_what_cannot_be_read(device, rng, tmp_path):
    state = a_state(rng, prefix="bn.")
    np.savez(tmp_path / "state.npz", **state, **{"fc.note": np.array({"lr": 0.1}, dtype=object)})
    layer = BatchNorm1d(3, device=device)
    with np.load(tmp_path / "state.npz") as file:
        layer.load_state_dict(file, prefix="bn.")
        assert_holds(layer, state, "bn.")
        assert "did you mean prefix='bn.'?" in fails(layer, file, KeyError)


def no_memory(*_):
    raise MemoryError("no more")


def test_files_whose_values_cannot_be_read(device, rng, tmp_path, monkeypatch):
    """If a file's values cannot be read, the error names the key."""
    layer = BatchNorm1d(3, device=device)
    np.savez(tmp_path / "objects.npz", **a_state(rng, prefix="bn.") | {"bn.bias": np.array([1, None, 3], dtype=object)})
    with np.load(tmp_path / "objects.npz") as file:
        message = fails(layer, file, TypeError, prefix="bn.")
    assert message.startswith("expected bn.bias to be an array of real numbers (got ValueError: ")
    assert "allow_pickle" in message
    np.savez(tmp_path / "state.npz", **a_state(rng))
    with np.load(tmp_path / "state.npz") as file, monkeypatch.context() as patch:
        patch.setattr(np.lib.npyio.NpzFile, "__getitem__", no_memory)
        assert fails(layer, file, MemoryError) == "no more"  # the machine's fault, not the file's
    message = fails(layer, file, TypeError)
    assert (
        message == "expected weight to be an array of real numbers (got a closed file): load it while the file is open"
    )


@pytest.mark.parametrize("features", [3, None])
def test_files_of_bfloat16(xp, device, rng, tmp_path, features):
    """Files hold bfloat16 as bits without a name, which only layers of bfloat16 load; others do not guess."""
    layer = BatchNorm1d(3, device=device, dtype="bfloat16")
    layer(xp.asarray(rng.standard_normal((4, 3)).astype(np.float32)))
    path = tmp_path / "layer.npz"
    np.savez(path, **{key: a if xp is np else a.get() for key, a in layer.state_dict().items()})
    loaded = BatchNorm1d(features, device=device, dtype="bfloat16")
    with np.load(path) as file:
        loaded.load_state_dict(file)
        message = fails(BatchNorm1d(features, device=device), file, TypeError)
    assert bits(*loaded.state_dict().values()) == bits(*layer.state_dict().values())
    assert message == (
        "expected weight to be an array of real numbers (got dtype |V2): if these are the bits of bfloat16, use "
        ".view(ml_dtypes.bfloat16)"
    )
    mixed = BatchNorm1d(3, device="cpu")
    mixed.weight = mixed.weight.astype(ml_dtypes.bfloat16)
    bias = np.full(3, 1.5, ml_dtypes.bfloat16).view("V2")
    mixed.load_state_dict({"weight": bias}, strict=False)
    assert bits(mixed.weight) == bits(bias.view(ml_dtypes.bfloat16))
    assert "view(ml_dtypes" in fails(mixed, {"bias": bias}, TypeError, strict=False)
    for dtype in "V4", "i1,i1":
        state = a_state(rng, bias=np.zeros(3, dtype))
        assert "view" not in fails(loaded, state, TypeError)


@pytest.mark.parametrize("key", [3, None, b"weight", b"bn.weight", ("weight",), np.int64(1), 2.5], ids=repr)
def test_keys_that_are_no_strings(device, rng, key):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, prefix="bn.")
    layer.load_state_dict({key: object()} | state, prefix="bn.")
    assert_holds(layer, state, "bn.")
    state = {key: object()} | a_state(rng)
    assert fails(layer, state, KeyError) == str(KeyError(f"unexpected keys: {key}"))
    layer.load_state_dict(state, strict=False)
    assert_holds(layer, state)


class Duck:
    """An object that acts like a mapping without being one, as groups of HDF5 files do."""

    def __init__(self, state):
        self.keys, self.get_entry = state.keys, state.__getitem__

    def __getitem__(self, key):
        return self.get_entry(key)


def test_what_acts_like_a_mapping(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng)
    layer.load_state_dict(Duck(state))
    assert_holds(layer, state)
    assert "missing keys: bias" in fails(layer, Duck(a_state(rng, bias=None)), KeyError)


def named(name):
    """A file in memory that has a name, as open files do."""
    file = io.BytesIO()
    file.name = name
    return file


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("bn.npz", "(got 'bn.npz'): load the file first, use numpy.load(path)"),
        (b"bn", "(got b'bn'): load the file first, use numpy.load(path)"),
        (
            PurePosixPath("a.b/bn.pt"),
            "load the file first, use torch.load(path, map_location='cpu', weights_only=True)",
        ),
        ("x.safetensors", "(got 'x.safetensors'): load the file first, use safetensors.numpy.load_file(path)"),
        ([("weight", np.ones(3))], "(got list): use dict(state), if these are pairs"),
        (np.array({"weight": np.ones(3)}, dtype=object), "(got NumPy array): use state.item()"),
        (np.ones(3), "(got NumPy array)"),
        (BatchNorm1d(3, device="cpu"), ": use state.state_dict()"),
        (None, "(got None)"),
        (3, "(got 3)"),
        (io.BytesIO(), ": load the file first, use numpy.load(file)"),
        (named("a.npz"), ": load the file first, use numpy.load(file)"),
        (named("a.pt"), ": load the file first, use torch.load(path, map_location='cpu', weights_only=True)"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_mapping(device, state, end, strict):
    message = fails(BatchNorm1d(3, device=device), state, TypeError, strict=strict)
    assert message.startswith("expected state to be a mapping of names to arrays (got ")
    assert message.endswith(end)


@pytest.mark.parametrize("prefix", [None, b"bn.", 0])
def test_prefixes_that_are_no_strings(device, rng, prefix):
    layer = BatchNorm1d(3, device=device)
    message = f"expected prefix to be a str (got {prefix!r})"
    assert fails(layer, a_state(rng), TypeError, prefix=prefix) == message
    with pytest.raises(TypeError, match=re.escape(message)):
        layer.state_dict(prefix)


class Refusing:
    def __array__(self, *_, **__):
        raise RuntimeError("call detach() first")


@pytest.mark.parametrize(
    ("value", "end"),
    [
        (Refusing(), "(got Refusing: call detach() first)"),
        (np.ma.masked_less([1.0, 2.0, 3.0], 2), ": masks are not supported, use .filled(...)"),
        ("text", "(got dtype <U4)"),
        (None, "(got None)"),
        ([1, None, 3], "(got dtype object)"),
        (type("Tensor", (), {"__dlpack__": None})(), "(got Tensor): use numpy.from_dlpack(bn.bias)"),
    ],
    ids=["Refusing", "masked", "text", "None", "objects", "tensor"],
)
def test_values_that_give_no_array_are_named(device, rng, value, end):
    state = a_state(rng, prefix="bn.") | {"bn.bias": value}
    message = fails(BatchNorm1d(3, device=device), state, TypeError, prefix="bn.")
    assert message.startswith("expected bn.bias to be an array of real numbers")
    assert message.endswith(end)


def test_masks_that_hide_nothing(device, rng):
    layer, state = BatchNorm1d(3, device=device), a_state(rng, bias=np.ma.ones(3))
    layer.load_state_dict(state)
    assert_holds(layer, state)


# ---------------------------------------------------------------------------------------------------------------------
# Counters


NO_COUNTS = {
    "nan": np.nan,
    "inf": np.inf,
    "1e30": 1e30,
    "2**63 as a float": 2.0**63,
    "-5": np.int64(-5),
    "-1 of 8 bits": np.int8(-1),
    "2.7": 2.7,
    "2.5 of 16 bits": np.float16(2.5),
    "0.1 of bfloat16": np.asarray(0.125).astype(DTYPES[1]),
    "2**63": np.uint64(2**63),
    "2**64": 2**64,
    "-2**64": -(2**64),
    "longdouble": np.longdouble(2) ** 80,
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("features", [3, None])
@pytest.mark.parametrize("value", NO_COUNTS.values(), ids=NO_COUNTS)
def test_counters_that_are_no_counts(device, rng, value, features, strict):
    layer = BatchNorm1d(features, device=device)
    state = a_state(rng, prefix="bn.", num_batches_tracked=value)
    message = fails(layer, state, ValueError, strict=strict, prefix="bn.")
    assert message == (
        "expected bn.num_batches_tracked to be a number of batches, a whole one from 0 to 2**63 - 1 "
        f"(got {np.asarray(value).item()})"
    )
    assert layer.num_features is features


def test_a_counter_of_too_many_digits(rng):
    """Python makes no text of an int of so many digits."""
    message = fails(BatchNorm1d(3, device="cpu"), a_state(rng, num_batches_tracked=10**5000), ValueError)
    assert message.endswith("a whole one from 0 to 2**63 - 1 (got int)")


@pytest.mark.parametrize("shape", [(3, 2), (), (1, 3)], ids=str)
def test_a_state_that_tells_a_lazy_layer_no_size(device, rng, shape):
    layer = BatchNorm1d(None, device=device)
    message = fails(layer, a_state(rng) | dict.fromkeys(ARRAYS[:4], np.ones(shape)), ValueError)
    assert message == "; ".join(f"expected {name} of shape (C,) (got {shape})" for name in ARRAYS[:4])


def test_a_hint_at_a_prefix_for_a_layer_of_no_features(rng):
    layer = BatchNorm1d(0, device="cpu")
    state = a_state(rng, prefix="a.")
    assert "did you mean" not in fails(layer, state, KeyError)
    state |= {key: value[:0] for key, value in a_state(rng, prefix="b.").items() if value.shape}
    assert "; did you mean prefix='b.'?" in fails(layer, state, KeyError)


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3), (1,), ()], ids=str)
def test_an_array_of_the_layer_of_another_shape(xp, device, rng, shape):
    """No state is broadcast into an array that has taken the place of a layer's."""
    layer = BatchNorm1d(3, device=device)
    layer.weight = xp.ones(shape, np.float32)
    message = fails(layer, a_state(rng, prefix="bn."), ValueError, prefix="bn.")
    assert message == f"expected bn.weight of the layer to have the shape (3,) (got {shape})"
    layer = BatchNorm1d(3, device=device)
    layer.num_batches_tracked = xp.zeros(3, np.int64)
    assert "expected num_batches_tracked of the layer to have the shape ()" in fails(layer, a_state(rng), ValueError)


@pytest.mark.parametrize("value", [-5, -1, np.nan, 1e30, 2.7])
def test_counters_on_a_device_that_are_no_counts(xp, device, rng, value):
    for here in "cpu", device:
        layer = BatchNorm1d(3, device=here)
        state = a_state(rng, num_batches_tracked=xp.asarray(value))
        assert f"(got {value})" in fails(layer, state, ValueError)


@pytest.mark.parametrize(
    "value", [0, 5.0, -0.0, True, 2**63 - 1, np.uint64(2**63 - 1), 2.0**62, np.asarray(4).astype(DTYPES[1])], ids=repr
)
def test_counters_that_count(xp, device, rng, value):
    layer = BatchNorm1d(3, device=device)
    layer.load_state_dict(a_state(rng, num_batches_tracked=value))
    assert int(layer.num_batches_tracked) == int(value)
    layer.load_state_dict(a_state(rng, num_batches_tracked=0))
    if np.asarray(value).dtype != DTYPES[1]:
        layer.load_state_dict(a_state(rng, num_batches_tracked=xp.asarray(value)))
        assert int(layer.num_batches_tracked) == int(value)


def test_counters_of_layers_without_one_may_be_anything(device, rng):
    layer = BatchNorm1d(3, track_running_stats=False, device=device)
    layer.load_state_dict(a_state(rng, num_batches_tracked=np.nan), strict=False)
    layer = BatchNorm1d(3, device=device)
    layer.num_batches_tracked = None
    layer.load_state_dict(a_state(rng, num_batches_tracked=np.nan), strict=False)


def test_counters_stand_in_one_message_with_all_else(device, rng):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, num_batches_tracked=-1, bias=np.ones(4))
    for error, given in (ValueError, state), (KeyError, state | {"gamma": 1}):
        message = fails(layer, given, error)
        assert "bias of shape (3,) (got (4,))" in message
        assert "(got -1)" in message


# ---------------------------------------------------------------------------------------------------------------------
# What was meant


def states(rng, *prefixes, **changes):
    return {key: value for prefix in prefixes for key, value in a_state(rng, prefix=prefix, **changes).items()}


@pytest.mark.parametrize(
    ("there", "given", "meant"),
    [
        (["module.layers.0.bn."], "", "module.layers.0.bn."),
        (["module.layers.0.bn."], "bn.", "module.layers.0.bn."),
        ([""], "bn.", ""),
        (["bn."], "bn", "bn."),
        (["a.bn1.", "a.bn2.", "b.bn1.", "b.bn2."], "", "a.bn1."),
        (["a.bn1.", "a.bn2.", "b.bn1.", "b.bn2."], "bn2.", "a.bn2."),
        (["a.bn1.", "a.bn2.", "b.bn1.", "b.bn2."], "b.bn2", "b.bn2."),
        (["m.a.bn1.", "m.b.bn1."], "b.bn1.", "m.b.bn1."),
        (["a.bn1.", "b.bn1."], "bn9.", "a.bn1."),
        (["a_"], "", "a_"),
    ],
    ids=str,
)
@pytest.mark.parametrize("features", [3, None])
def test_another_prefix(device, rng, there, given, meant, features):
    layer, state = BatchNorm1d(features, device=device), {"conv.weight": np.ones((3, 3)), 4: 4} | states(rng, *there)
    if there == [""]:
        state = states(rng, "")
    message = fails(layer, state, KeyError, prefix=given)
    assert message.endswith(f"; did you mean prefix={meant!r}?" + message[0])
    layer.load_state_dict(state, prefix=meant)
    assert_holds(layer, state, meant)


@pytest.mark.parametrize(
    "state",
    [
        {"bn.weight": np.ones(3), "bn.bias": np.ones(3)},
        {"bn." + name: np.ones(4) for name in ARRAYS},
        {"bn." + name: np.ones((3, 1)) for name in ARRAYS},
        {"bn." + name: np.ones(3) for name in [*ARRAYS, "gamma"]},
        {"bn." + name: [[1], [2, 3]] for name in ARRAYS},
        {"bn." + name.upper(): np.ones(3) for name in ARRAYS},
    ],
    ids=["missing", "size", "rank", "unexpected", "ragged", "names"],
)
def test_no_other_prefix_fits(device, state):
    assert "did you mean" not in fails(BatchNorm1d(3, device=device), state, KeyError)


def test_no_other_prefix_where_nothing_is_missing(device, rng):
    """An error suggests another prefix only if keys are missing, not for superfluous ones."""
    message = fails(BatchNorm1d(3, device=device), states(rng, "", "bn."), KeyError)
    assert "did you mean" not in message


def test_looking_for_another_prefix_fails_quietly(device, rng):
    state = states(rng, "bn.")
    assert "did you mean" not in fails(BatchNorm1d(3, device=device), Selective(state, []), KeyError)
    assert "did you mean" not in fails(BatchNorm1d(3, device=device), Selective({"model": {}}, []), KeyError)


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_state_within_a_checkpoint(device, rng, name):
    checkpoint = {"epoch": 3, name: a_state(rng)}
    assert f"did you mean state['{name}']?" in fails(BatchNorm1d(3, device=device), checkpoint, KeyError)


def test_keys_of_bytes(device, rng):
    state = {key.encode(): value for key, value in a_state(rng).items()} | {"epoch": 1}
    for prefix in "", "bn.":
        message = fails(BatchNorm1d(3, device=device), state, KeyError, prefix=prefix)
        assert "keys are to be str, not bytes: use key.decode()" in message


@pytest.mark.parametrize("strict", [True, False])
def test_a_prefix_twice_in_a_key(device, rng, strict):
    layer = BatchNorm1d(3, device=device)
    state = a_state(rng, prefix="bn.")
    doubled = {"bn." + key: 2 * value for key, value in state.items()}
    if strict:
        assert "unexpected keys: bn.bn.weight" in fails(layer, state | doubled, KeyError, prefix="bn.")
    else:
        layer.load_state_dict(state | doubled, strict=False, prefix="bn.")
        assert_holds(layer, state, "bn.")
