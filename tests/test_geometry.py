"""How launches are laid over arrays: every element once, sums by the shape alone, large grids on large devices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupybn._geometry import (
    CHANNELS_FIRST_SUM,
    CHANNELS_LAST_SUM,
    MOST_GRID_Y,
    MOST_LANES,
    THREADS,
    channels_first,
    channels_last,
)
from cupybn._kernels import KERNELS

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
