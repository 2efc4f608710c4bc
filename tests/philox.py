"""Philox4x32-10, and what dropout makes of it, in Python's integers: by the formula, independent of the library."""

from __future__ import annotations

import functools

import numpy as np

M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
LOW = 2**32 - 1
KNOWN = [  # counter, key, output: Random123's `tests/kat_vectors`
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 4, (LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@functools.lru_cache(maxsize=1 << 16)
def block(number: int, call: int, seed: int) -> tuple[int, int, int, int]:
    """Four words of a call."""
    a, b, c, d = number & LOW, number >> 32, call & LOW, call >> 32
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        first, second = M0 * a, M1 * c
        a, b, c, d = (second >> 32) ^ b ^ k0, second & LOW, (first >> 32) ^ d ^ k1, first & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return a, b, c, d


def word(i: int, call: int, seed: int) -> int:
    """Word i of a call."""
    return block(i // 4, call, seed)[i % 4]


def dropped(numbers, p: float, call: int, seed: int) -> np.ndarray:
    """Whether the elements, or channels, of these numbers are dropped: an array of their shape."""
    numbers = np.asarray(numbers)
    found = [word(int(i), call, seed) < round(p * 2**32) for i in numbers.reshape(-1)]
    return np.array(found, bool).reshape(numbers.shape)


def expected(x: np.ndarray, numbers, p: float, call: int, seed: int) -> np.ndarray:
    """The output of dropout for an array whose elements, or channels, have these numbers."""
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        y = (x.astype(dtype) * dtype(1 / (1 - p))).astype(x.dtype)
    y[np.broadcast_to(dropped(numbers, p, call, seed), x.shape)] = 0
    return y


def places(array) -> np.ndarray:
    """The number of each element in the order of memory of an array, in its shape: axes by falling stride."""
    order = sorted(range(array.ndim), key=lambda axis: (-abs(array.strides[axis]), axis))
    numbers = np.arange(array.size).reshape([array.shape[axis] for axis in order])
    return numbers.transpose(np.argsort(order)) if array.ndim else numbers


def channel_numbers(shape, channel_axis: int) -> np.ndarray:
    """The number n * C + c of each channel of a batch, in a shape that broadcasts to that of the batch."""
    axis = channel_axis % len(shape)
    N, C = shape[0], shape[axis]
    numbers = np.arange(N * C).reshape(N, C, *[1] * (len(shape) - 2))
    return np.moveaxis(numbers, 1, axis)
