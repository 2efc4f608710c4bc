"""Names of devices and kinds of arrays, with and without CuPy."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from cupybn import _devices

INSTALL = r"pip install '\.\[cuda12\]'.*pip install '\.\[cuda13\]'"
"""What works in a clone, in a shell."""


@pytest.fixture(autouse=True)
def _forget():
    caches = _devices.cuda_missing, _devices.import_cupy
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def fake_cupy(monkeypatch):
    """A `cupy` with two devices, the second of them current: enough to choose one."""

    def install(available=True):
        runtime = types.SimpleNamespace(getDevice=lambda: 1, getDeviceCount=lambda: 2)
        cupy = types.ModuleType("cupy")
        cupy.cuda = types.SimpleNamespace(is_available=lambda: available, runtime=runtime)
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    return install


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "", 0, object()])
def test_malformed_names(name):
    with pytest.raises(ValueError, match=r"unknown device .*'cpu', 'cuda', 'cuda:0'"):
        _devices.resolve_device(name)


def test_devices_of_a_usable_cupy(fake_cupy):
    fake_cupy()
    assert _devices.resolve_device(None) == "cuda:1"
    assert _devices.resolve_device("cuda") == "cuda:1"
    assert _devices.resolve_device("cuda:0") == "cuda:0"
    assert _devices.resolve_device("cpu") == "cpu"
    with pytest.raises(RuntimeError, match="'cuda:2' is not available: the CUDA devices are 'cuda:0', 'cuda:1'$"):
        _devices.resolve_device("cuda:2")


def test_without_a_device(fake_cupy):
    fake_cupy(available=False)
    assert _devices.resolve_device(None) == "cpu"
    with pytest.raises(RuntimeError, match=f"no CUDA device or driver.*{INSTALL}"):
        _devices.resolve_device("cuda")


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail
    assert _devices.resolve_device(None) == "cpu"
    with pytest.raises(RuntimeError, match=f"CuPy cannot be imported.*{INSTALL}"):
        _devices.resolve_device("cuda:0")


def test_kinds():
    assert _devices.kind(np.ones(2)) == "numpy"
    assert _devices.kind(np.ones(2).view(np.memmap)) == "numpy"
    assert _devices.kind(np.ma.ones(2)) is None
    assert _devices.kind([1.0]) is None
    assert _devices.kind(np.float32(1)) is None
    on_gpu = type("ndarray", (), {"__module__": "cupy", "__cuda_array_interface__": {}})()
    on_gpu.device = types.SimpleNamespace(id=3)
    assert _devices.kind(on_gpu) == "cupy"
    assert _devices.describe(on_gpu) == "CuPy array on cuda:3"
    assert _devices.describe([1]) == "list"


def test_transfer_takes_what_numpy_takes():
    for value in [1, 2], (1.0, 2.0), np.array([1, 2], np.int8):
        array = _devices.transfer(value, np.dtype(np.float16), "cpu")
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, [1, 2])
