"""The function `batch_norm` of tensors, and what it has in common with the layers."""

from __future__ import annotations

from typing import Any

import torch

from cupybn._calls.checks import as_float
from cupybn._calls.tracking import updates_stats
from cupybn._steps.bundles import Running
from cupybn.torch import checks
from cupybn.torch.autograd import BatchNorm, Settings, output_of

Tensor = Any  # torch.Tensor


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Batch normalization of tensors: activation(weight * (input - mean) / sqrt(var + eps) + bias + residual).

    `cupybn.functional.batch_norm` with autograd, of first and second order, and without a copy: CPU tensors are
    computed as NumPy arrays, CUDA tensors as CuPy arrays, on PyTorch's current stream and with its memory.

    Parameters
    ----------
    input : tensor of rank >= 2, float16, bfloat16, float32 or float64
        Channels are on axis 1. All tensors of a call are on one device.
    running_mean, running_var : (C,) tensors or None
        Updated in place in training: running = (1 - momentum) * running + momentum * batch, with the unbiased variance.
        Used as they are otherwise, as constants.
    weight, bias : (C,) tensors or None
        None stands for 1 and 0. These vectors may have any of the dtypes, each its own, and any stride.
    training : bool
    momentum : float
        The weight of the new batch in the running statistics.
    eps : float
        Added to the variance. Positive in training, not negative otherwise.
    residual : tensor of the input's shape and dtype, or None
        Added before the activation. Under autocast it is cast to the input's dtype.
    activation : None or "relu"
        ReLU passes NaN on.

    Returns
    -------
    tensor of the input's shape, dtype and memory order
        An input that is not dense is read through one contiguous copy. A plain tensor, also for subclasses.

    Raises
    ------
    TypeError
        If an argument is not a dense tensor of the right device and dtype, or a number or bool not one.
    ValueError
        As `cupybn.functional.batch_norm`, and if running statistics require grad. Nothing has changed then.
    NotImplementedError
        Under the transforms of ``torch.func``, in forward mode, and where PyTorch traces what is computed.
    RuntimeError
        If a tensor is on a CUDA device, and CuPy is missing.

    Examples
    --------
    >>> import torch
    >>> from cupybn.torch import batch_norm
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, 60.0]], requires_grad=True)  # (N, C)
    >>> running_mean, running_var = torch.zeros(2), torch.ones(2)
    >>> y = batch_norm(x, running_mean, running_var, training=True, activation="relu")
    >>> running_mean
    tensor([0.3000, 3.0000])
    >>> (grad,) = torch.autograd.grad(y[2, 0], x)
    >>> grad[:, 0]
    tensor([ 0.1021, -0.2041,  0.1021])
    """
    running = running_mean, running_var, momentum
    return _batch_norm(input, weight, bias, residual, running, training, eps, activation)


@torch.compiler.disable
def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, float],
    training: bool,
    eps: float,
    activation: str | None,
) -> Tensor:
    """`batch_norm`: beyond here a compiler of PyTorch's does not look."""
    mean, var, momentum = running
    settings = Settings(Running(mean, var, as_float("momentum", momentum)), training, eps, activation)
    return normalized(input, weight, bias, residual, settings)


def normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, settings: Settings
) -> Tensor:
    """The output of a call, which autograd knows how to go back from."""
    checks.check_mode()
    checks.check_tensor("input", input)
    if residual is not None and _is_autocast(input) and isinstance(residual, torch.Tensor):
        residual = residual.to(input.dtype)
    _check(input, weight, bias, residual, settings)
    checks.check_no_tangents(input, weight, bias, residual)
    given: list[Any] = [None if each is None else each.resolve_neg() for each in (input, weight, bias, residual)]
    followed = any(each is not None and each.requires_grad for each in given)
    if not _is_dense(input):
        given[0] = given[0].clone(memory_format=torch.preserve_format)
    if followed and torch.is_grad_enabled():
        for name, tensor in zip(("input", "weight", "bias"), given, strict=False):
            if tensor is not None:
                checks.check_savable(name, tensor)
        return BatchNorm.apply(*given, settings)
    return output_of(tuple(given), settings)


def _check(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, settings: Settings
) -> None:
    """Check the tensors beside the input, as far as they are not checked as arrays."""
    mean, var, _, batches, _ = settings.running
    for name, vector in {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}.items():
        if vector is not None:
            checks.check_tensor(name, vector, input)
    moves = settings.training and mean is not None and updates_stats()
    for name, buffer in {"running_mean": mean, "running_var": var}.items():
        if buffer is not None:
            checks.check_buffer(name, buffer, moves)
    if moves and batches is not None:
        checks.check_counter(batches, input)
    if residual is not None:
        checks.check_residual(residual, input)


def _is_autocast(input: Tensor) -> bool:
    """Whether autocast is on where this tensor is."""
    enabled: bool = torch.is_autocast_enabled(input.device.type)
    return enabled


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill its memory, in any order of its axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
