"""Messages of errors: which argument, what was expected, what was given, and the way out where there is one."""

from __future__ import annotations

import re
import types
from array import array as BuiltinArray
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import cupybn.functional as F
from cupybn import BatchNorm1d, BatchNorm2d, StreamingMoments, SyncBatchNorm
from cupybn._arrays.kinds import show
from cupybn._steps import tiles
from tests.reference import arguments, bits

SHAPE = (4, 3, 5)
FUNCTIONS = [F.batch_norm, F.batch_norm_vjp]


def message_of(error, function, *args, **kwargs):
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    assert raised.type is error
    return str(raised.value)


def cast(kwargs, dtype):
    """The arguments with arrays of another dtype."""
    return {name: a.astype(dtype) if isinstance(a, np.ndarray) else a for name, a in kwargs.items()}


def a_tensor(on=1, **members):
    """An object with DLPack's protocol; device 1 is the host, 2 a GPU."""
    members |= {"__dlpack__": lambda _, **__: None, "__dlpack_device__": lambda _: (on, 0)}
    return type("Tensor", (), members)()


def broken_tensor():
    def lost(_):
        raise RuntimeError("no device")

    return type("Tensor", (), {"__dlpack__": None, "__dlpack_device__": lost})()


# ---------------------------------------------------------------------------------------------------------------------
# What is no array

WAYS_TO_ARRAYS = {
    "tensor": (a_tensor, "(got Tensor): use numpy.from_dlpack({})"),
    "tensor on a GPU": (lambda: a_tensor(on=2), "(got Tensor): use cupy.from_dlpack({})"),
    "tensor on a broken device": (broken_tensor, "(got Tensor): use numpy.from_dlpack({})"),
    "tensor of a tape": (lambda: a_tensor(requires_grad=True), "(got Tensor): use numpy.from_dlpack({}.detach())"),
    "masked": (lambda: np.ma.ones(SHAPE), "(got MaskedArray): use {}.filled(...)"),
    "interface of CUDA": (
        lambda: type("DeviceNDArray", (), {"__cuda_array_interface__": {}})(),
        "(got DeviceNDArray): use cupy.asarray({})",
    ),
    "array protocol": (
        lambda: type("DataFrame", (), {"__array__": None})(),
        "(got DataFrame): use numpy.asarray({}, 'float32')",
    ),
    "list": (lambda: [[1.0]], "(got list): use numpy.asarray({}, 'float32')"),
    "tuple": (lambda: (1.0,), "(got tuple): use numpy.asarray({}, 'float32')"),
    "array of Python": (lambda: BuiltinArray("f", [1.0]), "(got array): use numpy.asarray({}, 'float32')"),
    "text": (lambda: "x", "(got str)"),
    "scalar": (lambda: np.float32(1), "(got float32)"),
}


@pytest.mark.parametrize(("make", "end"), WAYS_TO_ARRAYS.values(), ids=WAYS_TO_ARRAYS)
@pytest.mark.parametrize("name", ["input", "running_mean", "running_var", "weight", "bias", "residual", "out"])
def test_no_array(xp, rng, name, make, end):
    kwargs = arguments(xp, rng, SHAPE) | {name: make()}
    message = message_of(TypeError, F.batch_norm, **kwargs)
    # A conversion would make a copy, and the call would fill that instead of the user's array.
    if name == "out" and "from_dlpack" not in end and "cupy.asarray" not in end:
        end = f"{end.partition(')')[0]}): use {xp.__name__}.empty_like(input)"
    if name == "input" and "filled" in end:
        end += ", and mask= to say where there is data"
    assert message == f"expected {name} to be a NumPy or CuPy array {end.format(name)}"


def test_no_array_of_torch(xp, rng):
    torch = pytest.importorskip("torch")
    x = torch.ones(SHAPE)
    assert message_of(TypeError, F.moments, x).endswith("(got Tensor): use numpy.from_dlpack(input)")
    assert bits(*F.moments(np.from_dlpack(x))) == bits(np.ones(3, np.float32), np.zeros(3, np.float32))
    _, vjp_fn = F.batch_norm_vjp(**arguments(xp, rng, SHAPE))
    message = message_of(TypeError, vjp_fn, x.requires_grad_())
    assert message.endswith(
        "grad_output to be a NumPy or CuPy array (got Tensor): use numpy.from_dlpack(grad_output.detach())"
    )


