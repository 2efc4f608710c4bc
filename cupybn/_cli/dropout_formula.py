"""Dropout by its definition, in Python's integers: the steps, for `check` to compare those of `numpy_dropout` with."""

from __future__ import annotations

import functools

import numpy as np

from cupybn._steps.bundles import Drawn, Drops, Tensor

LOW = 2**32 - 1


def dropout_draw(state: Drawn) -> Drawn:
    """Copy of the seed and the number of calls, which then goes up."""
    drawn = state.copy()
    state[1] += np.uint64(1)
    return drawn


def dropout(x: Tensor, drops: Drops, out: Tensor) -> None:
    """0 where the word of an element is below the threshold, else x * scale."""
    out[...] = np.where(_dropped(drops, x.size), 0, _scaled(x, drops))


def dropout_channels(x: Tensor, drops: Drops, swapped: bool, out: Tensor) -> None:
    """0 where the word of a channel of a sample is below the threshold, else x * scale."""
    _, A, _, B, _ = x.shape
    dropped = _dropped(drops, A * B)
    dropped = dropped.reshape(B, A).T if swapped else dropped.reshape(A, B)
    out[...] = np.where(dropped[None, :, None, :, None], 0, _scaled(x, drops))


def _scaled(x: Tensor, drops: Drops) -> Tensor:
    """All elements times the scale, in float64."""
    return x.astype(np.float64) * drops.scale


def _dropped(drops: Drops, count: int) -> Tensor:
    """Whether each of the first words is below the threshold."""
    seed, call = map(int, drops.drawn)
    return np.array([_block(i // 4, call, seed)[i % 4] < drops.threshold for i in range(count)], bool)


@functools.lru_cache(maxsize=1 << 16)
def _block(number: int, call: int, seed: int) -> tuple[int, int, int, int]:
    """Four words of Philox4x32-10."""
    a, b, c, d = number & LOW, number >> 32, call & LOW, call >> 32
    for i in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = second >> 32 ^ b ^ (seed + i * 0x9E3779B9) & LOW, second & LOW
        c, d = first >> 32 ^ d ^ ((seed >> 32) + i * 0xBB67AE85) & LOW, first & LOW
    return a, b, c, d
