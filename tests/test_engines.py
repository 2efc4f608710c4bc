"""Engines with streams, pinned memory and threads, on the stand-in, whose streams are made to lag behind."""

from __future__ import annotations

import ctypes
import gc
import io
import re
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from cupybn import SyncBatchNorm
from cupybn._ranks import engines, watch
from cupybn._ranks.watch import Watch
from tests.reference import bits

cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("a GPU does not lag behind when it is told to", allow_module_level=True)

from cupy import emulator  # noqa: E402
from cupy.cuda import nccl, runtime  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# MPI, and streams that come to their work when somebody waits for them


class Stream(cupy.cuda.Stream):
    """A stream whose copies to the device take place only when the host waits for it."""

    def __init__(self):
        super().__init__(non_blocking=True)
        self.late = []

    def synchronize(self):
        while self.late:
            self.late.pop(0)()
        super().synchronize()


@pytest.fixture
def lag(monkeypatch):
    """Copies from the host happen late, as those from pinned memory may."""
    on_time = cupy.ndarray.set

    def late(array, host):
        stream: Stream = cupy.cuda.get_current_stream()
        stream.late.append(lambda: on_time(array, host))

    monkeypatch.setattr(cupy.ndarray, "set", late)


class Request:
    """A request of MPI that is done, is not, or raises an error."""

    def __init__(self, done=True):
        self.done = done

    def Test(self):  # noqa: N802
        if self.done is None:
            raise OSError("a rank has died")
        return self.done


class Communicator:
    """A communicator of mpi4py with two ranks, the other of which sends what this one does."""

    def __init__(self):
        self.attributes, self.sent = {}, []

    def Is_inter(self):  # noqa: N802
        return False

    def Get_rank(self):  # noqa: N802
        return 0

    def Get_size(self):  # noqa: N802
        return 2

    def Get_attr(self, key):  # noqa: N802
        return self.attributes.get(key)

    def Set_attr(self, key, value):  # noqa: N802
        self.attributes[key] = value

    def Iallgather(self, sent, received):  # noqa: N802
        received[...] = sent
        return Request()

    def Iallreduce(self, sent, received):  # noqa: N802
        np.multiply(sent, 2, out=received[0])
        return Request()

    def Isend(self, row, rank, _):  # noqa: N802
        self.sent.append((rank, row.get(blocking=False)))
        self.expected[...] = row[0]
        return Request()

    def Irecv(self, row, *_):  # noqa: N802
        self.expected = row
        return Request()


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(engines, "_lost_key", lambda: "lost")
    monkeypatch.setattr(engines, "_abandoned", [])
    return engines.MPIEngine(Communicator(), 5)


LAUNCH_FAILURE = 719


def row_of(value):
    return cupy.full((1, 3), float(value))


@pytest.mark.usefixtures("lag")
def test_pinned_memory_over_two_streams(engine, monkeypatch):
    """A message of one stream does not overwrite what another one has not yet copied to the device."""
    monkeypatch.setattr(engines, "cuda_aware", lambda: False)
    rows = row_of(1), row_of(2)
    streams = Stream(), Stream()
    for collective, factor in (engine.gather, 1), (engine.sum, 2):
        results = []
        for stream, row, value in zip(streams, rows, (1, 2), strict=True):
            with stream:
                results.append(collective(row, np.array([value + 10.0])))
        for stream, (result, header), value in zip(streams, results, (1, 2), strict=True):
            stream.synchronize()
            assert (result.get() == factor * value).all()
            assert (header == factor * (value + 10)).all()


@pytest.mark.usefixtures("lag")
def test_pinned_memory_that_is_freed_after_a_pass(engine):
    """A pass may free pinned memory while copies from it have yet to take place: CuPy may reuse it at once."""
    row, stream = row_of(1), Stream()
    with stream:
        total, _ = engine.sum(row, np.zeros(1))
        (staging,) = engine._staging.values()
        staging.received[...] = staging.sent[...] = -1
        stream.synchronize()
    assert (total.get() == 2).all()


