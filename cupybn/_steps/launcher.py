"""The one place that compiles and launches CUDA kernels; it knows nothing of batch norm."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps import sources
from cupybn._steps.arguments import Arguments

SHARED = 32 << 10
"""Bytes of dynamic shared memory that a block may have without asking: of 48 KiB, what kernels leave of them."""
_asking = threading.Lock()
"""Held while a kernel is asked for more shared memory: another thread could ask for less, later."""


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
            "mask_t*": np.dtype(np.uint8 if macros.get("WIDTH", 1) > 1 else np.bool_),
        }
        self._arguments = Arguments(name, sources.signature(name), pointees)
        self._shared: dict[int, int] = {}  # bytes that have been asked for, on each device

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
        values = self._arguments.read(arguments, device)
        if shared > self._shared.get(device, SHARED):
            with _asking:
                most = max(shared, self._shared.get(device, SHARED))
                self.raw.max_dynamic_shared_size_bytes = most
                self._shared[device] = most
        self.raw(grid, (block,), values, shared_mem=shared)

    @functools.cached_property
    def raw(self) -> Any:
        """CuPy's kernel, which compiles at its first launch on each device."""
        return import_cupy().RawKernel(sources.source(self.name), self.name.rpartition("/")[2], self.options)


@functools.cache
def kernel(name: str, **macros: Any) -> Kernel:
    """The one `Kernel` of this name and these macros."""
    return Kernel(name, macros)
