"""The launches of the norms' kernels for channels last: arrays (N, A, C), whose groups of channels are rows in each
sample.

A block, or a cluster of blocks, takes a *span* of one sample: neighbouring channels, whole groups of them and whole
packs. It has at least a sector of memory of each position, where the array has it: many groups, where they are small.
A span that is wider than a tile may be is gone through tile by tile. The blocks of a cluster share the positions.

On chip a span is read once. Spans that do not fit, or are so few that most of the GPU would be idle, are streamed, in
two launches: positions are then shared among as many blocks as the GPU has room for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupybn._steps.geometry import (
    CHANNELS_LAST_SUM,
    LEAST_MAPPED,
    LEAST_SUMMED,
    MOST_COLUMNS,
    MOST_GRID_Y,
    ROWS_PER_PART,
    Geometry,
    over_channels,
    team_of,
)
from cupybn._steps.resident import BLOCKS, BLOCKS_PER_MULTIPROCESSOR, CUDA_OWN, LEAST, SMALL, SOON, Device

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


class Span(NamedTuple):
    """What a block takes of the channels."""

    channels: int
    columns: int  # columns of a tile
    spans: int  # spans of a sample
    nbytes: int  # bytes of a position in whole tiles, with columns that are not there


class Form(NamedTuple):
    """Arrays of one form, and the norm of them."""

    N: int
    A: int
    C: int
    group: int  # channels of a group
    itemsize: int
    width: int  # elements of a pack


def is_wide(group: int, width: int, itemsize: int) -> bool:
    """Whether groups of so many channels take several tiles: the least number of them that has whole packs."""
    return math.lcm(group, width) // width > most_columns(width * itemsize)


def most_columns(pack_bytes: int) -> int:
    """Columns of a tile at most: a power of two."""
    return min(MOST_TILE // pack_bytes, MOST_COLUMNS)


def spans_of(of: Form) -> list[Span]:
    """Spans that a block may take, widest first."""
    pack, unit = of.width * of.itemsize, math.lcm(of.group, of.width)
    packs, most = unit // of.width, most_columns(pack)
    if is_wide(of.group, of.width, of.itemsize):
        columns = (most, most // 2) if most * pack > LEAST_TILE else (most,)
        found = [(unit, min(columns, key=lambda n: (math.ceil(packs / n) * n, -n)))]
    else:
        widths = [min(max(1, min(nbytes // pack, MOST_COLUMNS) // packs) * unit, of.C) for nbytes in SPANS]
        found = [(channels, 1 << (channels // of.width - 1).bit_length()) for channels in dict.fromkeys(widths)]
    return [Span(c, n, math.ceil(of.C / c), math.ceil(c / (n * of.width)) * n * pack) for c, n in found]


def whole(of: Form, arrays: int, device: Device) -> Geometry | None:
    """Geometry of a kernel on chip: a block or a cluster keeps a span. None where spans are to be streamed.

    Of the wide spans and the narrow ones, in clusters of few blocks and of many, these are the first that keep the GPU
    busy or have small shares; if there are none, those with the most blocks.

    Parameters
    ----------
    arrays : int
        Number of arrays that are kept: 1 forward (x), 2 backward (dy and x).
    """
    choices = [
        (of.N * span.spans * blocks, math.ceil(of.A / blocks) * span.nbytes * arrays, blocks, span)
        for span in spans_of(of)
        for blocks in (BLOCKS if device.clusters else BLOCKS[:1])
    ]
    twice = device.shared_per_multiprocessor // BLOCKS_PER_MULTIPROCESSOR - CUDA_OWN
    for most in twice, device.shared_per_block:
        fitting = [choice for choice in choices if choice[1] + OWN <= most]
        if fitting:
            break
    else:
        return None
    busy = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
    best = next((c for c in fitting if c[0] >= busy or c[1] <= SMALL), None) or max(fitting, key=lambda c: c[0])
    number, shared, blocks, span = best
    if number * LEAST < device.multiprocessors and shared > SOON:
        return None  # most of the GPU would be idle for longer than a launch takes
    return _geometry(of, span, math.ceil(of.A / blocks), blocks, blocks, shared)


def only_sums(of: Form) -> Geometry:
    """Geometry of the first one of two launches, cut by shape and width alone: in how many parts it leaves its sums."""
    span = spans_of(of)[0]
    most = math.ceil(of.A * span.columns * of.width / LEAST_SUMMED)
    shares = min(math.ceil(CHANNELS_LAST_SUM / (of.N * span.spans)), most)
    return _streamed(of, span, shares)


def after_sums(of: Form, parts: int, device: Device) -> Geometry:
    """Geometry of the second one of two launches, whose blocks add up so many parts for the channels of a span."""
    span = spans_of(of)[0]
    least = max(math.ceil(LEAST_MAPPED / (span.columns * of.width)), parts * ROWS_PER_PART)
    wanted = max(1, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR // (of.N * span.spans))
    return _streamed(of, span, min(wanted, math.ceil(of.A / least), MOST_GRID_Y))


def _streamed(of: Form, span: Span, shares: int) -> Geometry:
    """Geometry of a streamed kernel, whose positions are cut into so many shares, or fewer of the same size."""
    rows = math.ceil(of.A / shares)
    return _geometry(of, span, rows, 1, math.ceil(of.A / rows), 0)


def _geometry(of: Form, span: Span, rows: int, cluster: int, parts: int, shared: int) -> Geometry:
    """Geometry whose blocks take so many positions of a span."""
    threads = team_of(rows * span.columns, of.width * of.itemsize, PACKS, THREADS[-1])
    return Geometry(
        grid=over_channels(of.N * span.spans * cluster, 1 if cluster > 1 else parts),
        sizes=Samples(of.N, of.A, of.C, of.group, span.channels, span.columns, rows),
        parts=parts,
        threads=max(threads, THREADS[0]),
        cluster=cluster,
        shared=shared,
    )