def test_arrays_in_chunks(xp, rng):
    """The way out for what may be larger than memory does not load it as a whole."""
    stack = type("Array", (), {"__array__": None, "chunks": (1, 3, 5)})()
    for call in F.moments, StreamingMoments().update, lambda x: F.batch_norm(x, None, None, training=True):
        message = message_of(TypeError, call, stack)
        assert message.endswith("(got Array): use numpy.asarray(input[i:j], 'float32'), a chunk at a time")
    kwargs = arguments(xp, rng, SHAPE)
    assert message_of(TypeError, F.batch_norm, **kwargs | {"weight": stack}).endswith("asarray(weight, 'float32')")
    assert message_of(TypeError, F.moments, kwargs["input"], mask=stack).endswith(
        "expected mask to be a NumPy or CuPy array of bool (got Array): use numpy.asarray(mask, bool)"
    )


def test_lists_of_arrays_on_a_gpu(rng):
    cupy = pytest.importorskip("cupy")
    x = arguments(cupy, rng, SHAPE)["input"]
    for given in list(x), [list(row) for row in x], tuple(x):
        message = message_of(TypeError, F.moments, given)
        assert message.endswith(f"(got {type(given).__name__}): use cupy.asarray(input)")
        assert bits(*F.moments(cupy.asarray(given))) == bits(*F.moments(x))
    endless: list[object] = []
    endless.append(endless)
    assert message_of(TypeError, F.moments, endless).endswith("(got list): use numpy.asarray(input, 'float32')")


def test_bits_of_bfloat16(rng):
    """Arrays that NumPy loads as raw bits of bfloat16 work once they are viewed as the message says."""
    kwargs = cast(arguments(np, rng, SHAPE), ml_dtypes.bfloat16)
    for name in "input", "weight", "running_var", "residual":
        given = kwargs | {name: kwargs[name].view("V2")}
        message = message_of(TypeError, F.batch_norm, **given)
        assert message.endswith(f"(got void16): use {name}.view(ml_dtypes.bfloat16)")
        assert bits(F.batch_norm(**given | {name: given[name].view(ml_dtypes.bfloat16)})) == bits(
            F.batch_norm(**kwargs)
        )


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [True, False, np.bool_(True)], ids=str)
def test_a_flag_in_the_place_of_an_array(xp, rng, name, value):
    kwargs = arguments(xp, rng, SHAPE) | {name: value}
    for function in FUNCTIONS:
        message = message_of(TypeError, function, **kwargs)
        assert message.startswith(f"expected {name} to be a NumPy or CuPy array (got bool")
        assert message.endswith(f"); did you mean training={bool(value)}?")
    layer = BatchNorm1d(3, device="cpu" if xp is np else "cuda:0")
    setattr(layer, name, value)
    assert "did you mean" not in message_of(TypeError, layer, kwargs["input"])


def test_a_mask_in_the_place_of_the_residual(xp):
    x, mask = xp.ones(SHAPE, np.float32), xp.ones((4, 5), bool)
    layer = BatchNorm1d(3, device="cpu" if xp is np else "cuda:0")
    for call in layer, layer.vjp, lambda x, mask: F.batch_norm(x, None, None, training=True, residual=mask):
        message = message_of(TypeError, call, x, mask)
        assert message.startswith("expected residual of dtype")
        assert message.endswith("(got bool); did you mean mask=?")


# ---------------------------------------------------------------------------------------------------------------------
# Elements, shapes, devices


@pytest.mark.parametrize(
    ("dtype", "end"),
    [
        ("V2", ": use input.view(ml_dtypes.bfloat16)"),
        ("V4", ""),
        ("i1,i1", ""),
        ("U3", ""),
        ("int64", ": use input.astype(np.float32), or np.float64 for numbers beyond 2**24"),
        ("uint32", ": use input.astype(np.float32), or np.float64 for numbers beyond 2**24"),
        ("uint16", ": use input.astype(np.float32)"),
        ("uint8", ": use input.astype(np.float32)"),
        ("bool", ": use input.astype(np.float32)"),
        (ml_dtypes.float8_e4m3fn, ": use input.astype(np.float32)"),
        ("longdouble", ": use input.astype(np.float64)"),
        ("object", ": use input.astype(np.float32)"),
        ("complex64", ": complex numbers are not supported"),
        ("f4,f4", ""),
    ],
    ids=str,
)
def test_dtypes(dtype, end):
    dtype = np.dtype(dtype)
    message = message_of(TypeError, F.moments, np.ones(SHAPE, dtype))
    assert message == f"expected input of dtype float16, bfloat16, float32, float64 (got {dtype.name}){end}"


