"""Engines, through which ranks exchange arrays: MPI and NCCL behind one small protocol, `Engine`.

Neither mpi4py nor NCCL is imported here: a program that has a communicator has imported its module already. (Importing
mpi4py would start MPI, and `cupyx.distributed` imports mpi4py.)
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

from cupybn._arrays.devices import empty, import_cupy
from cupybn._arrays.kinds import describe, kind
from cupybn._ranks.watch import Watch, watch_of

Array = Any  # numpy.ndarray or cupy.ndarray
Header = npt.NDArray[np.float64]
"""Few numbers on the host that a rank sends beside a row: see `Group`."""

TIMEOUT = 20.0
"""Seconds that a rank waits for the others, unless it is told otherwise."""
TEXT = 256
"""Bytes of a text that ranks exchange. All texts have this length, so that they match; longer ones are cut."""


class CapturingError(RuntimeError):
    """Raised where the host would wait for a stream that is being captured in a graph.

    Nothing has been sent. The other ranks, which make the same calls, raise it as well.
    """


class Engine(Protocol):
    """Protocol of a group of ranks, as `SyncBatchNorm` needs it. All ranks make the same calls in the same order.

    A rank sends a row, a (1, n) array of float64 on its device, and beside it a header, a few numbers on the host. An
    engine whose host does not wait for the device cannot see what comes back: it returns None for the headers.
    """

    size: int
    """Number of ranks."""
    timeout: float | None
    """Seconds after which a rank gives up waiting for the others. None waits for ever."""
    lost: str | None
    """Reason why this rank no longer knows what the others wait for; None if it knows.

    A layer that loses the other ranks sets it. After that no layer of the engine sends anything. `engine_for` adds the
    attribute to an engine that has none.
    """

    def check(self, input: Any) -> None:
        """Raise TypeError for an array that cannot be sent."""
        ...

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """Rows of all ranks in their order, (size, n), and their headers, (size, number of numbers)."""
        ...

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """Sum of the rows of all ranks, (1, n), and sum of their headers."""
        ...

    def texts(self, text: str) -> list[str]:
        """Texts of all ranks in their order. The host waits for them."""
        ...


def engine_for(comm: Any, timeout: float | None) -> Engine:
    """Engine of a communicator.

    Raises
    ------
    TypeError
        If this is no communicator of a known kind.
    ValueError
        If this process is not part of it, if it has been aborted, or if ``CUPYBN_CUDA_AWARE_MPI`` is neither 0 nor 1.
    """
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(comm).__mro__}
    if "mpi4py.MPI.Comm" in names:
        return MPIEngine(comm, timeout)
    if "cupyx.distributed._nccl_comm.NCCLBackend" in names:
        return NCCLEngine(comm._comm, timeout)
    if any(name.endswith(".nccl.NcclCommunicator") for name in names):
        return NCCLEngine(comm, timeout)
    if all(hasattr(comm, name) for name in ("size", "check", "gather", "sum", "texts")):
        engine: Engine = comm
        engine.timeout = timeout
        if not hasattr(engine, "lost"):
            engine.lost = None
        return engine
    raise TypeError(
        "expected comm to be a communicator of mpi4py, an NCCLBackend of cupyx.distributed, a "
        f"cupy.cuda.nccl.NcclCommunicator, an engine or None (got {describe(comm)})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# MPI

TAG = 0x6362
"""Tag of the messages between two ranks, "cb" in ASCII. Every MPI has tags up to 0x7fff."""
SPINS = 1000
"""Number of times that a rank looks at a message, a microsecond each, before it sleeps in between: 60 us or more."""
LONGEST_NAP = 1e-3
"""Most seconds that a rank sleeps between two looks at a message."""


class MPIEngine:
    """Engine of an intracommunicator of mpi4py.

    It calls only functions of MPI that do not block, so that a rank that waits for another one can give up.

    CuPy arrays go through pinned memory of the host. Where MPI is CUDA-aware, those that are gathered go as they are,
    each sent from rank to rank: Open MPI takes arrays of a GPU in no collective that does not block, and crashes in
    reductions.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    timeout : float or None
    """

    def __init__(self, comm: Any, timeout: float | None) -> None:
        if not comm:
            raise ValueError("expected comm to be a communicator of this process (got MPI.COMM_NULL)")
        if comm.Is_inter():
            raise TypeError("expected comm to be an intracommunicator (got an intercommunicator)")
        overruled()  # raises for a wrong variable of the environment now, not in the middle of an exchange
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.timeout = timeout
        self._comm = comm
        self._staging: dict[tuple[int, int], _Staging] = {}

    @property
    def lost(self) -> str | None:
        """Reason why the others are lost, as in `Engine`. All engines of this communicator share it."""
        reason: str | None = self._comm.Get_attr(_lost_key())
        return reason

    @lost.setter
    def lost(self, reason: str | None) -> None:
        self._comm.Set_attr(_lost_key(), reason)

    def check(self, input: Any) -> None:
        """Accept any array: MPI can send all of them."""

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """Rows and headers of all ranks, as in `Engine`; the host sees the headers."""
        if kind(row) == "cupy" and cuda_aware():
            return self._gather_on_device(row, header)
        return self._collect(self._comm.Iallgather, self.size, row, header)

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:
        """Sums of the rows and headers of all ranks, as in `Engine`; the host sees those of the headers."""
        total, headers = self._collect(self._comm.Iallreduce, 1, row, header)
        return total, headers[0]

    def texts(self, text: str) -> list[str]:
        """Texts of all ranks, as in `Engine`."""
        sent, received = _encode(text), np.zeros((self.size, TEXT), np.uint8)
        self._wait((sent, received), lambda: self._comm.Iallgather(sent, received))
        return [_decode(row) for row in received]

    def _collect(
        self, collective: Callable[[Array, Array], Any], rows: int, row: Array, header: Header
    ) -> tuple[Array, Header]:
        """Result of a collective, with so many rows. Header and row travel as one message, from memory of the host."""
        h, n = header.size, row.size
        if kind(row) == "numpy":
            sent, received = np.concatenate([header, row[0]]), np.empty((rows, h + n))
            self._wait((sent, received), lambda: collective(sent, received))
            return received[:, h:], received[:, :h]
        if (rows, h + n) not in self._staging:
            self._staging[rows, h + n] = _Staging(rows, h + n)
        staging, result = self._staging[rows, h + n], empty((rows, h + n), row)
        staging.download(header, row)
        self._wait(staging, lambda: collective(staging.sent, staging.received))
        staging.upload(result)
        return result[:, h:], staging.received[:, :h].copy()

    def _gather_on_device(self, row: Array, header: Header) -> tuple[Array, Header]:
        """Rows of all ranks, sent straight from device to device, and headers, which the host gathers."""
        comm, others = self._comm, [rank for rank in range(self.size) if rank != self.rank]
        rows, headers = empty((self.size, row.size), row), np.empty((self.size, header.size))
        rows[self.rank] = row[0]
        import_cupy().cuda.get_current_stream().synchronize()  # MPI does not wait for the stream that computes the row
        self._wait(
            (row, rows, header, headers),
            lambda: comm.Iallgather(header, headers),
            *(functools.partial(comm.Irecv, rows[rank], rank, TAG) for rank in others),
            *(functools.partial(comm.Isend, row, rank, TAG) for rank in others),
        )
        return rows, headers

    def _wait(self, buffers: object, *starts: Callable[[], Any]) -> None:
        """Call functions that return requests of MPI, and wait until all requests are done or the timeout is over."""
        if self.lost is not None:
            raise RuntimeError(self._has_lost(self.lost))
        requests: list[Any] = []
        began, looks = time.monotonic(), 0
        try:
            for start in starts:
                requests.append(start())
            while not all(request.Test() for request in requests):
                waited = time.monotonic() - began
                if self.timeout is not None and waited > self.timeout:
                    raise RuntimeError(
                        f"rank {self.rank} expected all {self.size} ranks to exchange statistics within timeout="
                        f"{self.timeout:g} s: one has died, is busy elsewhere, or does not make the same calls"
                    )
                looks += 1
                if looks < SPINS:
                    _let_others_run()
                else:
                    time.sleep(min(waited / 50, LONGEST_NAP))
        except BaseException as error:
            _abandoned.append((self._comm, requests if len(requests) == len(starts) else None, buffers))
            self.lost = str(error).removeprefix(f"rank {self.rank} ") or type(error).__qualname__
            if isinstance(error, Exception) and type(error) is not RuntimeError:
                raise RuntimeError(self._has_lost(self.lost)) from error
            raise

    def _has_lost(self, reason: str) -> str:
        """Text of the error on a rank that has lost the others."""
        return f"rank {self.rank} has lost the other ranks of this communicator: {reason}"


def _let_others_run() -> None:
    """Let other ranks run, where there are more ranks than processors. Windows has no such function."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()


