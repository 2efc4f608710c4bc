"""Arrays of classes derived from NumPy's and CuPy's are arrays like any other, whatever rules their classes have."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import pytest

import cupybn.functional as F
from cupybn import BatchNorm1d, StreamingMoments, find_batch_norms, update_bn
from cupybn._calls.call import Call
from cupybn._steps.bundles import Affine, Epilogue, Running
from tests.norms import EACH, name_of
from tests.norms import SHAPE as SAMPLES
from tests.reference import arguments, bits

SHAPE = (4, 3, 5)
VECTORS = ("running_mean", "running_var", "weight", "bias")
METHODS = ("__getitem__", "__setitem__", "__array_ufunc__", "__array_function__", "__array__")
METHODS += ("reshape", "transpose", "ravel", "astype", "copy", "view", "fill", "get", "sum", "mean")


@functools.cache
def class_of_its_own(xp, methods):
    """A class derived from a module's array class; computing by its own rules, by these methods, is an error."""

    def refuse(name):
        def method(*_, **__):
            raise AssertionError(f"{name} of a derived class was called")

        return method

    return type("Temperature", (xp.ndarray,), {"__module__": __name__} | {name: refuse(name) for name in methods})


def derived(xp, array, methods=METHODS):
    """An array of a derived class that shares this array's memory."""
    if array is None:
        return None
    cls = class_of_its_own(xp, methods)
    if xp is np:
        return np.ndarray.view(array, cls)
    return cls(array.shape, array.dtype, array.data, array.strides)


def both(xp, **given):
    """The arguments twice, in separate memory: as plain arrays, and as arrays of a derived class with their plain
    memory.
    """
    memory = {name: array.copy() if hasattr(array, "copy") else array for name, array in given.items()}
    own = {name: derived(xp, array) if hasattr(array, "shape") else array for name, array in memory.items()}
    return given, memory, own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("masked", [True, False])
def test_functions(xp, rng, training, dense, activation, masked):
    given = arguments(xp, rng, SHAPE)
    if masked:
        given["mask"] = xp.asarray(rng.random((4, 5) if dense else (5,)) < 0.7)
    if not dense:
        given["input"] = xp.asarray(rng.normal(size=(4, 3, 10)).astype(np.float32))[..., ::2]
    plain, memory, own = both(xp, **given, training=training, activation=activation)
    if not dense:
        own["input"] = derived(xp, plain["input"])
    dy = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    (y, vjp_fn), (own_y, own_vjp_fn) = F.batch_norm_vjp(**plain), F.batch_norm_vjp(**own)
    grads, own_grads = vjp_fn(dy), own_vjp_fn(derived(xp, dy))
    assert {type(array) for array in (own_y, *own_grads)} == {xp.ndarray}
    assert bits(own_y, *own_grads) == bits(y, *grads)
    assert bits(*(memory[name] for name in VECTORS)) == bits(*(plain[name] for name in VECTORS))
    out = xp.empty(SHAPE, np.float32)
    own_out = derived(xp, out)
    assert F.batch_norm(**own, out=own_out) is own_out
    assert bits(out) == bits(F.batch_norm(**plain))
    assert type(F.batch_norm(**own)) is xp.ndarray


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_way_back_from_statistics(xp, rng, training, activation):
    """Gradients are the same and plain arrays, with an eps that is no float, too."""
    given = arguments(xp, rng, SHAPE)
    dy = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    names = "input", "running_mean", "running_var", "weight", "bias"
    arrays = [dy, *(given[name] for name in names)]
    grads = F.batch_norm_backward(*arrays, training=training, eps=0.125, activation=activation)
    own = [derived(xp, array) for array in arrays]
    own_grads = F.batch_norm_backward(*own, training=training, eps=Fraction(1, 8), activation=activation)
    assert {type(array) for array in own_grads[:3]} == {xp.ndarray}
    assert bits(*own_grads) == bits(*grads)


