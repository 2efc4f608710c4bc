"""The steps of instance, group, layer and RMS norm, whose statistics are those of rows within a sample: forth and back.

    input       -> norm_forward, norm_update_running -> output, running statistics
    grad_output -> norm_backward, norm_parameters    -> gradients of the input, and of weight and bias

Each of these is there twice: `numpy_norms` computes, `cupy_norms` launches a kernel.
"""

from __future__ import annotations

import math
from typing import Any

from cupybn._arrays.devices import empty_like, zeros_like
from cupybn._calls.call import Call, Checked
from cupybn._calls.saved import Saved
from cupybn._steps import cupy_norms
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Statistics
from cupybn._steps.ops import norms_for

Array = Any  # numpy.ndarray or cupy.ndarray

RECORDED = cupy_norms
"""The steps whose launches are recorded on tapes."""


def ops_for_call(call: Call) -> Any:
    """The steps for a call; None where the call has no elements, and there is nothing to do."""
    return norms_for(call.input) if call.input.size else None


def forward_steps(ops: Any, call: Call, out: Array | None, checked: Checked, for_vjp: bool) -> list[Array | None]:
    """New output, in the order of memory, if there is no `out`; and what is saved for the way back, or None for each.

    That is `Statistics.pairs` and the record of ReLU. The last is what only batch norm saves.
    """
    layout, norm = checked.layout, checked.norm
    made = layout.empty(call.input) if out is None else None
    if ops is None:
        return [made, None, None, None]
    residual, activation, _, _ = call.epilogue
    x, residual = layout.view(call.input), layout.view(residual)
    y = layout.view(out) if made is None else made.reshape(layout.shape)
    recorded = for_vjp and residual is not None and activation is not None
    passed = ops.empty_passed(x, norm, residual, y) if recorded else None
    epilogue = Epilogue(residual, activation, passed)
    statistics = ops.norm_forward(x, norm, _flat(call.affine), epilogue, y, for_vjp or checked.moves)
    if checked.moves:
        rows = statistics.pairs.shape[0]
        ops.norm_update_running(statistics, call.running, call.input.size / rows)
    return [made, statistics.pairs if for_vjp else None, passed, None]


def backward_steps(saved: Saved, grad_output: Array) -> list[Array | None]:
    """Gradients of input, residual, weight and bias: new arrays, those of the first two in the order of memory.

    That of the residual is there if ReLU stops it somewhere.
    """
    ops, checked, _, input, pairs, affine, epilogue, _ = saved
    layout, passed = checked.layout, epilogue.passed
    alignment = input.nbytes // passed.size if passed is not None and passed.size else 1  # bytes of a pack
    dx = layout.empty(input, alignment)
    dresidual = None if passed is None else layout.empty(input, alignment)
    new = zeros_like if ops is None else empty_like  # without elements no step is there to fill them, and sums are 0
    weight, bias, _ = affine
    dweight, dbias = None if weight is None else new(weight), None if bias is None else new(bias)
    results = [dx, dresidual, dweight, dbias]
    if ops is None:
        return results
    shape, wanted = layout.shape, dweight is not None or dbias is not None
    gradients = Gradients(dx.reshape(shape), None if dresidual is None else dresidual.reshape(shape))
    dy, x = layout.view(grad_output), layout.view(input)
    sums = ops.norm_backward(dy, x, checked.norm, Statistics(pairs), _flat(affine), epilogue, gradients, wanted)
    if wanted:
        ops.norm_parameters(sums, _flattened(dweight), _flattened(dbias))
    return results


def _flat(affine: Affine) -> Affine:
    """Weight and bias as vectors, with an element for each channel."""
    weight, bias, eps = affine
    return Affine(_flattened(weight), _flattened(bias), eps)


def _flattened(parameter: Array | None) -> Array | None:
    """A parameter as a vector: a view, or a copy where its memory order does not allow one."""
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(math.prod(parameter.shape))
