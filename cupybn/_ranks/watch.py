"""What ends a message of NCCL that never comes to its end."""

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
"""Seconds between two looks at the device."""
IDLE = 1.0
"""Seconds without a message after which the thread ends."""
NOT_READY = 600
"""What CUDA says of an event that its stream has not come to."""
RELAXED = 2
"""The capture mode of a thread whose calls spoil no capture of another thread."""


@dataclass
class _Message:
    """A collective of NCCL, between two events of its stream."""

    begin: Any
    end: Any
    timeout: float | None
    started: bool = False
    """Whether the host has started it: it may wait for other ranks, too."""


class Watch:
    """A thread that aborts a communicator when one of its collectives fails, or takes longer than it may.

    A kernel of NCCL whose peer is gone spins for ever, and with it every stream and host that waits for it.

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
            Seconds, from when the stream has come to the collective. None watches for failures alone.

        Raises
        ------
        RuntimeError
            If this one cannot be started, or an earlier one has failed.
        """
        self.check()
        if stream.is_capturing():  # nothing runs yet, and there is no time to look at
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
        finally:  # also where the host is interrupted: the message may be on its way
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
        """Whether a message has failed: its communicator is aborted, or about to be."""
        return self._failure is not None

    def _put(self, message: _Message) -> None:
        with self._lock:
            self._messages.put(message)
            if self._thread is None:
                device = import_cupy().cuda.runtime.getDevice()
                thread = threading.Thread(target=self._look_after, args=(device,), name="cupybn-nccl", daemon=True)
                thread.start()
                self._thread = thread

    def _look_after(self, device: int) -> None:
        """Watch all messages, one after the other, until there are none for a while."""
        _relax_captures()
        import_cupy().cuda.Device(device).use()  # to ask for an event starts the current device, which is 0 in a thread
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
        began = None
        while self._failure is None:
            try:
                if message.started and _is_done(message.end):
                    return
                if _is_done(message.begin) and began is None:
                    began = time.monotonic()
                self.comm.check_async_error()
            except Exception as error:  # of CUDA or NCCL
                self._failure = self._failure or str(error)
            seconds = 0.0 if began is None else time.monotonic() - began
            if message.timeout is not None and seconds > message.timeout:
                self._failure = self._failure or f"a message has taken more than {message.timeout:g} s"
            time.sleep(NAP)


def _is_done(event: Any) -> bool:
    """Whether the stream has come to an event. Unlike ``event.done``, an error is not the same as "not yet"."""
    runtime = import_cupy().cuda.runtime
    status: int = runtime.eventQuery(event.ptr)
    if status not in (0, NOT_READY):
        raise runtime.CUDARuntimeError(status)
    return status == 0


def _relax_captures() -> None:
    """Let this thread ask for events while other threads capture graphs, which it would spoil otherwise.

    The mode is the driver's. CuPy has no name for it, and links the runtime so that nobody else finds that.
    """
    with contextlib.suppress(OSError, AttributeError):  # no driver, or one from before CUDA 10.1
        ctypes.cdll["libcuda.so.1"].cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))


_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()


def watch_of(comm: Any) -> Watch:
    """The one `Watch` of a communicator, which many layers may share."""
    watch = _watches.get(comm.comm)
    if watch is None or watch.comm is not comm:
        watch = _watches[comm.comm] = Watch(comm)
    return watch
