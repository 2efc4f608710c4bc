"""A group of ranks whose collectives take arrays; it sends them through `nccl`."""

from __future__ import annotations

import socket
import time
from typing import Any

from cupy import ndarray
from cupy.cuda import Stream, get_current_stream, nccl
from cupy.cuda._hub import receive

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 13333
PATIENCE = 30  # seconds within which rank 0 must listen

_DTYPES = {
    "b": nccl.NCCL_INT8,
    "B": nccl.NCCL_UINT8,
    "i": nccl.NCCL_INT32,
    "I": nccl.NCCL_UINT32,
    "l": nccl.NCCL_INT64,
    "L": nccl.NCCL_UINT64,
    "q": nccl.NCCL_INT64,
    "Q": nccl.NCCL_UINT64,
    "e": nccl.NCCL_FLOAT16,
    "f": nccl.NCCL_FLOAT32,
    "d": nccl.NCCL_FLOAT64,
    "F": nccl.NCCL_FLOAT32,  # a complex number is two floats
    "D": nccl.NCCL_FLOAT64,
}
_OPS = {"sum": nccl.NCCL_SUM, "prod": nccl.NCCL_PROD, "max": nccl.NCCL_MAX, "min": nccl.NCCL_MIN}


class NCCLBackend:
    """One rank of a group; it is made when all ranks are there."""

    def __init__(
        self, n_devices: int, rank: int, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, use_mpi: bool = False
    ) -> None:
        self._n_devices, self.rank = n_devices, rank
        self._mpi_comm = _mpi_world() if use_mpi else None
        if self._mpi_comm is not None:
            self._mpi_rank = self._mpi_comm.Get_rank()  # may differ from the rank in the group
            self._mpi_comm.Barrier()
            unique_id = nccl.get_unique_id() if self._mpi_rank == 0 else None
            unique_id = self._mpi_comm.bcast(unique_id, root=0)
        elif rank == 0:
            unique_id = nccl.get_unique_id()
            _hand_out(unique_id, n_devices - 1, host, port)
        else:
            unique_id = _ask(host, port)
        self._comm = nccl.NcclCommunicator(n_devices, unique_id, rank)

    def all_reduce(self, in_array: ndarray, out_array: ndarray, op: str = "sum", stream: Stream | None = None) -> None:
        """Reduce the arrays of all ranks, element by element."""
        _check_contiguous(in_array, out_array)
        dtype, count = _dtype_and_count(in_array)
        if op not in _OPS:
            raise RuntimeError(f"Unknown op {op} for NCCL")
        if in_array.dtype.char in "FD" and op != "sum":
            raise ValueError("Only nccl.SUM is supported for complex arrays")
        self._comm.allReduce(in_array.data.ptr, out_array.data.ptr, count, dtype, _OPS[op], _handle(stream))

    def all_gather(self, in_array: ndarray, out_array: ndarray, count: int, stream: Stream | None = None) -> None:
        """Collect `count` elements of each rank, one rank after the other."""
        _check_contiguous(in_array, out_array)
        dtype, count = _dtype_and_count(in_array, count)
        self._comm.allGather(in_array.data.ptr, out_array.data.ptr, count, dtype, _handle(stream))

    def broadcast(self, in_out_array: ndarray, root: int = 0, stream: Stream | None = None) -> None:
        """Copy the elements of one rank to all ranks."""
        _check_contiguous(in_out_array)
        dtype, count = _dtype_and_count(in_out_array)
        ptr = in_out_array.data.ptr
        self._comm.broadcast(ptr, ptr, count, dtype, root, _handle(stream))

    def barrier(self) -> None:
        """Wait for all ranks. Unlike CuPy's, this needs the communicator, unless there is MPI."""
        if self._mpi_comm is not None:
            self._mpi_comm.Barrier()
        else:
            self._comm._barrier()


def _check_contiguous(*arrays: ndarray) -> None:
    if not all(array.flags.forc for array in arrays):
        raise RuntimeError("NCCL requires arrays to be either c- or f-contiguous")


def _dtype_and_count(array: ndarray, count: int | None = None) -> tuple[int, int]:
    char = array.dtype.char
    if char not in _DTYPES:
        raise TypeError(f"Unknown dtype {array.dtype} for NCCL")
    count = array.size if count is None else count
    return _DTYPES[char], 2 * count if char in "FD" else count


def _handle(stream: Stream | None) -> int:
    return (get_current_stream() if stream is None else stream).ptr


def _mpi_world() -> Any:
    """The communicator of all processes if there is MPI; else None, as CuPy does without it, too."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    return MPI.COMM_WORLD


def _hand_out(unique_id: bytes, times: int, host: str, port: int) -> None:
    with socket.create_server((host, port)) as listener:
        for _ in range(times):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(unique_id)


def _ask(host: str, port: int) -> bytes:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port)) as connection:
                if connection.getsockname() != connection.getpeername():  # not to itself, as a free port can
                    return receive(connection, 128)
        except ConnectionRefusedError:
            pass
        time.sleep(0.05)
    raise RuntimeError("TCPStore is not available")
