"""The choice between kernels that keep a channel on chip and those that read it twice.

A channel (channels first) that fits into the shared memory of a block or of a cluster of blocks, or a tile of channels
(channels last) that fits into that of a block, is read once: training moves 2 passes over the tensor instead of 3, its
backward pass 3 instead of 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

BLOCKS = (1, 2, 4, 8)
"""Blocks of a cluster: as many as every GPU with clusters has. GPUs without run the first choice alone."""
CUDA = 1 << 10
"""Bytes of a multiprocessor's shared memory that CUDA takes for each block."""
ROUNDS = 2
"""Blocks for each multiprocessor that keep it busy: one loads while the other one stores."""
LEAST = 3
"""Multiprocessors of which at least one must have work: it can move about three times its share of the bandwidth."""
SMALL = 16 << 10
"""Bytes of a block that is small enough to leave a large GPU partly empty: further splitting would save no time."""
SOON = 48 << 10
"""Bytes of a block that is done before a second launch would begin, however few blocks there are."""


class Device(NamedTuple):
    """What the choice depends on; shared memory in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    clusters: bool


class Cluster(NamedTuple):
    """Blocks that keep one channel together."""

    blocks: int
    packs: int  # of each array in a block
    shared: int  # bytes in a block


def choose_cluster(
    channels: int, packs: int, pack_bytes: int, arrays: int, device: Device, own: int = 0
) -> Cluster | None:
    """The cluster for each of so many channels, or None if they had better be read twice.

    Parameters
    ----------
    channels : int
        Each has a cluster of its own.
    packs, pack_bytes : int
        How many packs of a channel each array has, and their size.
    arrays : int
        That are kept on chip: 1 forward, 2 backward.
    own : int
        Bytes of shared memory that the kernel needs for its own variables.
    """
    sizes = BLOCKS if device.clusters else BLOCKS[:1]
    clusters = [Cluster(b, n := math.ceil(packs / b), n * pack_bytes * arrays) for b in sizes]
    for most in device.shared_per_multiprocessor // ROUNDS - CUDA, device.shared_per_block:
        fitting = [cluster for cluster in clusters if cluster.shared + own <= most]
        if fitting:
            break
    else:
        return None
    full = device.multiprocessors * ROUNDS
    best = next((c for c in fitting if channels * c.blocks >= full or c.shared <= SMALL), fitting[-1])
    if channels * best.blocks * LEAST < device.multiprocessors and best.shared > SOON:
        return None  # most of the GPU would be idle
    return best
