"""Batch norm by cupybn, by plain NumPy or CuPy and by PyTorch, as calls without arguments that return tuples.

The first item of a tuple is the output of a forward pass or, of a backward pass, the gradient of the input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import cupybn.functional as F
from cupybn._arrays.kinds import kind
from cupybn._cli.measure import Call
from cupybn._cli.problem import Array, Arrays, Operation, Problem

EPS, MOMENTUM = 1e-5, 0.1
"""PyTorch's defaults, with which all of them compute."""


def cupybn_call(problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of cupybn. A forward pass in training is one of `batch_norm_vjp`, as programs that train make it."""
    vectors = a.running_mean, a.running_var, a.weight, a.bias
    options: dict[str, Any] = {"activation": operation.activation, "channel_axis": problem.channel_axis}
    if operation.residual:
        options["residual"] = a.residual
    if operation.backward:
        vjp_fn = F.batch_norm_vjp(a.x, *vectors, True, MOMENTUM, EPS, **options)[1]
        return lambda: vjp_fn(a.dy)
    if operation.training:
        return lambda: F.batch_norm_vjp(a.x, *vectors, True, MOMENTUM, EPS, **options)
    return lambda: (F.batch_norm(a.x, *vectors, False, MOMENTUM, EPS, **options),)


def plain_call(xp: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of batch norm as one writes it in NumPy or CuPy. Statistics of data narrower than float32 are in float32."""
    axis = problem.channel_axis % len(problem.shape)
    others = tuple(i for i in range(len(problem.shape)) if i != axis)
    wide = np.promote_types(problem.dtype, np.float32)
    count = a.x.size / problem.channels

    def column(vector: Array) -> Array:
        return vector.reshape([-1 if i == axis else 1 for i in range(len(problem.shape))])

    weight, bias, running_mean, running_var = map(column, a[3:])

    def statistics() -> tuple[Array, Array]:
        if not operation.training:
            return running_mean, running_var
        mean = a.x.mean(axis=others, dtype=wide, keepdims=True)
        var = a.x.var(axis=others, dtype=wide, keepdims=True)
        for running, batch in (running_mean, mean), (running_var, var * (count / (count - 1))):
            running *= 1 - MOMENTUM
            running += MOMENTUM * batch
        return mean, var

    def forward() -> tuple[Array, ...]:
        mean, var = statistics()
        y = (a.x - mean) * (weight / xp.sqrt(var + EPS)) + bias
        if operation.residual:
            y += a.residual
        if operation.activation:
            y = xp.maximum(y, 0)
        return (y.astype(problem.dtype, copy=False),)

    if not operation.backward:
        return forward
    mean, var = statistics()
    rstd, y = 1 / xp.sqrt(var + EPS), forward()[0]

    def backward() -> tuple[Array, ...]:
        dy = a.dy * (y > 0) if operation.activation else a.dy
        xhat = (a.x - mean) * rstd
        dbias = dy.sum(axis=others, dtype=wide, keepdims=True)
        dweight = (dy * xhat).sum(axis=others, dtype=wide, keepdims=True)
        dx = weight * rstd * (dy - (dbias + xhat * dweight) / count)
        return dx.astype(problem.dtype, copy=False), dweight, dbias, dy

    return backward


def to_torch(torch: Any, array: Array, channel_axis: int = 0) -> Any:
    """Tensor on the same memory, with the channels on axis 1, where PyTorch has them."""
    is_bfloat16 = array.dtype.name == "bfloat16"
    bits = array.view(np.int16) if is_bfloat16 else array
    tensor = torch.from_numpy(bits) if kind(array) == "numpy" else torch.from_dlpack(bits)
    if is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.movedim(channel_axis, 1) if tensor.ndim > 1 else tensor


def torch_call(torch: Any, problem: Problem, operation: Operation, a: Arrays) -> Call:
    """Call of PyTorch's own functions on the same memory: batch norm, addition and ReLU one after the other.

    A backward pass goes through autograd. It must run on the stream that is current now.
    """
    x, dy, residual = (to_torch(torch, array, problem.channel_axis) for array in a[:3])
    weight, bias, running_mean, running_var = (to_torch(torch, vector) for vector in a[3:])
    if x.dtype == torch.float64:  # PyTorch takes no narrower vectors beside float64 data
        weight, bias, running_mean, running_var = (v.double() for v in (weight, bias, running_mean, running_var))
    batch_norm, relu = torch.nn.functional.batch_norm, torch.nn.functional.relu

    def forward(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        y = batch_norm(x, running_mean, running_var, weight, bias, operation.training, MOMENTUM, EPS)
        if operation.residual:
            y = y.add_(residual)
        return relu(y, inplace=True) if operation.activation else y

    if operation.backward:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight, bias)]
        y = forward(*leaves)
        wanted = leaves if operation.residual else [leaves[0], *leaves[2:]]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def call() -> tuple[Any, ...]:
        with torch.no_grad():
            return (forward(x, residual, weight, bias),)

    return call
