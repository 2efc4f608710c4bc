"""The launches of kernels, from the shape of an array: how many blocks and threads there are, and what each takes.

Arrays are (N, C, L), and `plans` calls one of four functions, each of which returns a `Geometry`::

    L > 1: channels first. A channel is N rows of L neighbours in memory.
        channels_first_resident    on chip:  a team of threads or a cluster of blocks keeps a channel
        channels_first             streamed: a channel is cut into shares, and a team takes a share
    L = 1: channels last. A row has one element of each channel; the rows are called M here.
        channels_last_resident     on chip:  a block keeps a tile, some neighbouring columns in all rows
        channels_last              streamed: a tile is cut into shares of the rows, and a block takes a share

    channels first                               channels last
    channel 0 | share 0 | share 1 | share 2 |                  tile 0    tile 1    tile 2
    channel 1 | share 0 | share 1 | share 2 |    rows 0..9   | share 0 | share 0 | share 0 |
    channel 2 | share 0 | share 1 | share 2 |    rows 10..19 | share 1 | share 1 | share 1 |

Resident is the word in names for what is on chip. Where a step has such a kernel, `plans` asks for its geometry first;
None means that the step is streamed. `resident` has the reasons.

Everything is counted in packs, the neighbouring elements that a thread loads or stores at once: ``width`` elements, up
to 16 bytes. A column is the packs at the same place of all rows (channels last).

Streamed kernels are of two kinds. One sums, and leaves a part of the sum for each share; the next launch adds the parts
up. It is cut by shape and width alone, so that the order of additions, and with it every bit, is the same on all GPUs.
The other kind is elementwise, and cut by the number of multiprocessors as well.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupybn._steps.resident import BLOCKS_PER_MULTIPROCESSOR, CUDA_OWN, SOON, Device, choose_cluster

# ---------------------------------------------------------------------------------------------------------------------
# Limits of either layout

WARP = 32
"""Threads of a warp."""
PACK = 16
"""Bytes of the widest pack: what one load or store moves at most."""
THREADS = 256
"""Threads per block for channels last. For channels first, the most per block, but for blocks on chip that are alone on
a multiprocessor."""
LEAST_SUMMED = 1 << 13
"""Elements for each share of a streamed sum: a channel or tile that has no more is not split."""
LEAST_MAPPED = 1 << 13
"""Elements for each share of an elementwise step, about. Each block first merges the parts of its channels, which is
not to outweigh its work on the elements."""
MOST_GRID_X = 1 << 30
"""Most blocks of a grid along x, half of what CUDA allows."""
MOST_GRID_Y = 65535
"""Most blocks of a grid along y, or along z, that CUDA allows."""

# ---------------------------------------------------------------------------------------------------------------------
# Channels first

TEAMS = (WARP, 64, 128, 256, 512)
"""Threads that a team may have. A team takes a channel, or a share of one; `team_of` chooses."""
STREAMED_PACKS = 16
"""Packs per thread up to which a streamed kernel uses the smaller team."""
ON_CHIP_PACKS = 32
"""Packs per thread, of all arrays that are kept together, up to which a kernel on chip uses the smaller team."""
NARROW = 8
"""Bytes below which a pack is narrow: a thread takes twice as many of them, as each takes less time."""
LEAST_THREADS = 128
"""Fewest threads per block; smaller teams share a block."""
CHANNELS_FIRST_SUM = 1 << 10
"""Shares of all channels together that a large sum is split into, several for each multiprocessor of a large GPU."""
MOST_PARTS = 256
"""Most shares that the sum of one channel is split into: the next launch has to add up as many parts."""
CHANNELS_FIRST_MAP = 16
"""Shares of all channels together, per multiprocessor, that a large elementwise step is split into: two rounds of the
blocks that one has room for at a time."""
CHANNELS_FIRST_OWN = 1 << 10
"""Bytes of shared memory that a kernel on chip needs per block for its own variables, beside the arrays."""

# ---------------------------------------------------------------------------------------------------------------------
# Channels last

MOST_COLUMNS = 32
"""Most columns of a tile: the threads of a warp, which stand side by side in one row."""
SHORT_ROW = 256
"""Bytes up to which a row is short. Tiles of short rows are narrower."""
SUMMED_TILE = {1: (64, 32), 2: (128, 32)}
"""Bytes of a row that a tile of a streamed sum covers, {arrays that the kernel reads: (in long rows, in short rows)}.
The narrower the tiles, the fewer shares each has, and the fewer parts per tile the next launch has to merge. 32 bytes
are a sector, the smallest piece that memory hands out."""
MAPPED_TILE = 128, 64
"""Bytes of a row that a tile of an elementwise step covers, in long rows and in short rows."""
ON_CHIP_TILE = 64, 32
"""Bytes of a row that a tile on chip may cover, the better choice first."""
CHANNELS_LAST_SUM = 1 << 8
"""Blocks that a large sum is split over."""
CHANNELS_LAST_MAP = 3
"""Blocks per multiprocessor that a large elementwise step is split over: as many as one has room for at a time."""
ROWS_PER_PART = 8
"""Rows that a block of an elementwise step takes for each part that it merges first, about, so that merging takes less
time than the rows."""
CHANNELS_LAST_OWN = 16 << 10
"""Bytes of shared memory that a kernel on chip needs per block for its own variables, beside the arrays."""


class ChannelsFirst(NamedTuple):
    """Sizes that the kernels of ``channels_first`` are told: the array is (N, C, L)."""

    N: int
    C: int
    L: int
    packs: int  # packs of a channel that a team takes or, where a cluster takes the channel, a block


class ChannelsLast(NamedTuple):
    """Sizes that the kernels of ``channels_last`` are told: the array is (M, C)."""

    M: int
    C: int
    tile: int  # columns that a block takes
    rows: int  # rows that a block takes of them


class Geometry(NamedTuple):
    """Launch of a kernel: its grid, its blocks, and the sizes that are passed to it."""

    grid: tuple[int, ...]
    sizes: tuple[int, ...] | None = None  # a NamedTuple as the kernel takes it; None for kernels without a layout
    parts: int = 1  # shares of a channel, each of which leaves a part where the kernel sums
    threads: int = THREADS  # threads per block
    cluster: int = 1  # blocks per cluster
    shared: int = 0  # bytes of dynamic shared memory per block
    team: int = 0  # threads per team; 0 for kernels that have no teams


def over_channels(C: int, shares: int = 1) -> tuple[int, int, int]:
    """Grid of C by `shares` blocks. The C along x go on along z where there are more than x may have."""
    return min(C, MOST_GRID_X), shares, math.ceil(C / MOST_GRID_X)


def team_of(packs: int, pack_bytes: int, each: int, most: int) -> int:
    """Threads of the smallest team whose threads take at most `each` of these packs, or twice as many narrow ones.

    The largest team has `most` threads, which is one of TEAMS; it takes whatever the smaller ones do not.
    """
    each *= 1 if pack_bytes >= NARROW else 2
    return next(t for t in TEAMS if t == most or packs <= t * each)


def channels_first(N: int, C: int, L: int, itemsize: int, width: int, multiprocessors: int | None) -> Geometry:
    """Geometry of a streamed kernel: teams of blocks (., s, .) take share s of the packs of a channel.

    ``channels_first/packs.cuh`` has a drawing of which pack each thread of a team takes.

    Parameters
    ----------
    multiprocessors : int or None
        None for a kernel that sums, which must not depend on the device.
    """
    packs = N * L // width
    if multiprocessors is None:
        shares = min(math.ceil(CHANNELS_FIRST_SUM / C), math.ceil(N * L / LEAST_SUMMED), MOST_PARTS)
    else:
        wanted = multiprocessors * CHANNELS_FIRST_MAP
        shares = min(math.ceil(wanted / C), math.ceil(N * L / LEAST_MAPPED), MOST_GRID_Y)
    packs_each = math.ceil(packs / shares)
    shares = math.ceil(packs / packs_each)
    team = team_of(packs_each, width * itemsize, STREAMED_PACKS, THREADS)
    threads = max(team, LEAST_THREADS)
    grid = over_channels(math.ceil(C * team / threads), shares)
    return Geometry(grid, ChannelsFirst(N, C, L, packs_each), shares, threads, team=team)


def channels_first_resident(
    N: int, C: int, L: int, itemsize: int, width: int, arrays: int, device: Device
) -> Geometry | None:
    """Geometry of a kernel on chip: a team or a cluster keeps a channel. None where channels are to be streamed.

    Parameters
    ----------
    arrays : int
        Number of arrays that are kept: 1 forward (x), 2 backward (dy and x).
    """
    cluster = choose_cluster(C, N * L // width, width * itemsize, arrays, device, CHANNELS_FIRST_OWN)
    if cluster is None or C * cluster.blocks > MOST_GRID_X:
        return None
    # Bytes that the teams of a block may keep together if another block is to have room beside it. A block that keeps
    # more is alone on its multiprocessor, and may use the registers of two.
    most = device.shared_per_multiprocessor // BLOCKS_PER_MULTIPROCESSOR - CUDA_OWN - CHANNELS_FIRST_OWN
    largest = TEAMS[-1] if cluster.shared > most else THREADS
    team = team_of(cluster.packs, width * itemsize, ON_CHIP_PACKS // arrays, largest)
    # Small teams share a block. Where their channels would not fit together, fewer and larger teams do.
    while team < LEAST_THREADS and cluster.shared * (LEAST_THREADS // team) > most:
        team *= 2
    threads = max(team, LEAST_THREADS)
    if cluster.blocks > 1:  # which keep one channel: each block is a single team
        team = threads
    teams = threads // team
    return Geometry(
        grid=(math.ceil(C / teams) * cluster.blocks,),
        sizes=ChannelsFirst(N, C, L, cluster.packs),
        threads=threads,
        cluster=cluster.blocks,
        shared=cluster.shared * teams,
        team=team,
    )


def tile_of(row_bytes: int, pack_bytes: int, tile_bytes: int) -> int:
    """Columns of a tile of `tile_bytes`: a power of two, at most a warp's threads and what it takes to cover a row."""
    columns = row_bytes // pack_bytes
    return min(tile_bytes // pack_bytes, 1 << (columns - 1).bit_length(), MOST_COLUMNS)


def channels_last(M: int, C: int, itemsize: int, width: int, arrays: int, multiprocessors: int | None) -> Geometry:
    """Geometry of a streamed kernel: block (t, s) takes tile t of the columns and share s of the rows.

    ``channels_last/columns.cuh`` has a drawing of which columns and rows each thread takes.

    Parameters
    ----------
    arrays : int
        Number of arrays that the sum reads: 1 forward (x), 2 backward (dy and x).
    multiprocessors : int or None
        None for a kernel that sums, which must not depend on the device. For an elementwise step, the shares of the sum
        before it are worked out as well: each block has to merge as many parts.
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
        wanted = max(1, multiprocessors * CHANNELS_LAST_MAP // tiles)  # rounded down: all blocks run at the same time
        shares = min(wanted, math.ceil(M / least), MOST_GRID_Y)
    rows = math.ceil(M / shares)
    shares = math.ceil(M / rows)
    return Geometry((tiles, shares), ChannelsLast(M, C, tile, rows), shares)


def channels_last_resident(M: int, C: int, itemsize: int, width: int, arrays: int, device: Device) -> Geometry | None:
    """Geometry of a kernel on chip: block t keeps tile t. None where tiles are too large, and are to be streamed.

    Of the widths of which a tile fits, this is the widest one that gives every multiprocessor a block, as wide tiles
    read memory in larger pieces; if none does, the narrowest.

    Parameters
    ----------
    arrays : int
        Number of arrays that are kept: 1 forward (x), 2 backward (dy and x).
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
