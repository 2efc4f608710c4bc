"""How blocks are laid over arrays by the norms for channels last: on chip and streamed, without kernels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cupybn._steps import sample_geometry
from cupybn._steps.geometry import MOST_COLUMNS, PACK, WARP
from cupybn._steps.resident import Device
from cupybn._steps.sample_geometry import OWN, THREADS, Form, after_sums, is_wide, only_sums, spans_of, whole

DEVICES = {
    "H200": Device(132, 232448, 233472, True),
    "A100": Device(108, 166912, 167936, False),
    "T4": Device(40, 65536, 65536, False),
}
CHANNELS = [
    (1, 1),
    (3, 1),
    (24, 3),
    (320, 10),
    (512, 16),
    (264, 33),
    (8008, 1001),
    (2560, 80),
    (1024, 1024),
    (256, 256),
]
"""Channels, and those of a group."""


def arrays():
    for (C, group), (N, A) in itertools.product(CHANNELS, [(1, 2), (2, 4096), (1, 1 << 18), (70_000, 3)]):
        for itemsize in 2, 4, 8:
            width = math.gcd(C * itemsize, PACK) // itemsize
            yield Form(N, A, C, group, itemsize, width)
            if is_wide(group, width, itemsize):
                yield Form(N, A, C, group, itemsize, max(1, width // 2))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_blocks_take_whole_groups_and_all_positions(device):
    for of in arrays():
        sums = only_sums(of)
        streamed = sums, after_sums(of, sums.parts, device)
        for kept in whole(of, 1, device), whole(of, 2, device), *streamed:
            if kept is None:
                continue
            sizes, (x, y, z) = kept.sizes, kept.grid
            assert sizes[:4] == of[:4]
            assert sizes.span % of.group == sizes.span % of.width == 0
            columns = sizes.tile
            assert columns & (columns - 1) == 0
            assert columns <= MOST_COLUMNS <= WARP
            assert columns * of.width * of.itemsize <= sample_geometry.MOST_TILE
            assert sizes.span <= columns * of.width or is_wide(of.group, of.width, of.itemsize)
            assert kept.threads in THREADS
            assert min(sizes.span, columns * of.width) <= kept.threads
            spans = math.ceil(of.C / sizes.span)
            assert of.N * spans * kept.cluster <= x * z < of.N * spans * kept.cluster + x
            shares = kept.cluster * y
            assert shares * sizes.rows >= of.A
            assert (y - 1) * sizes.rows < of.A
            assert kept.parts == shares


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("arrays_kept", [1, 2])
def test_what_is_kept_fits(device, arrays_kept):
    found = set()
    for of in arrays():
        kept = whole(of, arrays_kept, device)
        found.add(kept is None)
        if kept is not None:
            tiles = math.ceil(kept.sizes.span / (kept.sizes.tile * of.width))
            packs = tiles * kept.sizes.tile * kept.sizes.rows * arrays_kept
            assert kept.shared == packs * of.width * of.itemsize <= device.shared_per_block - OWN
            assert kept.cluster == 1 or device.clusters
    assert found == {True, False}


def test_spans_are_sectors_of_small_groups():
    """A tile of instance norm has many groups: what memory hands out at a time, or more."""
    for itemsize, width in (2, 8), (4, 4), (2, 4):
        for span in spans_of(Form(8, 4096, 64, 1, itemsize, width)):
            assert span.channels * itemsize in sample_geometry.SPANS


def test_sums_do_not_depend_on_the_device_and_long_rows_keep_it_busy():
    long = Form(1, 1 << 20, 32, 1, 2, 8)
    sums = only_sums(long)
    assert sums.parts == sums.grid[1] == 256
    for device in DEVICES.values():
        assert whole(long, 1, device) is None
        rest = after_sums(long, sums.parts, device)
        assert np.prod(rest.grid) == pytest.approx(2 * device.multiprocessors, rel=0.05)
