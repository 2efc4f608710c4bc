"""Measurement of calls: their time on the device, by events around replays of a CUDA graph, and their time on the host.

A graph leaves out what the host does for a call, so that the two times are measured apart. A graph holds several calls,
either on several sets of buffers, more than the L2 cache holds (cold), or again and again on one set (warm).
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any, NamedTuple, Protocol

from cupybn._arrays.devices import import_cupy

Call = Callable[[], Any]

COLD = 3
"""Amount of memory, in sizes of the L2 cache, that cold calls go through before they come back to a buffer."""


class Effort(NamedTuple):
    """Effort that is spent on one figure."""

    seconds: float = 0.2
    """Seconds of measurement for a figure, about."""
    least_rounds: int = 5
    """Least number of rounds, each of which is timed: replays of a graph, or bursts of calls on the host."""
    most_rounds: int = 40
    """Largest number of rounds."""
    least_calls: int = 4
    """Least number of calls in a graph, so that the gap between two graphs is short beside them."""
    burst: int = 20
    """Calls between two looks at the clock of the host: too few to fill the queue of the device."""
    most_sets: int = 1024
    """Largest number of sets of buffers. So arrays of less than a few hundredths of a MB stay in the cache."""


AS_LITTLE_AS_POSSIBLE = Effort(0, 2, 2, 1, 1, 2)
"""Effort on the stand-in for CuPy, where a figure means nothing."""


class Spread(NamedTuple):
    """Median and quartiles of a time, in microseconds."""

    median: float
    low: float
    high: float


def spread(times: Sequence[float]) -> Spread:
    """Median and quartiles of some times, in microseconds."""
    low, median, high = quantiles(times, n=4, method="inclusive")
    return Spread(median, low, high)


class Graph(Protocol):
    """Calls that have been captured in a CUDA graph."""

    results: list[Any]
    """Results of the calls. Each replay writes to the same arrays."""
    calls: int
    """Number of calls in the graph."""

    def replay(self, rounds: int) -> list[float]:
        """Launch the graph so many times, and wait. Returns the microseconds of each launch."""


def device_time(graph: Graph, effort: Effort) -> Spread:
    """Time of one call of a graph on the device."""
    once = graph.replay(2)[-1]
    rounds = int(min(max(effort.seconds * 1e6 / max(once, 1), effort.least_rounds), effort.most_rounds))
    return spread([time / graph.calls for time in graph.replay(rounds)])


def host_time(call: Call, synchronize: Call, effort: Effort) -> Spread:
    """Time until one call returns on the host. The device catches up between bursts of calls, which is not counted."""
    call()
    synchronize()
    times: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(times) < effort.least_rounds or (time.perf_counter() < end and len(times) < effort.most_rounds):
        start = time.perf_counter()
        for _ in range(effort.burst):
            call()
        times.append((time.perf_counter() - start) * 1e6 / effort.burst)
        synchronize()
    return spread(times)


def cold_sets(bytes_of_a_call: float, l2_bytes: int, effort: Effort) -> int:
    """Number of sets of buffers that calls must go through so that the L2 cache holds none that comes again."""
    return min(1 + math.ceil(COLD * l2_bytes / bytes_of_a_call), effort.most_sets)


def rotate(calls: Sequence[Call], effort: Effort) -> list[Call]:
    """Calls for a graph, which go through the sets in turn."""
    return [calls[i % len(calls)] for i in range(max(len(calls), effort.least_calls))]


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


@functools.cache
def _workplace() -> tuple[Any, Any]:
    """Stream and memory pool of all graphs. Replays write to this memory, so nothing else may be allocated from it."""
    cuda = import_cupy().cuda
    return cuda.Stream(non_blocking=True), cuda.MemoryPool()


def release() -> None:
    """Free the memory of graphs that have been deleted."""
    _workplace()[1].free_all_blocks()


def _run_all(calls: Sequence[Call], keep: bool, results: list[Any], end: Call) -> None:
    """Make all calls of a capture. If one fails, the capture is ended first: until then the stream is of no use."""
    try:
        for call in calls:
            if not keep:
                results.clear()
            results.append(call())
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to raise
            end()
        raise


class CupyGraph:
    """Graph of calls that launch through CuPy. Only one at a time may exist, since graphs share their memory.

    Parameters
    ----------
    calls : sequence of functions without arguments
    keep : bool
        Whether each result has memory of its own. Otherwise only the last one is kept, and calls use memory again.
    """

    def __init__(self, calls: Sequence[Call], keep: bool) -> None:
        self._cuda = cuda = import_cupy().cuda
        self.calls = len(calls)
        self.results: list[Any] = []
        self._stream, pool = _workplace()
        cuda.Device().synchronize()  # the arguments were made on another stream
        allocator = cuda.get_allocator()
        cuda.set_allocator(pool.malloc)
        try:
            with self._stream:
                calls[0]()  # compiles and loads the kernels, which a capture must not
                self._stream.synchronize()
                self._graph = self._capture(calls, keep)
        finally:
            cuda.set_allocator(allocator)

    def _capture(self, calls: Sequence[Call], keep: bool) -> Any:
        """Graph of CuPy in which the calls are captured."""
        self._stream.begin_capture()
        _run_all(calls, keep, self.results, self._stream.end_capture)
        return self._stream.end_capture()

    def replay(self, rounds: int) -> list[float]:
        """Launch the graph so many times, and wait. Returns the microseconds of each launch."""
        events = [(self._cuda.Event(), self._cuda.Event()) for _ in range(rounds)]
        for start, end in events:
            start.record(self._stream)
            self._graph.launch(self._stream)
            end.record(self._stream)
        self._stream.synchronize()
        return [1e3 * self._cuda.get_elapsed_time(start, end) for start, end in events]


class TorchGraph:
    """Graph of calls that launch through PyTorch, on the stream of their forward passes.

    Parameters
    ----------
    calls, keep
        The same as those of `CupyGraph`.
    torch : module
    stream : torch.cuda.Stream
    """

    def __init__(self, calls: Sequence[Call], keep: bool, torch: Any, stream: Any) -> None:
        self._torch, self._stream = torch, stream
        self.calls = len(calls)
        self.results: list[Any] = []
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            calls[0]()
            torch.cuda.synchronize()
            self._graph.capture_begin(capture_error_mode="relaxed")
            _run_all(calls, keep, self.results, self._graph.capture_end)
            self._graph.capture_end()

    def replay(self, rounds: int) -> list[float]:
        """Launch the graph so many times, and wait. Returns the microseconds of each launch."""
        events = [[self._torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        with self._torch.cuda.stream(self._stream):
            for start, end in events:
                start.record(self._stream)
                self._graph.replay()
                end.record(self._stream)
        self._stream.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]


def copy_time(nbytes: int, l2_bytes: int, effort: Effort) -> Spread:
    """Time of a copy on the device that moves as many bytes, half of them read and half written, in a cold cache."""
    cupy = import_cupy()
    half = max(nbytes // 2, 1)
    sets = cold_sets(nbytes, l2_bytes, effort)
    pairs = [(cupy.zeros(half, cupy.uint8), cupy.empty(half, cupy.uint8)) for _ in range(sets)]
    calls = [lambda source=source, target=target: cupy.copyto(target, source) for source, target in pairs]
    return device_time(CupyGraph(rotate(calls, effort), keep=False), effort)
