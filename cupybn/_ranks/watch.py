"""The watch over NCCL: a thread that ends collectives which would never end by themselves."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cupybn._arrays.devices import import_cupy

NAP = 0.02
"""Seconds between two looks of the thread at the device."""
IDLE = 1.0
"""Seconds after which the thread ends if there is no collective to watch."""
NOT_READY = 600
"""Status that CUDA returns for an event that its stream has not come to."""
RELAXED = 2
"""Capture mode of a thread whose calls do not invalidate captures in other threads (CU_STREAM_CAPTURE_MODE_RELAXED)."""


@dataclass
class _Message:
    """A collective of NCCL that is watched, between two events on its stream."""

    begin: Any
    end: Any
    timeout: float | None
    started: bool = False
    """Whether the host has started the collective. Starting may itself wait for other ranks."""


class Watch:
    """A thread that aborts a communicator when one of its collectives fails or takes too long.

    A kernel of NCCL whose peer is gone spins for ever, and every stream and host that waits for it hangs as well.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self._failure: str | None = None
        self._messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def over(self, stream: Any, timeout: float | None) -> Iterator[Any]:
        """Watch the collective that is started in this context, on this stream.

        Parameters
        ----------
        timeout : float or None
            Seconds that the collective may take, from when the stream has come to it. None watches for failures alone.

        Raises
        ------
        RuntimeError
            If this collective cannot be started, or an earlier one has failed.
        """
        self.check()
        if stream.is_capturing():  # in a graph nothing runs yet, so that there is nothing to watch
            yield stream
            return
        begin, end = (import_cupy().cuda.Event(disable_timing=True) for _ in range(2))
        begin.record(stream)
        message = _Message(begin, end, timeout)
        self._put(message)
        try:
            yield stream
        except Exception as error:
            self._failure = self._failure or str(error)
        finally:  # also if Ctrl-C interrupts the host: the collective may have been started
            if not self.failed:
                end.record(stream)
                message.started = True
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if the communicator has been aborted."""
        if self._failure is not None:
            raise RuntimeError(f"NCCL has lost the other ranks of this communicator: {self._failure}")

    @property
    def failed(self) -> bool:
        """Whether a collective has failed: the communicator has been aborted, or is about to be."""
        return self._failure is not None

    def _put(self, message: _Message) -> None:
        """Hand a collective to the thread, which is started if none is running."""
        with self._lock:
            self._messages.put(message)
            if self._thread is None:
                device = import_cupy().cuda.runtime.getDevice()
                thread = threading.Thread(target=self._look_after, args=(device,), name="cupybn-nccl", daemon=True)
                thread.start()
                self._thread = thread

    def _look_after(self, device: int) -> None:
        """Watch all collectives, one after the other, until there are none for a while. Runs in the thread."""
        _relax_captures()
        import_cupy().cuda.Device(device).use()  # a new thread is on device 0, which querying an event would initialise
        while self._failure is None:
            try:
                message = self._messages.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    if self._messages.empty():
                        self._thread = None
                        return
                continue
            self._look_after_one(message)
        self.comm.abort()

    def _look_after_one(self, message: _Message) -> None:
        """Watch a collective until it ends, or until something has failed."""
        began = None
        while self._failure is None:
            try:
                if message.started and _is_done(message.end):
                    return
                if _is_done(message.begin) and began is None:
                    began = time.monotonic()
                self.comm.check_async_error()
            except Exception as error:  # CUDA and NCCL have errors of their own
                self._failure = self._failure or str(error)
            seconds = 0.0 if began is None else time.monotonic() - began
            if message.timeout is not None and seconds > message.timeout:
                self._failure = self._failure or f"a message has taken more than {message.timeout:g} s"
            time.sleep(NAP)


def _is_done(event: Any) -> bool:
    """Whether the stream has come to an event. Raises the errors that ``event.done`` takes for "not yet"."""
    runtime = import_cupy().cuda.runtime
    status: int = runtime.eventQuery(event.ptr)
    if status not in (0, NOT_READY):
        raise runtime.CUDARuntimeError(status)
    return status == 0


def _relax_captures() -> None:
    """Let this thread query events while other threads capture graphs, which that would invalidate otherwise.

    The driver is called directly: CuPy has no function for this, and its own copy of the runtime cannot be reached.
    """
    with contextlib.suppress(OSError, AttributeError):  # there is no driver, or it is older than CUDA 10.1
        ctypes.cdll["libcuda.so.1"].cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))


_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
"""Watches by the handles of their communicators. A handle may be used again once its communicator is gone."""


def watch_of(comm: Any) -> Watch:
    """The one `Watch` of a communicator, which all layers with this communicator share."""
    watch = _watches.get(comm.comm)
    if watch is None or watch.comm is not comm:
        watch = _watches[comm.comm] = Watch(comm)
    return watch
