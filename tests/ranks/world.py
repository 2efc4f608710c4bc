"""One rank's view of all ranks: its device, the communicator that layers get, and its share of an array."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupybn import SyncBatchNorm
from tests.reference import bits, to_numpy

TIMEOUT = 30.0
"""Seconds to wait for other ranks, which may have to compile kernels first."""


class World(NamedTuple):
    """An engine and a kind of arrays that cases run with, as one rank sees them."""

    engine: str
    """Name of the engine: "mpi", "cuda-aware", "cupyx" or "nccl"."""
    xp: Any
    device: str
    comm: Any
    """Communicator that layers get."""
    mpi: Any
    """Communicator of mpi4py through which the cases themselves talk."""

    @property
    def rank(self) -> int:
        return self.mpi.rank

    @property
    def size(self) -> int:
        return self.mpi.size

    @property
    def host_sees(self) -> bool:
        """Whether the host looks at what ranks send each other, so that faults are raised at once."""
        return self.engine in ("mpi", "cuda-aware")

    @property
    def random(self) -> np.random.Generator:
        """A generator that gives the same numbers on every rank."""
        return np.random.default_rng(self.size)

    def layer(self, *args, **kwargs) -> SyncBatchNorm:
        return SyncBatchNorm(*args, **{"comm": self.comm, "device": self.device, "timeout": TIMEOUT, **kwargs})

    def share(self, array, sizes):
        """This rank's samples of a whole array; `sizes` has the number of samples of each rank."""
        begin = sum(sizes[: self.rank])
        return self.xp.asarray(array[begin : begin + sizes[self.rank]])

    def uneven(self, least=0):
        """The number of samples of each rank: the second has `least`, the last has one, the others more and more."""
        sizes = [2 + rank for rank in range(self.size)]
        sizes[-1], sizes[1] = 1, least
        return sizes

    def gather(self, array):
        """The whole array on every rank's host, from the share of each rank."""
        return np.concatenate(self.mpi.allgather(to_numpy(array)))

    def everywhere(self, *arrays):
        """The bits of arrays, after a check that every rank has the same."""
        mine = bits(*arrays)
        assert all(theirs == mine for theirs in self.mpi.allgather(mine))
        return mine

    @contextlib.contextmanager
    def all_raise(self, expected, match, *arrays):
        """Check that the block raises on every rank, and changes no array."""
        before = bits(*arrays)
        with pytest.raises(expected, match=match):
            yield
        assert bits(*arrays) == before
        self.mpi.Barrier()


def arrays_of(layer):
    return list(layer.state_dict().values())


def fill(layer, rng):
    """Set every array of the layer to values of its own, the same on all ranks if `rng` is."""
    for name, array in layer.state_dict().items():
        values = 5 if name == "num_batches_tracked" else rng.uniform(0.5, 2, array.shape)
        array[...] = layer_xp(layer).asarray(values).astype(array.dtype)
    return layer


def layer_xp(layer):
    if layer.device == "cpu":
        return np
    import cupy

    return cupy


def worlds(mpi, engines):
    """All worlds that this machine has for the given engines (by default all), one after the other."""
    engines = engines or ["mpi", "cuda-aware", "cupyx", "nccl"]
    if "mpi" in engines:
        yield World("mpi", np, "cpu", mpi, mpi)
    import cupy

    emulated = hasattr(cupy, "emulator")
    count = cupy.cuda.runtime.getDeviceCount()
    device = f"cuda:{mpi.rank % count}"
    with cupy.cuda.Device(mpi.rank % count):
        if "mpi" in engines:
            yield World("mpi", cupy, device, mpi, mpi)
        # The stand-in's device memory is memory of the host, which any MPI can send.
        if "cuda-aware" in engines and emulated:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("cupybn._ranks.engines.cuda_aware", lambda: True)
                yield World("cuda-aware", cupy, device, mpi, mpi)
        # NCCL needs a GPU of its own for each rank.
        if {"cupyx", "nccl"} & set(engines) and (emulated or count >= mpi.size):
            from cupyx.distributed import init_process_group

            backend = init_process_group(mpi.size, mpi.rank, use_mpi=True)
            yield World("cupyx", cupy, device, backend, mpi)
            yield World("nccl", cupy, device, backend._comm, mpi)