@functools.cache
def _lost_key() -> int:
    """Key of the attribute in which a communicator of MPI holds `MPIEngine.lost`."""
    key: int = sys.modules["mpi4py.MPI"].Comm.Create_keyval()
    return key


_abandoned: list[tuple[Any, list[Any] | None, object]] = []
"""Exchanges that never ended: their communicators, requests and buffers.

They are kept since MPI may still write into the buffers. Requests are None if not all of them are known.
"""


@atexit.register
def _abort_if_lost() -> None:
    """Abort MPI at the end of a process that has lost other ranks: finalising it would wait for them for ever."""
    for comm, requests, _ in _abandoned:
        try:
            lost = requests is None or not all(request.Test() for request in requests)
        except Exception:
            lost = True
        if lost:
            sys.stdout.flush()
            sys.stderr.flush()
            comm.Abort(1)


class _Staging:
    """Pinned memory of the host that messages pass through between a device and MPI.

    A stream copies from it when it comes to the copy, not when the copy is called. So the host waits for the copy: only
    then may the memory be used for another message, or be freed.
    """

    def __init__(self, rows: int, n: int) -> None:
        cuda = import_cupy().cuda
        self.sent = np.frombuffer(cuda.alloc_pinned_memory(n * 8), np.float64, n)
        self.received = np.frombuffer(cuda.alloc_pinned_memory(rows * n * 8), np.float64, rows * n).reshape(rows, n)

    def download(self, header: Header, row: Array) -> None:
        """Copy header and row into one message. Waits until the stream has computed the row."""
        self.sent[: header.size] = header
        row[0].get(out=self.sent[header.size :])

    def upload(self, rows: Array) -> None:
        """Copy the received message to the device, and wait for the copy."""
        rows.set(self.received)
        import_cupy().cuda.get_current_stream().synchronize()


