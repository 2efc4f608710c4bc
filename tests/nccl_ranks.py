"""One rank of the tests of the stand-in's collectives: ``python -m tests.nccl_ranks RANK RANKS PORT``.

It reads names of functions of this module, one a line, calls them, and answers each with a line: "ok", or an error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback

import cupy
import cupyx.distributed
import numpy as np
import pytest
from cupy import emulator
from cupy._raw import EmulationError
from cupy.cuda import nccl

RANK, RANKS, PORT = map(int, sys.argv[1:4])
REMOTE_ERROR, INVALID_ARGUMENT, CUDA_ERROR = 6, 4, 1


def connect():
    return cupyx.distributed.init_process_group(RANKS, RANK, port=PORT)


def raises(error, match, function, *args):
    with pytest.raises(error, match=match):
        function(*args)


def fails(status, function, *args):
    with pytest.raises(nccl.NcclError) as caught:
        function(*args)
    assert caught.value.status == status


def equal(array, expected):
    np.testing.assert_array_equal(array.get(), np.asarray(expected, array.dtype), strict=True)


def gather(comm, x, y, count, datatype=nccl.NCCL_FLOAT64, stream=0):
    comm.allGather(x.data.ptr, y.data.ptr, count, datatype, stream)


def reduce(comm, x, y, count, datatype=nccl.NCCL_FLOAT64, op=nccl.NCCL_SUM, stream=0):
    comm.allReduce(x.data.ptr, y.data.ptr, count, datatype, op, stream)


def parts(dtype):
    """The array that each rank sends; the first sum shows in which order the ranks are added."""
    return [np.array([(rank - 1) / np.finfo(dtype).eps + 0.3, 0.1, rank], dtype) for rank in range(RANKS)]


def raw():
    comm = connect()._comm
    assert (comm.rank_id(), comm.size(), comm.device_id()) == (RANK, RANKS, 0)
    assert comm.comm
    x, y = cupy.arange(4.0) + 10 * RANK, cupy.empty((RANKS, 4))
    gather(comm, x, y, 3)
    equal(y.reshape(-1)[: 3 * RANKS], [10 * rank + i for rank in range(RANKS) for i in range(3)])
    raises(emulator.UninitialisedMemoryError, "of", y.get)  # nothing beyond the first 3 * RANKS elements was written
    y = cupy.empty((RANKS, 4))
    y[RANK] = x
    gather(comm, y[RANK], y, 4)
    equal(y, [np.arange(4) + 10 * rank for rank in range(RANKS)])
    for datatype, dtype in (nccl.NCCL_FLOAT64, np.float64), (nccl.NCCL_FLOAT32, np.float32), (nccl.NCCL_HALF, "f2"):
        sent = parts(dtype)
        total = sent[0]
        for part in sent[1:]:
            total = total + part  # adds one rank after the other, rounding to this dtype
        x, y = cupy.array(sent[RANK]), cupy.empty(3, dtype)
        reduce(comm, x, y, 3, datatype)
        equal(y, total)
        reduce(comm, x, x, 3, datatype, nccl.NCCL_MAX)
        equal(x, np.max(sent, axis=0))
    x = cupy.array([RANK + 1, -RANK])
    reduce(comm, x[:1], x[:1], 1, nccl.NCCL_INT64, nccl.NCCL_PROD)
    reduce(comm, x[1:], x[1:], 1, nccl.NCCL_INT64, nccl.NCCL_MIN)
    equal(x, [np.prod(np.arange(RANKS) + 1), 1 - RANKS])
    x, y = cupy.ones(2) * RANK, cupy.empty(2)
    comm.broadcast(x.data.ptr if RANK == 1 else 0, y.data.ptr, 2, nccl.NCCL_FLOAT64, 1, 0)
    equal(y, [1, 1])
    large = cupy.full(500_000, RANK, np.float32)  # more bytes than a connection takes at once
    reduce(comm, large, large, large.size, nccl.NCCL_FLOAT32)
    assert (large == sum(range(RANKS))).all()
    comm.check_async_error()
    comm.destroy()


def refused():
    """Arguments that are refused: no other rank waits for the call, and the communicator lives on."""
    comm = connect()._comm
    x, y = cupy.ones(6), cupy.empty(6)
    stream = cupy.cuda.Stream()
    for wrong in (
        lambda: reduce(comm, x, y, 7),
        lambda: reduce(comm, x[3:], y, 4),
        lambda: gather(comm, x, y, 3),
        lambda: comm.allReduce(0, y.data.ptr, 6, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, 0),
        lambda: comm.allReduce(x.data.ptr, np.empty(6).ctypes.data, 6, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, 0),
        lambda: comm.broadcast(x.data.ptr, 8, 6, nccl.NCCL_FLOAT64, 0, 0),
    ):
        raises(EmulationError, r"nccl: (send|recv)buf: expected \d+ bytes of an array on device 0 \(got 0x", wrong)
    with emulator.pretend(emulator.H200, emulator.T4):
        with cupy.cuda.Device(1):
            elsewhere, foreign = cupy.ones(6), cupy.cuda.Stream()
        raises(EmulationError, "sendbuf", lambda: reduce(comm, elsewhere, y, 6))
        fails(CUDA_ERROR, lambda: reduce(comm, x, y, 6, stream=foreign.ptr))
    raises(EmulationError, "overlap", lambda: reduce(comm, x, x[1:], 5))
    raises(emulator.UninitialisedMemoryError, "8 of 16 bytes", lambda: memset(y, 8) or reduce(comm, y, x, 2))
    for wrong in (
        lambda: reduce(comm, x, y, 6, op=4),
        lambda: reduce(comm, x, y, 6, datatype=10),
        lambda: comm.broadcast(x.data.ptr, y.data.ptr, 6, nccl.NCCL_FLOAT64, RANKS, 0),
    ):
        fails(INVALID_ARGUMENT, wrong)
    fails(CUDA_ERROR, lambda: reduce(comm, x, y, 6, stream=stream.ptr + 1))
    reduce(comm, x, y, 0)
    comm.check_async_error()
    reduce(comm, x, y, 6, stream=stream.ptr)
    equal(y, [RANKS] * 6)
    comm.destroy()
    for after in comm.check_async_error, comm.size, lambda: reduce(comm, x, y, 6):
        fails(INVALID_ARGUMENT, after)
    assert comm.comm == 0


def memset(array, nbytes):
    array.data.memset(0, nbytes)


def captured():
    comm = connect()._comm
    x, y = cupy.full(3, RANK, np.float32), cupy.empty(3, np.float32)
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        reduce(comm, x, y, 3, nccl.NCCL_FLOAT32, stream=stream.ptr)
        x += y
        graph = stream.end_capture()
    raises(emulator.UninitialisedMemoryError, "3 of 3", y.get)
    total = sum(range(RANKS))
    graph.launch()
    equal(y, [total] * 3)
    graph.launch()
    equal(y, [total + RANKS * total] * 3)
    comm.destroy()


def group():
    backend = connect()
    assert type(backend) is cupyx.distributed.NCCLBackend
    assert type(backend).__module__ == "cupyx.distributed._nccl_comm"
    assert (backend.rank, backend._n_devices, type(backend._comm)) == (RANK, RANKS, nccl.NcclCommunicator)
    x, y = (cupy.arange(6.0) * (RANK + 1)).reshape(2, 3).T, cupy.empty((RANKS, 6))
    backend.all_gather(x, y, 6)
    equal(y, np.arange(6) * np.arange(1, RANKS + 1)[:, None])
    z = cupy.empty_like(x)
    backend.all_reduce(x, z, stream=cupy.cuda.Stream())
    equal(z, (np.arange(6.0).reshape(2, 3).T * (RANKS * (RANKS + 1) // 2)))
    backend.all_reduce(x, z, "min")
    equal(z, np.arange(6.0).reshape(2, 3).T)
    c = cupy.full(2, 1j * RANK, np.complex64)
    backend.all_reduce(c, c)
    equal(c, [1j * sum(range(RANKS))] * 2)
    raises(ValueError, "complex", backend.all_reduce, c, c, "max")
    raises(RuntimeError, "Unknown op mean", backend.all_reduce, x, z, "mean")
    raises(TypeError, "Unknown dtype bool for NCCL", backend.all_reduce, x > 0, z)
    raises(RuntimeError, "contiguous", backend.all_gather, x, y[:, ::2], 3)
    b = cupy.full(2, RANK)
    backend.broadcast(b, RANKS - 1)
    equal(b, [RANKS - 1] * 2)
    if RANK == 0:
        time.sleep(0.1)
    before = time.time()
    backend.barrier()
    times = cupy.empty(RANKS)
    backend.all_gather(cupy.array([before]), times, 1)
    assert time.time() >= times.get().max()
    backend._comm.destroy()


def disagree():
    for wrong in (
        lambda comm, x, y: reduce(comm, x, y, 2 + (RANK == 1)),
        lambda comm, x, y: reduce(comm, x, y, 3, op=nccl.NCCL_MAX if RANK else nccl.NCCL_SUM),
        lambda comm, x, y: reduce(comm, x, y, 3) if RANK else gather(comm, x, y, 3),
    ):
        comm = connect()._comm
        x, y = cupy.ones(3), cupy.empty(3 * RANKS)
        comm.check_async_error()
        fails(REMOTE_ERROR, wrong, comm, x, y)
        raises(emulator.UninitialisedMemoryError, f"{3 * RANKS} of", y.get)
        for after in comm.check_async_error, lambda: reduce(comm, x, y, 3):  # noqa: B023
            fails(REMOTE_ERROR, after)
        comm.destroy()


def wait_for_error(comm):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            comm.check_async_error()
        except nccl.NcclError as error:
            return error.status
        time.sleep(0.005)
    return None


def abort():
    """Rank 1 waits for the others and aborts; its call returns, and the others hear of it."""
    comm = connect()._comm
    x, y = cupy.ones(3), cupy.empty(3)
    if RANK != 1:
        assert wait_for_error(comm) == REMOTE_ERROR
        comm.abort()
        return
    seen = []

    def give_up():
        time.sleep(0.1)
        comm.check_async_error()  # reports no error while the call waits
        seen.append(time.monotonic())
        comm.abort()

    thread = threading.Thread(target=give_up)
    thread.start()
    reduce(comm, x, y, 3)
    assert time.monotonic() - seen[0] < 2
    thread.join()
    raises(emulator.UninitialisedMemoryError, "3 of 3", y.get)
    fails(INVALID_ARGUMENT, comm.check_async_error)
    comm.abort()
    comm.destroy()


def leave():
    """If rank 0, whose process has the hub, leaves in due form, that is no error, but no further call succeeds."""
    comm = connect()._comm
    x = cupy.ones(3)
    reduce(comm, x, x, 3)
    if RANK == 0:
        comm.destroy()
        return
    time.sleep(0.05)
    comm.check_async_error()
    fails(REMOTE_ERROR, lambda: reduce(comm, x, x, 3))
    assert wait_for_error(comm) == REMOTE_ERROR


def kill():
    """If the last rank dies, the others get an error, whether they wait in a call or ask."""
    comm = connect()._comm
    x, y = cupy.ones(3), cupy.empty(3)
    reduce(comm, x, x, 3)
    if RANK == RANKS - 1:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 0:
        fails(REMOTE_ERROR, lambda: reduce(comm, x, y, 3))
    assert wait_for_error(comm) == REMOTE_ERROR
    raises(emulator.UninitialisedMemoryError, "3 of 3", y.get)


def main():
    for line in sys.stdin:
        try:
            globals()[line.strip()]()
            answer = "ok"
        except (Exception, pytest.fail.Exception):  # pytest's own failures are no `Exception`
            answer = traceback.format_exc().replace("\n", " | ")
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
