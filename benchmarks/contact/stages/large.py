"""Tries arrays of more than 2^31 elements, whose indices need 64 bits."""

from __future__ import annotations

import math
import time
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from contact.task import Task
from cupybn._cli.problem import Array, Arrays, Problem, make_arrays

SHAPES = {1: (33, 2, 32_600_007), -1: (33_600_001, 64)}
TINY = {1: (3, 2, 1001), -1: (501, 4)}
"""Shapes of a rehearsal, by their channel axis."""
ARRAYS = 3
"""Arrays of the large size that are in memory at the same time."""
PIECE = 100
"""Elements that are compared at the beginning and at the end of a sample; for (N, C) arrays, so many samples."""
CHUNK = 1 << 24
"""Elements that are summed in one piece."""
EPS = 1e-5


class Results(NamedTuple):
    """What the library computed for a problem."""

    y: Array
    dx: Array
    mean: Array
    var: Array


def run(task: Task) -> None:
    """Try both layouts, if the memory is large enough."""
    import cupy

    for axis, shape in (TINY if task.rehearse else SHAPES).items():
        problem = Problem(shape, np.dtype(np.float16), axis)
        need = ARRAYS * problem.nbytes + (2 << 30)
        free = cupy.cuda.runtime.memGetInfo()[0]
        if free < need and not task.rehearse:
            task.log.skip(f"{problem.name}, left out: needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
            continue
        with task.log.checking(f"{problem.name}, {math.prod(shape) / 2**31:.2f} x 2^31 elements") as details:
            details += try_problem(problem)
        cupy.get_default_memory_pool().free_all_blocks()


def try_problem(problem: Problem) -> list[str]:
    """Compare a training step with plain CuPy in float64: in some channels, at both ends of some samples."""
    import cupy

    import cupybn.functional as F

    (arrays,) = make_arrays(problem, cupy)
    arrays = arrays._replace(dy=None, residual=None)  # frees their memory for what follows
    options: dict[str, Any] = {"channel_axis": problem.channel_axis}
    began = time.monotonic()
    mean, var = F.moments(arrays.x, **options)
    y, vjp_fn = F.batch_norm_vjp(arrays.x, None, None, arrays.weight, arrays.bias, True, eps=EPS, **options)
    dx = vjp_fn(y).input
    cupy.cuda.Device().synchronize()
    seconds = time.monotonic() - began
    C = problem.channels
    for channel in sorted({0, C // 2, C - 1}):
        try_channel(problem, arrays, Results(y, dx, mean, var), channel)
    return [f"{seconds:.1f} s"]


def try_channel(problem: Problem, arrays: Arrays, found: Results, channel: int) -> None:
    """Compare one channel: statistics of all its elements, output and gradient of the first and the very last ones."""
    x, y, dx = (of_three_axes(problem, array) for array in (arrays.x, found.y, found.dx))
    mean, var = moments(x[:, channel])
    assert abs(float(found.mean[channel]) - mean) < 1e-5, (
        f"mean of channel {channel}: {found.mean[channel]}, not {mean}"
    )
    assert abs(float(found.var[channel]) - var) < 1e-4 * var, (
        f"var of channel {channel}: {found.var[channel]}, not {var}"
    )
    scale, bias = float(arrays.weight[channel]) / math.sqrt(var + EPS), float(arrays.bias[channel])
    N, _, L = x.shape
    n = 1 if L > 1 else PIECE
    samples = (slice(0, n), slice(N // 2, N // 2 + n), slice(N - n, N))
    for place in product(samples, (channel,), (slice(0, PIECE), slice(-PIECE, None))):
        error = abs((x[place].astype(np.float64) - mean) * scale + bias - y[place].astype(np.float64)).max()
        assert float(error) < 2e-2, f"output at {place} is off by {float(error)}"
        # dy is y, a linear function of x: without its mean and its slope nothing but rounding is left.
        largest = abs(dx[place].astype(np.float64)).max()
        assert float(largest) < 2e-2, f"gradient at {place} is {float(largest)}, not 0"


def of_three_axes(problem: Problem, array: Array) -> Array:
    """The array as (N, C, L), a view of the same memory."""
    return array.reshape(problem.shape[0], problem.channels, -1)


def moments(x: Any) -> tuple[float, float]:
    """Mean and variance of an (N, L) array in float64, some samples at a time."""
    total = square = 0.0
    rows = max(1, CHUNK // x.shape[1])
    for begin in range(0, len(x), rows):
        part = x[begin : begin + rows].astype(np.float64)
        total += float(part.sum())
        square += float((part * part).sum())
    mean = total / x.size
    return mean, square / x.size - mean * mean