@pytest.mark.parametrize("masked", [True, False])
def test_moments(xp, rng, masked):
    x = arguments(xp, rng, SHAPE)["input"]
    mask = xp.asarray(rng.random((4, 5)) < 0.7) if masked else None
    expected = F.moments(x, mask=mask)
    results = F.moments(derived(xp, x), mask=derived(xp, mask))
    assert {type(result) for result in results} == {xp.ndarray}
    assert bits(*results) == bits(*expected)
    stream = StreamingMoments().update(derived(xp, x), derived(xp, mask))
    assert bits(stream.mean, stream.var()) == bits(*F.moments(x, mask=mask, dtype=np.float64))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("case", EACH, ids=name_of)
def test_norms_within_a_sample(xp, rng, case, dense):
    given = case.arguments(xp, rng, SAMPLES, residual=case.by_channels)
    options = {"activation": "relu", "eps": Fraction(1, 8)} if case.by_channels else {"eps": Fraction(1, 8)}
    if not dense:
        given["input"] = xp.asarray(rng.normal(size=(*SAMPLES, 2)).astype(np.float32))[..., 0]
    dy = xp.asarray(rng.normal(size=SAMPLES).astype(np.float32))
    own = {name: derived(xp, array) for name, array in given.items()}
    (y, vjp_fn), (own_y, own_vjp_fn) = case.vjp(**given, **options), case.vjp(**own, **options)
    grads, own_grads = vjp_fn(dy), own_vjp_fn(derived(xp, dy))
    assert {type(array) for array in (own_y, *own_grads) if array is not None} == {xp.ndarray}
    assert bits(own_y, *own_grads) == bits(y, *grads)
    memory = xp.empty(SAMPLES, np.float32)
    out = derived(xp, memory)
    assert case(**own, **options, out=out) is out
    assert bits(memory) == bits(y)
    assert type(case(own["input"])) is xp.ndarray


def test_running_statistics_of_instance_norm(xp, rng):
    x = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    plain, memory = ([xp.zeros(3, np.float32), xp.ones(3, np.float32)] for _ in range(2))
    for uses_input in True, False:
        y = F.instance_norm(x, *plain, use_input_stats=uses_input)
        own = F.instance_norm(derived(xp, x), *(derived(xp, array) for array in memory), use_input_stats=uses_input)
        assert bits(own, *memory) == bits(y, *plain)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("lazy", [True, False])
def test_layers(xp, device, rng, momentum, lazy):
    x = arguments(xp, rng, SHAPE)["input"]
    layers = [BatchNorm1d(None if lazy else 3, momentum=momentum, device=device) for _ in range(2)]
    for layer, given in zip(layers, (x, derived(xp, x)), strict=True):
        for mode in (True, False):
            layer.train(mode)(given, given)
    assert bits(*layers[0].state_dict().values()) == bits(*layers[1].state_dict().values())


def test_layers_that_hold_them(xp, device, rng):
    x = arguments(xp, rng, SHAPE)["input"]
    plain, layer = (BatchNorm1d(3, momentum=None, device=device) for _ in range(2))
    memory = layer.state_dict()
    for name, array in memory.items():
        setattr(layer, name, derived(xp, array))
    assert bits(layer(x), *memory.values()) == bits(plain(x), *plain.state_dict().values())


