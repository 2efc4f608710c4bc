"""Arrays of more than 2^31 elements: what their last blocks do, over memory of which little more is there.

No other memory can be touched: an index that 32 bits have cut is out of bounds.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from cupybn import cupy_ops, numpy_ops
from cupybn._geometry import MOST_GRID_Y
from cupybn._moments import Moments, Statistics, Sums
from tests.reference import HALF_ULP, to_numpy

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
if emulator is None:
    pytest.skip("a GPU runs whole grids", allow_module_level=True)

from tests.partial import fill, merged, sparse, written  # noqa: E402

EPS = 1e-3
UNIT = 2 * HALF_ULP["float32"]  # of the arithmetic


class Share(NamedTuple):
    """What one block, or cluster, of a grid takes."""

    forwards: tuple[int, int, int]  # the block of a launch that goes forwards
    backwards: tuple[int, int, int]
    ranges: list[tuple[int, int]]  # of elements, by their place in memory
    channels: npt.NDArray[np.int64]  # of its lanes; one may have several
    first_sum: int  # the place of its first lane among the sums of all parts and channels
    owned: int  # lanes whose channels it writes to

    def of(self, array):
        """The elements of an array as (N, C, L)."""
        flat = array._host.reshape(-1)
        pieces = np.stack([flat[begin:end] for begin, end in self.ranges])
        return pieces[:, None] if array.shape[2] > 1 else pieces.reshape(-1, self.channels.size, 1)

    def sums(self, array):
        """Those of a (P, C) array that are its own."""
        return to_numpy(array.reshape(-1)[self.first_sum : self.first_sum + self.channels.size])


def rows(geometry, width, share, at_packs):
    """Channels first: a share of the last channel."""
    s, shares = geometry.sizes, geometry.grid[1]
    C, L, segment = s["C"], s["L"], s["segment"]
    per_row, c = L // segment, C - 1
    ranges = []
    for g in range(share * s["segments_per_block"], min((share + 1) * s["segments_per_block"], s["N"] * per_row)):
        n, k = divmod(g, per_row)
        row = (n * C + c) * L
        shift = row % width if at_packs else 0
        begin = row + k * segment - shift if k else row
        end = row + (k + 1) * segment - shift if k + 1 < per_row else row + L
        if k and ranges:
            begin = ranges.pop()[0]
        ranges.append((begin, end))
    return Share((c, share, 0), (0, shares - 1 - share, 0), ranges, np.array([c]), share * C + c, share == 0)


def columns(geometry, width, share, tile):
    """Channels last: a share of the super-rows of a tile, or of the rows that fill none."""
    s, shares = geometry.sizes, geometry.grid[1]
    M, C, pitch = s["M"], s["C"], s["columns"] * width
    replicas = pitch // C
    q = tile * s["tile"] * width
    lanes = min(s["tile"], s["columns"] - tile * s["tile"]) * width
    begin = share * s["super_rows_per_block"]
    end = min(begin + s["super_rows_per_block"], s["super_rows"])
    whole = s["columns"] <= s["tile"]
    channels = (q + np.arange(lanes)) % C
    if begin >= s["super_rows"]:  # which the first replica takes
        channels = channels[: C - q]
        first = s["super_rows"] * replicas
        ranges = [(row * C + q, row * C + q + channels.size) for row in range(first, M)]
    elif whole:
        ranges, channels = [(begin * pitch, end * pitch)], np.arange(C)
    else:
        ranges = [(row * pitch + q, row * pitch + q + lanes) for row in range(begin, end)]
    first_sum = share * (1 if whole else replicas) * C + q
    owned = min(channels.size, max(0, C - q)) if share == 0 else 0
    return Share((tile, share, 0), (tile, shares - 1 - share, 0), ranges, channels, first_sum, owned)


def cluster(geometry, width):
    """On chip: the last channel, or the last tile."""
    s = geometry.sizes
    C, last = s["C"], geometry.grid[0] // geometry.cluster - 1
    block = last * geometry.cluster, 0, 0
    if "tile" in s:
        first = last * s["tile"] * width
        return Share(
            block, block, [(m * C + first, (m + 1) * C) for m in range(s["M"])], np.arange(first, C), 0, C - first
        )
    ranges = [((n * C + C - 1) * s["L"], (n * C + C) * s["L"]) for n in range(s["N"])]
    return Share(block, block, ranges, np.array([C - 1]), 0, 1)


LAST = -1
STREAMED = {  # shape, dtype, offset, share, tile
    "rows of packs": ((3, 43692, 16384), "float16", 0, 0, None),
    "odd rows, 2^34 elements": ((3, 349528, 16387), "float16", 0, 0, None),
    "odd rows, unaligned": ((3, 43691, 16387), "float32", 1, 0, None),
    "rows of more than 2^31": ((1, 2, 2**31 + 4099), "float16", 0, LAST, None),
    "columns of packs": ((2050, 2**20, 1), "float16", 0, 0, LAST),
    "columns of elements": ((2051, 2**20 + 3, 1), "float32", 1, 0, LAST),
    "super-rows": ((8195, 2**18 + 3, 1), "float16", 0, 0, LAST),
    "rows beyond super-rows": ((8195, 2**18 + 3, 1), "float16", 0, LAST, 8191),
    "few columns": ((2**30 + 5, 3, 1), "float16", 0, LAST - 1, LAST),
    "one column": ((2**30 + 2051, 2, 1), "float16", 0, LAST - 1, 0),
}
ON_CHIP = {
    "rows of packs": ((3, 43692, 16384), "float16", 0),
    "odd rows, 2^34 elements": ((3, 349528, 16387), "float16", 0),
    "columns of packs": ((2050, 2**20, 1), "float16", 0),
    "columns of elements": ((2051, 2**20 + 3, 1), "float32", 1),
}


class Large:
    """The arguments of the steps, of which the elements of some shares are there."""

    def __init__(self, rng, shape, dtype, offset, *shares):
        self.shape, self.dtype, self.offset = shape, np.dtype(dtype), offset
        self.ranges = [r for share in shares for r in share.ranges]
        assert all(max(share.ranges)[1] > 2**31 for share in shares)
        self.x, self.dy, self.residual = (
            fill(self.empty(), lambda size, mean=mean: rng.standard_normal(size) * 2 + mean) for mean in (3, 0, 0)
        )
        self.out, self.dx, self.dresidual = (self.empty() for _ in range(3))
        self.mask = self.empty_mask()
        if self.mask is None:
            self.residual = None
        C = shape[1]
        self.weight, self.bias, self.running_mean, self.running_var = rng.standard_normal((4, C)).astype(np.float32)
        self.moments = Moments(np.array([9.0]), rng.uniform(2, 4, (1, C)), rng.uniform(20, 40, (1, C)))
        self.statistics = Statistics(rng.uniform(2, 4, C), rng.uniform(2, 4, C))
        self.sums = Sums(*rng.standard_normal((2, 1, C)))

    def empty(self):
        """An array of the input's shape."""
        return sparse(self.shape, self.dtype, self.ranges, self.offset)

    def empty_mask(self):
        """As `cupy_ops.empty_mask` has it; None where that would have single elements read of whole packs."""
        N, C, L = self.shape
        if self.offset:
            return sparse(self.shape, np.bool_, self.ranges)
        width = 16 // self.dtype.itemsize
        if L == 1 and C % width:
            return None
        packs = -(-N * C * L // width)
        parts = [(begin // width, -(-end // width)) for begin, end in self.ranges]
        if L == 1 or L % width == 0:
            return sparse((packs,), np.uint8, parts)
        return sparse((2 * packs,), np.uint8, parts + [(packs + begin, packs + end) for begin, end in parts])

    def on_host(self, share):
        """The same of a share."""
        host = SimpleNamespace()
        for name, value in vars(self).items():
            if name in ("x", "dy", "residual"):
                setattr(host, name, None if value is None else share.of(value))
            elif name in ("weight", "bias", "running_mean", "running_var"):
                setattr(host, name, value[share.channels])
            elif name in ("moments", "statistics", "sums"):
                fields = (None if f is None else f if f.size == 1 else f[..., share.channels] for f in value)
                setattr(host, name, type(value)(*fields))
        host.out, host.dx, host.dresidual = (np.empty_like(host.x) for _ in range(3))
        host.mask = None if self.mask is None else np.empty(host.x.shape, np.bool_)
        return host


def on_device(fields):
    """A NamedTuple of arrays."""
    return type(fields)(*(None if field is None else cp.asarray(field) for field in fields))


def check(array, share, expected):
    """The share has what the mirror has, to the bit, and the block has written nothing else."""
    np.testing.assert_array_equal(share.of(array), expected)
    assert written(array) == merged(share.ranges)


def check_vectors(ours, before, share, expected, **tolerance):
    """The block has written to the channels that it owns, and to no others."""
    for array, start, result in zip(ours, before, expected, strict=True):
        wanted = np.array(start)
        wanted[share.channels[: share.owned]] = result[: share.owned]
        np.testing.assert_allclose(to_numpy(array), wanted, **{"rtol": 0, **tolerance})


@pytest.fixture
def many_shares(monkeypatch):
    """Where there are few channels, about as many blocks as a grid has room for."""
    original = cupy_ops._plan

    def plan(step, shape, dtype, vectorized, multiprocessors):
        kernel, geometry = original(step, shape, dtype, vectorized, multiprocessors)
        assert "-DINDEX_BITS=64" in kernel.options
        if shape[1] > 3:
            return cupy_ops._Plan(kernel, geometry)
        s, (x, _, *z) = dict(geometry.sizes), geometry.grid
        of_block, count = "super_rows_per_block", s.get("super_rows")
        if count is None:
            of_block, count = "segments_per_block", shape[0] * (shape[2] // s["segment"])
        s[of_block] = -(-count // (MOST_GRID_Y - 1))
        shares = -(-count // s[of_block]) + (z == [])  # and the rows that fill no super-row
        parts = 8 * shares  # no fewer than replicas make
        return cupy_ops._Plan(kernel, geometry._replace(grid=(x, shares, *z), sizes=s, parts=parts))

    monkeypatch.setattr(cupy_ops, "_plan", plan)


def shares_of(shape, dtype, offset, share, tile):
    """The share of a case in bn_stats, and in the other steps."""
    width = 1 if offset else 16 // np.dtype(dtype).itemsize
    geometry = cupy_ops._plan("bn_stats", shape, np.dtype(dtype), not offset, None).geometry
    share %= geometry.grid[1]
    if shape[2] > 1:
        return rows(geometry, width, share, False), rows(geometry, width, share, True)
    return (columns(geometry, width, share, tile % geometry.grid[0]),) * 2


@pytest.mark.usefixtures("many_shares")
@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
def test_streamed(rng, case):
    of_stats, share = shares_of(*case)
    large = Large(rng, *case[:3], of_stats, share)
    host = large.on_host(share)
    C, lanes = large.shape[1], share.channels.size
    weight, bias, *running = map(cp.asarray, (large.weight, large.bias, large.running_mean, large.running_var))

    with emulator.run_only(of_stats.forwards):
        parts = cupy_ops.bn_stats(large.x)
    expected = Moments.of_rows(numpy_ops.merge_moments(numpy_ops.bn_stats(of_stats.of(large.x))))
    np.testing.assert_allclose(of_stats.sums(parts.mean), expected.mean[0], atol=8 * UNIT)
    np.testing.assert_allclose(of_stats.sums(parts.m2), expected.m2[0], rtol=8 * UNIT)

    step = (EPS, weight, bias, large.residual, "relu", *running, 0.1, None, large.out, large.mask)
    with emulator.run_only(share.backwards):
        statistics = cupy_ops.bn_normalize(large.x, on_device(large.moments), *step)
    step = (EPS, host.weight, host.bias, host.residual, "relu", host.running_mean, host.running_var, 0.1, None)
    expected = numpy_ops.bn_normalize(host.x, host.moments, *step, host.out, host.mask)
    check(large.out, share, host.out)
    check_vectors(running, (large.running_mean, large.running_var), share, (host.running_mean, host.running_var))
    owned = slice(share.owned)
    for ours, theirs in zip(statistics, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(ours[share.channels[owned]]), theirs[owned])

    step = (large.dy, large.x, on_device(large.statistics), EPS, weight, bias, "relu", large.mask)
    mirrored = (host.dy, host.x, host.statistics, EPS, host.weight, host.bias, "relu", host.mask)
    with emulator.run_only(share.forwards):
        sums = cupy_ops.bn_backward_reduce(*step)
    expected = numpy_ops.bn_backward_reduce(*mirrored)
    for ours, theirs in zip(sums, expected, strict=True):
        np.testing.assert_allclose(share.sums(ours), theirs[0], atol=32 * UNIT * host.x.size / lanes)

    vectors, expected = [cp.zeros(C) for _ in range(2)], [np.zeros(lanes) for _ in range(2)]
    with emulator.run_only(share.backwards):
        cupy_ops.bn_backward_input(*step, on_device(large.sums), 0.25, large.dx, large.dresidual, *vectors)
    numpy_ops.bn_backward_input(*mirrored, host.sums, 0.25, host.dx, host.dresidual, *expected)
    check(large.dx, share, host.dx)
    check(large.dresidual, share, host.dresidual)
    check_vectors(vectors, np.zeros((2, C)), share, expected)


@pytest.fixture(params=ON_CHIP.values(), ids=ON_CHIP)
def on_chip(request, rng):
    """A function of a step: its arguments, those of its last cluster, and that."""
    shape, dtype, offset = request.param
    width = 1 if offset else 16 // np.dtype(dtype).itemsize

    def prepare(step):
        plan = cupy_ops._resident_plan(step, shape, np.dtype(dtype), not offset, 0)
        assert "-DINDEX_BITS=64" in plan.kernel.options
        share = cluster(plan.geometry, width)
        large = Large(rng, *request.param, share)
        return large, large.on_host(share), share

    return prepare


def check_close(array, share, expected):
    """Up to roundings; the block has written nothing else."""
    tolerance = {"rtol": 4 * HALF_ULP[array.dtype.name], "atol": 64 * UNIT}
    np.testing.assert_allclose(share.of(array).astype(float), expected.astype(float), **tolerance)
    assert written(array) == merged(share.ranges)


def test_bn_forward(on_chip):
    large, host, share = on_chip("bn_forward")
    weight, bias, *running = map(cp.asarray, (large.weight, large.bias, large.running_mean, large.running_var))
    step = (EPS, weight, bias, large.residual, "relu", *running, 0.1, None, large.out, large.mask)
    with emulator.run_only(share.forwards):
        cupy_ops.bn_forward(large.x, *step)
    step = (EPS, host.weight, host.bias, host.residual, "relu", host.running_mean, host.running_var, 0.1, None)
    numpy_ops.bn_forward(host.x, *step, host.out, host.mask)
    check_close(large.out, share, host.out)
    before, expected = (large.running_mean, large.running_var), (host.running_mean, host.running_var)
    check_vectors(running, before, share, expected, rtol=8 * UNIT, atol=8 * UNIT)


def test_bn_backward(on_chip):
    """With a mask that bn_normalize has left."""
    large, host, share = on_chip("bn_backward")
    C, lanes = large.shape[1], share.channels.size
    fill(large.mask, lambda size: np.random.default_rng(1).integers(0, 2 if large.offset else 256, size))
    weight, bias = cp.asarray(large.weight), cp.asarray(large.bias)
    vectors, expected = [cp.zeros(C) for _ in range(2)], [np.zeros(lanes) for _ in range(2)]
    step = (large.dy, large.x, on_device(large.statistics), EPS, weight, bias, "relu", large.mask)
    with emulator.run_only(share.forwards):
        cupy_ops.bn_backward(*step, lanes / host.x.size, large.dx, large.dresidual, *vectors)
    step = (host.dy, host.x, host.statistics, EPS, host.weight, host.bias, "relu", passes(large, share))
    numpy_ops.bn_backward(*step, lanes / host.x.size, host.dx, host.dresidual, *expected)
    check_close(large.dx, share, host.dx)
    check(large.dresidual, share, host.dresidual)
    check_vectors(vectors, np.zeros((2, C)), share, expected, atol=32 * UNIT * host.x.size / lanes)


def passes(large, share):
    """Where the mask lets the elements of a share pass."""
    if large.offset:
        return share.of(large.mask)
    width = 16 // large.dtype.itemsize
    _, _, L = large.shape
    packs = -(-large.x.size // width)
    bits = []
    for begin, end in share.ranges:
        at = np.arange(begin, end)
        second = (at // width == begin // width) & (begin % width > 0) & (L > 1)  # of the row that begins in the pack
        bits.append(large.mask._host[at // width + packs * second] >> at % width & 1)
    return np.stack(bits).astype(bool).reshape(share.of(large.x).shape)


# ---------------------------------------------------------------------------------------------------------------------
# Sums and vectors


@pytest.fixture
def parts(rng):
    """Moments and sums of so many parts and channels that they have more than 2^31 elements; those of the last channels
    are there. The same of these channels on the host."""
    P, C, last = 1100, 2**21, 16
    assert P * C > 2**31

    def draw():
        array = sparse((P, C), np.float64, [((p + 1) * C - last, (p + 1) * C) for p in range(P)])
        return fill(array, lambda size: rng.uniform(1, 2, size))

    count = rng.integers(1, 9, P).astype(float)
    moments, sums = Moments(cp.asarray(count), draw(), draw()), Sums(draw(), draw())
    host = [array._host[:, C - last :].copy() for array in (*moments[1:3], *sums)]
    return moments, sums, Moments(count, *host[:2]), Sums(*host[2:])


def last_channels(array, expected):
    """So many as the block has written."""
    np.testing.assert_allclose(to_numpy(array[..., -expected.shape[-1] :]), expected, rtol=1e-12)


def test_merging_many_parts(parts):
    moments, sums, host, host_sums = parts
    C = moments.mean.shape[1]
    own = Moments(host.count, host.mean[:, -1:], host.m2[:, -1:])
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
    expected = numpy_ops.merge_sums(Sums(*(field[:, -1:] for field in host_sums)), np.array([8.0]), *vectors)
    last_channels(sums_row[:, :C], expected[:, :1])
    last_channels(sums_row, expected[:, 1:])
    last_channels(dweight, vectors[0])
    last_channels(dbias, vectors[1])


@pytest.mark.parametrize("L", [2, 1])
def test_many_parts_before_elementwise_steps(rng, parts, L):
    moments, sums, host, host_sums = parts
    C = moments.mean.shape[1]
    c = slice(-1 if L > 1 else -16, None)
    shape = 2, C, L
    x = rng.standard_normal((2, C, L)).astype(np.float32)
    on_gpu, out = cp.asarray(x), cp.empty(shape, np.float32)
    block = cupy_ops._choose("bn_normalize", on_gpu).geometry.grid[0] - 1 if L == 1 else 0
    host = Moments(host.count, host.mean[:, c], host.m2[:, c])
    host_sums = Sums(*(field[:, c] for field in host_sums))
    none = (None,) * 4
    with emulator.run_only((block, 0, 0)):
        statistics = cupy_ops.bn_normalize(on_gpu, moments, EPS, None, None, None, None, *none, out, None)
    expected = numpy_ops.bn_normalize(
        x[:, c], host, EPS, None, None, None, None, *none, np.empty_like(x[:, c]), None
    )  # fmt: skip
    for ours, theirs in zip(statistics, expected, strict=True):
        last_channels(ours, theirs)

    whole = Statistics(cp.zeros(C), cp.ones(C))
    vectors, expected = [cp.empty(C), cp.empty(C)], [np.empty(x[:, c].shape[1]) for _ in range(2)]
    with emulator.run_only((block, 0, 0)):
        step = (whole, EPS, None, None, None, None, sums, 0.0, out, None, *vectors)
        cupy_ops.bn_backward_input(on_gpu, on_gpu, *step)
    own = Statistics(np.zeros(expected[0].size), np.ones(expected[0].size))
    step = (own, EPS, None, None, None, None, host_sums, 0.0, np.empty_like(x[:, c]), None, *expected)
    numpy_ops.bn_backward_input(x[:, c], x[:, c], *step)
    for ours, theirs in zip(vectors, expected, strict=True):
        last_channels(ours, theirs)


@pytest.mark.parametrize("shape", [(5, 3, 4), (7, 3, 1)], ids=str)
def test_vectors_of_large_strides(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    vectors = []
    for _ in range(4):
        memory = sparse((2**32 + 1,), np.float32, [(i * 2**31, i * 2**31 + 1) for i in range(3)])
        vectors.append(fill(memory, lambda size: rng.uniform(1, 2, size))[:: 2**31])
    host = [np.array([float(vector[i].get()) for i in range(3)], np.float32) for vector in vectors]
    out, y = cp.empty(shape, np.float32), np.empty_like(x)
    weight, bias, mean, var = vectors
    cupy_ops.bn_normalize(cp.asarray(x), None, EPS, weight, bias, None, None, mean, var, 0.1, None, out, None)
    weight, bias, mean, var = host
    numpy_ops.bn_normalize(x, None, EPS, weight, bias, None, None, mean, var, 0.1, None, y, None)
    np.testing.assert_array_equal(to_numpy(out), y)


# ---------------------------------------------------------------------------------------------------------------------
# The checks above are worth something


def test_what_is_not_there_is_out_of_bounds():
    shape = 1, 3, 8
    x, out = (sparse(shape, np.float32, [(16, 24)]) for _ in range(2))
    fill(x, np.ones)
    mean, var = cp.zeros(3), cp.ones(3)
    step = (x, None, EPS, None, None, None, None, mean, var, None, None, out, None)
    with emulator.run_only((0, 0, 0)):  # of the last channel
        cupy_ops.bn_normalize(*step)
    assert written(out) == [(16, 24)]
    with emulator.run_only((1, 0, 0)), pytest.raises(RuntimeError, match="out of bounds"):
        cupy_ops.bn_normalize(*step)
    with emulator.run_only((3, 0, 0)), pytest.raises(ValueError, match="expected a block of the grid"):
        cupy_ops.bn_normalize(*step)
    assert written(out) == [(16, 24)]


def test_what_nobody_wrote_is_not_read():
    x, out = (sparse((1, 3, 8), np.float32, [(0, 24)]) for _ in range(2))
    with pytest.raises(RuntimeError, match="uninitialised"):
        cupy_ops.bn_normalize(x, None, EPS, None, None, None, None, cp.zeros(3), cp.ones(3), None, None, out, None)
