"""Arrays of more than 2^31 elements: what their last blocks do, over memory of which little more is there.

No other memory can be touched: an index that 32 bits have cut is out of bounds.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from cupybn._steps import cupy_double_backward, cupy_ops, numpy_double_backward, numpy_ops, plans
from cupybn._steps.bundles import (
    Affine,
    Epilogue,
    Gradients,
    Incoming,
    Moments,
    Running,
    SecondGradients,
    SecondSums,
    Statistics,
    Sums,
)
from cupybn._steps.geometry import MOST_GRID_Y, ChannelsLast
from tests.reference import HALF_ULP, to_numpy

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
if emulator is None:
    pytest.skip("a GPU runs whole grids", allow_module_level=True)

from tests.partial import fill, merged, sparse, written  # noqa: E402
from tests.steps import EPS, Back, each_array, to_device, to_host  # noqa: E402

UNIT = 2 * HALF_ULP["float32"]  # a unit in the last place of the arithmetic


class Share(NamedTuple):
    """The elements and channels that one block, or cluster, of a grid takes."""

    block: tuple[int, int, int]
    places: npt.NDArray[np.int64]  # places of its elements in memory, as (N, C, L)
    channels: npt.NDArray[np.int64]
    first_sum: int  # the place of its first channel among the sums of all parts and channels
    owns: bool  # whether this block writes what there is once for its channels

    @property
    def ranges(self):
        """The places as ranges, from one to another one."""
        places = np.sort(self.places, None)
        ends = np.flatnonzero(np.diff(places) > 1) + 1
        return [(int(piece[0]), int(piece[-1]) + 1) for piece in np.split(places, ends)]

    def positions(self, C, L):
        """The places of its elements in a mask of an array with so many channels and rows so long, as (N, L)."""
        rows, along = np.divmod(self.places[:, 0] - self.channels[0] * L, C * L)
        return rows * L + along

    def of(self, array):
        """The elements of an array as (N, C, L)."""
        return array._host.reshape(-1)[self.places]

    def sums(self, array):
        """The elements of a (P, C) array that are its own."""
        return to_numpy(array.reshape(-1)[self.first_sum : self.first_sum + self.channels.size])


def share_of_rows(geometry, width, share, backwards):
    """A share of the last channels (channels first)."""
    (N, C, L, of_share), teams, (x, shares, _) = geometry.sizes, geometry.threads // geometry.team, geometry.grid
    channels = np.arange(max(0, C - teams) if backwards else (x - 1) * teams, C)
    packs = np.arange(share * of_share, min((share + 1) * of_share, N * (L // width)))
    n, j = np.divmod(packs, L // width)
    elements = (n * C * L + j * width)[:, None] + np.arange(width)
    places = channels[:, None] * L + elements.reshape(-1)
    block = (0, shares - 1 - share, 0) if backwards else (x - 1, share, 0)
    return Share(block, places[None], channels, share * C + int(channels[0]), share == 0)


def share_of_columns(geometry, width, share, tile, backwards):
    """A share of the rows of a tile (channels last)."""
    (M, C, columns, of_share), (tiles, shares) = geometry.sizes, geometry.grid
    first = tile % tiles * columns * width
    channels = np.arange(first, min(first + columns * width, C))
    rows = np.arange(share * of_share, min((share + 1) * of_share, M))
    block = tile % tiles, shares - 1 - share if backwards else share, 0
    return Share(block, (rows[:, None] * C + channels)[:, :, None], channels, share * C + first, share == 0)


def cluster(geometry, width):
    """The last channels, or the last tile, which a cluster keeps on chip."""
    sizes, last = geometry.sizes, geometry.grid[0] // geometry.cluster - 1
    block, C = (last * geometry.cluster, 0, 0), sizes.C
    if isinstance(sizes, ChannelsLast):
        channels = np.arange(last * sizes.tile * width, C)
        return Share(block, (np.arange(sizes.M)[:, None] * C + channels)[:, :, None], channels, 0, True)
    channels = np.arange(last * (geometry.threads // geometry.team), C)
    rows = (np.arange(sizes.N)[:, None] * C + channels) * sizes.L
    return Share(block, rows[:, :, None] + np.arange(sizes.L), channels, 0, True)


LAST = -1
STREAMED = {  # shape, dtype, offset, share, tile
    "rows of packs": ((3, 43692, 16384), "float16", 0, 0, None),
    "rows of narrow packs": ((3, 43692, 16390), "float16", 0, 0, None),
    "odd rows, 2^34 elements": ((3, 349528, 16387), "float16", 0, 0, None),
    "odd rows, unaligned": ((3, 43691, 16387), "float32", 1, 0, None),
    "several teams, some idle": ((4, 2**20 + 1, 1024), "float16", 0, 0, None),
    "rows of more than 2^31": ((1, 2, 2**31 + 4099), "float16", 0, LAST, None),
    "rows of more than 2^31 packs": ((1, 2, 2**33 + 4), "float16", 0, LAST, None),
    "rows that 32 bits are enough for": ((130, 8000, 2000), "float16", 0, 0, None),
    "columns of packs": ((2050, 2**20, 1), "float16", 0, 0, LAST),
    "columns of narrow packs": ((8195, 2**18 + 4, 1), "float16", 0, 0, LAST),
    "columns of elements": ((2051, 2**20 + 3, 1), "float32", 1, 0, LAST),
    "some columns": ((2**25 + 2051, 66, 1), "float16", 0, LAST, LAST),
    "few columns": ((2**30 + 5, 3, 1), "float16", 0, LAST, LAST),
    "one column": ((2**30 + 2051, 2, 1), "float16", 0, LAST, 0),
    "columns that 32 bits are enough for": ((2080, 10**6, 1), "float16", 0, 0, LAST),
}
MASKED = {
    "rows": ((1, 2, 2**31 + 99999), "float16", 0, LAST, None),
    "columns": ((2**31 + 99999, 3, 1), "float16", 0, LAST, LAST),
}
"""Cases with masks that have more than 2^31 elements themselves."""
ON_CHIP = {
    "rows of packs": ((3, 43692, 16384), "float16", 0),
    "odd rows, 2^34 elements": ((3, 349528, 16387), "float16", 0),
    "several teams, some idle": ((4, 2**20 + 1, 1024), "float16", 0),
    "columns of packs": ((700, 2**22, 1), "float16", 0),
    "columns of elements": ((701, 2**22 + 3, 1), "float32", 1),
}


def width_of(shape, dtype, offset):
    """Elements of a pack."""
    nbytes = np.dtype(dtype).itemsize
    together = (offset | (shape[2] if shape[2] > 1 else shape[1])) * nbytes | 16
    return (together & -together) // nbytes


def index_bits(shape):
    """The bits of an index that all places of an array need."""
    return 64 if np.prod(shape, dtype=object) > 2**31 else 32


class Large:
    """The arguments of the steps on the device, of which the elements of some shares are there; vectors on the host."""

    def __init__(self, rng, shape, dtype, offset, *shares):
        self.shape, self.dtype, self.offset = shape, np.dtype(dtype), offset
        self.ranges = [r for share in shares for r in share.ranges]
        last = np.prod(shape, dtype=object) if index_bits(shape) == 32 else 2**31 / 0.95
        assert all(share.places.max() > 0.95 * last for share in shares)
        self.x, self.dy, residual = (
            fill(self.empty(), lambda size, mean=mean: rng.standard_normal(size) * 2 + mean) for mean in (3, 0, 0)
        )
        self.out, dx, dresidual = (self.empty() for _ in range(3))
        self.width = width_of(shape, dtype, offset)
        assert self.width == plans.width_of(self.x, residual, self.out, self.dy, dx, dresidual)
        self.epilogue = Epilogue(residual, "relu", self.empty_passed())
        C = shape[1]
        self.gradients = Gradients(dx, dresidual, cp.zeros(C), cp.zeros(C))
        weight, bias, running_mean, running_var = rng.standard_normal((4, C)).astype(np.float32)
        self.affine, self.running = Affine(weight, bias, EPS), Running(running_mean, running_var, 0.1)
        self.moments = Moments(np.array([9.0]), rng.uniform(2, 4, (1, C)), rng.uniform(20, 40, (1, C)))
        self.statistics = Statistics.of(rng.uniform(2, 4, C), rng.uniform(2, 4, C))
        self.sums = Sums(*rng.standard_normal((2, 1, C)))

    def empty(self):
        """An array of the input's shape."""
        return sparse(self.shape, self.dtype, self.ranges, self.offset)

    def empty_passed(self):
        """The record that `cupy_ops.empty_passed` makes."""
        if self.width == 1:
            return sparse(self.shape, np.bool_, self.ranges)
        parts = [(begin // self.width, -(-end // self.width)) for begin, end in self.ranges]
        return sparse((np.prod(self.shape) // self.width,), np.uint8, parts)

    def back(self):
        """The arguments that all steps of the way back begin with, and a record that lets some elements pass."""
        fill(self.epilogue.passed, lambda size: np.random.default_rng(1).integers(0, 2**self.width, size))
        statistics, affine = to_device(self.statistics), to_device(self.affine)
        return Back(self.dy, self.x, statistics, affine, self.epilogue._replace(residual=None))

    def on_host(self, share):
        """The arguments of a share, on the host."""
        host = SimpleNamespace(x=share.of(self.x), dy=share.of(self.dy))
        for name in "affine", "running", "moments", "statistics", "sums":
            setattr(host, name, of_channels(share.channels, getattr(self, name)))
        host.out, dx, dresidual = (np.empty_like(host.x) for _ in range(3))
        vectors = (np.zeros(share.channels.size) for _ in range(2))
        host.gradients = Gradients(dx, dresidual, *vectors)
        host.epilogue = Epilogue(share.of(self.epilogue.residual), "relu", np.empty(host.x.shape, np.bool_))
        return host


def of_channels(channels, bundle):
    """A bundle of vectors, cut to some of their channels."""
    if isinstance(bundle, Moments):  # the counts are those of all channels
        return Moments(bundle.count, bundle.mean[:, channels], bundle.m2[:, channels])
    if isinstance(bundle, Statistics):
        return Statistics(bundle.pairs[channels])
    return each_array(lambda array: array[..., channels], bundle)


def check(array, share, expected):
    """Check that the share has what the mirror has, to the bit, and that the block has written nothing else."""
    np.testing.assert_array_equal(share.of(array), expected)
    assert written(array) == merged(share.ranges)


def check_vectors(ours, before, share, expected, **tolerance):
    """Check that the block has written to the channels that it owns, and to no others."""
    for array, start, result in zip(ours, before, expected, strict=True):
        wanted = np.array(start)
        if share.owns:
            wanted[share.channels] = result
        np.testing.assert_allclose(to_numpy(array), wanted, **{"rtol": 0, **tolerance})


@pytest.fixture
def many_shares(monkeypatch):
    """Grids have about as many blocks as there is room for, where there are few channels."""
    original = plans.streamed_plan

    def plan(step, shape, dtype, width, multiprocessors, masked=False):
        kernel, geometry = original(step, shape, dtype, width, multiprocessors, masked)
        assert f"-DINDEX_BITS={index_bits(shape)}" in kernel.options
        if shape[1] > 100:
            return plans.Plan(kernel, geometry)
        sizes, (x, _, *z) = geometry.sizes, geometry.grid
        name, count = ("rows", sizes.M) if shape[2] == 1 else ("packs", sizes.N * (sizes.L // width))
        of_share = -(-count // (MOST_GRID_Y - 1))
        shares = -(-count // of_share)
        sizes = sizes._replace(**{name: of_share})
        return plans.Plan(kernel, geometry._replace(grid=(x, shares, *z), sizes=sizes, parts=shares))

    monkeypatch.setattr(plans, "streamed_plan", plan)


def shares_of(shape, dtype, offset, share, tile):
    """The share of a case in the sums forward and back, and in the elementwise steps."""
    width = width_of(shape, dtype, offset)
    on_h200 = emulator.H200.multiprocessors
    for step, multiprocessors in ("bn_stats", None), ("bn_backward_reduce", None), ("bn_normalize", on_h200):
        geometry = plans.streamed_plan(step, shape, np.dtype(dtype), width, multiprocessors).geometry
        of_step = geometry, width, share % geometry.grid[1]
        if shape[2] > 1:
            yield share_of_rows(*of_step, step == "bn_normalize")
        else:
            yield share_of_columns(*of_step, tile, step == "bn_normalize")


def way_back(host, passed, mask=None):
    """The arguments that all steps of the way back begin with, on the host."""
    return Back(host.dy, host.x, host.statistics, host.affine, Epilogue(None, "relu", passed, mask))


@pytest.mark.usefixtures("many_shares")
@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
def test_streamed(rng, case):
    of_sums, of_gradients, of_maps = shares_of(*case)
    large = Large(rng, *case[:3], of_sums, of_gradients, of_maps)
    host = large.on_host(of_maps)

    with emulator.run_only(of_sums.block):
        parts = cupy_ops.bn_stats(large.x)
    expected = Moments.of_rows(numpy_ops.merge_moments(numpy_ops.bn_stats(of_sums.of(large.x))))
    np.testing.assert_allclose(of_sums.sums(parts.mean), expected.mean[0], atol=8 * UNIT)
    np.testing.assert_allclose(of_sums.sums(parts.m2), expected.m2[0], rtol=8 * UNIT)

    moments, affine, running = to_device(large.moments), to_device(large.affine), to_device(large.running)
    with emulator.run_only(of_maps.block):
        statistics = cupy_ops.bn_normalize(large.x, moments, affine, running, large.epilogue, large.out)
    expected = numpy_ops.bn_normalize(host.x, host.moments, host.affine, host.running, host.epilogue, host.out)
    check(large.out, of_maps, host.out)
    np.testing.assert_array_equal(passes(large, of_maps), host.epilogue.passed)
    check_vectors(running[:2], large.running[:2], of_maps, host.running[:2])
    if of_maps.owns:
        np.testing.assert_array_equal(to_numpy(statistics.pairs[of_maps.channels]), expected.pairs)

    back = large.back()
    with emulator.run_only(of_gradients.block):
        sums = cupy_ops.bn_backward_reduce(*back)
    expected = numpy_ops.bn_backward_reduce(*way_back(large.on_host(of_gradients), passes(large, of_gradients)))
    for ours, theirs in zip(sums, expected, strict=True):
        np.testing.assert_allclose(of_gradients.sums(ours), theirs[0], atol=32 * UNIT * of_gradients.places[:, 0].size)

    with emulator.run_only(of_maps.block):
        cupy_ops.bn_backward_input(*back, to_device(large.sums), 0.25, large.gradients)
    numpy_ops.bn_backward_input(*way_back(host, passes(large, of_maps)), host.sums, 0.25, host.gradients)
    check(large.gradients.dx, of_maps, host.gradients.dx)
    check(large.gradients.dresidual, of_maps, host.gradients.dresidual)
    check_vectors(large.gradients[2:], np.zeros((2, large.shape[1])), of_maps, host.gradients[2:])


@pytest.mark.usefixtures("many_shares")
@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_masks(rng, case):
    """Places in masks are beyond 2^31 as well."""
    shares = of_sums, of_gradients, of_maps = list(shares_of(*case))
    large = Large(rng, *case[:3], *shares)
    N, C, L = large.shape
    places = [share.positions(C, L) for share in shares]
    assert all(some.min() > 2**31 for some in places)
    ranges = [(int(some.min()), int(some.max()) + 1) for some in places]
    mask = fill(sparse((N, L), np.bool_, ranges), lambda size: rng.random(size) < 0.4)
    left_of_sums, left_of_gradients, left_of_maps = (mask._host.reshape(-1)[some] for some in places)

    with emulator.run_only(of_sums.block):
        parts = cupy_ops.bn_stats(large.x, None, None, mask)
    expected = numpy_ops.bn_stats(of_sums.of(large.x), None, None, left_of_sums)
    np.testing.assert_allclose(of_sums.sums(parts.mean), expected.mean[0], atol=8 * UNIT)
    np.testing.assert_allclose(of_sums.sums(parts.m2), expected.m2[0], rtol=8 * UNIT)

    host, moments, affine = large.on_host(of_maps), to_device(large.moments), to_device(large.affine)
    with emulator.run_only(of_maps.block):
        cupy_ops.bn_normalize(large.x, moments, affine, Running(), large.epilogue._replace(mask=mask), large.out)
    epilogue = host.epilogue._replace(mask=left_of_maps)
    numpy_ops.bn_normalize(host.x, host.moments, host.affine, Running(), epilogue, host.out)
    check(large.out, of_maps, host.out)
    np.testing.assert_array_equal(passes(large, of_maps), host.epilogue.passed)

    back = large.back()
    back = back._replace(epilogue=back.epilogue._replace(mask=mask))
    with emulator.run_only(of_gradients.block):
        sums = cupy_ops.bn_backward_reduce(*back)
    theirs = way_back(large.on_host(of_gradients), passes(large, of_gradients), left_of_gradients)
    for ours, summed in zip(sums, numpy_ops.bn_backward_reduce(*theirs), strict=True):
        np.testing.assert_allclose(of_gradients.sums(ours), summed[0], atol=32 * UNIT * left_of_gradients.sum())

    with emulator.run_only(of_maps.block):
        cupy_ops.bn_backward_input(*back, to_device(large.sums), 0.25, large.gradients)
    theirs = way_back(host, passes(large, of_maps), left_of_maps)
    numpy_ops.bn_backward_input(*theirs, host.sums, 0.25, host.gradients)
    check(large.gradients.dx, of_maps, host.gradients.dx)
    check(large.gradients.dresidual, of_maps, host.gradients.dresidual)


@pytest.mark.usefixtures("many_shares")
@pytest.mark.parametrize("name", ["rows of packs", "columns of packs", "one column"])
def test_second_order(rng, name):
    """Steps of second order, whose blocks take the shares of those of the way back."""
    _, of_sums, of_maps = shares_of(*STREAMED[name])
    large = Large(rng, *STREAMED[name][:3], of_sums, of_maps)
    C = large.shape[1]
    _, x, statistics, affine, epilogue = large.back()
    cdx, cdresidual = (fill(large.empty(), rng.standard_normal) for _ in range(2))
    cdweight, cdbias = rng.standard_normal((2, C)).astype(np.float32)
    incoming = Incoming(large.dy, cdx, cdresidual, to_device(cdweight), to_device(cdbias))

    def on_host(share):
        """The first five arguments of both steps, of a share."""
        host, arrays = large.on_host(share), (share.of(array) for array in incoming[:3])
        of_host = Incoming(*arrays, cdweight[share.channels], cdbias[share.channels])
        epilogue = Epilogue(None, "relu", passes(large, share))
        return host, (of_host, host.x, host.statistics, host.affine, epilogue)

    with emulator.run_only(of_sums.block):
        sums = cupy_double_backward.bn_double_backward_reduce(incoming, x, statistics, affine, epilogue)
    expected = numpy_double_backward.bn_double_backward_reduce(*on_host(of_sums)[1])
    for ours, theirs in zip(sums, expected, strict=True):
        np.testing.assert_allclose(of_sums.sums(ours), theirs[0], atol=64 * UNIT * of_sums.places[:, 0].size)

    sums = SecondSums(*rng.standard_normal((5, 1, C)))
    ours = SecondGradients(large.empty(), large.empty(), cp.zeros(C))
    with emulator.run_only(of_maps.block):
        cupy_double_backward.bn_double_backward_input(
            incoming, x, statistics, affine, epilogue, to_device(sums), 0.25, ours
        )
    host, arguments = on_host(of_maps)
    theirs = SecondGradients(np.empty_like(host.x), np.empty_like(host.x), np.zeros(of_maps.channels.size))
    own_sums = of_channels(of_maps.channels, sums)
    numpy_double_backward.bn_double_backward_input(*arguments, own_sums, 0.25, theirs)
    check_close(ours.ddy, of_maps, theirs.ddy)
    check_close(ours.dx, of_maps, theirs.dx)
    check_vectors(ours[2:], np.zeros((1, C)), of_maps, theirs[2:], rtol=1e-12)


@pytest.fixture(params=ON_CHIP.values(), ids=ON_CHIP)
def on_chip(request, rng):
    """A function of a step that returns its arguments, those of its last cluster, and what that takes."""
    shape, dtype, offset = request.param
    width = width_of(shape, dtype, offset)

    def prepare(step):
        plan = plans.resident_plan(step, shape, np.dtype(dtype), width, 0)
        assert "-DINDEX_BITS=64" in plan.kernel.options
        share = cluster(plan.geometry, width)
        large = Large(rng, *request.param, share)
        return large, large.on_host(share), share

    return prepare


def check_close(array, share, expected):
    """Check equality up to roundings, and that the block has written nothing else."""
    tolerance = {"rtol": 4 * HALF_ULP[array.dtype.name], "atol": 64 * UNIT}
    np.testing.assert_allclose(share.of(array).astype(float), expected.astype(float), **tolerance)
    assert written(array) == merged(share.ranges)


def test_bn_forward(on_chip):
    large, host, share = on_chip("bn_forward")
    affine, running = to_device(large.affine), to_device(large.running)
    with emulator.run_only(share.block):
        cupy_ops.bn_forward(large.x, affine, running, large.epilogue, large.out)
    numpy_ops.bn_forward(host.x, host.affine, host.running, host.epilogue, host.out)
    check_close(large.out, share, host.out)
    check_vectors(running[:2], large.running[:2], share, host.running[:2], rtol=8 * UNIT, atol=8 * UNIT)


def test_bn_backward(on_chip):
    """The record is one that bn_normalize might have left."""
    large, host, share = on_chip("bn_backward")
    count = host.x.size / share.channels.size
    with emulator.run_only(share.block):
        cupy_ops.bn_backward(*large.back(), 1 / count, large.gradients)
    numpy_ops.bn_backward(*way_back(host, passes(large, share)), 1 / count, host.gradients)
    check_close(large.gradients.dx, share, host.gradients.dx)
    check(large.gradients.dresidual, share, host.gradients.dresidual)
    before = np.zeros((2, large.shape[1]))
    check_vectors(large.gradients[2:], before, share, host.gradients[2:], atol=32 * UNIT * count)


def passes(large, share):
    """Truth values that say where the record lets the elements of a share pass."""
    passed, width = large.epilogue.passed, large.width
    if width == 1:
        return share.of(passed)
    return (passed._host[share.places // width] >> share.places % width & 1).astype(bool)


# ---------------------------------------------------------------------------------------------------------------------
# Sums and vectors


@pytest.fixture
def parts(rng):
    """Moments and sums of more than 2^31 elements, of which the last channels are there; the same on the host."""
    P, C, last = 1100, 2**21, 32
    assert P * C > 2**31

    def draw():
        array = sparse((P, C), np.float64, [((p + 1) * C - last, (p + 1) * C) for p in range(P)])
        return fill(array, lambda size: rng.uniform(1, 2, size))

    count = rng.integers(1, 9, P).astype(float)
    moments, sums = Moments(cp.asarray(count), draw(), draw()), Sums(draw(), draw())
    host = [array._host[:, C - last :].copy() for array in (*moments[1:3], *sums)]
    return moments, sums, Moments(count, *host[:2]), Sums(*host[2:])


def last_channels(array, expected):
    """Check the last channels: so many as the block has written."""
    np.testing.assert_allclose(to_numpy(array[..., -expected.shape[-1] :]), expected, rtol=1e-12)


def test_merging_many_parts(parts):
    moments, sums, host, host_sums = parts
    C = moments.mean.shape[1]
    own, own_sums = of_channels(slice(-1, None), host), of_channels(slice(-1, None), host_sums)
    with emulator.run_only((C - 1, 0, 0)):
        row = cupy_ops.merge_moments(moments)
        mean, var = cupy_ops.mean_and_var(moments, np.dtype(np.float64))
        count, dweight, dbias = cp.array([8.0]), cp.empty(C), cp.empty(C)
        sums_row = cupy_ops.merge_sums(sums, count, dweight, dbias)
    expected = numpy_ops.merge_moments(own)
    last_channels(row[:, : 1 + C], expected[:, 1:2])
    last_channels(row, expected[:, 2:])
    last_channels(mean, numpy_ops.mean_and_var(own, np.dtype(np.float64))[0])
    last_channels(var, numpy_ops.mean_and_var(own, np.dtype(np.float64))[1])
    vectors = np.empty(1), np.empty(1)
    expected = numpy_ops.merge_sums(own_sums, np.array([8.0]), *vectors)
    last_channels(sums_row[:, :C], expected[:, :1])
    last_channels(sums_row, expected[:, 1:])
    last_channels(dweight, vectors[0])
    last_channels(dbias, vectors[1])


@pytest.mark.parametrize("L", [2, 1])
def test_many_parts_before_elementwise_steps(rng, parts, L):
    moments, sums, host, host_sums = parts
    C = moments.mean.shape[1]
    shape = 2, C, L
    x = rng.standard_normal((2, C, L)).astype(np.float32)
    on_gpu, out = cp.asarray(x), cp.empty(shape, np.float32)
    geometry = plans.choose("bn_normalize", on_gpu).geometry
    block = geometry.grid[0] - 1 if L == 1 else 0
    c = slice(-(geometry.sizes.tile * 4 if L == 1 else geometry.threads // geometry.team), None)
    host, host_sums = of_channels(c, host), of_channels(c, host_sums)
    own, affine = x[:, c], Affine(None, None, EPS)
    with emulator.run_only((block, 0, 0)):
        statistics = cupy_ops.bn_normalize(on_gpu, moments, affine, Running(), Epilogue(), out)
    expected = numpy_ops.bn_normalize(own, host, affine, Running(), Epilogue(), np.empty_like(own))
    for name in "mean", "var":
        last_channels(getattr(statistics, name), getattr(expected, name))

    statistics = Statistics.of(cp.zeros(C), cp.ones(C))
    ours = Gradients(out, None, cp.empty(C), cp.empty(C))
    theirs = Gradients(np.empty_like(own), None, *np.empty((2, own.shape[1])))
    with emulator.run_only((block, 0, 0)):
        cupy_ops.bn_backward_input(on_gpu, on_gpu, statistics, affine, Epilogue(), sums, 0.0, ours)
    statistics = of_channels(c, to_host(statistics))
    numpy_ops.bn_backward_input(own, own, statistics, affine, Epilogue(), host_sums, 0.0, theirs)
    last_channels(ours.dweight, theirs.dweight)
    last_channels(ours.dbias, theirs.dbias)


@pytest.mark.parametrize("shape", [(5, 3, 4), (7, 3, 1)], ids=str)
def test_vectors_of_large_strides(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    vectors = []
    for _ in range(4):
        memory = sparse((2**32 + 1,), np.float32, [(i * 2**31, i * 2**31 + 1) for i in range(3)])
        vectors.append(fill(memory, lambda size: rng.uniform(1, 2, size))[:: 2**31])
    host = [np.array([float(vector[i].get()) for i in range(3)], np.float32) for vector in vectors]
    out, y = cp.empty(shape, np.float32), np.empty_like(x)
    for ops, array, (weight, bias, mean, var), result in (
        (cupy_ops, cp.asarray(x), vectors, out),
        (numpy_ops, x, host, y),
    ):
        ops.bn_normalize(array, None, Affine(weight, bias, EPS), Running(mean, var), Epilogue(), result)
    np.testing.assert_array_equal(to_numpy(out), y)


# ---------------------------------------------------------------------------------------------------------------------
# The checks above are worth something


def normalize(x, out):
    """Copy an array, more or less, by a step that works on its elements one by one."""
    C = x.shape[1]
    cupy_ops.bn_normalize(x, None, Affine(None, None, EPS), Running(cp.zeros(C), cp.ones(C)), Epilogue(), out)


def test_what_is_not_there_is_out_of_bounds():
    """The first block takes the last four of nine channels."""
    x, out = (sparse((1, 9, 8), np.float32, [(40, 72)]) for _ in range(2))
    fill(x, np.ones)
    with emulator.run_only((0, 0, 0)):
        normalize(x, out)
    assert written(out) == [(40, 72)]
    with emulator.run_only((1, 0, 0)), pytest.raises(RuntimeError, match="out of bounds"):
        normalize(x, out)
    with emulator.run_only((3, 0, 0)), pytest.raises(ValueError, match="expected a block of the grid"):
        normalize(x, out)
    assert written(out) == [(40, 72)]


def test_what_nobody_wrote_is_not_read():
    x, out = (sparse((1, 3, 8), np.float32, [(0, 24)]) for _ in range(2))
    with pytest.raises(RuntimeError, match="uninitialised"):
        normalize(x, out)


def test_strides_over_the_end_are_seen(monkeypatch):
    """32 bits hold all places of an array here, but not those to which its last threads would go on."""
    monkeypatch.setattr(plans, "MOST_INT", 2**40)
    plans.streamed_plan.cache_clear()
    for M, seen in (2080, False), (2140, True):
        shape = M, 10**6, 1
        plan = plans.streamed_plan("bn_stats", shape, np.dtype(np.float16), 8, None)
        assert "-DINDEX_BITS=32" in plan.kernel.options
        share = share_of_columns(plan.geometry, 8, 0, LAST, False)
        x = fill(sparse(shape, np.float16, share.ranges), np.ones)
        with emulator.run_only(share.block):
            if not seen:
                cupy_ops.bn_stats(x)
                continue
            with pytest.raises(RuntimeError, match="overflow"):
                cupy_ops.bn_stats(x)
    plans.streamed_plan.cache_clear()
