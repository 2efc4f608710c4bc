"""One rank's view of all ranks: its device, the communicator that layers get, and its share of an array."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from cupybn import SyncBatchNorm
from tests.reference import bits, to_numpy

TIMEOUT = 30.0
"""Seconds for a rank that compiles kernels while the others wait."""


class World(NamedTuple):
    """Where a case runs."""

    engine: str
    """"mpi", "cuda-aware", "cupyx" or "nccl"."""
    xp: Any
    device: str
    comm: Any
    """For layers."""
    mpi: Any
    """For the cases themselves."""

    @property
    def rank(self) -> int:
        return self.mpi.rank

    @property
    def size(self) -> int:
        return self.mpi.size

    @property
    def host_sees(self) -> bool:
        """Whether the host knows what ranks have sent each other."""
        return self.engine in ("mpi", "cuda-aware")

    @property
    def random(self) -> np.random.Generator:
        """The same numbers on every rank."""
        return np.random.default_rng(self.size)

    def layer(self, *args, **kwargs) -> SyncBatchNorm:
        return SyncBatchNorm(*args, **{"comm": self.comm, "device": self.device, "timeout": TIMEOUT, **kwargs})

    def share(self, array, sizes):
        """The samples of this rank, if ranks have so many."""
        begin = sum(sizes[: self.rank])
        return self.xp.asarray(array[begin : begin + sizes[self.rank]])

    def uneven(self, least=0):
        """Numbers of samples of the ranks: the second has the least, the last one sample, the others more and more."""
        sizes = [2 + rank for rank in range(self.size)]
        sizes[-1], sizes[1] = 1, least
        return sizes

    def gather(self, array):
        """The whole of which each rank has a share, on the host of each."""
        return np.concatenate(self.mpi.allgather(to_numpy(array)))

    def everywhere(self, *arrays):
        """The bits of these arrays, which must be the same on every rank."""
        mine = bits(*arrays)
        assert all(theirs == mine for theirs in self.mpi.allgather(mine))
        return mine

    @contextlib.contextmanager
    def all_raise(self, expected, match, *arrays):
        """Every rank raises, and all arrays are as before."""
        before = bits(*arrays)
        with pytest.raises(expected, match=match):
            yield
        assert bits(*arrays) == before
        self.mpi.Barrier()


def arrays_of(layer):
    return list(layer.state_dict().values())


def fill(layer, rng):
    """Give every array of the layer values of its own; the same on all ranks, if rng is."""
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
    """All that can be had here, or those with these engines, one after the other."""
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
        if "cuda-aware" in engines and emulated:  # whose memory is that of the host
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("cupybn._ranks.engines.cuda_aware", lambda: True)
                yield World("cuda-aware", cupy, device, mpi, mpi)
        if {"cupyx", "nccl"} & set(engines) and (emulated or count >= mpi.size):  # NCCL wants a GPU for each rank
            from cupyx.distributed import init_process_group

            backend = init_process_group(mpi.size, mpi.rank, use_mpi=True)
            yield World("cupyx", cupy, device, backend, mpi)
            yield World("nccl", cupy, device, backend._comm, mpi)
