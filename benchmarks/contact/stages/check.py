"""Runs ``python -m cupybn check``, which compares every kernel with its mirror: a process for each dtype, at once."""

from __future__ import annotations

import contextlib

from contact import insides
from contact.processes import Ended, LimitedProcess, python
from contact.task import Task

MOST_MISSES = 8


def run(task: Task) -> None:
    """Run the command as users do; in a rehearsal with ``--quick``, for one dtype.

    A process compiles one kernel at a time, also on several threads.
    """
    missing = insides.cuda_missing()
    if missing:  # without CuPy the command compares the mirrors with a formula, which tells nothing here
        task.log.check("python -m cupybn check", False, missing)
        return
    dtypes = ["float32"] if task.rehearse else [dtype.name for dtype in insides.dtypes()]
    quick = ["--quick"] if task.rehearse else []
    seconds = task.left() - 2
    with contextlib.ExitStack() as stack:
        running = {}
        for dtype in dtypes:
            running[dtype] = LimitedProcess(python("-m", "cupybn", "check", "--dtype", dtype, *quick), seconds)
            stack.callback(running[dtype].kill)
        for dtype, process in running.items():
            judge(task, dtype, process.wait())


def judge(task: Task, dtype: str, done: Ended) -> None:
    """Enter the result of the command for a dtype."""
    print("\n".join(done.lines[-45:]))
    for line in [line for line in done.lines if line.endswith(" times")][:MOST_MISSES]:
        task.log.note(line.strip())
    last = "the time was over" if done.timed_out else done.lines[-1] if done.lines else "it printed nothing"
    task.log.check(f"python -m cupybn check --dtype {dtype}", done.returncode == 0, last)
