"""Time on the device, by events around replays of a graph, and time on the host.

A graph leaves out what the host does for a call, so that the two are measured apart. A graph holds several calls: on
several sets of buffers, more than the L2 cache holds (cold), or on one set again and again (warm).
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
"""Times the size of the L2 cache that cold calls go through before they come back to a buffer."""


class Effort(NamedTuple):
    """How much is done for one figure."""

    seconds: float = 0.2
    """Seconds that a figure takes, about."""
    least_rounds: int = 5
    most_rounds: int = 40
    least_calls: int = 4
    """Calls of a graph, at least: what lies between two graphs is then little beside them."""
    burst: int = 20
    """Calls between two looks at the clock of the host: too few to fill the queue of the device."""
    most_sets: int = 1024
    """Sets of buffers, at most: arrays of less than a few hundredths of a MB stay in the cache."""


AS_LITTLE_AS_POSSIBLE = Effort(0, 2, 2, 1, 1, 2)
"""The effort on the stand-in, where a figure means nothing."""


class Spread(NamedTuple):
    """Median and quartiles, in microseconds."""

    median: float
    low: float
    high: float


def spread(times: Sequence[float]) -> Spread:
    """Median and quartiles of some times, in microseconds."""
    low, median, high = quantiles(times, n=4, method="inclusive")
    return Spread(median, low, high)


class Graph(Protocol):
    """Captured calls."""

    results: list[Any]
    """What the calls returned: each replay writes it anew."""
    calls: int

    def replay(self, rounds: int) -> list[float]:
        """Launch it so many times, and wait; microseconds of each."""


def device_time(graph: Graph, effort: Effort) -> Spread:
    """The time of one call of a graph on the device."""
    once = graph.replay(2)[-1]
    rounds = int(min(max(effort.seconds * 1e6 / max(once, 1), effort.least_rounds), effort.most_rounds))
    return spread([time / graph.calls for time in graph.replay(rounds)])


def host_time(call: Call, synchronize: Call, effort: Effort) -> Spread:
    """The time of one call, until it returns; the device catches up between the bursts, which is not counted."""
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
    """How many sets of buffers it takes to go through several times the L2 cache."""
    return min(1 + math.ceil(COLD * l2_bytes / bytes_of_a_call), effort.most_sets)


def rotate(calls: Sequence[Call], effort: Effort) -> list[Call]:
    """The calls for a graph, each set in turn."""
    return [calls[i % len(calls)] for i in range(max(len(calls), effort.least_calls))]


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


@functools.cache
def _workplace() -> tuple[Any, Any]:
    """The stream of graphs, and a pool of memory that nobody else gets anything from: graphs go on writing there."""
    cuda = import_cupy().cuda
    return cuda.Stream(non_blocking=True), cuda.MemoryPool()


def release() -> None:
    """Give back the memory of graphs that are gone."""
    _workplace()[1].free_all_blocks()


def _run_all(calls: Sequence[Call], keep: bool, results: list[Any], end: Call) -> None:
    """Make all calls of a capture, which must end when one of them fails."""
    try:
        for call in calls:
            if not keep:
                results.clear()
            results.append(call())
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what to say
            end()
        raise


class CupyGraph:
    """Calls that launch through CuPy; one graph at a time, since they share their memory.

    Parameters
    ----------
    calls : sequence of functions without arguments
    keep : bool
        Each result in memory of its own, else that of the last call alone: the memory of the others is used again.
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
        self._stream.begin_capture()
        _run_all(calls, keep, self.results, self._stream.end_capture)
        return self._stream.end_capture()

    def replay(self, rounds: int) -> list[float]:
        """Launch it so many times, and wait; microseconds of each."""
        events = [(self._cuda.Event(), self._cuda.Event()) for _ in range(rounds)]
        for start, end in events:
            start.record(self._stream)
            self._graph.launch(self._stream)
            end.record(self._stream)
        self._stream.synchronize()
        return [1e3 * self._cuda.get_elapsed_time(start, end) for start, end in events]


class TorchGraph:
    """Calls that launch through PyTorch, on the stream that their forward passes ran on. Parameters as `CupyGraph`."""

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
        """Launch it so many times, and wait; microseconds of each."""
        events = [[self._torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        with self._torch.cuda.stream(self._stream):
            for start, end in events:
                start.record(self._stream)
                self._graph.replay()
                end.record(self._stream)
        self._stream.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]


def copy_time(nbytes: int, l2_bytes: int, effort: Effort) -> Spread:
    """The time of a copy on the device that reads half of these bytes and writes the other half, cold."""
    cupy = import_cupy()
    half = max(nbytes // 2, 1)
    sets = cold_sets(nbytes, l2_bytes, effort)
    pairs = [(cupy.zeros(half, cupy.uint8), cupy.empty(half, cupy.uint8)) for _ in range(sets)]
    calls = [lambda source=source, target=target: cupy.copyto(target, source) for source, target in pairs]
    return device_time(CupyGraph(rotate(calls, effort), keep=False), effort)
