"""Loses rank 1 in the middle of a forward pass: a signal kills it, or stops it, which no launcher notices.

    mpiexec -n 3 python -m tests.ranks.lost SIGSTOP 2 FOLDER

Each rank writes the number of its process into the folder and, if it survives, the error that it got, and when.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from cupybn import SyncBatchNorm
from cupybn._steps import numpy_ops
from tests.reference import bits


def main() -> None:
    """Run two passes; rank 1 is lost in the second one."""
    how, timeout, folder = getattr(signal, sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    comm = MPI.COMM_WORLD
    (folder / f"process{comm.rank}").write_text(str(os.getpid()))
    layer = SyncBatchNorm(3, device="cpu", comm=comm, timeout=timeout)
    x = np.random.default_rng(comm.rank).standard_normal((4, 3, 2)).astype(np.float32)
    comm.Barrier()
    layer(x)
    comm.Barrier()
    arrays = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    before, began = bits(*arrays), time.monotonic()
    if comm.rank == 1:
        # The signal comes after bn_stats and before the exchange.
        numpy_ops.merge_moments = lambda _: os.kill(os.getpid(), how)
    try:
        layer(x)
    except RuntimeError as error:
        told = f"{time.monotonic() - began:.1f}\n{error}\n{'unchanged' if bits(*arrays) == before else 'changed'}"
        (folder / f"told{comm.rank}").write_text(told)
        raise
    (folder / f"went_on{comm.rank}").touch()


if __name__ == "__main__":
    main()
