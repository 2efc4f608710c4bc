"""Checkpoints of many layers: what is found in them, and that all layers are loaded or none."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, SyncBatchNorm, find_batch_norms, load_checkpoint
from cupybn._arrays import devices, kinds
from cupybn.models import reading
from tests.checkpoint_files import NAMES, SUFFIXES, a_state, assert_unchanged, keys_of, need, several, snapshot, write
from tests.reference import bits, to_numpy
from tests.test_interrupts import interrupted


def the_state_of(rng, layers, **changes):
    """A state dict with all that these layers expect, and more that is nobody's."""
    own = a_state(rng, layers)
    state = {key: own[key] for key in keys_of(layers)}
    others = {"conv.weight": np.ones((3, 2, 1, 1), np.float32), "blocks": np.ones(4)} if "" not in layers else {}
    return {key: value for key, value in (others | state | changes).items() if value is not None}


def class_of(value):
    """Name of a value's class, as the name of a test."""
    return type(value).__name__


def assert_hold(layers, state):
    for prefix, layer in layers.items():
        for name, array in layer.state_dict().items():
            assert bits(array) == bits(state[prefix + name].astype(array.dtype))


def fails(source, layers, error, **kwargs):
    """Check that loading raises and changes nothing. Returns the message."""
    before = snapshot(layers)
    with pytest.raises(error) as raised:
        load_checkpoint(source, layers, **kwargs)
    assert raised.type is error
    assert_unchanged(layers, before)
    return str(raised.value.args[0])


@pytest.fixture(params=["mapping", *SUFFIXES])
def source(request, tmp_path):
    """A function that gives a state dict as the source of a checkpoint, of each kind."""
    if request.param == "mapping":
        return lambda state: state
    need(request.param)
    return lambda state: write(tmp_path / f"model{request.param}", state)


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_find(rng, source):
    state = {"conv.weight": np.ones((3, 2, 1, 1), np.float32)} | a_state(rng, ["layer1.0.bn1."])
    state |= a_state(rng, ["layer1.0.bn2."], 5, **{"layer1.0.bn2.weight": None, "layer1.0.bn2.bias": None})
    state |= {
        "only.running_mean": np.ones(3),
        "other.running_var": np.ones(3),
        "matrix.running_mean": np.ones((2, 2)),
        "matrix.running_var": np.ones((2, 2)),
        "scalar.running_mean": np.array(1.0),
        "scalar.running_var": np.array(1.0),
        "uneven.running_mean": np.ones(2),
        "uneven.running_var": np.ones(3),
        "own_running_mean": np.ones(2),
        "own_running_var": np.ones(2),
        "none/running_mean": np.ones(0),
        "none/running_var": np.ones(0),
    }
    found = find_batch_norms(source(state))
    assert type(found) is dict
    assert found == {"layer1.0.bn1.": 3, "layer1.0.bn2.": 5, "none/": 0}
    assert all(type(n) is int for n in found.values())
    assert find_batch_norms(source(a_state(rng, [""], 4))) == {"": 4}
    assert find_batch_norms(source({"weight": np.ones(3)})) == {}


@pytest.mark.parametrize("suffix", [".npz", ".pt", None])
def test_they_are_found_in_order(rng, tmp_path, suffix):
    prefixes = ["z.", "layer10.", "layer2.", "a."]
    state = a_state(rng, prefixes)
    assert list(find_batch_norms(write(tmp_path / f"model{suffix}", state) if suffix else state)) == prefixes


class Selective(collections.abc.Mapping):
    """A state dict of which only some entries may be read."""

    def __init__(self, state, readable):
        self.state, self.readable = state, readable

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, key):
        assert key in self.readable
        return self.state[key]


@pytest.mark.parametrize("value", [object(), "text", None, [[1], [2, 3]], np.ones((2, 2))], ids=class_of)
def test_what_is_no_vector_is_not_found(rng, value):
    state = a_state(rng, ["bn1.", "bn2."]) | {"bn1.running_var": value, 4: 4, b"bn3.running_mean": 5, None: 6}
    assert find_batch_norms(state) == {"bn2.": 3}


