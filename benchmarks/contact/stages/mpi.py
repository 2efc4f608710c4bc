"""Two ranks on one GPU over MPI: all that ``tests/ranks`` holds for them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from contact.processes import python, run_limited
from contact.task import Task

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""Open MPI wants to be told."""


def run(task: Task) -> None:
    """Run them, where there is an MPI that works."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        task.log.skip("no mpiexec here")
        return
    usable = run_limited(python("-c", "from mpi4py import MPI"), 20, AS_ROOT)
    if usable.returncode != 0:
        task.log.skip(f"no MPI that mpi4py can use: {usable.lines[-1] if usable.lines else 'it does not say why'}")
        return
    command = [mpiexec, "-n", "2", *python("-m", "mpi4py", "-m", "tests.ranks", "mpi")]
    done = run_limited(command, task.left() - 2, {**AS_ROOT, "CUPYBN_NUM_THREADS": "1"})
    print(done.output[-2500:])
    last = "the time was over" if done.timed_out else done.lines[-1] if done.lines else "nothing was printed"
    if not task.log.check("two ranks on one GPU", done.returncode == 0, last):
        for line in done.lines[-6:]:
            task.log.note(line)