@pytest.mark.parametrize(
    ("axes", "shape", "end"),
    [
        (1, (4, 3, 5), "mask.all(1), as all channels share a mask"),
        (1, (1, 3, 1), "mask.all(1), as all channels share a mask"),
        (1, (4, 1, 5), "mask.squeeze(1)"),
        (-1, (4, 3, 1), "mask.squeeze(2)"),
        ((0, 1), (4, 3, 5), "mask.all((0, 1)), as all channels share a mask"),
        ((2, 1), (4, 1, 1), "mask.squeeze((2, 1))"),
        ((2, 1), (4, 1, 5), "mask.all((2, 1)), as all channels share a mask"),
        (1, (4,), "mask[..., None]"),
        (-1, (4,), "mask[..., None]"),
        (1, (3, 5), None),
        (1, (4, 2, 5), None),
        (1, (4, 1, 3), None),
        (1, (3,), None),
    ],
    ids=str,
)
def test_masks_of_another_shape(xp, axes, shape, end):
    """What a message recommends is taken."""
    x, mask = xp.ones(SHAPE, np.float32), xp.ones(shape, bool)
    message = message_of(ValueError, F.moments, x, channel_axis=axes, mask=mask)
    assert message.partition(f"(got {shape})")[2] == ("" if end is None else f": use {end}")
    if end is not None:
        F.moments(x, channel_axis=axes, mask=eval(end.partition(", as")[0], {"mask": mask}))


def test_lengths_as_a_mask(xp):
    module, lengths = xp.__name__, xp.asarray([5, 1, 2, 3])
    for axis, L in (1, 5), (-1, 3):
        message = message_of(TypeError, F.moments, xp.ones(SHAPE, np.float32), channel_axis=axis, mask=lengths)
        way = f"{module}.arange({L}) < mask[:, None]"
        assert message.endswith(f"(got int64): use {way} if these are lengths")
    x = xp.ones((4, 3), np.float32)  # without steps
    assert message_of(TypeError, F.moments, x, mask=lengths).endswith("(got int64): use mask.astype(bool)")


def test_vectors_with_axes_for_broadcasting(xp):
    """Vectors that broadcast against the input are one `reshape` away, which is a view as statistics in place need."""
    x = xp.ones((2, 4, 5), np.float32)
    mean, var = F.moments(x, keepdims=True)
    for shape, end in ((1, 4, 1), ": use running_mean.reshape(-1)"), ((2, 2), ""), ((2, 4), ""), ((), ""):
        message = message_of(ValueError, F.batch_norm, x, xp.ones(shape, np.float32), var)
        assert message == f"expected running_mean of shape (4,) (got {shape}){end}"
    F.batch_norm(x, mean.reshape(-1), var.reshape(-1))


def test_what_is_not_like_input(xp, rng):
    kwargs = arguments(xp, rng, SHAPE)
    module = xp.__name__
    new = f": use {module}.empty_like(input)"
    ends = {
        "residual": [": use residual.astype('float32')", f": use {module}.broadcast_to(residual, (4, 3, 5))"],
        "out": [new, new],
    }
    for name, (of_dtype, of_shape) in ends.items():
        assert message_of(TypeError, F.batch_norm, **kwargs | {name: xp.ones(SHAPE)}).endswith(
            f"(got float64){of_dtype}"
        )
        other = xp.ones((4, 1, 5), np.float32)
        assert message_of(ValueError, F.batch_norm, **kwargs | {name: other}).endswith(f"(got (4, 1, 5)){of_shape}")
        other = xp.ones((4, 2, 5), np.float32)
        message = message_of(ValueError, F.batch_norm, **kwargs | {name: other})
        assert message.endswith(f"(got (4, 2, 5)){new if name == 'out' else ''}")
    assert message_of(TypeError, F.batch_norm, **kwargs, out=xp.ones(SHAPE, int)).endswith(f"(got int64){new}")
    F.batch_norm(**kwargs | {"residual": xp.broadcast_to(xp.ones((4, 1, 5), np.float32), SHAPE)})


