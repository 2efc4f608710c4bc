"""How launches are laid over arrays: pure functions of shape, width of a pack and, for elementwise steps, the device.

Sums that are streamed are split by shape and alignment alone: the order of additions is the same on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupybn._steps.resident import CUDA, ROUNDS, SOON, Device, choose_cluster

THREADS = 256
"""Threads of most blocks."""
LEAST_SUMMED = 1 << 13
"""Elements below which a sum is not split any further."""
LEAST_MAPPED = 1 << 13
"""Elements that a block of an elementwise step takes at least: before them it merges the parts of its channels."""
MOST_GRID_Y = 65535
"""CUDA's own limit, also along z."""
MOST_GRID_X = 1 << 30
"""Half of CUDA's own limit."""

WARP = 32
"""Threads of a warp."""
TEAMS = (WARP, 64, 128, 256, 512)
"""Threads of a team, which takes a channel (channels first): the fewest that have no more than their share to do."""
STREAMED_PACKS = 16
"""Packs of an array that a thread of a team takes at most, where a larger team would do (channels first)."""
ON_CHIP_PACKS = 32
"""Packs of all arrays together that a thread keeps on chip at most, likewise."""
NARROW = 8
"""Bytes of a pack below which a thread takes twice as many packs: they take less time."""
LEAST_THREADS = 128
"""Threads of a block at least (channels first): of several teams where those are small."""
CHANNELS_FIRST_SUM = 1 << 10
"""Blocks that a large sum is split over (channels first), several for each multiprocessor of a large GPU."""
CHANNELS_FIRST_MAP = 16
"""Blocks for each multiprocessor of an elementwise step (channels first), two rounds of what one holds."""
MOST_PARTS = 256
"""Parts of a sum that the next launch has to add up for each channel, at most (channels first)."""
CHANNELS_FIRST_OWN = 1 << 10
"""Bytes of a block's shared memory that are not for the tensor, where that is kept on chip (channels first)."""

CHANNELS_LAST_OWN = 16 << 10
"""Bytes of a block's shared memory that are not for the tensor, where that is kept on chip (channels last)."""
MOST_COLUMNS = 32
"""Columns of a tile at most (channels last): the threads of a warp."""
SUMMED_TILE = {1: (64, 32), 2: (128, 32)}
"""Bytes of a row that a block sums (channels last), of long rows and of short ones, by the arrays it reads.
The launch that follows merges all parts of all channels of a tile: narrow tiles make few parts. 32 bytes are a sector,
the least that memory hands out."""
MAPPED_TILE = 128, 64
"""Bytes of a row that a block of an elementwise step takes (channels last), of long rows and of short ones."""
ON_CHIP_TILE = 64, 32
"""Bytes of a row that a block keeps on chip (channels last)."""
SHORT_ROW = 256
"""Bytes of a row up to which it is short (channels last)."""
CHANNELS_LAST_SUM = 1 << 8
"""Blocks that a large sum is split over (channels last)."""
CHANNELS_LAST_MAP = 3
"""Blocks for each multiprocessor of an elementwise step (channels last), one round."""
ROWS_PER_PART = 8
"""Rows that a block of an elementwise step takes at least for each part that it merges (channels last)."""


class ChannelsFirst(NamedTuple):
    """Sizes that the kernels of ``channels_first`` are told: the array is (N, C, L)."""

    N: int
    C: int
    L: int
    packs: int  # of a channel that a team takes, or a block of a cluster


class ChannelsLast(NamedTuple):
    """Sizes that the kernels of ``channels_last`` are told: the array is (M, C)."""

    M: int
    C: int
    tile: int  # columns of packs that a block takes
    rows: int  # that a block takes of them


class Geometry(NamedTuple):
    """A grid of blocks, and the sizes that the kernel is told."""

    grid: tuple[int, ...]
    sizes: ChannelsFirst | ChannelsLast | None = None  # None for kernels without a layout
    parts: int = 1  # of each channel, where blocks sum
    threads: int = THREADS  # of a block
    cluster: int = 1  # blocks
    shared: int = 0  # bytes of dynamic shared memory
    team: int = 0  # threads that take a channel together; 0 for kernels that are not told


def over_channels(C: int, shares: int = 1) -> tuple[int, int, int]:
    """A grid with blocks for each channel, more of which there may be than one side of a grid has."""
    return min(C, MOST_GRID_X), shares, math.ceil(C / MOST_GRID_X)


def team_of(packs: int, pack_bytes: int, each: int, most: int) -> int:
    """The threads of a team: the fewest that have at most `each` of so many packs, twice as many of narrow ones."""
    each *= 1 if pack_bytes >= NARROW else 2
    return next((t for t in TEAMS if t == most or packs <= t * each), most)


