"""How launches are laid over arrays: every element once, sums by the shape alone, large grids on large devices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupybn import cupy_ops
from cupybn._geometry import (
    CHANNELS_FIRST_SUM,
    CHANNELS_LAST_SUM,
    LEAST_MAPPED,
    MOST_GRID_X,
    MOST_GRID_Y,
    MOST_LANES,
    ROWS_PER_PART,
    THREADS,
    channels_first,
    channels_first_resident,
    channels_last,
    channels_last_resident,
    over_channels,
)
from cupybn._kernels import KERNELS
from cupybn._resident import Device

sizes = st.integers(1, 300) | st.integers(1, 10**6)
widths = st.sampled_from([1, 2, 4, 8])
devices = st.none() | st.integers(1, 200)


@given(sizes, sizes, sizes, widths, devices)
def test_channels_first(N, C, L, width, multiprocessors):
    (x, shares, z), s, parts = channels_first(N, C, L, width, multiprocessors)[:3]
    assert (x, z) == (C, 1)
    assert 1 <= parts == shares <= MOST_GRID_Y
    segments = N * (L // s["segment"])
    assert (shares - 1) * s["segments_per_block"] < segments <= shares * s["segments_per_block"]  # none is empty
    assert s["segment"] == L or s["segment"] % width == 0
    assert 1 <= s["lanes"] <= THREADS
    slots = max(slots_of(begin, s["segment"] + L % s["segment"], width) for begin in range(width))
    assert s["lanes"] == THREADS or s["lanes"] <= slots


def slots_of(begin, length, width):
    """The packs that a segment touches."""
    return (begin + length - 1) // width - begin // width + 1


@given(sizes, sizes, widths, devices)
def test_channels_last(M, C, width, multiprocessors):
    (tiles, shares), s, parts = channels_last(M, C, width, multiprocessors)[:3]
    replicas = s["columns"] * width // C
    assert s["columns"] * width == C * replicas  # the channels of the packs repeat after a super-row
    assert replicas <= width
    assert (tiles - 1) * s["tile"] < s["columns"] <= tiles * s["tile"]
    assert s["tile"] * width <= MOST_LANES
    tail = M % replicas > 0
    assert s["super_rows"] == M // replicas
    full = shares - tail
    assert (full - 1) * s["super_rows_per_block"] < s["super_rows"] <= full * s["super_rows_per_block"]
    assert parts == full * (1 if tiles == 1 else replicas) + tail
    assert 1 <= shares <= MOST_GRID_Y


@given(sizes, sizes, widths, st.integers(1, 10**4))
def test_blocks_have_more_to_do_than_to_merge(M, C, width, multiprocessors):
    """Where rows are shared out, elementwise steps have many of them for each part that they merge first."""
    (_, shares), s, _ = channels_last(M, C, width, multiprocessors)[:3]
    tail = M % (s["columns"] * width // C) > 0
    if shares - tail > 1:
        parts = channels_last(M, C, width, None).parts - tail
        wanted = max(LEAST_MAPPED / (s["tile"] * width), ROWS_PER_PART * parts)
        assert s["super_rows_per_block"] >= wanted / 2  # two shares of little more than one


@given(sizes, sizes, sizes, widths, st.integers(1, 10**4))
def test_blocks_of_rows_have_enough_to_do(N, C, L, width, multiprocessors):
    (_, shares, _), s, _ = channels_first(N, C, L, width, multiprocessors)[:3]
    if shares > 1:
        assert s["segments_per_block"] * (s["segment"] + L % s["segment"]) >= LEAST_MAPPED / 2


def test_more_channels_than_a_grid_is_wide():
    x, y, z = channels_first(1, 2**31 + 5, 2, 8, None).grid
    assert x <= 2**31 - 1
    assert x * z >= 2**31 + 5
    assert y == 1


@pytest.mark.parametrize("shape", [(32, 64, 112 * 112), (32, 2048, 49), (2, 32, 128**3), (1, 1, 10**8)])
def test_large_arrays_fill_a_large_device(shape):
    N, C, L = shape
    for multiprocessors in None, 132:
        channels, shares, _ = channels_first(N, C, L, 4, multiprocessors).grid
        assert channels * shares >= min(256, N * C)
        tiles, shares = channels_last(N * L, C, 4, multiprocessors).grid
        assert tiles * shares >= 250 or N * L < 10**4


def test_small_arrays_are_not_split():
    assert channels_first(4, 3, 100, 4, None).parts == 1
    assert channels_last(50, 64, 4, None).parts == 1


@given(sizes, sizes, sizes, widths)
def test_sums_have_few_parts(N, C, L, width):
    assert channels_first(N, C, L, width, None).parts <= min(math.ceil(CHANNELS_FIRST_SUM / C), THREADS)
    replicas = width // math.gcd(C, width)
    assert channels_last(N, C, width, None).parts <= (CHANNELS_LAST_SUM + 1) * replicas + 1


def test_the_kernels_have_room_for_the_lanes():
    assert f"constexpr int MOST_LANES = {MOST_LANES};" in (KERNELS / "channels_last/columns.cuh").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# At the limits of a grid

GRID = 2**31 - 1, 65535, 65535
"""What CUDA has."""
H200 = Device(132, 227 << 10, 228 << 10, clusters=True)
huge = st.integers(1, 2**20) | st.integers(2**20, 2**44)
counts = st.none() | st.integers(1, 200) | st.integers(10**4, 10**6)


channels = st.integers(1, 2**20) | st.integers(2**20, 2**35)  # of float16, 64 GiB for one value of each


@given(huge, channels, huge | st.just(1), st.sampled_from(["f2", "f4", "f8"]), st.booleans(), counts)
def test_every_grid_can_be_launched(N, C, L, dtype, vectorized, multiprocessors):
    """Whatever the array, and the device that may come."""
    dtype = np.dtype(dtype)
    width = 16 // dtype.itemsize if vectorized else 1
    device = H200._replace(multiprocessors=multiprocessors or 132)
    whole = -(-C // width) * width
    for geometry in (
        cupy_ops._plan("bn_stats", (N, C, L), dtype, vectorized, multiprocessors).geometry,
        channels_first_resident(N, C, L, dtype.itemsize, width, 1, device),
        channels_last_resident(N, whole, dtype.itemsize, width, 1, device),
    ):
        if geometry is not None:
            assert all(1 <= size <= most for size, most in zip(geometry.grid, GRID, strict=False))
            assert geometry.grid[0] % geometry.cluster == 0


def test_more_columns_of_packs_than_a_grid_is_wide():
    """Where C is odd, there are as many columns of packs as channels; of elements, a tile has more columns."""
    for C, vectorized in (2**32 - 1, True), (2**33 + 1, False), (2**33 + 8, True):
        plan = cupy_ops._plan("bn_normalize", (1, C, 1), np.dtype(np.float16), True, 132)
        sizes = plan.geometry.sizes
        assert f"-DVECTORIZED={int(vectorized)}" in plan.kernel.options
        assert sizes["columns"] == (C // 8 if C % 8 == 0 else C)
        assert plan.geometry.grid[0] * sizes["tile"] >= sizes["columns"]


@pytest.mark.parametrize("M", [2**44, 2**44 + 5])
def test_as_many_shares_as_a_grid_has_room_for(M):
    """And one more block for rows that fill no super-row."""
    (tiles, shares), sizes, _ = channels_last(M, 2**10 - 1, 8, 10**8)[:3]
    assert shares <= 65535
    assert shares - (M % 8 > 0) > 65000
    assert (shares - (M % 8 > 0)) * sizes["super_rows_per_block"] >= M // 8
    assert tiles * sizes["tile"] >= 2**10 - 1
    channels, shares, _ = channels_first(M, 3, 5, 8, 10**8).grid
    assert channels == 3
    assert 65000 < shares <= 65535


@pytest.mark.parametrize("C", [2**28, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 2**32 + 3, 65535 << 30])
def test_many_channels(C):
    x, shares, z = over_channels(C)
    assert (z - 1) * x < C <= x * z
    assert x <= MOST_GRID_X
    assert (shares, z) == (1, -(-C // 2**30))
    assert channels_first(2, C, 3, 8, 132).grid == (x, 1, z)
    for width in 1, 8:
        (tiles, shares), sizes, _ = channels_last(19, C, width, None)[:3]
        assert (tiles - 1) * sizes["tile"] < sizes["columns"] <= tiles * sizes["tile"]
        assert shares == 1 + (19 % (sizes["columns"] * width // C) > 0)


def test_clusters_fill_a_grid_and_no_more():
    """Beyond that channels are streamed."""
    for C, on_chip in (2**27, True), (2**27 + 1, False):
        geometry = channels_first_resident(1, C, 800_000, 2, 8, 1, H200)
        assert bool(geometry) == on_chip
        assert not on_chip or (geometry.cluster, geometry.grid) == (8, (2**30,))
    for tiles, on_chip in (2**27, True), (2**27 + 1, False):
        geometry = channels_last_resident(52_000, tiles * 16, 2, 8, 1, H200)
        assert bool(geometry) == on_chip
        assert not on_chip or (geometry.cluster, geometry.grid) == (8, (2**30,))
