"""What PyTorch says of devices: where a tensor is, which stream is current there, and new memory on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.dlpack

Tensor = Any  # torch.Tensor


def cuda_index(tensor: Tensor) -> int | None:
    """Number of the CUDA device that a tensor is on; None if it is in the host's memory."""
    device = tensor.device
    return device.index if device.type == "cuda" else None


def current_stream(index: int) -> int:
    """Handle of PyTorch's current stream on a CUDA device."""
    handle: int = torch.cuda.current_stream(index).cuda_stream
    return handle


def new_memory(nbytes: int, index: int) -> Tensor:
    """New tensor of so many bytes on a CUDA device, from PyTorch's allocator, for work on its current stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", index))


def to_dlpack(tensor: Tensor) -> Any:
    """A capsule of DLPack over the memory of a tensor, for work on PyTorch's current stream."""
    return torch.utils.dlpack.to_dlpack(tensor)