@pytest.mark.parametrize(("of_input", "other"), [("<f4", ">f4"), (">f4", "<f4"), (">f4", "<f8"), (">f2", ">f4")])
def test_another_order_of_bytes(rng, of_input, other):
    """An array in another byte order than the input's is refused, and the conversion in the message is accepted."""
    kwargs = cast(arguments(np, rng, SHAPE), of_input)
    _, vjp_fn = F.batch_norm_vjp(**kwargs)
    wrong = kwargs["input"].astype(other)
    calls = {"residual": lambda a: F.batch_norm(**kwargs | {"residual": a}), "grad_output": vjp_fn}
    for name, call in calls.items():
        message = message_of(TypeError, call, wrong)
        assert message.endswith(f": use {name}.astype(input.dtype)")
        call(wrong.astype(kwargs["input"].dtype))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), 1), ((4, 5, 3), -1)], ids=str)
def test_the_order_of_bytes_changes_nothing(rng, dtype, shape, axis):
    """The order of bytes changes no result: outputs have the input's order. CuPy has native arrays alone."""
    kwargs = arguments(np, rng, (4, 3, 5))
    kwargs |= {name: np.moveaxis(kwargs[name], 1, axis) for name in ("input", "residual")}
    results = []
    for order in "<>":
        given = cast(kwargs, order + dtype) | {"training": True, "activation": "relu", "channel_axis": axis}
        output, vjp_fn = F.batch_norm_vjp(**given)
        arrays = [output, given["running_mean"], given["running_var"], *vjp_fn(given["input"])]
        assert {a.dtype for a in arrays if a is not None} == {np.dtype(order + dtype)}
        results.append([None if a is None else a.astype(dtype) for a in arrays])
    assert bits(*results[0]) == bits(*results[1])
    assert output.shape == shape


def test_functions_keep_the_text_of_pytorch(xp, rng):
    """Functions keep PyTorch's text for a wrong number of channels on any axis; layers add the axis."""
    kwargs = arguments(xp, rng, (2, 3, 4, 5))
    for function in FUNCTIONS:
        message = message_of(ValueError, function, **kwargs | {"residual": None, "channel_axis": 3})
        assert message == "running_mean should contain 5 elements not 3"
    kwargs["weight"] = xp.ones(4, np.float32)
    assert message_of(ValueError, F.batch_norm, **kwargs) == "weight should contain 3 elements not 4"


def test_arrays_on_two_devices(rng):
    cupy = pytest.importorskip("cupy")
    kwargs, on_gpu = (arguments(xp, rng, SHAPE) for xp in (np, cupy))
    for name in ("running_mean", "bias", "residual"):
        assert message_of(TypeError, F.batch_norm, **kwargs | {name: on_gpu[name]}) == (
            f"expected {name} to be a NumPy array like input (got a CuPy array on cuda:0): all arrays of a call are on "
            f"one device, use cupy.asarray(input) or cupy.asnumpy({name})"
        )
        assert message_of(TypeError, F.batch_norm, **on_gpu | {name: kwargs[name]}) == (
            f"expected {name} to be a CuPy array on cuda:0 like input (got a NumPy array): all arrays of a call are on "
            f"one device, use cupy.asarray({name}) or cupy.asnumpy(input)"
        )
    message = message_of(TypeError, F.batch_norm, **kwargs, out=on_gpu["input"])
    assert message.endswith("on one device, use numpy.empty_like(input)")


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("features", [3, None])
@pytest.mark.parametrize("training", [True, False])
def test_layers_say_where_they_are(rng, options, features, training):
    cupy = pytest.importorskip("cupy")
    inputs = {"cpu": arguments(np, rng, SHAPE)["input"], "cuda:0": arguments(cupy, rng, SHAPE)["input"]}
    messages = {
        "cpu": "expected input to be a NumPy array, as the layer is on cpu (got a CuPy array on cuda:0): use "
        'cupy.asnumpy(input), or layer.to("cuda:0")',
        "cuda:0": "expected input to be a CuPy array on cuda:0, as the layer is on cuda:0 (got a NumPy array): use "
        'cupy.asarray(input), or layer.to("cpu")',
    }
    for here, there in ("cpu", "cuda:0"), ("cuda:0", "cpu"):
        layer = BatchNorm1d(features, device=here, **options).train(training)
        before = bits(*layer.state_dict().values())
        for call in layer, layer.vjp:
            assert message_of(TypeError, call, inputs[there]) == messages[here]
        assert bits(*layer.state_dict().values()) == before
        if features is not None:
            assert layer.to(there)(inputs[there]).shape == SHAPE


