"""Launches from tapes: in threads, within each other, when they fail, on streams, in graphs and on two devices."""

from __future__ import annotations

import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import cupybn.functional as F
from cupybn._calls import call as _call
from cupybn._steps import launcher
from cupybn._steps.launcher import Frame, Kernel, listening
from cupybn._steps.tape import Tape
from tests.reference import bits, to_numpy
from tests.steps import forget_plans
from tests.tapes import (
    Form,
    act,
    alike,
    draw,
    kernels_of,
    tapes,
    without_tapes,
)

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.fixture
def frames(monkeypatch):
    """The frames that are made from now on; no kernel has one in the beginning."""
    made = []

    class Counted(Frame):
        def __init__(self, ranges):
            super().__init__(ranges)
            made.append(weakref.ref(self))

    monkeypatch.setattr(launcher, "Frame", Counted)
    launcher.kernel.cache_clear()
    yield made
    launcher.kernel.cache_clear()


def interrupting(monkeypatch, kind, inside):
    """Let `inside` be called where a launch of this kernel is about to be handed to CuPy, its frame being filled."""
    original = Kernel.run

    def run(self, grid, block, frame, shared):
        if self.name.endswith(kind):
            inside()
        original(self, grid, block, frame, shared)

    monkeypatch.setattr(Kernel, "run", run)


def test_threads_that_make_the_same_call(either, plays):  # noqa: ARG001
    """Eight threads play the same tapes at once, each for its own arrays."""
    form = Form(residual=True, activation="relu")
    with without_tapes():
        expected = [act(form, seed, True).bits for seed in range(8)]
    act(form, 9, True)
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        return [act(form, seed, True, alone=False).bits for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for seed, outcomes in enumerate(pool.map(work, range(8))):
            assert outcomes == [expected[seed]] * 10
    assert len(plays) == 2 + 8 * 10 * 4


@pytest.mark.parametrize("first", ["recorded", "played"])
def test_a_thread_that_launches_while_another_one_does(monkeypatch, frames, first):
    """A whole call comes in between when the arguments of another call of that form lie in their frame."""
    form = Form()
    with without_tapes():
        expected = [act(form, seed, False).bits for seed in range(2)]
    if first == "played":
        act(form, 5, False)
    frames.clear()
    found, busy = {}, threading.Lock()

    def work():
        found["other"] = act(form, 1, False, alone=False).bits

    def inside():
        if busy.acquire(blocking=False):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(work).result()

    interrupting(monkeypatch, "bn_forward", inside)
    found["own"] = act(form, 0, False, alone=False).bits
    assert [found["own"], found["other"]] == expected
    assert len(frames) <= 2
    monkeypatch.undo()
    assert act(form, 0, False).bits == expected[0]


@only_emulated
@pytest.mark.parametrize("first", ["recorded", "played"])
def test_a_launch_within_a_launch(monkeypatch, plays, frames, first, either):  # noqa: ARG001
    """What hooks into launches may call the library: each call has its own arguments, three deep."""
    form = Form()
    with without_tapes():
        expected = [act(form, seed, True).bits for seed in range(4)]
    if first == "played":
        act(form, 5, True)
    found, seeds, original = {}, [1, 2, 3], cp.RawKernel.__call__

    def call(self, *args, **options):
        if seeds:
            seed = seeds.pop()
            found[seed] = act(form, seed, True).bits
        original(self, *args, **options)

    monkeypatch.setattr(cp.RawKernel, "__call__", call)
    found[0] = act(form, 0, True).bits
    assert [found[seed] for seed in range(4)] == expected
    assert len(frames) <= 4 * len({kernel for tape in tapes() for kernel in kernels_of(tape)})


def test_as_many_frames_as_launches_at_once(frames):
    form = Form()
    for seed in range(5):
        act(form, seed, True)
        act(form._replace(training=False), seed, True)
    used = {kernel for tape in tapes() for kernel in kernels_of(tape)}
    assert len(frames) == len(used)
    assert all(len(kernel._frames) == 1 for kernel in used)


@only_emulated
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_error_of_a_launch(streamed, monkeypatch, frames, plays, at, error):  # noqa: ARG001
    """An error goes to the caller, no tape is kept of it, and the next calls are right; one frame at most is lost."""
    form = Form()
    with without_tapes():
        expected = act(form, 0, True)
    for first in True, False:
        left, original = at, cp.RawKernel.__call__

        def call(self, *args, original=original, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            original(self, *args, **options)

        made, before = len(frames), len(tapes())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cp.RawKernel, "__call__", call)
            with pytest.raises(error):
                act(form, 7, True)
        assert listening.listener is None
        if first:
            assert len(tapes()) == before + at // 2
        plays.clear()
        for _ in range(2):
            alike(act(form, 0, True), expected)
        assert len(frames) <= made + (5 if first else 1)


FLOW = tuple(sys.modules[name].__file__ for name in ("cupybn.functional", Tape.__module__, Kernel.__module__))
"""Files of which each line of a call is interrupted."""


def traced(call, at=None):
    """The lines of FLOW that a call executes, in their order; Ctrl-C comes at the one of a number."""
    lines, outside = [], sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in FLOW:
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(outside)
    return lines


def first_and_last(lines):
    """Numbers at which each line comes first, and at which it comes last."""
    return sorted({lines.index(line) for line in lines} | {len(lines) - 1 - lines[::-1].index(line) for line in lines})


@pytest.mark.parametrize("first", ["recorded", "played"])
def test_an_interrupt_at_any_line(streamed, frames, first):  # noqa: ARG001
    """Nobody listens then, nothing is kept of the arrays, and the next call is right; one frame at most is lost."""
    form = Form()

    def there_and_back(seed):
        arrays, (dy, *_) = draw(form, seed)
        alive = weakref.ref(arrays["input"])

        def call():
            y, vjp_fn = F.batch_norm_vjp(**arrays, training=True)
            return bits(y, *arrays.values(), *vjp_fn(dy))

        return call, alive

    with without_tapes():
        expected = there_and_back(0)[0]()
    if first == "played":
        there_and_back(6)[0]()
    lines = traced(there_and_back(6)[0])
    for at in first_and_last(lines):
        if first == "recorded":
            _call._cache.clear()
        made = len(frames)
        call, alive = there_and_back(6)
        assert traced(call, at) == lines[: at + 1]
        del call
        assert listening.listener is None
        assert alive() is None, f"at {lines[at]}"
        assert there_and_back(0)[0]() == expected, f"at {lines[at]}"
        assert len(frames) <= made + 1, f"at {lines[at]}"
    assert None not in tapes()


# ---------------------------------------------------------------------------------------------------------------------
# Streams, graphs and devices


@only_emulated
def test_launches_go_to_the_current_stream(either):  # noqa: ARG001
    form = Form()
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(3)]
    for first in streams[0], streams[1]:
        _call._cache.clear()
        for stream in first, streams[0], streams[1], streams[2], cp.cuda.Stream.null:
            arrays, (dy, *_) = draw(form, 1)
            with emulator.record() as launches, stream:
                _, vjp_fn = F.batch_norm_vjp(**arrays, training=True)
                vjp_fn(dy)
            assert {launch.stream for launch in launches} == {stream.ptr}


