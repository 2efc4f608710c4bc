"""What is kept on chip, on many devices: what fits, and keeps the device busy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupybn._steps import geometry
from cupybn._steps.resident import BLOCKS, SOON, Device, choose_cluster

KiB = 1 << 10
H200 = Device(132, 227 * KiB, 228 * KiB, clusters=True)
A100 = Device(108, 163 * KiB, 164 * KiB, clusters=False)
RTX_4090 = Device(128, 99 * KiB, 100 * KiB, clusters=False)
T4 = Device(40, 64 * KiB, 64 * KiB, clusters=False)

devices = st.builds(
    lambda multiprocessors, shared, clusters: Device(multiprocessors, shared * KiB, (shared + 1) * KiB, clusters),
    st.integers(1, 200),
    st.sampled_from([48, 64, 99, 163, 227]),
    st.booleans(),
)
sizes = st.integers(1, 300) | st.integers(1, 10**6)


@given(sizes, sizes, st.sampled_from([2, 8, 16]), st.sampled_from([1, 2]), devices)
def test_a_cluster_holds_its_channel(groups, packs, pack_bytes, arrays, device):
    cluster = choose_cluster(groups, packs, pack_bytes, arrays, device)
    if cluster is None:
        blocks = BLOCKS[-1] if device.clusters else BLOCKS[0]
        share = math.ceil(packs / blocks) * pack_bytes * arrays
        assert share > min(SOON, device.shared_per_block)
        return
    assert cluster.blocks in (BLOCKS if device.clusters else BLOCKS[:1])
    assert cluster.packs * cluster.blocks >= packs > cluster.packs * (cluster.blocks - 1) - cluster.blocks
    assert cluster.shared == cluster.packs * pack_bytes * arrays <= device.shared_per_block


packs = st.sampled_from([(2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)])
"""Bytes of an element, and elements of a pack."""


@given(sizes, sizes, sizes, packs, st.sampled_from([1, 2]), devices)
def test_channels_first(N, C, rows, pack, arrays, device):
    """Each channel has a team or a cluster, and the teams of a block fit beside each other."""
    itemsize, width = pack
    laid = geometry.channels_first_resident(N, C, rows * width, itemsize, width, arrays, device)
    if laid is None:
        return
    s = laid.sizes
    assert s == geometry.ChannelsFirst(N=N, C=C, L=rows * width, packs=s.packs)
    assert s.packs * laid.cluster >= N * rows
    assert laid.team in geometry.TEAMS
    assert laid.threads == max(laid.team, geometry.LEAST_THREADS)
    teams = laid.threads // laid.team
    assert teams == 1 or laid.cluster == 1
    blocks = laid.grid[0] // laid.cluster
    assert (blocks - 1) * teams < C <= blocks * teams
    assert laid.grid == (blocks * laid.cluster,)
    of_team = s.packs * width * itemsize * arrays
    assert laid.shared == of_team * teams
    assert laid.shared + 1 * KiB <= device.shared_per_block  # the kernel's own variables among it
    assert teams == 1 or laid.shared + 2 * KiB <= device.shared_per_multiprocessor // 2  # another block has room


@given(sizes, sizes, packs, st.sampled_from([1, 2]), devices)
def test_channels_last(M, columns, pack, arrays, device):
    itemsize, width = pack
    C = columns * width
    laid = geometry.channels_last_resident(M, C, itemsize, width, arrays, device)
    if laid is None:
        return
    s = laid.sizes
    assert s == geometry.ChannelsLast(M=M, C=C, tile=s.tile, rows=M)
    assert s.tile.bit_count() == 1  # a power of two
    assert s.tile <= geometry.MOST_COLUMNS
    assert s.tile * width * itemsize <= max(geometry.ON_CHIP_TILE)
    (tiles,) = laid.grid
    assert (tiles - 1) * s.tile < columns <= tiles * s.tile
    assert (laid.threads, laid.team, laid.cluster) == (geometry.THREADS, 0, 1)
    assert laid.shared == M * s.tile * width * itemsize * arrays <= SOON
    assert laid.shared + 16 * KiB <= device.shared_per_block  # the kernel's own variables among it


def test_small_channels_share_a_block_as_far_as_they_fit():
    """The teams of a block leave room for another block. On a GPU with less memory a block has one larger team."""

    def chosen(packs, device, arrays=1):
        laid = geometry.channels_first_resident(1, 1001, packs * 4, 4, 4, arrays, device)
        return laid.team, laid.threads, laid.grid[0], laid.shared // KiB

    assert chosen(64, T4) == chosen(64, H200) == (32, 128, 251, 4)
    assert chosen(1024, H200) == (32, 128, 251, 64)
    assert chosen(2048, H200) == (64, 128, 501, 64)
    assert chosen(1024, T4) == (128, 128, 1001, 16)  # of two teams 32, where two blocks have 62
    assert chosen(960, T4) == (64, 128, 501, 30)
    assert chosen(2048, T4) == (128, 128, 1001, 32)
    assert chosen(1024, H200, 2) == (64, 128, 501, 64)


RESNET50 = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
]
RESNET50 += [(512, 7), (2048, 7)]


def kept(batch, itemsize, arrays, device):
    """The layers of ResNet-50 that stay on chip, channels first."""
    return [
        (C, side)
        for C, side in RESNET50
        if geometry.channels_first_resident(batch, C, side * side, itemsize, 16 // itemsize, arrays, device)
    ]


def test_resnet50():
    assert kept(32, 2, 1, H200) == kept(32, 2, 2, H200) == kept(32, 4, 1, H200) == RESNET50
    assert kept(32, 4, 2, H200) == RESNET50[1:]
    assert kept(64, 2, 1, H200) == RESNET50
    assert kept(64, 2, 2, H200) == RESNET50[1:]
    assert kept(32, 2, 1, A100) == [layer for layer in RESNET50 if layer[1] <= 28]
    assert kept(32, 2, 1, T4) == [layer for layer in RESNET50 if layer[1] <= 28]
    assert kept(32, 4, 2, RTX_4090) == [layer for layer in RESNET50 if layer[1] <= 14]


@pytest.mark.parametrize("device", [H200, A100, RTX_4090, T4], ids=["H200", "A100", "RTX 4090", "T4"])
def test_small_arrays_take_one_launch(device):
    for N, C, L in (8, 16, 14 * 14), (4, 3, 64), (2, 1, 1000), (128, 512, 1), (64, 10, 1), (256, 100, 1):
        for arrays in 1, 2:
            if L == 1:
                assert geometry.channels_last_resident(N, C, 4, 1 if C % 4 else 4, arrays, device)
            else:
                assert geometry.channels_first_resident(N, C, L, 4, 4, arrays, device)


def test_a_few_large_channels_are_streamed():
    """A few blocks for large channels would leave most of the device idle."""
    assert choose_cluster(3, 60_000, 16, 1, H200) is None
    assert choose_cluster(3, 6_000, 16, 1, H200) is not None  # but it would be done before a second launch began
    assert choose_cluster(64, 60_000, 16, 1, H200).blocks == 8


def test_blocks_are_no_more_than_keep_the_device_busy():
    assert [choose_cluster(C, 10_000, 16, 1, H200).blocks for C in (2000, 264, 263, 132, 131, 66)] == [2, 2, 2, 2, 4, 4]
    assert [choose_cluster(C, 4_000, 16, 1, H200).blocks for C in (2000, 264, 263, 132, 131, 66)] == [1, 1, 2, 2, 4, 4]


def test_two_blocks_fit_a_multiprocessor_if_they_can():
    """CUDA takes 1 KiB for each block: of 228 KiB there are 113 for a block, and what needs more is split."""
    most = 113 * KiB // 16
    assert [choose_cluster(1000, packs, 16, 1, H200).blocks for packs in (most, most + 1)] == [1, 2]
    own = 5 * KiB
    fits = (113 * KiB - own) // 16
    assert [choose_cluster(1000, packs, 16, 1, H200, own).blocks for packs in (fits, fits + 1)] == [1, 2]
    alone = H200.shared_per_block // 16  # without clusters: one block, if that fits
    device = H200._replace(clusters=False)
    assert choose_cluster(1000, alone, 16, 1, device).blocks == 1
    assert choose_cluster(1000, alone + 1, 16, 1, device) is None


@pytest.mark.parametrize("arrays", [1, 2])
@pytest.mark.parametrize(("itemsize", "width"), [(2, 8), (4, 2), (2, 2), (4, 1), (2, 1)])
def test_few_packs_take_few_threads(itemsize, width, arrays):
    """A thread keeps 32 of all arrays, or 64 narrow ones, unless the largest block has more to do."""
    each = (32 if itemsize * width >= 8 else 64) // arrays
    device = Device(132, 999 * KiB, 1000 * KiB, clusters=False)
    teams = [team for team in geometry.TEAMS if team <= geometry.THREADS]
    for team, larger in zip(teams, (*teams[1:], teams[-1]), strict=True):
        for packs, expected in (team * each, team), (team * each + 1, larger):
            laid = geometry.channels_first_resident(1, 1000, packs * width, itemsize, width, arrays, device)
            assert (laid.team, laid.threads) == (expected, max(expected, 128))


def test_the_largest_blocks_are_alone_on_a_multiprocessor():
    """Registers are not to keep a second block away that shared memory has room for."""

    def threads(nbytes, arrays=1):
        return geometry.channels_first_resident(1, 1000, nbytes // 2, 2, 1, arrays, A100).threads

    room = (164 // 2 - 1 - 1) * KiB  # of two blocks, but for what CUDA and the kernel take of it
    assert [threads(nbytes) for nbytes in (room, room + 2)] == [256, 512]
    assert [threads(nbytes // 2, 2) for nbytes in (room, room + 4)] == [256, 512]


def test_small_blocks_are_not_split_further():
    """Blocks of 16 KiB stay whole, though they leave most of a large GPU empty."""
    packs = 16 * KiB // 16
    assert [choose_cluster(10, n, 16, 1, H200).blocks for n in (packs, packs + 1, 4 * packs + 1)] == [1, 2, 8]


def test_how_much_a_few_blocks_may_have():
    """Blocks of 48 KiB are done before two launches would be; with more, most of the GPU would wait for them."""
    packs = 8 * 48 * KiB // 16
    assert choose_cluster(5, packs, 16, 1, H200).shared == 48 * KiB
    assert choose_cluster(5, packs + 1, 16, 1, H200) is None
    assert choose_cluster(6, packs + 1, 16, 1, H200).blocks == 8  # 48 of 132 multiprocessors have work


def test_the_widest_tile_that_keeps_the_device_busy():
    """Tiles have four packs, or two where there would be fewer blocks than multiprocessors; and no more than a row."""
    tiles = {C: geometry.channels_last_resident(100, C, 2, 8, 1, H200).sizes.tile for C in (8192, 4096, 2048)}
    assert tiles == {8192: 4, 4096: 2, 2048: 2}
    small = H200._replace(multiprocessors=1)
    tiles = [geometry.channels_last_resident(100, C, 2, 8, 1, small).sizes.tile for C in (8, 16, 24, 32, 40)]
    assert tiles == [1, 2, 4, 4, 4]
