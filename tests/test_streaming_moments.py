"""Moments that stream: those of all chunks as one array, however they are cut, on the device, in memory of one size."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import pickle
import threading
import tracemalloc
from pathlib import Path

import cupy
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import StreamingMoments
from cupybn._ranks import group, totals
from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.totals import Total
from cupybn.statistics import streaming
from tests import test_group
from tests.reference import DTYPES, bits, exactly, in_order, to_numpy
from tests.test_derived_arrays import derived
from tests.test_interrupts import interrupted
from tests.test_moments import reference

EMULATED = hasattr(cupy, "emulator")


def check(stats, values, dtype=np.float32, axes=(1,), ddof=0):
    """Compare with the moments of all values as one array, an array on the host, within the promised bounds."""
    mean, var = reference(values, axes)
    channels = np.prod([values.shape[axis] for axis in axes])
    n = values.size // int(channels)
    var = var * n / (n - ddof)
    std = np.sqrt(var)
    assert stats.mean.dtype == stats.var().dtype == stats.std().dtype == np.float64
    assert stats.count.dtype == np.int64
    assert stats.mean.shape == stats.var().shape == stats.std().shape == mean.shape
    # A chunk's mean is rounded once, and with it the squares of its distance.
    roundings, relative = (2.0**-50, 2.0**-51 * (4 + abs(mean) / std)) if dtype == np.float64 else (1e-7, 1e-6)
    assert np.all(abs(to_numpy(stats.mean) - mean) <= roundings * std + 2.0**-52 * abs(mean))
    assert np.all(abs(to_numpy(stats.var(ddof)) - var) <= relative * var)
    assert np.all(abs(to_numpy(stats.std(ddof)) - std) <= relative * std)
    assert to_numpy(stats.count) == n


def stream(xp, chunks, axis=1):
    """Statistics of chunks, which are arrays on the host."""
    stats = StreamingMoments(axis)
    for chunk in chunks:
        assert stats.update(xp.asarray(chunk)) is stats
    return stats


def state(stats):
    """All that an object says, to compare."""
    seen = stats._seen
    return stats.channel_axis, None if seen is None else (seen.shape, *bits(*seen.total))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 1e3, 1e6])
@pytest.mark.parametrize("cuts", [(), (1, 2, 50), (64,), tuple(range(1, 120))], ids=len)
def test_any_split_gives_the_moments_of_the_whole(xp, rng, dtype, scale, cuts):
    if np.dtype(dtype).name == "float16" and scale == 1e6:
        scale = 3e4  # nearer to the largest number of this dtype
    if xp is not np and len(cuts) > 10:
        cuts = cuts[::8]  # the stand-in takes its time for a launch
    x = (rng.normal(scale, 1, (120, 3, 4)) * (1, 2, 0.5, 1)).astype(dtype)
    check(stream(xp, np.split(x, cuts)), x, dtype)


@pytest.mark.parametrize("scale", [1, 1e6])
def test_any_order_gives_them_too(xp, rng, scale):
    """Sorted data, whose chunks have means far apart, outliers first or last, and random orders."""
    x = rng.normal(scale, 1, (96, 2)).astype(np.float32)
    x[17] += 1e4
    by_size = x[x[:, 0].argsort()]
    for values in x, x[17:], np.sort(x, axis=0), by_size[::-1], rng.permuted(x, axis=0):
        check(stream(xp, np.split(values, [1, 7, 8, 40])), values)
    halves = [stream(xp, np.split(part, 4)) for part in (by_size[:32], by_size[32:])]
    check(halves[0] + halves[1], x)
    check(halves[1] + halves[0], x)


def test_errors_do_not_grow(rng):
    """A hundred thousand additions at a mean of a million standard deviations leave the error where it was."""
    chunks, n = 100_000, 3
    x = rng.normal(1e6, 1, (chunks, n)).astype(np.float32)
    x[0] += 100  # the pivot is none of the best
    wide = x.astype(np.float64)
    rows = np.empty((chunks, 1, 3))
    rows[:, 0, 0], rows[:, 0, 1] = n, wide.mean(1)
    rows[:, 0, 2] = ((wide - wide.mean(1, keepdims=True)) ** 2).sum(1)
    total = functools.reduce(lambda total, row: total.plus(numpy_ops, Total.of(row)), rows[1:], Total.of(rows[0]))
    stats = StreamingMoments()
    stats._seen = streaming._Seen((1,), total)
    check(stats, x.reshape(-1, 1))
    mean, var = reference(x.reshape(-1, 1), (1,))
    assert abs(stats.mean - mean) <= 2.0**-52 * mean
    assert abs(stats.var() - var) <= 1e-10 * var


def test_many_updates(rng):
    x = rng.normal(1e6, 1, (3000, 1, 2)).astype(np.float32)
    check(stream(np, x), x.reshape(3000, 2))


def test_many_updates_on_a_device(rng):
    x = rng.normal(1e6, 1, (200, 2, 3)).astype(np.float32)
    check(stream(cupy, x), x.reshape(400, 3))


def test_constant_channels(xp):
    stats = stream(xp, [np.full((n, 2), 1e8, np.float32) for n in (1, 2, 3)])
    assert bool((stats.mean == 1e8).all())
    assert not to_numpy(stats.var()).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_stays_in_its_channel(xp, rng, bad, at):
    chunks = [rng.normal(5, 1, (4, 3)).astype(np.float32) for _ in range(3)]
    clean = stream(xp, chunks)
    chunks[at][1, 1] = bad
    spoilt = stream(xp, chunks)
    for before, after in (clean.mean, spoilt.mean), (clean.var(), spoilt.var()), (clean.std(1), spoilt.std(1)):
        assert not np.isfinite(to_numpy(after)[1])
        assert bits(to_numpy(before)[::2]) == bits(to_numpy(after)[::2])
    assert spoilt.count == 12


@pytest.mark.filterwarnings("error")
def test_values_that_only_just_are_numbers(xp):
    """Distances beyond float64 are infinite, without a warning."""
    stats = stream(xp, [np.array([[x, 1.0]]) for x in (1.5e308, -1.5e308, 1.0)])
    assert not np.isfinite(to_numpy(stats.var())[0])
    assert (to_numpy(stats.mean)[1], to_numpy(stats.var())[1]) == (1, 0)


def test_the_same_chunks_give_the_same_bits(xp, rng):
    chunks = [rng.normal(1e3, 1, (n, 3, 2)).astype(np.float32) for n in (5, 1, 7)]
    assert state(stream(xp, chunks)) == state(stream(xp, chunks))


@pytest.mark.filterwarnings("error")
def test_ddof(xp, rng):
    """The variance is divided by what is left of the count; NaN where that is nothing."""
    x = rng.normal(0, 1, (3, 2)).astype(np.float32)
    stats = stream(xp, [x[:1], x[1:]])
    for ddof in 0, 1, 2, 1.5, np.float32(1), -1:
        check(stats, x, ddof=float(ddof))
    for ddof in 3, 4, 3.0, np.inf, np.nan:
        assert np.isnan(to_numpy(stats.var(ddof))).all()
        assert np.isnan(to_numpy(stats.std(ddof))).all()
    for ddof in "1", None, xp.ones(()):
        with pytest.raises(TypeError, match=r"^expected ddof to be a float \(got "):
            stats.var(ddof)
        with pytest.raises(TypeError, match=r"^expected ddof to be a float \(got "):
            stats.std(ddof)


@pytest.mark.parametrize("scale", [1e-170, 1e200, 1.5e308])
def test_settings_of_the_caller_play_no_part(xp, scale):
    """What is beyond float64 is no error, and makes no noise, however NumPy is set."""
    chunks = [xp.asarray(scale * np.array([[0.0, 1], [1, 1]])), xp.asarray(scale * np.array([[-1.0, 1], [0.5, -1]]))]
    with np.errstate(all="ignore"):
        expected = all_of(chunks)
    with np.errstate(all="raise"):
        assert all_of(chunks) == expected


def all_of(chunks):
    """The bits of all statistics of some chunks, and of their sum with itself."""
    stats = StreamingMoments()
    for chunk in chunks:
        stats.update(chunk)
    variances = [each.var(ddof) for each in (stats, stats + stats) for ddof in (0, -np.inf, 3.9999999999999996)]
    return bits(stats.mean, stats.std(), *variances)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


def test_chunks_may_differ(xp, rng):
    """Chunks may have other ranks, sizes, dtypes and memory orders, and be of derived classes."""
    parts = [
        rng.normal(3, 1, (4, 5)).astype(np.float16),
        rng.normal(3, 1, (2, 5, 3)).astype(np.float32),
        rng.normal(3, 1, (2, 5, 1, 2)).astype(DTYPES[1]),
        rng.normal(3, 1, (1, 5, 2, 3, 2)),
    ]
    arrays = [
        in_order(xp.asarray(parts[0]), (1, 0)),
        derived(xp, xp.asarray(parts[1])),
        xp.asarray(np.repeat(parts[2], 2, axis=3))[..., ::2],
        in_order(xp.asarray(parts[3]), (0, 2, 3, 4, 1)),
    ]
    stats = StreamingMoments()
    for array in arrays:
        stats.update(array)
    values = [np.moveaxis(part.astype(np.float64), 1, 0).reshape(5, -1) for part in parts]
    check(stats, np.concatenate(values, axis=1).T)


@pytest.mark.parametrize("axes", [-1, (1, 2), (2, 1), (3, -3), (0, 1, 2, 3)], ids=str)
def test_axes(xp, rng, axes):
    """Statistics over several axes have the shape of these, in the tuple's order, for chunks of any memory order."""
    several = axes if isinstance(axes, tuple) else (axes,)
    whole = rng.normal(3, 1, (6, 3, 4, 5)).astype(np.float32)
    if len(several) == 4:
        chunks = [whole[i : i + 2] for i in (0, 2, 4)]
        values, check_axes = np.stack(chunks), (1, 2, 3, 4)
    else:
        chunks, values, check_axes = np.split(whole, [1, 3]), whole, several
    stats = StreamingMoments(axes)
    for chunk, order in zip(chunks, [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)], strict=True):
        stats.update(in_order(xp.asarray(chunk), order))
    check(stats, values, axes=check_axes)
    assert stats.channel_axis == axes


