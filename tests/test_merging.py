"""The kernels that merge parts, of blocks or of ranks, against their mirrors."""

from __future__ import annotations

import cupy as cp
import numpy as np
import pytest

from cupybn._steps import cupy_ops, numpy_ops
from cupybn._steps.bundles import Affine, Epilogue, Moments, Running, Sums
from tests.steps import to_device, to_host

PARTS = [1, 3, 700]  # less and more than a block has threads
C = 5
ROUNDINGS = 8 * np.finfo(np.float64).eps


def moments_of(rng, parts):
    """Moments in so many parts, which lie far from zero; one of them is without values."""
    count = rng.integers(1, 9, parts).astype(np.float64)
    mean, m2 = rng.normal(1e6, 1, (parts, C)), rng.uniform(1, 2, (parts, C))
    if parts > 1:
        count[0] = mean[0] = m2[0] = 0
    return Moments(count, mean, m2)


def rows_of(moments):
    return np.hstack([moments.count[:, None], moments.mean, moments.m2])


@pytest.mark.parametrize("parts", PARTS)
def test_merge_moments(rng, parts):
    moments = moments_of(rng, parts)
    expected = numpy_ops.merge_moments(moments)
    ours = cupy_ops.merge_moments(to_device(moments)).get()
    size = np.abs(expected)
    size[0, 1 + C :] += moments.count.sum() * 1e6  # deviations of 1 are off by roundings of means of 1e6
    assert np.all(np.abs(ours - expected) <= ROUNDINGS * size)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("header", [0, 2])
def test_merge_moments_of_rows_that_are_further_apart(rng, parts, header):
    """Rows lie as far apart as messages of ranks do, some of which begin with numbers of the host."""
    moments = moments_of(rng, parts)
    messages = cp.asarray(np.hstack([np.full((parts, header), np.nan), rows_of(moments)]))
    ours = cupy_ops.merge_moments(Moments.of_rows(messages[:, header:])).get()
    np.testing.assert_array_equal(ours, cupy_ops.merge_moments(to_device(moments)).get())


def test_memory_of_rows_that_are_further_apart():
    """The kernel reads from the first element to the last one, and no further."""
    rows = cp.zeros((3, 7))
    for columns, size in ((rows[:, 0], 15), (rows[:, 1:4], 17), (rows, 21)):
        memory = cupy_ops._span(columns)
        assert (memory.data.ptr, memory.size, memory.flags.c_contiguous) == (columns.data.ptr, size, True)


@pytest.mark.parametrize("parts", [0, 2])
def test_merge_moments_of_nothing(parts):
    nothing = Moments(cp.zeros(parts), cp.zeros((parts, C)), cp.zeros((parts, C)))
    np.testing.assert_array_equal(cupy_ops.merge_moments(nothing).get(), np.zeros((1, 1 + 2 * C)))


@pytest.mark.parametrize("mean", [-1e300, 1e160, np.finfo(np.float64).max])
def test_parts_without_values_are_left_out(mean):
    """Parts without values have a mean of 0, whose distance from the others may have a square beyond float64."""
    count = np.array([0.0, 3, 0, 2])
    moments = Moments(count, np.where(count > 0, mean, 0)[:, None].repeat(C, 1), (count > 0)[:, None] * np.ones((4, C)))
    expected = np.concatenate([[5], np.full(C, mean), np.full(C, 2)])[None]
    np.testing.assert_array_equal(numpy_ops.merge_moments(moments), expected)
    np.testing.assert_array_equal(cupy_ops.merge_moments(to_device(moments)).get(), expected)


def test_merge_moments_of_one_mean_is_exact(rng):
    moments = moments_of(rng, 7)
    moments.mean[1:] = 0.1
    row = cupy_ops.merge_moments(to_device(moments)).get()
    np.testing.assert_array_equal(row[0, 1 : 1 + C], 0.1)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_merge_moments_keeps_channels_apart(rng, spoilt):
    moments = moments_of(rng, 7)
    clean = cupy_ops.merge_moments(to_device(moments)).get()
    moments.mean[3, 2] = spoilt
    row = cupy_ops.merge_moments(to_device(moments)).get()
    touched = np.isin(np.arange(1 + 2 * C), [1 + 2, 1 + C + 2])
    assert not np.isfinite(row[0, touched]).any()
    np.testing.assert_array_equal(row[0, ~touched], clean[0, ~touched])