def test_memory_of_a_gpu_is_sent_when_it_is_written(engine, monkeypatch):
    """Memory of a GPU is sent only once it is written, as MPI knows nothing of streams."""
    monkeypatch.setattr(engines, "cuda_aware", lambda: True)
    row, stream = row_of(0), Stream()
    stream.late.append(lambda: row.fill(7))
    with stream:
        engine.gather(row, np.zeros(2))
    ((rank, sent),) = engine._comm.sent
    assert rank == 1
    assert (sent == 7).all()


def test_memory_is_allocated_before_a_message_is_sent(engine, monkeypatch):
    """Memory is allocated before a message is sent: a rank that ran out of it later would have fallen behind the
    others.
    """
    row, sent = row_of(0), []
    monkeypatch.setattr(engine._comm, "Iallreduce", lambda *_: sent.append(1))
    engine._staging[1, 4] = engines._Staging(1, 4)

    def malloc(_):
        raise MemoryError

    cupy.cuda.set_allocator(malloc)
    try:
        with pytest.raises(MemoryError):
            engine.sum(row, np.zeros(1))
    finally:
        cupy.cuda.set_allocator()
    assert sent == []


def test_a_lost_communicator_used_again(engine, monkeypatch):
    """A lost communicator sends nothing more, whichever layer uses it and how, and says at once why."""
    started = []

    def start(*_):
        started.append(1)
        return Request(done=False)

    for name in "Iallgather", "Iallreduce", "Isend", "Irecv":
        monkeypatch.setattr(engine._comm, name, start)
    engine.timeout = 0.01
    with pytest.raises(RuntimeError, match=r"^rank 0 expected all 2 ranks to exchange statistics within timeout=0\.01"):
        engine.texts("hello")
    assert started == [1]
    again = engines.MPIEngine(engine._comm, 0.01)
    for aware in False, True:
        monkeypatch.setattr(engines, "cuda_aware", lambda aware=aware: aware)
        for call in (
            lambda: again.texts("hello"),
            lambda: again.gather(np.ones((1, 3)), np.zeros(2)),
            lambda: again.gather(row_of(1), np.zeros(2)),
            lambda: again.sum(row_of(1), np.zeros(1)),
        ):
            with pytest.raises(RuntimeError, match=r"^rank 0 has lost the other ranks .*: expected all 2 ranks"):
                call()
    assert started == [1]


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(
    ("aware", "owner", "name", "sent"),
    [
        (False, engines, "empty", 0),
        (False, cupy.ndarray, "get", 0),
        (False, cupy.ndarray, "set", 1),
        (False, cupy.cuda.Stream, "synchronize", 1),
        (True, engines, "empty", 0),
        (True, cupy.cuda.Stream, "synchronize", 0),
    ],
)
def test_an_error_of_the_device_in_the_middle_of_an_exchange(engine, monkeypatch, forward, aware, owner, name, sent):
    """No layer sends anything after an error of the device, before the message or after it, and each says why."""
    monkeypatch.setattr(engines, "cuda_aware", lambda: aware)
    comm, started = engine._comm, []
    three = [engine, *(engines.MPIEngine(comm, 5) for _ in range(2))]
    layer, later = (SyncBatchNorm(3, device="cuda:0", comm=engine) for engine in three[:2])
    y, vjp_fn = layer.vjp(cupy.ones((4, 3)))
    _, later_vjp_fn = later.vjp(cupy.ones((4, 3)))
    before = bits(*layer.state_dict().values(), *later.state_dict().values())
    for message in "Iallgather", "Iallreduce", "Isend", "Irecv":
        start = getattr(comm, message)
        monkeypatch.setattr(comm, message, lambda *args, start=start: started.append(1) or start(*args))

    def fail(*_, **__):
        raise runtime.CUDARuntimeError(LAUNCH_FAILURE)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(runtime.CUDARuntimeError):
            layer(cupy.ones((4, 3))) if forward else vjp_fn(y)
    if aware and not forward:  # sums take the way through the host's memory even with an MPI that takes the GPU's
        sent = int(name == "synchronize")
    assert len(started) == sent
    text = "^this rank has lost the other ranks of this communicator: CUDARuntimeError: cudaErrorLaunchFailure"
    new = SyncBatchNorm(5, device="cuda:0", comm=three[2])
    for call in (
        lambda: layer(cupy.ones((4, 3))),
        lambda: vjp_fn(y),
        lambda: later(cupy.ones((4, 3))),
        lambda: later_vjp_fn(y),
        lambda: new(cupy.ones((4, 5))),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
    assert len(started) == sent
    assert bits(*layer.state_dict().values(), *later.state_dict().values()) == before


def test_why_a_communicator_is_lost_is_told_as_the_engine_says_it(engine, monkeypatch):
    monkeypatch.setattr(engine._comm, "Iallgather", lambda *_: Request(done=False))
    first, second = (SyncBatchNorm(3, device="cpu", comm=engine, timeout=0.01) for _ in range(2))
    again = "this rank has lost the other ranks of this communicator:"
    for layer, text in (first, "rank 0"), (first, again), (second, again):
        with pytest.raises(RuntimeError, match=f"^{text} expected all 2 ranks to exchange"):
            layer(np.ones((4, 3), np.float32))


def test_all_messages_of_an_exchange_are_waited_for(engine, monkeypatch):
    monkeypatch.setattr(engines, "cuda_aware", lambda: True)
    monkeypatch.setattr(engine._comm, "Isend", lambda *_: Request(done=False))
    engine.timeout = 0.01
    with pytest.raises(RuntimeError, match=r"^rank 0 expected all 2 ranks"):
        engine.gather(row_of(1), np.zeros(2))


def test_memory_that_mpi_may_still_write_to_is_kept(engine, monkeypatch):
    kept = []

    def start(*buffers):
        arrays = [array if array.base is None else array.base for array in buffers if not isinstance(array, int)]
        kept.extend(map(weakref.ref, arrays))
        return Request(done=False)

    for name in "Iallgather", "Iallreduce", "Isend", "Irecv":
        monkeypatch.setattr(engine._comm, name, start)
    engine.timeout = 0.001
    for aware, row in (False, np.ones((1, 3))), (False, row_of(1)), (True, row_of(1)):
        monkeypatch.setattr(engines, "cuda_aware", lambda aware=aware: aware)
        for call, header in (engine.gather, np.zeros(2)), (engine.sum, np.zeros(1)):
            engine._comm.attributes.clear()
            engine._staging.clear()
            with pytest.raises(RuntimeError, match=r"^rank 0 expected all"):
                call(row, header)
    del row, header, call
    assert len(kept) == 4 + 4 + 6
    assert all(reference() is not None for reference in kept)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, None])
