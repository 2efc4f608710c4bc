"""Arrays over the memory of other libraries, by DLPack."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import cupy
from cupy import _dtypes
from cupy._memory import ForeignMemory, MemoryPointer
from cupy.cuda import Device, get_current_stream, runtime

CPU, CUDA = 1, 2
"""Numbers that DLPack has for the host and for CUDA devices."""
KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
"""Names of dtypes, without their bits, by DLPack's numbers."""
NAME, USED = b"dltensor", b"used_dltensor"


class Tensor(ctypes.Structure):
    """DLTensor, and behind it the rest of DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]


def managed_tensor(capsule: Any) -> Tensor:
    """What a capsule holds that nobody has taken yet."""
    if not _is_valid(capsule, NAME):
        raise ValueError(
            "A DLPack tensor object cannot be consumed multiple times (or object was not a DLPack capsule). Got: "
            f"{capsule!r}"
        )
    return Tensor.from_address(_pointer(capsule, NAME))


def from_dlpack(array: Any, *, device: Any = None, copy: bool | None = None) -> Any:
    """An array over the memory of a tensor of another library, or of a capsule with one."""
    if hasattr(array, "__dlpack_device__"):
        kind, index = array.__dlpack_device__()
        if device is not None:
            raise NotImplementedError("from_dlpack() does not support device yet.")
        if kind == CPU:
            raise TypeError(
                "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
            )
        with Device(index):
            array = array.__dlpack__(stream=get_current_stream().ptr or runtime.streamLegacy, copy=copy)
    tensor = managed_tensor(array)
    if tensor.device_type != CUDA:
        raise RuntimeError(
            "CuPy is built against CUDA, different from the backend that backs the incoming DLPack tensor"
        )
    _rename(array, USED)
    shape, itemsize = tensor.shape[: tensor.ndim], tensor.bits // 8
    strides = [stride * itemsize for stride in tensor.strides[: tensor.ndim]]
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + itemsize if all(shape) else 0
    memory = ForeignMemory((tensor.data or 0) + tensor.byte_offset, extent, tensor.device_id, array)
    weakref.finalize(memory, tensor.deleter, ctypes.addressof(tensor))
    name = KINDS[tensor.code] + ("" if KINDS[tensor.code] == "bool" else str(tensor.bits))
    return cupy.ndarray(tuple(shape), _dtypes.supported(name), MemoryPointer(memory, 0), tuple(strides))
