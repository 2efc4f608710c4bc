"""Compare every kernel with its NumPy mirror, on this machine's GPU.

Every function, every dtype, aligned and unaligned memory, training and eval mode, with and without residual, ReLU and
masks, shapes of both memory layouts. A number of the table is the largest error, as a share of what is allowed.
Without a GPU the mirrors are compared with a plain formula instead. The exit status is 1 if anything is off by more
than it may be, or if there was nothing to check.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._arrays.dtypes import FLOATS
from cupybn._cli.checked import CHECKED, Shapes
from cupybn._cli.extras import progress
from cupybn._cli.options import add_dtypes, chosen_dtypes
from cupybn._cli.problem import OPS
from cupybn._cli.sides import worst
from cupybn._cli.table import table
from cupybn._steps.sources import kernel_names

MOST_LISTED = 20
"""Most calls that are listed one by one under the table."""

USAGE = "[options]"
SHAPES = CHECKED["batch_norm"].shapes(quick=False)
"""Shapes (N, C, L) of batch norm, by layout."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check` to its parser."""
    parser.add_argument(
        "--op",
        choices=OPS,
        action="append",
        dest="ops",
        help="a function, may be given several times (default: batch_norm, and two shapes of the others)",
    )
    parser.add_argument("--quick", action="store_true", help="two shapes of each layout")
    add_dtypes(parser, default="all")


class Job(NamedTuple):
    """A call to check. All calls of one row and dtype share a cell of the table."""

    op: str
    row: str
    step: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    variant: Any

    def describe(self) -> str:
        """Text for this call in the list of errors or misses."""
        words = [*self.variant.words(), *(["unaligned"] if self.offset else [])]
        return f"{self.row}, {CHECKED[self.op].axes} = {self.shape}, {self.dtype.name}, {', '.join(words)}"


def run(options: argparse.Namespace) -> int:
    """Check what the options ask for, print a table and return the exit status."""
    dtypes, missing = chosen_dtypes(options.dtypes, FLOATS), cuda_missing()
    if missing:
        print(f"There are no kernels to check here: {missing}.\nChecking the NumPy mirrors against a plain formula.")
    ops = options.ops or OPS
    shapes = {op: CHECKED[op].shapes(options.quick or op not in (options.ops or OPS[:1])) for op in dict.fromkeys(ops)}
    if missing:
        found = check(mirror_jobs(dtypes, shapes), 1, 2)
    else:
        found = check(kernel_jobs(dtypes, shapes), 0, 1)
    status = report(found, dtypes)
    if missing:
        print("No kernel has run: only their NumPy mirrors were compared, with a plain formula in NumPy.")
    elif hasattr(import_cupy(), "emulator"):
        print("No GPU was there: the kernels have run on the CPU, through the stand-in for CuPy.")
    return status


def kernel_jobs(dtypes: Sequence[np.dtype[Any]], shapes: dict[str, Shapes]) -> list[Job]:
    """Calls for all kernels of some functions. Those outside of the two layout folders get the shapes for channels
    first.
    """
    jobs = []
    for name in kernel_names():
        layout, _, step = name.rpartition("/")
        for op, of_layout in shapes.items():
            jobs += jobs_of(op, name, step, of_layout.get(layout or "channels_first", []), dtypes)
    return jobs


def mirror_jobs(dtypes: Sequence[np.dtype[Any]], shapes: dict[str, Shapes]) -> list[Job]:
    """Calls for all mirrors, without unaligned memory, which makes no difference to NumPy."""
    every = {op: [shape for of_one in of_layout.values() for shape in of_one] for op, of_layout in shapes.items()}
    jobs = [job for op in shapes for step in CHECKED[op].steps for job in jobs_of(op, step, step, every[op], dtypes)]
    return [job for job in jobs if not job.offset]


def jobs_of(
    op: str, row: str, step: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]
) -> list[Job]:
    """Calls for a row of the table, none if the function has no such step."""
    known = CHECKED[op].steps.get(step)
    return [
        Job(op, row, step, shape, dtype, offset, variant)
        for dtype in dtypes
        for index, shape in enumerate(shapes)
        for offset in ((0, 1) if index == 0 else (0,))
        for variant in (known.variants if known else ())
    ]


class Found(NamedTuple):
    """Outcome of a call."""

    share: float
    """Largest error as a share of its bound; infinite if the call has raised."""
    result: str
    """Name of the result in which the error is largest."""
    raised: str = ""
    """Text of the error that the call has raised; empty if it has not."""


def check(jobs: Sequence[Job], ours: int, referee: int) -> dict[Job, Found]:
    """Outcomes of calls, by call, where one side is compared with the other; they are given by their places."""
    found = {}
    for job in progress(jobs, "call"):
        checked = CHECKED[job.op]
        case = checked.case(job.shape, job.dtype, job.offset, job.variant)
        try:
            run = checked.steps[job.step].run
            found[job] = Found(*worst(case, run, checked.sides[ours], checked.sides[referee]))
        except Exception as error:  # go on: if one kernel does not compile or run, others may
            found[job] = Found(math.inf, "", f"{type(error).__name__}: {error}".partition("\n")[0])
    return found


def report(found: dict[Job, Found], dtypes: Sequence[np.dtype[Any]]) -> int:
    """Print the table and all that is wrong. Returns the exit status: 1 if anything is, or if nothing was checked."""
    if not found:
        print("Nothing was checked.")
        return 1
    raised = {call.raised for call in found.values()}
    if len(raised) == 1 and "" not in raised:
        print(f"All {len(found)} calls have raised the same error: {raised.pop()}")
        return 1
    cells: dict[tuple[str, str], list[Found]] = {}
    for job, call in found.items():
        cells.setdefault((job.row, job.dtype.name), []).append(call)
    rows = [
        [row, *(cell(cells[row, dtype.name]) for dtype in dtypes)] for row in dict.fromkeys(job.row for job in found)
    ]
    print(table(["largest error / allowed", *(dtype.name for dtype in dtypes)], rows))
    errors = [f"  {job.describe()}: {call.raised}" for job, call in found.items() if call.raised]
    if errors:
        print(f"\n{len(errors)} of {len(found)} calls have raised an error:", *errors[:MOST_LISTED], sep="\n")
    misses = [
        f"  {job.describe()}: {call.result}, {call.share:.3g} times"
        for job, call in found.items()
        if call.share > 1 and not call.raised
    ]
    if misses:
        print(
            f"\n{len(misses)} of {len(found)} calls are off by more than is allowed:", *misses[:MOST_LISTED], sep="\n"
        )
    if errors or misses:
        return 1
    print(f"\nAll {len(found)} calls are within their bounds.")
    return 0


def cell(calls: Sequence[Found]) -> str:
    """Text for a cell of the table: the largest error of its calls."""
    return "error" if any(call.raised for call in calls) else f"{max(call.share for call in calls):.2f}"
