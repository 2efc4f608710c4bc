"""Names of devices and kinds of arrays, with and without CuPy."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from cupybn import BatchNorm2d
from cupybn._arrays import devices, kinds

INSTALL = r"pip install '\.\[cuda12\]'.*pip install '\.\[cuda13\]'"
"""Pattern of the commands by which a clone installs CuPy, as messages show them."""


@pytest.fixture(autouse=True)
def _forget():
    caches = devices.cuda_missing, devices.import_cupy
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def fake_cupy(monkeypatch):
    """A module `cupy` with two devices, the second of them current: enough to choose one."""

    def install(available=True):
        runtime = types.SimpleNamespace(getDevice=lambda: 1, getDeviceCount=lambda: 2)
        cupy = types.ModuleType("cupy")
        cupy.cuda = types.SimpleNamespace(is_available=lambda: available, runtime=runtime)
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    return install


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "", 0, object()])
def test_malformed_names(name):
    with pytest.raises(ValueError, match=r"unknown device .*'cpu', 'cuda', 'cuda:0'"):
        devices.resolve_device(name)


def test_devices_of_a_usable_cupy(fake_cupy):
    fake_cupy()
    assert devices.resolve_device(None) == "cuda:1"
    assert devices.resolve_device("cuda") == "cuda:1"
    assert devices.resolve_device("cuda:0") == "cuda:0"
    assert devices.resolve_device("cpu") == "cpu"
    with pytest.raises(RuntimeError, match=r"'cuda:2' is not available: the CUDA devices are 'cuda:0', 'cuda:1'$"):
        devices.resolve_device("cuda:2")


def test_without_a_device(fake_cupy):
    fake_cupy(available=False)
    assert devices.resolve_device(None) == "cpu"
    with pytest.raises(RuntimeError, match=f"no CUDA device or driver.*{INSTALL}"):
        devices.resolve_device("cuda")


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail
    assert devices.resolve_device(None) == "cpu"
    with pytest.raises(RuntimeError, match=f"CuPy cannot be imported.*{INSTALL}"):
        devices.resolve_device("cuda:0")


def _raise():
    raise OSError("libcuda.so.1: cannot open shared object file")


HALVES = {
    "an empty folder": {},
    "no is_available": {"cuda": types.SimpleNamespace()},
    "is_available raises": {"cuda": types.SimpleNamespace(is_available=_raise)},
    "no runtime": {"cuda": types.SimpleNamespace(is_available=lambda: True)},
    "a runtime that raises": {
        "cuda": types.SimpleNamespace(is_available=lambda: True, runtime=types.SimpleNamespace(getDevice=_raise))
    },
}


@pytest.mark.parametrize("members", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("place", [{"__file__": "/there/cupy/__init__.py"}, {"__path__": ["/there/cupy"]}])
def test_half_a_cupy(monkeypatch, members, place):
    cupy = types.ModuleType("cupy")
    vars(cupy).update(members | place)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    layer = BatchNorm2d(3)
    assert layer.device == "cpu"
    layer(np.ones((2, 3, 4, 4), np.float32))
    for attempt in (lambda: BatchNorm2d(3, device="cuda"), lambda: layer.to("cuda:0")):
        match = f"is not available: the module 'cupy' in /there/cupy.* cannot be used .*Error.*{INSTALL}"
        with pytest.raises(RuntimeError, match=match):
            attempt()
    assert layer.device == "cpu"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (0, "cuda:0"),
        (np.int64(1), "cuda:1"),
        ("CUDA:1", "cuda:1"),
        ("cuda 1", "cuda:1"),
        ("gpu", "cuda"),
        ("GPU:0", "cuda:0"),
        (" cpu", "cpu"),
        (type("Device", (), {"__module__": "cupy.cuda.device", "id": 2})(), "cuda:2"),
        (type("device", (), {"__str__": lambda _: "cuda:3"})(), "cuda:3"),
        (-1, None),
        (True, None),
        ("tpu", None),
        ("", None),
        (np.ones(2), None),
        (type("device", (), {})(), None),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_that_were_meant(given, meant):
    for attempt in (lambda: BatchNorm2d(3, device=given), lambda: BatchNorm2d(3, device="cpu").to(given)):
        with pytest.raises(ValueError, match=r"^unknown device .*: expected one of 'cpu', 'cuda', 'cuda:0'") as raised:
            attempt()
        assert str(raised.value).endswith(f"; did you mean {meant!r}?" if meant else "'cuda:1', ...")


def test_device_of_torch():
    torch = pytest.importorskip("torch")
    for name in "cpu", "cuda:1":
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            BatchNorm2d(3, device=torch.device(name))


def test_to_no_device():
    """The method `to` leaves a layer where it is if no device is given: it does not choose where to."""
    pytest.importorskip("cupy")  # with which None is a CUDA device for the constructor
    assert BatchNorm2d(3, device="cpu").to(None).device == "cpu"
    with pytest.raises(ValueError, match="unknown device None"):
        devices.named_device(None)


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"dtype='bfloat16' needs ml_dtypes: `pip install '\.\[bf16\]'`"):
        BatchNorm2d(3, device="cpu", dtype="bfloat16")


def test_kinds():
    assert kinds.kind(np.ones(2)) == "numpy"
    assert kinds.kind(np.ones(2).view(np.memmap)) == "numpy"
    assert kinds.kind(np.ma.ones(2)) is None
    assert kinds.kind([1.0]) is None
    assert kinds.kind(np.float32(1)) is None
    on_gpu = type("ndarray", (), {"__module__": "cupy", "__cuda_array_interface__": {}})()
    on_gpu.device = types.SimpleNamespace(id=3)
    assert kinds.kind(on_gpu) == "cupy"
    assert kinds.describe(on_gpu) == "CuPy array on cuda:3"
    assert kinds.kind(type("Image", (type(on_gpu),), {"__module__": "imaging"})()) == "cupy"
    assert kinds.kind(type("ndarray", (), {"__module__": "jax", "__cuda_array_interface__": {}})()) is None
    assert kinds.kind(type("poly1d", (), {"__module__": "cupy"})()) is None
    assert kinds.describe([1]) == "list"


def test_transfer_takes_what_numpy_takes():
    for value in [1, 2], (1.0, 2.0), np.array([1, 2], np.int8):
        array = devices.transfer(value, np.dtype(np.float16), "cpu")
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, [1, 2])