def test_layers_say_where_they_are_of_several_gpus():
    from cupybn._calls import checks

    there = types.SimpleNamespace
    arrays = {i: type("ndarray", (), {"__module__": "cupy"})() for i in range(2)}
    for i, array in arrays.items():
        array.device = there(id=i)
    assert message_of(TypeError, checks.check_beside_layer, arrays[0], arrays[1]) == (
        "expected input to be a CuPy array on cuda:1, as the layer is on cuda:1 (got a CuPy array on cuda:0): use "
        'cupy.asarray(input) within `with cupy.cuda.Device(1)`, or layer.to("cuda:0")'
    )
    assert message_of(TypeError, checks.check_counter, 4, arrays[1]).endswith(
        ": use layer.num_batches_tracked = cupy.asarray(n, 'int64') within `with cupy.cuda.Device(1)`"
    )


def test_layer_with_an_array_of_another_device(xp, device, rng):
    """If an array of the layer is on another device, the message does not blame the input."""
    cupy = pytest.importorskip("cupy")
    layer = BatchNorm1d(3, device=device)
    layer.weight = (cupy if xp is np else np).ones(3, np.float32)
    assert message_of(TypeError, layer, arguments(xp, rng, SHAPE)["input"]).startswith("expected weight to be a ")


def test_layer_with_a_vector_of_another_size(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    layer.weight = xp.ones(4, np.float32)
    message = message_of(ValueError, layer, arguments(xp, rng, SHAPE)["input"])
    assert message == "weight should contain 3 elements not 4"


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 4, 7), 1), ((2, 4, 7, 5), -1), ((2, 4, 5, 7), 2)])
def test_channels_of_a_layer(xp, device, shape, axis):
    layer = BatchNorm2d(3, channel_axis=axis, device=device)
    message = message_of(ValueError, layer, xp.ones(shape, np.float32))
    assert message == f"expected 3 channels (num_features) on axis {axis % 4}, got 5"


def test_a_counter_that_was_replaced(xp, device, rng):
    layer = BatchNorm1d(3, device=device)
    x, n = arguments(xp, rng, SHAPE)["input"], 4
    for wrong, error in (4, TypeError), (xp.asarray(4.0), TypeError), (xp.ones(1, np.int64), ValueError):
        layer.num_batches_tracked = wrong
        message = message_of(error, layer, x)
        assert message.endswith(f": use layer.num_batches_tracked = {xp.__name__}.asarray(n, 'int64')")
        exec(message.partition(": use ")[2], {xp.__name__: xp, "layer": layer, "n": n})
        layer(x)
        assert layer.num_batches_tracked == 5


def test_arrays_that_are_read_only(rng):
    kwargs = arguments(np, rng, SHAPE)
    kwargs["running_var"].flags.writeable = False
    message = message_of(ValueError, F.batch_norm, **kwargs, training=True)
    assert message == "expected running_var to be writeable (got a read-only array): use a writeable one"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and flags


@pytest.mark.parametrize("name", ["num_features", "channel_axis"])
@pytest.mark.parametrize(
    ("value", "end"),
    [
        (3.0, "(got 3.0): use int({})"),
        (np.float32(3), "(got np.float32(3.0)): use int({})"),
        (1.5, "(got 1.5)"),
        (float("nan"), "(got nan)"),
        ("1", "(got '1')"),
        (b"1", "(got b'1')"),
        (True, "(got True)"),
        (np.ones(3), "(got NumPy array)"),
        ({}, "(got {{}})"),
    ],
    ids=repr,
)
def test_whole_numbers(xp, rng, device, name, value, end):
    message = f"expected {name} to be an int {end.format(name)}"
    assert message_of(TypeError, BatchNorm2d, **{"num_features": 3, name: value, "device": device}) == message
    if name == "channel_axis":
        for function in FUNCTIONS:
            assert message_of(TypeError, function, **arguments(xp, rng, SHAPE) | {name: value}) == message
        assert message_of(TypeError, F.moments, xp.ones(SHAPE, np.float32), channel_axis=value) == message
        layer = BatchNorm1d(3, device=device)
        layer.channel_axis = value
        assert message_of(TypeError, layer, xp.ones(SHAPE, np.float32)) == message


