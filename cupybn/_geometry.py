"""How launches are laid over arrays: pure functions of shape, width of a pack and, for elementwise steps, the device.

Sums are split by shape and alignment alone: the order of additions is the same on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

THREADS = 256
"""Of every block."""
LEAST_SUMMED = 1 << 12
"""Elements below which a sum is not split any further."""
LEAST_MAPPED = 1 << 13
"""Elements that a block of an elementwise step takes at least: before them it merges the parts of its channels."""
MOST_GRID_Y = 65535
"""CUDA's own limit, also along z."""
MOST_GRID_X = 1 << 30
"""Half of CUDA's own limit."""

SEGMENT = 1 << 13
"""Channels first: most elements of a row that a row of threads takes at a time."""
CHANNELS_FIRST_SUM = 1 << 10
"""Channels first: blocks that a large sum is split over, several for each multiprocessor of a large GPU."""
CHANNELS_FIRST_MAP = 16
"""Channels first: blocks for each multiprocessor of an elementwise step, two rounds of what one holds."""

TILE_PACKS = 4
"""Channels last: packs of a row that a block takes, 64 bytes. Merging P parts of Q lanes costs P * Q reads in each
block; narrow tiles make few parts of few lanes."""
TILE_ELEMENTS = 32
"""Channels last: elements of a row that a block takes, where memory is not aligned."""
MOST_LANES = 32
"""Channels last: elements of a row that a block has room for."""
CHANNELS_LAST_SUM = 1 << 8
"""Channels last: blocks that a large sum is split over."""
CHANNELS_LAST_MAP = 2
"""Channels last: blocks for each multiprocessor of an elementwise step, one round."""
ROWS_PER_PART = 8
"""Channels last: super-rows that a block of an elementwise step takes at least for each part that it merges."""


class Geometry(NamedTuple):
    """A grid of blocks, and the sizes that the kernel is told."""

    grid: tuple[int, ...]
    parts: int  # of each channel, where blocks sum
    sizes: dict[str, int]


def over_channels(C: int, shares: int = 1) -> tuple[int, int, int]:
    """A grid with blocks for each channel, more of which there may be than one side of a grid has."""
    return min(C, MOST_GRID_X), shares, math.ceil(C / MOST_GRID_X)


def channels_first(N: int, C: int, L: int, width: int, multiprocessors: int | None) -> Geometry:
    """Blocks (., s, .) take a share of the segments of each channel; see ``channels_first/rows.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    segment = min(L, SEGMENT)
    segments = N * math.ceil(L / segment)
    if multiprocessors is None:
        shares = min(math.ceil(CHANNELS_FIRST_SUM / C), math.ceil(N * L / LEAST_SUMMED), THREADS)
    else:
        wanted = multiprocessors * CHANNELS_FIRST_MAP
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
    return Geometry(over_channels(C, shares), shares, sizes)


def channels_last(M: int, C: int, width: int, multiprocessors: int | None) -> Geometry:
    """Block (t, s) takes a tile of columns of packs and a share of the super-rows; see ``channels_last/columns.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    common = math.gcd(C, width)
    columns, replicas = C // common, width // common
    super_rows = M // replicas
    tile = min(columns, TILE_PACKS if width > 1 else TILE_ELEMENTS)
    tiles = math.ceil(columns / tile)
    rows_of_threads = THREADS // tile
    per_row = tile * width  # elements of a row that a block takes
    replicas_kept = 1 if tiles == 1 else replicas  # where a tile has all columns, its block merges them
    shares = min(math.ceil(CHANNELS_LAST_SUM / tiles), math.ceil(super_rows * per_row / LEAST_SUMMED))
    if multiprocessors is not None:
        parts = shares * replicas_kept
        least = max(math.ceil(LEAST_MAPPED / per_row), parts * ROWS_PER_PART, rows_of_threads)
        wanted = multiprocessors * CHANNELS_LAST_MAP
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
    return Geometry((tiles, shares + tail), shares * replicas_kept + tail, sizes)
