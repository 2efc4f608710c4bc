"""Batch norm and its family by cupybn and by PyTorch, as calls without arguments that return tuples.

The first item of a tuple is the output of a forward pass or, of a backward pass, the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import cupybn.functional as F
from cupybn._arrays.kinds import kind
from cupybn._cli.measure import Call
from cupybn._cli.problem import DROPPED, EPS, FUSED, MOMENTUM, Array, Arrays, Operation, Problem


def positional(problem: Problem, operation: Operation, vectors: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments behind the input, whose order is PyTorch's and ours; vectors are weight, bias and statistics."""
    weight, bias, running_mean, running_var = vectors
    match operation.op:
        case "batch_norm":
            return running_mean, running_var, weight, bias, operation.training, MOMENTUM, EPS
        case "instance_norm":
            return None, None, weight, bias, True, MOMENTUM, EPS
        case "group_norm":
            return problem.groups, weight, bias, EPS
        case "layer_norm":
            return (problem.channels,), weight, bias, EPS
        case "rms_norm":
            return (problem.channels,), weight, EPS
    return DROPPED, True


def cupybn_call(problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of cupybn. A forward pass in training is that of the vjp function, as programs that train make it."""
    function, vjp = getattr(F, operation.op), getattr(F, f"{operation.op}_vjp")
    arguments = positional(problem, operation, a[3:])
    options: dict[str, Any] = {}
    if operation.op in FUSED:
        options |= {"activation": operation.activation, "channel_axis": problem.channel_axis}
    if operation.residual:
        options["residual"] = a.residual
    if operation.backward:
        vjp_fn = vjp(a.x, *arguments, **options)[1]
        return lambda: vjp_fn(a.dy)
    if operation.training:
        return lambda: vjp(a.x, *arguments, **options)
    return lambda: (function(a.x, *arguments, **options),)


def to_torch(torch: Any, array: Array, channel_axis: int = 0) -> Any:
    """Tensor on the same memory, with the channels on axis 1, where PyTorch has them."""
    is_bfloat16 = array.dtype.name == "bfloat16"
    bits = array.view(np.int16) if is_bfloat16 else array
    tensor = torch.from_numpy(bits) if kind(array) == "numpy" else torch.from_dlpack(bits)
    if is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.movedim(channel_axis, 1) if tensor.ndim > 1 else tensor


def torch_call(
    torch: Any, problem: Problem, operation: Operation, a: Arrays, wrapped: Callable[[Any], Any] = lambda of: of
) -> Call:
    """Call of PyTorch's own functions on the same memory: the norm, addition and ReLU one after the other.

    A backward pass goes through autograd. It must run on the stream that is current now. `wrapped` makes another
    function of PyTorch's: `torch.compile`, for example.
    """
    axis = problem.channel_axis if operation.op in FUSED else 1
    x, dy, residual = (to_torch(torch, array, axis) for array in a[:3])
    vectors = [to_torch(torch, vector) for vector in a[3:]]
    if x.dtype == torch.float64:  # PyTorch takes no narrower vectors beside float64 data
        vectors = [vector.double() for vector in vectors]
    function, relu = wrapped(getattr(torch.nn.functional, operation.op)), torch.nn.functional.relu

    def forward(x: Any, residual: Any, *affine: Any) -> Any:
        y = function(x, *positional(problem, operation, (*affine, *vectors[2:])))
        if operation.residual:
            y = y.add_(residual)
        return relu(y, inplace=True) if operation.activation else y

    if operation.backward:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, *vectors[:2])]
        y = forward(*leaves)
        used = (True, operation.residual, operation.op != "dropout", operation.op not in ("rms_norm", "dropout"))
        wanted = [leaf for leaf, use in zip(leaves, used, strict=True) if use]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def call() -> tuple[Any, ...]:
        with torch.no_grad():
            return (forward(x, residual, *vectors[:2]),)

    return call
