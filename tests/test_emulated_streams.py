"""Streams, events and graphs of the stand-in for CuPy, and what CUDA forbids while a stream captures."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("this is the real CuPy", allow_module_level=True)

from cupy import emulator  # noqa: E402
from cupy.cuda import Event, Stream, runtime  # noqa: E402

Uninitialised = emulator.UninitialisedMemoryError
CUDARuntimeError = runtime.CUDARuntimeError
CUDADriverError = cupy.cuda.driver.CUDADriverError
GLOBAL, THREAD_LOCAL, RELAXED = (
    getattr(runtime, f"streamCaptureMode{m}") for m in ("Global", "ThreadLocal", "Relaxed")
)
INVALID_VALUE, INVALID_HANDLE, ILLEGAL_STATE, LAUNCH_FAILURE = 1, 400, 401, 719
UNSUPPORTED, INVALIDATED, ISOLATION, IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = 900, 901, 905, 906, 907, 908


def status_of(call, *args):
    """The status that CUDA reports for a call: 0 if it raises nothing."""
    try:
        call(*args)
    except (CUDARuntimeError, CUDADriverError) as error:
        return error.status
    return 0


def in_thread(call, *args):
    """The result of a call in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call(*args)))
    thread.start()
    thread.join()
    return results[0]


def exchange_mode(mode):
    """Set this thread's capture mode through ctypes, as programs must, and return its former one."""
    value = ctypes.c_int(mode)
    assert ctypes.cdll["libcuda.so.1"].cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) == 0
    return value.value


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


def test_captured_work_runs_at_launch():
    x, ran = cupy.arange(3.0), []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        assert stream.is_capturing()
        stream._enqueue(lambda: ran.append(x.get().tolist()), "a look")
        x *= 2
        y = x[1:] + 1
        y[0] = 50
        total = y.sum()
        picked = x[cupy.arange(2)]
        graph = stream.end_capture()
        assert not stream.is_capturing()
    assert not ran
    np.testing.assert_array_equal(x.get(), [0, 1, 2])
    with pytest.raises(Uninitialised):
        y.get()
    graph.launch()
    assert (float(total), y.tolist(), picked.tolist()) == (55, [50, 5], [0, 2])
    graph.launch(cupy.cuda.Stream())
    assert (float(total), y.tolist(), picked.tolist()) == (59, [50, 9], [0, 4])
    assert ran == [[0, 1, 2], [0, 2, 4]]


def test_misplaced_captures():
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.Stream.null.begin_capture()
    stream = cupy.cuda.Stream()
    with pytest.raises(CUDARuntimeError, match="IllegalState"):
        stream.end_capture()
    with pytest.raises(NotImplementedError, match="via stream capture"):
        cupy.cuda.Graph()
    assert cupy.cuda.Stream.null.ptr == 0 != stream.ptr != cupy.cuda.Stream().ptr


def test_events():
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.get_elapsed_time(start, end)
    start.record()
    cupy.cuda.get_current_stream().record(end)
    end.synchronize()
    assert cupy.cuda.get_elapsed_time(start, end) >= 0
    untimed = cupy.cuda.Event(disable_timing=True)
    untimed.record()
    assert status_of(cupy.cuda.get_elapsed_time, start, untimed) == INVALID_HANDLE
    with pytest.raises(ValueError, match="Timing must be disabled"):
        cupy.cuda.Event(interprocess=True)


def test_memset_can_be_captured():
    x = cupy.ones(4, np.uint8)
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        x.data.memset_async(5, 2)
        with pytest.raises(RuntimeError, match="the current stream is capturing"):
            x.data.memset(0, 4)
        with cupy.cuda.Stream.null:
            x.data.memset_async(6, 3, stream)
        graph = stream.end_capture()
    np.testing.assert_array_equal(x.get(), [1, 1, 1, 1])
    graph.launch()
    np.testing.assert_array_equal(x.get(), [6, 6, 6, 1])