def test_a_part_of_nan_values_spoils_all(rng):
    """NaN is what a rank sends that has failed."""
    moments = moments_of(rng, 3)
    for field in moments[:3]:
        field[1] = np.nan
    for ops, arrays in (numpy_ops, moments), (cupy_ops, to_device(moments)):
        row = ops.merge_moments(arrays)
        assert np.isnan(row if ops is numpy_ops else row.get()).all()


@pytest.mark.parametrize("parts", [0, *PARTS])
def test_merge_sums(rng, parts):
    sums, count = Sums(*rng.standard_normal((2, parts, C))), np.array([12.0 if parts else 0.0])
    ours, theirs = (
        [xp.empty(2 * C, np.float32)[::2], xp.empty(C, np.float64)] for xp in (cp, np)
    )  # dweight may be strided
    row = cupy_ops.merge_sums(to_device(sums), cp.asarray(count), *ours).get()
    expected = numpy_ops.merge_sums(sums, count, *theirs)
    terms = ROUNDINGS * max(parts, 1) ** 0.5 * 4
    np.testing.assert_allclose(row, expected, rtol=0, atol=terms)
    np.testing.assert_allclose(ours[1].get(), theirs[1], rtol=0, atol=terms)
    np.testing.assert_allclose(ours[0].get(), theirs[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(cupy_ops.merge_sums(to_device(sums), cp.asarray(count), None, None).get(), row)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", [(4, C, 40), (40, C, 1)], ids=str)
def test_bn_normalize_merges_the_parts_of_blocks(rng, shape, parts):
    """Parts merge about a value of their own size, and exactly if they have one mean."""
    moments = Moments(rng.integers(1, 9, parts).astype(float), rng.normal(1e6, 1, (parts, C)), np.ones((parts, C)))
    x, out = cp.zeros(shape), cp.empty(shape)

    def merged(moments):
        affine = Affine(None, None, 1.0)
        return to_host(cupy_ops.bn_normalize(x, to_device(moments), affine, Running(), Epilogue(), out))

    mean, var = merged(moments).pairs.T
    row = numpy_ops.merge_moments(moments)
    np.testing.assert_allclose(mean, row[0, 1 : 1 + C], rtol=ROUNDINGS)
    np.testing.assert_allclose(var, row[0, 1 + C :] / row[0, 0], rtol=ROUNDINGS, atol=ROUNDINGS * 1e6)
    moments.mean[...] = 0.1
    np.testing.assert_array_equal(merged(moments).mean, 0.1)


@pytest.mark.parametrize("count", [0, 1, 2, 9, np.nan])
@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("C", [1, 5, 777])
@pytest.mark.parametrize("before", [3, 0, -1, -5])
def test_bn_update_running(rng, C, momentum, count, before):
    """The kernel has its mirror's bits, also if counter and batches are one array. A counter below 0 stands for 0.

    Where there is a momentum, no counter changes it.
    """
    mean, m2 = rng.standard_normal((1, C)), rng.uniform(1, 2, (1, C))
    results = []
    for ops, xp in (numpy_ops, np), (cupy_ops, cp):
        counter = xp.array(before)
        running = Running(xp.full(C, 0.5, np.float32), xp.full(2 * C, 2.0)[::2], momentum, counter)
        batch = Moments(*map(xp.asarray, (np.array([float(count)]), mean, m2)), counter)
        ops.bn_update_running(batch, running)
        results.append(to_host(running))
    theirs, ours = results
    for name in "mean", "var", "batches":
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert theirs.batches == before + (count > 1)
    assert (theirs.mean == 0.5).all() == (not count > 1)
    if count > 1 and (momentum or before <= 0):
        moved = (1 - (momentum or 1)) * 0.5 + (momentum or 1) * mean[0]
        np.testing.assert_array_equal(theirs.mean, moved.astype(np.float32))


def test_bn_update_running_with_a_momentum_of_nan_and_without_arrays(rng):
    """NaN that a user gives as the momentum is a number like others; a counter may be all that moves."""
    mean, m2 = rng.standard_normal((1, C)), rng.uniform(1, 2, (1, C))
    for ops, xp in (numpy_ops, np), (cupy_ops, cp):
        batch = Moments(*map(xp.asarray, (np.array([9.0]), mean, m2)))
        running = Running(xp.zeros(C), xp.ones(C), float("nan"))
        ops.bn_update_running(batch, running)
        assert np.isnan(to_host(running).mean).all()
        assert np.isnan(to_host(running).var).all()
        counter = xp.array(4)
        ops.bn_update_running(batch, Running(momentum=0.5, batches=counter))
        assert counter == 5
