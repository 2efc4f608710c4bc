"""Runs all cases on all ranks; stops at the first one that fails on any rank, and says why."""

from __future__ import annotations

import sys
import traceback
import warnings

import pytest
from mpi4py import MPI

from tests.ranks import batches, faults, masks, moments
from tests.ranks.world import worlds


def main() -> None:
    """Run all cases in all worlds."""
    warnings.simplefilter("error")
    comm = MPI.COMM_WORLD
    cases = [
        case
        for module in (batches, masks, faults, moments)
        for name, case in vars(module).items()
        if name.startswith("test_")
    ]
    ran = 0
    for world in worlds(comm.Dup(), sys.argv[1:]):
        for case in cases:
            if comm.rank == 0:
                print(f"{case.__name__} ({world.engine}, {world.device})", flush=True)
            failure = None
            try:
                case(world)
            except (Exception, pytest.fail.Exception):
                failure = traceback.format_exc()
            failures = comm.allgather(failure)
            if any(failures):
                if comm.rank == 0:
                    wrong = [rank for rank, text in enumerate(failures) if text]
                    print(f"fails on ranks {wrong}; on the first one:")
                    print(failures[wrong[0]], flush=True)
                comm.Barrier()
                comm.Abort(1)
            ran += 1
    if comm.rank == 0:
        print(f"{ran} cases on {comm.size} ranks")


if __name__ == "__main__":
    main()
