"""Ctrl-C at any line of the library, or no memory left at any allocation: everything or nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from tests.reference import bits

LIBRARY = str(Path(cupybn.__file__).parent)
NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def interrupted(call, at, library=LIBRARY):
    """Whether Ctrl-C, which comes at a given line that the library executes, came before the call was done.

    The library is the beginning of its files' paths, or a tuple of several.
    """
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(library):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    outside = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outside)
    return False


def state(layer):
    """All that a layer holds, to compare."""
    arrays = {name: getattr(layer, name) for name in NAMES}
    return bits(*arrays.values()), layer.num_features, layer.device, layer.training


def check(make, act, last_lines=0, step=1):
    """Check that `act` leaves what `make` returns unchanged, at whichever line the interrupt comes.

    Within `last_lines` lines at the end of the call, everything may be done instead. With a `step` some lines are left
    out.
    """
    done = make()
    act(done)
    after, at, late = state(done), 0, 0
    while True:
        layer, at = make(), at + step
        before = state(layer)
        if not interrupted(lambda layer=layer: act(layer), at):
            break
        late += state(layer) == after
        assert state(layer) in (before, after), f"at line {at} of the call"
    assert at > 10
    assert late <= last_lines
    assert state(layer) == after


@pytest.fixture(params=["first", "later"])
def forget(request, device):
    """A function to be called before each call: then that takes its steps and is recorded. Without it, it is played."""
    if device == "cpu" and request.param == "first":
        pytest.skip("NumPy's steps are taken at every call")

    def forget():
        if request.param == "first":
            _call._cache.clear()

    forget.recorded = request.param == "first"
    return forget


@pytest.fixture
def x(xp, rng):
    return xp.asarray(rng.standard_normal((6, 3, 4)).astype(np.float32))


@pytest.fixture
def make(device):
    """A function that makes a layer whose running statistics have moved."""

    def make(**options):
        layer = cupybn.BatchNorm1d(3, device=device, **options)
        layer.load_state_dict(dict(zip(NAMES, [*np.arange(2.0, 14).reshape(4, 3), np.int64(5)], strict=True)))
        return layer

    return make


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_pass_in_training(make, x, momentum, forget):
    """An interrupted training pass moves all buffers or none; after they have moved, few lines are left.

    More are left of one that is recorded: its tape is made of what it has launched.
    """

    def new():
        forget()
        return make(momentum=momentum)

    last_lines, step = (100, 7) if forget.recorded else (20, 1)  # test_tape_launches.py has all lines of recording
    check(new, lambda layer: layer(x), last_lines, step)
    check(new, lambda layer: layer.vjp(x, x), last_lines, step)


def test_the_first_pass_of_a_lazy_layer(device, x):
    check(lambda: cupybn.BatchNorm1d(None, device=device), lambda layer: layer(x))


def test_load_state_dict(device, make, rng):
    values = [*rng.standard_normal((4, 3)), np.int64(9)]
    other = dict(zip(NAMES, values, strict=True))
    check(make, lambda layer: layer.load_state_dict(other))
    check(lambda: cupybn.BatchNorm1d(None, device=device), lambda layer: layer.load_state_dict(other))


def test_load_state_dict_into_an_array_of_two_roles(make, rng):
    def shared():
        layer = make()
        layer.weight = layer.running_var
        return layer

    other = dict(zip(NAMES, [*rng.random((4, 3)), 9], strict=True))
    check(shared, lambda layer: layer.load_state_dict(other))


def test_resets(make):
    check(make, lambda layer: layer.reset_parameters())
    check(make, lambda layer: layer.reset_running_stats())


def test_to(make, device):
    pytest.importorskip("cupy")
    check(make, lambda layer: layer.to("cpu" if device != "cpu" else "cuda:0"), last_lines=1)


def test_no_stats_update(make, x):
    """An interrupt on the way into `no_stats_update` leaves layers that track."""
    layer, at, inside = make(), 0, False

    def enter():
        nonlocal inside
        with cupybn.no_stats_update():
            inside = True
            sys.settrace(None)  # ends tracing, so that the way out is not interrupted

    while not inside:
        at += 1
        interrupted(enter, at)
        before = state(layer)
        layer(x)
        assert state(layer) != before, f"at line {at}"
    assert at > 2


@pytest.mark.parametrize("into", ["an array of another order", "the input", "another array"])
def test_functions(xp, x, into, forget):
    """An interrupted function moves both running statistics or none, even if an output is copied at the end."""
    at, more = 0, True
    while more:
        at += 1
        forget()
        buffers = [xp.zeros(3, np.float32), xp.ones(3, np.float32)]
        before, given = bits(*buffers), x.copy()
        others = {"the input": given, "another array": xp.zeros_like(given)}
        out = others.get(into, xp.zeros((4, 3, 6), np.float32).transpose(2, 1, 0))
        more = interrupted(lambda given=given, b=buffers, out=out: F.batch_norm(given, *b, training=True, out=out), at)
        moved = [now != then for now, then in zip(bits(*buffers), before, strict=True)]
        assert all(moved) or (more and not any(moved)), f"at line {at}"


@pytest.mark.parametrize("momentum", [0.1, None])
def test_memory_that_runs_out(xp, make, x, momentum, monkeypatch, forget):
    """Running out of memory at any allocation moves no buffer, as they move after the last allocation."""
    empty, left = xp.empty, 0

    def failing(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return empty(*arguments, **options)

    monkeypatch.setattr(xp, "empty", failing)
    for call in (lambda layer: layer(x), lambda layer: layer.vjp(x, x)):
        for most in range(50):
            left = 10**6
            layer = make(momentum=momentum)
            forget()
            before, left = state(layer), most
            try:
                call(layer)
            except MemoryError:
                assert state(layer) == before
            else:
                assert state(layer) != before
                assert most > 0
                break
        else:
            pytest.fail("memory never sufficed")
