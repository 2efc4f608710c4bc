"""Layers on other devices and of other dtypes, and copies of what they hold."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import cupybn
from cupybn import BatchNorm1d, BatchNorm2d, SyncBatchNorm
from cupybn._arrays import devices
from tests.reference import DTYPES, bits, to_numpy

ARRAYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def filled(rng, **options):
    """A layer all of whose numbers differ."""
    layer = BatchNorm1d(3, **options)
    values = [*rng.uniform(0.5, 2, (4, 3)), np.int64(2**40 + 1)]
    layer.load_state_dict(dict(zip(ARRAYS, values, strict=True)))
    return layer


def held(layer):
    return {name: getattr(layer, name) for name in ARRAYS}, bits(*(getattr(layer, name) for name in ARRAYS))


def kind(value):
    """Words for a value in the name of a test, the same ones in every process."""
    return f"{type(value).__name__} {value}" if isinstance(value, (str, int, type)) else type(value).__name__


def unchanged(layer, call, error):
    """Check that a call raises and changes nothing. Returns the message."""
    arrays, before = held(layer)
    settings = layer.device, layer.dtype, layer.num_features
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error
    now, after = held(layer)
    assert all(now[name] is arrays[name] for name in ARRAYS)
    assert after == before
    assert (layer.device, layer.dtype, layer.num_features) == settings
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Buffers


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_buffers(device, options):
    layer = BatchNorm2d(3, device=device, **options)
    names = ARRAYS[2:] if "track_running_stats" not in options else ()
    assert [name for name, _ in layer.named_buffers()] == list(names)
    assert all(array is getattr(layer, name) for name, array in layer.named_buffers())
    assert all(one is other for one, (_, other) in zip(layer.buffers(), layer.named_buffers(), strict=True))
    layer.num_batches_tracked = None
    assert [name for name, _ in layer.named_buffers()] == list(names[:2])
    assert list(BatchNorm2d(None, device=device, **options).buffers()) == []


def test_buffers_are_those_of_torch():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm2d(3), BatchNorm2d(3, device="cpu")
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    assert [array.shape for array in ours.buffers()] == [tensor.shape for tensor in theirs.buffers()]


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("after", DTYPES, ids=str)
def test_to_a_dtype(xp, device, rng, before, after):
    layer = filled(rng, device=device, dtype=before)
    arrays, old = held(layer)
    values = {name: to_numpy(arrays[name]).astype(after) for name in ARRAYS[:4]}
    assert layer.to(dtype=after) is layer
    assert (layer.dtype, layer.device) == (after, device)
    for name in ARRAYS[:4]:
        array = getattr(layer, name)
        assert array.dtype == after
        assert (array is arrays[name]) == (before == after)
        assert bits(array) == bits(values[name])
    assert layer.num_batches_tracked is arrays["num_batches_tracked"]
    assert bits(*arrays.values()) == old  # of those that were replaced nothing was written
    x = xp.asarray(rng.standard_normal((4, 3)).astype(np.float32))
    layer(x)
    assert int(layer.num_batches_tracked) == 2**40 + 2
    state = filled(rng, device="cpu", dtype=np.float64).state_dict()
    layer.load_state_dict(state)
    assert all(bits(getattr(layer, name)) == bits(state[name].astype(after)) for name in ARRAYS[:4])


@pytest.mark.parametrize("ways", [{"args": ("cpu", "float64")}, {"kwargs": {"dtype": float, "device": "cpu"}}], ids=str)
def test_device_and_dtype_together(device, rng, ways):
    layer = filled(rng, device=device)
    expected = [to_numpy(getattr(layer, name)).astype(np.float64) for name in ARRAYS[:4]]
    layer.to(*ways.get("args", ()), **ways.get("kwargs", {}))
    assert (layer.device, layer.dtype) == ("cpu", np.float64)
    assert bits(*(getattr(layer, name) for name in ARRAYS[:4])) == bits(*expected)
    assert all(isinstance(getattr(layer, name), np.ndarray) for name in ARRAYS)
    assert layer.num_batches_tracked.dtype == np.int64


@pytest.mark.parametrize("args", [(), (None,), (None, None)], ids=str)
def test_to_nothing(device, rng, args):
    layer = filled(rng, device=device)
    layer.bias = layer.bias.astype(np.float16)
    arrays, before = held(layer)
    assert layer.to(*args) is layer
    assert all(getattr(layer, name) is array for name, array in arrays.items())
    assert held(layer)[1] == before


def test_arrays_of_the_user_are_cast_as_well(xp, device, rng):
    layer = filled(rng, device=device)
    layer.weight, layer.bias = xp.asarray([1.5, 2, 3], np.float16), xp.asarray([1, 2, 3], np.int32)
    arrays, _ = held(layer)
    layer.to(dtype=np.float32)
    assert layer.weight.dtype == layer.bias.dtype == np.float32
    np.testing.assert_array_equal(to_numpy(layer.weight), [1.5, 2, 3])
    assert all(getattr(layer, name) is arrays[name] for name in ARRAYS[2:])
    layer.to(dtype=np.float16)
    layer.weight = layer.weight.astype(np.float64)
    layer.to(device)
    assert (layer.weight.dtype, layer.dtype) == (np.float64, np.float16)


def test_an_array_in_two_roles_stays_one(device, rng):
    layer = filled(rng, device=device)
    layer.weight = layer.running_var
    layer.to(dtype=np.float64)
    assert layer.weight is layer.running_var
    assert layer.weight.dtype == np.float64


def test_numbers_beyond_the_dtype_become_inf(device):
    layer = BatchNorm1d(3, device=device, dtype=np.float64)
    layer.running_var[...] = 1e300
    layer.running_mean[...] = np.nan
    layer.bias[...] = -1e6
    layer.to(dtype=np.float16)  # warnings are errors in these tests
    assert np.isposinf(to_numpy(layer.running_var)).all()
    assert np.isneginf(to_numpy(layer.bias)).all()
    assert np.isnan(to_numpy(layer.running_mean)).all()


def test_a_lazy_layer_is_made_as_it_was_told(xp, device):
    layer = BatchNorm1d(None, device="cpu")
    assert layer.to(device, "bfloat16") is layer
    assert layer.state_dict() == {}
    layer(xp.ones((4, 3), np.float32))
    assert layer.device == device
    assert [array.dtype for array in layer.state_dict().values()] == [ml_dtypes.bfloat16] * 4 + [np.int64]


def test_results_after_another_dtype(xp, device, rng):
    """A layer that was float64 from the start and one that became it compute the same."""
    x = xp.asarray(rng.standard_normal((5, 3)))
    layer = BatchNorm1d(3, device=device)
    layer(x.astype(np.float32)), layer(x)
    other = BatchNorm1d(3, device=device, dtype=np.float64)
    layer.to(dtype=np.float64)
    other.load_state_dict(layer.state_dict())
    assert bits(layer(x), layer.running_mean, layer.running_var) == bits(
        other(x), other.running_mean, other.running_var
    )


@pytest.mark.parametrize("dtype", ["int32", np.int64, "float8", bool, [object()], 3, "longdouble", "cpu"], ids=kind)
@pytest.mark.parametrize("other", ["cpu", "cuda:0", None], ids=str)
def test_no_dtypes(device, rng, dtype, other):
    layer = filled(rng, device=device)
    message = unchanged(layer, lambda: layer.to(other, dtype), TypeError)
    assert message.startswith("expected dtype to be one of float16, bfloat16, float32, float64 (got ")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (np.float16, "float16"),
        (np.dtype("f8"), "float64"),
        ("float32", "float32"),
        (float, "float64"),
        ("f2", "float16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        ("bfloat16", "bfloat16"),
        (type("dtype", (), {"__str__": lambda _: "torch.float16"})(), "float16"),
        (type("dtype", (), {"__str__": lambda _: "torch.int8"})(), None),
        (int, None),
        ("i4", None),
    ],
    ids=kind,
)
def test_a_dtype_in_the_place_of_the_device(device, rng, given, meant):
    layer = filled(rng, device=device)
    message = unchanged(layer, lambda: layer.to(given), ValueError)
    assert message.startswith("unknown device ")
    assert message.endswith(f": to set the dtype, use to(dtype={meant!r})") == (meant is not None)
    if meant is not None:
        assert layer.to(dtype=meant).dtype.name == meant


def test_a_dtype_of_torch_in_the_place_of_the_device():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=re.escape("use to(dtype='bfloat16')")):
        BatchNorm1d(3, device="cpu").to(torch.bfloat16)


def test_a_device_that_is_not_there_changes_no_dtype(device, rng):
    layer = filled(rng, device=device)
    unchanged(layer, lambda: layer.to("gpu", np.float64), ValueError)
    unchanged(layer, lambda: layer.to("cuda:7", np.float64), RuntimeError)


def test_what_is_no_array_is_named(device, rng):
    layer = filled(rng, device=device)
    layer.bias = [1.0, 2.0, 3.0]
    for call in (lambda: layer.to(dtype=np.float64), lambda: layer.to("cuda:0" if device == "cpu" else "cpu")):
        with pytest.raises(TypeError, match=r"expected bias to be an array \(got list\)"):
            call()
    assert (layer.device, layer.dtype, layer.weight.dtype) == (device, np.float32, np.float32)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_half_way_changes_nothing(device, rng, monkeypatch, error):
    layer, transfer = filled(rng, device=device), devices.transfer
    for done in range(4):
        left = done

        def failing(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            return transfer(*args)

        with monkeypatch.context() as patched:
            patched.setattr(devices, "transfer", failing)
            unchanged(layer, lambda: layer.to(dtype=np.float64), error)
    assert layer.to(dtype=np.float64).weight.dtype == np.float64


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_cpu_and_cuda(device, rng):
    cupy = pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    layer.bias = layer.bias.astype(np.float64)  # a dtype of the user's own stays
    _, before = held(layer)
    for move, there, module in [
        (lambda: layer.cuda(), "cuda:0", cupy),
        (lambda: layer.cpu(), "cpu", np),
        (lambda: layer.cuda(0), "cuda:0", cupy),
        (lambda: layer.cuda(index=np.int64(0)), "cuda:0", cupy),
    ]:
        assert move() is layer
        assert layer.device == there
        assert all(isinstance(getattr(layer, name), module.ndarray) for name in ARRAYS)
        assert held(layer)[1] == before
    arrays, _ = held(layer)
    layer.cuda()
    assert all(getattr(layer, name) is array for name, array in arrays.items())


@pytest.mark.parametrize("index", [True, "0", "cuda:0", 0.0, [0]], ids=repr)
def test_what_is_no_index(device, rng, index):
    pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    assert "expected index to be an int" in unchanged(layer, lambda: layer.cuda(index), TypeError)


def test_an_index_that_is_not_there(device, rng):
    pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    unchanged(layer, lambda: layer.cuda(7), RuntimeError)
    unchanged(layer, lambda: layer.cuda(-1), ValueError)


def test_to_another_gpu(rng):
    """A layer moves from one GPU to another, whichever is the current one, and so do copies of its state."""
    cupy = pytest.importorskip("cupy")
    emulator = getattr(cupy, "emulator", None)
    if emulator is None:
        pytest.skip("needs two GPUs")
    with emulator.pretend(emulator.H200, emulator.T4):
        layer = filled(rng, device="cuda:0")
        _, before = held(layer)
        copies = layer.state_dict(device="cuda:1")
        assert {array.device.id for array in copies.values()} == {1}
        assert bits(*copies.values()) == before
        with cupy.cuda.Device(1):
            assert layer.cuda().device == "cuda:1"
            assert layer.to("cuda:0").device == "cuda:0"
        layer.to("cuda:1", np.float64)
        assert {array.device.id for array in layer.state_dict().values()} == {1}
        assert layer.weight.dtype == np.float64
        layer.load_state_dict(copies)
        assert bits(*layer.to(dtype=np.float32).state_dict().values()) == before
        assert cupy.cuda.runtime.getDevice() == 0


def test_views_go_to_another_gpu(rng):
    """Views that are not contiguous, which CuPy copies between GPUs only if it may put them in order."""
    cupy = pytest.importorskip("cupy")
    emulator = getattr(cupy, "emulator", None)
    if emulator is None:
        pytest.skip("needs two GPUs")
    with emulator.pretend(emulator.H200, emulator.T4):
        layer, other = filled(rng, device="cuda:0"), BatchNorm1d(3, device="cuda:1")
        for step, name in enumerate(ARRAYS[:4], -2):
            setattr(layer, name, cupy.asarray(rng.random(9).astype(np.float32))[:: step or 3][:3])
        _, before = held(layer)
        other.load_state_dict(layer.state_dict())
        assert bits(*other.state_dict().values()) == before
        assert bits(*layer.state_dict(device="cuda:1").values()) == before
        assert bits(*layer.to("cuda:1").state_dict().values()) == before
        assert {array.device.id for array in layer.state_dict().values()} == {1}


def test_an_array_that_is_elsewhere_is_brought_back(device, rng):
    cupy = pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    here, there = (np, cupy) if device == "cpu" else (cupy, np)
    layer.weight = there.asarray([1.0, 2.0, 3.0])
    bias = layer.bias
    layer.to(dtype=np.float32)  # no device is given: it stays there
    assert isinstance(layer.weight, there.ndarray)
    layer.to(device)
    assert isinstance(layer.weight, here.ndarray)
    assert layer.weight.dtype == np.float32
    assert layer.bias is bias


def test_a_load_writes_into_arrays_wherever_they_are(device, rng):
    """A load rounds values once, to the dtype of the array that they are for, and finds it where it is."""
    cupy = pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    there = cupy if device == "cpu" else np
    values = np.array([1 / 3, 1e300, 257.0])
    layer.weight, layer.bias = there.zeros(3, np.float64), layer.bias.astype(np.float16)
    layer.running_mean = layer.running_mean.astype(ml_dtypes.bfloat16)
    layer.load_state_dict(dict.fromkeys(ARRAYS[:3], values), strict=False)
    with np.errstate(over="ignore"):
        expected = [values, values.astype(np.float16), values.astype(ml_dtypes.bfloat16)]
    assert bits(layer.weight, layer.bias, layer.running_mean) == bits(*expected)


def test_a_synchronized_layer_moves_as_others_do(device, rng):
    pytest.importorskip("cupy")
    layer = filled(rng, device=device)
    synchronized = SyncBatchNorm.from_batchnorm(layer)
    _, before = held(layer)
    other = "cuda:0" if device == "cpu" else "cpu"
    assert type(synchronized.to(other, np.float64).cpu().cuda()) is SyncBatchNorm
    assert (synchronized.device, synchronized.dtype) == ("cuda:0", np.float64)
    assert held(layer)[1] == before
    assert (layer.device, layer.dtype) == (device, np.float32)
    assert synchronized.to_batchnorm().dtype == np.float64


# ---------------------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize("target", ["cpu", "cuda", "cuda:0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_elsewhere(device, rng, target, dtype):
    cupy = pytest.importorskip("cupy")
    layer = filled(rng, device=device, dtype=dtype)
    layer.bias = layer.bias.astype(np.float16)
    state = layer.state_dict("bn.", device=target)
    assert list(state) == ["bn." + name for name in ARRAYS]
    assert all(isinstance(array, np.ndarray if target == "cpu" else cupy.ndarray) for array in state.values())
    assert [array.dtype for array in state.values()] == [array.dtype for array in layer.state_dict().values()]
    before = bits(*state.values())
    assert before == bits(*layer.state_dict().values())
    for array in layer.state_dict().values():
        array[...] = 0
    assert bits(*state.values()) == before
    assert layer.device == device


def test_a_state_dict_without_a_device_is_live(device, rng):
    layer = filled(rng, device=device)
    assert all(array is getattr(layer, name) for name, array in layer.state_dict("", None).items())


def test_a_state_dict_where_there_is_no_device(device, rng):
    layer = filled(rng, device=device)
    for target, error in ("gpu", ValueError), ("cuda:7", RuntimeError), (0, ValueError):
        unchanged(layer, lambda target=target: layer.state_dict(device=target), error)


def test_types_of_what_is_public():
    assert cupybn.IncompatibleKeys._fields == ("missing_keys", "unexpected_keys")
    for name in "cpu", "cuda":
        assert getattr(BatchNorm2d, name).__annotations__["return"] == "Self"
