"""The one place that compiles and launches CUDA kernels; it knows nothing of batch norm."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps import sources
from cupybn._steps.arguments import WORD, Arguments

Array = Any  # cupy.ndarray

SHARED = 28 << 10
"""Bytes of dynamic shared memory that a block may have without asking: of 48 KiB, what kernels leave of them."""
_asking = threading.Lock()
"""Held while a kernel is asked for more shared memory: another thread could ask for less, later."""


class Listener(Protocol):
    """Whoever is told of launches, and of arrays that are made for them."""

    def launched(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, shared: int, values: Sequence[Any], words: memoryview
    ) -> None:
        """Note a launch, with the values of all arguments as they were given and the words that they make."""

    def made(self, array: Array) -> None:
        """Note an array that was allocated for a launch."""


class _Listening(threading.local):
    """The listener of a thread, if there is one."""

    reference: weakref.ref[Listener] | None = None  # weak: an interrupt may come before a listener has taken its leave

    @property
    def listener(self) -> Listener | None:
        """The listener, or None."""
        return None if self.reference is None else self.reference()


listening = _Listening()


class Hearing:
    """Context in which a listener, or nobody, is told of what this thread launches; it may be nested."""

    def __init__(self, listener: Listener | None) -> None:
        self._reference = None if listener is None else weakref.ref(listener)

    def __enter__(self) -> None:
        self._before, listening.reference = listening.reference, self._reference

    def __exit__(self, *_: object) -> None:
        listening.reference = self._before


_NOBODY_LISTENS = contextlib.nullcontext()
"""Context for threads that have no listener."""


def unheard() -> contextlib.AbstractContextManager[None]:
    """Context for launches that no listener of this thread is to hear of.

    A call may be made in the midst of another one, which is being recorded: by a hook of CuPy's, a signal handler, or
    whatever runs when an object is collected.
    """
    return _NOBODY_LISTENS if listening.reference is None else Hearing(None)


class Frame:
    """Memory for the arguments of one launch at a time, and that memory as CuPy takes arguments.

    CuPy looks at what it is given anew at each launch, which takes it a microsecond for a NumPy array. Its
    `CNumpyArray` is what it makes of such an array: made once, it is passed on as it is, whatever the memory holds.

    Parameters
    ----------
    ranges : sequence of (int, int)
        As in `Arguments`.

    Attributes
    ----------
    words, doubles : memoryview
        The memory, as integers and as floating-point numbers.
    arguments : tuple
        What CuPy's kernels take, an object for each parameter.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        memory = bytearray(ranges[-1][1] * WORD)
        self.words, self.doubles = memoryview(memory).cast("Q"), memoryview(memory).cast("d")
        by_value = import_cupy().cuda.function.CNumpyArray
        self.arguments = tuple(
            by_value(np.frombuffer(memory, np.dtype((np.void, (stop - start) * WORD)), 1, start * WORD))
            for start, stop in ranges
        )


class Kernel:
    """A kernel with a set of macros, compiled at its first launch.

    Parameters
    ----------
    name : str
        As in `kernel_names`.
    macros : mapping of names to values
        ``DATA_T``, a dtype, is what ``data_t`` stands for.
    """

    def __init__(self, name: str, macros: Mapping[str, Any]) -> None:
        self.name = name
        self.options = tuple(f"-D{key}={getattr(value, 'name', value)}" for key, value in macros.items())
        pointees = {
            "data_t*": macros["DATA_T"],
            "double*": np.dtype(np.float64),
            "long long*": np.dtype(np.int64),
            "unsigned long long*": np.dtype(np.uint64),
            "bool*": np.dtype(np.bool_),
            "passed_t*": np.dtype(np.uint8 if macros.get("WIDTH", 1) > 1 else np.bool_),
        }
        self.arguments = Arguments(name, sources.signature(name), pointees)
        self._shared: dict[int, int] = {}  # bytes that have been asked for, on each device
        self._frames: list[Frame] = []  # those that no launch is using

    def launch(self, grid: tuple[int, ...], block: int, arguments: Mapping[str, Any], shared: int = 0) -> None:
        """Launch on the current stream of the current device, with so many bytes of dynamic shared memory.

        Raises
        ------
        TypeError
            If an argument is missing, unknown, of another type or dtype than declared, or strided.
        ValueError
            If an array is on another device. Nothing is launched then.
        """
        device = import_cupy().cuda.runtime.getDevice()
        values = self.arguments.listed(arguments)
        words = memoryview(self.arguments.packed(values, device)).cast("Q")
        if shared > self._shared.get(device, SHARED):
            with _asking:
                most = max(shared, self._shared.get(device, SHARED))
                self.raw.max_dynamic_shared_size_bytes = most
                self._shared[device] = most
        frame = self.frame()
        frame.words[:] = words
        self.run(grid, block, frame, shared)
        listener = listening.listener
        if listener is not None:
            listener.launched(self, grid, block, shared, values, words)

    def frame(self) -> Frame:
        """A frame that no other launch is using, in this thread or another one. It holds what the last one left."""
        try:
            return self._frames.pop()
        except IndexError:
            return Frame(self.arguments.ranges)

    def run(self, grid: tuple[int, ...], block: int, frame: Frame, shared: int) -> None:
        """Launch with the arguments in a frame, which is free again then: a launch copies what it is given.

        Nothing is checked. The current device is one on which `launch` has asked for as much shared memory.
        """
        self.raw(grid, (block,), frame.arguments, shared_mem=shared)
        self._frames.append(frame)

    @functools.cached_property
    def raw(self) -> Any:
        """CuPy's kernel, which compiles at its first launch on each device."""
        return import_cupy().RawKernel(sources.source(self.name), self.name.rpartition("/")[2], self.options)


@functools.cache
def kernel(name: str, **macros: Any) -> Kernel:
    """The one `Kernel` of this name and these macros."""
    return Kernel(name, macros)
