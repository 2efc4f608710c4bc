"""How launches are laid over arrays: pure functions of shape, width of a pack and, for elementwise steps, the device.

Sums are split by the shape alone, so that every device adds in the same order and gets the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

THREADS = 256
"""Of every block."""
SEGMENT = 1 << 13
"""Channels first: most elements of a row that a row of threads takes at a time."""
BLOCKS = 1 << 10
"""Blocks that a sum is split over, if it is large: several for each multiprocessor of a large GPU."""
LEAST_SUMMED = 1 << 12
"""Elements of a channel below which a sum is not split any further."""
LEAST_MAPPED = 1 << 13
"""Elements that a block of an elementwise step takes at least: it merges the parts of its channels first."""
MOST_PARTS = THREADS
"""Parts of a channel: one for each thread of a block that merges them."""
MOST_MERGED = 1 << 13
"""Channels last: parts times lanes that a block merges."""
LANES = 1 << 7
"""Channels last: elements of a row that a block takes, if the row is longer: 256 bytes of float16, 1 KiB of float64."""
BLOCKS_PER_MULTIPROCESSOR = 16
"""Of elementwise steps: two rounds of what a multiprocessor holds."""


class Geometry(NamedTuple):
    """A grid of blocks, and the sizes that the kernel is told."""

    grid: tuple[int, int]
    parts: int  # of each channel, where blocks sum
    sizes: dict[str, int]


def channels_first(N: int, C: int, L: int, width: int, multiprocessors: int | None) -> Geometry:
    """Block (c, s) takes a share of the segments of channel c; see ``channels_first/rows.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    segment = min(L, SEGMENT)
    segments = N * math.ceil(L / segment)
    if multiprocessors is None:
        shares = min(math.ceil(BLOCKS / C), math.ceil(N * L / LEAST_SUMMED), MOST_PARTS)
    else:
        wanted = multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        shares = min(math.ceil(wanted / C), math.ceil(N * L / LEAST_MAPPED), MOST_GRID_Y)
    segments_per_block = math.ceil(segments / min(shares, segments))
    slots = segment // width if L % width == 0 and segment % width == 0 else (segment + 2 * width - 2) // width
    shares = math.ceil(segments / segments_per_block)
    sizes = {
        "N": N,
        "C": C,
        "L": L,
        "segment": segment,
        "segments_per_block": segments_per_block,
        "lanes": min(THREADS, slots),
    }
    return Geometry((C, shares), shares, sizes)


def channels_last(M: int, C: int, width: int, multiprocessors: int | None) -> Geometry:
    """Block (t, s) takes a tile of the columns of packs and a share of the super-rows; see ``channels_last/columns.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    common = math.gcd(C, width)
    columns, replicas = C // common, width // common
    super_rows = M // replicas
    tiles = math.ceil(columns * width / LANES)
    tile = math.ceil(columns / tiles)
    rows_of_threads = THREADS // tile
    if multiprocessors is None:
        most_parts = max(1, MOST_MERGED // (tile * width * replicas))
        least = rows_of_threads * max(1, LEAST_SUMMED // (THREADS * width))
        shares = min(math.ceil(BLOCKS / tiles), math.ceil(super_rows / least), most_parts)
    else:
        wanted = multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        least = rows_of_threads * max(1, LEAST_MAPPED // (THREADS * width))
        shares = min(math.ceil(wanted / tiles), math.ceil(super_rows / least), MOST_GRID_Y - 1)
    super_rows_per_block = math.ceil(super_rows / max(1, shares)) or 1
    shares = math.ceil(super_rows / super_rows_per_block)
    tail = M % replicas > 0
    sizes = {
        "M": M,
        "C": C,
        "columns": columns,
        "super_rows": super_rows,
        "super_rows_per_block": super_rows_per_block,
        "tile": tile,
    }
    return Geometry((math.ceil(columns / tile), shares + tail), shares * replicas + tail, sizes)


MOST_GRID_Y = 65535
"""CUDA's own limit."""
