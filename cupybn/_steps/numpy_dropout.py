"""The steps of dropout on NumPy arrays: the specification of the CUDA kernels, and the fallback without a GPU.

What is dropped is a function of four numbers: the seed and the number of the call, which a generator's state has, the
number of the element or channel, and p. Philox4x32-10 makes words of 32 random bits of the first three; an element is
dropped where its word is below the threshold round(p * 2^32). Nothing of the input's size is kept: the way back is the
same step on the gradient, with the same draw.

Arithmetic is float32 for data of 16 or 32 bits, float64 for float64. Words are worked out tile by tile, on threads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._arrays.dtypes import accumulation_dtype
from cupybn._steps.bundles import Drawn, Drops
from cupybn._steps.tiles import evenly, num_threads, numpy_settings, run, split, wanted_threads

Array = npt.NDArray[Any]

WORDS = 4
"""Words of a block, which Philox makes at once."""
ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
INCREMENTS = 0x9E3779B9, 0xBB67AE85
"""Numbers that the two halves of the key go up by from round to round."""
TILE = 1 << 16
"""Most elements or words of a tile, a multiple of WORDS. What makes words of them takes a megabyte of a cache."""
SMALL = 1 << 17
"""Elements up to which an array is worked on by one thread."""

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_drawing = threading.Lock()
"""Held while a call draws: two threads must not draw the same numbers."""


def dropout_draw(state: Drawn) -> Drawn:
    """Copy of a generator's state, the seed and the number of calls so far, which then goes up by one."""
    with _drawing:
        drawn: Array = state.copy()
        state[1:] += np.uint64(1)
    return drawn


@numpy_settings
def dropout(x: Array, drops: Drops, out: Array) -> None:
    """out = 0 where an element is dropped, else x * scale: element i has word i.

    Parameters
    ----------
    x, out : (size,) arrays; out may be x
    drops : Drops
    """

    def task(some: slice) -> None:
        _apply(x[some], _dropped(drops, some), drops.scale, out[some])

    _run(task, split(x.size, TILE), x.size)


@numpy_settings
def dropout_channels(x: Array, drops: Drops, swapped: bool, out: Array) -> None:
    """out = 0 where a channel of a sample is dropped, else x * scale: channel c of sample n has word n * C + c.

    Parameters
    ----------
    x, out : (O, A, M, B, I) arrays; out may be x
        Axes as they lie in memory: A and B are those of samples and channels, others may lie before, between and
        behind.
    drops : Drops
    swapped : bool
        Whether channels are the axis A and samples the axis B.
    """
    _, A, _, B, _ = x.shape
    dropped = np.empty(A * B, np.bool_)

    def draw(some: slice) -> None:
        dropped[some] = _dropped(drops, some)

    _run(draw, split(A * B, TILE), A * B)
    of_axes = dropped.reshape(B, A).T if swapped else dropped.reshape(A, B)
    column = of_axes[None, :, None, :, None]

    def task(tile: tuple[slice, ...]) -> None:
        _, a, _, b, _ = tile
        _apply(x[tile], column[:, a, :, b], drops.scale, out[tile])

    _run(task, _tiles(x.shape), x.size)


def _run(task: Callable[[Any], None], work: list[Any], size: int) -> None:
    """Do the task for all parts of the work on an array of this size, on threads if it is not small."""
    wanted_threads()  # raises for a wrong setting, even if the array needs one thread only
    run(task, work, 1 if size <= SMALL else min(num_threads(), len(work)))


def _tiles(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Tiles of a non-empty array of this shape, of at most `TILE` elements, as long as can be along the last axes."""
    ranges, left = [], TILE
    for size in reversed(shape):
        step = evenly(size, max(1, left))
        ranges.append(split(size, step))
        left //= step
    return list(itertools.product(*reversed(ranges)))


def _apply(x: Array, dropped: Array, scale: float, out: Array) -> None:
    """Write x * scale, and 0 where x is dropped."""
    dtype = accumulation_dtype(x.dtype)
    y = out if out.dtype == dtype else np.empty(x.shape, dtype)
    np.multiply(x, dtype.type(scale), out=y, dtype=dtype)
    np.copyto(y, 0, where=dropped)
    if y is not out:
        out[...] = y


def _dropped(drops: Drops, some: slice) -> Array:
    """Whether each of some words is dropped, of which the first one begins a block."""
    blocks = np.arange(some.start // WORDS, -(-some.stop // WORDS), dtype=np.uint64)
    seed, call = (int(number) for number in drops.drawn)
    dropped = np.empty((len(blocks), WORDS), np.bool_)
    for i, words in enumerate(_philox(blocks, call, seed)):
        np.less(words, np.uint64(drops.threshold), out=dropped[:, i])
    return dropped.reshape(-1)[: some.stop - some.start]


def _philox(blocks: Array, call: int, seed: int) -> list[Array]:
    """Words of some blocks by Philox4x32-10, as Random123 defines it: four arrays, each with a word of every block.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). The counter is the number of
    the block and that of the call, the key is the seed, each of 64 bits with its lower half first.

    Parameters
    ----------
    blocks : uint64 array
    """
    a, b, c, d = (np.empty_like(blocks) for _ in range(WORDS))
    np.bitwise_and(blocks, _LOW, out=a)
    np.right_shift(blocks, _HALF, out=b)
    c.fill(call & 0xFFFFFFFF)
    d.fill(call >> 32)
    first, second = np.empty_like(blocks), np.empty_like(blocks)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(ROUNDS):
        np.multiply(a, MULTIPLIERS[0], out=first)
        np.multiply(c, MULTIPLIERS[1], out=second)
        _mix(second, b, key[0], out=a)
        _mix(first, d, key[1], out=c)
        # Of b and d the upper halves are the rest of a product, and of no matter. Memory changes hands.
        b, second = second, b
        d, first = first, d
        key = [(half + more) & 0xFFFFFFFF for half, more in zip(key, INCREMENTS, strict=True)]
    b &= _LOW
    d &= _LOW
    return [a, b, c, d]


def _mix(product: Array, word: Array, key: int, out: Array) -> None:
    """Write the upper half of a product, mixed with a word and a part of the key."""
    np.right_shift(product, _HALF, out=out)
    out ^= word
    out ^= np.uint64(key)
    out &= _LOW