@pytest.mark.parametrize("inside", ["recorded", "played"])
def test_graphs_replay_what_was_captured(either, inside, plays):  # noqa: ARG001
    """A graph keeps the arguments of its launches, whatever the frames hold later."""
    form = Form(residual=True, activation="relu")
    arrays, (dy, *_) = draw(form, 1)
    other, (other_dy, *_) = draw(form, 2)
    with without_tapes():
        expected = act(form, 2, True).bits
        later = [[to_numpy(a).copy() for a in draw(form, seed)[0].values()] for seed in (3, 4)]

    def both(arrays, dy, momentum):
        y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, momentum=momentum, eps=form.eps, activation="relu")
        return y, vjp_fn(dy)

    keep = both(other, other_dy, 0.5)  # compiles, and CuPy's pool has enough memory from now on
    plays.clear()
    if inside == "recorded":
        _call._cache.clear()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        y, grads = both(arrays, dy, 0.25)
        graph = stream.end_capture()
    assert len(plays) == (0 if inside == "recorded" else 2)
    for values in later:
        assert act(form, 2, True).bits == expected  # in the same frames
        for array, value in zip(arrays.values(), values, strict=True):
            array[...] = cp.asarray(value)
        copies = {name: array.copy() for name, array in arrays.items()}
        with cp.cuda.Stream.null:
            graph.launch()
        stream.synchronize()
        with without_tapes():
            again = both(copies, dy, 0.25)
        assert bits(y, *grads, *arrays.values()) == bits(again[0], *again[1], *copies.values())
    assert len(plays) > 0
    assert keep


@only_emulated
def test_two_devices(plays):
    """Calls of one form on two devices have tapes of their own, whichever device is current."""
    form = Form(shape=(5, 2, 55, 20), residual=False)  # which takes more shared memory than a block has by itself
    no_clusters = replace(emulator.H200, compute_capability="80")
    with emulator.pretend(no_clusters, no_clusters):
        with without_tapes():
            expected = act(form, 1, True).bits
        launcher.kernel.cache_clear()  # shared memory has been asked for on one device
        forget_plans()
        for number, current in (0, 1), (1, 0), (0, 1), (1, 0), (1, 1), (0, 0):
            with cp.cuda.Device(number):
                arrays, (dy, other_dy, _) = draw(form, 1)
            with cp.cuda.Device(current), emulator.record() as launches:
                y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, momentum=0.2, eps=form.eps)
                grads = [*vjp_fn(dy), *vjp_fn(dy), *vjp_fn(other_dy)]
            assert {launch.device for launch in launches} == {number}
            assert max(launch.shared_mem for launch in launches) > launcher.SHARED
            assert {grad.device.id for grad in (y, *grads) if grad is not None} == {number}
            assert bits(y, *arrays.values(), *grads) == expected
        assert len(plays) == 2 * 2 + 4 * 4
        back = [kernel for tape in tapes() for kernel in kernels_of(tape) if kernel.name.endswith("bn_backward")]
        assert {frozenset(kernel._shared) for kernel in back} == {frozenset((0, 1))}
    launcher.kernel.cache_clear()
