"""Kernels under a mask, held to their mirrors: what is left out may hold anything, NaN as well, and is in nothing."""

from __future__ import annotations

import cupy as cp
import numpy as np
import pytest

from cupybn._steps import cupy_ops, numpy_ops, plans
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Statistics
from tests.reference import to_numpy
from tests.steps import Arrays, each_array, to_device, to_host

SHAPES = [(5, 3, 40), (3, 4, 7), (30, 6, 1), (70, 16, 1)]
"""Packs of several elements and of single ones, channels first and last."""
DTYPES = [np.float16, np.float32, np.float64]
LEFT = {"most": 0.8, "few": 0.1, "all": 1.1, "one": None, "none": -1.0}
"""Masks, by the share of positions that they leave; None leaves the last one alone."""

on_cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES[::2] for dtype in DTYPES] + [(shape, np.float32) for shape in SHAPES[1::2]],
    ids=str,
)
on_masks = pytest.mark.parametrize("left", LEFT)


class Masked(Arrays):
    """Random arguments of all steps, with NaN wherever the mask leaves nothing."""

    def __init__(self, rng, shape, dtype, left="most", offset=0, has_residual=False, activation=None):
        super().__init__(rng, shape, dtype, offset, has_residual, activation)
        N, _, L = shape
        share = LEFT[left]
        self.mask = np.zeros((N, L), np.bool_)
        self.mask.flat[-1] = True
        if share is not None:
            self.mask = rng.random((N, L)) < share
        self.out_of = ~np.broadcast_to(self.mask[:, None], shape)
        for array in self.x, self.dy, self.epilogue.residual:
            if array is not None:
                array[self.out_of] = np.nan
        self.epilogue = self.epilogue._replace(mask=self.mask)

    def check_left_out(self, array):
        """Check that an array of the device is 0 wherever the mask leaves nothing."""
        left_out = to_numpy(array)[self.out_of]
        assert not np.any(left_out)
        assert not np.any(np.signbit(left_out))


@on_masks
@on_cases
def test_bn_stats(rng, shape, dtype, left):
    arrays = Masked(rng, shape, dtype, left)
    x, mask = arrays.on_device("x", "mask")
    ours = to_host(cupy_ops.merge_moments(cupy_ops.bn_stats(x, None, None, mask)))
    mirrored = numpy_ops.merge_moments(numpy_ops.bn_stats(arrays.x, None, None, arrays.mask))
    assert ours[0, 0] == mirrored[0, 0] == arrays.mask.sum()
    C = shape[1]
    arrays.close(ours[0, 1 : 1 + C], mirrored[0, 1 : 1 + C], 2, 1)
    arrays.close(ours[0, 1 + C :], mirrored[0, 1 + C :], 4 * arrays.mask.sum(), 8)


