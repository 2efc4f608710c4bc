"""NCCL: collectives of several processes. They run at once, so that a call returns when all ranks have made theirs."""

# The names are CuPy's.
# ruff: noqa: N802

from __future__ import annotations

import atexit
import itertools
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from cupy import _memory
from cupy._errors import CUDARuntimeError
from cupy._raw import EmulationError
from cupy.cuda import runtime
from cupy.cuda._hub import TOKEN_BYTES, Hub, Member
from cupy.cuda.stream import find_stream

available = True

NCCL_SUM = 0
NCCL_PROD = 1
NCCL_MAX = 2
NCCL_MIN = 3

NCCL_INT8 = 0
NCCL_CHAR = 0
NCCL_UINT8 = 1
NCCL_INT32 = 2
NCCL_INT = 2
NCCL_UINT32 = 3
NCCL_INT64 = 4
NCCL_UINT64 = 5
NCCL_FLOAT16 = 6
NCCL_HALF = 6
NCCL_FLOAT32 = 7
NCCL_FLOAT = 7
NCCL_FLOAT64 = 8
NCCL_DOUBLE = 8
NCCL_BFLOAT16 = 9

_DTYPES = ("i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8")  # by number of NCCL; bfloat16 is the next one
_REDUCTIONS: tuple[Callable[..., Any], ...] = (np.add, np.multiply, np.fmax, np.fmin)
_UNHANDLED_CUDA_ERROR, _INVALID_ARGUMENT, _REMOTE_ERROR = 1, 4, 6
_ERRORS = (
    ("NCCL_ERROR_SUCCESS", "no error"),
    ("NCCL_ERROR_UNHANDLED_CUDA_ERROR", "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"),
    ("NCCL_ERROR_SYSTEM_ERROR", "unhandled system error (run with NCCL_DEBUG=INFO for details)"),
    ("NCCL_ERROR_INTERNAL_ERROR", "internal error - please report this issue to the NCCL developers"),
    ("NCCL_ERROR_INVALID_ARGUMENT", "invalid argument (run with NCCL_DEBUG=WARN for details)"),
    ("NCCL_ERROR_INVALID_USAGE", "invalid usage (run with NCCL_DEBUG=WARN for details)"),
    ("NCCL_ERROR_REMOTE_ERROR", "remote process exited or there was a network error"),
)
_ID = struct.Struct(f"!8sH{TOKEN_BYTES}s102x")  # as many bytes as NCCL_UNIQUE_ID_BYTES
_MAGIC = b"emulated"
_ALL_GATHER, _ALL_REDUCE, _BROADCAST, _BARRIER = range(4)