@pytest.mark.parametrize("value", [2**60, 10**20, 10**5000], ids=["2**60", "10**20", "10**5000"])
def test_more_features_than_an_array_has(device, value):
    message = message_of(ValueError, BatchNorm1d, value, device=device)
    assert re.fullmatch(r"expected num_features < 2\*\*60 \(got (\d+|int)\)", message)
    assert message_of(ValueError, BatchNorm1d, -value, device=device).startswith("expected num_features >= 0 (got ")


@pytest.mark.parametrize(("cls", "axis", "rank"), [(BatchNorm1d, 3, 3), (BatchNorm1d, -4, 3), (BatchNorm2d, 9, 4)])
def test_an_axis_that_no_input_has(device, cls, axis, rank):
    """An axis that no accepted input has is an error at once; (N, C) and (N, C, L) have different axes."""
    message = message_of(ValueError, cls, 3, channel_axis=axis, device=device)
    assert message == f"expected channel_axis in [{-rank}, {rank}) for {rank}D input (got {axis})"
    assert BatchNorm1d(3, channel_axis=2, device=device).channel_axis == 2
    assert SyncBatchNorm(3, channel_axis=axis, device=device).channel_axis == axis


class Unprintable:
    """An object whose conversion to text raises, as that of an int with too many digits does."""

    def __repr__(self):
        raise RuntimeError("no text")

    __hash__ = object.__hash__


def test_values_without_a_text(xp, rng, device):
    """Values that have no text are shown by their class."""
    kwargs, value = arguments(xp, rng, SHAPE), Unprintable()
    for name in "input", "weight", "residual", "out", "training", "momentum", "eps", "channel_axis":
        assert "(got Unprintable)" in message_of(TypeError, F.batch_norm, **kwargs | {name: value})
    assert "unknown activation Unprintable" in message_of(ValueError, F.batch_norm, **kwargs, activation=value)
    for name in "num_features", "affine", "dtype", "eps":
        options = {"num_features": 3, name: value}
        assert "(got Unprintable)" in message_of(TypeError, BatchNorm1d, **options, device=device)
    assert "unknown device Unprintable" in message_of(ValueError, BatchNorm1d, 3, device=value)
    layer = BatchNorm1d(3, device=device)
    assert "(got Unprintable)" in message_of(TypeError, layer.load_state_dict, value)
    assert "unexpected keys: Unprintable" in message_of(
        KeyError, layer.load_state_dict, layer.state_dict() | {value: 1}
    )


@pytest.mark.parametrize("value", [np.int8(1), np.array(1), np.uint64(1)], ids=repr)
def test_whole_numbers_of_numpy(xp, rng, value):
    assert F.batch_norm(**arguments(xp, rng, SHAPE) | {"channel_axis": value}).shape == SHAPE
    assert type(BatchNorm1d(value, device="cpu").num_features) is int


def test_whole_numbers_on_a_device_are_not_read():
    cupy = pytest.importorskip("cupy")
    message = message_of(TypeError, F.moments, cupy.ones(SHAPE, np.float32), channel_axis=cupy.asarray(1))
    assert message == "expected channel_axis to be an int (got CuPy array on cuda:0)"


def test_several_channel_axes(device):
    message = message_of(TypeError, BatchNorm2d, 3, channel_axis=(1, 2), device=device)
    assert message == (
        "expected channel_axis to be an int (got (1, 2)): make these axes one, use input.transpose(...).reshape(...)"
    )


@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda _: "0.1", "(got '0.1')"),
        (lambda xp: xp.asarray(0.1), "(got {}): use float({{}})"),
        (lambda xp: xp.ones(3), "(got {})"),
        (lambda _: [0.1], "(got [0.1])"),
        (lambda _: 0.1j, "(got 0.1j)"),
        (lambda _: a_tensor(shape=()), "(got Tensor): use float({{}})"),
    ],
    ids=["text", "0-d", "array", "list", "complex", "tensor"],
)
def test_numbers(xp, device, rng, name, make, end):
    kind = "NumPy array" if xp is np else "CuPy array on cuda:0"
    message = f"expected {name} to be a float {end.format(kind).format(name)}"
    kwargs = arguments(xp, rng, SHAPE)
    for function in FUNCTIONS:
        assert message_of(TypeError, function, **kwargs | {name: make(xp)}) == message
    assert message_of(TypeError, BatchNorm1d, 3, device=device, **{name: make(xp)}) == message
    layer = BatchNorm1d(3, device=device)
    setattr(layer, name, make(xp))
    assert message_of(TypeError, layer, kwargs["input"]) == message


