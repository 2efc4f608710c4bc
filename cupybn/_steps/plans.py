"""The choice of launches: for a step and its arrays the kernel, the macros it is compiled with, and its geometry."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps.geometry import (
    PACK,
    ChannelsLast,
    Geometry,
    channels_first,
    channels_first_resident,
    channels_last,
    channels_last_resident,
)
from cupybn._steps.launcher import Kernel, kernel
from cupybn._steps.resident import Device

Array = Any  # cupy.ndarray

MOST_INT = 2**31 - 2**20
"""Elements up to which kernels count with 32 bits. These hold somewhat more, but an index is worked out before it is
found to be beyond the end of an array."""
ON_CHIP = {"bn_forward": 1, "bn_backward": 2}
"""Steps that keep channels on chip, and how many arrays of them."""
SUMS = ("bn_stats", "bn_backward_reduce", "bn_double_backward_reduce")
"""Steps that sum: the order of additions must not depend on the device."""


class Plan(NamedTuple):
    """The launch of a step that has been chosen: its kernel, and how this is laid over the arrays."""

    kernel: Kernel
    geometry: Geometry

    def launch(self, **arguments: Any) -> None:
        """Launch the kernel with these arguments, and the sizes that the geometry knows."""
        geometry = self.geometry
        arguments["sizes"] = geometry.sizes
        self.kernel.launch(geometry.grid, geometry.threads, arguments, geometry.shared)


def choose(step: str, x: Array, *others: Array | None, passed: Array | None = None, mask: Array | None = None) -> Plan:
    """The launch of a step that is streamed, for these arrays: x, and others that are read or written in packs."""
    multiprocessors = None if step in SUMS else properties_of(x.data.device_id).multiprocessors
    width = width_of(x, *others, passed=passed, mask=mask)
    return streamed_plan(step, x.shape, x.dtype, width, multiprocessors, mask is not None)


def choose_resident(step: str, x: Array, *others: Array | None, passed: Array | None = None) -> Plan | None:
    """The launch of a step that keeps channels on chip; None where these do not fit, or had better be read twice."""
    return resident_plan(step, x.shape, x.dtype, width_of(x, *others, passed=passed), x.data.device_id)


def width_of(x: Array, *others: Array | None, passed: Array | None = None, mask: Array | None = None) -> int:
    """Elements of a pack: the widest that divides a row and fits all addresses, or what a record was made for.

    A record has a byte for each pack, and a mask, channels first, one for each element.
    """
    if passed is not None:
        return int(x.size) // int(passed.size)
    _, C, L = x.shape
    itemsize, row = x.dtype.itemsize, L if L > 1 else C
    together: int = PACK | row * itemsize | x.data.ptr  # without channels all but PACK is 0
    for array in others:
        together |= 0 if array is None else array.data.ptr
    if mask is not None and L > 1:
        together |= mask.data.ptr * x.dtype.itemsize
    return (together & -together) // int(itemsize)  # its lowest bit: the largest power of two that divides them all


@functools.lru_cache(maxsize=4096)
def streamed_plan(
    step: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    width: int,
    multiprocessors: int | None,
    masked: bool = False,
) -> Plan:
    """The plan of a step that is streamed. It is kept: programs ask for the same few again and again."""
    N, C, L = shape
    if L == 1:
        layout, arrays = "channels_last", 2 if "backward" in step else 1
        geometry = channels_last(N, C, dtype.itemsize, width, arrays, multiprocessors)
    else:
        layout = "channels_first"
        geometry = channels_first(N, C, L, dtype.itemsize, width, multiprocessors)
    macros = macros_of(dtype, width, index_bits(shape, geometry), geometry)
    if masked:
        macros["MASKED"] = 1
    return Plan(kernel(f"{layout}/{step}", **macros), geometry)


@functools.lru_cache(maxsize=4096)
def resident_plan(
    step: str, shape: tuple[int, int, int], dtype: np.dtype[Any], width: int, device_index: int
) -> Plan | None:
    """The plan of a step that keeps channels on chip, or None. It is kept."""
    N, C, L = shape
    arguments = dtype.itemsize, width, ON_CHIP[step], properties_of(device_index)
    if L == 1:
        layout, geometry = "channels_last", channels_last_resident(N, C, *arguments)
    else:
        layout, geometry = "channels_first", channels_first_resident(N, C, L, *arguments)
    if geometry is None:
        return None
    macros = macros_of(dtype, width, index_bits(shape, geometry), geometry)
    if L > 1:
        macros["CLUSTER_BLOCKS"] = geometry.cluster
    return Plan(kernel(f"{layout}/{step}", **macros), geometry)


def index_bits(shape: tuple[int, int, int], geometry: Geometry) -> int:
    """Bits of the kernels' indices, which go beyond the end of an array by what a block's threads take at once."""
    N, C, L = shape
    sizes = geometry.sizes
    beyond = geometry.threads // sizes.tile if isinstance(sizes, ChannelsLast) else geometry.threads * PACK // L + 2
    return 32 if (N + beyond) * C * L < MOST_INT else 64


def macros_of(dtype: np.dtype[Any], width: int, index_bits: int, geometry: Geometry) -> dict[str, Any]:
    """Macros that every kernel is compiled with; TEAM only where there are teams."""
    macros = {"DATA_T": dtype, "WIDTH": width, "INDEX_BITS": index_bits, "THREADS": geometry.threads}
    return macros | ({"TEAM": geometry.team} if geometry.team else {})


@functools.cache
def properties_of(index: int) -> Device:
    """Properties of a device that the choice of launches depends on."""
    cuda = import_cupy().cuda

    def attribute(name: str) -> int:
        return int(cuda.runtime.deviceGetAttribute(getattr(cuda.runtime, f"cudaDevAttr{name}"), index))

    return Device(
        attribute("MultiProcessorCount"),
        attribute("MaxSharedMemoryPerBlockOptin"),
        attribute("MaxSharedMemoryPerMultiprocessor"),
        clusters=int(cuda.Device(index).compute_capability) >= 90,
    )
