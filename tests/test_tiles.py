"""The split of the work: every element once, the same sums whatever the number of threads, errors that come through."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupybn._steps import tiles

SHAPES = [  # each cut in another way
    (1, 1, 1),
    (3, 5, 7),  # one tile of joined rows
    (8, 2048, 49),  # short rows, cut along the channels
    (700, 300, 9),  # short rows, cut along the samples
    (8, 3, 200_003),  # long rows, each cut, none of a round length
    (5, 400, 900),  # long rows, several in a tile
    (100_003, 3, 1),  # channels last, joined rows, a rest
    (301, 5000, 1),  # channels last, long rows
    (2, 1_000_003, 1),  # channels last, rows that are cut
    (70_001, 2, 3),  # short rows, joined, a rest
]


@pytest.fixture(params=["1", "2", "7"])
def threads(request, monkeypatch):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", request.param)
    return int(request.param)


@pytest.mark.parametrize("shape", [(32, 32, 1), (32, 4, 5), (1, 1, 1), (1000, 2, 1)])
def test_small_arrays_are_one_tile(shape):
    assert len(tiles.tiles(shape, tiles.TILE, columns=5)) == 1


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("most", [1000, tiles.LARGE_TILE])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_once(shape, most, columns):
    seen = np.zeros(shape, np.uint8)
    for tile in tiles.tiles(shape, most, columns):
        seen[tile] += 1
        assert seen[tile].size <= most
    assert np.all(seen == 1)


@pytest.mark.parametrize("columns", [1, 3, 5])
@pytest.mark.parametrize("shape", [(8, 2048, 49), (8, 600, 30), (40, 300, 9), (70_001, 2, 3)])
def test_columns_of_a_tile_take_a_fraction_of_the_array(shape, columns):
    N, C, L = shape
    for _, lanes in tiles.plan(shape, True, tiles.LARGE_TILE, columns):
        assert lanes.columns(np.ones((columns, lanes.channels))).size <= N * C * L / 8


def scaled(x, y, column):
    np.multiply(x, column, out=y)


def products(x, column):
    d = x - column
    return [(d,), (d, x)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.usefixtures("threads")
def test_map_and_sums(shape, contiguous, rng):
    """Each lane meets the element of the vector that belongs to its channel, on the way in and in the sums."""
    x = rng.integers(0, 5, shape).astype(np.float32)
    if not contiguous:
        x = np.concatenate([x, x], axis=1)[:, : shape[1]]
    vector = np.arange(shape[1], dtype=np.float32) % 7
    y = np.full(x.shape, np.nan, np.float32)
    tiles.tile_map(scaled, [x, y], vector[None], False)
    np.testing.assert_array_equal(y, x * vector[:, None])

    d = x.astype(np.float64) - vector[:, None]
    sum_d, sum_dx = tiles.tile_sums(products, [x], vector[None], False)
    assert sum_d.dtype == sum_dx.dtype == np.float64
    np.testing.assert_array_equal(sum_d, d.sum(axis=(0, 2)))  # small integers: exact
    np.testing.assert_array_equal(sum_dx, (d * x).sum(axis=(0, 2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_with_any_number_of_threads(shape, monkeypatch, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    vector = rng.standard_normal(shape[1]).astype(np.float32)
    results = []
    for count in "1", "2", "5", "2":
        monkeypatch.setenv("CUPYBN_NUM_THREADS", count)
        results.append(tiles.tile_sums(products, [x], vector[None], False))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("shape", [(3, 5, 7), (32, 64, 1), (6, 3, 700), (1, 4, 90), (40, 1, 3)])
def test_a_single_tile_and_many_are_the_same(shape, monkeypatch, rng):
    """An array that is one tile is handed over as it is; cut into tiles it gives the same."""
    x = rng.standard_normal(shape).astype(np.float32)
    vectors = rng.standard_normal((2, shape[1])).astype(np.float32)
    seen = []

    def line(x, y, slope, offset):
        seen.append(x.size)
        np.multiply(x, slope, out=y)
        y += offset

    whole, cut = np.empty_like(x), np.empty_like(x)
    tiles.tile_map(line, [x, whole], vectors, False)
    assert seen == [x.size]
    monkeypatch.setattr(tiles, "LARGE_TILE", 20)
    tiles.tile_map(line, [x, cut], vectors, False)
    assert len(seen) > 3
    np.testing.assert_array_equal(whole, cut)
    np.testing.assert_array_equal(whole, x * vectors[0][:, None] + vectors[1][:, None])


def test_the_last_tile_comes_first(monkeypatch):
    """The sums of a step come before its elements, and leave in cache what they have read last."""
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "1")
    x, starts = np.arange(4 << 19).reshape(4, 1, -1), []
    tiles.tile_map(lambda x, _: starts.append(x.flat[0]), [x.astype(np.float32)], np.zeros((1, 1)), False)
    tiles.tile_sums(lambda x, _: [starts.append(x.flat[0]) or (x,)], [x.astype(np.float32)], np.zeros((1, 1)), False)
    assert starts == [3 << 19, 2 << 19, 1 << 19, 0, 0, 1 << 19, 2 << 19, 3 << 19]


def test_work_is_shared(monkeypatch):
    monkeypatch.setenv("CUPYBN_NUM_THREADS", "3")
    meeting = threading.Barrier(3, timeout=10)
    names = tiles.run(lambda _: (meeting.wait(), threading.current_thread().name)[1], [None] * 12, 3)
    assert len(set(names)) == 3


def test_a_helper_that_comes_too_late_keeps_nothing(monkeypatch):
    """The arrays of a call are free when it returns, although the pool has not got round to its helpers yet."""
    go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(tiles, "_pool", lambda: pool)
        pool.submit(go.wait, 10)
        x = np.ones(1000)
        alive = weakref.ref(x)
        assert tiles.run(lambda i, x=x: x[i], range(4), 2) == [1, 1, 1, 1]
        del x
        try:
            assert alive() is None
        finally:
            go.set()


@pytest.mark.usefixtures("threads")
def test_an_error_comes_through_and_ends_the_work():
    done = []

    def task(index):
        done.append(index)
        if index == 3:
            raise ArithmeticError("tile 3")

    with pytest.raises(ArithmeticError, match="tile 3"):
        tiles.run(task, range(1000), tiles.num_threads())
    assert len(done) < 1000


@pytest.mark.parametrize("shape", [(4, 8, 49), (64, 64, 1), (2, 7, 1), (3, 2, 600), (1, 3, 1)])
@pytest.mark.parametrize("of", [np.float32, np.bool_])
def test_sums_of_a_single_row_are_those_of_joined_rows(shape, of, monkeypatch, rng):
    """How a small array is handed to its core changes no bit of its sums, nor whether they are 0."""
    x, center = (rng.standard_normal(shape) > 2).astype(of), np.zeros((1, shape[1]), np.float32)
    x = x if of is np.bool_ else (x * rng.standard_normal(shape)).astype(of)
    seen, results = [], []

    def core(x, center):
        seen.append((x.shape[0], center.shape == x.shape))
        return [(x,)] if x.dtype == np.bool_ else [(x,), (x, x)]

    for most in tiles.SINGLE_ROW, 0:
        monkeypatch.setattr(tiles, "SINGLE_ROW", most)
        tiles.plan.cache_clear()
        results.append(np.array(tiles.tile_sums(core, [x], center, False)))
    tiles.plan.cache_clear()
    assert seen[0] == (1, True)
    assert results[0].tobytes() == results[1].tobytes()
    np.testing.assert_array_equal(results[0][0] == 0, x.sum(axis=(0, 2)) == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("N", [1, 2, 3, 9, 17])
def test_products_of_few_rows(N, dtype, rng):
    """Rows that are added one by one give what they give in general: 8 of them at a time, then the sums."""
    x, y = rng.standard_normal((2, N, 5000, 1)).astype(dtype)
    (tile, lanes), *_ = tiles.plan(x.shape, True, tiles.LARGE_TILE)
    assert lanes.row == 5000
    assert tile.n == slice(0, N)
    terms = x.astype(np.float64) * y
    error = np.abs(lanes.sum(x, y) - terms.sum(axis=(0, 2)))
    assert np.all(error <= 16 * np.finfo(dtype).eps * np.abs(terms).sum(axis=(0, 2)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("N", [64, 600])
def test_numpy_settings_of_the_caller_stay(N):
    """Settings of the arithmetic are its own, and the same in all threads, of which few samples need one alone."""
    x = np.ones((N, 64, 64), np.float32) * 9
    with np.errstate(all="raise"):
        np.setbufsize(4096)
        overflowing = np.full((1, 64), 3e38, np.float32)
        tiles.numpy_settings(tiles.tile_map)(scaled, [x, np.empty_like(x)], overflowing, False)
        assert np.getbufsize() == 4096
        assert np.geterr() == dict.fromkeys(("divide", "over", "under", "invalid"), "raise")


def test_threads_after_a_fork():
    """A child process starts threads of its own: those of the parent do not exist in it."""
    code = """
import os, sys, warnings
import numpy as np
import cupybn.functional as F
x = np.ones((64, 64, 500), np.float32)
F.batch_norm(x, None, None, training=True)
warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
pid = os.fork()
if pid == 0:
    F.batch_norm(x, None, None, training=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    env = os.environ | {"CUPYBN_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_after_the_last_thread_may_start():
    """Python starts no thread while it shuts down: the work is done by the one that is left."""
    code = """
import atexit
import numpy as np
import cupybn.functional as F
x = np.ones((64, 64, 500), np.float32)
atexit.register(lambda: print(F.batch_norm(x, None, None, training=True).sum()))
"""
    env = os.environ | {"CUPYBN_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("0.0\n", "")


def test_without_new_threads_the_work_is_done_by_those_there_are(monkeypatch):
    """The system may refuse another thread, after some have started."""
    tiles._pool.cache_clear()
    start, started = threading.Thread.start, []

    def refuse_the_third(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    meeting = threading.Barrier(2, timeout=10)

    def task(index):
        if index < 2:
            meeting.wait()
        return index

    assert tiles.run(task, range(100), 7) == list(range(100))
    assert len(started) == 2
    tiles._pool.cache_clear()
