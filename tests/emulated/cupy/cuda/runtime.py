"""The functions of the CUDA runtime that programs call by name."""

# The names are CuPy's.
# ruff: noqa: N802, N816

from __future__ import annotations

import threading
from typing import Any

from cupy import emulator
from cupy._errors import CUDARuntimeError

cudaDevAttrMaxThreadsPerBlock = 1
cudaDevAttrMaxBlockDimX = 2
cudaDevAttrMaxBlockDimY = 3
cudaDevAttrMaxBlockDimZ = 4
cudaDevAttrMaxGridDimX = 5
cudaDevAttrMaxGridDimY = 6
cudaDevAttrMaxGridDimZ = 7
cudaDevAttrMaxSharedMemoryPerBlock = 8
cudaDevAttrWarpSize = 10
cudaDevAttrMaxRegistersPerBlock = 12
cudaDevAttrClockRate = 13
cudaDevAttrMultiProcessorCount = 16
cudaDevAttrConcurrentKernels = 31
cudaDevAttrMemoryClockRate = 36
cudaDevAttrGlobalMemoryBusWidth = 37
cudaDevAttrL2CacheSize = 38
cudaDevAttrMaxThreadsPerMultiProcessor = 39
cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81
cudaDevAttrMaxRegistersPerMultiprocessor = 82
cudaDevAttrCooperativeLaunch = 95
cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
cudaDevAttrMaxBlocksPerMultiprocessor = 106
cudaDevAttrReservedSharedMemoryPerBlock = 111

streamDefault = 0
streamNonBlocking = 1
streamLegacy = 1
streamPerThread = 2
streamCaptureModeGlobal = 0
streamCaptureModeThreadLocal = 1
streamCaptureModeRelaxed = 2

_local = threading.local()


def getDeviceCount() -> int:
    """The number of devices; an error if there is none, as in CUDA."""
    if not emulator.devices:
        raise CUDARuntimeError(100)
    return len(emulator.devices)


def getDevice() -> int:
    """The number of this thread's current device."""
    getDeviceCount()
    return getattr(_local, "device", 0)


def setDevice(device: int) -> None:
    """Make a device this thread's current one."""
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    _local.device = device


def getDeviceProperties(device: int) -> dict[str, Any]:
    """The properties of a device that `cudaGetDeviceProperties` tells; the name is bytes."""
    of = _properties(device)
    return {
        "name": of.name.encode(),
        "totalGlobalMem": of.global_memory,
        "sharedMemPerBlock": of.shared_memory_per_block,
        "sharedMemPerBlockOptin": of.shared_memory_per_block_optin,
        "sharedMemPerMultiprocessor": of.shared_memory_per_multiprocessor,
        "reservedSharedMemPerBlock": 1024 if int(of.compute_capability) >= 80 else 0,
        "regsPerBlock": of.registers_per_multiprocessor,
        "regsPerMultiprocessor": of.registers_per_multiprocessor,
        "warpSize": of.warp_size,
        "maxThreadsPerBlock": of.threads_per_block,
        "maxThreadsDim": (of.threads_per_block, of.threads_per_block, 64),
        "maxGridSize": (2**31 - 1, 65535, 65535),
        "maxThreadsPerMultiProcessor": of.threads_per_multiprocessor,
        "maxBlocksPerMultiProcessor": of.blocks_per_multiprocessor,
        "multiProcessorCount": of.multiprocessors,
        "l2CacheSize": of.l2_cache,
        "major": int(of.compute_capability[:-1]),
        "minor": int(of.compute_capability[-1]),
        "clockRate": of.clock_rate,
        "memoryClockRate": of.memory_clock_rate,
        "memoryBusWidth": of.memory_bus_width,
        "concurrentKernels": 1,
        "cooperativeLaunch": 1,
    }


def deviceGetAttribute(attrib: int, device: int) -> int:
    """One attribute of a device, by the number of a ``cudaDevAttr...``."""
    name = _ATTRIBUTES.get(attrib)
    if name is None:
        raise CUDARuntimeError(1)
    axis = "XYZ".find(name[-1]) if "Dim" in name else 0
    value = getDeviceProperties(device)[_PROPERTIES[name]]
    return int(value[axis] if isinstance(value, tuple) else value)


def deviceSynchronize() -> None:
    """Wait for all work of the current device."""
    from cupy.cuda import _capture

    _capture.check(_capture.status_of_whole_device(getDevice()), "synchronize")
    emulator.count_sync("synchronize")


def streamIsCapturing(stream: int) -> bool:
    """Whether a stream, given by its handle, is being captured."""
    from cupy.cuda import _capture
    from cupy.cuda.stream import find_stream

    found = find_stream(stream)
    if found is None:
        raise CUDARuntimeError(400)
    if found._capture is None:
        if stream in (0, streamLegacy) and _capture.before_legacy_stream(getDevice()):
            raise CUDARuntimeError(906)
        return False
    if not found._capture.valid:
        raise RuntimeError("the stream was capturing, but an error has invalidated the capture sequence")
    return True


def streamQuery(stream: int) -> int:
    """The status of a stream: 0 if all its work is done. No status is raised as an error here."""
    from cupy.cuda.stream import find_stream

    found = find_stream(stream)
    return 400 if found is None else found._status_of_query()


def eventQuery(event: int) -> int:
    """The status of an event: 0 if it has happened. No status is raised as an error here."""
    from cupy.cuda.stream import find_event

    found = find_event(event)
    return 400 if found is None else found._status()


def memGetInfo() -> tuple[int, int]:
    """Bytes of the current device's memory that are free, and bytes in all."""
    from cupy import _memory

    total = _properties(getDevice()).global_memory
    return total - _memory.usage(getDevice()).live_bytes, total


def runtimeGetVersion() -> int:
    """The version of CUDA."""
    return 13000


driverGetVersion = runtimeGetVersion


def _properties(device: int) -> emulator.Properties:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    return emulator.devices[device]


_ATTRIBUTES = {
    number: name.removeprefix("cudaDevAttr") for name, number in globals().items() if name.startswith("cudaDevAttr")
}
_PROPERTIES = {
    "MaxThreadsPerBlock": "maxThreadsPerBlock",
    **{f"MaxBlockDim{axis}": "maxThreadsDim" for axis in "XYZ"},
    **{f"MaxGridDim{axis}": "maxGridSize" for axis in "XYZ"},
    "MaxSharedMemoryPerBlock": "sharedMemPerBlock",
    "WarpSize": "warpSize",
    "MaxRegistersPerBlock": "regsPerBlock",
    "ClockRate": "clockRate",
    "MultiProcessorCount": "multiProcessorCount",
    "ConcurrentKernels": "concurrentKernels",
    "MemoryClockRate": "memoryClockRate",
    "GlobalMemoryBusWidth": "memoryBusWidth",
    "L2CacheSize": "l2CacheSize",
    "MaxThreadsPerMultiProcessor": "maxThreadsPerMultiProcessor",
    "MaxSharedMemoryPerMultiprocessor": "sharedMemPerMultiprocessor",
    "MaxRegistersPerMultiprocessor": "regsPerMultiprocessor",
    "CooperativeLaunch": "cooperativeLaunch",
    "MaxSharedMemoryPerBlockOptin": "sharedMemPerBlockOptin",
    "MaxBlocksPerMultiprocessor": "maxBlocksPerMultiProcessor",
    "ReservedSharedMemoryPerBlock": "reservedSharedMemPerBlock",
}
