"""The layers: which statistics they use and move, what they hold, and how they are copied, reset and shown."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tests.reference import (
    DTYPES,
    arguments,
    assert_close,
    assert_gradients,
    assert_output,
    bits,
    expect,
    moved,
    to_numpy,
)

ARRAYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SHAPES = [(BatchNorm1d, (6, 3)), (BatchNorm1d, (4, 3, 5)), (BatchNorm2d, (2, 3, 4, 5)), (BatchNorm3d, (2, 3, 4, 2, 3))]
FIRST, LAST = [(layer, shape, 1) for layer, shape in SHAPES], [(layer, shape, -1) for layer, shape in SHAPES]

ELSEWHERE = [(BatchNorm1d, (6, 3), 0), (BatchNorm2d, (2, 3, 4, 5), -2)]


def arrays(layer):
    return [getattr(layer, name) for name in ARRAYS]


def fill(layer, xp, rng):
    """Set every array of the layer to values of its own."""
    for name, array in zip(ARRAYS, arrays(layer), strict=True):
        if array is not None:
            values = 5 if name == "num_batches_tracked" else rng.uniform(0.5, 2, array.shape)
            array[...] = xp.asarray(values).astype(array.dtype)
    return layer


def batch(xp, rng, shape, dtype=np.float32):
    return arguments(xp, rng, shape, dtype=dtype)["input"]


def as_call(layer, x, residual=None, training=False):
    """The keyword arguments of the function call that the layer makes."""
    names = ("weight", "bias", "running_mean", "running_var", "eps", "activation", "channel_axis")
    return {name: getattr(layer, name) for name in names} | {"input": x, "residual": residual, "training": training}


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("cls", "shape", "axis"), FIRST + LAST + [(BatchNorm1d, (6, 3), 0), (BatchNorm2d, (2, 3, 4, 5), -2)]
)
def test_output_and_gradients(xp, device, rng, cls, shape, axis, activation):
    layer = cls(shape[axis], eps=0.01, device=device, channel_axis=axis, activation=activation)
    fill(layer, xp, rng)
    x, residual, dy = (batch(xp, rng, shape) for _ in range(3))
    for mode in (True, False):
        layer.train(mode)
        for r in (None, residual):
            expected = expect(as_call(layer, x, r, training=mode), dy)
            running = layer.running_mean, layer.running_var
            wanted = (
                moved(*running, x, channel_axis=axis) if mode else [to_numpy(a).astype(np.float64) for a in running]
            )
            y, vjp_fn = layer.vjp(x, r)
            for now, then in zip(running, wanted, strict=True):
                assert_close(now, then, np.float32)
            grads = vjp_fn(dy)
            assert_output(y, expected, np.float32)
            assert_gradients(grads, expected, np.float32)
            assert [grad is None for grad in grads] == [False, False, False, r is None]
            assert bits(layer(x, r), layer.forward(x, r), layer(x, residual=r)) == 3 * bits(y)
            assert bits(*vjp_fn(dy)) == bits(*grads)
    assert layer.num_batches_tracked == 5 + 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_16_bit_and_64_bit_inputs(xp, device, rng, dtype):
    layer = fill(BatchNorm1d(3, device=device), xp, rng)
    x = batch(xp, rng, (6, 3, 4), dtype)
    expected = expect(as_call(layer, x, training=True))
    y = layer(x)
    assert y.dtype == dtype
    assert layer.weight.dtype == layer.running_var.dtype == np.float32
    assert_output(y, expected, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Which statistics, which update


TABLE = [  # training, tracks, has buffers: whether it normalises with the batch, whether it moves its buffers
    (True, True, True, True, True),
    (True, True, False, True, False),
    (True, False, True, True, False),
    (True, False, False, True, False),
    (False, True, True, False, False),
    (False, False, True, False, False),
    (False, True, False, True, False),
    (False, False, False, True, False),
]


@pytest.mark.parametrize("call", ["forward", "vjp"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("training", "tracks", "has_buffers", "uses_batch", "moves"), TABLE)
def test_which_statistics(xp, device, rng, training, tracks, has_buffers, uses_batch, moves, momentum, call):
    layer = BatchNorm1d(3, momentum=momentum, track_running_stats=has_buffers, device=device).train(training)
    layer.track_running_stats = tracks
    fill(layer, xp, rng)
    x = batch(xp, rng, (6, 3, 4))
    expected = expect(as_call(layer, x, training=uses_batch), x)
    running = layer.running_mean, layer.running_var
    before = bits(*arrays(layer))
    wanted = moved(*running, x, momentum=0.1 if momentum else 1 / 6) if moves else None

    result = getattr(layer, call)(x)

    assert_output(result if call == "forward" else result[0], expected, np.float32)
    if call == "vjp":
        assert_gradients(result[1](x), expected, np.float32)
    if moves:
        assert layer.num_batches_tracked == 6
        for now, then in zip(running, wanted, strict=True):
            assert_close(now, then, np.float32)
        assert bits(layer.weight, layer.bias) == before[:2]
    else:
        assert bits(*arrays(layer)) == before


def test_flag_is_read_at_every_call(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    x = batch(xp, rng, (6, 3))
    layer(x)
    layer.track_running_stats = False
    frozen = bits(*arrays(layer))
    layer(x)
    assert bits(*arrays(layer)) == frozen
    layer.track_running_stats = True
    layer(x)
    assert layer.num_batches_tracked == 2
    assert bits(layer.running_mean) != frozen[2:3]


def test_momentum_is_read_at_every_call(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    layer.momentum = 1.0
    x = batch(xp, rng, (6, 3))
    layer(x)
    assert_close(layer.running_mean, expect({"input": x, "training": True}).mean, np.float32)


@pytest.mark.parametrize("rest", [(), (4,)], ids=["NC", "NCL"])
def test_no_momentum_is_the_mean_over_batches(xp, device, rng, rest):
    layer = BatchNorm1d(3, momentum=None, device=device)
    # Momentum None gives each batch the same weight, whatever its size.
    batches = [batch(xp, rng, (n, 3, *rest)) for n in (2, 9, 4, 3)]
    means, variances = [], []
    for x in batches:
        layer(x)
        mean, var = moved(np.zeros(3), np.zeros(3), x, momentum=1.0)
        means.append(mean)
        variances.append(var)
        assert_close(layer.running_mean, np.mean(means, axis=0), np.float32)
        assert_close(layer.running_var, np.mean(variances, axis=0), np.float32, scale=10)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("momentum", [0.1, None])
def test_counter_set_to_none(xp, device, rng, momentum):
    layer = BatchNorm1d(3, momentum=momentum, device=device)
    layer.num_batches_tracked = None
    x = batch(xp, rng, (6, 3))
    before = bits(layer.running_mean, layer.running_var)
    wanted = moved(layer.running_mean, layer.running_var, x)
    assert_output(layer(x), expect({"input": x, "training": True}), np.float32)
    assert layer.num_batches_tracked is None
    if momentum is None:
        assert bits(layer.running_mean, layer.running_var) == before
    else:
        assert_close(layer.running_mean, wanted[0], np.float32)
        assert_close(layer.running_var, wanted[1], np.float32)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_empty_input_moves_nothing(xp, device, training, momentum):
    layer = BatchNorm1d(3, momentum=momentum, device=device).train(training)
    before = bits(*arrays(layer))
    for shape in (0, 3), (0, 3, 4), (2, 3, 0):
        y, vjp_fn = layer.vjp(xp.zeros(shape, np.float32))
        grads = vjp_fn(y)
        assert y.shape == grads.input.shape == shape
        assert np.all(to_numpy(grads.weight) == 0)
        assert grads.weight.shape == grads.bias.shape == (3,)
    assert bits(*arrays(layer)) == before


def test_vjp_fn_stays_right_when_the_layer_moves_on(xp, device, rng):
    x, dy = batch(xp, rng, (6, 3)), batch(xp, rng, (6, 3))
    for mode in (True, False):
        layer = fill(BatchNorm1d(3, device=device), xp, rng).train(mode)
        expected = expect(as_call(layer, x, training=mode), dy)
        _, vjp_fn = layer.vjp(x)
        layer.train()(5 * x)
        layer.reset_running_stats()
        after = bits(*arrays(layer))
        assert_gradients(vjp_fn(dy), expected, np.float32)
        assert bits(*arrays(layer)) == after


def test_arrays_are_updated_in_place_and_never_replaced(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    own = arrays(layer)
    steps = [
        lambda: layer(batch(xp, rng, (6, 3))),
        lambda: layer.vjp(batch(xp, rng, (6, 3))),
        lambda: layer.load_state_dict({name: 0.5 * array for name, array in layer.state_dict().items()}),
        lambda: layer.reset_running_stats(),
        lambda: layer.load_state_dict({"weight": [1.0, 2.0, 3.0]}, strict=False),
        lambda: layer.reset_parameters(),
        lambda: layer.to(device),
    ]
    for step in steps:
        before = bits(*own)
        step()
        assert all(now is then for now, then in zip(arrays(layer), own, strict=True))
        assert (bits(*own) == before) == (step is steps[-1])


# ---------------------------------------------------------------------------------------------------------------------
# What a layer holds


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_arrays_of_a_fresh_layer(xp, device, dtype):
    layer = BatchNorm2d(4, device=device, dtype=dtype)
    wanted = np.dtype(dtype or np.float32)
    for name, value in zip(ARRAYS[:4], (1, 0, 0, 1), strict=True):
        array = getattr(layer, name)
        assert isinstance(array, xp.ndarray)
        assert (array.shape, array.dtype) == ((4,), wanted)
        assert np.all(to_numpy(array) == value)
    counter = layer.num_batches_tracked
    assert isinstance(counter, xp.ndarray)
    assert (counter.shape, counter.dtype, int(counter)) == ((), np.int64, 0)
    assert isinstance(layer.dtype, np.dtype)
    assert layer.dtype == wanted


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_which_arrays_a_layer_has(xp, device, rng, affine, bias, track):
    layer = BatchNorm1d(3, affine=affine, bias=bias, track_running_stats=track, device=device)
    has = [affine, affine and bias, track, track, track]
    assert [array is not None for array in arrays(layer)] == has
    assert list(layer.state_dict()) == [name for name, there in zip(ARRAYS, has, strict=True) if there]
    named = list(layer.named_parameters())
    assert [name for name, _ in named] == [name for name, there in zip(ARRAYS[:2], has, strict=False) if there]
    parameters = list(layer.parameters())
    assert len(parameters) == len(named)
    for (name, array), parameter in zip(named, parameters, strict=True):
        assert parameter is array is getattr(layer, name)
    fill(layer, xp, rng)
    x = batch(xp, rng, (6, 3))
    expected = expect(as_call(layer, x, training=True), x)
    y, vjp_fn = layer.vjp(x)
    assert_output(y, expected, np.float32)
    assert [grad is not None for grad in vjp_fn(x)] == [True, *has[:2], False]


def test_arguments_stay_readable(device):
    default = BatchNorm2d(4)
    given = BatchNorm3d(5, 0.5, None, False, False, device, np.float16, bias=False, channel_axis=-1, activation="relu")
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "dtype", "channel_axis", "activation")
    assert [getattr(default, name) for name in names] == [4, 1e-5, 0.1, True, True, np.float32, 1, None]
    assert [getattr(given, name) for name in names] == [5, 0.5, None, False, False, np.float16, -1, "relu"]
    assert (default.training, given.training) == (True, True)
    assert given.device == device


def test_signature_is_that_of_torch_and_four_more():
    for cls in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
        parameters = inspect.signature(cls).parameters.values()
        assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
            ("num_features", inspect.Parameter.empty),
            ("eps", 1e-5),
            ("momentum", 0.1),
            ("affine", True),
            ("track_running_stats", True),
            ("device", None),
            ("dtype", None),
        ]
        assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [
            ("bias", True),
            ("channel_axis", 1),
            ("activation", None),
            ("skip_nonfinite", False),
        ]


def test_train_and_eval_return_the_layer(device):
    layer = BatchNorm1d(3, device=device)
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False) is layer
    assert layer.training is False
    assert layer.train(np.True_).training is True


@pytest.mark.parametrize("track", [True, False])
def test_reset(xp, device, rng, track):
    layer, fresh = (BatchNorm1d(3, track_running_stats=track, device=device) for _ in range(2))
    fill(layer, xp, rng)
    filled = bits(*arrays(layer))
    assert layer.reset_running_stats() is None
    assert bits(*arrays(layer)) == filled[:2] + bits(*arrays(fresh))[2:]
    fill(layer, xp, rng)
    assert layer.reset_parameters() is None
    assert bits(*arrays(layer)) == bits(*arrays(fresh))


def test_reset_leaves_frozen_statistics_alone(xp, device, rng):
    """A layer that does not track its statistics leaves them alone when they are reset, as torch's do."""
    layer = fill(BatchNorm1d(3, device=device), xp, rng)
    layer.track_running_stats = False
    before = bits(*arrays(layer))
    layer.reset_parameters()
    assert bits(*arrays(layer))[2:] == before[2:]
    assert bits(*arrays(layer))[:2] == bits(*arrays(BatchNorm1d(3, device=device)))[:2]


