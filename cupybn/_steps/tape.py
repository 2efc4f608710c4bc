"""Tapes: the launches of a call on CuPy arrays, noted when it is made first, and made again for calls that are alike.

What a step does depends on the forms of its arrays: it chooses the same kernels, allocates the same arrays and packs
the same arguments, but for addresses and for the numbers in `NUMBERS`. So the first call of a form takes its steps
while a recorder listens; later ones play the tape, which writes addresses and numbers to their places and launches.
On a call of some microseconds that is half of the host's time.

A recorder knows each address that a launch was given: as that of an array of the call, or as within an array that the
steps have made. If there is any other one, as where a step has copied an array, there is no tape, and calls of that
form go on to take their steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps.arguments import WORD
from cupybn._steps.geometry import PACK
from cupybn._steps.launcher import Kernel, Listener, listening

Array = Any  # cupy.ndarray

NUMBERS = ("affine.eps", "running.momentum")
"""Names of arguments that are numbers and may differ between calls that are alike."""


class Launch(NamedTuple):
    """A launch on a tape."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: int
    shared: int
    words: memoryview  # the arguments, with the addresses and numbers of the call that was recorded
    addresses: list[tuple[int, int, int]]  # number of a word, number of the array whose address it holds, bytes to add
    numbers: list[tuple[int, int]]  # number of a word, and which of NUMBERS it holds


class Made(NamedTuple):
    """An array that steps allocate and return."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Tape(NamedTuple):
    """The launches of a call."""

    launches: list[Launch]
    results: list[Made | None]  # arrays that the steps return, or None in their place
    words: int  # size, in words, of the arrays that only the launches need: they are allocated as one

    def play(self, addresses: Sequence[int], numbers: Sequence[float]) -> list[Array | None]:
        """Make the launches for these arrays and numbers. Returns what the steps returned: new arrays, and None.

        Parameters
        ----------
        addresses : sequence of int
            Those of the arrays of the call, in the order in which they were recorded.
        numbers : sequence of float
            In the order of NUMBERS.
        """
        empty = import_cupy().empty
        results = [None if made is None else empty(made.shape, made.dtype) for made in self.results]
        all_addresses = [*addresses, *(array.data.ptr for array in results if array is not None)]
        if self.words:
            own = empty(self.words, np.float64)
            all_addresses.append(own.data.ptr)
        for kernel, grid, block, shared, words, places, numbered in self.launches:
            frame = kernel.frame()
            frame_words = frame.words
            frame_words[:] = words
            for word, array, offset in places:
                frame_words[word] = all_addresses[array] + offset
            for word, number in numbered:
                frame.doubles[word] = numbers[number]
            kernel.run(grid, block, frame, shared)
        return results


class Recorder:
    """Listener that makes a tape of the launches within its context.

    Parameters
    ----------
    addresses : sequence of int
        Those of the arrays of the call. Where two of them are equal, they are so whenever the tape is played.
    """

    def __init__(self, addresses: Sequence[int]) -> None:
        self._addresses = list(addresses)
        self._made: list[Array] = []  # kept until the end, so that no address comes twice
        self._heard: list[tuple[Kernel, tuple[int, ...], int, int, Sequence[Any], memoryview]] = []

    def __enter__(self) -> Recorder:
        self._before, listening.listener = listening.listener, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        listening.listener = self._before

    def made(self, array: Array) -> None:
        """See `Listener`."""
        self._made.append(array)

    def launched(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: int,
        shared: int,
        values: Sequence[Any],
        words: memoryview,
    ) -> None:
        """See `Listener`."""
        self._heard.append((kernel, grid, block, shared, values, words))

    def tape(self, results: Sequence[Array | None]) -> Tape | None:
        """The tape of what was heard; None if a launch was given an address that cannot be told again.

        Parameters
        ----------
        results : sequence of arrays or None
            What the steps return: arrays that they have made.
        """
        kept = [array for array in results if array is not None]
        own = [array for array in self._made if all(array is not other for other in kept)]
        # Ranges of memory that the steps have made: first address, size, number of the array and bytes to add.
        ranges = [(array.data.ptr, array.nbytes, len(self._addresses) + i, 0) for i, array in enumerate(kept)]
        size = 0
        for array in own:
            ranges.append((array.data.ptr, array.nbytes, len(self._addresses) + len(kept), size))
            size += math.ceil(array.nbytes / WORD) * WORD

        def told(address: int) -> tuple[int, int] | None:
            """Number of the array, and bytes to add to where it begins."""
            if address in self._addresses:
                return self._addresses.index(address), 0
            for begin, nbytes, number, offset in ranges:
                if begin <= address < begin + nbytes:
                    return number, offset + address - begin
            return None

        launches = []
        for kernel, grid, block, shared, values, words in self._heard:
            addresses = []
            for word, array in kernel.arguments.arrays(values):
                place = told(array.data.ptr)
                if place is None:
                    return None
                addresses.append((word, *place))
            numbers = [
                (kernel.arguments.places[name], number)
                for number, name in enumerate(NUMBERS)
                if name in kernel.arguments.places
            ]
            launches.append(Launch(kernel, grid, block, shared, words, addresses, numbers))
        made = [None if array is None else Made(array.shape, array.dtype) for array in results]
        return Tape(launches, made, size // WORD)


class Tapes(dict[Hashable, "Tape | None"]):
    """Tapes of calls whose arguments have the same forms, by what else their launches depend on.

    None stands for what cannot be told again.
    """

    def run(
        self,
        key: Hashable,
        tensors: Sequence[Array | None],
        others: Sequence[Array | None],
        numbers: Sequence[float],
        steps: Callable[[], Sequence[Array | None]],
    ) -> Sequence[Array | None]:
        """What the steps return: by playing a tape, or by taking them.

        Parameters
        ----------
        key : hashable
            What is to be told apart beside addresses.
        tensors, others : sequences of arrays or None
            All arrays that are read or written; tensors are those that kernels read or write in packs.
        numbers : sequence of float
            In the order of NUMBERS.
        steps : callable
            The steps of the call. It returns arrays that they have made, or None in their place.
        """
        addresses = [array.data.ptr for array in tensors if array is not None]
        together = PACK  # kernels are chosen by how wide packs may be
        for address in addresses:
            together |= address
        addresses += [array.data.ptr for array in others if array is not None]
        alike = None if len({*addresses}) == len(addresses) else tuple(map(addresses.index, addresses))
        key = key, together & -together, alike
        if key in self:
            tape = self[key]
            return steps() if tape is None else tape.play(addresses, numbers)
        with Recorder(addresses) as recorder:
            results = steps()
        self[key] = recorder.tape(results)
        return results
