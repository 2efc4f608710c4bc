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
deviceAttributeComputeCapabilityMajor = 75  # by these names in CuPy, and by no others
deviceAttributeComputeCapabilityMinor = 76
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
    """How many devices there are; an error if there is none, as in CUDA."""
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
    """What `cudaGetDeviceProperties` tells; the name is bytes."""
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


def deviceGetAttribute(attribute: int, device: int) -> int:
    """One attribute of a device, by the number of a ``cudaDevAttr...``."""
    name = _ATTRIBUTES.get(attribute)
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
    """Whether the work of a stream, by its handle, waits for the launch of a graph."""
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
    """What CUDA reports where a program asks whether a stream is done: 0 if it is. No status is an exception here."""
    from cupy.cuda.stream import find_stream

    found = find_stream(stream)
    return 400 if found is None else found._status_of_query()


def eventQuery(event: int) -> int:
    """What CUDA reports where a program asks whether an event is done: 0 if it is. No status is an exception here."""
    from cupy.cuda.stream import find_event

    found = find_event(event)
    return 400 if found is None else found._status()


def memGetInfo() -> tuple[int, int]:
    """Bytes of the current device's memory that are free, and all of them."""
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
    number: name.removeprefix("cudaDevAttr").removeprefix("deviceAttribute")
    for name, number in globals().items()
    if name.startswith(("cudaDevAttr", "deviceAttribute"))
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
    "ComputeCapabilityMajor": "major",
    "ComputeCapabilityMinor": "minor",
    "MaxSharedMemoryPerMultiprocessor": "sharedMemPerMultiprocessor",
    "MaxRegistersPerMultiprocessor": "regsPerMultiprocessor",
    "CooperativeLaunch": "cooperativeLaunch",
    "MaxSharedMemoryPerBlockOptin": "sharedMemPerBlockOptin",
    "MaxBlocksPerMultiprocessor": "maxBlocksPerMultiProcessor",
    "ReservedSharedMemoryPerBlock": "reservedSharedMemPerBlock",
}
