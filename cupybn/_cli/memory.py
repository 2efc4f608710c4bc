"""Check that the arrays of `bench` fit into the memory of the host.

An allocation that is too large need not fail: Linux promises more memory than there is, and kills a program that uses
it. So free memory is looked at beforehand.
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
"""Numbers of arrays of x's size: the arguments x, dy and residual, and the temporaries, in float32 or wider, as
measured for plain NumPy, which needs most."""


def check_memory(problem: Problem, operation: Operation, sets: int) -> None:
    """Raise UsageError if so many sets of arrays do not fit into the memory of the host."""
    wide = math.prod(problem.shape) * max(problem.dtype.itemsize, np.dtype(np.float32).itemsize)
    temporaries = TEMPORARIES_BACKWARD if operation.backward else TEMPORARIES
    needed, free = sets * (ARGUMENTS * problem.nbytes + temporaries * wide), free_bytes()
    if needed > free:
        raise too_large(problem, f"{operation.name} needs about {needed / GIB:,.1f} GiB, {free / GIB:,.1f} are free")


def too_large(problem: Problem, reason: object) -> UsageError:
    """Error for arrays that do not fit in memory."""
    return UsageError(f"argument --shape: {problem.name} does not fit in memory: {reason}")


def free_bytes() -> float:
    """Bytes of free memory on the host, as Linux tells them; infinite on other systems."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        free += [int(kib) * 1024 for kib in re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())]
    with contextlib.suppress(OSError, ValueError):  # without a limit the file says "max"
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(free)
