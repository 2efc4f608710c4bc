"""Tensors of PyTorch in state dicts, as a module on the host holds them."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from cupybn import BatchNorm2d
from cupybn._arrays.dtypes import bfloat16_of
from tests.reference import DTYPES, bits, to_numpy

torch = pytest.importorskip("torch")

NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def a_module(rng, dtype):
    """A module of PyTorch all of whose numbers differ."""
    module = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        for name in NAMES[:4]:
            getattr(module, name).copy_(torch.from_numpy(rng.uniform(0.5, 2, 3)))
        module.num_batches_tracked += 5
    return module.to(getattr(torch, dtype.name))


def values_of(tensor):
    """The numbers of a tensor as float64, which holds them all."""
    return tensor.detach().to(torch.float64).numpy()


@pytest.mark.parametrize("theirs", DTYPES, ids=str)
@pytest.mark.parametrize("ours", DTYPES, ids=str)
def test_tensors_of_all_dtypes(device, rng, theirs, ours):
    module, layer = a_module(rng, theirs), BatchNorm2d(3, device=device, dtype=ours)
    layer.load_state_dict(module.state_dict())
    for name, tensor in module.state_dict().items():
        array = to_numpy(getattr(layer, name))
        assert bits(array) == bits(values_of(tensor).astype(array.dtype))


@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_parameters_that_need_gradients(device, rng, theirs):
    module, layer = a_module(rng, theirs), BatchNorm2d(3, device=device)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    assert state["weight"].requires_grad
    layer.load_state_dict(state)
    np.testing.assert_array_equal(to_numpy(layer.weight), values_of(state["weight"]).astype(np.float32))
    layer.load_state_dict(state | {"bias": module.bias * 2})  # no leaf of the graph of autograd
    np.testing.assert_array_equal(to_numpy(layer.bias), values_of(module.bias * 2).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_views(device, dtype):
    values = torch.arange(12.0, dtype=getattr(torch, dtype)).reshape(3, 4)
    layer = BatchNorm2d(3, device=device)
    state = {"weight": values[:, 1], "bias": values[0, ::2][:1].expand(3), "running_mean": values.T[2]}
    layer.load_state_dict(state, strict=False)
    np.testing.assert_array_equal(to_numpy(layer.weight), [1, 5, 9])
    np.testing.assert_array_equal(to_numpy(layer.bias), [0, 0, 0])
    np.testing.assert_array_equal(to_numpy(layer.running_mean), [2, 6, 10])


def test_a_load_copies(rng):
    module, layer = a_module(rng, np.dtype(np.float32)), BatchNorm2d(3, device="cpu")
    layer.load_state_dict(module.state_dict())
    before = bits(*layer.state_dict().values())
    with torch.no_grad():
        module.weight += 1
    assert bits(*layer.state_dict().values()) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        lambda: torch.ones(3).to(torch.complex64),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["float8", "complex", "sparse", "meta"],
)
def test_tensors_that_give_no_array(device, rng, make):
    layer = BatchNorm2d(3, device=device)
    before = bits(*layer.state_dict().values())
    state = a_module(rng, np.dtype(np.float32)).state_dict() | {"running_var": make()}
    with pytest.raises(TypeError, match="expected running_var to be an array of real numbers"):
        layer.load_state_dict(state)
    assert bits(*layer.state_dict().values()) == before


def test_bfloat16_keeps_its_bits(device):
    """A layer of bfloat16 takes the bits of tensors as they are, those of subnormal numbers and of NaN as well."""
    layer = BatchNorm2d(4, device=device, dtype="bfloat16")
    given = np.array([0x7F81, 0xFFC0, 0x0001, 0x8000], np.uint16)
    tensor = torch.from_numpy(given.view(np.int16)).view(torch.bfloat16)
    layer.load_state_dict({"weight": tensor}, strict=False)
    assert bits(layer.weight) == bits(given)


def test_bfloat16_without_ml_dtypes(rng, monkeypatch):
    module, layer = a_module(rng, np.dtype(ml_dtypes.bfloat16)), BatchNorm2d(3, device="cpu")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    layer.load_state_dict(module.state_dict())
    assert bits(*layer.parameters()) == bits(*(values_of(p).astype(np.float32) for p in module.parameters()))


def test_all_bits_of_bfloat16(monkeypatch):
    """All numbers of bfloat16 come out the same with and without ml_dtypes."""
    every = np.arange(2**16).astype(np.uint16)
    named = bfloat16_of(every)
    assert named.dtype == ml_dtypes.bfloat16
    assert bits(named) == bits(every)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    wide = bfloat16_of(every)
    assert wide.dtype == np.float32
    assert bfloat16_of(every[5]).shape == ()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide, named.astype(np.float32))
