"""What the streams of all threads capture, and what CUDA forbids meanwhile, even in threads that capture nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakSet

from cupy import emulator
from cupy._errors import CUDARuntimeError, DetailError, _CUDAError

GLOBAL, THREAD_LOCAL, RELAXED = range(3)

Work = Callable[[], object]

_local = threading.local()
_under_way: WeakSet[Capture] = WeakSet()


class Capture:
    """The record of a stream's work between `begin_capture` and `end_capture`.

    Attributes
    ----------
    mode
        Threads that may make no potentially unsafe calls: all, this one, or none.
    blocking
        Whether the stream and the default (legacy) stream wait for each other.
    valid
        Whether no call has spoiled the capture.
    """

    def __init__(self, device: int, mode: int, blocking: bool) -> None:
        self.device, self.mode, self.blocking = device, mode, blocking
        self.thread = threading.get_ident()
        self.work: list[Work] = []
        self.valid = True
        _under_way.add(self)

    def end(self) -> None:
        """End the capture, after which it forbids nothing."""
        _under_way.discard(self)


def exchange_mode(mode: int) -> int:
    """Give this thread a mode, and return its former one."""
    if mode not in (GLOBAL, THREAD_LOCAL, RELAXED):
        raise ValueError(mode)
    before: int = getattr(_local, "mode", GLOBAL)
    _local.mode = mode
    return before


def status_of_unsafe_call(device: int) -> int:
    """The status of a call that waits for a device, asks it, or changes its memory without a stream.

    It spoils the captures that forbid it: those of this thread that are not relaxed, and the global ones of other
    threads. A thread in relaxed mode may call as it likes; for one in thread-local mode, its own captures count alone.
    """
    mode = getattr(_local, "mode", GLOBAL)
    forbidding = [
        capture
        for capture in list(_under_way)
        if capture.mode != RELAXED
        and mode != RELAXED
        and (capture.thread == threading.get_ident() or GLOBAL == mode == capture.mode)
    ]
    return _spoil(forbidding) or emulator.faults.get(device, 0)


def status_of_whole_device(device: int) -> int:
    """The status of a call that waits for all streams of a device, whatever the modes."""
    return _spoil([capture for capture in list(_under_way) if capture.device == device]) or status_of_unsafe_call(
        device
    )


def status_of_legacy_stream(device: int) -> int:
    """The status of using the default stream, which waits for all streams but non-blocking ones."""
    return (906 if _spoil(before_legacy_stream(device)) else 0) or emulator.faults.get(device, 0)


def before_legacy_stream(device: int) -> list[Capture]:
    """The captures of those streams that the default stream would wait for."""
    return [capture for capture in list(_under_way) if capture.device == device and capture.blocking]


def check(status: int, what: str, kind: type[_CUDAError] = CUDARuntimeError) -> None:
    """Raise the error that a status stands for, if any."""
    if status:
        raise kind(status) from DetailError(what)


def _spoil(captures: list[Capture]) -> int:
    for capture in captures:
        capture.valid = False
    return 900 if captures else 0
