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
    wanted_threads,
)

Array = npt.NDArray[Any]

PIECE = 1 << 16
"""Most elements of a piece: some arrays of this size stay in the cache of a core."""
WORKING = 1 << 5
"""Pieces in the array for each thread: what all threads have in work is then a fraction of the array."""
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
        b = evenly(self.B, PIECE)
        d = evenly(self.D, max(1, PIECE // (b * min(self.A, MANY))))
        a = evenly(self.A, max(1, PIECE // (b * d)))
        return list(itertools.product(split(self.D, d), split(self.A, a), split(self.B, b)))

    def work(self, bands: int) -> list[list[Piece]]:
        """Pieces of the whole array, in lists: each list is work for one thread, and lies in one of so many bands."""
        everything = slice(0, self.D), slice(0, self.A), slice(0, self.B)
        sample, rows = self.G * self.length, PIECE // self.length
        if not self.whole:
            ranges = [(slice(n, n + 1), slice(g, g + 1)) for n in range(self.N) for g in range(self.G)]
        elif sample <= PIECE:
            ranges = [(n, slice(0, self.G)) for n in split(self.N, evenly(self.N, PIECE // sample))]
        else:
            some = split(self.G, evenly(self.G, rows))
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

    def take(self, array: Array, piece: Piece, dtype: npt.DTypeLike) -> Array:
        """The piece of an array, contiguous and in this dtype, (rows, channels, positions): a view if it can be."""
        view = self.view(array, piece)
        n, g, d, a, b = view.shape
        return view.astype(dtype, order="C", copy=False).reshape(n * g, d, a * b)

    def place(self, array: Array, piece: Piece, dtype: npt.DTypeLike) -> Array:
        """Memory to compute a piece of an array in, which `put` then puts there: the array's own, if it can be."""
        if self.A == 1 and array.dtype == dtype:
            return self.take(array, piece, dtype)
        n, g, d, a, b = self.view(array, piece).shape
        return np.empty((n * g, d, a * b), dtype)

    def put(self, array: Array, piece: Piece, values: Array) -> None:
        """Write a piece into an array, unless it has been computed there."""
        if self.A == 1 and array.dtype == values.dtype and np.may_share_memory(array, values):
            return
        view = self.view(array, piece)
        np.copyto(view, values.reshape(view.shape), casting="unsafe")


@functools.lru_cache(maxsize=64)
def work_of(rows: Rows, bands: int) -> list[list[Piece]]:
    """`Rows.work`, kept for the next calls."""
    return rows.work(bands)


def bands_of(rows: Rows, itemsize: int, sums: bool) -> int:
    """Number of bands: enough for all threads, but with sums of each channel in each they must not be many."""
    if not sums:
        return rows.number
    channel = 16 * rows.G * rows.D
    return max(1, min(BANDS, rows.number * rows.length * itemsize // (8 * channel)))


def walk(core: Callable[[Piece], None], work: list[list[Piece]], size: int) -> None:
    """Call a core for all pieces, on threads: each writes where no other does, or adds to the sums of its band."""
    if size <= SMALL:
        wanted_threads()  # raises for a wrong setting, even if the array needs one thread only
    np.setbufsize(SHORT)

    def task(pieces: list[Piece]) -> None:
        for piece in pieces:
            core(piece)

    run(task, work, 1 if size <= SMALL else min(num_threads(), len(work), max(1, size // (PIECE * WORKING))))


def row_sums(first: Array, second: Array | None = None) -> Array:
    """Sum of each row of an array (rows, length), or of the product of two, in float64; no row's depends on others."""
    n, length = first.shape
    total: Array | None = None
    for line, count in steps(length, LINE):
        lines = first[:, line].reshape(n, -1, count)
        other = _ones(count, first.dtype) if second is None else second[:, line].reshape(n, -1, count)
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