def test_mpi_is_aborted_at_the_end_if_an_exchange_never_ended(engine, monkeypatch, error, late):
    """MPI is aborted when the process ends if an exchange may still run, not if it has ended. Output is kept."""
    comm, aborted, request = engine._comm, [], Request(done=False)
    printed = [io.TextIOWrapper(io.BytesIO()) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), printed, strict=True):
        monkeypatch.setattr(sys, name, stream)
        stream.write("lost")

    def abort(status):
        assert [stream.buffer.getvalue() for stream in printed] == [b"lost"] * 2
        aborted.append(status)

    comm.Abort = abort

    def start(*_):
        if error is not None:
            raise error
        return request

    monkeypatch.setattr(comm, "Iallgather", start)
    engine.timeout = 0.001
    engines._abort_if_lost()
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        engine.texts("hello")
    request.done = late
    engines._abort_if_lost()
    assert aborted == ([] if late and error is None else [1])
    request.done = None
    engines._abort_if_lost()
    assert aborted[-1:] == [1]


def test_errors_of_mpi_are_told_in_the_librarys_words(engine, monkeypatch):
    def start(*_):
        raise OSError("a rank has died")

    monkeypatch.setattr(engine._comm, "Iallreduce", start)
    text = "^rank 0 has lost the other ranks of this communicator: a rank has died$"
    with pytest.raises(RuntimeError, match=text) as caught:
        engine.sum(np.ones((1, 3)), np.zeros(1))
    assert type(caught.value.__cause__) is OSError


