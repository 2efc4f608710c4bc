"""Runs ``python -m cupybn check``, which compares every kernel with its mirror."""

from __future__ import annotations

from contact import insides
from contact.processes import python, run_limited
from contact.task import Task

MOST_MISSES = 8


def run(task: Task) -> None:
    """Run the command as users do; in a rehearsal with ``--quick``."""
    missing = insides.cuda_missing()
    if missing:  # without CuPy the command compares the mirrors with a formula, which tells nothing here
        task.log.check("python -m cupybn check", False, missing)
        return
    options = ["--quick", "--dtype", "float32"] if task.rehearse else []
    done = run_limited(python("-m", "cupybn", "check", *options), task.left() - 2)
    print("\n".join(done.lines[-45:]))
    for line in [line for line in done.lines if line.endswith(" times")][:MOST_MISSES]:
        task.log.note(line.strip())
    last = "the time was over" if done.timed_out else done.lines[-1] if done.lines else "it printed nothing"
    task.log.check("python -m cupybn check", done.returncode == 0, last)
