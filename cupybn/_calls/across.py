"""The steps of batch norm, whose statistics go across samples: forth and back.

    input       -> bn_forward in training    -> output, running statistics
                   bn_normalize in eval mode -> output
    grad_output -> bn_backward               -> gradients

Each of these is there twice: `numpy_ops` computes, `cupy_ops` launches a kernel. bn_forward stands for bn_stats and
then bn_normalize, bn_backward for bn_backward_reduce and then bn_backward_input. On a GPU these two are one launch
where a channel fits on chip (`cupybn._steps.resident`); where the batch is spread over ranks, they exchange statistics
or sums in between (`cupybn._ranks.synchronized`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybn._arrays.devices import empty, empty_like, zeros_like
from cupybn._calls.call import Call, Checked
from cupybn._calls.saved import Saved
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps import cupy_ops
from cupybn._steps.bundles import Epilogue, Gradients, Statistics
from cupybn._steps.observer import Observed
from cupybn._steps.ops import ops_for

Array = Any  # numpy.ndarray or cupy.ndarray

RECORDED = cupy_ops
"""The steps whose launches are recorded on tapes."""


def forward_steps(ops: Any, call: Call, out: Array | None, checked: Checked, for_vjp: bool) -> list[Array | None]:
    """New output, in the order of memory, if there is no `out`; and what is saved for the way back, or None for each.

    That is `Statistics.pairs`, the record of ReLU, and `Statistics.count_left`.
    """
    layout = checked.layout
    made = layout.empty(call.input) if out is None else None
    if ops is None:
        return [made, _statistics_of_nothing(call, layout.shape[1]).pairs if for_vjp else None, None, None]
    residual, activation, _, mask = call.epilogue
    x, residual = layout.view(call.input), layout.view(residual)
    y = layout.view(out) if made is None else made.reshape(layout.shape)
    mask = None if mask is None else layout.view_mask(mask)
    recorded = for_vjp and residual is not None and activation is not None
    passed = ops.empty_passed(x, residual, y, mask) if recorded else None
    affine, running = call.affine, call.running_for_steps(checked.moves)
    epilogue = Epilogue(residual, activation, passed, mask)
    if call.training:
        scratch = y if out is None else None  # `out` may be the input or the residual, which are still read
        statistics = ops.bn_forward(x, affine, running, epilogue, y, for_vjp, scratch)
    else:
        statistics = ops.bn_normalize(x, None, affine, running, epilogue, y, for_vjp)
    if statistics is None:
        return [made, None, passed, None]
    return [made, statistics.pairs, passed, statistics.count_left]


def _statistics_of_nothing(call: Call, channels: int) -> Statistics:
    """Statistics of a call without elements: the running ones in eval mode, and NaN for a batch, which has none."""
    if not call.training:
        return Statistics.of(call.running.mean, call.running.var)
    pairs = empty((channels, 2), call.input, np.float64)
    pairs.fill(np.nan)
    return Statistics(pairs)


def backward_steps(saved: Saved, grad_output: Array) -> list[Array | None]:
    """Gradients of input, residual, weight and bias: new arrays, in the order of memory.

    That of the residual is there if ReLU or a mask stop it somewhere.
    """
    ops, checked, _, input, pairs, affine, epilogue, count_left = saved
    layout, training = checked.layout, checked.training
    _, _, passed, mask = epilogue
    alignment = input.nbytes // passed.size if passed is not None and passed.size else 1  # bytes of a pack
    dx = layout.empty(input, alignment)
    stopped = passed is not None or (mask is not None and checked.has_residual)
    dresidual = layout.empty(input, alignment) if stopped else None
    new = zeros_like if ops is None else empty_like  # without elements no step is there to fill them, and sums are 0
    weight, bias, _ = affine
    dweight, dbias = None if weight is None else new(weight), None if bias is None else new(bias)
    results = [dx, dresidual, dweight, dbias]
    if ops is None:
        return results
    dy, x, shape = layout.view(grad_output), layout.view(input), layout.shape
    gradients = Gradients(dx.reshape(shape), None if dresidual is None else dresidual.reshape(shape), dweight, dbias)
    statistics = Statistics(pairs, count_left)
    if mask is not None:
        epilogue = epilogue._replace(mask=layout.view_mask(mask))
    if training or dweight is not None or dbias is not None:
        # 1 / the number of values per channel, or 1 where steps divide by what a mask has left; 0 stands for
        # statistics that do not depend on x.
        inv_count = 0.0
        if training and input.size > 0:
            inv_count = shape[1] / input.size if mask is None else 1.0
        ops.bn_backward(dy, x, statistics, affine, epilogue, inv_count, gradients, scratch=gradients.dx)
    else:
        ops.bn_backward_input(dy, x, statistics, affine, epilogue, None, 0.0, gradients)
    return results


def ops_for_call(call: Call) -> Any:
    """The steps for a call: those of `ops_for`, or their `Synchronized` form where the batch is spread over ranks.

    Where the layer is observed, they are `Observed`. None where the call has no elements, and there is nothing to do.
    """
    ops, layer = ops_for(call.input), call.layer
    if layer is not None and layer.group is not None:
        return Synchronized(ops, layer.group, layer.observer, call.running)
    if call.input.size == 0:
        return None
    return ops if layer is None or layer.observer is None else Observed(ops, layer.observer, call.running)