@pytest.mark.parametrize(
    ("kinds", "query", "expected"),
    [
        ("system,cuda:device", None, True),
        ("system", None, False),
        (None, 1, True),
        (None, 0, False),
        (None, None, False),
        ("system", 1, True),
    ],
)
@pytest.mark.parametrize(("overruled", "result"), [("0", False), ("1", True), ("", None), (None, None)])
def test_where_mpi_says_that_it_takes_memory_of_gpus(monkeypatch, kinds, query, expected, overruled, result):
    """MPI tells in an info, or by a function, that it takes GPUs' memory; a variable that is set overrules it."""
    if overruled is None:
        monkeypatch.delenv("CUPYBN_CUDA_AWARE_MPI", raising=False)
    else:
        monkeypatch.setenv("CUPYBN_CUDA_AWARE_MPI", overruled)
    info = SimpleNamespace(Get={"mpi_memory_alloc_kinds": kinds}.get)
    world = SimpleNamespace(Get_info=lambda: info)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(COMM_WORLD=world, __file__="mpi"))
    library = SimpleNamespace() if query is None else SimpleNamespace(MPIX_Query_cuda_support=lambda: query)
    monkeypatch.setattr(engines.ctypes, "CDLL", {"mpi": library}.get)
    assert engines.cuda_aware.__wrapped__() is (expected if result is None else result)


@pytest.mark.parametrize("text", ["yes", "2", "true", " 1", "01"])
def test_the_variable_that_overrules_mpi_is_0_or_1(monkeypatch, text):
    """A wrong variable is an error when the layer gets its communicator, not in an exchange, when others wait."""
    monkeypatch.setenv("CUPYBN_CUDA_AWARE_MPI", text)
    comm = SimpleNamespace(Is_inter=lambda: False, Get_rank=lambda: 0, Get_size=lambda: 2)
    message = re.escape(f"expected CUPYBN_CUDA_AWARE_MPI to be 0 or 1 (got {text!r}): unset it to ask MPI")
    for call in lambda: engines.MPIEngine(comm, None), engines.cuda_aware.__wrapped__:
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()


def test_texts_have_one_length(engine):
    """Texts are cut to one length, even in the middle of a letter."""
    for text, said in (
        ("3 channels", "3 channels"),
        ("", ""),
        ("a" * 300, "a" * 256),
        ("a" + "ä" * 300, "a" + "ä" * 127),
    ):
        assert engine.texts(text) == [said] * 2


# ---------------------------------------------------------------------------------------------------------------------
# NCCL, and threads


class Aborted(nccl.NcclCommunicator):
    """A communicator of NCCL with two ranks, whose messages never arrive."""

    comm = 1

    def __init__(self):
        self.aborted = threading.Event()

    def size(self):
        return 2

    def device_id(self):
        return runtime.getDevice()

    def check_async_error(self):
        pass

    def allGather(self, *_):  # noqa: N802
        pass

    def allReduce(self, *_):  # noqa: N802
        pass

    def abort(self):
        self.aborted.set()


class Echo(Aborted):
    """A communicator of NCCL with two ranks, the other of which sends what this one does."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def allGather(self, sent, received, count, *_):  # noqa: N802
        self.devices.append(runtime.getDevice())
        row = ctypes.string_at(sent, 8 * count)
        ctypes.memmove(received, row + row, 16 * count)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Threads of watches, which end soon here."""
    monkeypatch.setattr(watch, "IDLE", 0.02)
    monkeypatch.setattr(watch, "NAP", 0.001)


def wait_for(watch):
    thread = watch._thread
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_what_an_aborted_message_leaves_is_nan(rng):
    """A message that was aborted leaves NaN, lest a rank take what memory held before for statistics."""
    x = cupy.asarray(rng.standard_normal((4, 3, 5)))
    layer = SyncBatchNorm(3, device="cuda:0", comm=Aborted())
    before = bits(*layer.state_dict().values())
    y, vjp_fn = layer.vjp(x)
    assert np.isnan(y.get()).all()
    assert np.isnan(vjp_fn(x).input.get()).all()
    assert bits(*layer.state_dict().values()) == before
    engine = layer._process_group.engine
    assert np.isnan(engine.gather(row_of(1), np.zeros(2))[0].get()).all()
    assert np.isnan(engine.sum(row_of(1), np.zeros(1))[0].get()).all()


