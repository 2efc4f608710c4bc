"""How launches are laid over arrays: pure functions of shape, width of a pack and, for elementwise steps, the device.

Sums that are streamed are split by shape and alignment alone: the order of additions is the same on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupybn._resident import Device, choose_cluster

THREADS = 256
"""Threads of a block, but for those that keep channels-first data on chip."""
LEAST_SUMMED = 1 << 12
"""Elements below which a sum is not split any further."""
LEAST_MAPPED = 1 << 13
"""Elements that a block of an elementwise step takes at least: before them it merges the parts of its channels."""
MOST_GRID_Y = 65535
"""CUDA's own limit, also along z."""
MOST_GRID_X = 1 << 30
"""Half of CUDA's own limit."""

RESIDENT_THREADS = (128, 512)
"""Channels first, on chip: of a block, fewer where there is less to do."""
PACKS_PER_THREAD = 8
"""Channels first, on chip: that the smaller of these blocks are meant for."""
SEGMENT = 1 << 12
"""Channels first: elements of a row that a row of threads takes at a time; of its last ones, up to twice as many."""
CHANNELS_FIRST_SUM = 1 << 10
"""Channels first: blocks that a large sum is split over, several for each multiprocessor of a large GPU."""
CHANNELS_FIRST_MAP = 16
"""Channels first: blocks for each multiprocessor of an elementwise step, two rounds of what one holds."""

CHANNELS_FIRST_OWN = 1 << 10
CHANNELS_LAST_OWN = 16 << 10
"""Bytes of a block's shared memory that are not for the tensor, where that is kept on chip."""
ROW = 128
"""Channels last: bytes of a row that a block takes at most, as much as memory hands out at a time; the kernels have room for
their channels. Half as much takes 5 to 10 % longer, a quarter 20 to 30 %."""
SHORT_ROWS = 256
"""Channels last: bytes of rows that sums take by the quarter of ROW, others by the half of it. Merging P parts of Q channels
costs P * Q reads in each block of the launch that follows, and narrow tiles make few parts of few channels."""
WIDEST_TILE = 32
"""Channels last: columns of a tile, of one pack each, at most: the threads of a warp."""
CHANNELS_LAST_SUM = 1 << 8
"""Channels last: blocks that a large sum is split over."""
CHANNELS_LAST_MAP = 3
"""Channels last: blocks for each multiprocessor of an elementwise step, one round."""
ROWS_PER_PART = 8
"""Channels last: rows that a block of an elementwise step takes at least for each part that it merges."""


