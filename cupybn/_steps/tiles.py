"""The split of NumPy arrays into tiles, and the threads that work on them.

A step of batch norm on arrays of shape (N, C, L) is a *core*, a function that is applied tile by tile. A core gets the
tiles of its arrays and columns, one for each of its per-channel vectors: broadcasting pairs each element of a tile with
the value for its channel. An array that is a single tile, as small ones are, is handed over as it is, without threads.

Tiles of sums depend on the shape alone, never on the number of threads, and sums are added in the order of the tiles.
So the result has the same bits with one thread and with sixty-four. Other tiles change no bit, however they are cut.

Long rows (L large) are worked on as they lie. Short rows are joined first, so that NumPy has long rows to loop over::

    N = 4, C = 3, L = 2         joined: rows of 2 samples
    | a a b b c c |             | a a b b c c a a b b c c |     a, b, c: the channels; each place of a joined row
    | a a b b c c |             | a a b b c c a a b b c c |     ("lane") has one channel in all rows
    | a a b b c c |
    | a a b b c c |
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Terms = Sequence[tuple[Array, ...]]
"""What a core asks to be summed for each channel: tuples of an array or of two, whose product is meant. A sum of
bools says no more than whether one of them is True."""
P = ParamSpec("P")
R = TypeVar("R")

TINY = 1 << 16
"""Elements up to which an array may need temporaries of its own size."""
SMALL = 1 << 20
"""Elements up to which an array is worked on by one thread: others would still be waking up when it is done."""
TILE = 1 << 18
"""Most elements in a tile of a small array that is summed, or whose core needs temporaries."""
LARGE_TILE = 1 << 19
"""Most elements in any other tile. Smaller ones would fit closer caches, but each costs about 5 us, and threads would
wait more often for each other: between two calls of NumPy only one of them runs."""
SHORT = 1 << 9
"""Elements below which a row is short and is joined with others. NumPy's iterator has buffers of this size, and
copies operands into them unless their rows are longer."""
ROW = 1 << 11
"""Elements of a row that short ones are joined to, about."""
SINGLE_ROW = 1 << 12
"""Elements up to which a tile is a single joined row, and all its columns have its shape: so NumPy's loops start
soonest."""
SUMMANDS = 1 << 3
"""Rows that may be added in float32, one after the other, before the sum goes on in float64."""
MANY = 1 << 6
"""Positions (L) from which on sums go along the row of a channel, not down the lanes."""
LINE = 1 << 9
"""Neighbours in a row that may be added in float32: BLAS keeps several sums of them, so that each is short."""

BUFFERED = 1 << 13
"""Elements up to which the size of NumPy's buffers makes no difference to the time of elementwise operations."""
UNBUFFERED = SHORT if np.lib.NumpyVersion(np.__version__) >= "2.3.0" else 0
"""Most values of a channel whose sums are the same with buffers of any size. NumPy before 2.3 splits sums at the end of
a buffer, however short they are."""

PIECE = 1 << 9
"""Elements per channel that `gather` copies at a time."""
GATHERED = 1 << 14
"""Elements of all channels together that `gather` copies at a time, about, if there are enough channels."""


class Tile(NamedTuple):
    """A tile of an array: its ranges along N, C and L."""

    n: slice
    c: slice
    l: slice  # noqa: E741 - the axis is called L everywhere