def test_an_error_in_the_middle_of_an_exchange_of_nccl(monkeypatch):
    """No layer, not even a new one, sends anything after an error of the device; messages on their way may arrive."""
    comm, sent, x = Aborted(), [], cupy.ones((4, 3))
    comm.allGather = comm.allReduce = lambda *_: sent.append(1)
    text = "^this rank has lost the other ranks of this communicator: CUDARuntimeError: cudaErrorLaunchFailure"

    def fail(_):
        raise runtime.CUDARuntimeError(LAUNCH_FAILURE)

    def lose():
        layer, other = (SyncBatchNorm(3, device="cuda:0", comm=comm) for _ in range(2))
        layer._process_group._agreed = other._process_group._agreed = 3
        y, vjp_fn = other.vjp(x)
        with monkeypatch.context() as patch:
            patch.setattr(engines, "_nan", fail)
            with pytest.raises(runtime.CUDARuntimeError):
                layer(x)
        for call in lambda: layer(x), lambda: other(x), lambda: vjp_fn(y):
            with pytest.raises(RuntimeError, match=text):
                call()

    lose()
    gc.collect()
    layer = SyncBatchNorm(3, device="cuda:0", comm=comm)
    with pytest.raises(RuntimeError, match=text):
        layer(x)
    assert sent == [1]  # by the pass of the other layer
    watch = layer._process_group.engine._watch
    wait_for(watch)
    assert not watch.failed
    assert not comm.aborted.is_set()


@pytest.mark.parametrize("residual", [None, "no array"])
def test_a_first_pass_is_not_captured(residual):
    """A first pass, which waits for the other ranks, cannot be captured: nothing is sent, and no rank is lost."""
    comm, sent = Echo(), []
    layer, x = SyncBatchNorm(3, device="cuda:0", comm=comm), cupy.ones((4, 3))
    with cupy.cuda.Stream(non_blocking=True) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "allGather", lambda *_: sent.append(1))
        stream.begin_capture()
        expected = r"^expected a training pass before one is captured" if residual is None else "^expected residual"
        with pytest.raises((RuntimeError, TypeError), match=expected):
            layer(x, residual)
        assert sent == []
        stream.end_capture()
    y = layer(x)
    stream.begin_capture()
    with stream:
        layer(x)
    stream.end_capture()
    np.testing.assert_array_equal(y.get(), np.zeros((4, 3)))


def test_what_the_watch_has_seen_fail_is_told_in_its_words():
    comm = Aborted()
    layer = SyncBatchNorm(3, device="cuda:0", comm=comm)
    layer._process_group._agreed = 3
    layer._process_group.engine._watch._failure = "a rank has died"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^NCCL has lost the other ranks .*: a rank has died$"):
            layer(cupy.ones((4, 3)))


def test_a_communicator_whose_module_nobody_has_imported(monkeypatch):
    """A communicator of NCCL is recognised even if nobody has imported `cupy.cuda.nccl`, which CuPy does not do by
    itself.
    """
    monkeypatch.delattr(cupy.cuda, "nccl")
    engine = engines.engine_for(Aborted(), 5)
    assert engine.gather(row_of(1), np.zeros(2))[0].shape == (2, 3)
    assert engine.sum(row_of(1), np.zeros(1))[0].shape == (1, 3)


def test_what_a_communicator_can_send():
    """NCCL sends CuPy arrays on its own device alone, as pointers to other memory mean nothing to it."""
    with emulator.pretend(emulator.H200, emulator.H200):
        engine = engines.engine_for(Aborted(), 5)
        with cupy.cuda.Device(1):
            elsewhere = row_of(1)
        engine.check(row_of(1))
        for array, said in (elsewhere, "CuPy array on cuda:1"), (np.ones((1, 3)), "NumPy array"):
            with pytest.raises(TypeError, match=rf"^expected input to be a CuPy array on cuda:0, .* \(got {said}\)$"):
                engine.check(array)