@pytest.mark.parametrize("shape", [(2, 2, 20000), (20000, 2, 1)], ids=str)
@pytest.mark.parametrize("left", ["few", "one", "none"])
def test_parts_that_have_nothing_left(rng, shape, left):
    """Several parts, some or all of which are empty; the values are far from 0 and from those of the other channel, so
    that pivots have to be left ones of the channel itself.
    """
    arrays = Masked(rng, shape, np.float32, left)
    arrays.mask.reshape(-1)[arrays.mask.size // 4 : arrays.mask.size * 3 // 4] = False
    arrays.x[...] = np.where(arrays.mask[:, None], arrays.x * 1e-3 + [[-1e3], [1e3]], np.inf)
    x, mask = arrays.on_device("x", "mask")
    moments = cupy_ops.bn_stats(x, None, None, mask)
    assert moments.count.size > 1
    assert np.any(to_numpy(moments.count) == 0)
    mean, var = (to_numpy(v) for v in cupy_ops.mean_and_var(moments, np.dtype(np.float64)))
    there = arrays.x.swapaxes(1, 2)[arrays.mask].astype(np.longdouble)
    if len(there) == 0:
        assert np.isnan(mean).all()
        assert np.isnan(var).all()
        return
    std = there.std(axis=0)
    assert np.all(abs(mean - there.mean(axis=0)) <= 1e-7 * std + 2.0**-52 * 1e3)
    assert np.all(abs(var - there.var(axis=0)) <= 1e-6 * std**2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@on_masks
@on_cases
def test_bn_normalize(rng, shape, dtype, left, training):
    """Outputs have the bits of the mirror, and so in eval mode those of the positions that are left by themselves."""
    arrays = Masked(rng, shape, dtype, left, has_residual=True, activation="relu")
    moments = numpy_ops.bn_stats(arrays.x, None, None, arrays.mask) if training else None
    ours_running = to_device(arrays.running._replace(batches=np.array(3)))
    running = each_array(np.copy, arrays.running._replace(batches=np.array(3)))
    y, passed = np.full_like(arrays.x, 77), np.ones(shape, np.bool_)
    theirs = numpy_ops.bn_normalize(
        arrays.x, moments, arrays.affine, running, arrays.epilogue._replace(passed=passed), y
    )

    x, affine, epilogue = arrays.on_device("x", "affine", "epilogue")
    out = to_device(np.full_like(arrays.x, 77))
    epilogue = epilogue._replace(passed=cupy_ops.empty_passed(x, epilogue.residual, out, epilogue.mask))
    ours = cupy_ops.bn_normalize(
        x, None if moments is None else to_device(moments), affine, ours_running, epilogue, out
    )

    arrays.check_left_out(out)
    np.testing.assert_array_equal(to_numpy(out), y)
    np.testing.assert_array_equal(to_host(ours).pairs, theirs.pairs)
    np.testing.assert_array_equal(to_host(ours).count_left, theirs.count_left)
    for mine, mirrored in zip(to_host(ours_running)[:2], running[:2], strict=True):
        np.testing.assert_array_equal(mine, mirrored)
    moved = training and arrays.mask.sum() > 1
    assert int(to_numpy(ours_running.batches)) == running.batches == 3 + moved
    if training and not moved:
        np.testing.assert_array_equal(running.mean, arrays.running.mean)
    bits = to_numpy(epilogue.passed)
    if bits.dtype == np.uint8:
        width = arrays.x.size // bits.size
        bits = np.unpackbits(bits.reshape(-1, 1), axis=1, bitorder="little")[:, :width].reshape(shape).astype(bool)
    np.testing.assert_array_equal(bits, passed)


@pytest.mark.parametrize(("has_residual", "activation"), [(False, None), (False, "relu"), (True, "relu")])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@on_masks
@on_cases
def test_the_way_back(rng, shape, dtype, left, training, has_residual, activation):
    arrays = Masked(rng, shape, dtype, left, has_residual=has_residual, activation=activation)
    results = []
    for ops, where in (numpy_ops, lambda value: value), (cupy_ops, to_device):
        x, dy, affine, epilogue, running = (
            where(value) for value in (arrays.x, arrays.dy, arrays.affine, arrays.epilogue, arrays.running)
        )
        out = where(np.full_like(arrays.x, 77))
        passed = ops.empty_passed(x, epilogue.residual, out, epilogue.mask) if has_residual else None
        moments = where(numpy_ops.bn_stats(arrays.x, None, None, arrays.mask)) if training else None
        statistics = ops.bn_normalize(x, moments, affine, running, epilogue._replace(passed=passed), out)
        gradients = where(arrays.gradients()[0])
        back = Epilogue(None, activation, passed, epilogue.mask)
        ops.bn_backward(dy, x, statistics, affine, back, 1.0 if training else 0.0, gradients)
        results.append(gradients)
    mirrored, ours = results
    for array in ours[:2]:
        arrays.check_left_out(array)
    count = arrays.mask.sum()
    np.testing.assert_array_equal(to_numpy(ours.dresidual), mirrored.dresidual)
    for mine, theirs in zip(ours[2:], mirrored[2:], strict=True):
        arrays.close(mine, theirs, 4 * max(count, 1) ** 0.5, 16)
    if training:
        arrays.close(ours.dx, mirrored.dx, 8, 8)
    else:
        np.testing.assert_array_equal(to_numpy(ours.dx), mirrored.dx)


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_masks_anywhere_in_memory(rng, offset):
    """Packs are as wide as the address of the mask allows, and so are those of a record of ReLU."""
    arrays = Masked(rng, (4, 3, 16), np.float32)
    x = to_device(arrays.x)
    mask = to_device(arrays.mask, offset)
    passed = cupy_ops.empty_passed(x, x, x, mask)
    assert plans.width_of(x, mask=mask) == plans.width_of(x, passed=passed, mask=mask) == min(4, offset & -offset)
    ours = to_host(cupy_ops.merge_moments(cupy_ops.bn_stats(x, None, None, mask)))
    mirrored = numpy_ops.merge_moments(numpy_ops.bn_stats(arrays.x, None, None, arrays.mask))
    np.testing.assert_allclose(ours, mirrored, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_byte_but_zero_is_true(rng, shape):
    """NumPy takes bytes for truth values as they are."""
    arrays = Masked(rng, shape, np.float32)
    odd = np.where(arrays.mask, rng.choice([1, 2, 16, 0x80, 0xFF], arrays.mask.shape), 0).astype(np.uint8)
    x, mask, as_bytes = to_device(arrays.x), to_device(arrays.mask), to_device(odd)
    rows = [to_numpy(cupy_ops.merge_moments(cupy_ops.bn_stats(x, None, None, m))) for m in (mask, as_bytes.view(bool))]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("shape", [(5, 3, 40), (3000, 6, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30], ids=["tiny", "huge"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "residual, relu"])
def test_channels_that_float32_is_too_narrow_for(rng, shape, size, fused):
    """What is left is added again in float64, without what is left out."""
    arrays = Masked(rng, shape, np.float32, has_residual=fused, activation="relu" if fused else None)
    arrays.x *= np.float32(size)
    x, mask = arrays.on_device("x", "mask")
    mean, var = (to_numpy(v) for v in cupy_ops.mean_and_var(cupy_ops.bn_stats(x, None, None, mask), np.dtype("f8")))
    there = arrays.x.swapaxes(1, 2)[arrays.mask].astype(np.longdouble)
    np.testing.assert_allclose(mean, there.mean(axis=0).astype(float), rtol=1e-6)
    np.testing.assert_allclose(var, there.var(axis=0).astype(float), rtol=1e-6)

    affine, out = Affine(None, None, 1e-5 * size**2), to_device(np.empty_like(arrays.x))
    y = np.empty_like(arrays.x)
    back = []
    for ops, where, written in (cupy_ops, to_device, out), (numpy_ops, lambda value: value, y):
        values, dy, epilogue = where(arrays.x), where(arrays.dy), where(arrays.epilogue)
        passed = ops.empty_passed(values, epilogue.residual, written, epilogue.mask) if fused else None
        statistics = ops.bn_forward(values, affine, Running(), epilogue._replace(passed=passed), written)
        gradients = where(arrays.gradients()[0])._replace(dweight=None, dbias=None)
        ops.bn_backward(dy, values, statistics, affine, epilogue._replace(residual=None, passed=passed), 1.0, gradients)
        back.append(to_numpy(gradients.dx))
    np.testing.assert_allclose(to_numpy(out), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*back, rtol=1e-4, atol=1e-4 / size)


@pytest.mark.parametrize(
    ("shape", "wide"), [((24, 2, 400), True), ((3000, 6, 1), True), ((3000, 6, 1), False)], ids=str
)
def test_numbers_that_are_left_out(rng, shape, wide):
    """All results have the same bits as with NaN, which would also have float64 take over from float32: beside a
    channel that float32 is too narrow for, and without one. Threads have several packs.
    """
    arrays = Masked(rng, shape, np.float32, has_residual=True, activation="relu")
    if wide:
        arrays.x[:, 1] *= np.float32(1e-30)
        arrays.affine = arrays.affine._replace(eps=1e-62)
    everything = arrays.x, arrays.dy, arrays.epilogue.residual
    results = []
    for value in np.nan, 5.0:
        for array in everything:
            array[arrays.out_of] = value
        x, dy, affine, epilogue = arrays.on_device("x", "dy", "affine", "epilogue")
        out, gradients = arrays.empty(), arrays.gradients()[1]
        epilogue = epilogue._replace(passed=cupy_ops.empty_passed(x, epilogue.residual, out, epilogue.mask))
        statistics = cupy_ops.bn_forward(x, affine, Running(), epilogue, out)
        for activation, passed in ("relu", epilogue.passed), ("relu", None), (None, None):
            back = Epilogue(None, activation, passed, epilogue.mask)
            cupy_ops.bn_backward(dy, x, statistics, affine, back, 1.0, gradients)
            results.append([to_numpy(a).copy() for a in (out, statistics.pairs, *gradients)])
    for with_nan, with_numbers in zip(results[:3], results[3:], strict=True):
        for array, other in zip(with_nan, with_numbers, strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("shape", [(5, 3, 40), (3000, 6, 1)], ids=str)
def test_means_are_rounded_as_sums_are(rng, shape):
    """Sums of small integers are exact in float32, and means with them, however many values of a chunk are left."""
    arrays = Masked(rng, shape, np.float32)
    arrays.x = rng.integers(-50, 50, shape).astype(np.float32)
    x, mask = arrays.on_device("x", "mask")
    mean, _ = cupy_ops.mean_and_var(cupy_ops.bn_stats(x, None, None, mask), np.dtype("f8"))
    there = arrays.x.swapaxes(1, 2)[arrays.mask].astype(np.float64)
    np.testing.assert_allclose(to_numpy(mean), there.mean(axis=0), rtol=0, atol=1e-14)


def test_the_count_of_a_single_channel(rng):
    arrays = Masked(rng, (5, 1, 40), np.float32)
    x, affine, epilogue = arrays.on_device("x", "affine", "epilogue")
    statistics = cupy_ops.bn_forward(x, affine, Running(), epilogue, arrays.empty())
    assert to_numpy(statistics.count_left) == arrays.mask.sum()


@pytest.mark.parametrize(("mean", "var"), [(0, 0), (1e300, 1), (np.inf, 1), (np.nan, 1), (0, np.inf), (0, np.nan)])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_nothing_left_adds_nothing_whatever_the_statistics(rng, shape, mean, var):
    """Sums of eval mode are 0 where 0 * (x - mean) * rstd is NaN, too."""
    arrays = Masked(rng, shape, np.float32, "none")
    pairs = np.stack([np.full(shape[1], value, np.float64) for value in (mean, var)], axis=1)
    dy, x, epilogue = arrays.on_device("dy", "x", "epilogue")
    gradients = arrays.gradients()[1]
    cupy_ops.bn_backward(dy, x, Statistics(cp.asarray(pairs)), Affine(None, None, 0.0), epilogue, 0.0, gradients)
    assert not np.any(to_numpy(gradients.dweight))
    assert not np.any(to_numpy(gradients.dbias))
    arrays.check_left_out(gradients.dx)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", [(40, 2, 7), (3000, 6, 1)], ids=str)
def test_16_bits_that_differ_in_their_last_place(rng, shape, masked):
    """A chunk's mean is rounded to float32, which is coarse beside deviations like these."""
    x = (2 - 2.0**-10 * rng.choice([1, 1, 1, 2], shape)).astype(np.float16)
    mask = rng.random((shape[0], shape[2])) < (0.6 if masked else 1.1)
    moments = cupy_ops.bn_stats(cp.asarray(x), None, None, cp.asarray(mask) if masked else None)
    mean, var = (to_numpy(v) for v in cupy_ops.mean_and_var(moments, np.dtype(np.float64)))
    there = x.swapaxes(1, 2)[mask].astype(np.longdouble)
    assert np.all(abs(mean - there.mean(axis=0)) <= 1e-7 * there.std(axis=0))
    assert np.all(abs(var - there.var(axis=0)) <= 1e-6 * there.var(axis=0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 6e4, 1e5, 1e39, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("which", ["mean", "var"])
@pytest.mark.parametrize("given", ["moments", "statistics"])
def test_bn_update_running_skips_what_is_not_finite(dtype, value, which, given):
    """All channels stay where one is not finite in the dtype of its running statistic."""
    count, C = 5.0, 300  # more channels than threads: a thread has its bad one first or last
    channel = {"moments": 290, "statistics": 10}[given]
    mean, var = np.ones((2, C))
    {"mean": mean, "var": var}[which][channel] = value
    with np.errstate(over="ignore"):
        kept = bool(np.isfinite(np.array(value if which == "mean" else value * count / (count - 1)).astype(dtype)))
    for ops, where in (numpy_ops, lambda array: array), (cupy_ops, cp.asarray):
        running = Running(*(where(np.full(C, 3, dtype)) for _ in range(2)), 0.5, where(np.array(7)), True)
        if given == "moments":
            moments = Moments(*map(where, (np.array([count]), mean[None].copy(), var[None] * count)))
            ops.bn_update_running(moments, running)
        else:
            ops.bn_update_running(None, running, Statistics(where(np.stack([mean, var], axis=1))), count)
        assert int(running.batches) == 7 + kept
        moved = to_numpy(running.mean) != 3
        assert moved[:channel].all() == moved[channel + 1 :].all() == kept
        assert moved.any() == kept
        assert (to_numpy(running.var) != 3).any() == kept
        if given == "moments":
            ops.bn_update_running(moments, running._replace(skip_nonfinite=False))
            assert int(running.batches) == 8 + kept


@pytest.mark.parametrize("shape", [(6, 3, 5), (40, 3, 1), (2, 3, 300000)], ids=str)
@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_finite_batch_moves_the_same_with_and_without_skipping(rng, shape, momentum, masked):
    """Outputs have the same bits on chip or streamed, since the same kernels run, and so have buffers of float32."""
    if masked and shape[2] > 1000:
        pytest.skip("as streamed as the others")
    arrays = Masked(rng, shape, np.float32, "most" if masked else "all")
    x, affine = arrays.on_device("x", "affine")
    epilogue = Epilogue(mask=cp.asarray(arrays.mask) if masked else None)
    results = []
    for skips in False, True:
        running = Running(*(cp.asarray(np.full(3, 2, np.float32)) for _ in range(2)), momentum, cp.asarray(4), skips)
        out = cp.empty_like(x)
        statistics = cupy_ops.bn_forward(x, affine, running, epilogue, out)
        results.append([to_numpy(a) for a in (out, statistics.pairs, *running[:2], running.batches)])
    for plain, skipping in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, skipping)
    assert int(running.batches) == 5


@pytest.mark.skipif(not hasattr(cp, "emulator"), reason="a GPU does not count bytes")
@pytest.mark.parametrize(("shape", "readers"), [((4, 64, 256), 64), ((1024, 64, 1), 16)], ids=str)
def test_what_a_mask_adds_to_the_traffic(rng, shape, readers):
    """A pass reads the mask once for each channel, or column of packs, and the sums of x before that once more.

    These reads come from caches: memory hands the mask out once, N * L bytes.
    """
    arrays = Masked(rng, shape, np.float32, "all")
    x, dy, out, mask = *arrays.on_device("x", "dy"), arrays.empty(), cp.asarray(arrays.mask)
    affine, statistics = Affine(None, None, 1e-5), to_device(arrays.statistics)

    def moved(marks):
        with cp.emulator.record() as launches:
            moments = cupy_ops.bn_stats(x, None, None, marks)
            cupy_ops.bn_normalize(x, moments, affine, Running(), Epilogue(mask=marks), out, False)
            sums = cupy_ops.bn_backward_reduce(dy, x, statistics, affine, Epilogue(mask=marks))
            gradients = Gradients(out, None, None, None)
            cupy_ops.bn_backward_input(dy, x, statistics, affine, Epilogue(mask=marks), sums, 1.0, gradients)
        return [launch.bytes_read + launch.bytes_written for launch in launches]

    more = [masked - plain for masked, plain in zip(moved(mask), moved(None), strict=True)]
    once = arrays.mask.size * readers
    scan = once if shape[2] > 1 else arrays.mask.size * len(range(0, shape[1], 32 // 4))
    assert more[1:] == [once] * 3
    assert more[0] == once + scan
