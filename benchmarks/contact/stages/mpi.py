"""Runs the cases of ``tests/ranks`` on two ranks that share one GPU, over MPI."""

from __future__ import annotations

import re

from contact import insides
from contact.processes import python, run_limited
from contact.task import Task

NOTHING = "none"
"""Name of an engine that does not exist: a rehearsal starts the ranks, which then have no cases to run."""


def run(task: Task) -> None:
    """Run the ranks, where there is an MPI that works."""
    mpiexec = insides.find_mpiexec()
    if mpiexec is None:
        task.log.skip("no mpiexec here")
        return
    usable = run_limited(python("-c", "from mpi4py import MPI"), 20, insides.RANK_ENVIRONMENT)
    if usable.returncode != 0:
        task.log.skip(f"no MPI that mpi4py can use: {usable.lines[-1] if usable.lines else 'it does not say why'}")
        return
    engine = NOTHING if task.rehearse else "mpi"
    command = [mpiexec, "-n", "2", *python("-m", "mpi4py", "-m", "tests.ranks", engine)]
    done = run_limited(command, task.left() - 2, insides.RANK_ENVIRONMENT)
    print(done.output[-2500:])
    last = "the time was over" if done.timed_out else done.lines[-1] if done.lines else "nothing was printed"
    count = re.fullmatch(r"(\d+) cases on 2 ranks", last)
    passed = done.returncode == 0 and count is not None and (task.rehearse or int(count[1]) > 0)
    if not task.log.check("two ranks on one GPU", passed, last):
        for line in done.lines[-6:]:
            task.log.note(line)
