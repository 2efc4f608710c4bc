"""The choice between on chip (resident) and streamed: whether blocks keep a channel in shared memory, and how many do.

A kernel on chip reads a channel once, into the shared memory of one block or of a cluster of blocks. Streamed kernels
read it twice from memory: first for its statistics, then to use them. On chip the forward pass in training moves 2
passes over the tensor instead of 3, and the backward pass 3 instead of 5.

`choose_cluster` makes the choice for channels first::

    for 1, 2, 4 or 8 blocks per channel: how large is the share of a block?
      |
      |-- some shares fit twice into a multiprocessor (SM): go on with these
      |-- else some fit once:                               go on with these
      '-- none fits:                                        streamed
      |
    the fewest blocks that keep the GPU busy or have small shares; if there are none, the most blocks
      |
      |-- few multiprocessors would have work, and much:    streamed
      '-- else:                                             on chip, with this cluster

For channels last, where a block keeps a tile of channels, `geometry.channels_last_resident` makes it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

BLOCKS = (1, 2, 4, 8)
"""Sizes of a cluster, in blocks, that every GPU with clusters can run. Other GPUs have the first one only."""
CUDA_OWN = 1 << 10
"""Bytes of shared memory that CUDA takes for itself for each block on a multiprocessor."""
BLOCKS_PER_MULTIPROCESSOR = 2
"""Blocks that keep a multiprocessor busy: one loads while the other one stores."""
SMALL = 16 << 10
"""Bytes kept by a block that is not worth splitting even where most of the GPU is idle: it would save no time."""
LEAST = 3
"""Multiprocessors (SMs) of which at least one is to have work: with fewer, stream. One that works alone reaches about
three times its share of the bandwidth, and so makes up for two that are idle."""
SOON = 48 << 10
"""Bytes kept by a block that is done before streaming would begin its second launch. Such blocks stay on chip, however
few there are."""


class Device(NamedTuple):
    """Properties of a GPU that the choice depends on; shared memory in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    clusters: bool


class Cluster(NamedTuple):
    """A cluster of blocks that keep one channel together."""

    blocks: int
    packs: int  # packs of each array that one block keeps
    shared: int  # bytes of shared memory that one block keeps them in


def choose_cluster(
    channels: int, packs: int, pack_bytes: int, arrays: int, device: Device, own: int = 0
) -> Cluster | None:
    """Cluster that keeps a channel on chip, or None if channels had better be streamed.

    Parameters
    ----------
    channels : int
        Number of channels, each of which gets a cluster of its own.
    packs, pack_bytes : int
        Packs in one channel of an array, and bytes of a pack.
    arrays : int
        Number of arrays that are kept on chip: 1 forward (x), 2 backward (dy and x).
    own : int
        Bytes of shared memory that a block needs for the kernel's own variables.
    """
    sizes = BLOCKS if device.clusters else BLOCKS[:1]
    clusters = [Cluster(b, n := math.ceil(packs / b), n * pack_bytes * arrays) for b in sizes]
    for most in device.shared_per_multiprocessor // BLOCKS_PER_MULTIPROCESSOR - CUDA_OWN, device.shared_per_block:
        fitting = [cluster for cluster in clusters if cluster.shared + own <= most]
        if fitting:
            break
    else:
        return None
    busy = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
    best = next((c for c in fitting if channels * c.blocks >= busy or c.shared <= SMALL), fitting[-1])
    if channels * best.blocks * LEAST < device.multiprocessors and best.shared > SOON:
        return None  # most of the GPU would be idle for longer than a launch takes
    return best
