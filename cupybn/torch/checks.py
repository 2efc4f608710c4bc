"""Checks of what is a tensor's own: class, layout, device and dtype. All else is checked as that of arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from cupybn._arrays.dtypes import FLOATS
from cupybn._arrays.kinds import describe, kind

Tensor = Any  # torch.Tensor

DTYPES = frozenset(getattr(torch, name) for name in FLOATS)
"""Dtypes that batch norm takes."""


def check_mode() -> None:
    """Check that nobody but autograd follows what is computed: they would not see it, and take it for a constant."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "cupybn.torch is not implemented under the transforms of torch.func (grad, vjp, jvp, vmap, ...): use "
            "torch.autograd.grad, which takes gradients of second order, too"
        )
    if torch.jit.is_tracing() or get_proxy_mode() is not None:
        raise NotImplementedError(
            "cupybn.torch cannot be traced by torch.jit or exported: use the layers of torch.nn, which take the same "
            "state dict"
        )


def check_no_tangents(*tensors: Tensor | None) -> None:
    """Check that no tensor has a tangent, which forward mode would take along: before anything has moved."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "gradients in forward mode are not implemented in cupybn.torch: use torch.autograd.grad, or the layers of "
            "torch.nn, which take the same state dict"
        )


def check_tensor(name: str, tensor: Tensor, like: Tensor = None, other: str = "input") -> None:
    """Check for a dense tensor of a dtype that batch norm takes, on the device of ``like``, named as ``other``."""
    if not isinstance(tensor, torch.Tensor):
        way_out = f": use torch.as_tensor({name})" if kind(tensor) is not None else ""
        raise TypeError(f"expected {name} to be a torch.Tensor (got {describe(tensor)}){way_out}")
    cls = type(tensor)
    if cls is not torch.Tensor and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"expected {name} to be a tensor with memory of its own (got {cls.__qualname__})")
    if tensor.layout is not torch.strided:
        raise TypeError(f"expected {name} to be dense (got {tensor.layout}): use {name}.to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"expected {name} to be on the CPU or a CUDA device (got a tensor on {tensor.device})")
    if tensor.dtype not in DTYPES:
        way_out = ": complex numbers are not supported" if tensor.dtype.is_complex else f": use {name}.float()"
        raise TypeError(f"expected {name} of dtype {', '.join(FLOATS)} (got {_name(tensor.dtype)}){way_out}")
    if like is not None:
        check_beside(name, tensor, like, other)


def check_beside(name: str, tensor: Tensor, like: Tensor, other: str) -> None:
    """Check for a tensor on the device of ``like``, which is named as ``other``."""
    if tensor.device != like.device:
        ways = [f"{name}.to({str(like.device)!r})", f"{other}.to({str(tensor.device)!r})"]
        ways = sorted(ways, key=lambda way: "cpu" in way)  # to a GPU first
        raise TypeError(
            f"expected {name} to be on {like.device} like {other} (got a tensor on {tensor.device}): all tensors of a "
            f"call are on one device, use {' or '.join(ways)}"
        )


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Check for a tensor of the input's device, dtype and shape."""
    check_tensor("residual", residual, input)
    if residual.dtype != input.dtype:
        raise TypeError(
            f"expected residual of the input's dtype {_name(input.dtype)} (got {_name(residual.dtype)}): use "
            "residual.to(input.dtype)"
        )
    if residual.shape != input.shape:
        shape = tuple(input.shape)
        try:
            way_out = ": use residual.expand_as(input)" if residual.expand(shape) is not None else ""
        except RuntimeError:
            way_out = ""
        raise ValueError(f"expected residual of the input's shape {shape} (got {tuple(residual.shape)}){way_out}")


def check_savable(name: str, tensor: Tensor) -> None:
    """Check for a tensor that autograd can save, before anything has moved."""
    if tensor.is_inference():
        raise RuntimeError(f"inference tensors cannot be saved for the way back (got {name}): use {name}.clone()")


def check_buffer(name: str, buffer: Tensor, moves: bool) -> None:
    """Check for running statistics of which no gradient is asked and, where they move, each element has memory."""
    if buffer.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"expected {name} not to require grad, as it gets none: use {name}.detach()")
    if moves and buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"inference tensors cannot be updated in place outside of inference mode (got {name}): use {name}.clone()"
        )
    if moves and any(stride == 0 and n > 1 for n, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        raise ValueError(
            f"expected {name} to have memory for each element (got strides {buffer.stride()} for shape "
            f"{tuple(buffer.shape)}): use {name}.clone()"
        )


def check_counter(counter: Tensor, input: Tensor) -> None:
    """Check for an int64 tensor without axes beside the input: a counter that is increased in place."""
    way_out = f": use layer.num_batches_tracked = torch.tensor(n, device={str(input.device)!r})"
    if not isinstance(counter, torch.Tensor) or counter.dtype != torch.int64 or counter.device != input.device:
        given = f"{_name(counter.dtype)} on {counter.device}" if isinstance(counter, torch.Tensor) else type(counter)
        raise TypeError(f"expected num_batches_tracked to be an int64 tensor beside input (got {given}){way_out}")
    if counter.shape != ():
        raise ValueError(f"expected num_batches_tracked of shape () (got {tuple(counter.shape)}){way_out}")


def _name(dtype: Any) -> str:
    """Name of a dtype, without that of its module."""
    return str(dtype).removeprefix("torch.")