# ---------------------------------------------------------------------------------------------------------------------
# repr


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: BatchNorm1d(3),
            "BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        ),
        (
            lambda: BatchNorm2d(64, eps=0.001, momentum=None, bias=False),
            "BatchNorm2d(64, eps=0.001, momentum=None, affine=True, bias=False, track_running_stats=True)",
        ),
        (
            lambda: BatchNorm3d(7, affine=False, track_running_stats=False),
            "BatchNorm3d(7, eps=1e-05, momentum=0.1, affine=False, bias=False, track_running_stats=False)",
        ),
        (
            lambda: BatchNorm2d(8, channel_axis=-1),
            "BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
            "channel_axis=-1)",
        ),
        (
            lambda: BatchNorm1d(8, activation="relu"),
            "BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
            "activation='relu')",
        ),
        (
            lambda: BatchNorm2d(8, channel_axis=3, activation="relu"),
            "BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
            "channel_axis=3, activation='relu')",
        ),
        (
            lambda: BatchNorm2d(None),
            "BatchNorm2d(None, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)",
        ),
    ],
)
def test_repr(layer, text):
    assert repr(layer()) == text


def test_repr_of_a_lazy_layer_that_met_its_input(xp, device):
    layer = BatchNorm1d(None, device=device)
    layer(xp.ones((4, 9), np.float32))
    assert repr(layer) == "BatchNorm1d(9, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"


