"""The steps of dropout on CuPy arrays: the functions of `numpy_dropout`, each a launch of the kernel of its name."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cupybn._arrays.devices import import_cupy
from cupybn._steps import plans
from cupybn._steps.bundles import Drawn, Drops
from cupybn._steps.geometry import PACK, THREADS, WARP, Geometry
from cupybn._steps.launcher import Kernel, kernel, listening

Array = Any  # cupy.ndarray

BLOCKS = 4
"""Blocks of a grid for each multiprocessor, at most: as many as one has room for at a time."""
AT_ONCE = 4
"""Packs of a thread in flight at once, at most."""


def dropout_draw(state: Drawn) -> Drawn:
    """See `numpy_dropout.dropout_draw`; the host does not wait for it."""
    drawn = import_cupy().empty((2,), np.uint64)
    listener = listening.listener
    if listener is not None:
        listener.made(drawn)
    geometry = Geometry((1,), threads=WARP)
    loaded = kernel("dropout_draw", **plans.macros_of(np.dtype(np.float32), 1, 32, geometry))
    loaded.launch(geometry.grid, geometry.threads, {"state": state, "drawn": drawn})
    return drawn


def dropout(x: Array, drops: Drops, out: Array) -> None:
    """See `numpy_dropout.dropout`."""
    width = _most(x, out) // x.dtype.itemsize
    _launch("dropout", width, {"x": x, "drops": drops, "out": out})


def dropout_channels(x: Array, drops: Drops, swapped: bool, out: Array) -> None:
    """See `numpy_dropout.dropout_channels`.

    A pack has elements of no more than two rows or, where nothing is behind the channels, those of one sample.
    """
    _, A, M, B, I = x.shape  # noqa: E741
    width = _most(x, out) // x.dtype.itemsize
    if I > 1:
        width = min(width, 1 << I.bit_length() - 1)
    else:
        width = 1 if swapped else math.gcd(width, B)
    sizes = {"A": A, "M": M, "B": B, "I": I}
    _launch("dropout_channels", width, {"x": x, "drops": drops, "swapped": swapped, "out": out, **sizes})


def _most(x: Array, out: Array) -> int:
    """Bytes of the widest pack that fits both addresses."""
    together: int = PACK | x.data.ptr | out.data.ptr
    return together & -together


def _launch(step: str, width: int, arguments: dict[str, Any]) -> None:
    """Launch a step whose threads take packs of this width."""
    x = arguments["x"]
    multiprocessors = plans.properties_of(x.data.device_id).multiprocessors
    loaded, grid = _plan(step, x.size, x.dtype, width, multiprocessors)
    loaded.launch(grid, THREADS, {**arguments, "size": x.size})


@functools.lru_cache(maxsize=4096)
def _plan(step: str, size: int, dtype: np.dtype[Any], width: int, multiprocessors: int) -> tuple[Kernel, tuple[int]]:
    """The kernel of a step for arrays of this size, and its grid."""
    blocks = max(1, min(math.ceil(size // width / THREADS), multiprocessors * BLOCKS))
    beyond = AT_ONCE * blocks * THREADS * width  # what an index is at most beyond the end
    geometry = Geometry((blocks,))
    macros = plans.macros_of(dtype, width, 32 if size + beyond < 1 << 31 else 64, geometry)
    return kernel(step, **macros), (blocks,)