def channels_first(N: int, C: int, L: int, itemsize: int, width: int, multiprocessors: int | None) -> Geometry:
    """Teams (., s, .) take a share of the packs of each channel; see ``channels_first/packs.cuh``.

    Parameters
    ----------
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    packs = N * L // width
    if multiprocessors is None:
        shares = min(math.ceil(CHANNELS_FIRST_SUM / C), math.ceil(N * L / LEAST_SUMMED), MOST_PARTS)
    else:
        wanted = multiprocessors * CHANNELS_FIRST_MAP
        shares = min(math.ceil(wanted / C), math.ceil(N * L / LEAST_MAPPED), MOST_GRID_Y)
    own = math.ceil(packs / shares)
    shares = math.ceil(packs / own)
    team = team_of(own, width * itemsize, STREAMED_PACKS, THREADS)
    threads = max(team, LEAST_THREADS)
    grid = over_channels(math.ceil(C * team / threads), shares)
    return Geometry(grid, ChannelsFirst(N, C, L, own), shares, threads, team=team)


def channels_first_resident(
    N: int, C: int, L: int, itemsize: int, width: int, arrays: int, device: Device
) -> Geometry | None:
    """A team or a cluster for each channel; see ``channels_first/packs.cuh``. None where a channel does not fit."""
    cluster = choose_cluster(C, N * L // width, width * itemsize, arrays, device, CHANNELS_FIRST_OWN)
    if cluster is None or C * cluster.blocks > MOST_GRID_X:
        return None
    most = device.shared_per_multiprocessor // ROUNDS - CUDA - CHANNELS_FIRST_OWN  # for all teams of a block
    largest = TEAMS[-1] if cluster.shared > most else THREADS  # registers are not to keep a second block away
    team = team_of(cluster.packs, width * itemsize, ON_CHIP_PACKS // arrays, largest)
    while team < LEAST_THREADS and cluster.shared * (LEAST_THREADS // team) > most:
        team *= 2
    threads = max(team, LEAST_THREADS)
    teams = threads // team if cluster.blocks == 1 else 1
    grid = (math.ceil(C / teams) * cluster.blocks,)
    sizes = ChannelsFirst(N, C, L, cluster.packs)
    return Geometry(grid, sizes, 1, threads, cluster.blocks, cluster.shared * teams, threads // teams)


def tile_of(row_bytes: int, pack_bytes: int, tile_bytes: int) -> int:
    """The columns of a tile of so many bytes: a power of two, no more than a row or a warp has."""
    columns = row_bytes // pack_bytes
    return min(tile_bytes // pack_bytes, 1 << (columns - 1).bit_length(), MOST_COLUMNS)


def channels_last(M: int, C: int, itemsize: int, width: int, arrays: int, multiprocessors: int | None) -> Geometry:
    """Block (t, s) takes a tile of columns of packs and a share of the rows; see ``channels_last/columns.cuh``.

    Parameters
    ----------
    arrays : int
        Those that are summed: 1 forward, 2 backward.
    multiprocessors : int or None
        None for a sum, which must not depend on the device.
    """
    row, pack = C * itemsize, width * itemsize
    short = row <= SHORT_ROW
    tile = tile_of(row, pack, SUMMED_TILE[arrays][short])
    tiles = math.ceil(row / (tile * pack))
    shares = min(math.ceil(CHANNELS_LAST_SUM / tiles), math.ceil(M * tile * width / LEAST_SUMMED))
    if multiprocessors is not None:
        parts = shares
        tile = tile_of(row, pack, MAPPED_TILE[short])
        tiles = math.ceil(row / (tile * pack))
        least = max(math.ceil(LEAST_MAPPED / (tile * width)), parts * ROWS_PER_PART)
        wanted = max(1, multiprocessors * CHANNELS_LAST_MAP // tiles)  # no more than there is room for at a time
        shares = min(wanted, math.ceil(M / least), MOST_GRID_Y)
    rows = math.ceil(M / shares)
    shares = math.ceil(M / rows)
    return Geometry((tiles, shares), ChannelsLast(M, C, tile, rows), shares)


def channels_last_resident(M: int, C: int, itemsize: int, width: int, arrays: int, device: Device) -> Geometry | None:
    """A block for each tile of columns; see ``channels_last/columns.cuh``. None where tiles are not small.

    Of the tiles that are, the widest one that keeps the whole device busy: narrow ones read memory in small pieces.
    """
    row, pack = C * itemsize, width * itemsize
    best = None
    for tile_bytes in ON_CHIP_TILE:
        tile = tile_of(row, pack, tile_bytes)
        tiles = math.ceil(row / (tile * pack))
        shared = M * tile * pack * arrays
        if shared > min(SOON, device.shared_per_block - CHANNELS_LAST_OWN) or tiles > MOST_GRID_X:
            continue
        geometry = Geometry((tiles,), ChannelsLast(M, C, tile, M), shared=shared)
        if best is None or best.grid[0] < min(device.multiprocessors, tiles):
            best = geometry
    return best
