"""The way back of second order on CuPy arrays: `bn_double_backward_*` as a share of copy bandwidth, beside PyTorch's.

What is measured is the way back of the input's gradient, as a gradient penalty has it: from one cotangent to the
gradients of dy, input and weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gpu_exact

import cupybn.functional as F
from cupybn._arrays.devices import import_cupy
from cupybn._arrays.dtypes import parameter_dtype
from cupybn._cli.extras import optional
from cupybn._cli.measure import (
    Call,
    CupyGraph,
    Effort,
    Graph,
    TorchGraph,
    cold_sets,
    copy_time,
    device_time,
    release,
    rotate,
)
from cupybn._cli.peers import to_torch
from cupybn._cli.problem import EPS, MOMENTUM, Arrays, Problem, make_arrays

Record = dict[str, Any]

PASSES = 8
"""Least traffic in sizes of x: x, dy and the cotangent for the sums; them again, and the gradients of dy and x."""
ARRAYS = 5
"""Arrays of the size of x that a call works on."""


class Shape(NamedTuple):
    """A shape in memory order, as the layout names its axes, and a dtype."""

    layout: str
    sizes: tuple[int, ...]
    dtype: str

    @property
    def problem(self) -> Problem:
        """The shape as a problem of `cupybn bench`."""
        return Problem(self.sizes, parameter_dtype(self.dtype), self.layout.index("C"))

    @property
    def name(self) -> str:
        """The shape's name in tables."""
        return f"{self.layout} {'x'.join(map(str, self.sizes))} {self.dtype}"


SHAPES = (
    Shape("NCHW", (32, 256, 56, 56), "float32"),
    Shape("NHWC", (32, 56, 56, 256), "float32"),
    Shape("NCHW", (32, 64, 112, 112), "bfloat16"),
    Shape("NHWC", (32, 112, 112, 64), "bfloat16"),
    Shape("NC", (65536, 256), "float32"),
)
TINY = (Shape("NCHW", (2, 3, 4, 4), "float32"), Shape("NHWC", (2, 4, 4, 8), "bfloat16"))


def record(shape: Shape, effort: Effort) -> Record:
    """The figures of a shape: cupybn's, and PyTorch's as far as it can be asked."""
    cupy = import_cupy()
    try:
        return _record(cupy, shape, effort)
    finally:
        release()
        cupy.get_default_memory_pool().free_all_blocks()


def _record(cupy: Any, shape: Shape, effort: Effort) -> Record:
    problem = shape.problem
    device = cupy.cuda.runtime.getDevice()
    l2_bytes = int(cupy.cuda.runtime.getDeviceProperties(device)["l2CacheSize"])
    arrays = make_arrays(problem, cupy, cold_sets(ARRAYS * problem.nbytes, l2_bytes, effort))
    graph: Graph = CupyGraph(rotate([cupybn_call(problem, a) for a in arrays], effort), keep=True)
    time = device_time(graph, effort)
    errors = gpu_exact.second_order(cupy, problem, arrays[0], graph.results[-1])
    del graph
    release()
    copy = copy_time(PASSES * problem.nbytes, l2_bytes, effort)
    found = {
        **{"case": shape.name, "us": time._asdict(), "copy_us": copy._asdict()},
        **{"share_of_copy": copy.median / time.median, "error_over_allowed": errors.over_allowed},
    }
    torch = optional("torch")
    if torch is None or not torch.cuda.is_available():
        return found
    try:
        found["torch_us"] = torch_time(torch, problem, arrays, effort)
        found["torch_ratio"] = found["torch_us"]["median"] / time.median
    except Exception as error:  # it is what is beside cupybn: its failure is told, and no more
        found["torch_error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def cupybn_call(problem: Problem, a: Arrays) -> Call:
    """Call of cupybn; the residual of the arrays is the cotangent of the input's gradient."""
    arguments = (a.running_mean, a.running_var, a.weight, a.bias, True, MOMENTUM, EPS)
    vjp_fn = F.batch_norm_vjp(a.x, *arguments, channel_axis=problem.channel_axis)[1]
    second_vjp_fn = vjp_fn.vjp(a.dy)[1]
    return lambda: second_vjp_fn((a.residual, None, None, None))


def torch_time(torch: Any, problem: Problem, arrays: Sequence[Arrays], effort: Effort) -> Record:
    """Time of PyTorch's own way back of second order on the same memory."""
    stream = torch.cuda.Stream()  # autograd uses the stream of the forward pass, which must be the captured one
    with torch.cuda.stream(stream):
        calls = [torch_call(torch, problem, a) for a in arrays]
        return device_time(TorchGraph(rotate(calls, effort), False, torch, stream), effort)._asdict()


def torch_call(torch: Any, problem: Problem, a: Arrays) -> Call:
    """Call of PyTorch."""
    x, dy, cdx = (to_torch(torch, array, problem.channel_axis) for array in (a.x, a.dy, a.residual))
    vectors = [to_torch(torch, vector) for vector in a[3:]]
    if x.dtype == torch.float64:  # PyTorch takes no narrower vectors beside float64 data
        vectors = [vector.double() for vector in vectors]
    weight, bias, running_mean, running_var = vectors
    leaves = [tensor.detach().requires_grad_() for tensor in (dy, x, weight)]
    y = torch.nn.functional.batch_norm(leaves[1], running_mean, running_var, leaves[2], bias, True, MOMENTUM, EPS)
    (dx,) = torch.autograd.grad(y, leaves[1], leaves[0], create_graph=True)
    return lambda: torch.autograd.grad(dx, leaves, cdx, retain_graph=True)
