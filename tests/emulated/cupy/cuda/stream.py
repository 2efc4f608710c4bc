"""Streams, events, graphs. Work runs at once, but while a stream captures it waits for the launch of the graph."""

# The parameters are CuPy's.
# ruff: noqa: ARG002

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakValueDictionary

from cupy import emulator
from cupy.cuda import runtime

Work = Callable[[], object]

_local = threading.local()
_handles = itertools.count(0x1000, 0x10)


class Graph:
    """Captured work. It keeps the arrays alive that it works on, which CUDA's graphs do not."""

    def __init__(self, work: list[Work], device: int) -> None:
        self._work, self._device = work, device

    def launch(self, stream: Stream | None = None) -> None:
        """Do the work in the order in which it was captured."""
        stream = get_current_stream() if stream is None else stream
        if stream.is_capturing():
            stream._record(self._run)
        else:
            self._run()

    def upload(self, stream: Stream | None = None) -> None:
        """Nothing to do here."""

    def _run(self) -> None:
        from cupy.cuda.device import Device

        with Device(self._device):
            for work in self._work:
                work()


class Stream:
    """A queue of work of the device that was current when the stream was made."""

    null: ClassVar[Stream]
    ptds: ClassVar[Stream]

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        own = not null and not ptds
        self.ptr = next(_handles) if own else 0 if null else runtime.streamPerThread
        self.device_id = runtime.getDevice() if own else -1
        self.is_non_blocking, self.priority = non_blocking, priority or 0
        self._captured: list[Work] | None = None
        self._invalid = False
        if own:
            _live[self.ptr] = self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def use(self) -> Stream:
        """Make this stream the current one of this thread and device."""
        device = runtime.getDevice()
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"This stream was created on device {self.device_id}, while the current device is {device}"
            )
        _currents()[device] = self
        return self

    def __enter__(self) -> Stream:
        before = (runtime.getDevice(), get_current_stream())
        self.use()
        _entered().append(before)
        return self

    def __exit__(self, *exception: object) -> None:
        device, stream = _entered().pop()
        _currents()[device] = stream

    def synchronize(self) -> None:
        """Wait for all work of this stream."""
        note_sync("synchronize", self)

    @property
    def done(self) -> bool:
        """Always: work runs at once."""
        return True

    def record(self, event: Event | None = None) -> Event:
        """Note the time in an event."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for: what the event stands for has happened."""

    def begin_capture(self, mode: int | None = None) -> None:
        """From now on, work of this stream waits for the launch of a graph."""
        if not self.ptr:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._captured is not None:
            raise runtime.CUDARuntimeError(401)
        self._captured, self._invalid = [], False

    def end_capture(self) -> Graph:
        """The graph of the work since `begin_capture`."""
        if self._captured is None:
            raise runtime.CUDARuntimeError(401)
        work, self._captured = self._captured, None
        if self._invalid:
            raise runtime.CUDARuntimeError(901)
        return Graph(work, runtime.getDevice() if self.device_id < 0 else self.device_id)

    def is_capturing(self) -> bool:
        """Whether work waits for the launch of a graph."""
        return self._captured is not None

    def _record(self, work: Work) -> None:
        """Keep work for the launch of the graph."""
        if self._captured is None:
            raise runtime.CUDARuntimeError(401)
        self._captured.append(work)


class Event:
    """A moment in the work of a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for what came before the event."""
        note_sync("synchronize")

    @property
    def done(self) -> bool:
        """Always: work runs at once."""
        return True


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds between two events."""
    if start._time is None or end._time is None:
        raise runtime.CUDARuntimeError(400)
    return (end._time - start._time) * 1e3


def get_current_stream(device_id: int = -1) -> Stream:
    """The stream that this thread works on, on the current device or on another one."""
    return _currents().get(runtime.getDevice() if device_id < 0 else device_id, Stream.null)


def find_stream(ptr: int) -> Stream | None:
    """The live stream of a handle."""
    if ptr in (Stream.null.ptr, runtime.streamLegacy):
        return Stream.null
    return Stream.ptds if ptr == Stream.ptds.ptr else _live.get(ptr)


def forbid_capture(what: str, stream: Stream | None = None) -> None:
    """Raise an error, and spoil the capture, if the (current) stream captures."""
    stream = get_current_stream() if stream is None else stream
    if stream.is_capturing():
        stream._invalid = True
        raise runtime.CUDARuntimeError(900, what)


def note_sync(what: str, stream: Stream | None = None) -> None:
    """Note that the host waits for a device: an error while the stream captures."""
    forbid_capture(what, stream)
    emulator.count_sync(what)


def _entered() -> list[tuple[int, Stream]]:
    """What was current before this thread's `with` statements."""
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
Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)
