"""Moments of what all ranks have added: the same bits on each, or an error on each."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import cupybn
from cupybn import StreamingMoments
from cupybn._ranks import totals
from tests.ranks.faults import raise_memory_error
from tests.ranks.world import TIMEOUT
from tests.reference import bits, to_numpy


def held(stats):
    """All that an object holds, to compare."""
    return None if stats._seen is None else (stats._seen.shape, *bits(*stats._seen.total))


def together(world, stats):
    """Statistics of all ranks, after a check that these are as they were."""
    before = held(stats)
    new = stats.synchronize(world.comm, timeout=TIMEOUT)
    assert held(stats) == before
    assert new.channel_axis == stats.channel_axis
    return new


def check(world, stats, x, axes=(1,), device=None):
    """Compare statistics with those of all ranks' values, and their bits with those of all ranks."""
    others = tuple(i for i in range(x.ndim) if i not in axes)
    wide = x.astype(np.longdouble)
    mean, var = wide.mean(others), wide.var(others)
    world.everywhere(stats.count, stats.mean, stats.var(), stats.std(1))
    world.everywhere(*stats._seen.total)
    np.testing.assert_array_less(abs(to_numpy(stats.mean) - mean), 1e-7 * np.sqrt(var) + 2.0**-52 * abs(mean))
    np.testing.assert_array_less(abs(to_numpy(stats.var()) - var), 1e-6 * var)
    assert to_numpy(stats.count) == np.prod([x.shape[i] for i in others])
    assert repr(stats).endswith(f"device={device or world.device!r})")


def test_moments_of_all_ranks(world):
    """Moments of all ranks are those of all values as one array, and may be added to, and exchanged, again."""
    sizes = world.uneven(least=2)
    x = world.random.normal(1e6, 1, (sum(sizes), 3, 4)).astype(np.float32)
    share = world.share(x, sizes)
    for axis, axes in (1, (1,)), (-1, (2,)), ((1, 2), (1, 2)):
        stats = StreamingMoments(axis)
        for sample in range(len(share)):
            stats.update(share[sample : sample + 1])
        new = together(world, stats)
        check(world, new, x, axes)
        new.update(world.xp.asarray(x))
        check(world, new, np.concatenate([x, x]), axes)
        new.merge(stats)
        again = together(world, stats)
        check(world, again, x, axes)


def test_masks_may_have_left_nothing_on_a_rank(world):
    """A rank whose values are all masked out takes part like any other, be it the first or not."""
    for empty in 0, 1:
        sizes = [2] * world.size
        x = world.random.normal(1e3, 1, (sum(sizes), 3)).astype(np.float32)
        stats = StreamingMoments()
        stats.update(world.share(x, sizes), world.xp.full((), world.rank != empty, bool))
        check(world, together(world, stats), np.delete(x, slice(2 * empty, 2 * empty + 2), axis=0))


def test_a_rank_that_has_nothing(world):
    """A rank that has nothing gets the moments of the others, as NumPy arrays; by NCCL, which has no device to send
    them to, every rank raises.
    """
    for empty in 0, world.size - 1:
        sizes = [2] * world.size
        sizes[empty] = 0
        x = world.random.normal(1e3, 1, (sum(sizes), 3, 4)).astype(np.float32)
        stats = StreamingMoments((1, 2)).update(world.share(x, sizes))
        if world.host_sees:
            new = together(world, stats)
            check(world, new, x, (1, 2), "cpu" if world.rank == empty else None)
        else:
            message = rf"^expected an update on every rank \(.*rank {empty} has nothing.*\): a rank without arrays"
            before = held(stats)
            with world.all_raise(ValueError, message):
                stats.synchronize(world.comm, timeout=TIMEOUT)
            assert held(stats) == before
    stats = StreamingMoments().update(world.xp.ones((2, 3), np.float32))
    assert to_numpy(together(world, stats).count) == 2 * world.size


def test_no_rank_has_anything(world):
    new = together(world, StreamingMoments((0, 1)))
    assert new.count == 0
    assert new.update(world.xp.ones((2, 3), np.float32)).mean.shape == (2, 3)


def test_other_channels_of_statistics(world):
    odd = world.rank == 1
    for axis, shape, words in (1, (2, 4), "4 channels"), ((1, 2), (2, 3, 1), "3x1 channels"):
        stats = StreamingMoments(axis if odd else 1).update(world.xp.ones(shape if odd else (2, 3), np.float32))
        before = held(stats)
        message = rf"^expected moments of the same channels on all ranks \(rank 0 has 3 channels .*; rank 1 has {words}"
        with world.all_raise(ValueError, message):
            stats.synchronize(world.comm, timeout=TIMEOUT)
        assert held(stats) == before
    stats = StreamingMoments().update(world.xp.ones((2, 3), np.float32))
    assert to_numpy(together(world, stats).count) == 2 * world.size


def test_arrays_of_both_kinds(world):
    """Arrays of both kinds are exchanged by MPI, and each rank has the result on its own device."""
    host = world.rank == world.size - 1
    sizes = [2] * world.size
    x = world.random.normal(1e3, 1, (sum(sizes), 3)).astype(np.float32)
    share = world.share(x, sizes)
    stats = StreamingMoments().update(to_numpy(share) if host else share)
    if world.host_sees:
        check(world, together(world, stats), x, device="cpu" if host else None)
        return
    expected = (
        (TypeError, r"^expected input to be a CuPy array on cuda:\d")
        if host
        else (RuntimeError, rf"^StreamingMoments.synchronize: rank {world.size - 1} raised TypeError: expected input")
    )
    with world.all_raise(*expected):
        stats.synchronize(world.comm, timeout=TIMEOUT)
    stats = StreamingMoments().update(share)
    check(world, together(world, stats), x)


def test_moments_beside_a_layer(world):
    """Layers and statistics take turns on one communicator."""
    layer = world.layer(3)
    x = world.xp.asarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    stats = StreamingMoments()
    for _ in range(2):
        layer(x)
        new = together(world, stats.update(x))
        y, vjp_fn = layer.vjp(x)
        vjp_fn(y)
        check(world, new, np.concatenate([to_numpy(x)] * int(to_numpy(new.count) // 4)))
    with cupybn.no_stats_update():
        assert to_numpy(together(world, stats).count) == 8 * world.size


def test_a_rank_that_raises_after_the_exchange_of_moments(world):
    """Other ranks have gone on, and the next exchange is one of all ranks again."""
    sizes = [2] * world.size
    x = world.random.normal(1e3, 1, (sum(sizes), 3)).astype(np.float32)
    stats = StreamingMoments().update(world.share(x, sizes))
    before = held(stats)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if world.rank == 1:
            patch.setattr(totals, "_plus", raise_memory_error)
            stack.enter_context(pytest.raises(MemoryError))
        stats.synchronize(world.comm, timeout=TIMEOUT)
    assert held(stats) == before
    check(world, together(world, stats), x)
