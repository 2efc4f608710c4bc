"""Streams, events, graphs. Work runs at once, except while a stream captures: then it waits for the graph's launch."""

# The parameters are CuPy's, whether they are used here or not.
# ruff: noqa: ARG002

from __future__ import annotations

import itertools
import threading
import time
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from cupy import emulator
from cupy._errors import CUDARuntimeError, _CUDAError
from cupy.cuda import _capture, runtime
from cupy.cuda._capture import Capture, Work, check
from cupy.cuda.graph import Graph

__all__ = ["Event", "Stream", "get_current_stream", "get_elapsed_time"]

_local = threading.local()
_handles = itertools.count(0x1000, 0x10)


class Stream:
    """A queue of work for the device that was current when the stream was made."""

    null: ClassVar[Stream]
    ptds: ClassVar[Stream]

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        own = not null and not ptds
        self.ptr = next(_handles) if own else 0 if null else runtime.streamPerThread
        self.device_id = runtime.getDevice() if own else -1
        self.is_non_blocking, self.priority = non_blocking, priority or 0
        self._capture: Capture | None = None
        if own:
            _live[self.ptr] = self

    @classmethod
    def from_external(cls, obj: Any) -> Stream:
        """The stream of another library, which stays its owner, by the protocol of CUDA's streams."""
        try:
            version, ptr = obj.__cuda_stream__()
        except AttributeError as error:
            raise TypeError(
                f"Object of type {type(obj).__name__} does not implement the CUDA stream protocol (__cuda_stream__ "
                "method)"
            ) from error
        if version != 0:
            raise TypeError(f"__cuda_stream__() returned unsupported version {version}, only version 0 is supported")
        stream, known = cls.__new__(cls), find_stream(ptr)
        vars(stream).update(vars(Stream.null if known is None else known), ptr=ptr, device_id=-1)
        return stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def use(self) -> Stream:
        """Make this stream the current one of this thread on its device."""
        device = runtime.getDevice()
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"This stream was created on device {self.device_id}, while the current device is {device}"
            )
        _currents()[device] = self
        return self

    def __enter__(self) -> Stream:
        self.use()
        _entered().append((runtime.getDevice(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        device, _ = _entered().pop()
        below = [stream for index, stream in _entered() if index == device]
        _currents()[device] = below[-1] if below else Stream.null  # whatever `use` had chosen, as CuPy has it

    def synchronize(self) -> None:
        """Wait for all work of this stream."""
        self._wait("synchronize")

    @property
    def done(self) -> bool:
        """Whether CUDA reports the work as done; not where it reports an error. Here work is done at once."""
        return runtime.streamQuery(self.ptr) == 0

    def record(self, event: Event | None = None) -> Event:
        """Record the place in the stream in an event."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Wait for an event: nothing to do, as it has happened already or is part of the same graph."""
        if event._capture is self._capture:
            check(self._status_of_use(), "wait for an event")
        elif self._capture is not None:
            self._capture.valid = False
            raise CUDARuntimeError(905)
        else:
            raise NotImplementedError("the stand-in for CuPy captures one stream, and no other ones by its events")

    def begin_capture(self, mode: int | None = None) -> None:
        """Begin a capture: from now on, the stream's work waits for the launch of a graph."""
        if self.ptr in (0, runtime.streamLegacy):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        mode = runtime.streamCaptureModeRelaxed if mode is None else mode
        if mode not in (_capture.GLOBAL, _capture.THREAD_LOCAL, _capture.RELAXED):
            raise CUDARuntimeError(1)
        if self._capture is not None:
            raise CUDARuntimeError(401)
        self._capture = Capture(self._device(), mode, not self.is_non_blocking)

    def end_capture(self) -> Graph:
        """End the capture; returns the graph of the work since `begin_capture`."""
        capture = self._capture
        if capture is None:
            raise CUDARuntimeError(401)
        if capture.mode != _capture.RELAXED and capture.thread != threading.get_ident():
            raise CUDARuntimeError(908)
        capture.end()
        self._capture = None
        if not capture.valid:
            raise CUDARuntimeError(901)
        return Graph._from_stream(capture.work, capture.device)

    def is_capturing(self) -> bool:
        """Whether the stream captures; an error if the capture is spoiled."""
        return runtime.streamIsCapturing(self.ptr)

    # -----------------------------------------------------------------------------------------------------------------
    # What the stand-in does with streams

    def _enqueue(self, work: Work, what: str, kind: type[_CUDAError] = CUDARuntimeError) -> None:
        """Do some work now, or note it for the launch of the graph."""
        check(self._status_of_use(), what, kind)
        if self._capture is None:
            work()
        else:
            self._capture.work.append(work)

    def _wait(self, what: str) -> None:
        """Count that the host waits for this stream."""
        check(self._status_of_query(), what)
        emulator.count_sync(what)

    def _status_of_use(self) -> int:
        """The status of a call that gives the stream work."""
        if self._capture is not None:
            return 0 if self._capture.valid else 901
        if self.ptr in (0, runtime.streamLegacy):
            return _capture.status_of_legacy_stream(self._device())
        return emulator.faults.get(self._device(), 0)

    def _status_of_query(self) -> int:
        """The status of a call that asks how far the stream is, or waits for it."""
        if self._capture is not None:
            self._capture.valid = False
            return 900
        return self._status_of_use() or _capture.status_of_unsafe_call(self._device())

    def _forbid_transfer(self, direction: str) -> None:
        """Raise CuPy's error if the stream is to copy from or to the host while it captures."""
        if self.is_capturing():
            raise RuntimeError(f"the current stream is capturing, so {direction} transfers are disallowed")

    def _device(self) -> int:
        return runtime.getDevice() if self.device_id < 0 else self.device_id


class Event:
    """A moment in the work of a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr = next(_handles)
        self._device = runtime.getDevice()
        self._timing = not disable_timing
        self._time: float | None = None
        self._capture: Capture | None = None  # capture of the stream that recorded this event last
        _events[self.ptr] = self

    def record(self, stream: Stream | None = None) -> None:
        """Record the moment; if the stream captures, the event stands for a place in the graph."""
        stream = get_current_stream() if stream is None else stream
        check(stream._status_of_use(), "record")
        self._capture, self._time = stream._capture, time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the work before the event."""
        check(self._status(), "synchronize")
        emulator.count_sync("synchronize")

    @property
    def done(self) -> bool:
        """Whether CUDA reports that the event has happened; not where it reports an error. Work runs at once."""
        return runtime.eventQuery(self.ptr) == 0

    def _status(self) -> int:
        """The status of a call that asks whether the event has happened, or waits for it."""
        if self._capture is not None:
            self._capture.valid = False
            return 907
        return _capture.status_of_unsafe_call(self._device)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events."""
    events = start_event, end_event
    if any(event._capture is not None for event in events):
        raise CUDARuntimeError(907)
    if start_event._time is None or end_event._time is None or not all(event._timing for event in events):
        raise CUDARuntimeError(400)
    return (end_event._time - start_event._time) * 1e3


def get_current_stream(device_id: int = -1) -> Stream:
    """The stream that this thread uses on the current device, or on another one."""
    return _currents().get(runtime.getDevice() if device_id < 0 else device_id, Stream.null)


def find_stream(ptr: int) -> Stream | None:
    """The live stream with this handle."""
    if ptr in (Stream.null.ptr, runtime.streamLegacy):
        return Stream.null
    return Stream.ptds if ptr == Stream.ptds.ptr else _live.get(ptr)


def find_event(ptr: int) -> Event | None:
    """The live event with this handle."""
    return _events.get(ptr)


def note_get(what: str, stream: Stream | None = None, blocking: bool = True) -> None:
    """Count a copy to the host by a stream (by default the current one); the host waits for it if it blocks."""
    stream = get_current_stream() if stream is None else stream
    stream._forbid_transfer("D2H")
    check(stream._status_of_use(), what)
    if blocking:
        stream._wait(what)


def note_set(stream: Stream | None = None) -> None:
    """Check that a stream may copy from the host.

    CuPy asks whether earlier copies are done, so that their buffers can be used again: an unsafe call.
    """
    stream = get_current_stream() if stream is None else stream
    stream._forbid_transfer("H2D")
    check(stream._status_of_use(), "a copy from the host")
    _capture.status_of_unsafe_call(stream._device())  # ignores the status, as CuPy does


def _entered() -> list[tuple[int, Stream]]:
    """The stack of this thread's `with` statements: the device and the stream of each."""
    if not hasattr(_local, "entered"):
        _local.entered = []
    entered: list[tuple[int, Stream]] = _local.entered
    return entered


def _currents() -> dict[int, Stream]:
    if not hasattr(_local, "streams"):
        _local.streams = {}
    streams: dict[int, Stream] = _local.streams
    return streams


_live: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_events: WeakValueDictionary[int, Event] = WeakValueDictionary()
Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)
