"""Starts ranks under whichever MPI there is, for tests and benchmarks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

RANK_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # read by Open MPI 4
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # read by Open MPI 5
    "CUPYBN_NUM_THREADS": "1",
}
"""Environment variables of every rank: one thread; and permission for Open MPI to run as root, as in a container, and
more ranks than there are cores. Other MPIs do not read these."""


def find_mpiexec() -> str | None:
    """The path of the launcher of the MPI that is installed beside Python, else of the system's."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
