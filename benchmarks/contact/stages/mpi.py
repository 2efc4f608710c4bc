"""Two ranks on one GPU over MPI: all that ``tests/ranks`` holds for them."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from contact.processes import python, run_limited
from contact.task import Task

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""Open MPI wants to be told."""
NOTHING = "none"
"""An engine that there is not, so that a rehearsal starts the ranks and has no cases for them."""


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
    engine = NOTHING if task.rehearse else "mpi"
    command = [mpiexec, "-n", "2", *python("-m", "mpi4py", "-m", "tests.ranks", engine)]
    done = run_limited(command, task.left() - 2, {**AS_ROOT, "CUPYBN_NUM_THREADS": "1"})
    print(done.output[-2500:])
    last = "the time was over" if done.timed_out else done.lines[-1] if done.lines else "nothing was printed"
    count = re.fullmatch(r"(\d+) cases on 2 ranks", last)
    passed = done.returncode == 0 and count is not None and (task.rehearse or int(count[1]) > 0)
    if not task.log.check("two ranks on one GPU", passed, last):
        for line in done.lines[-6:]:
            task.log.note(line)