def test_layers_that_hold_them_in_vain(xp, device, rng):
    """Statistics that a layer does not use may share memory with what its calls read, and those copy it then."""
    x, dy = (xp.asarray(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    layer = BatchNorm1d(3, device=device)
    layer.track_running_stats = False
    layer.weight = layer.running_var
    layer.running_mean, layer.running_var = (derived(xp, getattr(layer, name)) for name in VECTORS[:2])
    expected = BatchNorm1d(3, device=device).vjp(x)[1](dy)
    _, vjp_fn = layer.vjp(x)
    layer.weight[...] = 5
    assert bits(*vjp_fn(dy)) == bits(*expected)


def test_layers_that_hold_them_load_and_move(xp, device, rng):
    """What is loaded and reset is written into the memory itself, and copies are plain."""
    layer, source = (BatchNorm1d(3, device=device) for _ in range(2))
    source(arguments(xp, rng, SHAPE)["input"])
    for name in VECTORS:
        setattr(layer, name, xp.arange(6, dtype=np.float32)[::2])
    memory = layer.state_dict()
    for name, array in memory.items():
        setattr(layer, name, derived(xp, array))
    layer.load_state_dict(source.state_dict())
    assert bits(*memory.values()) == bits(*source.state_dict().values())
    copies = layer.state_dict(device="cpu")
    assert {type(array) for array in copies.values()} == {np.ndarray}
    assert bits(*copies.values()) == bits(*memory.values())
    layer.reset_parameters()
    assert bits(*memory.values()) == bits(*BatchNorm1d(3, device="cpu").state_dict().values())
    layer.to(dtype=np.float64)
    assert {type(getattr(layer, name)) for name in VECTORS} == {xp.ndarray}


def test_layers_that_hold_them_are_restored(xp, device, rng):
    """What `update_bn` leaves after an error is what was there, in the memory itself."""
    layer = BatchNorm1d(3, device=device)
    layer(arguments(xp, rng, SHAPE)["input"])
    memory = layer.state_dict()
    before = bits(*memory.values())
    for name, array in memory.items():
        setattr(layer, name, derived(xp, array))

    def forward(_):
        memory["running_mean"][...] = 7
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        update_bn([layer], [None], forward)
    assert bits(*memory.values()) == before


def test_checkpoints_that_hold_them(xp, device):
    state = BatchNorm1d(3, device=device).state_dict("bn.")
    assert find_batch_norms({key: derived(xp, array) for key, array in state.items()}) == {"bn.": 3}


def test_state_dicts_that_hold_them(xp, device, rng):
    source, layer = (BatchNorm1d(3, device=device) for _ in range(2))
    source(arguments(xp, rng, SHAPE)["input"])
    plain = type("Plain", (np.ndarray,), {})  # NumPy asks its arrays by the rules of their classes
    state = {}
    for name, array in source.state_dict().items():
        state[name] = array.view(plain) if xp is np else derived(xp, array)
    layer.load_state_dict(state)
    assert bits(*layer.state_dict().values()) == bits(*source.state_dict().values())
    assert {type(array) for array in layer.state_dict().values()} == {xp.ndarray}


def test_memory_maps(tmp_path, rng):
    x = rng.normal(size=SHAPE).astype(np.float32)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=SHAPE)
    mapped[...] = x
    y = F.batch_norm(mapped, None, None, training=True, out=mapped)
    assert y is mapped
    assert bits(mapped) == bits(F.batch_norm(x, None, None, training=True))


def test_they_are_checked_once_like_others(xp, rng):
    arrays = [derived(xp, arguments(xp, rng, SHAPE)[name]) for name in ("input", *VECTORS, "residual")]
    x, *vectors, residual = arrays
    mean, var, weight, bias = vectors
    call = Call(x, Affine(weight, bias, 1e-5), Running(mean, var, 0.1), Epilogue(residual), True, 1)
    assert call._key(None) is not None
    assert call._key(None) != call._replace(input=arguments(xp, rng, SHAPE)["input"])._key(None)


def test_arrays_of_many_devices_are_none():
    """Arrays of `cupyx.distributed.array` are refused, as they have no memory of their own."""
    cupy = pytest.importorskip("cupy")
    spread = type("DistributedArray", (cupy.ndarray,), {"__module__": "cupyx.distributed.array._array"})
    array = cupy.ones(SHAPE, np.float32)
    with pytest.raises(TypeError, match="expected input to be a NumPy or CuPy array"):
        F.moments(spread(array.shape, array.dtype, array.data, array.strides))
