"""The layers of instance, group, layer and RMS norm: what they hold, what they use, their state and text."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm, RMSNorm
from tests.reference import assert_close, bits, exactly, to_numpy
from tests.test_interrupts import check as check_interrupts

INSTANCE_NORMS = {2: InstanceNorm1d, 3: InstanceNorm2d, 4: InstanceNorm3d}
"""Layers of instance norm by the rank of a single sample."""
MAKERS = {
    "InstanceNorm1d": lambda **given: InstanceNorm1d(4, affine=True, track_running_stats=True, **given),
    "GroupNorm": lambda **given: GroupNorm(2, 4, **given),
    "LayerNorm": lambda **given: LayerNorm((4, 3), **given),
    "RMSNorm": lambda **given: RMSNorm((4, 3), **given),
}
"""Layers for inputs of the shape (N, 4, 3), with all that they may have."""
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def draw(xp, rng, shape=(2, 4, 3), dtype=np.float32):
    return xp.asarray((3 + 2 * rng.normal(size=shape)).astype(dtype))


def filled(layer, rng):
    """The layer with random parameters."""
    for parameter in layer.parameters():
        parameter[...] = type_of(parameter)(rng.uniform(0.5, 2, parameter.shape).astype(np.float32))
    return layer


def type_of(array):
    """The function that makes arrays of this kind."""
    if isinstance(array, np.ndarray):
        return np.asarray
    import cupy

    return cupy.asarray


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@makers
def test_calls_are_those_of_the_functions(xp, device, rng, make):
    layer, x, dy = filled(make(device=device), rng), draw(xp, rng), draw(xp, rng)
    parameters = dict(layer.named_parameters())
    vjp = {
        "InstanceNorm1d": lambda: F.instance_norm_vjp(x, **parameters),
        "GroupNorm": lambda: F.group_norm_vjp(x, 2, **parameters),
        "LayerNorm": lambda: F.layer_norm_vjp(x, (4, 3), **parameters),
        "RMSNorm": lambda: F.rms_norm_vjp(x, (4, 3), **parameters),
    }[type(layer).__name__]
    y, vjp_fn = vjp()
    expected = bits(y, *vjp_fn(dy))
    ours, our_vjp_fn = layer.vjp(x)
    assert bits(ours, *our_vjp_fn(dy)) == expected
    assert type(our_vjp_fn(dy)) is type(vjp_fn(dy))
    assert bits(layer(x)) == bits(layer.forward(x)) == expected[:1]
    if type(layer) is not InstanceNorm1d:
        assert bits(layer.eval()(x)) == expected[:1]


@pytest.mark.parametrize("make", [MAKERS["InstanceNorm1d"], MAKERS["GroupNorm"]], ids=["InstanceNorm1d", "GroupNorm"])
def test_residual_and_activation(xp, device, rng, make):
    plain, layer = make(device=device), make(device=device, activation="relu")
    x, residual = draw(xp, rng), draw(xp, rng)
    np.testing.assert_allclose(
        to_numpy(layer(x, residual)), np.maximum(to_numpy(plain(x)) + to_numpy(residual), 0), rtol=1e-5, atol=1e-6
    )
    y, vjp_fn = layer.vjp(x, residual=residual)
    assert bits(vjp_fn(xp.ones_like(x)).residual) == bits((y > 0).astype(np.float32))


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("axis", [1, -1, 2])
@pytest.mark.parametrize("mode", ["rows", "tracking", "eval"])
def test_a_single_sample_stands_for_a_batch_of_one(xp, device, rng, rank, axis, mode):
    shape = (4, 3, 5, 2)[:rank]
    channels = (1, *shape)[axis]
    x = draw(xp, rng, shape)
    layers = [
        INSTANCE_NORMS[rank](
            channels,
            affine=True,
            track_running_stats=mode != "rows",
            channel_axis=axis,
            activation="relu",
            device=device,
        )
        for _ in range(2)
    ]
    if mode == "eval":
        for layer in layers:
            layer.eval().running_mean[...] = 2
    y, vjp_fn = layers[0].vjp(x, x)
    expected, expected_vjp_fn = layers[1].vjp(x[None], x[None])
    assert y.shape == shape
    assert bits(y, *vjp_fn(x)) == bits(expected, *expected_vjp_fn(x[None]))
    assert bits(*layers[0].state_dict().values()) == bits(*layers[1].state_dict().values())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_features_may_come_from_the_first_input(xp, device, rng, batched, axis):
    x = draw(xp, rng)
    channels = x.shape[axis]
    layer = InstanceNorm1d(None, affine=True, track_running_stats=True, channel_axis=axis, device=device)
    assert (layer.num_features, layer.weight) == (None, None)
    layer(x if batched else x[0])
    assert (layer.num_features, layer.weight.shape) == (channels, (channels,))
    assert str(layer).startswith(f"InstanceNorm1d({channels}, ")
    with pytest.raises(ValueError, match=rf"^expected {channels} channels \(num_features\)"):
        layer(xp.zeros((2, 7, 7), np.float32))
    layer = InstanceNorm1d(None, affine=True, device=device)
    with pytest.raises(ValueError, match="spatial"):
        layer(x[..., :1])
    assert (layer.num_features, layer.weight) == (None, None)


@pytest.mark.parametrize("channels", [2, 6])
def test_without_arrays_any_channel_count_will_do(xp, device, rng, channels):
    x = draw(xp, rng, (2, channels, 3))
    assert bits(InstanceNorm1d(4, device=device)(x)) == bits(F.instance_norm(x))
    assert bits(GroupNorm(2, 4, affine=False, device=device)(x)) == bits(F.group_norm(x, 2))
    text = "Expected number of channels in input to be divisible by num_groups, but got input of shape (2, 5, 3) and "
    with pytest.raises(ValueError, match=exactly(f"{text}num_groups=2")):
        GroupNorm(2, 4, affine=False, device=device)(xp.zeros((2, 5, 3), np.float32))


def test_without_arrays_a_layer_takes_either_kind(xp, rng):
    x = draw(xp, rng)
    layers = [InstanceNorm1d(4, device="cpu"), GroupNorm(2, 4, affine=False, device="cpu")]
    layers += [LayerNorm(3, elementwise_affine=False, device="cpu"), RMSNorm(3, elementwise_affine=False, device="cpu")]
    for layer in layers:
        assert type(layer(x)) is type(x)
        assert list(layer.parameters()) == list(layer.state_dict()) == []
        layer.reset_parameters()


@makers
def test_zero_size(xp, device, make):
    layer = make(device=device)
    before = bits(*layer.state_dict().values())
    y, vjp_fn = layer.vjp(xp.zeros((0, 4, 3), np.float32))
    grads = vjp_fn(y)
    assert y.shape == grads.input.shape == (0, 4, 3)
    assert grads.weight.shape == layer.weight.shape
    assert not to_numpy(grads.weight).any()
    assert bits(*layer.state_dict().values()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Which statistics, which update


class Row:
    """A line of the table: mode, flag, whether there are buffers, what the call normalizes with, and what moves."""

    def __init__(self, training, tracks, has_buffers, uses, moves):
        self.training, self.tracks, self.has_buffers, self.uses, self.moves = training, tracks, has_buffers, uses, moves


TABLE = [
    Row(True, True, True, "rows", True),
    Row(True, False, True, "rows", False),
    Row(False, True, True, "buffers", False),
    Row(False, False, True, "rows", False),
    Row(True, True, False, "rows", False),
    Row(True, False, False, "rows", False),
    Row(False, True, False, "rows", False),
    Row(False, False, False, "rows", False),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(str(value) for value in vars(row).values()))
@pytest.mark.parametrize("way", ["forward", "vjp"])
def test_which_statistics(xp, device, rng, row, way):
    layer = InstanceNorm1d(4, track_running_stats=row.has_buffers, device=device)
    layer.track_running_stats = row.tracks
    layer.train(row.training)
    if row.has_buffers:
        layer.running_mean[...], layer.running_var[...] = 1, 4
    x = draw(xp, rng)
    before = bits(*layer.state_dict().values())
    y = layer(x) if way == "forward" else layer.vjp(x)[0]
    mean, var = xp.full(4, 1, np.float32), xp.full(4, 4, np.float32)
    expected = F.instance_norm(x, mean, var, use_input_stats=False) if row.uses == "buffers" else F.instance_norm(x)
    assert bits(y) == bits(expected)
    assert (bits(*layer.state_dict().values()) != before) == row.moves
    if row.has_buffers:
        assert int(layer.num_batches_tracked) == 0
    if row.moves:
        exact = to_numpy(x).astype(np.float64)
        assert_close(layer.running_mean, 0.9 + 0.1 * exact.mean(axis=(0, 2)), np.float32)
        assert_close(layer.running_var, 3.6 + 0.1 * exact.var(axis=2, ddof=1).mean(axis=0), np.float32)


def test_no_stats_update(xp, device, rng):
    layer = InstanceNorm1d(4, track_running_stats=True, momentum=None, device=device)
    before = bits(*layer.state_dict().values())
    with cupybn.no_stats_update():
        layer(draw(xp, rng))  # without a momentum, too, since none is used
    assert bits(*layer.state_dict().values()) == before


def test_frozen_statistics_may_be_weights(xp, device, rng):
    """Buffers that stay in this call may move in a later one, and the way back is right all the same."""
    x, dy = draw(xp, rng), draw(xp, rng)
    layer = InstanceNorm1d(4, affine=True, track_running_stats=True, device=device)
    layer.weight = layer.running_var
    layer.track_running_stats = False
    _, vjp_fn = layer.vjp(x)
    expected = bits(*vjp_fn(dy))
    layer.track_running_stats = True
    layer(x)
    assert bits(*vjp_fn(dy)) == expected


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_one_running_buffer_without_the_other(xp, device, rng, name, training, tracks):
    layer = InstanceNorm1d(4, track_running_stats=True, device=device).train(training)
    layer.track_running_stats = tracks
    setattr(layer, name, None)
    with pytest.raises(ValueError, match=r"^running_mean and running_var must either both be None or neither be None$"):
        layer(draw(xp, rng))


@pytest.mark.parametrize("name", ["training", "track_running_stats"])
def test_flags_are_bools(xp, device, rng, name):
    layer = InstanceNorm1d(4, device=device)
    setattr(layer, name, 1)
    with pytest.raises(TypeError, match=rf"^expected {name} to be a bool"):
        layer(draw(xp, rng))


def test_pytorch_agrees(rng):
    torch = pytest.importorskip("torch")
    x, dy = rng.normal(size=(2, 2, 4, 3))
    for name, make in MAKERS.items():
        given = {"InstanceNorm1d": (4,), "GroupNorm": (2, 4), "LayerNorm": ((4, 3),), "RMSNorm": ((4, 3),)}[name]
        flags = {"affine": True, "track_running_stats": True} if name == "InstanceNorm1d" else {}
        theirs = getattr(torch.nn, name)(*given, **flags, dtype=torch.float64)
        ours = filled(make(device="cpu", dtype=np.float64), rng)
        theirs.load_state_dict({key: torch.tensor(array) for key, array in ours.state_dict().items()})
        for mode in True, False:
            theirs.train(mode)
            y, vjp_fn = ours.train(mode).vjp(x)
            tensor = torch.tensor(x, requires_grad=True)
            output = theirs(tensor)
            np.testing.assert_allclose(y, output.detach().numpy(), rtol=1e-11, atol=1e-12)
            expected = torch.autograd.grad(output, [tensor, *theirs.parameters()], torch.tensor(dy))
            for grad, other in zip(vjp_fn(dy), expected, strict=False):
                np.testing.assert_allclose(grad, other.numpy(), rtol=1e-10, atol=1e-11)
        for key, array in ours.state_dict().items():
            np.testing.assert_allclose(array, theirs.state_dict()[key].numpy(), rtol=1e-12)


@makers
def test_a_captured_graph_computes_anew(rng, make):
    """A graph that has captured a pass and its way back reads the input, and moves statistics, at each launch."""
    cupy = pytest.importorskip("cupy")
    layer, x, dy = make(device="cuda:0"), draw(cupy, rng), draw(cupy, rng)
    layer.vjp(x)[1](dy)  # compiles the kernels
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        y, vjp_fn = layer.vjp(x)
        grads = vjp_fn(dy)
        graph = stream.end_capture()
    buffers = bits(*layer.buffers())
    x[...] = draw(cupy, rng)
    with stream:
        graph.launch(stream)
    stream.synchronize()
    moved = bits(*layer.buffers())
    assert (moved != buffers) == isinstance(layer, InstanceNorm1d)
    with cupybn.no_stats_update():
        expected, vjp_fn = layer.vjp(x)
    assert bits(y, *grads) == bits(expected, *vjp_fn(dy))


@makers
@pytest.mark.usefixtures("fresh_plans")
def test_another_device_than_the_current_one(rng, make):
    cupy = pytest.importorskip("cupy")
    emulator = getattr(cupy, "emulator", None)
    if emulator is None and cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    x, dy = draw(np, rng), draw(np, rng)
    y, vjp_fn = make(device="cpu").vjp(x)
    expected = [array for array in (y, *vjp_fn(dy)) if array is not None]
    with emulator.pretend(emulator.H200, emulator.H200) if emulator else contextlib.nullcontext():
        layer = make(device="cuda:1")
        with cupy.cuda.Device(1):
            x, dy = cupy.asarray(x), cupy.asarray(dy)
        for _ in range(2):  # by steps, then from a tape
            y, vjp_fn = layer.vjp(x)
            results = [array for array in (y, *vjp_fn(dy)) if array is not None]
            assert {array.device.id for array in results} == {1}
        for array, like in zip(results, expected, strict=True):
            np.testing.assert_allclose(to_numpy(array), like, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# State


@makers
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_a_layer_starts_from(device, make, dtype):
    layer = make(device=device, dtype=dtype)
    shape = (4,) if layer.weight.ndim == 1 else (4, 3)
    for name, array in layer.state_dict().items():
        assert array.shape == (() if name == "num_batches_tracked" else shape)
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else dtype)
        assert (to_numpy(array) == (name in ("weight", "running_var"))).all()
    assert (layer.training, layer.device, layer.dtype) == (True, device, dtype)
    assert layer.eval() is layer
    assert (layer.training, layer.train().training) == (False, True)


@makers
def test_state_dicts_are_those_of_pytorch(rng, make):
    torch = pytest.importorskip("torch")
    if "bias" not in inspect.signature(torch.nn.GroupNorm).parameters:
        pytest.skip("a PyTorch whose norms say nothing of a bias")
    for options in {}, {"bias": False}:
        if options and make is MAKERS["RMSNorm"]:
            continue
        layer = filled(make(device="cpu", **options), rng)
        name = type(layer).__name__
        given = {"InstanceNorm1d": (4,), "GroupNorm": (2, 4), "LayerNorm": ((4, 3),), "RMSNorm": ((4, 3),)}[name]
        flags = {"affine": True, "track_running_stats": True} if name == "InstanceNorm1d" else {}
        theirs = getattr(torch.nn, name)(*given, **flags, **options)
        assert str(theirs) == str(layer)
        assert list(theirs.state_dict()) == list(layer.state_dict())
        assert [tuple(a.shape) for a in theirs.state_dict().values()] == [a.shape for a in layer.state_dict().values()]
        assert [key for key, _ in theirs.named_parameters()] == [key for key, _ in layer.named_parameters()]
        assert [key for key, _ in theirs.named_buffers()] == [key for key, _ in layer.named_buffers()]
        other = make(device="cpu", **options)
        other.load_state_dict(theirs.state_dict())
        theirs.load_state_dict({key: torch.tensor(array) for key, array in layer.state_dict().items()})
        layer.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (InstanceNorm1d(3, device="cpu"), "InstanceNorm1d(3, eps=1e-05, momentum=0.1, affine=False, bias=False, "
         "track_running_stats=False)"),
        (InstanceNorm2d(3, affine=True, activation="relu", channel_axis=-1, device="cpu"),
         "InstanceNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=False, "
         "channel_axis=-1, activation='relu')"),
        (InstanceNorm3d(None, affine=True, bias=False, device="cpu"), "InstanceNorm3d(None, eps=1e-05, momentum=0.1, "
         "affine=True, bias=False, track_running_stats=False)"),
        (GroupNorm(2, 4, device="cpu"), "GroupNorm(2, 4, eps=1e-05, affine=True, bias=True)"),
        (GroupNorm(2, 4, affine=False, channel_axis=2, activation="relu", device="cpu"),
         "GroupNorm(2, 4, eps=1e-05, affine=False, bias=False, channel_axis=2, activation='relu')"),
        (LayerNorm(5, device="cpu"), "LayerNorm((5,), eps=1e-05, elementwise_affine=True, bias=True)"),
        (LayerNorm([2, 5], 1e-3, True, False, "cpu"),
         "LayerNorm((2, 5), eps=0.001, elementwise_affine=True, bias=False)"),
        (RMSNorm(5, device="cpu"), "RMSNorm((5,), eps=None, elementwise_affine=True)"),
        (RMSNorm((5,), 1e-6, False, "cpu"), "RMSNorm((5,), eps=1e-06, elementwise_affine=False)"),
    ],
    ids=str,
)  # fmt: skip
def test_text(layer, text):
    assert repr(layer) == str(layer) == text


def test_signatures_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for cls in InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, GroupNorm, LayerNorm, RMSNorm:
        ours = inspect.signature(cls).parameters
        theirs = inspect.signature(getattr(torch.nn, cls.__name__)).parameters
        given = [(name, p.default) for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        expected = [(name, p.default) for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert given == expected
    for name in "instance_norm", "group_norm", "layer_norm", "rms_norm":
        ours = inspect.signature(getattr(F, name)).parameters
        theirs = inspect.signature(getattr(torch.nn.functional, name)).parameters
        assert [key for key, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == list(theirs)
        assert [p.default for p in list(ours.values())[: len(theirs)]] == [p.default for p in theirs.values()]


@makers
def test_settings_stay_readable(device, make):
    layer = make(device=device)
    if isinstance(layer, (LayerNorm, RMSNorm)):
        assert layer.normalized_shape == (4, 3)
        assert layer.elementwise_affine is True
    elif isinstance(layer, GroupNorm):
        assert (layer.num_groups, layer.num_channels, layer.affine, layer.channel_axis) == (2, 4, True, 1)
    else:
        assert (layer.num_features, layer.momentum, layer.affine, layer.track_running_stats) == (4, 0.1, True, True)
    assert layer.eps == (None if isinstance(layer, RMSNorm) else 1e-5)


@makers
def test_copies_and_pickles(xp, device, rng, make):
    layer, x = filled(make(device=device), rng).eval(), draw(xp, rng)
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert str(twin) == str(layer)
        assert (twin.device, twin.training) == (device, False)
        assert bits(twin(x), *twin.state_dict().values()) == bits(layer(x), *layer.state_dict().values())
        twin.weight[...] = 0
        assert to_numpy(layer.weight).all()


@makers
def test_moves_and_dtypes(device, make):
    layer = make(device="cpu")
    weight = layer.weight
    assert layer.to("cpu") is layer
    assert layer.weight is weight
    layer.to(device, np.float64)
    assert (layer.device, layer.dtype, layer.weight.dtype) == (device, np.float64, np.float64)
    assert layer.weight.shape == weight.shape


@makers
def test_reset(device, rng, make):
    layer = filled(make(device=device), rng)
    arrays, expected = layer.state_dict(), bits(*make(device=device).state_dict().values())
    if isinstance(layer, InstanceNorm1d):
        layer.running_mean += 1
        weight = bits(layer.weight)
        layer.reset_running_stats()
        assert bits(layer.weight) == weight
        assert not to_numpy(layer.running_mean).any()
        layer.running_mean += 1
    layer.reset_parameters()
    assert bits(*layer.state_dict().values()) == expected
    assert all(array is arrays[name] for name, array in layer.state_dict().items())


@makers
@pytest.mark.parametrize("names", ["torch", "keras", "flax", "chainer", "onnx"])
def test_names_of_frameworks(device, rng, make, names):
    source, layer = filled(make(device=device), rng), make(device=device)
    layer.load_state_dict(source.state_dict("x.", device="cpu", names=names), prefix="x.", names=names)
    assert bits(*layer.state_dict().values()) == bits(*source.state_dict().values())


@makers
def test_states_that_do_not_fit(device, rng, make):
    layer = filled(make(device=device), rng)
    before = bits(*layer.state_dict().values())
    good = {name: to_numpy(array) for name, array in layer.state_dict().items()}
    missing = {name: array for name, array in good.items() if name != "weight"}
    with pytest.raises(KeyError, match="missing keys: weight"):
        layer.load_state_dict(missing)
    with pytest.raises(KeyError, match="unexpected keys: scale"):
        layer.load_state_dict(good | {"scale": good["weight"]})
    for wrong in good["weight"][:-1], good["weight"][None], good["weight"].reshape(-1, 1):
        with pytest.raises(ValueError, match=rf"^expected weight of shape \({4}, ?3?\) \(got "):
            layer.load_state_dict(good | {"weight": wrong})
    with pytest.raises(KeyError, match=r"did you mean prefix='norm\.'"):
        layer.load_state_dict({f"norm.{name}": array for name, array in good.items()})
    with pytest.raises(KeyError) as caught:  # what has other shapes was not meant
        layer.load_state_dict({f"norm.{name}": np.zeros((3, 4)) for name in good})
    assert "did you mean" not in str(caught.value)
    assert bits(*layer.state_dict().values()) == before
    keys = layer.load_state_dict(missing, strict=False)
    assert keys == (["weight"], [])


def test_the_counter_may_be_missing(device):
    layer = InstanceNorm1d(4, track_running_stats=True, device=device)
    state = {"running_mean": np.ones(4), "running_var": np.ones(4)}
    assert layer.load_state_dict(state) == ([], [])
    assert (int(layer.num_batches_tracked), to_numpy(layer.running_mean).tolist()) == (0, [1] * 4)


def test_old_statistics_are_unexpected(device):
    layer = InstanceNorm1d(4, device=device)
    state = {"running_mean": np.ones(4), "running_var": np.ones(4)}
    with pytest.raises(KeyError, match="unexpected keys: running_mean, running_var"):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["running_mean", "running_var"]


def test_a_state_settles_a_layer(device):
    layer = InstanceNorm1d(None, affine=True, device=device)
    layer.load_state_dict({"weight": np.ones(3), "bias": np.zeros(3)})
    assert (layer.num_features, layer.weight.shape) == (3, (3,))


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_checkpoints(tmp_path, device, rng, suffix):
    """Files hold all of these layers beside batch norm, and parameters of several axes."""
    pytest.importorskip({".npz": "numpy", ".safetensors": "safetensors", ".pt": "torch"}[suffix])
    path = tmp_path / f"model{suffix}"

    def layers(device) -> dict[str, Any]:
        made = {f"block.{name}.": make(device=device) for name, make in MAKERS.items()}
        return made | {"bn.": cupybn.BatchNorm2d(4, device=device)}

    source = {prefix: filled(layer, rng) for prefix, layer in layers(device).items()}
    cupybn.save_checkpoint(path, source)
    loaded = layers("cpu")
    cupybn.load_checkpoint(path, loaded)
    for prefix, layer in source.items():
        assert bits(*loaded[prefix].state_dict().values()) == bits(*layer.state_dict().values())
    assert cupybn.find_batch_norms(path) == {"block.InstanceNorm1d.": 4, "bn.": 4}
    loaded["block.LayerNorm."] = LayerNorm((3, 4), device="cpu")
    with pytest.raises(ValueError, match=r"^expected block.LayerNorm.weight of shape \(3, 4\) \(got \(4, 3\)\)"):
        cupybn.load_checkpoint(path, loaded)


def test_layers_without_arrays_have_nothing_to_save(tmp_path):
    path = tmp_path / "model.npz"
    layers = {"gn.": GroupNorm(2, 4, affine=False, device="cpu"), "in.": InstanceNorm1d(None, device="cpu")}
    cupybn.save_checkpoint(path, layers)
    cupybn.load_checkpoint(path, {"gn.": GroupNorm(2, 4, affine=False, device="cpu")})
    with pytest.raises(ValueError, match=r"^expected layers with arrays"):
        cupybn.save_checkpoint(path, {"in.": InstanceNorm1d(None, affine=True, device="cpu")})


@makers
def test_what_is_for_batch_norm_alone(make):
    layer = make(device="cpu")
    with pytest.raises(TypeError, match="to be a batch norm layer"):
        cupybn.update_bn([layer], [np.zeros((2, 4, 3), np.float32)], layer)
    with pytest.raises(TypeError, match="batch norm layer"):
        cupybn.fold_conv_bn(np.zeros((4, 1, 1, 1), np.float32), None, layer)
    with pytest.raises(TypeError, match="batch norm layer"):
        cupybn.SyncBatchNorm.from_batchnorm(layer)


def test_an_interrupt_at_any_line(rng):
    """A pass moves all running statistics or none; after they have moved, few lines are left."""
    x = draw(np, rng, (6, 3, 4))

    def make():
        layer = InstanceNorm1d(3, affine=True, track_running_stats=True, device="cpu")
        layer.running_mean[...] = 2
        return layer

    check_interrupts(make, lambda layer: layer(x), 20)
    check_interrupts(make, lambda layer: layer.vjp(x, x), 20)
    check_interrupts(lambda: InstanceNorm1d(None, affine=True, device="cpu"), lambda layer: layer(x))


def test_an_interrupt_leaves_a_layer_without_arrays(monkeypatch, rng):
    layer = InstanceNorm1d(None, affine=True, track_running_stats=True, device="cpu")
    from cupybn._calls import within

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(within, "forward_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer(draw(np, rng))
    assert (layer.num_features, layer.weight, layer.running_mean) == (None, None, None)