def test_masks(xp, rng):
    """What masks leave out is as if it were not there, also where one leaves nothing, at first or later."""
    chunks = [rng.normal(1e3, 1, (4, 3, 5)).astype(np.float32) for _ in range(4)]
    masks = [np.zeros((), bool), rng.random((4, 5)) < 0.5, np.zeros((4, 5), bool), rng.random((4, 1)) < 0.5]
    stats = StreamingMoments()
    for chunk, mask in zip(chunks, masks, strict=True):
        chunk.swapaxes(1, 2)[~np.broadcast_to(mask, (4, 5))] = np.nan
        stats.update(xp.asarray(chunk), xp.asarray(mask))
    rest = stats.update(xp.asarray(chunks[0][:0]))
    first = StreamingMoments().update(xp.asarray(chunks[1]), xp.asarray(masks[1]))
    assert bits(stats._seen.total.pivot) == bits(first.mean)  # the pivot is one of the values' own size
    left = [x.swapaxes(1, 2)[np.broadcast_to(mask, (4, 5))] for x, mask in zip(chunks, masks, strict=True)]
    check(rest, np.concatenate(left))
    two = StreamingMoments((2, 1)).update(xp.asarray(chunks[1][:2]), mask=xp.asarray([True, False]))
    np.testing.assert_array_equal(to_numpy(two.mean), chunks[1][0].T.astype(np.float64))


