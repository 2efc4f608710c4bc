"""Counts of the kernels of the norms within a sample: a call over random numbers, compared with the mirror."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np

from cupybn._arrays.dtypes import parameter_dtype
from cupybn._steps import cupy_norms, numpy_norms
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Statistics
from cupybn._steps.norm import Norm
from instructions.cost import ITEMSIZE, PACK, Count
from instructions.launches import Blocks, Launch, counted
from instructions.program import Program
from tests.reference import HALF_ULP

EPS = 1e-5
ARRAYS = {
    "layer norm of 128": ((1024, 1, 128, 1), 1, True),
    "layer norm of 1024": ((128, 1, 1024, 1), 1, True),
    "layer norm of 4096": ((32, 1, 4096, 1), 1, True),
    "layer norm of 16384": ((16, 1, 16384, 1), 1, True),
    "RMS norm of 4096": ((32, 1, 4096, 1), 1, False),
    "group norm, 10 x 64 x 64": ((2, 1, 40, 4096), 4, True),
    "group norm, 4 x 7 x 7": ((32, 1, 16, 49), 4, True),
    "instance norm, 128 x 128": ((2, 1, 8, 16384), 8, True),
    "group norm, channels last, 16 x 16 x 10": ((2, 256, 40, 1), 4, True),
}
"""Arrays to count with, by what they are: shape, groups, and whether rows are centered."""


class Case(NamedTuple):
    """A step to count, over an array (N, A, C, B) with so many groups; RMS norm is not centered."""

    step: str
    dtype: str
    shape: tuple[int, int, int, int]
    groups: int = 1
    centered: bool = True

    @property
    def kernel(self) -> str:
        """Name of the kernel, as `cupybn._steps.launcher` has it."""
        return f"channels_{'last' if self.shape[1] > 1 else 'first'}/{self.step}"


def count(case: Case, architecture: int = 90) -> Count:
    """Count a case on a device with one multiprocessor: its first block, whose output is compared with the mirror's.

    A cluster counts as one block. The last block may have rows that are not there.
    """
    rng, dtype, C = np.random.default_rng(0), parameter_dtype(case.dtype), case.shape[2]
    x, dy = (rng.standard_normal(case.shape, np.float32).astype(dtype) for _ in range(2))
    weight, bias = rng.standard_normal((2, C)).astype(np.float32)
    affine = Affine(weight, bias if case.centered else None, EPS)
    norm = Norm(case.groups, case.centered)
    wider = [array.astype(np.float32) for array in (x, dy)]
    statistics = numpy_norms.norm_forward(wider[0], norm, affine, Epilogue(), np.empty_like(wider[0]))
    assert statistics is not None
    expected = _run(case, numpy_norms, *wider, norm, statistics, affine)

    def choose(launch: Launch, compiled: Callable[[], Program]) -> Blocks:
        return [(block, 0, 0) for block in range(compiled().cluster if launch.kernel == case.kernel else 0)]

    with counted(architecture, choose, 8 * x.nbytes + (16 << 20), 1) as counter:
        given = [cupy.asarray(array) for array in (x, dy)]
        pairs = Statistics(cupy.asarray(statistics.pairs))
        vectors = Affine(*(None if v is None else cupy.asarray(v) for v in affine[:2]), EPS)
        found = _run(case, cupy_norms, *given, norm, pairs, vectors)
        (launch,) = counter.launches
        values, written = counter.look(found)
        assert written.any()
        wanted = expected[written].astype(np.float64)
        off = np.abs(values[written].astype(np.float64) - wanted)
        assert (off <= 2e-5 + HALF_ULP[case.dtype] * 2 * np.abs(wanted)).all()
        return Count(launch, float(written.sum()) * ITEMSIZE[case.dtype] / PACK)


def _run(case: Case, ops: Any, x: Any, dy: Any, norm: Norm, statistics: Statistics, affine: Affine) -> Any:
    """Call the step. Returns what it writes for each element of x."""
    out = (np if ops is numpy_norms else cupy).empty_like(x)
    if case.step == "norm_forward":
        ops.norm_forward(x, norm, affine, Epilogue(), out)
    else:
        ops.norm_backward(dy, x, norm, statistics, affine, Epilogue(), Gradients(out))
    return out
