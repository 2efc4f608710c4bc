"""The steps for a batch that is spread over ranks: `bn_forward` and `bn_backward`, with an exchange in the middle."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from cupybn._arrays.devices import empty
from cupybn._ranks.group import Group
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Statistics, Sums
from cupybn._steps.observer import Observer

Array = Any  # numpy.ndarray or cupy.ndarray


class Synchronized:
    """The steps of one call in training, with the statistics and sums of all ranks.

    An object belongs to one call: its `bn_forward` keeps the number of values on all ranks for its `bn_backward`. In
    eval mode nothing is exchanged; such calls take the steps of a single process.

    Parameters
    ----------
    ops : module
        The steps for the arrays of this rank.
    group : Group
    observer : Observer or None
        Gets the moments of the whole batch.
    observed : Running or None
        Running statistics of the layer, where there is an observer.
    """

    def __init__(
        self, ops: ModuleType, group: Group, observer: Observer | None = None, observed: Running | None = None
    ) -> None:
        self._ops, self._group, self._observer, self._observed = ops, group, observer, observed
        self._count: Array  # (1,) array, the number of values for each channel that masks have left on all ranks
        self.empty_passed = ops.empty_passed

    def bn_forward(
        self,
        x: Array,
        affine: Affine,
        running: Running,
        epilogue: Epilogue,
        out: Array,
        keep: bool = True,
        scratch: Array | None = None,
    ) -> Statistics | None:
        """Batch norm in training, as `numpy_ops.bn_forward`. x may be empty, or have one value for each channel."""
        ops, C = self._ops, x.shape[1]
        if self._observer is not None:
            self._observer.check(x)  # first: the other ranks are to hear of an error
        if C == 0:
            row = empty((1, 1), x, np.float64)
            row.fill(0)
            self._group.gather(row, 0, x.dtype)  # the others may have some
            return Statistics(empty((0, 2), x, np.float64)) if keep else None
        if x.size > 0:
            parts = ops.bn_stats(x, None, scratch, epilogue.mask)
        else:
            parts = Moments(*_no_parts(x, (0,), (0, C), (0, C)))
        rows = self._group.gather(ops.merge_moments(parts), x.size // C, x.dtype)
        batches = running.batches if running.momentum is None else None
        row = ops.merge_moments(Moments.of_rows(rows))
        moments = Moments.of_rows(row, batches)
        self._count = moments.count  # on a GPU it stays there: the host does not wait for it
        statistics: Statistics | None = None
        if x.size > 0:
            statistics = ops.bn_normalize(x, moments, affine, Running(), epilogue, out, keep)
        elif keep:
            statistics = Statistics.of(*ops.mean_and_var(moments, np.dtype(np.float64)))
        if running.mean is not None:  # not by bn_normalize: ranks without samples move theirs as well, to the same bits
            ops.bn_update_running(moments, running)
        if self._observer is not None:
            self._observer.add(ops, row, self._observed)
        return statistics

    def bn_backward(
        self,
        dy: Array,
        x: Array,
        statistics: Statistics,
        affine: Affine,
        epilogue: Epilogue,
        inv_count: float,  # noqa: ARG002
        gradients: Gradients,
        scratch: Array | None = None,
    ) -> None:
        """All gradients, as `numpy_ops.bn_backward`; dweight and dbias of this rank, with the count of all."""
        ops, C = self._ops, x.shape[1]
        if C == 0:  # on all ranks
            return
        if x.size > 0:
            sums = ops.bn_backward_reduce(dy, x, statistics, affine, epilogue, scratch)
        else:
            sums = Sums(*_no_parts(x, (0, C), (0, C)))
        dx, dresidual, dweight, dbias = gradients
        means = Sums.of_rows(self._group.sum(ops.merge_sums(sums, self._count, dweight, dbias)))
        if x.size > 0:
            written = Gradients(dx, dresidual)
            whole = statistics._replace(count_left=None)  # means are divided by the count of all ranks already
            ops.bn_backward_input(dy, x, whole, affine, epilogue, means, 1.0, written)


def _no_parts(like: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Empty float64 arrays: the statistics or sums of a batch without samples, which has no parts to merge."""
    return [empty(shape, like, np.float64) for shape in shapes]
