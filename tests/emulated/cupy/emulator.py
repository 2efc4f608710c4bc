"""The control panel of the stand-in: which devices it pretends, and what the program did with them.

Real CuPy has no such module: ``hasattr(cupy, "emulator")`` tells the two apart.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from cupy._memory import UninitialisedMemoryError, Usage, reset_usage, usage

__all__ = [
    "A100",
    "H200",
    "RTX_4090",
    "T4",
    "Launch",
    "Properties",
    "UninitialisedMemoryError",
    "Usage",
    "broken",
    "devices",
    "faults",
    "launches",
    "pretend",
    "record",
    "record_syncs",
    "reset_usage",
    "run_only",
    "seed",
    "set_devices",
    "syncs",
    "usage",
]


@dataclass(frozen=True)
class Properties:
    """The properties of a device; the defaults are an H200's. Sizes are in bytes, rates in kHz."""

    name: str = "Emulated H200"
    compute_capability: str = "90"
    multiprocessors: int = 132
    threads_per_multiprocessor: int = 2048
    blocks_per_multiprocessor: int = 32
    registers_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 << 10
    shared_memory_per_block_optin: int = 227 << 10
    shared_memory_per_multiprocessor: int = 228 << 10
    l2_cache: int = 60 << 20
    global_memory: int = 139 << 30
    clock_rate: int = 1_980_000
    memory_clock_rate: int = 3_201_000
    memory_bus_width: int = 6144  # bits
    threads_per_block: int = 1024
    warp_size: int = 32


H200 = Properties()
A100 = replace(
    H200,
    name="Emulated A100",
    compute_capability="80",
    multiprocessors=108,
    shared_memory_per_block_optin=163 << 10,
    shared_memory_per_multiprocessor=164 << 10,
    l2_cache=40 << 20,
    global_memory=79 << 30,
    clock_rate=1_410_000,
    memory_clock_rate=1_593_000,
    memory_bus_width=5120,
)
T4 = replace(
    H200,
    name="Emulated T4",
    compute_capability="75",
    multiprocessors=40,
    threads_per_multiprocessor=1024,
    blocks_per_multiprocessor=16,
    shared_memory_per_block_optin=64 << 10,
    shared_memory_per_multiprocessor=64 << 10,
    l2_cache=4 << 20,
    global_memory=15 << 30,
    clock_rate=1_590_000,
    memory_clock_rate=5_001_000,
    memory_bus_width=256,
)
RTX_4090 = replace(
    H200,
    name="Emulated RTX 4090",
    compute_capability="89",
    multiprocessors=128,
    threads_per_multiprocessor=1536,
    blocks_per_multiprocessor=24,
    shared_memory_per_block_optin=99 << 10,
    shared_memory_per_multiprocessor=100 << 10,
    l2_cache=72 << 20,
    global_memory=24 << 30,
    clock_rate=2_520_000,
    memory_clock_rate=10_501_000,
    memory_bus_width=384,
)


class Launch(NamedTuple):
    """A kernel launch, and its traffic between the kernel and global memory."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_mem: int
    device: int
    stream: int
    bytes_read: int
    bytes_written: int
    cluster: int = 1  # blocks of a cluster


devices: list[Properties] = [H200] * int(os.environ.get("CUPY_EMULATOR_DEVICES", "1"))
"""The devices that the stand-in pretends, by number."""

seed: int = int(os.environ.get("CUPY_EMULATOR_SEED", "0"))
"""Number that decides the order in which the threads of a kernel run."""

launches: list[Launch] = []
"""All launches so far, or those since `record` was entered."""

chosen_blocks: tuple[tuple[int, int, int], ...] | None = None
"""Indices of the blocks that launches run; None: all blocks of the grid."""

syncs: list[str] = []
"""Reasons why the host waited for a device ("get", "synchronize", ...), since the start or since `record_syncs` was
entered."""

faults: dict[int, int] = {}
"""Errors that all calls of a device report since a kernel on it has failed, by the device's number."""

_lock = threading.Lock()


def set_devices(*properties: Properties) -> None:
    """Pretend these devices from now on. Arrays on a former device must not be used any more."""
    devices[:] = properties


@contextmanager
def pretend(*properties: Properties) -> Iterator[None]:
    """A context inside of which these devices are pretended."""
    before = devices[:]
    set_devices(*properties)
    try:
        yield
    finally:
        set_devices(*before)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """A context with a fresh list of the launches inside it, of all threads."""
    global launches
    outer, launches = launches, []
    try:
        yield launches
    finally:
        outer += launches
        launches = outer


@contextmanager
def run_only(*blocks: tuple[int, int, int]) -> Iterator[None]:
    """A context inside of which each launch runs these blocks alone, with the rest of their clusters."""
    global chosen_blocks
    outer, chosen_blocks = chosen_blocks, blocks
    try:
        yield
    finally:
        chosen_blocks = outer


@contextmanager
def record_syncs() -> Iterator[list[str]]:
    """A context with a fresh list of the reasons why the host waited inside it, in all threads."""
    global syncs
    outer, syncs = syncs, []
    try:
        yield syncs
    finally:
        outer += syncs
        syncs = outer


@contextmanager
def broken(device: int = 0, status: int = 719) -> Iterator[None]:
    """A context inside of which all calls of a device report this error, as after a kernel that has failed."""
    faults[device] = status
    try:
        yield
    finally:
        del faults[device]


def count_sync(reason: str) -> None:
    """Note that the host waited for a device, and why."""
    with _lock:
        syncs.append(reason)


def __getattr__(name: str) -> int:
    if name == "host_syncs":  # the number of waits
        return len(syncs)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