@pytest.mark.filterwarnings("error")
def test_masks_that_leave_nothing(xp):
    """No values: the count is 0, and all else NaN, until there are some."""
    stats = StreamingMoments()
    for _ in range(2):
        stats.update(xp.full((4, 2), 7, np.float32), xp.zeros(4, bool))
        assert stats.count == 0
        for statistic in stats.mean, stats.var(), stats.std(1):
            assert np.isnan(to_numpy(statistic)).all()
    both = stats + stats
    for some in stats, both:
        assert some.count == 0
        some.update(xp.full((4, 2), 7, np.float32), xp.asarray([True, False, False, True]))
        assert some.count == 2
        assert bool((some.mean == 7).all())
        assert not to_numpy(some.var()).any()


@pytest.mark.parametrize("value", [1.0, -1e160, 1e300])
def test_masks_that_leave_nothing_change_nothing(xp, value):
    x = xp.asarray(value * np.arange(1, 5, dtype=np.float64).reshape(2, 2))
    stats = StreamingMoments().update(x[:1]).update(x[:1])
    before = state(stats)
    assert state(stats.update(x, xp.zeros(2, bool))) == before
    nothing = StreamingMoments().update(x, xp.zeros(2, bool))
    assert state(stats + nothing) == before
    assert state(nothing + stats) == before


