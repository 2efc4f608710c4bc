"""Calls that cannot be computed raise, say what was expected and what was given, and leave every array as it was."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cupybn.functional as F
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tests.reference import DTYPES, arguments, bits, exactly

SHAPE = (4, 3, 5)
VECTORS = ("running_mean", "running_var", "weight", "bias")
FLOATS = ("float16", "bfloat16", "float32", "float64")
FUNCTIONS = [F.batch_norm, F.batch_norm_vjp]
BOTH_MODES = pytest.mark.parametrize("training", [True, False])
CALLS = ["forward", "vjp"]


def call(xp, rng, shape=SHAPE, **changes):
    """The keyword arguments of a call that would work without the changes."""
    return arguments(xp, rng, shape) | changes


def fails(error, function, *args, match=None, watch=(), **kwargs):
    """Check that a call raises and changes none of its arrays, nor those in `watch`. Returns the message."""
    arrays = [array for array in (*args, *kwargs.values(), *watch) if hasattr(array, "tobytes")]
    before = bits(*arrays)
    with pytest.raises(error, match=match) as raised:
        function(*args, **kwargs)
    assert raised.type is error
    assert bits(*arrays) == before
    return str(raised.value)


def fails_in_layer(error, layer, x, *args, match=None):
    """Check, like `fails`, both calls of a layer and all arrays that it holds."""
    state, attributes = list(layer.state_dict().values()), dict(vars(layer))
    for name in CALLS:
        message = fails(error, getattr(layer, name), x, *args, match=match, watch=state)
    assert all(vars(layer)[name] is value for name, value in attributes.items())
    return message


def other_kind(array):
    """An array like this one, of the library's other kind: for a NumPy array, an object that passes for CuPy's."""
    if not isinstance(array, np.ndarray):
        return array.get()
    members = {"__module__": "cupy", "__cuda_array_interface__": {}}
    fake = type("ndarray", (), members)()
    fake.device = type("Device", (), {"id": 0})()
    for name in ("dtype", "shape", "ndim", "size", "strides"):
        setattr(fake, name, getattr(array, name))
    return fake


NOT_ARRAYS = {
    "list": lambda array: array.tolist(),
    "tuple": lambda array: tuple(array.tolist()),
    "float": lambda _: 1.0,
    "float32": lambda _: np.float32(1),
    "str": lambda _: "array",
    "MaskedArray": lambda array: np.ma.masked_less(np.ones(array.shape, np.float32), 0),
    "memoryview": lambda array: memoryview(np.ones(array.shape, np.float32)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds, devices and dtypes


@BOTH_MODES
@pytest.mark.parametrize("name", ["input", *VECTORS, "residual", "out"])
@pytest.mark.parametrize(("given", "make"), NOT_ARRAYS.items(), ids=NOT_ARRAYS)
def test_not_an_array(xp, rng, name, given, make, training):
    kwargs = call(xp, rng, training=training)
    kwargs[name] = make(kwargs[name if name != "out" else "input"])
    for function in FUNCTIONS[: 1 if name == "out" else 2]:
        message = fails(TypeError, function, **kwargs)
        assert re.search(rf"{name}\b.*NumPy.*CuPy.*\b{given}\b", message)


def test_input_none(xp, rng):
    for function in FUNCTIONS:
        fails(TypeError, function, match="input.*NumPy.*CuPy.*NoneType", **call(xp, rng, input=None))
    fails(TypeError, F.moments, None, match="input.*NumPy.*CuPy.*NoneType")


@BOTH_MODES
@pytest.mark.parametrize("name", [*VECTORS, "residual", "out"])
def test_mixed_kinds(xp, rng, name, training):
    kwargs = call(xp, rng, training=training)
    kwargs[name] = other_kind(kwargs[name if name != "out" else "input"])
    message = fails(TypeError, F.batch_norm, **kwargs)
    assert re.search(rf"{name}\b.*(NumPy.*CuPy|CuPy.*NumPy)", message)


@BOTH_MODES
def test_input_of_another_kind_than_the_vectors(xp, rng, training):
    kwargs = call(xp, rng, residual=None, training=training)
    kwargs["input"] = other_kind(kwargs["input"])
    for function in FUNCTIONS:
        assert re.search("NumPy.*CuPy|CuPy.*NumPy", fails(TypeError, function, **kwargs))


@BOTH_MODES
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64", "complex128", "object", "longdouble"])
@pytest.mark.parametrize("name", ["input", *VECTORS, "residual", "out"])
def test_dtypes_that_are_none_of_the_four(xp, rng, name, dtype, training):
    if xp is not np and dtype in ("object", "longdouble"):
        pytest.skip("CuPy has no such arrays")
    kwargs = call(xp, rng, training=training)
    kwargs[name] = xp.ones(kwargs[name if name != "out" else "input"].shape, np.dtype(dtype))
    for function in FUNCTIONS[: 1 if name == "out" else 2]:
        message = fails(TypeError, function, **kwargs)
        assert name in message
        assert np.dtype(dtype).name in message
        assert any(float_name in message for float_name in FLOATS)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_message_lists_the_dtypes(xp, device, rng, dtype):
    x = xp.ones(SHAPE, dtype)
    for message in (
        fails(TypeError, F.batch_norm, **call(xp, rng, input=x)),
        fails(TypeError, F.moments, x),
        fails_in_layer(TypeError, BatchNorm1d(3, device=device), x),
    ):
        assert all(name in message for name in (*FLOATS, dtype))


@pytest.mark.parametrize(("given", "make"), NOT_ARRAYS.items(), ids=NOT_ARRAYS)
def test_not_an_array_in_moments_and_layers(xp, device, rng, given, make):
    x = arguments(xp, rng, SHAPE)["input"]
    layer = BatchNorm1d(3, device=device)
    pattern = rf"input\b.*NumPy.*CuPy.*\b{given}\b"
    fails(TypeError, F.moments, make(x), match=pattern)
    fails_in_layer(TypeError, layer, make(x), match=pattern)
    fails_in_layer(TypeError, layer, x, make(x), match=pattern.replace("input", "residual"))


@BOTH_MODES
def test_input_of_another_kind_than_the_layer(xp, device, rng, training):
    layer = BatchNorm1d(3, device=device).train(training)
    x = arguments(xp, rng, SHAPE)["input"]
    for args in ((other_kind(x),), (x, other_kind(x))):
        assert re.search("NumPy.*CuPy|CuPy.*NumPy", fails_in_layer(TypeError, layer, *args))


@pytest.mark.parametrize("dtype", [np.int32, "complex64", "U3", object, np.longdouble], ids=str)
def test_dtype_of_a_layer(dtype):
    with pytest.raises(TypeError, match=", ".join(FLOATS)):
        BatchNorm1d(3, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and axes


@pytest.mark.parametrize(
    ("cls", "ranks", "expected"),
    [(BatchNorm1d, (2, 3), "2D or 3D"), (BatchNorm2d, (4,), "4D"), (BatchNorm3d, (5,), "5D")],
)
@pytest.mark.parametrize("rank", range(7))
@BOTH_MODES
def test_rank(xp, device, cls, ranks, expected, rank, training):
    layer = cls(3, device=device).train(training)
    x = xp.ones((3,) * rank, np.float32)
    if rank in ranks:
        assert layer(x).shape == x.shape
    else:
        fails_in_layer(ValueError, layer, x, match=exactly(f"expected {expected} input (got {rank}D input)"))


@BOTH_MODES
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_below_two(xp, rng, rank, training):
    x = xp.ones((3,) * rank, np.float32)
    for axis in (-1, 0, 1):
        kwargs = call(xp, rng, input=x, residual=None, channel_axis=axis, training=training)
        for function in FUNCTIONS:
            fails(ValueError, function, match=f"{rank}D", **kwargs)
        fails(ValueError, F.moments, x, channel_axis=axis, match=f"{rank}D")


@BOTH_MODES
@pytest.mark.parametrize("axis", [3, 4, -4, 100])
def test_channel_axis_out_of_range(xp, device, rng, axis, training):
    kwargs = call(xp, rng, training=training) | {"channel_axis": axis}
    pattern = rf"channel_axis.*{axis}"
    for function in FUNCTIONS:
        fails(ValueError, function, match=pattern, **kwargs)
    fails(ValueError, F.moments, kwargs["input"], channel_axis=axis, match=pattern)
    with pytest.raises(ValueError, match=pattern):
        BatchNorm1d(3, device=device, channel_axis=axis)(kwargs["input"])


# ---------------------------------------------------------------------------------------------------------------------
# Channels


@BOTH_MODES
@pytest.mark.parametrize("length", [9, 1, 11, 0])
@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("shape", [(4, 10), (2, 10, 3), (0, 10), (4, 10, 0)], ids=str)
def test_channels(xp, rng, shape, name, length, training):
    kwargs = call(xp, rng, shape, training=training)
    kwargs[name] = xp.ones(length, np.float32)
    for function in FUNCTIONS:
        fails(ValueError, function, match=exactly(f"{name} should contain 10 elements not {length}"), **kwargs)
    only = {"input": kwargs["input"], "training": True, "running_mean": None, "running_var": None}
    if name in ("weight", "bias"):
        for function in FUNCTIONS:
            fails(
                ValueError,
                function,
                match=exactly(f"{name} should contain 10 elements not {length}"),
                **only,
                **{name: kwargs[name]},
            )


def test_channels_on_another_axis(xp, rng):
    """The expected number of channels is that of the channel axis, not of axis 1."""
    kwargs = call(xp, rng, (3, 4, 10), channel_axis=2)
    kwargs["weight"] = xp.ones(4, np.float32)
    for name in ("running_mean", "running_var", "bias"):
        kwargs[name] = xp.ones(10, np.float32)
    fails(ValueError, F.batch_norm, match=exactly("weight should contain 10 elements not 4"), **kwargs)


@BOTH_MODES
@pytest.mark.parametrize(
    ("cls", "shape", "axis"),
    [
        (BatchNorm1d, (5, 7, 3), -1),
        (BatchNorm1d, (3, 7), 0),
        (BatchNorm2d, (2, 5, 5, 3), -1),
        (BatchNorm3d, (2, 5, 3, 5, 5), 2),
    ],
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_layer_names_the_axis_where_its_features_are(xp, device, rng, cls, shape, axis, options, training):
    layer = cls(3, device=device, **options).train(training)
    x = arguments(xp, rng, shape)["input"]
    message = fails_in_layer(ValueError, layer, x)
    assert message.startswith(f"expected 3 channels (num_features) on axis {1 % len(shape)}, got {shape[1]} (")
    assert f"did you mean channel_axis={axis % len(shape)}?" in message
    axis = axis % len(shape)
    assert re.search(rf"axis\D*({axis}|{axis - len(shape)})\b", message)
    assert cls(3, device=device, channel_axis=axis, **options)(x).shape == shape


def test_layer_whose_features_are_on_no_axis(xp, device, rng):
    layer = BatchNorm2d(9, device=device)
    x = arguments(xp, rng, (2, 10, 4, 4))["input"]
    for mode in (True, False):
        message = "expected 9 channels (num_features) on axis 1, got 10"
        fails_in_layer(ValueError, layer.train(mode), x, match=exactly(message))


def test_layer_checks_the_channels_of_an_empty_input(xp, device):
    for mode in (True, False):
        layer = BatchNorm1d(9, device=device).train(mode)
        fails_in_layer(
            ValueError,
            layer,
            xp.ones((0, 10), np.float32),
            match=exactly("expected 9 channels (num_features) on axis 1, got 10"),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Number of values, eps, momentum, buffers


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 10), 1), ((1, 10, 1), 1), ((1, 1, 10), -1), ((10, 1), 0), ((1, 1), 1)]
)
def test_one_value_per_channel(xp, device, rng, shape, axis):
    match = exactly(f"Expected more than 1 value per channel when training, got input size {shape}")
    kwargs = arguments(xp, rng, shape, channel_axis=axis)
    without = kwargs | dict.fromkeys(VECTORS)
    for function in FUNCTIONS:
        fails(ValueError, function, match=match, training=True, **kwargs)
        fails(ValueError, function, match=match, training=True, **without)
    assert F.batch_norm(**kwargs).shape == shape  # eval mode needs no more than one value

    options = {"channel_axis": axis, "device": device}
    to_eval = match[:-1] + re.escape("; did you mean layer.eval()?") + "$"
    layer = BatchNorm1d(shape[axis], **options)
    fails_in_layer(ValueError, layer, kwargs["input"], match=to_eval)
    layer.track_running_stats = False  # frozen statistics, which are used nevertheless
    fails_in_layer(ValueError, layer, kwargs["input"], match=to_eval)
    without_buffers = BatchNorm1d(shape[axis], track_running_stats=False, **options).eval()
    fails_in_layer(ValueError, without_buffers, kwargs["input"], match=match)
    assert BatchNorm1d(shape[axis], **options).eval()(kwargs["input"]).shape == shape


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3, 0), (0, 0)], ids=str)
def test_moments_of_nothing(xp, shape):
    fails(ValueError, F.moments, xp.ones(shape, np.float32), match=re.escape(str(shape)))


@pytest.mark.parametrize("eps", [0.0, 0, -0.0, -1.0, -1e-5, float("nan"), float("-inf")])
@pytest.mark.parametrize("shape", [SHAPE, (0, 3, 5)], ids=str)
def test_eps_in_training(xp, device, rng, eps, shape):
    # The message may show an int as a float.
    match = rf"^batch_norm eps must be positive during training, but got {eps}(\.0)?$"
    kwargs = call(xp, rng, shape, training=True, eps=eps)
    for function in FUNCTIONS:
        fails(ValueError, function, match=match, **kwargs)
    layer = BatchNorm1d(3, eps=eps, device=device)
    fails_in_layer(ValueError, layer, kwargs["input"], match=match)
    without_buffers = BatchNorm1d(3, eps=eps, track_running_stats=False, device=device).eval()
    fails_in_layer(ValueError, without_buffers, kwargs["input"], match=match)


@pytest.mark.parametrize("eps", [-1.0, -1, -1e-5, float("nan"), float("-inf")])
def test_eps_in_eval(xp, device, rng, eps):
    match = rf"^batch_norm eps must be non-negative, but got {eps}(\.0)?$"  # the message may show an int as a float
    kwargs = call(xp, rng, eps=eps)
    for function in FUNCTIONS:
        fails(ValueError, function, match=match, **kwargs)
    fails_in_layer(ValueError, BatchNorm1d(3, eps=eps, device=device).eval(), kwargs["input"], match=match)


@BOTH_MODES
@pytest.mark.parametrize("momentum", [None, "0.1", np.array([0.1]), [0.1], 0.1j], ids=repr)
@pytest.mark.parametrize("buffers", [True, False])
def test_momentum(xp, device, rng, momentum, buffers, training):
    kwargs = call(xp, rng, training=training, momentum=momentum)
    if not buffers:
        kwargs |= {"running_mean": None, "running_var": None, "training": True}
    for function in FUNCTIONS:
        fails(TypeError, function, match="momentum", **kwargs)
    if momentum is not None:
        fails(TypeError, BatchNorm1d, 3, momentum=momentum, device=device, match="momentum")
        layer = BatchNorm1d(3, device=device)
        layer.momentum = momentum
        fails_in_layer(TypeError, layer, kwargs["input"], match="momentum")


@BOTH_MODES
@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_one_buffer_without_the_other(xp, device, rng, given, training):
    match = exactly("running_mean and running_var must either both be None or neither be None")
    absent = {"running_mean": "running_var", "running_var": "running_mean"}[given]
    kwargs = call(xp, rng, training=training) | {absent: None}
    for function in FUNCTIONS:
        fails(ValueError, function, match=match, **kwargs)
    layer = BatchNorm1d(3, device=device).train(training)
    setattr(layer, absent, None)
    fails_in_layer(ValueError, layer, kwargs["input"], match=match)


@pytest.mark.parametrize("shape", [SHAPE, (0, 3)], ids=str)
def test_eval_without_buffers(xp, rng, shape):
    match = r"^running_mean and running_var must be given when training=False \(training defaults to False;"
    for function in FUNCTIONS:
        fails(ValueError, function, match=match, **call(xp, rng, shape, running_mean=None, running_var=None))


# ---------------------------------------------------------------------------------------------------------------------
# residual, out, grad_output


OTHER_SHAPES = [(4, 3), (4, 3, 6), (1, 3, 5), (3, 4, 5), (4, 3, 5, 1), (0, 3, 5), ()]


@BOTH_MODES
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_other_shapes(xp, device, rng, shape, training):
    other = xp.ones(shape, np.float32)
    kwargs = call(xp, rng, training=training)
    pattern = rf"{re.escape(str(SHAPE))}.*{re.escape(str(shape))}"
    for function in FUNCTIONS:
        fails(ValueError, function, match="residual.*" + pattern, **kwargs | {"residual": other})
    fails(ValueError, F.batch_norm, match="out.*" + pattern, out=other, **kwargs)
    layer = BatchNorm1d(3, device=device).train(training)
    fails_in_layer(ValueError, layer, kwargs["input"], other, match="residual.*" + pattern)
    for _, vjp_fn in (F.batch_norm_vjp(**kwargs), layer.vjp(kwargs["input"])):
        arrays = [*(kwargs[name] for name in ("input", *VECTORS)), *layer.state_dict().values()]
        fails(ValueError, vjp_fn, other, match="grad_output.*" + pattern, watch=arrays)


@BOTH_MODES
@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "complex64"])
def test_other_dtypes(xp, device, rng, dtype, training):
    other = xp.ones(SHAPE, dtype)
    kwargs = call(xp, rng, training=training)
    for function in FUNCTIONS:
        fails(TypeError, function, match=f"residual.*float32.*{dtype}", **kwargs | {"residual": other})
    fails(TypeError, F.batch_norm, match=f"out.*float32.*{dtype}", out=other, **kwargs)
    layer = BatchNorm1d(3, device=device).train(training)
    fails_in_layer(TypeError, layer, kwargs["input"], other, match=f"residual.*float32.*{dtype}")
    for _, vjp_fn in (F.batch_norm_vjp(**kwargs), layer.vjp(kwargs["input"])):
        fails(TypeError, vjp_fn, other, match=f"grad_output.*float32.*{dtype}", watch=[kwargs["input"]])


def test_the_two_dtypes_of_16_bits_are_not_one(xp, rng):
    half, brain = (xp.asarray(rng.normal(size=SHAPE).astype(dtype)) for dtype in DTYPES[:2])
    kwargs = call(xp, rng, input=half, residual=None)
    fails(TypeError, F.batch_norm, match=r"residual.*\bfloat16.*bfloat16", **kwargs | {"residual": brain})
    fails(TypeError, F.batch_norm, match=r"out.*\bfloat16.*bfloat16", out=brain, **kwargs)
    fails(TypeError, F.batch_norm_vjp(**kwargs)[1], brain, match=r"grad_output.*\bfloat16.*bfloat16")


@pytest.mark.parametrize(("given", "make"), NOT_ARRAYS.items(), ids=NOT_ARRAYS)
def test_grad_output_of_another_kind(xp, rng, given, make):
    kwargs = call(xp, rng, training=True)
    _, vjp_fn = F.batch_norm_vjp(**kwargs)
    fails(TypeError, vjp_fn, make(kwargs["input"]), match=rf"grad_output\b.*NumPy.*CuPy.*\b{given}\b")
    message = fails(TypeError, vjp_fn, other_kind(kwargs["input"]))
    assert re.search("grad_output.*(NumPy.*CuPy|CuPy.*NumPy)", message)


@BOTH_MODES
def test_arrays_that_are_read_only(rng, training):
    """Read-only arrays, which only NumPy has, may be read; having to write to one is an error before anything is
    written.
    """
    kwargs = call(np, rng, training=training)
    out = np.zeros(SHAPE, np.float32)
    out.flags.writeable = False
    fails(ValueError, F.batch_norm, match="out.*read-only", out=out, **kwargs)
    for name in VECTORS:
        kwargs[name].flags.writeable = False
        if training and name.startswith("running"):
            for function in FUNCTIONS:
                fails(ValueError, function, match=f"{name}.*read-only", **kwargs)
        else:
            assert F.batch_norm(**kwargs).shape == SHAPE
        kwargs[name].flags.writeable = True
    for name in ("input", "residual"):
        kwargs[name].flags.writeable = False
    y, vjp_fn = F.batch_norm_vjp(**kwargs)
    y.flags.writeable = False
    assert vjp_fn(y).input.flags.writeable


def repeated(xp, shape):
    """An array of ones whose elements are all one and the same, and which nothing forbids to write to."""
    if xp is np:
        return np.lib.stride_tricks.as_strided(np.ones(1, np.float32), shape, (0,) * len(shape))
    return xp.broadcast_to(xp.ones(1, np.float32), shape)


@BOTH_MODES
def test_arrays_with_one_memory_for_several_elements(xp, rng, training):
    """Such arrays may be read; to write to one would leave the value of one element in all of them."""
    kwargs = call(xp, rng, training=training)
    match = r"out to have memory for each element \(got strides .*\): use out\.copy\(\)"
    fails(ValueError, F.batch_norm, match=match, out=repeated(xp, SHAPE), **kwargs)
    for name in VECTORS:
        given = kwargs | {name: repeated(xp, kwargs[name].shape)}
        if training and name.startswith("running"):
            for function in FUNCTIONS:
                fails(ValueError, function, match=f"{name} to have memory for each element", **given)
        else:
            expected = F.batch_norm(**kwargs | {name: given[name].copy()})
            assert bits(F.batch_norm(**given)) == bits(expected)
    empty = (2, 3, 0, 4)
    F.batch_norm(**kwargs | {"input": xp.ones(empty, np.float32), "residual": None}, out=repeated(xp, empty))
    if training:  # a stride of 0 says nothing of a single element
        F.batch_norm(xp.ones((4, 1), np.float32), repeated(xp, (1,)), repeated(xp, (1,)), training=True)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_layer_with_an_array_that_is_read_only(rng, name):
    """If one of a layer's three buffers is read-only, none of them moves."""
    layer = BatchNorm1d(3, device="cpu")
    getattr(layer, name).flags.writeable = False
    fails_in_layer(ValueError, layer, arguments(np, rng, SHAPE)["input"], match="read-only")


