"""Ranks are started here, under whichever MPI there is; tests and benchmarks share it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

RANK_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "CUPYBN_NUM_THREADS": "1",
}
"""What every rank gets: one thread; and what Open MPI wants to be told before it runs as root, as in a container, and
more ranks than there are cores. Others do not read it."""


def find_mpiexec() -> str | None:
    """The launcher of the MPI that is installed beside Python, or of the system."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
