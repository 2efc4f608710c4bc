"""Observers: they add up the moments of all that a layer sees in training, while its running statistics stay."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np

from cupybn._arrays.devices import copied, empty, import_cupy, module_of, zeros_like
from cupybn._arrays.kinds import device_of
from cupybn._steps.bundles import Affine, Epilogue, Moments, Running, Statistics
from cupybn._steps.totals import Total

Array = Any  # numpy.ndarray or cupy.ndarray


class Observer:
    """Moments of all batches that were added, as one: merged by their counts, on their device.

    A batch counts if it has two values or more for each channel, and would move the running statistics of its layer,
    which may skip what is not finite; what another one has is left out. What is kept has the same size however many
    batches there are: see `Total`.

    Attributes
    ----------
    ops : module or None
        The steps for the arrays that were added; None before there are any.
    batches : 0-d int64 array
        The number of batches that counted.
    """

    ops: ModuleType | None = None
    batches: Array

    def __init__(self) -> None:
        self._total: Total | None = None
        self._lock = threading.Lock()  # several threads may call a layer at a time

    def check(self, x: Array) -> None:
        """Check that a batch, an (N, C, L) array, can be added. To be called before anything is done with it."""
        if not isinstance(x, np.ndarray) and import_cupy().cuda.get_current_stream().is_capturing():
            raise RuntimeError(
                "expected the layers of update_bn to be called without a CUDA graph, whose launches it does not see "
                "(got a call that is captured in one)"
            )
        self.check_fits("input", x, x.shape[1])

    def check_fits(self, name: str, array: Array, channels: int) -> None:
        """Check that an array for so many channels goes with the batches that were added. The name is for messages."""
        if self._total is None:
            return
        device, expected = device_of(self._total.pivot), self._total.pivot.size
        if device_of(array) != device:
            raise TypeError(
                f"expected {name} on {device}, as the batches of this update_bn before (got one on {device_of(array)})"
            )
        if channels != expected:
            raise ValueError(
                f"expected {name} with {expected} channels, as the batches of this update_bn before (got {channels})"
            )

    def add(self, ops: ModuleType, row: Array, running: Running | None = None) -> None:
        """Add a batch, whose moments are a row that `merge_moments` has made. All or nothing is added.

        The running statistics are those of the layer. They stay as they are, but their dtypes matter where they skip
        what is not finite.
        """
        counts = _would_move(ops, row, running)  # on a GPU the host does not wait to see it
        total = Total.of(choose(counts, row, zeros_like(row)))
        with self._lock:
            total = total if self._total is None else self._total.plus(ops, total)
            batches = zeros_like(empty((), row, np.int64)) if self._total is None else copied(self.batches)
            batches += counts
            self.ops, self.batches, self._total = ops, batches, total

    def moments(self) -> Moments:
        """Moments of all that was added, in one part."""
        assert self._total is not None
        return self._total.moments()


def _would_move(ops: ModuleType, row: Array, running: Running | None) -> Array:
    """Whether a batch with this row of moments moves running statistics like these."""
    if running is None or running.mean is None or not running.skip_nonfinite:
        return row[0, 0] > 1
    counter = zeros_like(empty((), row, np.int64))
    others = Running(zeros_like(running.mean), zeros_like(running.var), 1.0, counter, True)
    ops.bn_update_running(Moments.of_rows(row), others)
    return counter > 0


def choose(condition: Array, a: Array, b: Array) -> Array:
    """Array with the values of `a` where the condition holds, else of `b`, which has the same shape and dtype.

    They are taken as bits, since CuPy's ``where`` does not know all dtypes.
    """
    word = f"u{a.itemsize}"
    return module_of(a).where(condition, a.view(word), b.view(word)).view(a.dtype)


class Observed:
    """The steps of one call in training, whose moments go to an observer. The running statistics do not move.

    Parameters
    ----------
    ops : module
        The steps for the arrays of the call.
    observer : Observer
    running : Running
        Running statistics of the layer.
    """

    def __init__(self, ops: ModuleType, observer: Observer, running: Running) -> None:
        self._ops, self._observer, self._running = ops, observer, running
        self.empty_passed, self.bn_backward = ops.empty_passed, ops.bn_backward

    def bn_forward(
        self,
        x: Array,
        affine: Affine,
        running: Running,  # noqa: ARG002
        epilogue: Epilogue,
        out: Array,
        keep: bool = True,
        scratch: Array | None = None,
    ) -> Statistics | None:
        """Batch norm in training, as `numpy_ops.bn_forward`."""
        self._observer.check(x)
        row = self._ops.merge_moments(self._ops.bn_stats(x, None, scratch, epilogue.mask))
        statistics: Statistics | None = self._ops.bn_normalize(
            x, Moments.of_rows(row), affine, Running(), epilogue, out, keep
        )
        self._observer.add(self._ops, row, self._running)  # last: a call that raises is not added
        return statistics