# ---------------------------------------------------------------------------------------------------------------------
# Names


@BOTH_MODES
@pytest.mark.parametrize("activation", ["ReLU", "gelu", "", 1, True, np.maximum], ids=repr)
def test_activation(xp, device, rng, activation, training):
    for function in FUNCTIONS:
        message = fails(ValueError, function, **call(xp, rng, training=training, activation=activation))
        assert "None" in message
        assert "'relu'" in message
    with pytest.raises(ValueError, match=rf"{re.escape(repr(activation))}.*None.*'relu'"):
        BatchNorm1d(3, activation=activation, device=device)


@pytest.mark.parametrize(
    ("num_features", "error"), [(-1, ValueError), (3.0, TypeError), ("3", TypeError), ([3], TypeError)]
)
def test_num_features(device, num_features, error):
    with pytest.raises(error):
        BatchNorm1d(num_features, device=device)


@pytest.mark.parametrize("mode", ["train", 1, None])
def test_mode_of_train(device, mode):
    layer = BatchNorm1d(3, device=device).eval()
    with pytest.raises(ValueError, match="mode"):
        layer.train(mode)
    assert layer.training is False


@BOTH_MODES
def test_layer_with_one_buffer_without_the_other(xp, device, rng, training):
    """A layer with one buffer without the other is an error, even where the call would use neither."""
    layer = BatchNorm1d(3, device=device, track_running_stats=True).train(training)
    layer.running_var, layer.track_running_stats = None, False
    fails_in_layer(ValueError, layer, call(xp, rng)["input"], match="must either both be None or neither be None")