@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_numbers_beyond_float(xp, device, rng, name):
    layer = BatchNorm1d(3, device=device)
    setattr(layer, name, 10**400)
    for message in (
        message_of(OverflowError, BatchNorm1d, 3, device=device, **{name: 10**400}),
        message_of(OverflowError, layer, arguments(xp, rng, SHAPE)["input"]),
    ):
        assert message == f"expected {name} to be a float (got a number beyond float64)"
    layer = BatchNorm1d(3, device=device, **{name: Fraction(1, 8)})
    assert layer(arguments(xp, rng, SHAPE)["input"]).shape == SHAPE


def test_no_momentum(xp, rng):
    for function in FUNCTIONS:
        message = message_of(TypeError, function, **arguments(xp, rng, SHAPE), momentum=None)
        assert re.search(r"momentum to be a float \(got None\): layers count their batches.* 1 / n ", message)


IN_ORDER = [
    ("momentum", lambda _: None, "momentum to be a float"),
    ("input", lambda _: [[1.0]], "input to be a NumPy"),
    ("channel_axis", lambda _: 9, "channel_axis in"),
    ("activation", lambda _: "gelu", "unknown activation 'gelu'"),
    ("training", lambda _: 1, "training to be a bool"),
    ("running_mean", lambda _: None, "must either both be None or neither"),
    ("running_var", lambda right: right[:2], "running_var should contain 3 elements"),
    ("weight", lambda right: right[:2], "weight should contain 3 elements"),
    ("bias", lambda right: right[:2], "bias should contain 3 elements"),
    ("eps", lambda _: 0.0, "eps must be positive"),
    ("input", lambda right: right[:1, :, :1], "more than 1 value per channel"),
    ("residual", lambda right: right[:2], "residual of the input's shape"),
    ("out", lambda right: right[:2], "out of the input's shape"),
]
"""Arguments that are wrong, each with what makes it so and words of its message: the first one is told first."""


def test_of_several_wrong_arguments_the_first_is_told(xp, rng):
    right = arguments(xp, rng, SHAPE) | {"training": True, "momentum": 0.1, "eps": 1e-5, "activation": None}
    right["out"] = xp.empty_like(right["input"])
    for number, (_, _, words) in enumerate(IN_ORDER):
        kwargs = dict(right)
        for name, spoil, _ in reversed(IN_ORDER[number:]):
            kwargs[name] = spoil(right[name])
        with pytest.raises((TypeError, ValueError), match=words):
            F.batch_norm(**kwargs)
    assert F.batch_norm(**right) is right["out"]


NO_FLAGS = {
    "text": "no",
    "0": 0,
    "1": 1,
    "None": None,
    "list": [],
    "array": np.array(True),
    "arrays": np.array([True, False]),
}


@pytest.mark.parametrize("value", NO_FLAGS.values(), ids=NO_FLAGS)
def test_flags(xp, device, rng, value):
    kwargs = arguments(xp, rng, SHAPE)
    end = f"to be a bool (got {show(value)})"
    for function in FUNCTIONS:
        for mode in (True, False):  # the second time, calls like these have been checked before
            function(**kwargs, training=mode)
        assert message_of(TypeError, function, **kwargs, training=value) == f"expected training {end}"
    for name in ("affine", "bias", "track_running_stats"):
        assert message_of(TypeError, BatchNorm1d, 3, device=device, **{name: value}) == f"expected {name} {end}"
    for name in ("training", "track_running_stats"):
        for options in ({}, {"affine": False, "track_running_stats": False}):
            layer = BatchNorm1d(3, device=device, **options)
            before = bits(*layer.state_dict().values())
            setattr(layer, name, value)
            for call in layer, layer.vjp:
                assert message_of(TypeError, call, kwargs["input"]) == f"expected {name} {end}"
            assert bits(*layer.state_dict().values()) == before
    layer = BatchNorm1d(3, device=device).eval()
    assert message_of(ValueError, layer.train, value) == f"expected mode {end}"
    assert layer.training is False
    assert message_of(TypeError, layer.load_state_dict, {}, value) == (
        f"expected strict {end}" + ("; did you mean prefix='no'?" if isinstance(value, str) else "")
    )


