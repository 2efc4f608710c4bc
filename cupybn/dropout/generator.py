"""Generators: the seed and the number of calls of which dropout makes its random numbers."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybn._arrays import devices
from cupybn._arrays.kinds import device_of, show
from cupybn._calls import checks

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray

BITS = 64
"""Bits of a seed."""


class Generator:
    """Source of random numbers for dropout: a seed, and the number of calls that have drawn so far.

    What a call draws is a function of these two numbers alone, the same on every device. Each call that draws adds one
    to the number of calls, on the device: the host does not wait for it, and each launch of a captured CUDA graph draws
    anew. A generator belongs to one stream at a time.

    Parameters
    ----------
    seed : int or None
        From 0 to 2**64 - 1. None takes one from the operating system.
    device : "cpu", "cuda", "cuda:N" or None
        Where the state is: that of the arrays of a call. None is the current CUDA device if CuPy finds one, else
        "cpu".

    Attributes
    ----------
    state : (2,) uint64 array
        The seed and the number of calls so far, on the device. It is live: writing to it rewinds the generator.
    device : str

    Raises
    ------
    TypeError
        If seed is not an integer.
    ValueError
        If seed is negative or too large, or the device is unknown.
    RuntimeError
        If the device is not there, or its stream is being captured in a CUDA graph: each launch would start anew.

    Notes
    -----
    Generators pickle and deep-copy, and copies go on by themselves. Their text has seed and calls where the host can
    read them; it never waits for a GPU.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> import cupybn.functional as F
    >>> generator = cupybn.Generator(7, device="cpu")
    >>> x = np.arange(1, 9, dtype=np.float32)
    >>> before = generator.state.copy()
    >>> y = F.dropout(x, generator=generator)
    >>> generator.state
    array([7, 1], dtype=uint64)
    >>> generator.state[...] = before  # to do it again
    >>> bool((F.dropout(x, generator=generator) == y).all())
    True
    """

    _state: Array
    _device: str

    def __init__(self, seed: int | None = None, device: str | None = None) -> None:
        seed = int.from_bytes(os.urandom(BITS // 8), "little") if seed is None else check_seed(seed)
        target = devices.resolve_device(device)
        self._state, self._device = _new_state(seed, target), target

    @property
    def state(self) -> Array:
        """The seed and the number of calls so far, a (2,) uint64 array on the device: the generator's own."""
        return self._state

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return self._device

    def manual_seed(self, seed: int) -> Self:
        """Begin with another seed, or anew with the same: the state becomes [seed, 0], in place.

        Returns the generator.

        Raises
        ------
        TypeError, ValueError
            As the constructor.

        Examples
        --------
        >>> import cupybn
        >>> cupybn.Generator(device="cpu").manual_seed(3).state
        array([3, 0], dtype=uint64)
        """
        _set_state(self._state, check_seed(seed))
        return self

    def to(self, device: str) -> Self:
        """Move the state to a device, if it is on another one, in a new array. Returns the generator.

        Raises
        ------
        ValueError, RuntimeError
            If the device is unknown, or is not there.

        Examples
        --------
        >>> import cupybn
        >>> cupybn.Generator(3, device="cpu").to("cpu").device
        'cpu'
        """
        target = devices.named_device(device)
        if target != self._device:
            self._state, self._device = devices.transfer(self._state, self._state.dtype, target), target
        return self

    def __repr__(self) -> str:
        state = "seed={}, calls={}, ".format(*self._state) if self._device == "cpu" else ""
        return f"Generator({state}device={self._device!r})"

    def __copy__(self) -> Self:
        """Copy that goes on by itself, as a deep copy does."""
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Device and a copy of the state."""
        with devices.on_device_of(self._state):
            return {"state": devices.copied(self._state), "device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled CuPy arrays are on the current device: bring that of the state to its own."""
        array, device = state["state"], devices.resolve_device(state["device"])
        self._state = array if device_of(array) == device else devices.transfer(array, array.dtype, device)
        self._device = device


def check_seed(seed: Any) -> int:
    """Check for an integer from 0 to 2**64 - 1; returns it as an int."""
    number = checks.as_int("seed", seed)
    if not 0 <= number < 1 << BITS:
        raise ValueError(f"expected seed in [0, 2**64) (got {show(number)})")
    return number


def _new_state(seed: int, device: str) -> Array:
    """State of a new generator, on a device."""
    if device == "cpu":
        return np.array([seed, 0], np.uint64)
    cupy = devices.import_cupy()
    if cupy.cuda.get_current_stream().is_capturing():
        raise RuntimeError(
            "expected a generator to be made outside of a CUDA graph, whose launches would each begin with its seed "
            "(got a call that is captured in one): make it before the capture, or call cupybn.manual_seed or the "
            "function once for that which generator=None stands for"
        )
    state = devices.full((2,), 0, np.dtype(np.uint64), device)
    _set_state(state, seed)
    return state


def _set_state(state: Array, seed: int) -> None:
    """Write a seed and no calls, by launches alone: the host's memory is not read later."""
    with devices.on_device_of(state):
        state[1:].fill(0)
        state[:1].fill(np.uint64(seed))


# ---------------------------------------------------------------------------------------------------------------------
# The generators that `generator=None` stands for


class _Defaults:
    """A generator for each device, made when it is needed, and the seed of those that are still to be made."""

    def __init__(self) -> None:
        self._generators: dict[str, Generator] = {}
        self._seed: int | None = None  # None: each takes its own from the operating system
        self._lock = threading.Lock()

    def of(self, device: str) -> Generator:
        """The generator of a device."""
        generator = self._generators.get(device)
        if generator is None:
            with self._lock:
                generator = self._generators.get(device)
                if generator is None:
                    generator = self._generators[device] = Generator(self._seed, device)
        return generator

    def manual_seed(self, seed: int) -> None:
        """Let all of them begin with this seed."""
        with self._lock:
            for generator in self._generators.values():
                generator.manual_seed(seed)
            self._seed = seed


defaults = _Defaults()
"""The generators that ``generator=None`` stands for."""


def manual_seed(seed: int) -> None:
    """Let the generators that ``generator=None`` stands for, one for each device, begin with this seed.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.

    Raises
    ------
    TypeError, ValueError
        As `Generator`. Nothing has changed then.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybn
    >>> import cupybn.functional as F
    >>> cupybn.manual_seed(7)
    >>> F.dropout(np.arange(1, 9, dtype=np.float32))
    array([ 2.,  4.,  0.,  0.,  0., 12.,  0., 16.], dtype=float32)
    """
    defaults.manual_seed(check_seed(seed))
