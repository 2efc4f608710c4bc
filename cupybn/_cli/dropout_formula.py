"""Dropout by its definition, in Python's own integers: for `check` to compare `numpy_dropout` with."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from cupybn._steps.bundles import Drops

Array = npt.NDArray[Any]


def dropout_draw(state: Array) -> Array:
    """A copy of seed and number of the call; the number then goes up by one."""
    drawn = state.copy()
    state[1] += np.uint64(1)
    return drawn


def dropout(x: Array, drops: Drops, out: Array) -> None:
    """0 where the word of an element is below the threshold, else x * scale."""
    _apply(x, words(drops.drawn, x.size), drops, out)


def dropout_channels(x: Array, drops: Drops, swapped: bool, out: Array) -> None:
    """0 where the word n * C + c is below the threshold, else x * scale."""
    _, A, _, B, _ = x.shape
    of_channels = words(drops.drawn, A * B)
    of_axes = of_channels.reshape(B, A).T if swapped else of_channels.reshape(A, B)
    _apply(x, np.broadcast_to(of_axes[:, None, :, None], x.shape), drops, out)


def _apply(x: Array, word: Array, drops: Drops, out: Array) -> None:
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    out[...] = np.where(word < drops.threshold, 0, x.astype(np.float64) * float(dtype(drops.scale)))


def words(drawn: Array, size: int) -> npt.NDArray[np.uint64]:
    """The first words of a call, by Philox4x32-10 as Random123 defines it."""
    seed, call = map(int, drawn)
    blocks = (philox(block, call, seed) for block in range(-(-size // 4)))
    return np.array([*itertools.islice(itertools.chain.from_iterable(blocks), size)], np.uint64)


@functools.lru_cache(maxsize=1 << 16)
def philox(block: int, call: int, seed: int) -> tuple[int, int, int, int]:
    """The four words of a block."""
    low = 0xFFFFFFFF
    a, b, c, d = block & low, block >> 32, call & low, call >> 32
    key = [seed & low, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ key[0], second & low, first >> 32 ^ d ^ key[1], first & low
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return a, b, c, d