@functools.cache
def cuda_aware() -> bool:
    """Whether MPI is CUDA-aware: whether it takes arrays in the memory of a GPU.

    ``CUPYBN_CUDA_AWARE_MPI=0`` or ``1`` decides, if it is set. Otherwise MPI is asked: from version 4.1 on it tells in
    the info of every communicator, before that by a function that Open MPI has introduced.
    """
    told = overruled()
    if told is not None:
        return told
    MPI = sys.modules["mpi4py.MPI"]
    kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
    if "cuda" in kinds:
        return True
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


def overruled() -> bool | None:
    """Answer that CUPYBN_CUDA_AWARE_MPI gives to `cuda_aware`; None if it is not set, or empty.

    Raises
    ------
    ValueError
        If it is neither 0 nor 1.
    """
    text = os.environ.get("CUPYBN_CUDA_AWARE_MPI")
    if not text:
        return None
    if text not in ("0", "1"):
        raise ValueError(f"expected CUPYBN_CUDA_AWARE_MPI to be 0 or 1 (got {text!r}): unset it to ask MPI")
    return text == "1"


# ---------------------------------------------------------------------------------------------------------------------
# NCCL


class NCCLEngine:
    """Engine of an NCCL communicator of CuPy, on the current stream. The host waits for nothing, so it sees no headers.

    A collective that does not end in time is ended by aborting the communicator, and the next call raises.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
    timeout : float or None
    """

    def __init__(self, comm: Any, timeout: float | None) -> None:
        self._watch = watch_of(comm)
        if not comm.comm or self._watch.failed:  # a communicator that has failed is aborted soon
            raise ValueError("expected comm to be alive (got an NCCL communicator that was aborted or destroyed)")
        self.size: int = comm.size()
        self.timeout = timeout
        self._comm = comm
        self._device: int = comm.device_id()

    @property
    def lost(self) -> str | None:
        """Reason why the others are lost, as in `Engine`. All engines of this communicator share it.

        None after a failure that the watch has seen: the next call raises that one.
        """
        return _cut_off.get(self._watch)

    @lost.setter
    def lost(self, reason: str | None) -> None:
        if not self._watch.failed:
            _cut_off[self._watch] = reason

    def check(self, input: Any) -> None:
        """Raise TypeError unless this is a CuPy array on the device of the communicator."""
        expected = f"CuPy array on cuda:{self._device}"
        if kind(input) != "cupy" or input.data.device_id != self._device:
            raise TypeError(f"expected input to be a {expected}, as the communicator is (got {describe(input)})")

    def gather(self, row: Array, header: Header) -> tuple[Array, Header | None]:  # noqa: ARG002
        """Rows of all ranks, as in `Engine`, without headers."""
        rows = _nan((self.size, row.size))
        with self._watched() as stream:
            self._comm.allGather(row.data.ptr, rows.data.ptr, row.size, _nccl().NCCL_FLOAT64, stream.ptr)
        return rows, None

    def sum(self, row: Array, header: Header) -> tuple[Array, Header | None]:  # noqa: ARG002
        """Sum of the rows of all ranks, as in `Engine`, without headers."""
        total, nccl = _nan((1, row.size)), _nccl()
        with self._watched() as stream:
            self._comm.allReduce(row.data.ptr, total.data.ptr, row.size, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, stream.ptr)
        return total, None

    def texts(self, text: str) -> list[str]:
        """Texts of all ranks, as in `Engine`. Raises CapturingError if the stream is being captured in a graph."""
        cupy = import_cupy()
        with cupy.cuda.Device(self._device):
            if cupy.cuda.get_current_stream().is_capturing():
                raise CapturingError(
                    "expected a training pass before one is captured in a graph: in the first one of a layer (in all, "
                    "if it has neither parameters nor buffers) the host waits for what ranks say of their channels"
                )
            rows, _ = self.gather(cupy.asarray(_encode(text).view(np.float64)[None]), np.empty(0))
            received = rows.get()
        self._watch.check()
        return [_decode(row.view(np.uint8)) for row in received]

    def _watched(self) -> Any:
        """Context for starting a collective on the current stream, which is watched from there on."""
        return self._watch.over(import_cupy().cuda.get_current_stream(), self.timeout)


_cut_off: dict[Watch, str | None] = {}
"""Values of `NCCLEngine.lost`, by the watch of the communicator: its ranks are lost, but no collective has failed.

Such communicators are not aborted, since earlier collectives may still run. Their watches are kept, so that engines
that are made later find the reason as well.
"""


def _nan(shape: tuple[int, ...]) -> Array:
    """New array of NaN for NCCL to write to: an aborted collective leaves NaN, not whatever was in memory."""
    array = import_cupy().empty(shape)
    array.data.memset_async(0xFF, array.nbytes)
    return array


def _nccl() -> Any:
    """The module ``cupy.cuda.nccl``, imported here: a communicator does not prove that a program has imported it."""
    from cupy.cuda import nccl

    return nccl


def _encode(text: str) -> npt.NDArray[np.uint8]:
    """Bytes of a text, cut or filled up with zeros to the length that all texts have."""
    return np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)


def _decode(row: npt.NDArray[np.uint8]) -> str:
    """Text from its bytes; the last character may have been cut in two, and is left out then."""
    return row.tobytes().rstrip(b"\0").decode(errors="ignore")
