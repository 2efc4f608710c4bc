"""How launches are laid over arrays: every element once, sums by the shape alone, large grids on large devices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupybn._steps import plans
from cupybn._steps.geometry import (
    CHANNELS_FIRST_SUM,
    CHANNELS_LAST_SUM,
    LEAST_MAPPED,
    LEAST_THREADS,
    MAPPED_TILE,
    MOST_COLUMNS,
    MOST_GRID_X,
    MOST_GRID_Y,
    MOST_PARTS,
    ON_CHIP_PACKS,
    ON_CHIP_TILE,
    PACK,
    ROWS_PER_PART,
    STREAMED_PACKS,
    SUMMED_TILE,
    TEAMS,
    THREADS,
    ChannelsFirst,
    ChannelsLast,
    channels_first,
    channels_first_resident,
    channels_last,
    channels_last_resident,
    over_channels,
    team_of,
)
from cupybn._steps.resident import Device
from cupybn._steps.sources import KERNELS

sizes = st.integers(1, 300) | st.integers(1, 10**6)
packs = st.sampled_from([(2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)])
"""Bytes of an element, and elements of a pack."""
devices = st.none() | st.integers(1, 200)


@given(sizes, sizes, sizes, packs, devices)
def test_channels_first(N, C, rows, pack, multiprocessors):
    """Every pack of every channel is in one share, and there is a team for each of both."""
    itemsize, width = pack
    L = rows * width
    (x, shares, z), s, parts, threads, cluster, shared, team = channels_first(N, C, L, itemsize, width, multiprocessors)
    assert s == ChannelsFirst(N=N, C=C, L=L, packs=s.packs)
    assert 1 <= parts == shares <= MOST_GRID_Y
    assert (shares - 1) * s.packs < N * rows <= shares * s.packs  # none is empty
    assert (cluster, shared, z) == (1, 0, 1)
    assert team in TEAMS
    assert threads == max(team, LEAST_THREADS) <= THREADS
    teams = threads // team
    assert (x - 1) * teams < C <= x * teams


@given(sizes, packs)
def test_teams_are_as_small_as_their_share_allows(count, pack):
    """Each thread takes twice as many of narrow packs. The largest team takes whatever is left."""
    pack_bytes = math.prod(pack)
    for each, most in (STREAMED_PACKS, THREADS), (ON_CHIP_PACKS, TEAMS[-1]), (ON_CHIP_PACKS // 2, TEAMS[-1]):
        team = team_of(count, pack_bytes, each, most)
        each *= 1 if pack_bytes >= 8 else 2
        assert TEAMS[0] <= team <= most
        assert team == most or count <= team * each
        assert team == TEAMS[0] or count > team // 2 * each


def test_small_channels_share_a_block():
    """Planes of 7 x 7 at batch 32 have 1568 single elements of float32, for 64 threads; a warp takes what is less."""
    assert [channels_first(32, 2048, 49, 4, 1, count)[3:] for count in (None, 132)] == [(128, 1, 0, 64)] * 2
    assert channels_first(32, 2048, 49, 4, 1, None).grid == (1024, 1, 1)
    assert channels_first(8, 2049, 49, 4, 1, None)[3:] == (128, 1, 0, 32)
    assert channels_first(8, 2049, 49, 4, 1, None).grid == (513, 1, 1)
    assert channels_first(8, 2049, 2**11, 4, 4, None)[3:] == (256, 1, 0, 256)


@given(sizes, sizes, packs, st.sampled_from([1, 2]), devices)
def test_channels_last(M, columns, pack, arrays, multiprocessors):
    """Every column is in one tile, and every row in one share."""
    itemsize, width = pack
    C = columns * width
    geometry = channels_last(M, C, itemsize, width, arrays, multiprocessors)
    (tiles, shares), s, parts, threads, cluster, shared, team = geometry
    assert s == ChannelsLast(M=M, C=C, tile=s.tile, rows=s.rows)
    assert (tiles - 1) * s.tile < columns <= tiles * s.tile
    assert s.tile.bit_count() == 1  # a power of two
    assert s.tile <= MOST_COLUMNS
    assert s.tile * width * itemsize <= max(MAPPED_TILE if multiprocessors else SUMMED_TILE[arrays])
    assert s.tile < 2 * columns
    assert (shares - 1) * s.rows < M <= shares * s.rows
    assert 1 <= parts == shares <= MOST_GRID_Y
    assert (threads, cluster, shared, team) == (THREADS, 1, 0, 0)


@given(sizes, sizes, packs, st.sampled_from([1, 2]), st.integers(1, 10**4))
def test_blocks_have_more_to_do_than_to_merge(M, columns, pack, arrays, multiprocessors):
    """Blocks of elementwise steps that share rows have many of them for each part that they merge first."""
    itemsize, width = pack
    C = columns * width
    (_, shares), s, *_ = channels_last(M, C, itemsize, width, arrays, multiprocessors)
    if shares > 1:
        parts = channels_last(M, C, itemsize, width, arrays, None).parts
        wanted = max(LEAST_MAPPED / (s.tile * width), ROWS_PER_PART * parts)
        assert s.rows >= wanted / 2  # two shares of little more than one


@given(sizes, sizes, sizes, packs, st.integers(1, 10**4))
def test_blocks_of_rows_have_enough_to_do(N, C, rows, pack, multiprocessors):
    itemsize, width = pack
    (_, shares, _), s, *_ = channels_first(N, C, rows * width, itemsize, width, multiprocessors)
    if shares > 1:
        assert s.packs * width >= LEAST_MAPPED / 2


def test_more_channels_than_a_grid_is_wide():
    x, y, z = channels_first(1, 2**33 + 5, 8, 2, 8, None).grid
    assert x <= 2**31 - 1
    assert x * z * 4 >= 2**33 + 5
    assert y == 1


@pytest.mark.parametrize("shape", [(32, 64, 112 * 112), (32, 2048, 52), (2, 32, 128**3), (1, 1, 10**8)])
def test_large_arrays_fill_a_large_device(shape):
    """Each scheduler of so many multiprocessors has at least two warps, of which some channels take a few."""
    N, C, L = shape
    for multiprocessors in None, 132:
        geometry = channels_first(N, C, L, 4, 4, multiprocessors)
        blocks, shares, _ = geometry.grid
        assert blocks * shares * geometry.threads >= 132 * 8 * 32
        assert blocks * shares >= min(256, N * C)
        width = math.gcd(C, 4)
        tiles, shares = channels_last(N * L, C, 4, width, 1, multiprocessors).grid
        assert tiles * shares >= 250 or N * L < 10**4


def test_small_arrays_are_not_split():
    assert channels_first(4, 3, 100, 4, 4, None).parts == 1
    assert channels_last(50, 64, 4, 4, 2, None).parts == 1


@given(sizes, sizes, sizes, packs)
def test_sums_have_few_parts(N, C, rows, pack):
    itemsize, width = pack
    most = min(math.ceil(CHANNELS_FIRST_SUM / C), MOST_PARTS)
    assert channels_first(N, C, rows * width, itemsize, width, None).parts <= most
    for arrays in 1, 2:
        assert channels_last(N, C * width, itemsize, width, arrays, None).parts <= CHANNELS_LAST_SUM


@pytest.mark.parametrize("tile", [*map(max, SUMMED_TILE.values()), max(MAPPED_TILE), max(ON_CHIP_TILE)])
def test_the_kernels_have_room_for_the_lanes(tile):
    text = (KERNELS / "channels_last/columns.cuh").read_text()
    assert "constexpr int MOST_LANES = 128 / sizeof(data_t);" in text
    assert tile <= 128


# ---------------------------------------------------------------------------------------------------------------------
# The width of packs


class At:
    """An array, as far as the choice of a pack looks at it."""

    def __init__(self, shape, dtype, address):
        self.shape, self.dtype, self.size = shape, np.dtype(dtype), math.prod(shape)
        self.data = self
        self.ptr = 1 << 20 | address


@given(sizes, st.integers(1, 100), sizes, st.sampled_from(["f2", "f4", "f8"]), st.lists(st.integers(0, 7), max_size=3))
def test_a_pack_is_of_one_row_and_aligned(N, C, L, dtype, offsets):
    """Packs of both layouts fit rows and addresses of all arrays; packs of twice the width would not."""
    dtype = np.dtype(dtype)
    arrays = [At((N, C, L), dtype, offset * dtype.itemsize) for offset in (0, *offsets)]
    nbytes = plans.width_of(*arrays) * dtype.itemsize
    row = (L if L > 1 else C) * dtype.itemsize

    def fits(nbytes):
        return nbytes <= PACK and row % nbytes == 0 and all(array.ptr % nbytes == 0 for array in arrays)

    assert fits(nbytes)
    assert not fits(2 * nbytes)
    assert plans.width_of(*arrays, None) == plans.width_of(*arrays)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 16), (2, 2), (4, 4), (6, 2), (8, 8), (10, 2), (12, 4), (14, 2), (16, 16)]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_odd_alignments_take_narrower_packs(offset, nbytes, which):
    """Any of the arrays may be the one that is not aligned."""
    for shape in (3, 5, 16), (9, 16, 1):
        arrays = [At(shape, np.float16, offset if i == which else 0) for i in range(3)]
        assert plans.width_of(*arrays) * 2 == nbytes


@pytest.mark.parametrize(("row", "width"), [(64, 8), (12, 4), (50, 2), (49, 1), (8, 8), (4, 4), (2, 2)])
def test_odd_rows_take_narrower_packs(row, width):
    for shape in (3, 5, row), (9, row, 1):
        assert plans.width_of(At(shape, np.float16, 0)) == width


# ---------------------------------------------------------------------------------------------------------------------
# At the limits of a grid

GRID = 2**31 - 1, 65535, 65535
"""The limits of CUDA itself."""
H200 = Device(132, 227 << 10, 228 << 10, clusters=True)
huge = st.integers(1, 2**20) | st.integers(2**20, 2**44)
counts = st.none() | st.integers(1, 200) | st.integers(10**4, 10**6)


channels = st.integers(1, 2**20) | st.integers(2**20, 2**35)  # of float16, 64 GiB for one value of each


@given(huge, channels, huge | st.just(1), packs, counts)
def test_every_grid_can_be_launched(N, C, L, pack, multiprocessors):
    """Grids stay within the limits, whatever the array, and the device that may come."""
    itemsize, width = pack
    device = H200._replace(multiprocessors=multiprocessors or 132)
    rows, whole = -(-L // width) * width, -(-C // width) * width
    for geometry in (
        channels_first(N, C, rows, itemsize, width, multiprocessors),
        channels_last(N, whole, itemsize, width, 1, multiprocessors),
        channels_first_resident(N, C, rows, itemsize, width, 1, device),
        channels_last_resident(N, whole, itemsize, width, 1, device),
    ):
        if geometry is not None:
            assert all(1 <= size <= most for size, most in zip(geometry.grid, GRID, strict=False))
            assert geometry.grid[0] % geometry.cluster == 0


def test_more_columns_of_packs_than_a_grid_is_wide():
    """A tile has several columns, also where packs are single elements."""
    for C, width in (2**32 - 1, 1), (2**33 + 1, 1), (2**34 + 4, 4), (2**35 + 8, 8):
        plan = plans.streamed_plan("bn_normalize", (1, C, 1), np.dtype(np.float16), width, 132)
        sizes = plan.geometry.sizes
        assert f"-DWIDTH={width}" in plan.kernel.options
        assert plan.geometry.grid[0] <= MOST_GRID_X
        assert plan.geometry.grid[0] * sizes.tile >= C // width


@pytest.mark.parametrize("M", [2**44, 2**44 + 5])
def test_as_many_shares_as_a_grid_has_room_for(M):
    (tiles, shares), sizes, *_ = channels_last(M, 2**10 - 1, 2, 1, 1, 10**8)
    assert 65000 < shares <= 65535
    assert (shares - 1) * sizes.rows < M <= shares * sizes.rows
    assert tiles * sizes.tile >= 2**10 - 1
    (blocks, shares, _), sizes, *_ = channels_first(M, 3, 5, 2, 1, 10**8)
    assert blocks == 3
    assert 65000 < shares <= 65535
    assert (shares - 1) * sizes.packs < 5 * M <= shares * sizes.packs


@pytest.mark.parametrize("C", [2**28, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 2**32 + 3, 65535 << 30])
def test_many_channels(C):
    x, shares, z = over_channels(C)
    assert (z - 1) * x < C <= x * z
    assert x <= MOST_GRID_X
    assert (shares, z) == (1, -(-C // 2**30))
    assert channels_first(2, C, 2**14, 2, 8, None).grid == (x, 1, z)  # a team that is a block
    small = channels_first(2, C, 8, 2, 8, 132)  # four teams in a block
    assert (small.team, small.threads) == (32, 128)
    assert small.grid == over_channels(-(-C // 4))
    for width in 1, 8:
        columns = -(-C // width)
        (tiles, shares), sizes, *_ = channels_last(19, columns * width, 2, width, 2, None)
        assert (tiles - 1) * sizes.tile < columns <= tiles * sizes.tile
        assert shares == 1


def test_clusters_fill_a_grid_and_no_more():
    """Clusters that are more than a grid has room for do not occur: channels are streamed."""
    for C, on_chip in (2**27, True), (2**27 + 1, False):
        geometry = channels_first_resident(1, C, 800_000, 2, 8, 1, H200)
        assert bool(geometry) == on_chip
        assert not on_chip or (geometry.cluster, geometry.grid) == (8, (2**30,))
    for tiles, on_chip in (2**30, True), (2**30 + 1, False):
        geometry = channels_last_resident(500, tiles * 32, 2, 8, 1, H200)
        assert bool(geometry) == on_chip
        assert not on_chip or (geometry.cluster, geometry.grid) == (1, (2**30,))
