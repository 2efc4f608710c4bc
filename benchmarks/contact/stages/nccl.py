"""Tries one rank over real NCCL, and what the stand-in can only imitate of it."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import numpy as np

from contact import insides
from contact.task import Task

SPIN = r"""
extern "C" __global__ void spin(long long ns) {
    long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - begin < ns);
}
"""
TIMEOUT = 30.0
NO_HEADER = np.empty(0)


def run(task: Task) -> None:
    """Try everything with a communicator of CuPy's, then with one of `cupyx.distributed`."""
    import cupy
    from cupy.cuda import nccl

    if not nccl.available:
        task.log.skip("no NCCL here")
        return
    task.log.fact("version", nccl.get_version())
    log, row = task.log, cupy.asarray(np.random.default_rng(0).standard_normal((1, 129)))
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    with log.checking("gather, sum and texts"):
        collectives(comm, row)
    with log.checking("a collective in a graph"):
        in_a_graph(comm, row)
    if insides.is_stand_in():
        log.skip("capture in global mode while a message is watched: a kernel in PTX")
    else:
        with log.checking("capture in global mode, as PyTorch's, while a message is watched"):
            captured_beside_the_watch(comm)
    with log.checking("a communicator that is aborted is refused"):
        refused_once_aborted(comm)
    with log.checking("a communicator of cupyx.distributed"):
        of_cupyx(task, row)
    sys.stdout.flush()
    os._exit(0)  # an ordinary exit would wait for the store, the server of a rank that has failed


def collectives(comm: Any, row: Any) -> None:
    """Check that a single rank receives what it sends."""
    engine = insides.engine_for(comm, TIMEOUT)
    for collective in engine.gather, engine.sum:
        result, header = collective(row, NO_HEADER)
        assert header is None
        assert result.get().tobytes() == row.get().tobytes(), collective
    assert engine.texts("hello") == ["hello"]


def in_a_graph(comm: Any, row: Any) -> None:
    """Check that a replayed graph sends what the array holds at that time, not what it held at the capture."""
    import cupy

    engine, row = insides.engine_for(comm, TIMEOUT), row.copy()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        engine.gather(row, NO_HEADER)
        stream.synchronize()
        stream.begin_capture()
        result, _ = engine.gather(row, NO_HEADER)
        graph = stream.end_capture()
        row += 1
        graph.launch(stream)
        stream.synchronize()
        assert result.get().tobytes() == row.get().tobytes()


def captured_beside_the_watch(comm: Any) -> None:
    """Check that the watch of a message does not disturb a capture, even one that forbids asking for events."""
    import cupy

    spin = cupy.RawKernel(SPIN, "spin")
    spin((1,), (1,), (np.int64(1),))
    sending, capturing = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    with insides.watch_of(comm).over(sending, TIMEOUT), sending:
        spin((1,), (1,), (np.int64(400_000_000),))
    with capturing:
        capturing.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeGlobal)
        time.sleep(0.2)  # long enough for the watch to look at the message several times
        spin((1,), (1,), (np.int64(1),))
        capturing.end_capture().launch()
    cupy.cuda.Device().synchronize()


def refused_once_aborted(comm: Any) -> None:
    """Check that a layer refuses an aborted communicator before it begins."""
    comm.abort()
    try:
        insides.engine_for(comm, TIMEOUT)
    except ValueError:
        return
    raise AssertionError("expected ValueError")


def of_cupyx(task: Task, row: Any) -> None:
    """Check the communicators of `cupyx.distributed`, which most programs use."""
    try:
        import mpi4py.MPI  # noqa: F401
    except ImportError:
        pass
    except Exception as error:  # without an MPI, mpi4py raises RuntimeError where `cupyx` expects ImportError
        reason = str(error).partition("\n")[0]
        task.log.note(f"mpi4py cannot be used ({reason}), and is hidden from cupyx.distributed")
        sys.modules["mpi4py.MPI"] = None  # type: ignore[assignment]
    from cupyx.distributed import NCCLBackend, init_process_group

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    backend = init_process_group(1, 0, port=port)
    assert isinstance(backend, NCCLBackend)
    result, _ = insides.engine_for(backend, TIMEOUT).sum(row, NO_HEADER)
    assert result.get().tobytes() == row.get().tobytes()
