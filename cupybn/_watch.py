"""What ends a message of NCCL that never comes to its end."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cupybn._devices import import_cupy

NAP = 0.02
"""Seconds between two looks at the device."""
IDLE = 1.0
"""Seconds without a message after which the thread ends."""


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
        self.check()
        end.record(stream)
        message.started = True

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
                self._thread = threading.Thread(target=self._look_after, name="cupybn-nccl", daemon=True)
                self._thread.start()

    def _look_after(self) -> None:
        """Of all messages, one after the other, until there are none for a while."""
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
        while self._failure is None and not (message.started and message.end.done):
            if began is None and message.begin.done:
                began = time.monotonic()
            seconds = 0.0 if began is None else time.monotonic() - began
            self._failure = self._failure or self._what_failed(seconds, message.timeout)
            time.sleep(NAP)

    def _what_failed(self, seconds: float, timeout: float | None) -> str | None:
        try:
            self.comm.check_async_error()
        except Exception as error:
            return str(error)
        if timeout is not None and seconds > timeout:
            return f"a message has taken more than {timeout:g} s"
        return None


_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()


def watch_of(comm: Any) -> Watch:
    """The one `Watch` of a communicator, which many layers may share."""
    watch = _watches.get(comm.comm)
    if watch is None or watch.comm is not comm:
        watch = _watches[comm.comm] = Watch(comm)
    return watch