def split(size: int, step: int) -> list[slice]:
    """Ranges of length ``step`` that cover ``range(size)``; the last one may be shorter."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def evenly(size: int, most: int) -> int:
    """Length of ranges that split ``size`` evenly: as few of them as can be if none is longer than ``most``."""
    return math.ceil(size / math.ceil(size / most))


def tiles(shape: tuple[int, int, int], most: int, columns: int = 1) -> list[Tile]:
    """Tiles of a non-empty array of this shape, (N, C, L), of at most this many elements, with so many columns each."""
    N, C, L = shape
    l = evenly(L, most)  # noqa: E741
    c = evenly(C, max(1, most // (l * (1 if L >= SHORT else min(N, SUMMANDS)))))
    if L < SHORT and N * C * L > TINY:  # columns are as long as joined rows: a fraction of the array
        c = min(c, max(1, N * C // (8 * columns)))
    n = evenly(N, max(1, most // (l * c)))
    if L < SHORT and c == C:  # rows are joined within a tile: every tile but the last has whole joined rows
        n = n - n % super_row(C * L) or n
    return [Tile(*ranges) for ranges in itertools.product(split(N, n), split(C, c), split(L, l))]


def super_row(row: int) -> int:
    """Number of rows of this length that are joined to one of about ``ROW`` elements: a power of two."""
    return 1 << max(0, (ROW // row).bit_length() - 1)


class Lanes(NamedTuple):
    """A tile as its core sees it: with short rows joined to long ones, whose lanes keep their channel from row to row.

    The lanes of a joined row are ``repeat`` samples of ``channels`` with ``positions`` each. A small tile is a single
    row. One with long rows, or of an array that is not contiguous, keeps its shape (n, c, l) instead: each of its rows
    belongs to one channel.
    """

    shape: tuple[int, int, int]
    repeat: int
    channels: int
    positions: int

    # How sums are taken, whether the tile is small or not.
    down: bool  # down the lanes; else along rows
    row: int  # lanes of the rows that are added
    steps: list[tuple[slice, int]]  # ranges of rows, or of neighbours in a row, as `steps` makes them

    @classmethod
    def of(cls, tile: Tile, shape: tuple[int, int, int], contiguous: bool) -> Lanes:
        """Lanes of a tile of an array that has this shape."""
        n, c, l = (axis.stop - axis.start for axis in tile)  # noqa: E741
        short = contiguous and l < SHORT
        repeat = math.gcd(n, super_row(c * l)) if short and c == shape[1] else 1
        down = l == 1 or (short and l < MANY)
        sums = down, repeat * c * l, steps(n // repeat, SUMMANDS) if down else steps(l, LINE)
        if contiguous and (c, l) == shape[1:] and n * c * l <= SINGLE_ROW:
            return cls((1, n * c * l, 1), n, c, l, *sums)
        if short:
            return cls((n // repeat, repeat * c * l, 1), repeat, c, l, *sums)
        return cls((n, c, l), 1, c, 1, *sums)

    def columns(self, vectors: Array) -> Array:
        """Columns with a value for each lane, from vectors, the rows of an array, with a value for each channel.

        They have the rank of a tile: NumPy is quickest where all operands have one shape, as in a single joined row.
        """
        columns = vectors[:, None, :, None]
        if self.shape[1] == self.channels:
            return columns
        lanes = np.empty((len(vectors), self.repeat, self.channels, self.positions), vectors.dtype)
        lanes[...] = columns
        return lanes.reshape(len(vectors), 1, self.shape[1], 1)

    def sum(self, first: Array, second: Array | None = None) -> Array:
        """Sums per channel, float64, over a tile of an array or of the product of two arrays.

        Only ``SUMMANDS`` rows, or ``LINE`` neighbours, are added in the dtype of the factors.
        """
        partial = self._down if self.down else self._along
        total: Array | None = None
        for some, count in self.steps:
            part = np.add.reduce(partial(some, count, first, second), (0, 2), np.float64)
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total

    def _down(self, rows: slice, count: int, first: Array, second: Array | None) -> Array:
        """Sums down each ``count`` rows, (samples, channels, positions): still to be added for each channel."""
        first = first.reshape(-1, self.row)[rows]
        if second is not None:
            second = second.reshape(-1, self.row)[rows]
        if count <= 2:  # as below, in a fraction of the time
            products = first if second is None else np.multiply(first, second)
            sums = products if count == 1 else np.add(products[::2], products[1::2])
        elif second is None:
            sums = np.add.reduce(first.reshape(-1, count, self.row), 1)
        else:
            shape = -1, count, self.row
            sums = np.einsum("krw,krw->kw", first.reshape(shape), second.reshape(shape))
        return sums.reshape(-1, self.channels, self.positions)

    def _along(self, line: slice, count: int, first: Array, second: Array | None) -> Array:
        """Sums along each ``count`` neighbours, (samples, channels, lines): still to be added for each channel."""
        n, _, l = self.shape  # noqa: E741
        whole = n * self.repeat, self.channels, l * self.positions
        lines = *whole[:2], -1, count
        first = first.reshape(whole)[..., line].reshape(lines)
        if second is None:  # BLAS keeps more sums side by side than NumPy's `sum`, in a fraction of the time
            second = np.ones(count, first.dtype)
        else:
            second = second.reshape(whole)[..., line].reshape(lines)
        sums: Array = np.vecdot(first, second)
        return sums


@functools.lru_cache
def steps(size: int, most: int) -> list[tuple[slice, int]]:
    """Cut ``range(size)`` into steps of at most ``most``: pairs of a range and the length of the steps in it.

    Where some length divides the size there is one such range, else a second one for the shorter rest.
    """
    for length in range(min(size, most), most // 4, -1):
        if size % length == 0:
            return [(slice(0, size), length)]
    whole = size - size % most
    return [(slice(0, whole), most), (slice(whole, size), size - whole)] if whole else [(slice(0, size), size)]


@functools.lru_cache(maxsize=512)
def plan(shape: tuple[int, int, int], contiguous: bool, most: int, columns: int = 1) -> list[tuple[Tile, Lanes]]:
    """Tiles of an array of this shape, as `tiles` makes them, and the lanes of each."""
    return [(tile, Lanes.of(tile, shape, contiguous)) for tile in tiles(shape, most, columns)]


def tile_map(core: Callable[..., None], arrays: Sequence[Array | None], vectors: Array, temporaries: bool) -> None:
    """Call ``core(*array_tiles, *columns)`` for every tile, on threads.

    Parameters
    ----------
    core : callable
        Function of a tile, which writes into the tiles of output arrays.
    arrays : sequence of (N, C, L) arrays or None
        Arrays that are cut into tiles. The first is not None and not empty.
    vectors : (number of vectors, C) array
        Values of each channel, which become columns.
    temporaries : bool
        Whether the core allocates memory of the size of a tile. Then no more than a quarter of the tiles are in work
        at a time.
    """
    first = arrays[0]
    assert first is not None
    most = TILE if temporaries and first.size <= SMALL else LARGE_TILE
    work = plan(first.shape, _contiguous(arrays), most, len(vectors))
    if first.size > BUFFERED:
        np.setbufsize(SHORT)
    _walk(core, work[::-1], arrays, vectors, temporaries)  # backwards: the sums before it have left the end in cache


def tile_sums(
    core: Callable[..., Terms], arrays: Sequence[Array | None], vectors: Array, temporaries: bool
) -> list[Array]:
    """Sums per channel of the terms that ``core`` returns for each tile: a (C,) array, float64, for each term.

    Parameters
    ----------
    As `tile_map`, but for the core, which returns what is to be summed: tuples of an array or of two, whose product is
    meant.
    """
    first = arrays[0]
    assert first is not None
    N, C, L = first.shape
    # The order of additions depends on these tiles. So they depend on the shape alone.
    work = plan(first.shape, _contiguous(arrays), TILE if first.size <= SMALL else LARGE_TILE)
    if N * L > UNBUFFERED or first.size > BUFFERED:
        np.setbufsize(SHORT)
    parts = _walk(core, work, arrays, vectors, temporaries)
    if len(parts) == 1:
        return parts[0]
    totals = [np.zeros(C) for _ in parts[0]]
    for (tile, _), sums in zip(work, parts, strict=True):
        for total, part in zip(totals, sums, strict=True):
            total[tile.c] += part
    return totals


def _contiguous(arrays: Sequence[Array | None]) -> bool:
    """Whether all of these arrays are contiguous."""
    return not [a for a in arrays if a is not None and not a.flags.c_contiguous]


def _walk(
    core: Callable[..., Terms | None],
    work: list[tuple[Tile, Lanes]],
    arrays: Sequence[Array | None],
    vectors: Array,
    temporaries: bool,
) -> list[list[Array]]:
    """Call the core for every tile of this plan: the sums of the terms that it returns, for each tile."""

    first = arrays[0]
    assert first is not None
    if first.size <= SMALL:
        wanted_threads()  # raises for a wrong setting, even if the array needs one thread only
    if len(work) == 1:
        return [_apply(core, work[0][1], arrays, vectors)]

    def task(part: tuple[Tile, Lanes]) -> list[Array]:
        tile, lanes = part
        return _apply(core, lanes, [None if a is None else a[tile] for a in arrays], vectors[:, tile.c])

    workers = 1 if first.size <= SMALL else min(num_threads(), len(work) // 4 if temporaries else len(work))
    return run(task, work, workers)


def _apply(
    core: Callable[..., Terms | None], lanes: Lanes, arrays: Sequence[Array | None], vectors: Array
) -> list[Array]:
    """Call the core for one tile: the sums of the terms that it returns."""
    shape = lanes.shape
    views = [None if a is None else a.reshape(shape) for a in arrays]
    terms = core(*views, *lanes.columns(vectors))
    return [lanes.sum(*factors) for factors in terms] if terms else []


def gather(channels: Array, arrays: Sequence[Array | None]) -> Iterator[tuple[slice, list[Any]]]:
    """Yield copies of some channels of (N, C, L) arrays, piece by piece, each array as (channels, values).

    With them comes the range of ``channels`` that the piece is about. A channel is cut into the same pieces whichever
    others are asked for, and so sums along them have the same bits.
    """
    first = arrays[0]
    assert first is not None
    N, _, L = first.shape
    rows, positions = min(N, max(1, PIECE // L)), min(L, PIECE)
    for some in split(len(channels), max(1, GATHERED // (rows * positions))):
        for n, l in itertools.product(split(N, rows), split(L, positions)):  # noqa: E741
            pieces = [None if a is None else a[n, channels[some], l].swapaxes(0, 1) for a in arrays]
            yield some, [None if a is None else a.reshape(len(a), -1) for a in pieces]


# ---------------------------------------------------------------------------------------------------------------------
# Threads: NumPy releases the interpreter lock inside its loops


MOST_THREADS = 64
"""Most threads that are started, whatever the setting."""


def num_threads() -> int:
    """Number of threads that share the tiles: CUPYBN_NUM_THREADS, or the processors that this process may use."""
    wanted = wanted_threads()
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wanted_threads() -> int | None:
    """Number of threads that CUPYBN_NUM_THREADS asks for; None if it is not set.

    Raises
    ------
    ValueError
        If it is set to anything but a number of threads.
    """
    text = os.environ.get("CUPYBN_NUM_THREADS")
    return None if text is None else _as_threads(text)


@functools.lru_cache
def _as_threads(text: str) -> int:
    """Number of threads from its text."""
    if not re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", text):
        raise ValueError(
            f"expected CUPYBN_NUM_THREADS to be a number of threads, 1 or more (got {text!r}): unset it to use all "
            "processors"
        )
    return int(text)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Pool of threads that all calls of this process share."""
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="cupybn")  # starts a thread when it is needed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def numpy_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Function that runs with NumPy's settings for the arithmetic. They belong to a thread, so each thread makes them.

    Those of the caller are back when it returns: ``errstate`` restores the size of buffers as well.
    """
    settled: Callable[P, R] = np.errstate(all="ignore")(function)  # inf and NaN are data here
    return settled


def run(task: Callable[[Any], Any], work: Sequence[Any], workers: int) -> list[Any]:
    """Run ``[task(part) for part in work]``, shared by the calling thread and up to ``workers - 1`` others.

    The caller has made NumPy's settings. The first error is raised here, once all threads have stopped; after it no
    other part is begun.
    """
    if workers <= 1:
        return [task(part) for part in work]

    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    # A helper that the pool gets round to too late finds nothing here, and so keeps no array of this call alive.
    queue = deque((index, functools.partial(task, part)) for index, part in enumerate(work))
    changed = threading.Condition()
    in_work = 0

    def drain() -> None:
        nonlocal in_work
        while True:
            with changed:
                if not queue:
                    return
                index, call = queue.popleft()
                in_work += 1
            try:
                results[index] = call()
            except BaseException as error:
                errors.append(error)
                queue.clear()
            finally:
                with changed:
                    in_work -= 1
                    changed.notify_all()

    @numpy_settings
    def help_out() -> None:
        np.setbufsize(SHORT)
        drain()

    helpers = _start(help_out, workers - 1)
    try:
        drain()
    finally:
        for helper in helpers:
            helper.cancel()  # has an effect only if the helper has not begun
        with changed:
            changed.wait_for(lambda: in_work == 0)
    if errors:
        raise errors[0]
    return results


def _start(task: Callable[[], None], count: int) -> list[Future[None]]:
    """Start a task on up to ``count`` threads: fewer if the system has no more, none while Python shuts down."""
    helpers: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):
        for _ in range(min(count, MOST_THREADS)):
            helpers.append(_pool().submit(task))
    return helpers