def test_a_closed_file_is_no_empty_one(rng, tmp_path):
    np.savez(tmp_path / "model.npz", **a_state(rng, ["bn1."]))
    with np.load(tmp_path / "model.npz") as file:
        assert find_batch_norms(file) == {"bn1.": 3}
    with pytest.raises(TypeError, match=r"expected bn1.running_mean .* \(got a closed file\)"):
        find_batch_norms(file)


class Listed:
    """Something that acts like a mapping, with a key that has no hash."""

    def __init__(self, state):
        self.state = state

    def keys(self):
        yield from ([], *self.state)

    def __getitem__(self, key):
        return self.state[key]


def test_keys_without_a_hash(rng):
    state, layer = a_state(rng, ["bn1."]), BatchNorm1d(3, device="cpu")
    assert find_batch_norms(Listed(state)) == {"bn1.": 3}
    load_checkpoint(Listed(state), {"bn1.": layer})
    assert_hold({"bn1.": layer}, state)


def test_finding_reads_running_statistics_alone(rng):
    state = a_state(rng, ["bn1."]) | {"fc.weight": object()}
    assert find_batch_norms(Selective(state, ["bn1.running_mean", "bn1.running_var"])) == {"bn1.": 3}


NESTS = {
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state},
    "two": lambda state: {"model": {"state_dict": state, "config": {"lr": 0.1}}},
    "after a configuration": lambda state: {"state_dict": {"lr": 0.1}, "model": state},
    "before a configuration": lambda state: {"state_dict": state, "model": {"lr": 0.1}},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
@pytest.mark.parametrize("suffix", [None, ".pt"])
def test_a_state_within_a_checkpoint(rng, tmp_path, nest, suffix):
    state = a_state(rng, ["bn1."])
    source, layer = nest(state), BatchNorm1d(3, device="cpu")
    if suffix:
        torch = pytest.importorskip("torch")
        source = tmp_path / "model.pt"
        torch.save(nest({key: torch.from_numpy(np.array(array)) for key, array in state.items()}), source)
    assert find_batch_norms(source) == {"bn1.": 3}
    load_checkpoint(source, {"bn1.": layer})
    assert_hold({"bn1.": layer}, state)
    assert "missing keys: bn2.weight" in fails(source, {"bn1.": layer, "bn2.": BatchNorm1d(3)}, KeyError)
    message = fails(source, {"bn.": BatchNorm1d(3, device="cpu")}, KeyError)  # nothing of the layers is on any level
    assert message.endswith("did you mean prefix='bn1.'?")


def test_the_outer_state_comes_first(rng):
    outer, inner = a_state(rng, ["bn1."]), a_state(rng, ["bn1."], 4)
    assert find_batch_norms(outer | {"model": inner}) == {"bn1.": 3}
    layer = BatchNorm1d(None, device="cpu")
    load_checkpoint(outer | {"model": inner}, {"bn1.": layer})
    assert_hold({"bn1.": layer}, outer)
    load_checkpoint({"bn9.weight": 1, "model": outer}, {"bn1.": layer})
    several = {"model": inner, "model_state_dict": inner, "state_dict": outer}
    assert find_batch_norms(several) == {"bn1.": 3}
    load_checkpoint(several, {"bn1.": layer})


def test_a_checkpoint_within_itself():
    endless = {"epoch": 1}
    endless["model"] = {"state_dict": endless}
    assert find_batch_norms(endless) == {}
    assert "missing keys" in fails(endless, {"bn1.": BatchNorm1d(3, device="cpu")}, KeyError)


