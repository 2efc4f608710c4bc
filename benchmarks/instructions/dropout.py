"""Counts of the kernels of dropout: arrays of ones, of which every element shows whether it was dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cupy
import numpy as np

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._steps import cupy_dropout, numpy_dropout
from cupybn._steps.bundles import Drops
from instructions.cost import ITEMSIZE, PACK, Count
from instructions.launches import Blocks, Launch, counted
from instructions.program import Program

DRAWN = np.array([0x123456789ABCDEF0, 7], np.uint64)
THRESHOLD = 1 << 31


class Case(NamedTuple):
    """An array to count with: its shape, (size,) or (O, A, M, B, I), and elements behind an aligned address."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return "dropout" if len(self.shape) == 1 else "dropout_channels"


def count(case: Case, architecture: int = 90) -> Count:
    """Count a case on a device with one multiprocessor: its last block, whose output is compared with the mirror's."""

    def choose(launch: Launch, compiled: Callable[[], Program]) -> Blocks:  # noqa: ARG001
        return [(launch.grid[0] - 1, 0, 0)]

    size, dtype = int(np.prod(case.shape)), parameter_dtype(case.dtype)
    host = np.ones(case.shape, dtype)
    expected = np.empty_like(host)
    _run(numpy_dropout, host, Drops(DRAWN, THRESHOLD, 2.0), expected)
    with counted(architecture, choose, 4 * size * dtype.itemsize + (1 << 20), 1) as counter:
        memory = cupy.asarray(np.ones(size + case.offset, dtype))
        x, out = memory[case.offset :], cupy.empty(size + case.offset, dtype)[case.offset :]
        drops = Drops(cupy.asarray(DRAWN), THRESHOLD, 2.0)
        _run(cupy_dropout, x.reshape(case.shape), drops, out.reshape(case.shape))
        (launch,) = counter.launches
        assert launch.kernel == case.kernel
        values, written = counter.look(out)
        assert written.any()
        np.testing.assert_array_equal(values[written], expected.reshape(-1)[written])
        return Count(launch, float(written.sum()) * ITEMSIZE[case.dtype] / PACK)


def _run(ops: object, x: object, drops: Drops, out: object) -> None:
    """Call the step."""
    if x.ndim == 1:  # type: ignore[attr-defined]
        ops.dropout(x, drops, out)  # type: ignore[attr-defined]
    else:
        ops.dropout_channels(x, drops, False, out)  # type: ignore[attr-defined]