def test_streams_by_their_handles():
    is_capturing = cupy.cuda.runtime.streamIsCapturing
    stream = cupy.cuda.Stream()
    ptr = stream.ptr
    assert not is_capturing(0)
    assert not is_capturing(cupy.cuda.Stream.ptds.ptr)
    assert not is_capturing(ptr)
    with stream:
        stream.begin_capture()
        assert is_capturing(ptr)
        with pytest.raises(CUDARuntimeError):
            stream.synchronize()
        with pytest.raises(RuntimeError, match="has invalidated the capture"):
            is_capturing(ptr)
        with pytest.raises(CUDARuntimeError):
            stream.end_capture()
    del stream
    with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        is_capturing(ptr)


def test_events_wait_on_the_host():
    stream, event = cupy.cuda.Stream(), cupy.cuda.Event(disable_timing=True)
    assert event.done
    event.record(stream)
    with emulator.record_syncs() as syncs:
        assert event.done
        assert syncs == []
        event.synchronize()
        stream.synchronize()
        assert syncs == ["synchronize"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# What is forbidden while a stream captures


def compile_a_kernel():
    cupy.RawKernel('extern "C" __global__ void example() {}', "example").compile()


def allocate():
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.empty(1)


# Calls that are unsafe during a capture; each takes a stream that does not capture, and an event outside of graphs.
UNSAFE = {
    "event.synchronize": lambda _, event: event.synchronize(),
    "stream.synchronize": lambda stream, _: stream.synchronize(),
    "get": lambda stream, _: cupy.ones(3).get(stream),
    "cudaMalloc": lambda *_: allocate(),
    "cudaHostAlloc": lambda *_: cupy.cuda.alloc_pinned_memory(8),
    "cuModuleLoadData": lambda *_: compile_a_kernel(),
}
SAFE = {
    "launch": lambda x, _: cupy.add(x, 1, out=x),
    "memset_async": lambda x, stream: x.data.memset_async(0, 8, stream),
    "event.record": lambda _, stream: Event().record(stream),
    "stream.is_capturing": lambda _, stream: stream.is_capturing(),
}


@pytest.mark.parametrize("unsafe", UNSAFE.values(), ids=UNSAFE)
@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("own", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_unsafe_calls(unsafe, mode, elsewhere, own):
    """Unsafe calls are allowed in relaxed mode, or where no capture forbids them; else they spoil those captures."""
    stream, event = Stream(non_blocking=True), Event()

    def call():
        before = exchange_mode(own)
        try:
            return status_of(unsafe, stream, event)
        finally:
            exchange_mode(before)

    forbidden = own != RELAXED and (mode == GLOBAL and own == GLOBAL if elsewhere else mode != RELAXED)
    captures = Stream(non_blocking=True)
    cupy.ones(3)  # fills CuPy's pool, so that `get` need not ask CUDA for memory
    captures.begin_capture(mode)
    with Stream(non_blocking=True):
        assert (in_thread(call) if elsewhere else call()) == (UNSUPPORTED if forbidden else 0)
    assert status_of(captures.end_capture) == (INVALIDATED if forbidden else 0)
    assert call() == 0


@pytest.mark.parametrize("query", [lambda s, _: runtime.streamQuery(s.ptr), lambda _, e: runtime.eventQuery(e.ptr)])
@pytest.mark.parametrize("own", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_queries_report_no_error_and_spoil_global_captures_of_other_threads(query, own):
    stream, event, captures = Stream(non_blocking=True), Event(), Stream(non_blocking=True)
    event.record(stream)

    def ask():
        exchange_mode(own)
        return query(stream, event), event.done, stream.done

    captures.begin_capture(GLOBAL)
    allowed = own != GLOBAL
    assert in_thread(ask) == ((0, True, True) if allowed else (UNSUPPORTED, False, False))
    assert status_of(captures.end_capture) == (0 if allowed else INVALIDATED)


@pytest.mark.parametrize("safe", SAFE.values(), ids=SAFE)
def test_other_calls_are_allowed(safe):
    x, stream, captures = cupy.zeros(1), Stream(non_blocking=True), Stream(non_blocking=True)
    captures.begin_capture(GLOBAL)
    with stream:
        assert in_thread(status_of, safe, x, stream) == 0
        assert status_of(safe, x, stream) == 0
    captures.end_capture()


def test_a_copy_from_the_host_spoils_global_captures_unseen():
    """A copy from the host spoils global captures unnoticed: CuPy asks for the events of earlier copies, ignoring the
    status.
    """
    captures = Stream(non_blocking=True)
    cupy.ones(3)
    captures.begin_capture(GLOBAL)
    with Stream(non_blocking=True):
        x = cupy.array(np.ones(3))
    with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        captures.end_capture()
    assert x.get().tolist() == [1, 1, 1]


def test_modes_of_threads():
    assert in_thread(lambda: [exchange_mode(mode) for mode in (RELAXED, THREAD_LOCAL, GLOBAL)]) == [
        GLOBAL,
        RELAXED,
        THREAD_LOCAL,
    ]
    library, value = ctypes.cdll["libcuda.so.1"], ctypes.c_int(RELAXED)
    assert library.cuThreadExchangeStreamCaptureMode(ctypes.pointer(value)) == 0
    assert exchange_mode(GLOBAL) == RELAXED
    value.value = 3
    assert library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) == INVALID_VALUE


def test_memory_that_was_freed_is_not_asked_for_again():
    cupy.empty(1000)
    stream = Stream(non_blocking=True)
    with stream:
        stream.begin_capture(GLOBAL)
        x = cupy.empty(1000)
        stream.end_capture()
        stream.begin_capture(GLOBAL)
        assert status_of(lambda: (x, cupy.empty(10**6))) == UNSUPPORTED
        assert status_of(stream.end_capture) == INVALIDATED


TRANSFERS = {
    "get": lambda x: x.get(),
    "get(blocking=False)": lambda x: x.get(blocking=False),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "boolean index": lambda x: x[cupy.ones(3, bool)],
    "cupy.nonzero": lambda x: cupy.nonzero(x),
    "nonzero": lambda x: x.nonzero(),
    "array": lambda _: cupy.array(np.ones(3)),
    "set": lambda x: x.set(np.ones(3)),
}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_nothing_is_copied_from_or_to_the_host_during_capture(transfer):
    """A copy from or to the host during a capture is refused by CuPy, and the capture goes on."""
    x = cupy.ones(3)
    with Stream() as stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match=r"is capturing, so (D2H|H2D) transfers are disallowed"):
            transfer(x)
        stream.end_capture()
        transfer(x)


WAITING = {
    "stream": lambda: cupy.cuda.get_current_stream().synchronize(),
    "device": lambda: cupy.cuda.Device().synchronize(),
    "deviceSynchronize": runtime.deviceSynchronize,
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_the_host_cannot_wait_for_what_captures(wait):
    """The host cannot wait for a stream that captures, not even in relaxed mode."""
    x = cupy.ones(3)
    with Stream(non_blocking=True) as stream:
        stream.begin_capture()
        assert status_of(wait) == UNSUPPORTED
        assert status_of(cupy.add, x, 2) == INVALIDATED
        for ask in stream.is_capturing, x.get:
            with pytest.raises(RuntimeError, match="has invalidated the capture"):
                ask()
        assert status_of(stream.end_capture) == INVALIDATED
        wait()


def test_a_device_waits_for_its_own_streams():
    with emulator.pretend(emulator.H200, emulator.H200):
        stream = Stream()
        stream.begin_capture()
        cupy.cuda.Device(1).synchronize()
        with cupy.cuda.Device(1):
            cupy.ones(1)  # works on the default stream of that device
        assert in_thread(status_of, cupy.cuda.Device(0).synchronize) == UNSUPPORTED
        assert status_of(stream.end_capture) == INVALIDATED


def test_the_default_stream_waits_for_blocking_streams():
    x, null = cupy.zeros(2), Stream.null
    uses = [
        lambda: cupy.add(x, 1, out=x),
        lambda: x.data.memset_async(0, 8),
        lambda: Event().record(null),
        null.synchronize,
    ]
    for use in uses:
        for non_blocking in True, False:
            stream = Stream(non_blocking=non_blocking)
            stream.begin_capture()
            assert null.is_capturing() is False if non_blocking else status_of(null.is_capturing) == IMPLICIT
            # CuPy asks for the stream's state before CUDA hears of it.
            assert status_of(x.data.memset, 0, 8) == (0 if non_blocking else IMPLICIT)
            assert stream.is_capturing()  # asking has spoiled nothing
            assert status_of(use) == (0 if non_blocking else IMPLICIT)
            assert status_of(stream.end_capture) == (0 if non_blocking else INVALIDATED)


def test_events_in_graphs():
    stream, event, outside = Stream(), Event(), Event()
    stream.begin_capture()
    stream.record(event)
    stream.wait_event(event)
    with pytest.raises(NotImplementedError, match="one stream"):
        Stream().wait_event(event)
    graph = stream.end_capture()
    graph.launch()
    assert not event.done
    assert runtime.eventQuery(event.ptr) == status_of(event.synchronize) == CAPTURED_EVENT
    assert status_of(cupy.cuda.get_elapsed_time, event, outside) == CAPTURED_EVENT
    stream.begin_capture()
    assert status_of(stream.wait_event, outside) == ISOLATION
    assert status_of(stream.end_capture) == INVALIDATED
    stream.begin_capture()
    stream.record(event)
    assert runtime.eventQuery(event.ptr) == CAPTURED_EVENT
    assert status_of(stream.end_capture) == INVALIDATED
    stream.record(event)
    assert event.done


def test_captures_end_where_they_began():
    for mode in GLOBAL, THREAD_LOCAL, RELAXED:
        stream = Stream()
        stream.begin_capture(mode)
        assert status_of(stream.begin_capture) == ILLEGAL_STATE
        if mode != RELAXED:
            assert in_thread(status_of, stream.end_capture) == WRONG_THREAD
            assert status_of(stream.end_capture) == 0
        else:
            assert in_thread(status_of, stream.end_capture) == 0
    assert status_of(stream.begin_capture, 3) == INVALID_VALUE


def test_forgotten_captures_forbid_nothing():
    stream = Stream()
    stream.begin_capture(GLOBAL)
    del stream
    gc.collect()
    cupy.cuda.Device().synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_a_broken_device():
    x, stream, event = cupy.zeros(2), Stream(), Event()
    event.record(stream)
    with emulator.pretend(emulator.H200, emulator.H200):
        with emulator.broken(0, LAUNCH_FAILURE):
            assert (event.done, stream.done) == (False, False)  # these report an error as not done
            assert runtime.eventQuery(event.ptr) == runtime.streamQuery(stream.ptr) == LAUNCH_FAILURE
            calls = [
                event.synchronize,
                stream.synchronize,
                x.get,
                lambda: x + 1,
                compile_a_kernel,
                lambda: x.data.memset_async(0, 8),
                cupy.cuda.Device().synchronize,
                lambda: event.record(stream),
                lambda: cupy.array(np.ones(2)),
            ]
            assert [status_of(call) for call in calls] == [LAUNCH_FAILURE] * len(calls)
            with cupy.cuda.Device(1):
                cupy.ones(2).get()
                Event().synchronize()
        assert event.done


def test_what_errors_say():
    """Errors have CuPy's texts: a name and a description; what the stand-in adds is their cause."""
    for error, text in (
        (CUDARuntimeError(400), "cudaErrorInvalidResourceHandle: invalid resource handle"),
        (CUDADriverError(400), "CUDA_ERROR_INVALID_HANDLE: invalid resource handle"),
    ):
        assert str(error) == text
        assert error.status == 400
        copied = pickle.loads(pickle.dumps(error))
        assert (type(copied), copied.status, str(copied)) == (type(error), 400, text)
    with pytest.raises(CUDARuntimeError) as error:
        cupy.zeros(1).data.memset_async(0, 9)
    assert "no 9 bytes of an array at 0x" in str(error.value.__cause__)


def test_handles():
    stream, event = Stream(), Event()
    handles = stream.ptr, event.ptr
    assert runtime.streamQuery(handles[0]) == runtime.eventQuery(handles[1]) == 0
    del stream, event
    assert runtime.streamQuery(handles[0]) == runtime.eventQuery(handles[1]) == INVALID_HANDLE
    assert status_of(runtime.streamIsCapturing, handles[0]) == INVALID_HANDLE