def test_hints_do_not_lead_where_was_looked(rng):
    """Errors speak of the level that is most like a state, never of one that has been looked into."""
    state, layers = a_state(rng, ["module.bn1."]), {"bn1.": BatchNorm1d(3, device="cpu")}
    training = {key: {} for key in ["args", "epoch", "optimizer", "scheduler", "best", "loss", "seed"]}
    assert fails(training | {"model": state}, layers, KeyError).endswith("; did you mean prefix='module.bn1.'?")
    for inner in state, {}:
        message = fails({"model": {"state_dict": {"net": inner}}}, layers, KeyError)
        assert message == "missing keys: bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var"
    keras = {"bn1." + name: np.ones(3) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    message = fails({"state_dict": keras, "model": {"lr": 0.1}}, layers, KeyError)
    assert message.endswith("; did you mean names='keras'?")


class Endless:
    """Something that acts like a mapping which holds itself, as a new object each time."""

    made = 0

    def keys(self):
        return ["model", "state_dict"]

    def __getitem__(self, key):
        Endless.made += 1
        if Endless.made > 5000:
            raise KeyError(key)
        return Endless()


def test_a_checkpoint_without_an_end():
    assert find_batch_norms(Endless()) == {}
    assert "missing keys" in fails(Endless(), {"bn1.": BatchNorm1d(3, device="cpu")}, KeyError)
    assert Endless.made < 1000


def test_a_source_that_makes_what_it_is_asked_for(rng):
    """A source is asked for nothing that is not among its keys, which a defaultdict would make."""
    state = collections.defaultdict(dict, a_state(rng, ["bn1."]))
    keys = list(state)
    assert find_batch_norms(state) == {"bn1.": 3}
    load_checkpoint(state, {"bn1.": BatchNorm1d(3, device="cpu")})
    assert list(state) == keys


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded


def test_load(device, rng, source):
    layers = several(device)
    del layers[""]  # under whose prefix all other entries are
    state = the_state_of(rng, layers)
    before = snapshot(layers)[1]
    assert load_checkpoint(source(state), layers) is None
    assert_hold(layers, state)
    assert all(then is None or now is then for now, then in zip(snapshot(layers)[1], before, strict=True))
    assert [layer.device for layer in layers.values()] == [device] * 4


def test_an_empty_prefix_beside_others(device, rng, source):
    layers = several(device)
    state = the_state_of(rng, layers)
    load_checkpoint(source(state), layers)
    assert_hold(layers, state)
    message = fails(source(state | {"extra": np.ones(3), "block.0.bn1.extra": np.ones(3)}), layers, KeyError)
    assert sorted(re.split("[:,;] ", message)) == ["block.0.bn1.extra", "extra", *["unexpected keys"] * 2]


def test_prefixes_that_begin_alike(device, rng):
    """An entry belongs to the layer that expects it, even if it starts with a longer prefix of another one."""
    layers = {prefix: BatchNorm1d(3, device=device) for prefix in ("", "w", "wbn.")}
    state = the_state_of(rng, layers)
    assert {"weight", "wweight", "wbn.weight"} <= set(state)
    load_checkpoint(state, layers)
    assert_hold(layers, state)


def test_entries_of_others_may_be_anything(device, rng):
    layers = {"bn1.": BatchNorm1d(3, device=device), "bn2.": BatchNorm1d(None, device=device)}
    state = the_state_of(rng, layers)
    others = {"bn": object(), "fc.weight": "text", 3: 4, b"bn1.weight": 5, None: 6, "xbn1.weight": 7}
    load_checkpoint(Selective(others | state, state), layers)
    assert_hold(layers, state)


@pytest.mark.parametrize("strict", [True, False])
def test_strict_is_about_the_keys_of_the_layers(device, rng, source, strict):
    layers = {"bn1.": BatchNorm1d(3, device=device), "bn2.": BatchNorm1d(3, device=device)}
    state = the_state_of(rng, layers, **{"bn2.bias": None, "bn1.extra": np.ones(3, np.float32)})
    if strict:
        message = fails(source(state), layers, KeyError)
        assert message == "unexpected keys: bn1.extra; missing keys: bn2.bias"
    else:
        load_checkpoint(source(state), layers, strict=False)
        assert_hold(layers, state | {"bn2.bias": np.zeros(3)})


def test_missing_counters_are_no_error(device, rng, source):
    layers = {"bn1.": BatchNorm1d(3, device=device), "bn2.": BatchNorm1d(3, device=device)}
    layers["bn1."].num_batches_tracked[...] = 4
    state = the_state_of(rng, layers, **{"bn1.num_batches_tracked": None})
    load_checkpoint(source(state), layers)
    assert_hold(layers, state | {"bn1.num_batches_tracked": np.array(4)})


@pytest.mark.parametrize("names", ["keras", "chainer", "flax", "onnx"])
def test_names_of_other_frameworks(device, rng, source, names):
    layers = {"net/bn1/": BatchNorm2d(3, device=device), "net/bn2/": BatchNorm2d(None, device=device)}
    source_layer = BatchNorm2d(3, device="cpu")
    state = {}
    for prefix in layers:
        source_layer.load_state_dict(a_state(rng, [""]))
        own = source_layer.state_dict(prefix, "cpu", names)
        state |= {key: a.reshape(1, 3, 1, 1) if a.shape else a for key, a in own.items()}
    load_checkpoint(source(state), layers, names=names)
    for prefix, layer in layers.items():
        for key, array in layer.state_dict(prefix, names=names).items():
            assert bits(array) == bits(state[key])
    message = fails(source(state), layers, KeyError)
    assert message.count(f"; did you mean names={names!r}?") == 2


def test_no_layers(rng, source):
    load_checkpoint(source(a_state(rng, ["bn1."])), {})
    load_checkpoint(source({"a": np.ones(1)}), {})


def test_a_module_as_it_is(device):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)).bfloat16()
    layers = {f"{i}.": BatchNorm2d(3, device=device, dtype="bfloat16") for i in (1, 2)}
    for given in module.state_dict(), dict(module.named_parameters()) | dict(module.named_buffers()):
        assert find_batch_norms(given) == {"1.": 3, "2.": 3}
        with torch.no_grad():
            module[2].weight.mul_(3)
        load_checkpoint(given, layers)
        for key, tensor in module[2].state_dict().items():
            array = to_numpy(getattr(layers["2."], key))
            assert bits(array) == bits(tensor.double().numpy().astype(array.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong, all of it in one error


def test_all_that_is_wrong_is_named(device, rng, source):
    layers = several(device)
    del layers[""]
    changes = {
        "bn1.weight": None,
        "bn1.gamma": np.ones(3),
        "bn1.bias": np.ones(4),
        "block.0.bn1.bias": np.ones((3, 1)),
        "block.0.bn2.num_batches_tracked": np.array(-1),
        "block.0.bn2.running_mean": np.ones(3, np.complex64),
        "block.1.running_var": None,
    }
    message = fails(source(the_state_of(rng, layers, **changes)), layers, KeyError)
    for words in [
        "missing keys: bn1.weight",
        "unexpected keys: bn1.gamma",
        "expected bn1.bias of shape (3,) (got (4,))",
        "expected block.0.bn1.bias of shape (3,) (got (3, 1))",
        "expected block.0.bn2.num_batches_tracked to be a number of batches",
        "expected block.0.bn2.running_mean to be an array of real numbers (got ",
        "missing keys: block.1.running_var",
    ]:
        assert words in message
    assert message.count("expected ") == 5


@pytest.mark.parametrize("strict", [True, False])
def test_the_class_of_the_error(device, rng, source, strict):
    layers = {f"bn{i}.": BatchNorm1d(3, device=device) for i in range(4)}
    shape, kind = {"bn1.bias": np.ones(4)}, {"bn2.bias": np.ones(3, np.complex64)}
    count, missing = {"bn3.num_batches_tracked": np.array(-2)}, {"bn0.bias": None}
    for changes, error in [
        (shape, ValueError),
        (count, ValueError),
        (kind, TypeError),
        (shape | kind, ValueError),
        (shape | kind | missing, KeyError if strict else ValueError),
        (kind | missing, KeyError if strict else TypeError),
    ]:
        message = fails(source(the_state_of(rng, layers, **changes)), layers, error, strict=strict)
        assert message.count("expected ") == len(changes) - (error is KeyError or changes.keys() >= missing.keys())


def test_hints_of_several_layers(device, rng, source):
    layers = {f"bn{i}.": BatchNorm1d(3, device=device) for i in (1, 2)}
    state = a_state(rng, ["module.bn1.", "module.bn2."])
    message = fails(source(state), layers, KeyError)
    assert message == "; ".join(
        f"missing keys: {', '.join(f'bn{i}.{name}' for name in NAMES[:4])}; did you mean prefix='module.bn{i}.'?"
        for i in (1, 2)
    )


def test_an_array_of_a_layer_that_cannot_be_written(rng):
    layers = {f"bn{i}.": BatchNorm1d(3, device="cpu") for i in (1, 2)}
    layers["bn2."].bias.flags.writeable = False
    assert "expected bn2.bias to be writeable" in fails(the_state_of(rng, layers), layers, ValueError)
    layers["bn2."].bias = [1, 2, 3]
    assert "expected bn2.bias to be an array (got list)" in fails(the_state_of(rng, layers), layers, TypeError)
    layers["bn1."].weight.flags.writeable = False
    layers["bn1."].running_var = np.ones((3, 3))
    state = the_state_of(rng, layers, **{"bn2.running_mean": None})
    message = fails(state, layers, KeyError)
    for words in [
        "expected bn1.weight to be writeable",
        "expected bn1.running_var of the layer to have the shape (3,) (got (3, 3))",
        "missing keys: bn2.running_mean",
        "expected bn2.bias to be an array (got list)",
    ]:
        assert words in message


# ---------------------------------------------------------------------------------------------------------------------
# All or none


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_an_error_at_any_write(device, rng, monkeypatch, error):
    """An error at whichever copy or write leaves all layers as they were, those without arrays as well."""
    state = the_state_of(rng, several(device))
    calls = 0
    for where in "transfer", "full", "copied", "on_device_of":
        original = getattr(devices, where)
        for most in range(100):
            left, layers = most, several(device)

            def failing(*args, original=original):
                nonlocal left
                left -= 1
                if left == -1:
                    raise error
                return original(*args)

            before = snapshot(layers)
            with monkeypatch.context() as patched:
                patched.setattr(devices, where, failing)
                try:
                    load_checkpoint(state, layers)
                except error:
                    assert_unchanged(layers, before)
                    calls += 1
                    continue
            assert_hold(layers, state)
            break
        else:
            pytest.fail("it never succeeded")
    assert calls > 40


class Refusing(np.ndarray):
    """An array that is written to, and then raises, once: as long as the library writes through its own class."""

    error: type[BaseException] | None = None

    def __setitem__(self, key, value):
        np.ndarray.view(self, np.ndarray)[key] = value
        error, Refusing.error = Refusing.error, None
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("last", NAMES)
def test_an_error_while_an_array_is_written(rng, monkeypatch, error, last):
    monkeypatch.setattr(kinds, "plain", lambda array: array)
    layers = several("cpu")
    state, layer = the_state_of(rng, layers), layers["block.0.bn2."]
    setattr(layer, last, getattr(layer, last).view(Refusing))
    before = snapshot(layers)
    Refusing.error = error
    with pytest.raises(error):
        load_checkpoint(state, layers)
    assert Refusing.error is None
    assert_unchanged(layers, before)
    load_checkpoint(state, layers)
    assert_hold(layers, state)


def test_an_interrupt_at_any_line(device, rng):
    """Ctrl-C at any line of the library leaves all layers as they were, or it comes after the load."""
    state = the_state_of(rng, several(device))
    at, more = 0, True
    while more:
        at, layers = at + 1, several(device)
        before = snapshot(layers)
        more = interrupted(lambda layers=layers: load_checkpoint(state, layers), at)
        if more:
            assert_unchanged(layers, before)
        at += at // 40  # the first lines check each key; near the end all of them matter less than their kinds
    assert at > 100
    assert_hold(layers, state)


def test_layers_that_share_arrays(rng, monkeypatch):
    layer = BatchNorm1d(3, device="cpu")
    layers = {"a.": layer, "b.": SyncBatchNorm.from_batchnorm(layer)}
    state = the_state_of(rng, layers)
    load_checkpoint(state, layers)
    assert_hold({"b.": layer}, state)
    monkeypatch.setattr(kinds, "plain", lambda array: array)
    layer.running_var = layer.running_var.view(Refusing)
    layers["b."].running_var = layer.running_var
    before = snapshot(layers)
    Refusing.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(the_state_of(rng, layers), layers)
    assert_unchanged(layers, before)
    layer.running_var = layers["b."].running_var = np.ones(3, np.float32)
    layers["b."].num_batches_tracked = layer.num_batches_tracked.view(Refusing)  # after all others, written twice then
    before = snapshot(layers)
    Refusing.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(the_state_of(rng, layers), layers)
    assert_unchanged(layers, before)


# ---------------------------------------------------------------------------------------------------------------------
# What is no source, and what are no layers


A_LAYER = BatchNorm1d(3, device="cpu")


@pytest.mark.parametrize("given", [3, None, b"model.npz", [("weight", 1)], np.ones(3), object(), A_LAYER], ids=class_of)
def test_what_is_no_source(given):
    layer = BatchNorm1d(3, device="cpu")
    message = fails(given, {"bn1.": layer}, TypeError)
    assert message.startswith("expected source to be a mapping of names to arrays or the path of a file (got ")
    with pytest.raises(TypeError, match=re.escape(message)):
        find_batch_norms(given)
    assert message.endswith(": use source.state_dict()") == isinstance(given, BatchNorm1d)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([A_LAYER], "expected layers to be a mapping of prefixes to layers (got list)"),
        (None, "expected layers to be a mapping of prefixes to layers (got None)"),
        ("bn1.", "expected layers to be a mapping of prefixes to layers (got 'bn1.')"),
        ({"bn1.": None}, "expected layers['bn1.'] to be a layer of cupybn (got NoneType)"),
        ({"bn1.": BatchNorm1d}, "expected layers['bn1.'] to be a layer of cupybn (got type)"),
        ({"bn1.": {"weight": np.ones(3)}}, "expected layers['bn1.'] to be a layer of cupybn (got dict)"),
        ({3: A_LAYER}, "expected prefix to be a str (got 3)"),
        ({None: A_LAYER}, "expected prefix to be a str (got None)"),
    ],
    ids=class_of,
)
def test_what_are_no_layers(rng, tmp_path, layers, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        load_checkpoint(a_state(rng, ["bn1."]), layers)
    with pytest.raises(TypeError, match=re.escape(message)):
        cupybn.save_checkpoint(tmp_path / "model.npz", layers)
    assert list(tmp_path.iterdir()) == []


class Unreadable(dict):
    """A mapping whose values cannot be read."""

    def __getitem__(self, key):
        raise RuntimeError(key)


def test_arguments_in_the_wrong_order(rng, tmp_path):
    layers = {"bn1.": BatchNorm1d(3, device="cpu")}
    end = r": layers are the second argument$"
    for source in a_state(rng, layers), tmp_path / "model.npz", "model.pt":
        with pytest.raises(TypeError, match=f"expected layers.* to be a .*{end}"):
            load_checkpoint(layers, source)
        with pytest.raises(TypeError, match=f"expected path to be a str or a path .got dict.{end}"):
            cupybn.save_checkpoint(layers, source)
    for other in {}, a_state(rng, layers), Unreadable(a=3):
        with pytest.raises(TypeError, match=r"layers \(got 'bn1.'\)$"):
            load_checkpoint(other, "bn1.")
        with pytest.raises(TypeError, match=r"expected path to be a str or a path \(got \w+\)$|\(got {.*}\)$"):
            cupybn.save_checkpoint(other, layers)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_in_the_place_of_layers(rng):
    with pytest.raises(TypeError, match=r": use \{prefix: layer\}$"):
        load_checkpoint(a_state(rng, [""]), BatchNorm1d(3, device="cpu"))


@pytest.mark.parametrize("features", [3, None])
def test_a_layer_under_two_prefixes(rng, features):
    layer = BatchNorm1d(features, device="cpu")
    layers = {"bn1.": layer, "bn2.": BatchNorm1d(3, device="cpu"), "bn3.": layer}
    message = fails(the_state_of(rng, layers), layers, ValueError)
    assert message == "expected a layer for each prefix (got the same for 'bn1.' and 'bn3.')"


def test_other_arguments(rng):
    layers = {"bn1.": BatchNorm1d(3, device="cpu")}
    state = the_state_of(rng, layers)
    assert "unknown names 'tf'" in fails(state, layers, ValueError, names="tf")
    assert "expected strict to be a bool" in fails(state, layers, TypeError, strict=1)
    with pytest.raises(TypeError):
        load_checkpoint(state, layers, False)


# ---------------------------------------------------------------------------------------------------------------------
# Any state at all

WRONG = {
    "missing": None,
    "longer": np.ones(4, np.float32),
    "matrix": np.ones((3, 1), np.float32),
    "number": np.float32(1),
    "complex": np.ones(3, np.complex64),
    "text": np.array(["a", "b", "c"]),
    "bytes": np.ones(3, "V4"),
    "list": [1.0, 2.0, 3.0],
    "ragged": [[1.0], [2.0, 3.0]],
    "nan": np.full(3, np.nan),
    "object": object(),
}


def fits(key, words):
    """Whether a change of one of these entries leaves a state that loads in strict mode, by the words for its value."""
    if key in ("a.extra", "c.weight", "c.bias"):  # which the layers do not know
        return words == "missing"
    if key.endswith("num_batches_tracked"):
        return words in ("missing", "number")
    return key == "x" or words in ("list", "nan")


def test_any_state_loads_everything_or_nothing():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    keys = [prefix + name for prefix in ("a.", "b.", "c.") for name in NAMES]
    some_keys, some_values = strategies.sampled_from([*keys, "a.extra", "x"]), strategies.sampled_from([*WRONG])
    some_features = strategies.sampled_from([3, None])
    errors = collections.Counter()

    @hypothesis.settings(max_examples=150)
    @hypothesis.given(strategies.dictionaries(some_keys, some_values), strategies.booleans(), some_features)
    def check(changes, strict, features):
        rng = np.random.default_rng(0)
        layers = {"a.": BatchNorm1d(3, device="cpu"), "b.": BatchNorm1d(features, device="cpu")}
        layers["c."] = BatchNorm1d(features, affine=False, device="cpu")
        state = a_state(rng, layers) | {key: WRONG[words] for key, words in changes.items()}
        state = {key: value for key, value in state.items() if value is not None}
        for name in NAMES[:2]:
            if f"c.{name}" not in changes:
                del state[f"c.{name}"]
        before = snapshot(layers)
        try:
            load_checkpoint(state, layers, strict=strict)
        except (KeyError, ValueError, TypeError) as error:
            errors[type(error)] += 1
            assert_unchanged(layers, before)
            assert not all(fits(*change) for change in changes.items())
        else:
            errors[None] += 1
            for prefix, layer in layers.items():
                for name, array in layer.state_dict().items():
                    if prefix + name in state:
                        np.testing.assert_array_equal(to_numpy(array), state[prefix + name])
            assert not strict or features is None or all(fits(*change) for change in changes.items())

    check()
    assert set(errors) == {KeyError, ValueError, TypeError, None}


def test_files_are_read_entry_by_entry(rng, tmp_path, monkeypatch):
    """Only those entries of a file are read that are the layers', and none to find them."""
    read = []
    for reader in reading._Npz, reading._Safetensors:
        original = reader.__getitem__
        monkeypatch.setattr(
            reader, "__getitem__", lambda self, key, original=original: (read.append(key), original(self, key))[1]
        )
    layers = {"bn1.": BatchNorm1d(3, device="cpu"), "bn2.": BatchNorm1d(None, device="cpu")}
    state = the_state_of(rng, layers) | a_state(rng, ["bn3."]) | {"model": np.ones(3, np.float32)}
    for suffix in ".npz", ".safetensors":
        path = write(tmp_path / f"model{suffix}", state)
        read.clear()
        assert list(find_batch_norms(path).values()) == [3, 3, 3]
        assert read == []
        load_checkpoint(path, layers)
        assert sorted(read) == sorted(keys_of(layers))
