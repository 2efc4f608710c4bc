"""Generators: their state, where it is, and what seeds are."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import Generator
from cupybn.dropout import generator as module
from tests import philox
from tests.reference import bits, exactly, to_numpy


@pytest.fixture(autouse=True)
def fresh_defaults(monkeypatch):
    """No generator is left by another test."""
    monkeypatch.setattr(module.defaults, "_generators", {})
    monkeypatch.setattr(module.defaults, "_seed", None)


def numbers(generator):
    return to_numpy(generator.state).tolist()


def test_state(xp, device):
    """Seed and calls on the device; it is live, and of the generator alone."""
    generator, x = Generator(7, device=device), xp.ones(64, np.float32)
    state = generator.state
    assert generator.device == device
    assert type(state) is xp.ndarray
    assert (state.shape, state.dtype, numbers(generator)) == ((2,), np.uint64, [7, 0])
    first = F.dropout(x, generator=generator)
    assert generator.state is state
    assert numbers(generator) == [7, 1]
    saved = state.copy()
    second = F.dropout(x, generator=generator)
    assert bits(first) != bits(second)
    state[...] = saved
    assert bits(F.dropout(x, generator=generator)) == bits(second)
    state[1] = 0
    assert bits(F.dropout(x, generator=generator)) == bits(first)
    state[0] = 8
    state[1] = 2**40
    wanted = philox.expected(np.ones(64, np.float32), np.arange(64), 0.5, 2**40, 8)
    assert bits(F.dropout(x, generator=generator)) == bits(wanted)
    with pytest.raises(AttributeError):
        generator.state = saved


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, np.uint64(2**64 - 1), np.int8(5)])
def test_seeds(device, seed):
    assert numbers(Generator(seed, device=device)) == [int(seed), 0]
    generator = Generator(1, device=device)
    generator.state[1:].fill(9)
    state = generator.state
    assert generator.manual_seed(seed) is generator
    assert generator.state is state
    assert numbers(generator) == [int(seed), 0]


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "expected seed in [0, 2**64) (got -1)"),
        (2**64, ValueError, f"expected seed in [0, 2**64) (got {2**64})"),
        (1.0, TypeError, "expected seed to be an int (got 1.0): use int(seed)"),
        ("1", TypeError, "expected seed to be an int (got '1')"),
        (True, TypeError, "expected seed to be an int (got True)"),
        (None, TypeError, "expected seed to be an int (got None)"),
    ],
)
def test_what_is_no_seed(device, seed, error, message):
    """Nothing has changed then."""
    generator = Generator(3, device=device)
    generator.state[1:].fill(4)
    cupybn.manual_seed(6)
    for call in generator.manual_seed, cupybn.manual_seed, lambda seed: Generator(seed, device=device):
        if seed is None and call not in (generator.manual_seed, cupybn.manual_seed):
            continue
        with pytest.raises(error, match=exactly(message)):
            call(seed)
    assert numbers(generator) == [3, 4]
    assert numbers(module.defaults.of(device)) == [6, 0]


def test_without_a_seed_each_generator_has_another():
    seeds = {numbers(Generator(device="cpu"))[0] for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) > 2**56


def test_devices():
    cp = pytest.importorskip("cupy")
    assert Generator(1).device == "cuda:0"
    generator = Generator(1, device="cpu")
    state = generator.state
    F.dropout(np.ones(4, np.float32), generator=generator)
    assert generator.to("cpu") is generator
    assert generator.state is state
    assert generator.to("cuda") is generator
    assert generator.device == "cuda:0"
    assert isinstance(generator.state, cp.ndarray)
    assert numbers(generator) == [1, 1]
    F.dropout(cp.ones(4, np.float32), generator=generator)
    assert numbers(generator.to("cpu")) == [1, 2]
    assert isinstance(generator.state, np.ndarray)
    for device, error in ("gpu", ValueError), ("cuda:99", RuntimeError), (None, ValueError):
        with pytest.raises(error):
            generator.to(device)
    for device, error in ("gpu", ValueError), ("cuda:99", RuntimeError):
        with pytest.raises(error):
            Generator(1, device=device)
    assert numbers(generator) == [1, 2]


@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_go_on_by_themselves(xp, device, way):
    generator, x = Generator(7, device=device), xp.ones(64, np.float32)
    F.dropout(x, generator=generator)
    other = way(generator)
    assert type(other) is Generator
    assert other.device == device
    assert numbers(other) == [7, 1]
    wanted = bits(F.dropout(x, generator=generator))
    assert numbers(other) == [7, 1]
    assert bits(F.dropout(x, generator=other)) == wanted
    assert numbers(generator) == numbers(other) == [7, 2]


def test_text(device):
    generator = Generator(7, device=device)
    generator.state[1:].fill(3)
    known = "seed=7, calls=3, " if device == "cpu" else ""  # what is on a GPU is not read for a message
    assert repr(generator) == f"Generator({known}device={device!r})"


# ---------------------------------------------------------------------------------------------------------------------
# The generators that `generator=None` stands for


def test_manual_seed(xp, device):
    """A seed is for the generators that there are, in place, and for those to come."""
    x = xp.ones(64, np.float32)
    F.dropout(x)
    default = module.defaults.of(device)
    state = default.state
    for seed in 5, 2**64 - 1:
        cupybn.manual_seed(seed)
        for call in range(2):
            wanted = philox.expected(np.ones(64, np.float32), np.arange(64), 0.5, call, seed)
            assert bits(F.dropout(x)) == bits(wanted)
        assert module.defaults.of(device) is default
        assert default.state is state
    module.defaults._generators.clear()
    assert numbers(module.defaults.of(device)) == [2**64 - 1, 0]


def test_each_device_has_its_own():
    cp = pytest.importorskip("cupy")
    cupybn.manual_seed(5)
    for _ in range(3):
        F.dropout(np.ones(4, np.float32))
    F.dropout(cp.ones(4, np.float32))
    assert [numbers(module.defaults.of(device)) for device in ("cpu", "cuda:0")] == [[5, 3], [5, 1]]


def test_without_a_seed_defaults_have_another(device):
    first = numbers(module.defaults.of(device))[0]
    module.defaults._generators.clear()
    assert numbers(module.defaults.of(device))[0] != first


def test_threads_get_the_same_generator(device):
    found, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        found.append(module.defaults.of(device))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({*map(id, found)}) == 1


@pytest.mark.skipif(not hasattr(pytest.importorskip("cupy"), "emulator"), reason="a GPU does not tell")
def test_the_host_does_not_wait():
    """Neither for a new generator, nor for a seed or a draw."""
    import cupy as cp

    x = cp.ones(64, np.float32)
    F.dropout(x)
    module.defaults._generators.clear()
    with cp.emulator.record_syncs() as syncs:
        F.dropout(x)
        cupybn.manual_seed(3)
        F.dropout(x, generator=Generator(5, device="cuda:0"))
    assert not syncs


def test_no_generator_is_made_within_a_capture():
    """Each launch would begin with its seed; one that is there may be seeded anew by each launch."""
    cp = pytest.importorskip("cupy")
    x, generator = cp.ones(64, np.float32), Generator(5, device="cuda:0")
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream, cp.cuda.using_allocator(pool.malloc):
        F.dropout(x, generator=generator.manual_seed(5))
        stream.begin_capture()
        for make in lambda: F.dropout(x), lambda: Generator(5, device="cuda:0"), lambda: cupybn.Dropout(seed=5):
            with pytest.raises(RuntimeError, match="made outside of a CUDA graph"):
                make()
        y = F.dropout(x, generator=generator.manual_seed(9))
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
    assert bits(y) == bits(philox.expected(np.ones(64, np.float32), np.arange(64), 0.5, 0, 9))
    assert numbers(generator) == [9, 1]
