"""RawModule and RawKernel: the same constructors and calls as in CuPy, and every argument checked."""

from __future__ import annotations

import ctypes
import math
import operator
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy import _memory, emulator
from cupy._compiler import MOST_SHARED, CompileException, Module, Parameter, runtime
from cupy._errors import CUDADriverError, DetailError
from cupy._ndarray import byte_range, ndarray, range_at
from cupy.cuda import Device, _capture, get_current_stream
from cupy.cuda.function import CNumpyArray


class EmulationError(RuntimeError):
    """A kernel did what it must not do; the message says what and where."""


class _Range(ctypes.Structure):
    """Memory that a kernel may touch."""

    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("initialised", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class _Result(ctypes.Structure):
    """What a launch did."""

    _fields_ = (
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("pc", ctypes.c_void_p),
        ("message", ctypes.c_char * 2000),
    )


MOST_BLOCKS = 8  # of a cluster, on every device that has clusters
_one_at_a_time = threading.Lock()


def _has_clusters() -> bool:
    return int(emulator.devices[Device().id].compute_capability) >= 90


def _compile(module: Module | None, code: str, options: Sequence[str]) -> Module:
    """Compile, and load for the current device, unless it is done."""
    module = Module(code, options) if module is None else module
    if any(module.clusters.values()) and not _has_clusters():
        raise CompileException("error: __cluster_dims__ is not supported for this GPU architecture")
    device = Device().id
    if device not in module.devices:
        _capture.check(_capture.status_of_unsafe_call(device), "cuModuleLoadData", CUDADriverError)
        module.devices.add(device)
    return module


def _expect_tuple(name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"Argument {name!r} has incorrect type (expected tuple, got {type(value).__name__})")


class RawModule:
    """CUDA C++ in a string, and its kernels."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        name_expressions: Sequence[str] | None = None,
        enable_cooperative_groups: bool = False,
    ) -> None:
        if name_expressions or enable_cooperative_groups:
            raise NotImplementedError('the stand-in for CuPy has extern "C" kernels and ordinary launches only')
        _expect_tuple("options", options)
        self.code, self.options, self.backend = code, options, backend
        self._module: Module | None = None

    def compile(self, log_stream: Any = None) -> None:  # noqa: ARG002
        """Compile, unless it is done."""
        self._module = _compile(self._module, self.code, self.options)

    def get_function(self, name: str) -> RawKernel:
        """A kernel by its name."""
        self.compile()
        kernel = RawKernel(self.code, name, self.options)
        kernel._module = self._module
        kernel.compile()
        return kernel


class RawKernel:
    """A kernel of a string of CUDA C++; compiled at its first launch."""

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        *,
        enable_cooperative_groups: bool = False,
    ) -> None:
        if enable_cooperative_groups:
            raise NotImplementedError("the stand-in for CuPy has ordinary launches only")
        _expect_tuple("options", options)
        self.code, self.name, self.options, self.backend = code, name, options, backend
        self._max_dynamic: dict[int, int] = {}  # of each device where the program has set it
        self._module: Module | None = None

    def compile(self, log_stream: Any = None) -> None:  # noqa: ARG002
        """Compile, unless it is done."""
        self._module = _compile(self._module, self.code, self.options)
        if self.name not in self._module.names:
            raise CUDADriverError(500) from DetailError(self.name)

    @property
    def kernel(self) -> RawKernel:
        """What CuPy launches without further ado."""
        self.compile()
        return self

    @property
    def shared_size_bytes(self) -> int:
        """Bytes of static shared memory in a block."""
        self.compile()
        assert self._module is not None
        return self._module.static_shared()

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """The most bytes of dynamic shared memory that a launch on the current device may ask for."""
        device = Device().id
        if device in self._max_dynamic:
            return self._max_dynamic[device]
        return max(0, emulator.devices[device].shared_memory_per_block - self.shared_size_bytes)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        device = Device().id
        if not 0 <= size <= emulator.devices[device].shared_memory_per_block_optin - self.shared_size_bytes:
            raise CUDADriverError(1) from DetailError(f"{size} bytes of dynamic shared memory")
        self._max_dynamic[device] = size

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        """Run the kernel over a grid of blocks, or note it where the stream is being captured."""
        self.compile()
        module = self._module
        assert module is not None
        stream = get_current_stream() if stream is None else stream
        device = Device()
        dims = _dims("grid", grid, (2**31 - 1, 65535, 65535)), _dims("block", block, (1024, 1024, 64))
        most = 2**30 if emulator.chosen_blocks is None else 2**32
        if math.prod(dims[0]) * math.prod(dims[1]) >= most:
            raise NotImplementedError(f"the stand-in for CuPy runs fewer than {most} threads")
        self._check_size(dims[1], shared_mem)
        declared = module.clusters[self.name]
        _check_cluster(dims[0], declared)
        cluster = max(1, declared) if _has_clusters() else 0
        parameters = module.parameters(self.name)
        if len(args) != len(parameters):
            raise TypeError(f"{self.name}: expected {len(parameters)} arguments (got {len(args)})")
        values = [
            _Value(f"{self.name}: argument {i}", parameter, argument, device.id)
            for i, (parameter, argument) in enumerate(zip(parameters, args, strict=True))
        ]

        def run() -> None:
            result = _launch(module, self.name, dims, shared_mem, values, cluster)
            traffic = result.bytes_read, result.bytes_written
            emulator.launches.append(
                emulator.Launch(self.name, *dims, shared_mem, device.id, stream.ptr, *traffic, max(1, cluster))
            )

        stream._enqueue(run, f"launch of {self.name}", CUDADriverError)

    def _check_size(self, block: tuple[int, ...], shared_mem: int) -> None:
        properties = emulator.devices[Device().id]
        if math.prod(block) > properties.threads_per_block:
            raise CUDADriverError(1) from DetailError(f"{block} threads in a block")
        static, most = self.shared_size_bytes, self.max_dynamic_shared_size_bytes
        shared = static + shared_mem
        if (
            static > properties.shared_memory_per_block
            or shared_mem > most
            or shared > properties.shared_memory_per_block_optin
        ):
            raise CUDADriverError(1) from DetailError(f"{shared} bytes of shared memory in a block")


def _check_cluster(grid: tuple[int, int, int], cluster: int) -> None:
    if cluster > MOST_BLOCKS:
        raise CUDADriverError(912) from DetailError(f"{cluster} blocks in a cluster")
    if cluster and grid[0] % cluster != 0:
        raise CUDADriverError(1) from DetailError(f"grid {grid} for clusters of {cluster} blocks along x")


def _dims(name: str, dims: tuple[int, ...], most: tuple[int, int, int]) -> tuple[int, int, int]:
    """What CuPy passes on: the first three sizes, none of them below 1."""
    _expect_tuple(name, dims)
    x, y, z = (max(1, operator.index(size)) for size in (*dims, 1, 1)[:3])
    if not all(size <= limit for size, limit in zip((x, y, z), most, strict=True)):
        raise CUDADriverError(1) from DetailError(f"{name} {dims}")
    return x, y, z


class _Value:
    """An argument as cuLaunchKernel takes it: some bytes, and the memory that they may point to."""

    def __init__(self, name: str, parameter: Parameter, argument: Any, device: int) -> None:
        self.argument = argument  # keeps its memory
        self.extents: list[tuple[_memory.Allocation, int, int]] = []  # each with begin and end
        expected = parameter.kind.decode()
        if isinstance(argument, CNumpyArray):  # whose bytes CuPy takes for any parameter
            kind, data = expected, self._by_value(name, argument._val, device)
        else:
            kind, data = self._bytes(name, argument, device)
        if expected != kind or parameter.size != len(data):
            raise TypeError(
                f"{name}: expected {_describe(expected, parameter.size)} (got {_describe(kind, len(data))} from "
                f"{type(argument).__qualname__})"
            )
        if isinstance(argument, ndarray) and parameter.pointee_size not in (0, 1, argument.itemsize):
            raise TypeError(f"{name}: expected elements of {parameter.pointee_size} bytes (got {argument.dtype})")
        if isinstance(argument, ndarray) and parameter.pointee == b"f" and argument.dtype.kind in "iu":
            raise TypeError(f"{name}: expected elements that are floats (got {argument.dtype})")
        if isinstance(argument, ndarray) and parameter.pointee == b"i" and argument.dtype.kind == "f":
            raise TypeError(f"{name}: expected elements that are integers (got {argument.dtype})")
        self.data = ctypes.create_string_buffer(data, max(1, len(data)))

    def _bytes(self, name: str, argument: Any, device: int) -> tuple[str, bytes]:
        if argument is None:
            return "p", bytes(8)
        if isinstance(argument, ndarray):
            if argument.device.id != device:
                raise ValueError(f"{name}: expected an array on device {device} (got one on {argument.device.id})")
            self.extents = [(argument._allocation, *byte_range(argument))]
            return "p", np.uint64(argument.data.ptr).tobytes()
        if isinstance(argument, _memory.MemoryPointer):
            self._point_to(name, argument.ptr, device)
            return "p", np.uint64(argument.ptr).tobytes()
        if isinstance(argument, bool):
            return "i", np.bool_(argument).tobytes()
        if isinstance(argument, int):
            return "i", np.int64(argument).tobytes()
        if isinstance(argument, float):
            return "f", np.float64(argument).tobytes()
        if isinstance(argument, np.generic) and argument.dtype.kind in "fiub":
            return "f" if argument.dtype.kind == "f" else "i", argument.tobytes()
        if isinstance(argument, np.ndarray) and argument.size == 1:
            return "s", self._by_value(name, argument, device)
        raise TypeError(f"{name}: unsupported type {type(argument)}")

    def _by_value(self, name: str, array: np.ndarray[Any, Any], device: int) -> bytes:
        """The bytes of an array, which may be a struct with pointers."""
        data = array.tobytes()
        for word in np.frombuffer(data, np.uint64, len(data) // 8).tolist():
            self._point_to(name, word, device)  # if it is an address, as far as one can see
        return data

    def _point_to(self, name: str, ptr: int, device: int) -> None:
        allocation = _memory.find(ptr)
        if allocation is None:
            return
        if allocation.device != device:
            raise ValueError(f"{name}: expected a pointer on device {device} (got one on {allocation.device})")
        self.extents.append((allocation, *range_at(allocation, ptr)))


def _describe(kind: str, size: int) -> str:
    name = {"p": "a pointer", "f": "a float", "i": "an integer", "s": "a struct"}[kind]
    return f"{name} of {size} bytes"


def _ranges(values: list[_Value]) -> list[_Range]:
    """The memory that the arguments see, by address; what several of them see is one range."""
    extents = sorted(
        (
            (begin, end, index, allocation)
            for index, v in enumerate(values)
            for allocation, first, last in v.extents
            for begin, end in allocation.visible(first, last)
        ),
        key=lambda extent: extent[:3],
    )
    merged: list[tuple[int, int, list[int], _memory.Allocation]] = []
    for begin, end, index, allocation in extents:
        if begin == end:
            continue
        if merged and begin < merged[-1][1]:
            first, last, indices, _ = merged[-1]
            merged[-1] = first, max(last, end), sorted({*indices, index}), allocation
        else:
            merged.append((begin, end, [index], allocation))
    return [
        _Range(
            begin,
            end,
            allocation.initialised.ctypes.data + begin - allocation.ptr,
            f"argument {' and '.join(map(str, indices))}".encode(),
        )
        for begin, end, indices, allocation in merged
    ]


def _chosen(grid: tuple[int, int, int], cluster: int) -> list[int] | None:
    """The numbers of the first blocks of the clusters to run, in order; None is all of the grid."""
    if emulator.chosen_blocks is None:
        return None
    numbers = []
    for block in emulator.chosen_blocks:
        if not all(0 <= index < size for index, size in zip(block, grid, strict=True)):
            raise ValueError(f"expected a block of the grid {grid} (got {block})")
        x, y, z = block
        numbers.append(x + grid[0] * (y + grid[1] * z))
    return sorted({number // cluster * cluster for number in numbers})


def _launch(
    module: Module,
    name: str,
    dims: tuple[tuple[int, int, int], tuple[int, int, int]],
    shared_mem: int,
    values: list[_Value],
    cluster: int,
) -> _Result:
    ranges = _ranges(values)
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value.data) for value in values))
    result = _Result()
    begin, end = module.shared
    chosen = _chosen(dims[0], max(1, cluster))
    with _one_at_a_time:
        runtime().emulated_launch(
            module.entry(name),
            arguments,
            (ctypes.c_uint * 3)(*dims[0]),
            (ctypes.c_uint * 3)(*dims[1]),
            cluster,
            ctypes.c_void_p(begin),
            ctypes.c_void_p(end),
            ctypes.c_void_p(module.dynamic_shared()),
            ctypes.c_size_t(shared_mem),
            ctypes.c_size_t(MOST_SHARED),
            (_Range * len(ranges))(*ranges),
            len(ranges),
            chosen if chosen is None else (ctypes.c_uint32 * len(chosen))(*chosen),
            0 if chosen is None else len(chosen),
            ctypes.c_uint64(emulator.seed),
            ctypes.byref(result),
        )
    if result.message:
        message = result.message.decode(errors="replace")
        if result.pc:
            message += f" at {module.place(result.pc)}"
        raise EmulationError(f"{name}: {message}")
    return result
