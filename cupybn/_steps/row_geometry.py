"""The launches of the norms' kernels for channels first: how teams, squads and clusters are laid over rows.

A row is one group of one sample; ``kernels/channels_first/rows.cuh`` has a drawing. Where each element has a weight of
its own, as in layer and RMS norm, what a row is cut into depends on its length and dtype alone: neither on the number
of rows nor on what is in them. So the bits of a row do not either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupybn._steps.geometry import LEAST_THREADS, NARROW, PACK, WARP, Geometry
from cupybn._steps.resident import BLOCKS, BLOCKS_PER_MULTIPROCESSOR, CUDA_OWN, SMALL, Device

ROW_TEAMS = (4, 8, 16, WARP, 64, 128, 256, 512)
"""Threads that a team may have that takes a row."""
ROW_PACKS = 8
"""Packs per thread up to which the smaller team is used; twice as many narrow ones. What each thread does once for a
row takes as long as some packs: on an H200, rows in teams of threads with 2 packs each took twice as long."""
ROW_OWN = 1 << 10
"""Bytes of shared memory that a kernel needs per block for its own variables, beside the arrays and what it knows of
each row."""
KNOWN = 192
"""Bytes of shared memory for what a kernel knows of each row, and for its sums by each warp, at most."""
AT_ONCE = (2, 1)
"""Rows that a team of the backward pass may take at once where it adds up what several rows have at the same place:
with two there are half as many barriers, and half as many sums beside them in shared memory."""
MOST_TABLE = 8 << 10
"""Bytes of shared memory that the sums of runs by warps may take, in all teams of a block."""
MOST_ROWS = 128
"""Rows whose products are added in float32, one after the other, before the sum goes on in float64."""
MOST_BLOCKS = 16
"""Blocks that a multiprocessor has room for, on every GPU."""
MOST_THREADS = 1536
"""Threads that a multiprocessor has room for, on most GPUs."""


class Rows(NamedTuple):
    """Sizes that the kernels of the norms are told: the array is (N, C, L)."""

    N: int
    groups: int  # rows of a sample
    runs: int  # runs of a row
    L: int  # elements of a run
    squad: int  # threads of a squad, a power of two
    packs: int  # packs of a run that a squad takes, in a cluster of each run those of one block
    samples: int  # rows that a team takes, some at once: those of one group in neighbouring samples


class Norms(NamedTuple):
    """What rows there are, and what of them is kept on chip."""

    N: int
    groups: int
    runs: int
    L: int
    elementwise: bool  # whether each element has a weight, and so the whole row is one run
    itemsize: int
    width: int
    arrays: int  # arrays that are kept: 1 forward (x), 2 backward (dy and x)
    summed: bool  # whether the gradients of weight and bias are wanted

    @property
    def pack(self) -> int:
        """Bytes of a pack."""
        return self.itemsize * self.width


class Cut(NamedTuple):
    """How a row is cut."""

    blocks: int  # blocks of a cluster
    team: int
    squad: int
    packs: int  # packs of a run for a squad
    slots: int  # packs of each array and row for a thread
    threads: int
    at_once: int  # rows that a team takes at once

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.threads // self.team


class OnChip(NamedTuple):
    """What is kept on chip."""

    rows: bool  # the rows; else they are read twice
    sums: bool  # sums of the elements that each have a weight, over several rows; else those in memory


class RowGeometry(NamedTuple):
    """Launch of a kernel for rows, and what else it is compiled for."""

    geometry: Geometry
    on_chip: OnChip
    at_once: int  # rows that a team takes at once


def row_geometry(norms: Norms, device: Device) -> RowGeometry:
    """Geometry of a kernel for rows, and what it is compiled for."""
    cut, on_chip = _choose(norms, device)
    samples = _samples(norms, cut, on_chip, device) if norms.elementwise and norms.summed else cut.at_once
    shared = _shared(norms, cut, on_chip)
    if norms.elementwise:
        parts = math.ceil(norms.N / (cut.teams * samples))
        blocks = parts * norms.groups
    else:
        parts = norms.N * cut.blocks
        blocks = math.ceil(norms.N * norms.groups / cut.teams)
    sizes = Rows(norms.N, norms.groups, norms.runs, norms.L, cut.squad, cut.packs, samples)
    geometry = Geometry((blocks * cut.blocks,), sizes, parts, cut.threads, cut.blocks, shared, cut.team)
    return RowGeometry(geometry, on_chip, cut.at_once)


def _choose(norms: Norms, device: Device) -> tuple[Cut, OnChip]:
    """The cut of a row, and what is kept on chip: rows, by as few blocks as have room for them."""
    twice = device.shared_per_multiprocessor // BLOCKS_PER_MULTIPROCESSOR - CUDA_OWN
    clusters = BLOCKS if device.clusters else BLOCKS[:1]
    summed = norms.elementwise and norms.summed
    cuts = [_cut(norms, blocks, twice, at_once) for blocks in clusters for at_once in (AT_ONCE if summed else (1,))]
    for most in twice, device.shared_per_block:
        fitting = [cut for cut in cuts if _needed(norms, cut, OnChip(True, summed)) <= most]
        if fitting:
            break
    else:
        streamed = _cut(norms, clusters[-1], math.inf, 1)
        if streamed.team >= WARP:
            streamed = streamed._replace(threads=streamed.team)  # a single team: each block has a part of its own
        fits = _needed(norms, streamed, OnChip(False, summed)) <= device.shared_per_block
        return streamed, OnChip(False, summed and fits)
    if norms.elementwise:
        return fitting[0], OnChip(True, summed)
    busy, rows = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR, norms.N * norms.groups
    small = SMALL // norms.pack // norms.arrays
    best = next((c for c in fitting if rows * c.blocks >= busy or norms.runs * c.packs <= small), fitting[-1])
    return best, OnChip(True, False)


def _cut(norms: Norms, blocks: int, twice: float, at_once: int) -> Cut:
    """The cut of a row for a cluster of so many blocks, whose teams take so many rows at once.

    A block that keeps more bytes than `twice` is alone on its multiprocessor, and may have more threads.
    """
    packs = math.ceil(norms.L // norms.width / blocks)
    summed = norms.elementwise and norms.summed  # the sums leave room for few blocks: these have more threads
    each = ROW_PACKS // (2 if summed else 1) * (1 if norms.pack >= NARROW else 2)
    alone = at_once * norms.arrays * norms.runs * packs * norms.pack > twice
    teams = ROW_TEAMS if alone else ROW_TEAMS[:-1]
    team = next((t for t in teams if norms.runs * packs <= t * each), teams[-1])
    if blocks > 1:  # which take one row: each block is a single team
        team = max(team, LEAST_THREADS)
    threads = max(team, LEAST_THREADS)

    def slots(squad: int) -> int:
        return math.ceil(norms.runs / (team // squad)) * math.ceil(packs / squad)

    squads = [team] if norms.elementwise else [1 << i for i in range(team.bit_length())]
    tables = {s: norms.runs * (s // WARP) * 16 * (threads // team) for s in squads}
    squad = min(
        (s for s in squads if norms.elementwise or tables[s] <= MOST_TABLE), key=lambda s: (slots(s), s > WARP, -s)
    )
    return Cut(blocks, team, squad, packs, slots(squad), threads, at_once)


def _shared(norms: Norms, cut: Cut, on_chip: OnChip) -> int:
    """Bytes of dynamic shared memory of a block."""
    packs = cut.slots * cut.threads
    shared = norms.arrays * cut.at_once * packs * norms.pack if on_chip.rows else 0
    if on_chip.sums:
        shared += packs * 2 * norms.width * max(norms.itemsize, 4)
    if norms.arrays == 2 and not norms.elementwise:
        shared += norms.runs * (cut.squad // WARP) * 16 * cut.teams
    return shared


def _needed(norms: Norms, cut: Cut, on_chip: OnChip) -> int:
    """Bytes of shared memory that a block needs in all."""
    warps = max(1, cut.team // WARP) * cut.teams  # of one team each, if only in part
    return _shared(norms, cut, on_chip) + ROW_OWN + KNOWN * cut.at_once * max(cut.teams, warps)


def _samples(norms: Norms, cut: Cut, on_chip: OnChip, device: Device) -> int:
    """Rows that a team takes one after the other, so that there are as many parts as blocks find room for, about."""
    own = _needed(norms, cut, on_chip) + CUDA_OWN
    room = min(device.shared_per_multiprocessor // own, MOST_THREADS // cut.threads, MOST_BLOCKS)
    if not on_chip.sums:
        room = 1  # sums in memory had better stay in the L2 cache
    teams = device.multiprocessors * max(1, room) * cut.teams // cut.blocks
    rows = min(math.ceil(norms.N * norms.groups / max(1, teams)), MOST_ROWS, norms.N)
    return math.ceil(rows / cut.at_once) * cut.at_once


def width_of_rows(norms_row: int, itemsize: int, *addresses: int) -> int:
    """Elements of a pack: the widest that divides a row's runs, given in elements, and fits all addresses."""
    together = PACK | norms_row * itemsize
    for address in addresses:
        together |= address
    return (together & -together) // itemsize