def test_flags_of_numpy(xp, device, rng):
    kwargs = arguments(xp, rng, SHAPE)
    for flag in (True, False):
        for function in F.batch_norm, lambda **kwargs: F.batch_norm_vjp(**kwargs)[0]:
            results = [function(**kwargs, training=value) for value in (flag, np.bool_(flag))]
            if not flag:
                assert bits(results[0]) == bits(results[1])
        layer = BatchNorm1d(3, device=device, affine=np.bool_(flag), track_running_stats=np.bool_(flag))
        assert layer.train(np.bool_(flag)).training is flag
        assert list(layer.state_dict()) == list(BatchNorm1d(3, affine=flag, track_running_stats=flag).state_dict())
        layer.training = np.bool_(flag)
        assert layer(kwargs["input"]).shape == SHAPE


@pytest.mark.parametrize("activation", [["relu"], np.array(["relu"]), np.array("relu"), {"relu"}, b"relu"], ids=repr)
def test_activations_that_read_like_one(xp, device, rng, activation):
    message = f"unknown activation {show(activation)}: expected one of None, 'relu'"
    for training in (True, False):
        kwargs = arguments(xp, rng, SHAPE) | {"training": training}
        F.batch_norm(**kwargs, activation="relu")
        for function in FUNCTIONS:
            assert message_of(ValueError, function, **kwargs, activation=activation) == message
    assert message_of(ValueError, BatchNorm1d, 3, activation=activation, device=device) == message
    layer = BatchNorm1d(3, device=device)
    layer.activation = activation
    assert message_of(ValueError, layer, kwargs["input"]) == message


def test_texts_of_numpy_name_activations(xp, rng):
    kwargs = arguments(xp, rng, SHAPE)
    assert bits(F.batch_norm(**kwargs, activation=np.str_("relu"))) == bits(F.batch_norm(**kwargs, activation="relu"))


# ---------------------------------------------------------------------------------------------------------------------
# Names of dtypes and devices


@pytest.mark.parametrize(
    ("dtype", "end"),
    [
        ("int8", "(got int8)"),
        ("bf16", "(got 'bf16')"),
        ("f4,", "(got void32)"),
        (3, "(got 3)"),
        ({"names": 3}, "(got {'names': 3})"),
    ],
    ids=str,
)
def test_dtype_of_a_layer(device, dtype, end):
    message = message_of(TypeError, BatchNorm1d, 3, device=device, dtype=dtype)
    assert message == f"expected dtype to be one of float16, bfloat16, float32, float64 {end}"


def test_dtype_of_torch(device):
    torch = pytest.importorskip("torch")
    for name in "float16", "bfloat16", "float32", "float64":
        message = message_of(TypeError, BatchNorm1d, 3, device=device, dtype=getattr(torch, name))
        assert message.endswith(f"(got torch.{name}); did you mean dtype={name!r}?")
    assert message_of(TypeError, BatchNorm1d, 3, device=device, dtype=torch.int8).endswith("(got torch.int8)")


# ---------------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.parametrize("text", ["garbage", "", " ", "1e3", "0", "-1", "2.0", "+2", "1_0", "0x2", "٣", "9" * 10])
@pytest.mark.parametrize("shape", [(2, 3), (64, 3, 80, 80)], ids=str)
def test_number_of_threads(monkeypatch, text, shape):
    """A number of threads that cannot be read is an error at the first call of any size, and moves nothing."""
    x = np.ones(shape, np.float32)
    layer = BatchNorm1d(3, device="cpu") if len(shape) == 2 else BatchNorm2d(3, device="cpu")
    _, vjp_fn = layer.eval().vjp(x)
    before = bits(*layer.state_dict().values())
    monkeypatch.setenv("CUPYBN_NUM_THREADS", text)
    message = f"expected CUPYBN_NUM_THREADS to be a number of threads, 1 or more (got {text!r}): unset it to use all "
    for call in layer, layer.train(), layer.vjp, F.moments, vjp_fn:
        assert message_of(ValueError, call, x).startswith(message)
        assert bits(*layer.state_dict().values()) == before
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "2")
    layer(x)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("text", ["1", "2", " 3 ", "007", "100000"])
def test_numbers_of_threads(monkeypatch, text):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", text)
    assert tiles.num_threads() == int(text)


def test_show():
    assert show("x" * 100) == "str"
    assert show([np.ones(2)]) == "list"
    assert show((1, "a", None)) == "(1, 'a', None)"
    assert show(a_tensor()) == "Tensor"
