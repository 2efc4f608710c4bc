"""The order of blocks: of two launches the second one begins with what the first one has read last: it is in cache."""

from __future__ import annotations

import numpy as np
import pytest

from cupybn._steps import cupy_double_backward, cupy_ops, plans
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Incoming, Running, SecondGradients, Statistics

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
if emulator is None:
    pytest.skip("a GPU runs whole grids", allow_module_level=True)

from tests.partial import sparse, written  # noqa: E402

LAYOUTS = {"channels first": (4, 5, 8192), "channels last": (4096, 64, 1)}
AFFINE = Affine(None, None, 1.0)
each_layout = pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)


def over_blocks(step, x, run):
    """What `run` returns for each block by itself, as the grid has them: (shares, channels or tiles)."""
    columns, shares, *_ = plans.choose(step, x).geometry.grid
    assert columns > 1
    assert shares > 1
    results = []
    for share in range(shares):
        for column in range(columns):
            with emulator.run_only((column, share, 0)):
                results.append(run())
    return np.array(results).reshape(shares, columns)


def only_value(array):
    """The mean of what has been written of an array of sums."""
    memory, start = array._allocation, array.data.ptr - array._allocation.ptr
    flags = memory.initialised[start : start + array.nbytes].view(np.uint64) > 0
    return array._host.reshape(-1)[flags].mean()


def rising(shape):
    """Each element is its place in memory: the mean of what a block takes tells where that is."""
    return cp.arange(np.prod(shape), dtype=np.float64).reshape(shape)


def statistics(C):
    return Statistics.of(cp.zeros(C), cp.ones(C))


@each_layout
@pytest.mark.parametrize("step", plans.SUMS)
def test_sums_go_forwards(step, shape):
    """Sums go through memory, and over channels, from the first to the last."""
    x = rising(shape)
    runs = {
        "bn_stats": lambda: only_value(cupy_ops.bn_stats(x).mean),
        "bn_backward_reduce": lambda: only_value(
            cupy_ops.bn_backward_reduce(x, x, statistics(shape[1]), AFFINE, Epilogue()).dy
        ),
        "bn_double_backward_reduce": lambda: only_value(
            cupy_double_backward.bn_double_backward_reduce(
                Incoming(x, x), x, statistics(shape[1]), AFFINE, Epilogue()
            ).cdx
        ),
    }
    places = over_blocks(step, x, runs[step])
    assert np.all(np.diff(places, axis=0) > 0)
    assert np.all(np.diff(places, axis=1) > 0)


@each_layout
@pytest.mark.parametrize("step", ["bn_normalize", "bn_backward_input", "bn_double_backward_input"])
def test_elementwise_steps_go_backwards(step, shape):
    """The last place in memory comes first and, where a block has one channel, the last channel.

    Each element is written by one block.
    """
    x = rising(shape)
    taken = np.zeros(x.size, int)

    def run():
        out = sparse(shape, x.dtype, [(0, x.size)])
        if step == "bn_normalize":
            cupy_ops.bn_normalize(x, None, AFFINE, Running(*statistics(shape[1]).pairs.T), Epilogue(), out)
        elif step == "bn_double_backward_input":
            gradients = SecondGradients(out, cp.empty(shape))
            cupy_double_backward.bn_double_backward_input(
                Incoming(x, x), x, statistics(shape[1]), AFFINE, Epilogue(), None, 0.0, gradients
            )
        else:
            gradients = Gradients(out)
            cupy_ops.bn_backward_input(x, x, statistics(shape[1]), AFFINE, Epilogue(), None, 0.0, gradients)
        where = np.concatenate([np.arange(*ends) for ends in written(out)])
        taken[where] += 1
        return where.mean()

    places = over_blocks(step, x, run)
    assert np.all(taken == 1)
    assert np.all(np.diff(places, axis=0) < 0)
    across = np.diff(places, axis=1)
    assert np.all(across < 0 if shape[2] > 1 else across > 0)
