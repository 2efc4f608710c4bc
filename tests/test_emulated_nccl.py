"""The collectives of the stand-in for CuPy, between processes, and its streams and memory that they use."""

from __future__ import annotations

import importlib.util
import os
import pickle
import select
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

EMULATED = Path(__file__).parent / "emulated"
if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(EMULATED))
cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("this is the real CuPy", allow_module_level=True)

import cupyx.distributed  # noqa: E402
from cupy import emulator  # noqa: E402
from cupy._raw import EmulationError  # noqa: E402
from cupy.cuda import nccl  # noqa: E402

Uninitialised = emulator.UninitialisedMemoryError
CUDARuntimeError = cupy.cuda.runtime.CUDARuntimeError


class Ranks:
    """Processes that each run a function of `nccl_ranks`, the same one at the same time."""

    def __init__(self, size):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        root = EMULATED.parents[1]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.nccl_ranks", str(rank), str(size), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=root,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EMULATED), str(root)])},
            )
            for rank in range(size)
        ]

    def __call__(self, name):
        """The answers of the ranks, in their order, to the name of a function."""
        for process in self.processes:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    def _answer(self, process):
        if not select.select([process.stdout], [], [], 60)[0]:
            return "no answer"
        return process.stdout.readline().strip()

    def stop(self):
        """End all processes; returns their exit statuses."""
        for process in self.processes:
            process.stdin.close()
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(10))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
            process.stdout.close()
        return codes


@pytest.fixture(scope="module")
def ranks():
    three = Ranks(3)
    yield three
    assert three.stop() == [0, 0, 0]


@pytest.mark.parametrize("name", ["raw", "refused", "captured", "group", "disagree", "abort", "leave"])
def test_three_ranks(ranks, name):
    assert ranks(name) == ["ok"] * 3


def test_a_rank_that_dies():
    two = Ranks(2)
    try:
        assert two("raw") == ["ok"] * 2
        assert two("kill") == ["ok", ""]
    finally:
        codes = two.stop()
    assert codes == [0, -9]


# ---------------------------------------------------------------------------------------------------------------------
# One rank


def test_one_rank():
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    assert (comm.rank_id(), comm.size(), comm.device_id()) == (0, 1, 0)
    assert comm._member is None
    x, y = cupy.arange(3.0), cupy.empty(3)
    comm.allReduce(x.data.ptr, y.data.ptr, 3, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, cupy.cuda.Stream.null.ptr)
    np.testing.assert_array_equal(y.get(), [0, 1, 2])
    with pytest.raises(EmulationError, match="recvbuf: expected 24 bytes"):
        comm.allGather(x.data.ptr, y[1:].data.ptr, 3, nccl.NCCL_FLOAT64, 0)
    comm.check_async_error()
    comm.abort()
    with pytest.raises(nccl.NcclError):
        comm.check_async_error()


def test_ids_and_errors():
    assert nccl.available
    assert nccl.get_version() > 22000
    for wrong in None, (1, 2, 3):
        with pytest.raises(TypeError):
            nccl.NcclCommunicator(1, wrong, 0)
    with pytest.raises(ValueError, match=r"commId length 10 != 128\."):
        nccl.NcclCommunicator(1, b"1234567890", 0)
    with pytest.raises(nccl.NcclError, match="NCCL_ERROR_INVALID_ARGUMENT"):
        nccl.NcclCommunicator(1, bytes(128), 0)
    unique_id = nccl.get_unique_id()
    assert type(unique_id) is bytes
    for rank in -1, 1:
        with pytest.raises(nccl.NcclError, match="NCCL_ERROR_INVALID_ARGUMENT"):
            nccl.NcclCommunicator(1, unique_id, rank)
    nccl.NcclCommunicator(1, unique_id, 0).destroy()
    with pytest.raises(nccl.NcclError, match="NCCL_ERROR_REMOTE_ERROR"):
        nccl.NcclCommunicator(1, unique_id, 0)  # a further communicator needs an id of its own
    error = nccl.NcclError(1)
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.status, twin.args) == (1, error.args)
    assert isinstance(error, RuntimeError)


def test_groups_are_checked():
    init = cupyx.distributed.init_process_group
    with pytest.raises(ValueError, match="Invalid number of devices 0"):
        init(0, 0)
    with pytest.raises(ValueError, match="Invalid number of rank 2 2"):
        init(2, 2)
    with pytest.raises(ValueError, match="gloo is not supported"):
        init(1, 0, backend="gloo")


def test_groups_can_meet_through_mpi(monkeypatch):
    calls = []

    class World:
        def Get_rank(self):  # noqa: N802
            return 0

        def Barrier(self):  # noqa: N802
            calls.append("barrier")

        def bcast(self, value, root):
            calls.append(root)
            return value

    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=World())))
    backend = cupyx.distributed.init_process_group(1, 0, use_mpi=True)
    assert calls == ["barrier", 0]
    backend.barrier()
    assert calls == ["barrier", 0, "barrier"]
    x = cupy.ones(3)
    backend.all_reduce(x, x)
    assert (x == 1).all()
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed: CuPy then does without it
    cupyx.distributed.init_process_group(1, 0, use_mpi=True, port=0).barrier()
    assert len(calls) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Memory and streams


def test_pinned_memory():
    memory = cupy.cuda.alloc_pinned_memory(48)
    assert isinstance(memory, cupy.cuda.PinnedMemoryPointer)
    assert memory.size() == 48
    host = np.frombuffer(memory, np.float64, 5)
    assert host.ctypes.data == memory.ptr
    assert np.isnan(host).all()
    x = cupy.arange(5.0)
    assert x.get(out=host, blocking=False) is host
    np.testing.assert_array_equal(host, [0, 1, 2, 3, 4])
    host[1] = 7
    x.set(np.frombuffer(memory, np.float64, 5))
    assert x[1] == 7


def test_memset():
    x = cupy.empty((2, 3), np.float32)
    x[0].data.memset_async(0, 8)
    np.testing.assert_array_equal(x[0, :2].get(), [0, 0])
    with pytest.raises(Uninitialised, match="4 of 6"):
        x.get()
    x[1].data.memset(0x13F, 12)  # bytes are set to 0x3F, the last byte of the value
    assert x[1].tobytes() == b"\x3f" * 12
    for ptr, size in (x.data, 25), (x[1].data, 13), (cupy.empty(0).data, 1):
        with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidValue"):
            ptr.memset_async(0, size)
    cupy.empty(0).data.memset(0, 0)


def test_what_get_takes():
    x = cupy.ones((2, 3))
    for out, error in (
        ([[0.0] * 3] * 2, TypeError),
        (np.empty((2, 3), np.float32), TypeError),
        (np.empty(6), ValueError),
        (np.empty((2, 6))[:, ::2], RuntimeError),
    ):
        with pytest.raises(error):
            x.get(out=out)
    out = np.empty((2, 3), order="F")
    assert x.get(out=out) is out
    assert (out == 1).all()
