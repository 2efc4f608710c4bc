"""Compare every kernel with its NumPy mirror, on this machine's GPU.

Every dtype, aligned and unaligned memory, training and eval mode, with and without residual, ReLU and masks, shapes of
both memory layouts. A number of the table is the largest error, as a share of what is allowed. Without a GPU the
mirrors are compared with a plain formula instead. The exit status is 1 if anything is off by more than it may be, or if
there was nothing to check.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import cuda_missing, import_cupy
from cupybn._arrays.dtypes import FLOATS
from cupybn._cli.cases import Case, Variant
from cupybn._cli.extras import progress
from cupybn._cli.options import add_dtypes, chosen_dtypes
from cupybn._cli.sides import FORMULA, KERNELS, MIRRORS, Side, worst
from cupybn._cli.steps import STEPS
from cupybn._cli.table import table
from cupybn._steps.sources import kernel_names

Shape = tuple[int, int, int]
MOST_LISTED = 20
"""Most calls that are listed one by one under the table."""

USAGE = "[options]"

QUICK: dict[str, list[Shape]] = {
    "channels_first": [(6, 5, 49), (4, 3, 64)],
    "channels_last": [(37, 3, 1), (45, 64, 1)],
}
"""Shapes (N, C, L) that ``--quick`` checks, by layout. The first of each is checked in unaligned memory as well."""
SHAPES: dict[str, list[Shape]] = {
    "channels_first": [*QUICK["channels_first"], (300, 2, 40), (2, 130, 3), (2, 2, 4099), (1, 1, 2)],
    "channels_last": [*QUICK["channels_last"], (1029, 3, 1), (45, 301, 1), (9001, 6, 1), (2, 1, 1)],
}
"""Shapes (N, C, L) that are checked without ``--quick``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check` to its parser."""
    parser.add_argument("--quick", action="store_true", help="two shapes of each layout")
    add_dtypes(parser, default="all")


class Job(NamedTuple):
    """A call to check. All calls of one row and dtype share a cell of the table."""

    row: str
    step: str
    shape: Shape
    dtype: np.dtype[Any]
    offset: int
    variant: Variant

    def describe(self) -> str:
        """Text for this call in the list of errors or misses."""
        training, activation, has_residual, masked = self.variant
        words = [
            "training" if training else "eval",
            activation or "no activation",
            *(["residual"] if has_residual else []),
            *(["masked"] if masked else []),
            *(["unaligned"] if self.offset else []),
        ]
        return f"{self.row}, (N, C, L) = {self.shape}, {self.dtype.name}, {', '.join(words)}"


def run(options: argparse.Namespace) -> int:
    """Check what the options ask for, print a table and return the exit status."""
    dtypes, missing = chosen_dtypes(options.dtypes, FLOATS), cuda_missing()
    if missing:
        print(f"There are no kernels to check here: {missing}.\nChecking the NumPy mirrors against a plain formula.")
    shapes = QUICK if options.quick else SHAPES
    if missing:
        found = check(mirror_jobs(dtypes, shapes), MIRRORS, FORMULA)
    else:
        found = check(kernel_jobs(dtypes, shapes), KERNELS, MIRRORS)
    status = report(found, dtypes)
    if missing:
        print("No kernel has run: only their NumPy mirrors were compared, with a plain formula in NumPy.")
    elif hasattr(import_cupy(), "emulator"):
        print("No GPU was there: the kernels have run on the CPU, through the stand-in for CuPy.")
    return status


def kernel_jobs(dtypes: Sequence[np.dtype[Any]], shapes: dict[str, list[Shape]]) -> list[Job]:
    """Calls for all kernels. Those outside of the two layout folders get the shapes for channels first."""
    jobs = []
    for name in kernel_names():
        layout, _, step = name.rpartition("/")
        jobs += jobs_of(name, step, shapes[layout or "channels_first"], dtypes)
    return jobs


def mirror_jobs(dtypes: Sequence[np.dtype[Any]], shapes: dict[str, list[Shape]]) -> list[Job]:
    """Calls for all mirrors, without unaligned memory, which makes no difference to NumPy."""
    every = [shape for layout in shapes.values() for shape in layout]
    return [job for step in STEPS for job in jobs_of(step, step, every, dtypes) if not job.offset]


def jobs_of(row: str, step: str, shapes: Sequence[Shape], dtypes: Sequence[np.dtype[Any]]) -> list[Job]:
    """Calls for a row of the table."""
    return [
        Job(row, step, shape, dtype, offset, variant)
        for dtype in dtypes
        for index, shape in enumerate(shapes)
        for offset in ((0, 1) if index == 0 else (0,))
        for variant in STEPS[step].variants
    ]


class Found(NamedTuple):
    """Outcome of a call."""

    share: float
    """Largest error as a share of its bound; infinite if the call has raised."""
    result: str
    """Name of the result in which the error is largest."""
    raised: str = ""
    """Text of the error that the call has raised; empty if it has not."""


def check(jobs: Sequence[Job], ours: Side, referee: Side) -> dict[Job, Found]:
    """Outcomes of calls, by call, where one side is compared with the other."""
    found = {}
    for job in progress(jobs, "call"):
        case = Case(job.shape, job.dtype, job.offset, job.variant)
        try:
            found[job] = Found(*worst(case, STEPS[job.step].run, ours, referee))
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
