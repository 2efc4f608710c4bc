"""Tapes: the launches of a call on CuPy arrays, noted when it is made first, and made again for calls that are alike.

What a step does depends on the forms of its arrays: it chooses the same kernels, allocates the same arrays and packs
the same arguments, but for addresses and for the numbers in `NUMBERS`. So the first call of a form takes its steps
while a recorder listens; later ones play the tape, which writes addresses and numbers to their places and launches.
On a call of some microseconds that is half of the host's time.

A recorder finds each address that a launch was given: it is that of an array of the call, or lies within an array that
the steps have made. If there is any other one, as where a step has copied an array, there is no tape, and such calls go
on to take their steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps.geometry import PACK
from cupybn._steps.launcher import Hearing, Kernel, listening

Array = Any  # cupy.ndarray

NUMBERS = ("affine.eps", "running.momentum")
"""Names of arguments that are numbers and are written anew at each call. Of eps only the sign of a zero may differ: its
value is in the key of the call."""
Particulars = tuple[Hashable, list[int], tuple[float, float]]
"""What calls that are alike still differ in: the key of the tape, the addresses of the arrays that the call is given,
and the values of NUMBERS, in this order."""


def particulars_of(
    kind: Hashable, tensors: Sequence[Array | None], others: Sequence[Array | None], numbers: tuple[float, float]
) -> Particulars:
    """The particulars of a call.

    Parameters
    ----------
    kind : hashable
        Whatever else the launches depend on, beside forms, addresses and numbers: the direction, what is kept, whether
        there is a momentum.
    tensors, others : sequences of arrays or None
        All arrays that the call is given. Tensors are those that kernels read or write in packs, whose width depends on
        how their addresses divide by PACK.
    numbers : (float, float)
    """
    addresses = [array.data.ptr for array in tensors if array is not None]
    together = 0
    for address in addresses:
        together |= address
    odd = None if together % PACK == 0 else tuple([address % PACK for address in addresses])
    addresses += [array.data.ptr for array in others if array is not None]
    # Which addresses are the same: what was one array when a call was recorded must be one again.
    same = None if len({*addresses}) == len(addresses) else tuple(map(addresses.index, addresses))
    return (kind, odd, same), addresses, numbers


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
    """An array that steps allocate."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Tape(NamedTuple):
    """The launches of a call."""

    launches: list[Launch]
    results: list[Made | None]  # arrays that the call returns and the way back needs, or None in their place
    own: list[Made]  # arrays that only the launches need

    def play(self, particulars: Particulars) -> list[Array | None] | None:
        """Make the launches for other particulars. Returns the results, which are new arrays and None.

        Returns None, without a launch, if the memory of a new array begins at an address that is not one of a pack.
        """
        _, given, numbers = particulars
        addresses = given.copy()
        empty = import_cupy().empty
        results: list[Array | None] = []
        for made in self.results:
            if made is None:
                results.append(None)
                continue
            array = empty(*made)
            address = array.data.ptr
            if address % PACK:
                return None
            results.append(array)
            addresses.append(address)
        if self.own:
            own = [empty(*made) for made in self.own]  # in use until all launches are made
            addresses += [array.data.ptr for array in own]
        for kernel, grid, block, shared, words, places, numbered in self.launches:
            frame = kernel.frame()
            frame_words = frame.words
            frame_words[:] = words
            for word, array, offset in places:
                frame_words[word] = addresses[array] + offset
            for word, number in numbered:
                frame.doubles[word] = numbers[number]
            kernel.run(grid, block, frame, shared)
        return results


class Recorder:
    """Listener that makes a tape of the launches within its context, unless that is left with an error.

    Parameters
    ----------
    tapes : Tapes
        Gets the tape.
    particulars : Particulars

    Attributes
    ----------
    results : list of arrays or None
        The results of the call, which are new arrays: to be set before the context is left.
    """

    results: list[Array | None]

    def __init__(self, tapes: Tapes, particulars: Particulars) -> None:
        self._tapes = tapes
        self._key, self._addresses, _ = particulars
        self._made: list[Array] = []  # kept until the end, so that none of their addresses comes twice
        self._heard: list[tuple[Kernel, tuple[int, ...], int, int, Sequence[Any], memoryview]] = []
        self._hearing = Hearing(self)

    def __enter__(self) -> Recorder:
        self._hearing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        listened = listening.listener is self  # not if a call in the midst of this one was interrupted
        self._hearing.__exit__()
        if kind is None and listened and self._key not in self._tapes:
            self._tapes[self._key] = self._tape()

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

    def _tape(self) -> Tape | None:
        """The tape of what was heard; None if a launch was given an address of any other array."""
        kept = [array for array in self.results if array is not None]
        if any(array.data.ptr % PACK for array in kept):
            return None
        own = [array for array in self._made if all(array.data.ptr != other.data.ptr for other in kept)]
        new = [*kept, *own]

        def place_of(address: int) -> tuple[int, int] | None:
            """Number of the array, and bytes to add to where it begins."""
            if address in self._addresses:
                return self._addresses.index(address), 0
            for number, array in enumerate(new, start=len(self._addresses)):
                if 0 <= address - array.data.ptr < array.nbytes:
                    return number, address - array.data.ptr
            return None

        launches = []
        for kernel, grid, block, shared, values, words in self._heard:
            addresses = []
            for word, array in kernel.arguments.arrays(values):
                place = place_of(array.data.ptr)
                if place is None:
                    return None
                addresses.append((word, *place))
            numbers = [
                (kernel.arguments.places[name], number)
                for number, name in enumerate(NUMBERS)
                if name in kernel.arguments.places
            ]
            launches.append(Launch(kernel, grid, block, shared, words, addresses, numbers))
        made = [None if array is None else Made(array.shape, array.dtype) for array in self.results]
        return Tape(launches, made, [Made(array.shape, array.dtype) for array in own])


class Tapes(dict[Hashable, "Tape | None"]):
    """Tapes of calls whose arguments have the same forms, by what else their launches depend on: see
    `particulars_of`.

    None stands for a call that has no tape, and takes its steps each time.
    """

    def play(self, particulars: Particulars) -> list[Array | None] | None:
        """The results of a call by launches that were recorded; None if there are none, and it has to take its steps.

        See `Tape.play`.
        """
        tape = self.get(particulars[0])  # by its key
        return None if tape is None else tape.play(particulars)

    def recorder(self, particulars: Particulars) -> Recorder:
        """Context in which a call takes its steps; its launches become the tape, unless there is an entry already."""
        return Recorder(self, particulars)