def test_repr_of_a_layer_whose_bias_was_taken_away(device):
    layer = BatchNorm1d(9, device=device)
    layer.bias = None
    assert repr(layer) == "BatchNorm1d(9, eps=1e-05, momentum=0.1, affine=True, bias=False, track_running_stats=True)"


def test_no_channels_at_all(xp, device):
    layer = BatchNorm1d(0, device=device)
    assert layer.num_features == 0
    assert [array.size for array in arrays(layer)] == [0, 0, 0, 0, 1]
    assert layer(xp.ones((4, 0), np.float32)).shape == (4, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Lazy layers


@pytest.mark.parametrize("call", ["forward", "vjp"])
@pytest.mark.parametrize(("cls", "shape", "axis"), FIRST + LAST)
def test_first_input_settles_a_lazy_layer(xp, device, rng, cls, shape, axis, call):
    layer = cls(None, device=device, channel_axis=axis, dtype=np.float64)
    assert layer.num_features is None
    assert arrays(layer) == [None] * 5
    assert list(layer.parameters()) == []
    twin = cls(shape[axis], device=device, channel_axis=axis, dtype=np.float64)
    x = batch(xp, rng, shape)
    result, wanted = (getattr(one, call)(x) for one in (layer, twin))
    assert layer.num_features == shape[axis]
    assert bits(*arrays(layer)) == bits(*arrays(twin))
    assert bits(*(result if call == "vjp" else [result])[:1]) == bits(*(wanted if call == "vjp" else [wanted])[:1])
    assert layer.weight.dtype == np.float64
    assert repr(layer) == repr(twin)


def test_lazy_layer_in_eval(xp, device, rng):
    x = batch(xp, rng, (6, 3))
    layer = BatchNorm1d(None, device=device).eval()
    assert_close(layer(x), to_numpy(x) / np.sqrt(1 + 1e-5), np.float32)
    assert (layer.num_features, int(layer.num_batches_tracked)) == (3, 0)


BAD_FIRST_CALLS = {
    "one value per channel": lambda xp, layer: layer(xp.ones((1, 3), np.float32)),
    "wrong rank": lambda xp, layer: layer(xp.ones((2, 3, 4, 5), np.float32)),
    "wrong dtype": lambda xp, layer: layer(xp.ones((6, 3), np.int32)),
    "not an array": lambda _, layer: layer([[1.0], [2.0]]),
    "residual of another shape": lambda xp, layer: layer(xp.ones((6, 3), np.float32), xp.ones((6, 2), np.float32)),
    "vjp": lambda xp, layer: layer.vjp(xp.ones((1, 3), np.float32)),
}


@pytest.mark.parametrize("bad_call", BAD_FIRST_CALLS.values(), ids=BAD_FIRST_CALLS)
def test_first_call_that_raises_leaves_a_layer_lazy(xp, device, rng, bad_call):
    layer = BatchNorm1d(None, device=device)
    with pytest.raises((TypeError, ValueError)):
        bad_call(xp, layer)
    assert layer.num_features is None
    assert arrays(layer) == [None] * 5
    layer(batch(xp, rng, (6, 4)))
    assert layer.num_features == 4


def test_empty_input_settles_a_lazy_layer(xp, device):
    layer = BatchNorm1d(None, device=device)
    layer(xp.ones((0, 3), np.float32))
    assert bits(*arrays(layer)) == bits(*arrays(BatchNorm1d(3, device=device)))
    assert layer.num_features == 3


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_state_dict_settles_a_lazy_layer(xp, device, rng, options):
    source = fill(BatchNorm1d(3, device=device, **options), xp, rng)
    layer = BatchNorm1d(None, device=device, **options)
    assert layer.state_dict() == {}
    layer.load_state_dict(source.state_dict())
    assert layer.num_features == 3
    assert bits(*arrays(layer)) == bits(*arrays(source))
    own = arrays(layer)
    layer(batch(xp, rng, (6, 3)))
    assert all(now is then for now, then in zip(arrays(layer), own, strict=True))


def test_reset_of_a_lazy_layer_does_nothing(device):
    layer = BatchNorm1d(None, device=device)
    layer.reset_running_stats()
    layer.reset_parameters()
    assert arrays(layer) == [None] * 5


@pytest.mark.parametrize("num_features", [None, 3])
def test_layer_without_arrays_accepts_any_channel_count(xp, device, rng, num_features):
    layer = BatchNorm1d(num_features, affine=False, track_running_stats=False, device=device)
    for channels in (3, 5, 1):
        x = batch(xp, rng, (6, channels))
        for mode in (True, False):
            assert_output(layer.train(mode)(x), expect({"input": x, "training": True}), np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Copies


COPIES = {"pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(xp, device, rng, duplicate, dtype):
    layer = BatchNorm2d(3, 0.5, None, device=device, dtype=dtype, bias=False, channel_axis=-1, activation="relu")
    fill(layer, xp, rng).eval()
    twin = duplicate(layer)
    assert type(twin) is BatchNorm2d
    assert repr(twin) == repr(layer)
    for name in ("training", "dtype", "device", "momentum", "eps", "num_features", "track_running_stats"):
        assert getattr(twin, name) == getattr(layer, name)
    before = bits(*arrays(layer))
    assert bits(*arrays(twin)) == before
    x = batch(xp, rng, (4, 5, 2, 3))
    assert bits(twin(x)) == bits(layer(x))
    twin.train()(x)
    twin.weight[...] = 9
    assert bits(*arrays(layer)) == before
    assert bits(twin.running_mean) != before[2:3]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_lazy_layer_are_lazy(xp, device, duplicate):
    layer = BatchNorm1d(None, device=device)
    twin = duplicate(layer)
    twin(xp.ones((4, 3), np.float32))
    assert (layer.num_features, twin.num_features) == (None, 3)
    assert arrays(layer) == [None] * 5


# ---------------------------------------------------------------------------------------------------------------------
# no_stats_update


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_stats_update(xp, device, rng, momentum):
    layer = BatchNorm1d(3, momentum=momentum, device=device)
    x = batch(xp, rng, (6, 3))
    before = bits(*arrays(layer))
    with cupybn.no_stats_update():
        y = layer(x)
        layer.vjp(x)
        with cupybn.no_stats_update():
            layer(x)
        layer(x)  # leaving the inner context does not end the outer one
        layer.eval()(x)
        layer.train()
    assert bits(*arrays(layer)) == before
    assert_output(y, expect({"input": x, "training": True}), np.float32)
    layer(x)
    assert layer.num_batches_tracked == 1
    assert bits(*arrays(layer)) != before


def test_no_stats_update_ends_with_an_exception(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    with pytest.raises(ValueError, match="4D"), cupybn.no_stats_update(), cupybn.no_stats_update():
        layer(xp.ones((2, 3, 4, 5), np.float32))
    layer(batch(xp, rng, (6, 3)))
    assert layer.num_batches_tracked == 1


def test_no_stats_update_in_contexts_that_end_in_another_order(xp, device):
    """Contexts that end in another order than they began, as those of generators and tasks do, each end their own
    effect.
    """
    layer, x = cupybn.BatchNorm1d(3, device=device), xp.ones((4, 3), np.float32)

    def generator():
        with cupybn.no_stats_update():
            yield

    first, second = generator(), generator()
    next(first)
    next(second)
    first.close()
    layer(x)
    assert int(layer.num_batches_tracked) == 0
    second.close()
    layer(x)
    assert int(layer.num_batches_tracked) == 1


def test_no_stats_update_holds_for_its_thread_alone(xp, device, rng):
    here, there = (BatchNorm1d(3, device=device) for _ in range(2))
    x = batch(xp, rng, (6, 3))
    thread = threading.Thread(target=there, args=(x,))
    with cupybn.no_stats_update():
        thread.start()
        thread.join()
        here(x)
    assert (int(here.num_batches_tracked), int(there.num_batches_tracked)) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_device_and_to(device):
    layer = BatchNorm1d(3, device=device)
    assert layer.device == device
    own = arrays(layer)
    assert layer.to(device) is layer
    assert all(now is then for now, then in zip(arrays(layer), own, strict=True))
    with pytest.raises(AttributeError):
        layer.device = "cpu"


def test_to_another_device_and_back(rng):
    layer = fill(BatchNorm1d(3, device="cpu", dtype=np.float64), np, rng).eval()
    layer.weight = layer.weight.astype(np.float16)  # an array that the user has set
    held, dtypes = bits(*arrays(layer)), [array.dtype for array in arrays(layer)]
    x = batch(np, rng, (4, 3))
    expected = layer(x)
    for device, module in ("cuda:0", pytest.importorskip("cupy")), ("cpu", np):
        assert layer.to(device) is layer
        assert layer.device == device
        assert all(isinstance(array, module.ndarray) for array in arrays(layer))
        assert [array.dtype for array in arrays(layer)] == dtypes
        assert bits(*arrays(layer)) == held
        np.testing.assert_array_equal(to_numpy(layer(module.asarray(x))), expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cuda 0"])
def test_malformed_device(device, name):
    layer = BatchNorm1d(3, device=device)
    for attempt in (lambda: BatchNorm1d(3, device=name), lambda: layer.to(name)):
        with pytest.raises(ValueError, match="cpu") as error:
            attempt()
        assert "cuda:0" in str(error.value)
        assert repr(name) in str(error.value)
    assert layer.device == device


def test_cuda_without_cupy():
    """A layer on "cuda" raises an error that tells how to install CuPy, which a process of its own hides."""
    code = """
import sys
sys.modules["cupy"] = None
import cupybn
import numpy as np
layer = cupybn.BatchNorm1d(3)
before = layer.weight
for device in "cuda", "cuda:0", "cuda:7":
    for attempt in (lambda: cupybn.BatchNorm1d(3, device=device), lambda: layer.to(device)):
        try:
            attempt()
        except RuntimeError as error:
            for word in "CuPy", "cuda12", "cuda13", device:
                assert word in str(error), error
        else:
            raise SystemExit(f"no error for {device}")
assert layer.device == "cpu" and layer.weight is before and isinstance(before, np.ndarray)
assert layer(np.ones((4, 3), np.float32)).shape == (4, 3)
"""
    root = Path(cupybn.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