class Geometry(NamedTuple):
    """A grid of blocks, and the sizes that the kernel is told."""

    grid: tuple[int, ...]
    sizes: dict[str, int]
    parts: int = 1  # of each channel, where blocks sum
    threads: int = THREADS  # of a block
    cluster: int = 1  # blocks
    shared: int = 0  # bytes of dynamic shared memory


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
    segments = N * (L // segment)
    if multiprocessors is None:
        shares = min(math.ceil(CHANNELS_FIRST_SUM / C), math.ceil(N * L / LEAST_SUMMED), THREADS)
    else:
        wanted = multiprocessors * CHANNELS_FIRST_MAP
        shares = min(math.ceil(wanted / C), math.ceil(N * L / LEAST_MAPPED), MOST_GRID_Y)
    segments_per_block = math.ceil(segments / shares)
    slots = _slots(segment + L % segment, width)
    shares = math.ceil(segments / segments_per_block)
    sizes = {
        "N": N,
        "C": C,
        "L": L,
        "segment": segment,
        "segments_per_block": segments_per_block,
        "lanes": min(THREADS, slots),
    }
    return Geometry(over_channels(C, shares), sizes, shares)


def _slots(elements: int, width: int) -> int:
    """The most packs that so many elements of a row touch, up to its end.

    Segments are whole packs: if these elements are, so is the row, and all rows begin where a pack does.
    """
    return elements // width if elements % width == 0 else (elements + 2 * width - 2) // width


def channels_first_resident(
    N: int, C: int, L: int, itemsize: int, width: int, arrays: int, device: Device
) -> Geometry | None:
    """A cluster for each channel; see ``channels_first/slots.cuh``. None where a channel is not to be kept on chip."""
    slots_per_row = _slots(L, width)
    cluster = choose_cluster(C, N * slots_per_row, width * itemsize, arrays, device, CHANNELS_FIRST_OWN)
    if cluster is None or C * cluster.blocks > MOST_GRID_X:
        return None
    threads = next((t for t in RESIDENT_THREADS if cluster.packs <= t * PACKS_PER_THREAD), RESIDENT_THREADS[-1])
    sizes = {"N": N, "C": C, "L": L, "slots_per_row": slots_per_row, "slots_per_block": cluster.packs}
    return Geometry((C * cluster.blocks,), sizes, 1, threads, cluster.blocks, cluster.shared)


def tile_of(columns: int, pack_bytes: int, row: int) -> int:
    """Columns of a tile, a power of two, whose packs are about so many bytes of a row."""
    return min(max(1, row // pack_bytes), WIDEST_TILE, 1 << (columns - 1).bit_length())


def channels_last_resident(M: int, C: int, itemsize: int, width: int, arrays: int, device: Device) -> Geometry | None:
    """A cluster for each tile of columns; see ``channels_last/columns.cuh``. None where no tile is to be kept on chip.

    Of the tiles that fit, the widest one that keeps the whole device busy: narrow ones read memory in small pieces.
    """
    columns, pack_bytes = C // width, width * itemsize
    best = None
    for row in (ROW, ROW // 2, ROW // 4):
        tile = tile_of(columns, pack_bytes, row)
        tiles = math.ceil(columns / tile)
        cluster = choose_cluster(tiles, M * tile, pack_bytes, arrays, device, CHANNELS_LAST_OWN)
        if cluster is None or tiles * cluster.blocks > MOST_GRID_X:
            continue
        rows = math.ceil(M / cluster.blocks)
        sizes = {"M": M, "C": C, "tile": tile, "rows_per_block": rows}
        shared = rows * tile * pack_bytes * arrays
        geometry = Geometry((tiles * cluster.blocks,), sizes, 1, THREADS, cluster.blocks, shared)
        if best is None or best.grid[0] < min(device.multiprocessors, geometry.grid[0]):
            best = geometry
    return best


def channels_last(M: int, C: int, itemsize: int, width: int, multiprocessors: int | None) -> Geometry:
    """Block (t, s) takes a tile of columns of packs and a share of the rows; see ``channels_last/columns.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    columns, pack_bytes = C // width, width * itemsize
    tile = tile_of(columns, pack_bytes, ROW // 4 if C * itemsize <= SHORT_ROWS else ROW // 2)
    tiles = math.ceil(columns / tile)
    shares = min(math.ceil(CHANNELS_LAST_SUM / tiles), math.ceil(M * tile * width / LEAST_SUMMED))
    if multiprocessors is not None:
        parts = math.ceil(M / math.ceil(M / shares))
        for row in (ROW, ROW // 2):  # wide tiles, unless they leave multiprocessors without work
            tile = tile_of(columns, pack_bytes, row)
            tiles = math.ceil(columns / tile)
            least = max(math.ceil(LEAST_MAPPED / (tile * width)), parts * ROWS_PER_PART)
            wanted = min(max(1, multiprocessors * CHANNELS_LAST_MAP // tiles), MOST_GRID_Y)
            shares = min(wanted, math.ceil(M / least))
            if shares == wanted:
                break
    rows_per_share = math.ceil(M / shares)
    shares = math.ceil(M / rows_per_share)
    sizes = {"M": M, "C": C, "tile": tile, "rows_per_share": rows_per_share}
    return Geometry((tiles, shares), sizes, shares)
