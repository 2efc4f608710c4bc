"""Tensors as arrays, and arrays as tensors: always the same memory, never a copy.

On the CPU arrays are NumPy's, on a CUDA device CuPy's. NumPy and DLPack's readers may not know bfloat16: there it goes
as the integers of its bits.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._arrays.dtypes import parameter_dtype
from cupybn.torch import devices

Array = Any  # numpy.ndarray or cupy.ndarray
Tensor = Any  # torch.Tensor


class OnHost:
    """Context of a call on tensors in the host's memory."""

    def __enter__(self) -> OnHost:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def array(self, tensor: Tensor) -> Array:
        """The NumPy array over the memory of a tensor."""
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().view(torch.int16).numpy().view(_bfloat16())
        return tensor.detach().numpy()

    def tensor(self, array: Array, like: Tensor = None) -> Tensor:
        """The tensor over the memory of an array, which is no view of another tensor. See `_strides` for ``like``."""
        strides = _strides(array, like)
        if array.dtype.name == "bfloat16":
            return _over(torch.from_numpy(array.view(np.int16)), torch.bfloat16, 0, array.shape, strides)
        tensor = torch.from_numpy(array)
        return tensor if tensor.stride() == strides else _over(tensor, tensor.dtype, 0, array.shape, strides)


class OnDevice:
    """Context of a call on tensors on a CUDA device: that device, PyTorch's current stream, and its allocator.

    Parameters
    ----------
    index : int
        Number of the device.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._contexts = ExitStack()
        # Memory that this call has got from PyTorch, by address, as long as an array is in it.
        self._memory: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __enter__(self) -> OnDevice:
        if cuda_missing():
            raise RuntimeError(f"tensors on cuda:{self._index} need CuPy, too: {cuda_missing()}")
        cuda = import_cupy().cuda
        with ExitStack() as contexts:
            contexts.enter_context(cuda.Device(self._index))
            # A thread that has done nothing on a GPU yet, as autograd's are, has no context of CUDA, though device 0 is
            # its current one: entering that device changes nothing then. CuPy makes one at a launch, but not where a
            # kernel is asked to take more shared memory.
            cuda.runtime.setDevice(self._index)
            # Not as a context: when CuPy leaves one, a stream that the program has chosen by `use` is forgotten.
            contexts.callback(cuda.get_current_stream().use)
            _stream(devices.current_stream(self._index)).use()
            contexts.enter_context(cuda.using_allocator(self._allocate))
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._contexts.__exit__(*exception)

    def _allocate(self, nbytes: int) -> Any:
        """Memory for an array of CuPy's, as its allocators give it.

        PyTorch may give it to others when it is released, to work on the same stream: that comes after this call's.
        """
        cuda = import_cupy().cuda
        memory = devices.new_memory(nbytes, self._index)
        address = memory.data_ptr()
        self._memory[address] = memory
        return cuda.MemoryPointer(cuda.UnownedMemory(address, nbytes, memory, self._index), 0)

    def array(self, tensor: Tensor) -> Array:
        """The CuPy array over the memory of a tensor."""
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return import_cupy().from_dlpack(devices.to_dlpack(tensor.view(torch.int16))).view(_bfloat16())
        return import_cupy().from_dlpack(devices.to_dlpack(tensor))

    def tensor(self, array: Array, like: Tensor = None) -> Tensor:
        """The tensor over the memory of an array that this call has made, which is no view of another tensor.

        It has the memory that PyTorch gave, not another owner as by DLPack: `torch.Tensor.record_stream` knows it. See
        `_strides` for ``like``.
        """
        begin = array.data.mem.ptr
        memory = self._memory[begin] if array.size else devices.new_memory(0, self._index)
        offset = (array.data.ptr - begin) // array.itemsize if array.size else 0
        return _over(memory, getattr(torch, array.dtype.name), offset, array.shape, _strides(array, like))


class _Stream(NamedTuple):
    """A stream of another library, as CuPy takes it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    """CuPy's stream of a handle, which stays the owner's."""
    return import_cupy().cuda.Stream.from_external(_Stream(handle))


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    """NumPy's dtype for bfloat16."""
    return parameter_dtype("bfloat16")


def _strides(array: Array, like: Tensor) -> tuple[int, ...]:
    """The strides of an array, in elements: those of a tensor of its shape if they mean the same.

    PyTorch tells memory formats by strides, also where they mean nothing otherwise: those of axes of length 1, and all
    of an array without elements.
    """
    strides = tuple([stride // array.itemsize for stride in array.strides])
    if like is None or strides == like.stride():
        return strides
    alike = array.size == 0 or all(
        a == b or n == 1 for a, b, n in zip(strides, like.stride(), array.shape, strict=True)
    )
    return like.stride() if alike else strides


def _over(memory: Tensor, dtype: Any, offset: int, shape: Any, strides: Any) -> Tensor:
    """New tensor over the memory of another one, which autograd does not know as a view of it."""
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), offset, shape, strides)


def where(tensor: Tensor) -> OnHost | OnDevice:
    """The context of a call on tensors that are where this one is."""
    index = devices.cuda_index(tensor)
    return OnHost() if index is None else OnDevice(index)
