"""The launches of the norms' kernels for channels last: arrays (N, A, C), whose groups of channels are rows in each
sample.

A block, or a cluster of blocks, takes a *span* of one sample: neighbouring channels, whole groups of them and whole
packs. It has at least a sector of memory of each position, where the array has it: many groups, where they are small.
A span that is wider than a tile may be is gone through tile by tile. The blocks of a cluster share the positions.

On chip a span is read once, and streamed twice, by the same kernel. So streaming gives no block more to do, and a span
that fits on chip is kept there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from cupybn._steps.geometry import MOST_COLUMNS, MOST_GRID_Y, Geometry, team_of
from cupybn._steps.resident import BLOCKS, BLOCKS_PER_MULTIPROCESSOR, CUDA_OWN, SMALL, Device

SPANS = 64, 32
"""Bytes of a row that a span covers where groups are no wider, the better choice first."""
MOST_TILE = 128
"""Bytes of a row that a tile covers at most."""
LEAST_TILE = 64
"""Bytes of a row that the tiles of a wide span cover at least."""
THREADS = (64, 128, 256)
"""Threads that a block may have."""
PACKS = 16
"""Packs of a tile per thread up to which a block has fewer threads."""
OWN = 20 << 10
"""Bytes of shared memory that a kernel needs per block for its own variables, beside the arrays."""


class Samples(NamedTuple):
    """Sizes that the kernels are told: the array is (N, A, C)."""

    N: int
    A: int
    C: int
    group: int  # channels of a group
    span: int  # channels that a block takes
    tile: int  # columns of a tile
    rows: int  # positions of a sample that a block takes


class Share(NamedTuple):
    """What a block takes: a span, of which a cluster of so many blocks share the positions."""

    span: int
    columns: int  # of a tile
    cluster: int
    rows: int
    spans: int  # blocks or clusters for a sample
    nbytes: int  # of one array; of whole tiles, with columns that are not there


def is_wide(group: int, width: int, itemsize: int) -> bool:
    """Whether groups of so many channels take several tiles: the least number of them that has whole packs."""
    return math.lcm(group, width) // width > most_columns(width * itemsize)


def most_columns(pack_bytes: int) -> int:
    """Columns of a tile at most: a power of two."""
    return min(MOST_TILE // pack_bytes, MOST_COLUMNS)


def spans(C: int, group: int, itemsize: int, width: int) -> list[tuple[int, int]]:
    """Spans that a block may take, widest first, each in channels and with the columns of its tiles."""
    pack, unit = width * itemsize, math.lcm(group, width)
    packs, most = unit // width, most_columns(pack)
    if is_wide(group, width, itemsize):
        columns = (most, most // 2) if most * pack > LEAST_TILE else (most,)
        return [(unit, min(columns, key=lambda n: (math.ceil(packs / n) * n, -n)))]
    found: list[tuple[int, int]] = []
    for nbytes in SPANS:
        span = min(max(1, min(nbytes // pack, MOST_COLUMNS) // packs) * unit, C)
        if not found or found[-1][0] != span:
            found.append((span, 1 << (span // width - 1).bit_length()))
    return found


def shares(A: int, C: int, group: int, itemsize: int, width: int, device: Device) -> Iterator[Share]:
    """What a block may take, the best choice first if there were blocks enough."""
    for span, columns in spans(C, group, itemsize, width):
        row = math.ceil(span / (columns * width)) * columns * width * itemsize
        for blocks in BLOCKS if device.clusters else BLOCKS[:1]:
            rows = math.ceil(A / blocks)
            yield Share(span, columns, blocks, rows, math.ceil(C / span), rows * row)


def samples(N: int, A: int, C: int, groups: int, itemsize: int, width: int, arrays: int, device: Device) -> Geometry:
    """Geometry of a norm's kernel: clusters (s, n) take span s of sample n, on chip where they have shared memory.

    Parameters
    ----------
    arrays : int
        Number of arrays that are kept on chip: 1 forward (x), 2 backward (dy and x).
    """
    found = list(shares(A, C, C // groups, itemsize, width, device))
    twice = device.shared_per_multiprocessor // BLOCKS_PER_MULTIPROCESSOR - CUDA_OWN
    limits = [most - OWN for most in (twice, device.shared_per_block)]
    fitting = next(filter(None, ([s for s in found if s.nbytes * arrays <= most] for most in limits)), [])
    wanted = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    def blocks(share: Share) -> int:
        return N * share.spans * share.cluster

    if fitting:
        enough = (s for s in fitting if blocks(s) >= wanted or s.nbytes * arrays <= SMALL)
    else:
        enough = (s for s in found if blocks(s) >= wanted)
    best = next(enough, None) or max(fitting or found, key=blocks)
    threads = team_of(best.rows * best.columns, width * itemsize, PACKS, 256)
    return Geometry(
        grid=(best.spans * best.cluster, min(N, MOST_GRID_Y), math.ceil(N / MOST_GRID_Y)),
        sizes=Samples(N, A, C, C // groups, best.span, best.columns, best.rows),
        parts=N * best.cluster,
        threads=max(threads, THREADS[0]),
        cluster=best.cluster,
        shared=best.nbytes * arrays if fitting else 0,
    )