class NcclError(RuntimeError):
    """An error that NCCL reports, by its number."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(": ".join(_ERRORS[status]))

    def __reduce__(self) -> Any:
        return type(self), (self.status,)


def get_version() -> int:
    """The version of NCCL."""
    return 22703


get_build_version = get_version


def get_unique_id() -> bytes:
    """A new unique id. The process that calls this must live as long as the communicators of the id."""
    hub = Hub(_combine)
    return _ID.pack(_MAGIC, hub.port, hub.token)


class _Call(NamedTuple):
    """The part of a call that must be the same on all ranks."""

    kind: int
    elements: int = 0
    datatype: int = 0
    op: int = 0
    root: int = 0


_HEADER = struct.Struct("!QiQiii")  # how many calls there were before, then the fields of a call


class NcclCommunicator:
    """One rank of those that share an id; it is made when all ranks are there.

    Unlike with NCCL, several ranks may use the same device, as each process has its own pretended ones.
    """

    _comm = 0

    def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
        if not isinstance(commId, bytes):
            raise TypeError(f"Argument 'commId' has incorrect type (expected bytes, got {type(commId).__name__})")
        if len(commId) != _ID.size:
            raise ValueError(f"commId length {len(commId)} != {_ID.size}.")
        magic, port, token = _ID.unpack(commId)
        if magic != _MAGIC or not 0 <= rank < ndev:
            raise NcclError(_INVALID_ARGUMENT)
        self._size, self._rank, self._device = ndev, rank, runtime.getDevice()
        self._calls = 0
        # Reentrant, because a signal handler or the garbage collector may call a method within another one.
        self._lock = threading.RLock()
        try:
            self._member: Member | None = Member(port, token, ndev, rank)
        except OSError:
            raise NcclError(_REMOTE_ERROR) from None
        if ndev == 1:  # a single rank needs no hub
            self._member.leave()
            self._member = None
        self._comm = next(_handles)
        _alive.add(self)

    def __del__(self) -> None:
        if self._comm:
            self.destroy()

    @property
    def comm(self) -> int:
        """The handle of the communicator; 0 if it is destroyed or aborted."""
        return self._comm

    def rank_id(self) -> int:
        """The number of this rank."""
        self._check()
        return self._rank

    def size(self) -> int:
        """The number of ranks."""
        self._check()
        return self._size

    def device_id(self) -> int:
        """The number of the device, which was current when the communicator was made."""
        self._check()
        return self._device

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        """Collect `count` elements of each rank, one rank after the other."""
        self._enqueue(_Call(_ALL_GATHER, count, datatype), sendbuf, recvbuf, stream)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        """Reduce the arrays of all ranks, element by element."""
        self._enqueue(_Call(_ALL_REDUCE, count, datatype, op), sendbuf, recvbuf, stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        """Copy the elements of one rank to all ranks."""
        self._enqueue(_Call(_BROADCAST, count, datatype, root=root), sendbuff, recvbuff, stream)

    def check_async_error(self) -> None:
        """Raise an error if a rank is lost, or if the communicator is destroyed or aborted."""
        self._check()
        if self._member is not None and self._member.lost():
            raise NcclError(_REMOTE_ERROR)

    def abort(self) -> None:
        """Leave at once. A call that waits in another thread returns without having received anything."""
        if not self._comm:
            return
        self._comm = 0
        if self._member is not None:
            self._member.interrupt()
            with self._lock:
                self._member.close()

    def destroy(self) -> None:
        """Leave when the call that runs is done. No further call of any rank succeeds."""
        with self._lock:
            if not self._comm:
                return
            self._comm = 0
            if self._member is not None:
                self._member.leave()

    def _check(self) -> None:
        if not self._comm:
            raise NcclError(_INVALID_ARGUMENT)

    def _enqueue(self, call: _Call, sendbuf: int, recvbuf: int, stream: int) -> None:
        """Check the arguments of a call, and make it now, or note it where the stream is being captured."""
        self._check()
        known = 0 <= call.datatype <= NCCL_BFLOAT16 and 0 <= call.op < len(_REDUCTIONS)
        if not known or call.elements < 0 or not 0 <= call.root < self._size:
            raise NcclError(_INVALID_ARGUMENT)
        queue = find_stream(stream)
        if queue is None or queue.device_id not in (-1, self._device):
            raise NcclError(_UNHANDLED_CUDA_ERROR)
        if not call.elements:
            return
        nbytes = call.elements * _dtype(call.datatype).itemsize
        gathers = call.kind == _ALL_GATHER
        target = self._span("recvbuf", recvbuf, nbytes * (self._size if gathers else 1))
        source = None
        if call.kind != _BROADCAST or call.root == self._rank:
            source = self._span("sendbuf", sendbuf, nbytes)
            in_place = recvbuf + (self._rank * nbytes if gathers else 0)
            if sendbuf != in_place and sendbuf < recvbuf + target.nbytes and recvbuf < sendbuf + nbytes:
                raise EmulationError("nccl: sendbuf and recvbuf overlap, and not as they do in place")

        def work() -> None:
            received = self._exchange(call, b"" if source is None else source.read(), target.nbytes)
            if received is not None:
                target.write(np.frombuffer(received, np.uint8))

        try:
            queue._enqueue(work, "a collective")
        except CUDARuntimeError as error:
            raise NcclError(_UNHANDLED_CUDA_ERROR) from error

    def _span(self, name: str, ptr: int, nbytes: int) -> _memory.Span:
        span = _memory.span(ptr, nbytes)
        if span is None or span.allocation.device != self._device:
            raise EmulationError(
                f"nccl: {name}: expected {nbytes} bytes of an array on device {self._device} (got {ptr:#x})"
            )
        return span

    def _exchange(self, call: _Call, payload: bytes, nbytes: int) -> bytes | None:
        """The bytes that the call gives this rank; None if the communicator is aborted meanwhile."""
        with self._lock:
            self._check()
            header = _HEADER.pack(self._calls, *call)
            self._calls += 1
            if self._member is None:
                return _combine(header, [payload])
            try:
                return self._member.exchange(header, payload, nbytes)
            except OSError:
                if not self._comm:
                    return None
                raise NcclError(_REMOTE_ERROR) from None

    def _barrier(self) -> None:
        """Wait for all ranks; for `cupyx.distributed`, which has more than NCCL does."""
        self._exchange(_Call(_BARRIER), b"", 0)


def _dtype(datatype: int) -> np.dtype[Any]:
    if datatype == NCCL_BFLOAT16:
        import ml_dtypes  # noqa: F401 - makes NumPy know the name bfloat16

    return np.dtype("bfloat16" if datatype == NCCL_BFLOAT16 else _DTYPES[datatype])


def _combine(header: bytes, payloads: list[bytes]) -> bytes:
    """The bytes that every rank receives, from those that each of them has sent."""
    call = _Call(*_HEADER.unpack(header)[1:])
    if call.kind != _ALL_REDUCE:  # in a broadcast, only the root has sent anything
        return b"".join(payloads)
    first, *others = (np.frombuffer(payload, _dtype(call.datatype)) for payload in payloads)
    total = first.copy()
    with np.errstate(all="ignore"):
        for other in others:
            _REDUCTIONS[call.op](total, other, out=total)
    return total.tobytes()


@atexit.register
def _leave() -> None:
    """Leave all communicators in due form when the process ends, so that the rank does not count as lost."""
    for communicator in list(_alive):
        if communicator._lock.acquire(blocking=False):  # if a thread still waits in a call, the rank does count as lost
            communicator.destroy()


_handles = itertools.count(0x1000, 0x10)
_alive: WeakSet[NcclCommunicator] = WeakSet()