def test_layer_with_a_weight_of_another_rank(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    layer.weight = xp.ones((3, 1), np.float32)
    fails_in_layer(
        ValueError,
        layer,
        call(xp, rng)["input"],
        match=exactly("expected weight of shape (3,) (got (3, 1)): use weight.reshape(-1)"),
    )


def test_layer_with_a_counter_that_cannot_count_in_place(xp, device, rng):
    """A NumPy scalar as counter is an error: it cannot be counted up in place. `layer.num_batches_tracked + 1` makes
    one.
    """
    layer = BatchNorm1d(3, device=device)
    layer.num_batches_tracked = np.int64(4)
    fails_in_layer(TypeError, layer, call(xp, rng)["input"], match="num_batches_tracked")
    state = {name: xp.full(3, 7.0) for name in VECTORS} | {"num_batches_tracked": np.array(1)}
    fails(TypeError, layer.load_state_dict, state, match="num_batches_tracked", watch=list(layer.state_dict().values()))
    layer.num_batches_tracked = xp.array(4.0)
    fails_in_layer(TypeError, layer, call(xp, rng)["input"], match="num_batches_tracked")


def test_reset_of_an_array_that_is_read_only(rng):
    layer = BatchNorm1d(3, device="cpu")
    layer(rng.standard_normal(SHAPE).astype(np.float32))
    layer.weight.flags.writeable = False
    fails(ValueError, layer.reset_parameters, match="weight", watch=list(layer.state_dict().values()))


@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_numbers_beyond_float(xp, rng, name):
    fails(OverflowError, F.batch_norm, **call(xp, rng, training=True, **{name: 10**400}))


def test_matrix(rng):
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(rng.standard_normal((4, 3)))
    fails(TypeError, F.batch_norm, matrix, None, None, training=True, match="matrix")