def test_communicators_that_are_no_more():
    comm = Aborted()
    engine = engines.engine_for(comm, 5)
    assert engines.engine_for(comm, 5)._watch is engine._watch
    engine._watch._failure = "a rank has died"  # the watch has failed, and will soon abort the communicator
    destroyed = Aborted()
    destroyed.comm = 0
    for lost in comm, destroyed:
        with pytest.raises(ValueError, match=r"^expected comm to be alive \(got an NCCL communicator that was aborted"):
            engines.engine_for(lost, 5)


def test_a_rank_that_raises_says_so_on_the_device_of_the_layer():
    """A rank that raises tells the others on its layer's device, whichever device is current."""
    devices = []

    class Seen(Aborted):
        def allGather(self, *_):  # noqa: N802
            devices.append(runtime.getDevice())

        allReduce = allGather  # noqa: N815

    with emulator.pretend(emulator.H200, emulator.H200):
        with cupy.cuda.Device(1):
            layer, x = SyncBatchNorm(3, device="cuda:1", comm=Seen()), cupy.ones((4, 3))
        _, vjp_fn = layer.vjp(x)
        devices.clear()
        for call in lambda: layer(x, residual=3), lambda: vjp_fn(3):
            with pytest.raises(TypeError, match=r"^expected (residual|grad_output) to be"):
                call()
        assert devices == [1, 1]


def test_texts_go_over_the_device_of_the_communicator(monkeypatch):
    """Texts are sent on the communicator's device, whichever is current; after an abort they raise an error."""

    with emulator.pretend(emulator.H200, emulator.H200):
        with cupy.cuda.Device(1):
            comm = Echo()
            engine = engines.engine_for(comm, 5)
            assert engine._device == 1
        assert engine.texts("3 channels") == ["3 channels"] * 2
        assert comm.devices == [1]
        get = cupy.ndarray.get

        def aborted_meanwhile(array, *args, **kwargs):
            engine._watch._failure = "a rank has died"
            return get(array, *args, **kwargs)

        monkeypatch.setattr(cupy.ndarray, "get", aborted_meanwhile)
        with pytest.raises(RuntimeError, match=r"^NCCL has lost the other ranks .*: a rank has died$"):
            engine.texts("3 channels")


def test_a_message_is_watched_while_another_thread_captures():
    """The watch looks at a message even while another thread captures in PyTorch's mode, which forbids it."""
    captures, stream = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    comm = Aborted()
    watch = Watch(comm)
    captures.begin_capture(runtime.streamCaptureModeGlobal)
    with watch.over(stream, 10):
        pass
    wait_for(watch)
    captures.end_capture()
    assert not watch.failed
    assert not comm.aborted.is_set()


def test_a_fault_of_the_device_ends_a_message_at_once():
    """A fault of the device ends a message at once with the fault's text, even without a time limit."""
    comm = Aborted()
    watch = Watch(comm)
    text = r"^NCCL has lost the other ranks of this communicator: cudaErrorLaunchFailure: unspecified launch failure$"
    with pytest.raises(RuntimeError, match=text), watch.over(cupy.cuda.Stream(), None), emulator.broken():
        assert comm.aborted.wait(10)
    with pytest.raises(RuntimeError, match=text):
        watch.check()


def test_the_thread_works_on_the_device_of_the_message():
    """The watch's thread works on the message's device; on another one it would waste memory for a context."""
    asked = threading.Event()

    class Asked(Aborted):
        def check_async_error(self):
            self.device = runtime.getDevice()
            asked.set()

    with emulator.pretend(emulator.H200, emulator.H200), cupy.cuda.Device(1):
        comm = Asked()
        with Watch(comm).over(cupy.cuda.Stream(), None):
            assert asked.wait(10)
    assert comm.device == 1
