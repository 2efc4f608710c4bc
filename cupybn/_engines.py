"""How ranks reach each other: the systems that programs already run, behind one small protocol.

Nothing is imported here: whoever has a communicator has imported what it comes from. (mpi4py starts MPI when it is
imported, and `cupyx.distributed` imports mpi4py.)
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cupybn._devices import describe, empty, import_cupy, kind
from cupybn._watch import watch_of

Array = Any  # numpy.ndarray or cupy.ndarray
Header = npt.NDArray[np.float64]
Start = Callable[[Array, Array], Any]  # a collective of MPI: from, to

TEXT = 256
"""Bytes of a text that ranks exchange; what is longer is cut."""
SPINS = 1000
"""Looks at a message before a rank lets go of its processor between two of them."""
LONGEST_NAP = 1e-3
"""Seconds between two looks."""


class Engine(Protocol):
    """What `SyncBatchNorm` wants of a group of ranks. All of them make the same calls in the same order.

    Rows are (1, n) arrays of float64. Headers are few numbers of the host, which travel with them. They come back as
    None if the host does not see what is exchanged: it does not wait for the device.
    """

    rank: int
    size: int
    kinds: tuple[str, ...]
    """Of arrays: "numpy", "cupy"."""

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """The rows of all ranks in their order, (size, n), and their headers."""
        ...

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """The sums over all ranks, (1, n), the same bits on each of them, and those of their headers."""
        ...

    def texts(self, text: str) -> list[str]:
        """The texts of all ranks. The host waits for them."""
        ...


def engine_for(comm: Any, timeout: float | None) -> Engine:
    """The engine of a communicator.

    Raises
    ------
    TypeError
        If it is none that is known.
    ValueError
        If this process is not in it.
    """
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(comm).__mro__}
    if "mpi4py.MPI.Comm" in names:
        return MPIEngine(comm, timeout)
    if "cupyx.distributed._nccl_comm.NCCLBackend" in names:
        return NCCLEngine(comm._comm, timeout)
    if any(name.endswith(".nccl.NcclCommunicator") for name in names):
        return NCCLEngine(comm, timeout)
    if all(hasattr(comm, name) for name in ("rank", "size", "kinds", "gather", "sum", "texts")):
        engine: Engine = comm
        return engine
    raise TypeError(
        "expected comm to be a communicator of mpi4py, an NCCLBackend of cupyx.distributed, a "
        f"cupy.cuda.nccl.NcclCommunicator or None (got {describe(comm)})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# MPI


class MPIEngine:
    """An intracommunicator of mpi4py.

    Collectives do not block, so that a rank that waits for another one can give up. CuPy arrays go through pinned
    memory of the host, or as they are where MPI says that it knows GPUs.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    timeout : float or None
        Seconds after which a rank gives up waiting. None waits for ever.
    """

    kinds: tuple[str, ...] = ("numpy", "cupy")

    def __init__(self, comm: Any, timeout: float | None) -> None:
        if not comm:
            raise ValueError("expected comm to be a communicator of this process (got MPI.COMM_NULL)")
        if comm.Is_inter():
            raise TypeError("expected comm to be an intracommunicator (got an intercommunicator)")
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._comm, self._timeout = comm, timeout
        self._lost: str | None = None
        self._staging: dict[tuple[int, int], _Staging] = {}

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """See `Engine`."""
        return self._exchange(self._comm.Iallgather, self.size, row, header)

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """See `Engine`."""
        total, headers = self._exchange(self._comm.Iallreduce, 1, row, header)
        return total, headers[0]

    def texts(self, text: str) -> list[str]:
        """See `Engine`."""
        received = np.zeros((self.size, TEXT), np.uint8)
        sent = _encode(text)
        self._wait([self._comm.Iallgather(sent, received)], (sent, received))
        return [_decode(row) for row in received]

    def _exchange(self, start: Start, rows: int, row: Array, header: Header) -> tuple[Array, Header]:
        """Start a collective whose result has so many rows, and wait for it."""
        self._check_alive()
        if kind(row) == "cupy" and cuda_aware():
            import_cupy().cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
            received, headers = empty((rows, row.size), row), np.empty((rows, header.size))
            requests = [start(header, headers), start(row, received)]
            self._wait(requests, (row, received, header, headers))
            return received, headers
        # Header and row in one message.
        h, n = header.size, row.size
        if kind(row) == "numpy":
            sent, host = np.concatenate([header, row[0]]), np.empty((rows, h + n))
            self._wait([start(sent, host)], (sent, host))
            return host[:, h:], host[:, :h]
        if (rows, h + n) not in self._staging:
            self._staging[rows, h + n] = _Staging(rows, h + n)
        staging = self._staging[rows, h + n]
        staging.download(header, row)
        self._wait([start(staging.sent, staging.received)], staging)
        return staging.upload(row)[:, h:], staging.received[:, :h].copy()

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise RuntimeError(self._lost)

    def _wait(self, requests: list[Any], buffers: object) -> None:
        """Until all requests are done, or the time is over."""
        self._check_alive()
        began, looks = time.monotonic(), 0
        try:
            while not all(request.Test() for request in requests):
                waited = time.monotonic() - began
                if self._timeout is not None and waited > self._timeout:
                    raise RuntimeError(
                        f"rank {self.rank} expected all {self.size} ranks to exchange statistics within "
                        f"{self._timeout:g} s: one has died, is late, or does not make the same calls"
                    )
                looks += 1
                time.sleep(0 if looks < SPINS else min(waited / 50, LONGEST_NAP))
        except BaseException as error:
            _abandon(self._comm, requests, buffers)
            self._lost = f"rank {self.rank} has lost the other ranks: {error}"
            if isinstance(error, Exception) and type(error) is not RuntimeError:
                raise RuntimeError(self._lost) from error
            raise


_abandoned: list[tuple[Any, list[Any], object]] = []
"""Communicators, requests and buffers of exchanges that never ended: MPI may still write into their memory."""


def _abandon(comm: Any, requests: list[Any], buffers: object) -> None:
    if not _abandoned:
        atexit.register(_abort_if_lost)
    _abandoned.append((comm, requests, buffers))


def _abort_if_lost() -> None:
    """At the end of a process: MPI would wait for the ranks that it has lost, for ever."""
    for comm, requests, _ in _abandoned:
        try:
            lost = not all(request.Test() for request in requests)
        except Exception:
            lost = True
        if lost:
            sys.stdout.flush()
            sys.stderr.flush()
            comm.Abort(1)


class _Staging:
    """Pinned memory of the host, which a message passes on its way between the device and MPI."""

    def __init__(self, rows: int, n: int) -> None:
        cuda = import_cupy().cuda
        self.sent = np.frombuffer(cuda.alloc_pinned_memory(n * 8), np.float64, n)
        self.received = np.frombuffer(cuda.alloc_pinned_memory(rows * n * 8), np.float64, rows * n).reshape(rows, n)
        self._uploaded: Any = None

    def download(self, header: Header, row: Array) -> None:
        """Header and row as one message, when the stream has come so far."""
        if self._uploaded is not None:
            self._uploaded.synchronize()  # long ago, unless the stream is another one now
        self.sent[: header.size] = header
        row[0].get(out=self.sent[header.size :])

    def upload(self, like: Array) -> Array:
        """What has been received, on the device."""
        rows = empty(self.received.shape, like)
        rows.set(self.received)
        self._uploaded = import_cupy().cuda.get_current_stream().record()
        return rows


@functools.cache
def cuda_aware() -> bool:
    """Whether MPI says that it takes memory of GPUs.

    ``CUPYBN_CUDA_AWARE_MPI=0`` or ``1`` overrules it. MPI 4.1 says so in an info of every communicator; older ones have
    the function that Open MPI has invented.
    """
    overruled = os.environ.get("CUPYBN_CUDA_AWARE_MPI")
    if overruled:
        return overruled == "1"
    MPI = sys.modules["mpi4py.MPI"]
    kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
    if "cuda" in kinds:
        return True
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


# ---------------------------------------------------------------------------------------------------------------------
# NCCL


class NCCLEngine:
    """An NCCL communicator of CuPy, on the current stream: the host waits for nothing and sees nothing.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
        Of the device of the arrays.
    timeout : float or None
        Seconds that a message may take. Then the communicator is aborted, which ends it on the device, and the next
        call raises. None waits for ever.
    """

    kinds: tuple[str, ...] = ("cupy",)

    def __init__(self, comm: Any, timeout: float | None) -> None:
        self.rank: int = comm.rank_id()
        self.size: int = comm.size()
        self._comm, self._timeout = comm, timeout
        self._watch = watch_of(comm)

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:  # noqa: ARG002
        """See `Engine`."""
        cupy = import_cupy()
        rows = cupy.empty((self.size, row.size))
        rows.data.memset_async(0xFF, rows.nbytes)  # NaN, which moves no running statistics, if it is aborted
        with self._watch.over(cupy.cuda.get_current_stream(), self._timeout) as stream:
            self._comm.allGather(row.data.ptr, rows.data.ptr, row.size, cupy.cuda.nccl.NCCL_FLOAT64, stream.ptr)
        return rows, None

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:  # noqa: ARG002
        """See `Engine`."""
        cupy = import_cupy()
        total, nccl = cupy.empty((1, row.size)), cupy.cuda.nccl
        with self._watch.over(cupy.cuda.get_current_stream(), self._timeout) as stream:
            self._comm.allReduce(row.data.ptr, total.data.ptr, row.size, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, stream.ptr)
        return total, None

    def texts(self, text: str) -> list[str]:
        """See `Engine`."""
        row = import_cupy().asarray(_encode(text).view(np.float64)[None])
        rows, _ = self.gather(row, np.empty(0))
        return [_decode(row.view(np.uint8)) for row in rows.get()]


def _encode(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)


def _decode(row: npt.NDArray[np.uint8]) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="ignore")