def test_empty_chunks_change_nothing(xp, monkeypatch):
    """Empty chunks are checked, but allocate nothing, nor do they settle the channels."""
    stats = StreamingMoments()
    for shape in (0, 3), (2, 0), (4, 5, 0):
        assert stats.update(xp.empty(shape, np.float32)) is stats
        assert state(stats) == (1, None)
    stats.update(xp.ones((2, 3), np.float32))
    before = stats._seen
    monkeypatch.setattr(streaming, "parts_of", None)
    for shape in (0, 3), (4, 3, 0):
        stats.update(xp.empty(shape, np.float32), xp.empty((), bool))
        assert stats._seen is before
    for shape in (0, 4), (2, 0):
        with pytest.raises(ValueError, match=f"expected input with 3 channels, .* \\(got {shape[1]} channels\\)"):
            stats.update(xp.empty(shape, np.float32))
    with pytest.raises(ValueError, match="expected mask of shape"):
        stats.update(xp.empty((0, 3), np.float32), xp.empty(5, bool))


def test_nothing_is_shared(xp, rng):
    """Neither chunks nor results share memory with what is held."""
    x = xp.asarray(rng.normal(0, 1, (4, 3)).astype(np.float64))
    one = xp.asarray(rng.normal(0, 1, (1, 3)).astype(np.float64))
    for stats in stream(xp, [x, one]), stream(xp, [one]):
        before = state(stats)
        x[...] = one[...] = 99
        for result in (stats.mean, stats.var(), stats.std(), stats.count):
            result[...] = 99
        assert state(stats) == before


# ---------------------------------------------------------------------------------------------------------------------
# Objects


def test_before_anything_was_added():
    stats = StreamingMoments()
    assert type(stats.count) is np.ndarray
    assert (stats.count.shape, stats.count.dtype, stats.count) == ((), np.int64, 0)
    message = "expected an update before statistics are asked for (got none): nothing was added yet"
    for ask in lambda: stats.mean, stats.var, stats.std:
        with pytest.raises(ValueError, match=exactly(message)):
            ask()
    assert stats.merge(StreamingMoments()) is stats
    assert (stats + stats).count == 0
    assert repr(stats) == "StreamingMoments(channel_axis=1, count=0)"
    for twin in pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats):
        assert state(twin) == (1, None)


def test_repr(xp, device):
    stats = stream(xp, [np.ones((4, 3, 2), np.float32)])
    assert repr(stats) == f"StreamingMoments(channel_axis=1, channels=3, count=8, device={device!r})"
    stats = stream(xp, [np.ones((4, 3, 2), np.float32)], (2, -2))
    assert repr(stats) == f"StreamingMoments(channel_axis=(2, -2), channels=(2, 3), count=4, device={device!r})"


def test_kinds_of_results(xp):
    stats = stream(xp, [np.ones((4, 3), np.float32)])
    for result in stats.mean, stats.var(), stats.std(), stats.count:
        assert isinstance(result, xp.ndarray)
        assert result.flags.c_contiguous
    assert stats.count.shape == ()
    assert stats.count.dtype == np.int64
    assert stats.mean is not stats.mean


def test_merge(xp, rng):
    """Statistics merge into one; the other is left as it was, and follows neither."""
    x = rng.normal(1e6, 1, (30, 3)).astype(np.float32)
    stats, other, rest = (stream(xp, np.split(part, 2)) for part in np.split(x, 3))
    before = state(other)
    assert stats.merge(other) is stats
    assert state(other) == before
    check(stats, x[:20])
    check(StreamingMoments().merge(stats), x[:20])
    total = functools.reduce(operator.add, [stats, rest, StreamingMoments()], StreamingMoments())
    check(total, x)
    check(stats, x[:20])
    check(rest, x[20:])
    check(stats.merge(stats), np.concatenate([x[:20], x[:20]]))
    other.update(xp.asarray(x[:5]))
    check(total, x)


def test_copies(xp, rng):
    """Copies and pickles go on by themselves."""
    x = rng.normal(1e3, 1, (10, 3, 2)).astype(np.float32)
    for axis in 1, (2, 1):
        stats = stream(xp, [x[:4]], axis)
        before = state(stats)
        for twin in copy.copy(stats), copy.deepcopy(stats), pickle.loads(pickle.dumps(stats)):
            assert type(twin) is StreamingMoments
            assert state(twin) == before
            twin.update(xp.asarray(x[4:]))
            check(twin, x, axes=axis if isinstance(axis, tuple) else (axis,))
            assert state(stats) == before


