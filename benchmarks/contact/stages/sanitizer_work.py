"""The program that Compute Sanitizer's tools watch: all kernels on small arrays, each in memory of its own."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from contact import insides
from contact.task import Task

SHAPES = (
    *(((4, 5, 7, 7), 1), ((3, 4, 3, 3), 1), ((2, 2, 4099), 1), ((37, 16), 1)),
    *(((37, 3), 1), ((6, 5, 4, 64), 3), ((2, 2, 70000), 1)),
)
"""Shapes and their channel axes."""
FEW_ELEMENTS = 200
"""Elements that a shape must have fewer than to be part of a rehearsal."""
DONE = "the work is done"


def run(task: Task) -> None:
    """Call every function on every shape, as far as there is time: under a tool all of it is slow."""
    import cupy

    if not insides.is_stand_in():
        cupy.cuda.set_allocator(None)  # CuPy's pool would lay arrays side by side, and hide an access beyond one
    cases = list(product(SHAPES, insides.dtypes()[:3]))
    if task.rehearse:
        cases = [((shape, axis), dtype) for (shape, axis), dtype in cases if math.prod(shape) < FEW_ELEMENTS][:1]
    until = ""
    for (shape, axis), dtype in cases:
        if task.left() < 0:
            until = f", as far as there was time: until {shape} {dtype.name}"
            break
        all_functions(shape, axis, dtype)
    cupy.cuda.Device().synchronize()
    print(f"{DONE}{until}", flush=True)


def all_functions(shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> None:
    """Call every function: both modes, forward and backward, bare and fused, in place, and the moments."""
    import cupy

    import cupybn.functional as F

    rng, C = np.random.default_rng(0), shape[axis]
    x, dy, residual = (cupy.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(3))
    weight, bias, mean = (cupy.asarray(rng.standard_normal(C).astype(np.float32)) for _ in range(3))
    var = cupy.asarray(rng.uniform(0.5, 1, C).astype(np.float32))
    for (r, activation), training in product(((None, None), (residual, "relu")), (True, False)):
        options = {"channel_axis": axis, "activation": activation, "residual": r}
        _, vjp_fn = F.batch_norm_vjp(x, mean, var, weight, bias, training, **options)
        vjp_fn(dy)
    F.batch_norm(x, mean, var, weight, bias, True, channel_axis=axis, out=x)
    F.moments(dy, channel_axis=axis)
