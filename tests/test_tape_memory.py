"""Memory of calls that are played from tapes: what they allocate, what tapes hold, where new arrays begin."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._calls import call as _call
from cupybn._steps.geometry import PACK
from tests.reference import to_numpy
from tests.tapes import (
    NAMES,
    C,
    Form,
    act,
    alike,
    draw,
    out_of,
    tapes,
    without_tapes,
)

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="the stand-in for CuPy tells what was launched")

pytestmark = pytest.mark.usefixtures("fresh_plans")


@only_emulated
def test_a_tape_holds_no_array(either):  # noqa: ARG001
    """Whatever the first call was given or has made is gone when its caller lets go of it."""
    form = Form(residual=True, activation="relu")
    act(form, 0, True)  # what the first call of all loads stays
    _call._cache.clear()
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        before = emulator.usage().live_bytes
        for seed in range(2):
            arrays, dys = draw(form, seed)
            y, vjp_fn = F.batch_norm_vjp(**arrays, training=True, activation="relu")
            grads = vjp_fn(dys[0])
            alive = [weakref.ref(a) for a in (*arrays.values(), *dys, y, *grads)]
            assert emulator.usage().live_bytes > before
            del arrays, dys, y, vjp_fn, grads
            assert [reference for reference in alive if reference() is not None] == []
            assert emulator.usage().live_bytes == before
    finally:
        gc.enable()
    assert len(tapes()) == 2
    assert None not in tapes()


@only_emulated
@pytest.mark.parametrize("way", ["on chip", "streamed"])
@pytest.mark.parametrize(
    ("form", "forward", "vjp", "back"),
    [
        (Form(), 1, 2, 3),
        (Form(training=False), 1, 2, 3),
        (Form(given=NAMES[2:]), 1, 2, 1),
        (Form(given=NAMES[2:], training=False), 1, 2, 1),
        (Form(given=NAMES[1:]), 1, 2, 2),
        (Form(activation="relu"), 1, 2, 3),
        (Form(residual=True), 1, 2, 3),
        (Form(residual=True, activation="relu"), 1, 3, 4),
        (Form(out="new"), 0, None, None),
    ],
    ids=["training", "eval", "no affine", "no affine, eval", "bias", "relu", "residual", "residual, relu", "out"],
)
def test_allocations_of_a_played_call(way, request, plays, form, forward, vjp, back):
    """A result each, and one array for all that launches hand each other where there are two of them."""
    request.getfixturevalue("fresh_plans" if way == "on chip" else "streamed")
    more = way == "streamed" and form.training
    rest = {"training": form.training, "activation": form.activation}
    for time in range(3):
        arrays, (dy, *_) = draw(form, time)
        out = out_of(form, arrays)
        counts = [emulator.usage().allocations]
        y = F.batch_norm(**arrays, **rest, out=out)
        counts.append(emulator.usage().allocations)
        if vjp is not None:
            y, vjp_fn = F.batch_norm_vjp(**arrays, **rest)
            counts.append(emulator.usage().allocations)
            grads = vjp_fn(dy)
            counts.append(emulator.usage().allocations)
    found = np.diff(counts).tolist()
    back_more = way == "streamed" and (form.training or "weight" in form.given)
    assert found == ([forward + more] if vjp is None else [forward + more, vjp + more, back + back_more])
    assert len(plays) == 2 * len(found)
    assert vjp is None or grads.input.shape == y.shape


@pytest.fixture
def shift():
    """A list with the bytes behind an aligned address at which new memory begins; they take turns."""
    cuda, shifts, before = cp.cuda, [0], cp.cuda.get_allocator()

    def allocate(size):
        shifts.append(shifts.pop(0))
        return cuda.MemoryPointer(before(size + PACK).mem, shifts[-1]) if size else before(size)

    cuda.set_allocator(allocate)
    yield shifts
    cuda.set_allocator(before)


def test_memory_of_another_alignment(either, plays, shift):  # noqa: ARG001
    """New arrays that do not begin where packs do are never given to a tape, nor made one of."""
    offset = PACK // 2
    form = Form(residual=True, activation="relu")
    shift[:] = [offset]
    with without_tapes():
        misaligned = act(form, 1, True)
    for _ in range(3):
        alike(act(form, 1, True), misaligned)
    assert plays == []
    assert set(tapes()) <= {None}
    shift[:] = [0]
    _call._cache.clear()
    with without_tapes():
        aligned = act(form, 1, True)
    for _ in range(2):
        alike(act(form, 1, True), aligned)
    count = len(plays)
    assert count > 0
    shift[:] = [offset]
    for _ in range(2):
        alike(act(form, 1, True), misaligned)
    assert len(plays) == count
    shift[:] = [0]
    alike(act(form, 1, True), aligned)
    assert len(plays) == count + 4


@pytest.mark.parametrize("turns", [[0, 8], [8, 0, 0], [0, 0, 0, 8, 8], [0, 0, 8]], ids=str)
def test_memory_of_changing_alignment(either, shift, turns):  # noqa: ARG001
    """Results are right where only some of the new arrays begin where packs do."""
    form = Form(residual=True, activation="relu")
    arrays, (dy, *_) = draw(form, 1)
    host = {name: to_numpy(array) for name, array in arrays.items()}
    rest = {"training": True, "activation": "relu", "momentum": 0.0}
    y, vjp_fn = F.batch_norm_vjp(**host, **rest)
    expected = y, *vjp_fn(to_numpy(dy))
    for i in range(12):
        shift[:] = turns if i % 4 else [0]
        y, vjp_fn = F.batch_norm_vjp(**arrays, **rest)
        for ours, theirs in zip((y, *vjp_fn(dy)), expected, strict=True):
            np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turns", [[8], [0, 8], [8, 0, 0], [0, 0, 8, 8]], ids=str)
def test_second_order_in_memory_of_changing_alignment(plays, shift, turns):
    """New arrays begin where the packs of the record do, also from a tape, whatever memory there is."""
    arrays, (dy, cdx, cdresidual, *_) = draw(Form(residual=True, activation="relu"), 1)
    rest = {"training": True, "activation": "relu", "momentum": 0.0}
    cotangents = cdx, arrays["weight"], arrays["bias"], cdresidual
    host = {name: to_numpy(array) for name, array in arrays.items()}
    _, second_vjp_fn = F.batch_norm_vjp(**host, **rest)[1].vjp(to_numpy(dy))
    expected, grads = second_vjp_fn(tuple(map(to_numpy, cotangents)))
    _, second_vjp_fn = F.batch_norm_vjp(**arrays, **rest)[1].vjp(dy)
    for i in range(8):
        shift[:] = turns if i % 4 else [0]
        ddy, second = second_vjp_fn(cotangents)
        for ours, theirs in (ddy, expected), (second.input, grads.input), (second.weight, grads.weight):
            np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-5, atol=1e-5)
    assert plays


@only_emulated
@pytest.mark.parametrize("way", ["on chip", "streamed"])
def test_a_played_call_allocates_what_the_recorded_one_did(way, request, plays):
    """Sizes are those of the first call, so that a pool that one call has filled serves all later ones."""
    request.getfixturevalue("fresh_plans" if way == "on chip" else "streamed")
    form = Form(residual=True, activation="relu")
    (arrays, dys), pool, sizes = draw(form, 1), cp.get_default_memory_pool(), []

    def allocate(size):
        sizes[-1].append(size)
        return pool.malloc(size)

    cp.cuda.set_allocator(allocate)
    try:
        for _ in range(3):
            sizes.append([])
            F.batch_norm_vjp(**arrays, training=True, activation="relu")[1](dys[0])
    finally:
        cp.cuda.set_allocator(pool.malloc)
    assert sorted(sizes[0]) == sorted(sizes[1]) == sorted(sizes[2])
    assert len(plays) == 4


def test_a_counter_of_another_kind_is_no_reason_to_look_again(plays):
    """Nobody reads the counter of a layer in eval mode: it may be anything, and calls are checked once all the same."""
    layer = cupybn.BatchNorm2d(C, device="cuda:0").eval()
    arrays, _ = draw(Form(), 1)
    expected = to_numpy(layer(arrays["input"]))
    layer.num_batches_tracked = np.array(3)
    for _ in range(3):
        np.testing.assert_array_equal(to_numpy(layer(arrays["input"])), expected)
    assert len(plays) == 3
    assert len(_call._cache) == 1


def test_vectors_that_share_memory_and_are_only_read_are_no_reason_either(plays):
    """A weight and a bias that lie element by element between each other, and a residual that is the input."""
    arrays, _ = draw(Form(), 2)
    pairs = cp.asarray(np.random.default_rng(2).normal(size=(C, 2)).astype(np.float32))
    arrays |= {"weight": pairs[:, 0], "bias": pairs[:, 1], "residual": arrays["input"]}
    buffers = arrays["running_mean"], arrays["running_var"]
    before = [array.copy() for array in buffers]
    results = []
    for _ in range(3):
        for buffer, value in zip(buffers, before, strict=True):
            buffer[...] = value
        results.append(to_numpy(F.batch_norm(**arrays, training=True)))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert len(plays) == 2
