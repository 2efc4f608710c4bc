"""Whether the arrays of `bench` fit into the memory of the host.

Linux promises more memory than there is, and ends a program that takes it: here a look beforehand has to replace the
error of a failing allocation.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import numpy as np

from cupybn._cli.options import UsageError
from cupybn._cli.problem import Operation, Problem

GIB = 1 << 30
ARGUMENTS, TEMPORARIES, TEMPORARIES_BACKWARD = 3, 3, 7
"""Arrays of x's size: x, dy, residual, and as measured those of plain NumPy, the greediest, in float32 or wider."""


def check_memory(problem: Problem, operation: Operation, sets: int) -> None:
    """Raise where this many sets of arrays are too much for the host."""
    wide = math.prod(problem.shape) * max(problem.dtype.itemsize, np.dtype(np.float32).itemsize)
    temporaries = TEMPORARIES_BACKWARD if operation.backward else TEMPORARIES
    needed, free = sets * (ARGUMENTS * problem.nbytes + temporaries * wide), free_bytes()
    if needed > free:
        raise too_large(problem, f"{operation.name} needs about {needed / GIB:,.1f} GiB, {free / GIB:,.1f} are free")


def too_large(problem: Problem, reason: object) -> UsageError:
    """The error for arrays that do not fit in memory."""
    return UsageError(f"argument --shape: {problem.name} does not fit in memory: {reason}")


def free_bytes() -> float:
    """Bytes of the host's memory that are free, as far as Linux tells; infinite elsewhere."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        free += [int(kib) * 1024 for kib in re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())]
    with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(free)
