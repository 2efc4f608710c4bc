"""The split of an array into rows, for the norms within a sample, and sums along rows that know no other row.

A row is cut into *lines* of some hundred neighbours, whose sums are taken in the dtype of the data and added in
float64. Where the cuts are depends on the length of a row alone, so that the sums of a row have the same bits
whichever rows are beside it. Cores work on *pieces*, arrays (rows, channels, positions): neighbouring rows while they
are short, a part of one row where it is long. Where positions come before channels in memory a piece is a copy.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupybn._steps.norm import Norm
from cupybn._steps.tiles import (
    LINE,
    MANY,
    SHORT,
    SMALL,
    Lanes,
    Tile,
    evenly,
    num_threads,
    run,
    split,
    steps,
)

Array = npt.NDArray[Any]

PIECE = 1 << 16
"""Most elements of a piece: some arrays of this size stay in the cache of a core. Longer rows are cut, into halves of
it: whatever the size of the array, their parts are the same."""
SHARE = 1 << 5
"""Pieces in an array that is not small, for each thread: what all threads have in work is then a fraction of it."""
SQUARES = 1 << 7
"""Squares in a line. In the sum of a longer one, that of an outlier may swallow too many others, or round them up."""
BANDS = 1 << 6
"""Most bands of rows with sums of their own."""


class Piece(NamedTuple):
    """A part of an array: ranges along samples, groups, channels of a group, and positions before and behind them."""

    band: int  # number of the band of rows that it is in
    part: int  # number of the part that it is of its rows
    n: slice
    g: slice
    d: slice
    a: slice
    b: slice


class Rows(NamedTuple):
    """The rows of an array (N, A, C, B), whose channels are in groups of D."""

    N: int
    A: int
    G: int
    D: int
    B: int

    @classmethod
    def of(cls, x: Array, norm: Norm) -> Rows:
        """The rows of this array."""
        N, A, C, B = x.shape
        return cls(N, A, norm.groups, C // norm.groups, B)

    @property
    def number(self) -> int:
        """Number of rows."""
        return self.N * self.G

    @property
    def length(self) -> int:
        """Number of values in a row."""
        return self.D * self.positions

    @property
    def positions(self) -> int:
        """Number of values of each channel in a row."""
        return self.A * self.B

    @property
    def along(self) -> bool:
        """Whether a channel is long enough in a row for factors of its own: else all of a row share theirs."""
        return self.D == 1 or self.positions >= MANY

    @property
    def whole(self) -> bool:
        """Whether pieces are whole rows."""
        return self.length <= PIECE

    def parts(self) -> list[tuple[slice, slice, slice]]:
        """Ranges of channels and positions that a row is cut into."""
        most = PIECE // 2
        b = evenly(self.B, most)
        d = evenly(self.D, max(1, most // (b * min(self.A, MANY))))
        a = evenly(self.A, max(1, most // (b * d)))
        return list(itertools.product(split(self.D, d), split(self.A, a), split(self.B, b)))

    def pieces(self, bands: int, most: int) -> list[list[Piece]]:
        """Pieces of the whole array, in lists: each list is work for one thread, and lies in one of so many bands.

        No piece has more than so many elements, unless it is a single row that is not cut.
        """
        everything = slice(0, self.D), slice(0, self.A), slice(0, self.B)
        sample = self.G * self.length
        if self.whole and sample <= most:
            ranges = [(n, slice(0, self.G)) for n in split(self.N, evenly(self.N, most // sample))]
        else:
            some = split(self.G, evenly(self.G, max(1, most // self.length)) if self.whole else 1)
            ranges = [(slice(n, n + 1), g) for n in range(self.N) for g in some]
        shares = split(len(ranges), evenly(len(ranges), math.ceil(len(ranges) / bands)))
        parts = [everything] if self.whole else self.parts()
        return [
            [Piece(band, part, *some, *inside) for some in ranges[share]]
            for band, share in enumerate(shares)
            for part, inside in enumerate(parts)
        ]

    def numbers(self, piece: Piece) -> slice:
        """Numbers of the rows that a piece is of."""
        return slice(piece.n.start * self.G + piece.g.start, (piece.n.stop - 1) * self.G + piece.g.stop)

    def channels(self, piece: Piece) -> slice:
        """Channels of the array that a piece has: in each of its samples the same."""
        last = (piece.g.stop - 1) * self.D
        return slice(piece.g.start * self.D + piece.d.start, last + piece.d.stop)

    def view(self, array: Array, piece: Piece) -> Array:
        """The piece of an array, as a view (samples, groups, channels, positions before, positions behind)."""
        N, A, G, D, B = self
        return array.reshape(N, A, G, D, B)[piece.n, piece.a, piece.g, piece.d, piece.b].transpose(0, 2, 3, 1, 4)

    def take(self, array: Array, piece: Piece, dtype: npt.DTypeLike, memory: Memory, role: str) -> Array:
        """The piece of an array, contiguous and in this dtype, (rows, channels, positions): a view if it can be."""
        view = self.view(array, piece)
        if view.dtype != dtype or not view.flags.c_contiguous:
            copy = memory.empty(role, view.shape, dtype)
            copy[...] = view
            view = copy
        return view.reshape(-1, view.shape[2], view.shape[3] * view.shape[4])

    def place(self, array: Array, piece: Piece, dtype: npt.DTypeLike, memory: Memory, role: str) -> Array:
        """Memory to compute a piece of an array in, which `put` then puts there: the array's own, if it can be."""
        view = self.view(array, piece)
        if view.dtype != dtype or not view.flags.c_contiguous:
            view = memory.empty(role, view.shape, dtype)
        return view.reshape(-1, view.shape[2], view.shape[3] * view.shape[4])

    def put(self, array: Array, piece: Piece, values: Array) -> None:
        """Write a piece into an array, unless it has been computed there."""
        view = self.view(array, piece)
        if view.dtype != values.dtype or not np.may_share_memory(view, values):
            np.copyto(view, values.reshape(view.shape), casting="unsafe")


