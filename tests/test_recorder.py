"""Recorders: which launches they make a tape of, and which not."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cupybn.functional as F
from cupybn._steps import launcher, plans
from cupybn._steps.bundles import Sums
from cupybn._steps.launcher import listening
from cupybn._steps.tape import Recorder, Tapes, particulars_of
from tests.tapes import (
    FORMS,
    C,
    Form,
    act,
    alike,
    draw,
    tapes,
    without_tapes,
)

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.fixture
def looks(monkeypatch):
    """One entry for each time that a recorder has tried to make a tape."""
    found, original = [], Recorder._tape

    def tape(self):
        found.append(original(self))
        return found[-1]

    monkeypatch.setattr(Recorder, "_tape", tape)
    return found


def test_what_cannot_be_told_is_tried_once(plays, looks):
    """A gradient that is copied, as the record has wider packs, is in no array of the call."""
    form = FORMS["misaligned gradient, record"]
    with without_tapes():
        expected = act(form, 1, True)
    looks.clear()
    for _ in range(4):
        alike(act(form, 1, True), expected)
    assert [tape is None for tape in looks] == [False, True]
    assert len(plays) == 3
    assert sorted(tape is None for tape in tapes()) == [False, True]


def merge():
    """The kernel `merge_sums`."""
    return launcher.kernel("merge_sums", **plans.macros_of(np.dtype(np.float64), 1, 32, plans.Geometry((1,))))


def made_of(listed, results=(), given=(), key="a key"):
    """The tape, if there is one, of launches of the kernel `merge_sums`, each with these arguments by name."""
    found = Tapes()
    with found.recorder((key, [array.data.ptr for array in given], (0.0, 0.0))) as recorder:
        for arguments in listed:
            merge().launch((1,), 32, arguments)
        recorder.results = list(results)
    assert list(found) == [key]
    return found[key]


def merging(rng, **others):
    """Arguments of `merge_sums`, by name."""
    sums = Sums(*(cp.asarray(rng.standard_normal((1, C))) for _ in range(2)))
    return {
        "sums": sums, "count": cp.zeros(1), "dweight": cp.zeros(C), "dbias": None, "row": cp.zeros((1, 2 * C)),
        "parts": 1, "C": C,
    } | others  # fmt: skip


def parameters(arguments):
    """All arrays among the arguments."""
    return [*arguments["sums"], *(arguments[name] for name in ("count", "dweight", "row"))]


def test_every_address_is_told(rng):
    """Words of a tape are those of the arrays, by the numbers of given arrays, and of results behind them."""
    arguments = merging(rng)
    arrays = parameters(arguments)
    tape = made_of([arguments], given=arrays[:3], results=[None, arrays[3], None, arrays[4]])
    (launch,) = tape.launches
    places = launch.kernel.arguments.places
    assert {word: (number, offset) for word, number, offset in launch.addresses} == {
        places["sums.dy"]: (0, 0),
        places["sums.dy_xhat"]: (1, 0),
        places["count"]: (2, 0),
        places["dweight"]: (3, 0),
        places["row"]: (4, 0),
    }
    assert [made and (made.shape, made.dtype) for made in tape.results] == [
        None, ((C,), np.float64), None, ((1, 2 * C), np.float64)
    ]  # fmt: skip
    assert tape.own == []
    assert launch.numbers == []


@pytest.mark.parametrize("missing", range(5))
def test_one_address_that_is_not_told(rng, missing):
    arguments = merging(rng)
    arrays = parameters(arguments)
    assert made_of([arguments], given=[a for i, a in enumerate(arrays) if i != missing]) is None
    assert made_of([merging(rng, dweight=None), arguments], given=arrays) is None


def test_addresses_within_arrays(rng):
    """What begins within a result is told by its distance from the begin; within what was given it is not."""
    memory = cp.zeros(4 * C)
    arguments = merging(rng, dweight=memory[C : 2 * C])
    arrays = parameters(arguments)
    rest = [a for a in arrays if a is not arguments["dweight"]]
    tape = made_of([arguments], given=rest, results=[memory])
    word = tape.launches[0].kernel.arguments.places["dweight"]
    assert (word, 4, 8 * C) in tape.launches[0].addresses
    assert made_of([arguments], given=[*rest, memory]) is None
    behind = made_of([arguments | {"dweight": memory[C:][:C]}], given=rest, results=[memory[:C]])
    assert behind is None


def test_a_result_that_begins_between_packs(rng):
    arguments = merging(rng, dweight=cp.zeros(C + 1)[1:])
    given = [a for a in parameters(arguments) if a is not arguments["dweight"]]
    assert made_of([arguments], given=given, results=[arguments["dweight"]]) is None
    assert made_of([arguments | {"dweight": cp.zeros(C)}], given=given, results=[]) is None


@only_emulated
def test_nothing_is_kept_of_a_call_that_raises(monkeypatch):
    form = Form()
    original = cp.RawKernel.__call__

    def fail(*_args, **_options):
        raise RuntimeError("no")

    for _ in range(2):
        monkeypatch.setattr(cp.RawKernel, "__call__", fail)
        with pytest.raises(RuntimeError, match="no"):
            act(form, 1, False)
        assert tapes() == []
        assert listening.listener is None
    monkeypatch.setattr(cp.RawKernel, "__call__", original)
    act(form, 1, False)
    assert [len(tape.launches) for tape in tapes()] == [1]


def foreign_calls(x, running_mean, running_var, dy):
    """Functions that launch by no tape, with arrays that another call has, too: a weight that moves is copied."""
    shared = {"weight": running_var, "training": True}
    _, vjp_fn = F.batch_norm_vjp(x, running_mean, running_var, **shared)
    _, second_vjp_fn = vjp_fn.vjp(dy)
    return {
        "moments": lambda: F.moments(x),
        "training": lambda: F.batch_norm(x, running_mean, running_var, **shared),
        "back": lambda: vjp_fn(dy),
        "second order": lambda: second_vjp_fn((dy, running_var, None, None)),
    }


@only_emulated
@pytest.mark.parametrize("name", ["moments", "training", "back", "second order"])
def test_a_call_in_the_midst_of_another_one_is_not_on_its_tape(monkeypatch, name, either):  # noqa: ARG001
    """Hooks may call the library with arrays of the call that is recorded: its tape has its own launches only."""
    form = Form()
    arrays, dys = draw(form, 1)
    statistics = arrays["running_mean"], arrays["running_var"]
    foreign = foreign_calls(arrays["input"], *statistics, dys[0])[name]
    call = {"training": True, "eps": form.eps}
    with without_tapes():
        act(form, 2, True)
        expected = act(form, 2, True)
    original, busy = cp.RawKernel.__call__, []

    def hooked(self, *args, **options):
        if not busy:
            busy.append(True)
            foreign()
            busy.clear()
        original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cp.RawKernel, "__call__", hooked)
        _, vjp_fn = F.batch_norm_vjp(**arrays, **call)
        vjp_fn(dys[0])
    assert listening.listener is None
    lengths = [len(tape.launches) for tape in tapes()]
    assert len(lengths) == 2
    assert lengths == [len(expected.launches) // 4] * 2  # there once, back three times
    alike(act(form, 2, True), expected)


@only_emulated
def test_an_interrupt_that_a_hook_keeps_to_itself(monkeypatch):
    """A call that is interrupted in the midst of another one takes the listener with it: there is no tape of a part."""
    form = Form()
    original, busy = cp.RawKernel.__call__, []

    def hooked(self, *args, **options):
        if not busy:
            busy.append(True)
            with contextlib.suppress(KeyboardInterrupt):
                act(form._replace(training=False), 3, False)
        original(self, *args, **options)

    leave, interrupts = launcher.Hearing.__exit__, [KeyboardInterrupt]

    def interrupted(self, *what):
        if interrupts:
            raise interrupts.pop()
        leave(self, *what)

    with without_tapes():
        expected = act(form, 1, False)
    with monkeypatch.context() as patch:
        patch.setattr(cp.RawKernel, "__call__", hooked)
        patch.setattr(launcher.Hearing, "__exit__", interrupted)
        act(form, 1, False)
    assert tapes() == []
    assert listening.listener is None
    for _ in range(2):
        alike(act(form, 1, False), expected)


def test_recorders_within_recorders():
    outer, inner = Recorder(Tapes(), ("outer", [], (0.0, 0.0))), Recorder(Tapes(), ("inner", [], (0.0, 0.0)))
    assert listening.listener is None
    with outer:
        assert listening.listener is outer
        with launcher.unheard():
            assert listening.listener is None
            with inner:
                assert listening.listener is inner
                inner.results = []
            assert listening.listener is None
        assert listening.listener is outer
        outer.results = []
    assert listening.listener is None
    with launcher.unheard():
        assert listening.listener is None


def test_a_listener_hears_its_own_thread_alone(rng):
    arguments = merging(rng)
    recorder = Recorder(Tapes(), ("key", [array.data.ptr for array in parameters(arguments)], (0.0, 0.0)))
    with recorder:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(merge().launch, (1,), 32, arguments).result()
        assert recorder._heard == []
        merge().launch((1,), 32, arguments)
        recorder.results = []
    assert len(recorder._tapes["key"].launches) == 1


def test_a_recorder_that_hears_no_more_makes_no_tape():
    found = Tapes()
    with found.recorder(("key", [], (0.0, 0.0))) as recorder:
        recorder.results = []
        listening.reference = None
    assert found == {}


def test_a_listener_that_is_gone():
    """An interrupt may keep a recorder from taking its leave: nobody listens when it is gone."""
    recorder = Recorder(Tapes(), ("key", [], (0.0, 0.0)))
    recorder.__enter__()
    del recorder
    assert listening.listener is None
    act(Form(), 1, False)
    listening.reference = None
    assert [len(tape.launches) for tape in tapes()] == [1]


def test_sources():
    """Calls have one tape if their arrays are in the same places twice, and their tensors begin alike."""
    memory = cp.zeros(32, np.float32)
    a, b, c, d = (memory[i : i + 4] for i in (0, 4, 8, 12))
    numbers = 0.1, 0.2
    key, addresses, kept = particulars_of("kind", (a, None, b), (c, None, d), numbers)
    assert addresses == [x.data.ptr for x in (a, b, c, d)]
    assert kept == numbers
    assert particulars_of("kind", (b, None, a), (d, c, None), (0.3, 0.4))[0] == key
    others = [
        particulars_of("other", (a, None, b), (c, None, d), numbers),
        particulars_of("kind", (a, None, a), (c, None, d), numbers),
        particulars_of("kind", (a, None, b), (c, None, c), numbers),
        particulars_of("kind", (a, None, b), (a, None, d), numbers),
        particulars_of("kind", (a, None, b), (b, None, d), numbers),
        particulars_of("kind", (memory[1:5], None, memory[5:9]), (c, None, d), numbers),
        particulars_of("kind", (a, None, memory[6:10]), (c, None, d), numbers),
    ]
    assert len({key, *(other[0] for other in others)}) == 1 + len(others)
    assert particulars_of("kind", (a, None, b), (memory[9:13], None, memory[13:17]), numbers)[0] == key