def test_derived_classes_stay_so(rng):
    class Named(StreamingMoments):
        name = "default"

    stats = Named().update(rng.normal(0, 1, (4, 3)))
    stats.name = "mine"
    for twin in copy.copy(stats), copy.deepcopy(stats), stats + StreamingMoments(), stats.synchronize(None):
        assert (type(twin), twin.name) == (Named, "mine")
    assert repr(stats).startswith("Named(")
    stats.seen_on = ["monday"]
    twin = copy.deepcopy(stats)
    assert (state(twin), twin.seen_on) == (state(stats), stats.seen_on)
    twin.seen_on.append("tuesday")
    assert stats.seen_on == ["monday"]


def test_threads_that_add_up(rng):
    """Objects that threads have for themselves add up to that of one thread."""
    x = rng.normal(1e3, 1, (8, 5, 3)).astype(np.float32)
    parts = [StreamingMoments() for _ in range(4)]
    threads = [threading.Thread(target=parts[i].update, args=(x[2 * i : 2 * i + 2].reshape(-1, 3),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(sum(parts[1:], parts[0]), x.reshape(-1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def test_memory_is_flat(rng):
    """What is held does not grow, and an update takes no more than the steps do."""
    x = rng.normal(1e3, 1, (20, 512)).astype(np.float32)
    stats, noise = StreamingMoments().update(x), 50_000  # of threads and caches; 200 rows would be 1.6 MB
    size = len(pickle.dumps(stats))
    tracemalloc.start()
    try:
        stats.update(x)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        stats.update(x)
        _, peak = tracemalloc.get_traced_memory()
        for _ in range(200):
            stats.update(x)
        after, later_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < noise
    assert later_peak - before < 1.2 * (peak - before) + noise
    assert abs(len(pickle.dumps(stats)) - size) < 16


def test_launches(rng):
    """An update is always the same few launches, and the host never waits; nor does it for results."""
    if not EMULATED:
        pytest.skip("the stand-in counts launches, and how often the host waits")
    x, mask = cupy.asarray(rng.normal(0, 1, (6, 3, 4)).astype(np.float32)), cupy.asarray(rng.random((6, 4)) < 0.5)
    for given in (), (mask,):
        stats, counts = StreamingMoments().update(x, *given), []
        for _ in range(5):
            with cupy.emulator.record() as launches, cupy.emulator.record_syncs() as syncs:
                stats.update(x, *given)
                results = stats.count, stats.mean, stats.var(1), stats.std(), stats + stats  # noqa: F841
            assert syncs == []
            counts.append([launch.name for launch in launches])
        update = ["bn_stats", "merge_moments", "merge_moments"]
        assert counts == [[*update, "mean_and_var", "merge_moments"]] * 5


def test_calls_that_are_recorded_do_not_hear_of_it():
    """Launches in the midst of a call that is recorded, as those of a hook, do not get onto its tape."""
    if not EMULATED:
        pytest.skip("hooks into the stand-in")
    from cupybn._steps.launcher import Hearing

    class Listener:
        def made(self, array):
            raise AssertionError(array)

        def launched(self, *launch):
            raise AssertionError(launch)

    x, stats, listener = cupy.ones((3, 2), np.float32), StreamingMoments(), Listener()
    acts = (
        lambda: stats.update(x),
        lambda: stats.update(x, cupy.ones((), bool)),
        lambda: stats.merge(stats),
        lambda: stats.mean,
        lambda: stats.synchronize(Alone()),
        lambda: F.moments(x),
    )
    for act in acts:
        with Hearing(listener):
            act()
    with pytest.raises(AssertionError), Hearing(listener):
        cupy_ops.bn_stats(x[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_wrong_chunks(xp, device):
    other = cupy if xp is np else np
    there = "cuda:0" if xp is np else "cpu"
    stats = stream(xp, [np.arange(24, dtype=np.float32).reshape(4, 3, 2)])
    before = state(stats)
    ones = functools.partial(xp.ones, dtype=np.float32)
    wrong = [
        (ValueError, "expected at least 2D input (got 1D input)", lambda: stats.update(ones(3))),
        (
            ValueError,
            "expected input with 3 channels, as what was added before (got 4 channels)",
            lambda: stats.update(ones((2, 4))),
        ),
        (
            TypeError,
            f"expected input on {device}, as what was added before (got one on {there}): use an object for each device",
            lambda: stats.update(other.ones((2, 3), np.float32)),
        ),
        (
            TypeError,
            "expected input to be a NumPy or CuPy array (got NoneType)",
            lambda: stats.update(None),
        ),
        (
            TypeError,
            "expected mask of dtype bool, True for data (got int64): use mask.astype(bool)",
            lambda: stats.update(ones((2, 3)), xp.ones(2, np.int64)),
        ),
        (
            ValueError,
            "expected mask of shape (2, 4), the input's without axis 1, or one that broadcasts to it (got (2, 3))",
            lambda: stats.update(ones((2, 3, 4)), mask=xp.ones((2, 3), bool)),
        ),
        (TypeError, "expected other to be a StreamingMoments (got int)", lambda: stats.merge(3)),
        (
            ValueError,
            "expected other with 3 channels, as what was added before (got 2 channels)",
            lambda: stats.merge(stream(xp, [np.ones((3, 2), np.float32)])),
        ),
        (
            ValueError,
            "expected other with 3 channels, as what was added before (got channels of shape (3, 1))",
            lambda: stats + stream(xp, [np.ones((3, 1), np.float32)], (0, 1)),
        ),
        (
            TypeError,
            f"expected other on {device}, as what was added before (got one on {there}): use an object for each device",
            lambda: stats.merge(stream(other, [np.ones((2, 3), np.float32)])),
        ),
    ]
    for error, message, act in wrong:
        with pytest.raises(error, match=exactly(message)):
            act()
        assert state(stats) == before
    with pytest.raises(TypeError, match="unsupported operand"):
        stats + 1


def test_a_chunk_whose_axes_meet(xp):
    """Axes that are counted from either end may be one axis of a chunk of another rank."""
    stats = stream(xp, [np.ones((2, 3, 4), np.float32)], (1, -1))
    with pytest.raises(ValueError, match=exactly("expected channel_axis to have different axes (got (1, -1))")):
        stats.update(xp.ones((3, 4), np.float32))


def test_interrupts(rng):
    """Ctrl-C at any line leaves everything as it was, or comes when all is done."""
    library = str(Path(cupybn.__file__).parent)
    x = rng.normal(0, 1, (4, 3))
    mask = np.array([True, False, True, True])
    other = StreamingMoments().update(x)
    for act in (lambda stats: stats.update(x, mask)), (lambda stats: stats.merge(other)):
        for first in StreamingMoments(), StreamingMoments().update(x):
            before = state(first)
            done = copy.copy(first)
            act(done)
            for at in itertools.count(1):
                stats = copy.copy(first)
                more = interrupted(functools.partial(act, stats), at, library)
                assert state(stats) in ((before, state(done)) if more else (state(done),)), f"at line {at}"
                if not more:
                    break
            assert at > 5


def test_graphs_are_not_captured(rng):
    """Each launch of a graph would add to what there was when it was captured."""
    stats, other = (StreamingMoments().update(cupy.ones((3, 2), np.float32)) for _ in range(2))
    x = cupy.asarray(rng.normal(0, 1, (3, 2)))
    stats.update(x)  # compiles the kernels
    before = state(stats)
    calls = (
        lambda: stats.update(x),
        lambda: stats.merge(other),
        lambda: stats + other,
        lambda: stats.synchronize(Alone()),
    )
    for act in calls:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                with pytest.raises(RuntimeError, match="expected a StreamingMoments to be used without a CUDA graph"):
                    act()
            finally:
                stream.end_capture()
        assert state(stats) == before


def test_several_devices(rng):
    """Everything happens on the device of the chunks, whichever is the current one."""
    if not EMULATED:
        pytest.skip("needs two devices")
    x = rng.normal(1e3, 1, (6, 3)).astype(np.float32)
    with cupy.emulator.pretend(cupy.emulator.H200, cupy.emulator.H200):
        with cupy.cuda.Device(1):
            there = [cupy.asarray(part) for part in np.split(x, 2)]
        stats = StreamingMoments()
        with cupy.emulator.record() as launches:
            for array in there:
                stats.update(array)
            both = stats + stats
            results = stats.mean, stats.var(), stats.std(), stats.count, both.mean
        assert {launch.device for launch in launches} == {1}
        assert {result.device.id for result in results} == {1}
        assert "device='cuda:1'" in repr(stats)
        assert {array.device.id for array in copy.deepcopy(stats)._seen.total} == {1}
        before = state(stats)
        with pytest.raises(TypeError, match=r"^expected input on cuda:1, .* \(got one on cuda:0\)"):
            stats.update(cupy.asarray(x))
        assert state(stats) == before
        check(stats, x)
        here = pickle.loads(pickle.dumps(stats))  # CuPy's arrays come to the current device
        assert here.mean.device.id == 0
        check(here.update(cupy.asarray(x)), np.concatenate([x, x]))


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: here in one process; `tests/ranks/moments.py` has those of several


def test_without_a_communicator_there_is_one_process(xp):
    stats = stream(xp, [np.arange(6, dtype=np.float32).reshape(3, 2)])
    new = stats.synchronize(None)
    assert new is not stats
    assert state(new) == state(stats)
    for comm in 3, "comm":
        with pytest.raises(TypeError, match="expected comm to be a communicator"):
            stats.synchronize(comm)
    for timeout, error in (0, ValueError), ("1", TypeError), (-1.0, ValueError):
        with pytest.raises(error, match="expected timeout"):
            stats.synchronize(None, timeout=timeout)


class Alone:
    """Engine of a group of one rank."""

    size, lost = 1, None

    def check(self, input):
        pass

    def gather(self, row, header):
        return row.copy(), header[None]

    def texts(self, text):
        return [text]

    sum = None


def test_a_group_of_one(xp, rng):
    x = rng.normal(1e6, 1, (9, 3)).astype(np.float32)
    stats = stream(xp, np.split(x, 3))
    before = state(stats)
    new = stats.synchronize(Alone())
    assert state(new) == state(stats) == before
    check(new.update(xp.asarray(x)), np.concatenate([x, x]))
    assert state(stats) == before
    assert StreamingMoments((0, 1)).synchronize(Alone()).count == 0
    assert StreamingMoments((0, 1)).synchronize(Alone()).channel_axis == (0, 1)


def test_mpi_of_one_process(xp, rng):
    MPI = pytest.importorskip("mpi4py.MPI")
    stats = stream(xp, [rng.normal(0, 1, (4, 3))])
    assert state(stats.synchronize(MPI.COMM_SELF, timeout=None)) == state(stats)
    assert StreamingMoments().synchronize(MPI.COMM_SELF).count == 0


def test_nccl_of_one_process(rng):
    from cupy.cuda import nccl

    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    stats = stream(cupy, [rng.normal(0, 1, (4, 3))])
    assert state(stats.synchronize(comm)) == state(stats)
    assert StreamingMoments().synchronize(comm).count == 0
    message = "expected input to be a CuPy array on cuda:0, as the communicator is (got NumPy array)"
    with pytest.raises(TypeError, match=exactly(message)):
        stream(np, [np.ones((4, 3), np.float32)]).synchronize(comm)


class Call:
    """A call of `synchronize` on one of two ranks."""

    class Layer:
        """Something without arrays of its own, in the place of a layer."""

        @staticmethod
        def state_dict():
            return {}

    layer = Layer()

    def __init__(self, engine, stats):
        self.engine, self.stats, self.results = engine, stats, []

    def __call__(self):
        self.results.append(self.stats.synchronize(self.engine))


def test_interrupts_at_every_line(monkeypatch, rng):
    """Whatever line Ctrl-C comes at: both ranks have it all, or raise, none waits, and what they hold stays."""
    files = {module.__file__ for module in (streaming, totals, group, numpy_ops)}
    monkeypatch.setattr(test_group, "FILES", files)
    x = rng.normal(1e3, 1, (2, 4, 3)).astype(np.float32)
    told = set()
    for line in itertools.count():
        inboxes = test_group.queue.SimpleQueue(), test_group.queue.SimpleQueue()
        calls = [Call(test_group.Rank(rank, inboxes), stream(np, [x[rank]])) for rank in range(2)]
        before, interrupt = [state(call.stats) for call in calls], test_group.Interrupt(line)
        said, _ = test_group.interrupted(calls, interrupt)
        assert [state(call.stats) for call in calls] == before
        assert [call.engine.mixed_up for call in calls] == [[], []], interrupt.where
        for call in calls:
            for result in call.results:
                check(result, x.reshape(8, 3))
        told.update(said[1])
        if interrupt.where is None:
            break
        assert said[0][0].startswith("KeyboardInterrupt"), interrupt.where
    assert said == (["", ""], ["", ""])
    assert line > 20
    assert "RuntimeError: StreamingMoments.synchronize: rank 0 raised KeyboardInterrupt" in told