class Memory:
    """Arrays to work in: each thread has its own, one for each role, and uses it again for the next piece."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def empty(self, role: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array, uninitialised, for a role that no other array has which is still needed."""
        arrays, size = vars(self._of_thread), math.prod(shape) * np.dtype(dtype).itemsize
        if role not in arrays or arrays[role].size < size:
            arrays[role] = np.empty(size, np.uint8)
        array: Array = arrays[role][:size].view(dtype).reshape(shape)
        return array


class Work(NamedTuple):
    """The pieces of an array and how they are shared."""

    pieces: list[list[Piece]]  # each list is work for one thread, in this order
    bands: int  # bands of rows, which have sums of their own
    threads: int  # most threads

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, rows: Rows, itemsize: int, sums: bool) -> Work:
        """The work on these rows, whose sums of channels take memory, if there are any."""
        size = rows.number * rows.length
        share = size * min(itemsize, 4) // (4 * SHARE)  # 16-bit data is worked on in 32 bits
        most = PIECE if size < SMALL else min(PIECE, share)
        of_sums = 16 * rows.G * rows.D
        bands = min(BANDS, max(1, size * itemsize // (16 * of_sums))) if sums else rows.number
        return cls(rows.pieces(bands, most), bands, 1 if size <= SMALL else max(1, share // most))


def walk(core: Callable[[Piece], None], work: Work) -> None:
    """Call a core for all pieces, on threads: each writes where no other does, or adds to the sums of its band."""
    threads = min(num_threads(), work.threads, len(work.pieces))  # raises for a wrong setting
    np.setbufsize(SHORT)

    def task(pieces: list[Piece]) -> None:
        for piece in pieces:
            core(piece)

    run(task, work.pieces, threads)


def row_sums(first: Array, second: Array | None = None, line: int = LINE) -> Array:
    """Sum of each row of an array (rows, length), or of the product of two, in float64; no row's depends on others.

    Lines have no more than so many elements.
    """
    n, length = first.shape
    total: Array | None = None
    for some, count in steps(length, line):
        lines = first[:, some].reshape(n, -1, count)
        other = _ones(count, first.dtype) if second is None else second[:, some].reshape(n, -1, count)
        sums = np.vecdot(lines, other).astype(np.float64)  # BLAS adds neighbours side by side, so in a fraction of time
        part = sums[:, 0] if sums.shape[1] == 1 else np.add.reduce(sums, 1)
        total = part if total is None else total + part
    assert total is not None
    return total


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: np.dtype[Any]) -> Array:
    """Ones, read-only."""
    ones = np.ones(count, dtype)
    ones.flags.writeable = False
    return ones


def channel_sums(first: Array, second: Array | None, samples: int) -> Array:
    """Sum of each channel over the samples and positions of a piece, or of the product of two pieces, in float64."""
    n, d, p = first.shape
    channels = n // samples * d
    tile = Tile(slice(0, samples), slice(0, channels), slice(0, p))
    return Lanes.of(tile, (samples, channels, p), True).sum(first, second)
