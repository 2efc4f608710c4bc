"""Measure batch norm, or another function, on arrays of your own shapes.

On a GPU: time on the device, on buffers that are not in its L2 cache, the share of the bandwidth of a copy that it
reaches at the least possible traffic, time of the host, and how many times as long PyTorch and plain CuPy take. Without
a GPU: time of the NumPy path, and how many times as long PyTorch and plain NumPy take on the CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._calls.checks import check_channel_axis, check_more_than_one_value
from cupybn._cli.extras import optional, progress
from cupybn._cli.measure import (
    AS_LITTLE_AS_POSSIBLE,
    Call,
    CupyGraph,
    Effort,
    Graph,
    Spread,
    TorchGraph,
    cold_sets,
    copy_time,
    device_time,
    host_time,
    release,
    rotate,
)
from cupybn._cli.memory import check_memory, too_large
from cupybn._cli.options import UsageError, add_dtypes, chosen_dtypes, groups, seconds, shape
from cupybn._cli.peers import cupybn_call, torch_call
from cupybn._cli.plain import plain_call
from cupybn._cli.problem import FUSED, OPS, Arrays, Operation, Problem, label, make_arrays, problem_of
from cupybn._cli.table import table

USAGE = "--shape SHAPE [options]"
RATIOS = "x / cupybn: how many times as long x takes. At 2.0 cupybn takes half the time, at 0.5 twice. -: not measured."
"""Note under the table on its last columns."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to its parser."""
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="SHAPE",
        action="append",
        dest="shapes",
        required=True,
        help="such as 32,64,112,112, as it lies in memory; may be given several times",
    )
    parser.add_argument("--op", choices=OPS, default=OPS[0], help="layer and RMS norm are over the last axis")
    add_dtypes(parser, default="float32")
    parser.add_argument("--channel-axis", type=int, default=1, metavar="AXIS", help="from either end (default: 1)")
    parser.add_argument("--groups", type=groups, default=32, help="of channels, for group_norm (default: 32)")
    parser.add_argument("--backward", action="store_true", help="the gradients, too")
    parser.add_argument("--relu", action="store_true", help="with a fused ReLU")
    parser.add_argument("--residual", action="store_true", help="with a residual that is added before ReLU")
    parser.add_argument("--seconds", type=seconds, default=0.2, metavar="S", help="for each measurement (default: 0.2)")


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for, print a table and return the exit status."""
    check_fusion(options)
    problems = [
        problem_of(options.op, shape, dtype, channel_axis(shape, options), options.groups)
        for dtype in chosen_dtypes(options.dtypes, ("float32",))
        for shape in options.shapes
    ]
    jobs = [(problem, operation) for problem in problems for operation in operations(options)]
    missing = cuda_missing()
    if missing:
        row, effort, sets = cpu_row, Effort(options.seconds, burst=1), 1
        note = f"No GPU: {missing}.\nMeasuring the NumPy path on the CPU, time of the host alone."
    elif hasattr(import_cupy(), "emulator"):
        row, effort, sets = gpu_row, AS_LITTLE_AS_POSSIBLE, AS_LITTLE_AS_POSSIBLE.most_sets
        note = "This CuPy is the stand-in that runs kernels on the CPU: the times below say nothing of a GPU."
    else:
        row, effort, sets = gpu_row, Effort(options.seconds), 0  # whether GPU memory is enough, allocations will show
        note = ""
    for job in jobs:
        check_memory(*job, sets)
    if note:
        print(note, flush=True)
    rows = []
    for problem, operation in progress(jobs, "case"):
        try:
            rows.append(row(problem, operation, effort))
        except Exception as error:
            if out_of_memory(error):
                raise too_large(problem, str(error).partition("\n")[0]) from error
            raise
    print(table(CPU_HEAD if missing else GPU_HEAD, rows))
    print(f"\n{RATIOS}")
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether this is the error that NumPy, CuPy or PyTorch raise if there is too little memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the latter is PyTorch's


def arrays_of(problem: Problem, xp: Any, sets: int = 1) -> list[Arrays]:
    """Arrays to measure with. An error in making them, except for too little memory, is one of ``--shape``."""
    try:
        return make_arrays(problem, xp, sets)
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UsageError(f"argument --shape: {problem.name} cannot be made: {reason}") from error


def check_fusion(options: argparse.Namespace) -> None:
    """Raise UsageError for what the function cannot fuse or has no use for."""
    unused = {"--relu": options.relu, "--residual": options.residual, "--channel-axis": options.channel_axis != 1}
    for name in (name for name, given in unused.items() if given and options.op not in FUSED):
        raise UsageError(f"argument {name}: {options.op} has no use for it")


def channel_axis(shape: tuple[int, ...], options: argparse.Namespace) -> int:
    """Channel axis of this shape, counted from the front; UsageError if the function cannot take it or the shape."""
    if options.op not in FUSED:
        return 1
    try:
        axis = check_channel_axis(options.channel_axis, len(shape))
    except ValueError as error:
        raise UsageError(f"argument --channel-axis: {error}") from error
    if axis == 0 and options.op != "batch_norm":
        raise UsageError(f"argument --channel-axis: the first axis of {options.op} is the batch")
    if options.op == "group_norm" and shape[axis] % options.groups:
        raise UsageError(f"argument --groups: {shape[axis]} channels cannot be divided into {options.groups} groups")
    try:
        if options.op == "batch_norm":
            check_more_than_one_value(shape, axis)
    except ValueError as error:
        raise UsageError(f"argument --shape: {error}") from error
    if options.op == "instance_norm" and math.prod(shape) == shape[0] * shape[axis]:
        raise UsageError(f"argument --shape: {options.op} needs more than one position in each sample")
    return axis


def operations(options: argparse.Namespace) -> list[Operation]:
    """Operations that the command line asks for."""
    relu = options.relu or options.residual
    fused = {"activation": "relu" if relu else None, "residual": options.residual, "op": options.op}
    name = " + add" * options.residual + " + ReLU" * relu
    chosen = [Operation(f"training{name}", **fused), Operation(f"inference{name}", training=False, **fused)]
    if options.op != "batch_norm":  # the others do the same in training and inference
        chosen = [Operation(f"forward{name}", **fused)]
    return [*chosen, Operation(f"backward{name}", backward=True, **fused)] if options.backward else chosen


# ---------------------------------------------------------------------------------------------------------------------
# On the CPU

CPU_HEAD = ["shape, operation", "host us", "(quartiles)", "plain NumPy / cupybn", "PyTorch / cupybn"]


def cpu_row(problem: Problem, operation: Operation, effort: Effort) -> list[str]:
    """Cells of a row of the table, for the CPU."""
    (arrays,) = arrays_of(problem, np)
    calls = [cupybn_call(problem, operation, arrays), *cpu_peers(problem, operation, arrays)]
    ours, *theirs = (None if call is None else host_time(call, lambda: None, effort) for call in calls)
    assert ours is not None
    return [label(problem, operation), *cells(ours), *(ratio(peer, ours) for peer in theirs)]


def cpu_peers(problem: Problem, operation: Operation, arrays: Arrays) -> list[Call | None]:
    """Calls of plain NumPy and PyTorch to compare with; None for those that cannot be measured."""
    torch = optional("torch")
    plain = None if problem.dtype.name == "bfloat16" else plain_call(np, problem, operation, arrays)
    return [plain, None if torch is None else torch_call(torch, problem, operation, arrays)]


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

GPU_HEAD = [
    "shape, operation",
    *("device us", "(quartiles)", "MB at least", "share of copy", "host us"),
    *("PyTorch / cupybn", "plain CuPy / cupybn"),
]


class Measured(NamedTuple):
    """Times of one library, on the device and on the host."""

    device: Spread
    host: Spread


def gpu_row(problem: Problem, operation: Operation, effort: Effort) -> list[str]:
    """Cells of a row of the table, for a GPU."""
    cupy = import_cupy()
    l2 = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["l2CacheSize"]
    nbytes = int(operation.passes * problem.nbytes)
    arrays = arrays_of(problem, cupy, cold_sets(nbytes, l2, effort))
    synchronize = cupy.cuda.Device().synchronize

    def graph(calls: Sequence[Call]) -> Graph:
        return CupyGraph(calls, keep=True)

    ours = measure(lambda a: cupybn_call(problem, operation, a), arrays, graph, synchronize, effort)
    copy = copy_time(nbytes, l2, effort)
    plain = None
    if problem.dtype.name != "bfloat16" and operation.op != "dropout":  # a graph need not take CuPy's random numbers
        plain = measure(lambda a: plain_call(cupy, problem, operation, a), arrays, graph, synchronize, effort)
    return [
        label(problem, operation),
        *cells(ours.device),
        f"{nbytes / 1e6:.1f}",
        f"{copy.median / ours.device.median:.2f}",
        f"{ours.host.median:.0f}",
        ratio(torch_on_gpu(problem, operation, arrays, effort), ours.device),
        ratio(plain and plain.device, ours.device),
    ]


def torch_on_gpu(problem: Problem, operation: Operation, arrays: Sequence[Arrays], effort: Effort) -> Spread | None:
    """Time of PyTorch on the device; None if PyTorch is missing or finds no GPU."""
    torch = optional("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return measure(
            lambda a: torch_call(torch, problem, operation, a),
            arrays,
            lambda calls: TorchGraph(calls, True, torch, stream),
            torch.cuda.synchronize,
            effort,
        ).device


def measure(
    call_of: Callable[[Arrays], Call],
    arrays: Sequence[Arrays],
    graph_of: Callable[[Sequence[Call]], Graph],
    synchronize: Call,
    effort: Effort,
) -> Measured:
    """Times of one library: on the device with all sets of buffers in turn, on the host with the first set."""
    calls = [call_of(a) for a in arrays]
    device = device_time(graph_of(rotate(calls, effort)), effort)
    release()
    return Measured(device, host_time(calls[0], synchronize, effort))


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def cells(time: Spread) -> list[str]:
    """Cells for the median and the quartiles of a time."""
    return [f"{time.median:.1f}", f"({time.low:.1f}..{time.high:.1f})"]


def ratio(theirs: Spread | None, ours: Spread) -> str:
    """Cell for a ratio: how many times as long they take as we do."""
    return "-" if theirs is None else f"{theirs.median / ours.median:.2f}"
