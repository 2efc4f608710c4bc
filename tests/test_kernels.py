"""Each kernel against its mirror, on a GPU or the stand-in: every dtype, layout, odd size and alignment."""

from __future__ import annotations

import contextlib
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._steps import cupy_ops, geometry, launcher, numpy_ops, plans, resident, sources
from cupybn._steps.bundles import Affine, Epilogue, Gradients, Moments, Running, Sums
from tests.reference import DTYPES, HALF_ULP, bits, to_numpy
from tests.steps import EPS, Arrays, forget_plans, to_device, to_host, ways_back

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="a GPU does not tell")

SHAPES = {  # (N, C, L), and what is special
    "two values": (1, 1, 2),
    "whole packs, several tiles": (37, 72, 1),
    "one channel": (1, 1, 1000),
    "rows of one pack": (5, 3, 16),
    "rows shorter than a pack": (9, 5, 3),
    "odd rows": (6, 5, 49),
    "long rows of half packs": (2, 2, 4098),
    "very long rows": (2, 1, 20012),
    "several parts of rows": (300, 2, 40),
    "many channels of rows": (2, 130, 3),
    "few rows": (3, 7, 1),
    "few odd channels": (1029, 3, 1),
    "odd channels, several tiles": (45, 301, 1),
    "many parts, half packs": (9001, 6, 1),
    "many channels": (9, 700, 1),
}
SOME = ("two values", "odd rows", "several parts of rows", "whole packs, several tiles", "odd channels, several tiles")
"""Shapes for all dtypes and alignments: with the others these would differ by what an element is, not where it is."""


def cases():
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            for offset in 0, 1:
                if name in SOME or dtype == np.float32 or (dtype == np.float16 and not offset):
                    yield pytest.param(
                        shape, dtype, offset, id=f"{name}, {dtype.name}{', unaligned' if offset else ''}"
                    )


def fused(cases):
    """Each case with the most that is fused, and some with less."""
    for case in cases:
        yield pytest.param(*case.values, "relu", True, id=f"{case.id}, residual, relu")
        if any(name in case.id for name in SOME):
            yield pytest.param(*case.values, None, False, id=case.id)
            yield pytest.param(*case.values, "relu", False, id=f"{case.id}, relu")


def clustered(cases):
    """Each case with clusters of eight blocks, and some without clusters."""
    for case in cases:
        if "bfloat16" in case.id:
            continue  # what it has of its own is in the steps' tests
        both = case.id.startswith(SOME) and case.id.endswith(("float32, residual, relu", "float16, residual, relu"))
        for blocks in (1, 8) if both else (8,):
            yield pytest.param(*case.values, blocks, id=f"{case.id}, clusters of {blocks}")


CASE = ("shape", "dtype", "offset")
on_cases = pytest.mark.parametrize(CASE, list(cases()))
on_float32 = pytest.mark.parametrize(CASE, [case for case in cases() if case.values[1] == np.float32])
on_fused = pytest.mark.parametrize((*CASE, "activation", "has_residual"), list(fused(cases())))
on_clusters = pytest.mark.parametrize((*CASE, "activation", "has_residual", "blocks"), list(clustered(fused(cases()))))


BARE = Affine(None, None, EPS)
"""No weight and no bias."""


def merged(parts):
    """The moments of all parts together, by the mirror."""
    return Moments.of_rows(numpy_ops.merge_moments(parts))


def test_the_cases_have_packs_of_every_width():
    """Packs of all widths occur in both layouts, those of 16-bit dtypes from one element on."""
    found = set()
    for case in cases():
        (_, C, L), dtype, offset = case.values
        nbytes = dtype.itemsize * math.gcd(L if L > 1 else C, offset, 16 // dtype.itemsize)
        found.add((L > 1, dtype.itemsize, nbytes))
    assert found >= {(rows, 2, nbytes) for rows in (True, False) for nbytes in (2, 4, 8, 16)}
    assert found >= {(rows, 4, nbytes) for rows in (True, False) for nbytes in (4, 8, 16)}
    assert found >= {(rows, 8, nbytes) for rows in (True, False) for nbytes in (8, 16)}


@on_cases
def test_bn_stats(rng, shape, dtype, offset):
    arrays = Arrays(rng, shape, dtype, offset)
    counter = cp.array(5)
    parts = to_host(cupy_ops.bn_stats(*arrays.on_device("x"), counter))
    assert parts.count.sum() == arrays.x.size // shape[1]
    assert np.all(parts.count > 0)
    assert parts.batches == 5
    (_, mean, m2, _), (count, mean0, m20, _) = merged(parts), merged(numpy_ops.bn_stats(arrays.x))
    std = np.sqrt(m20 / count)
    assert np.all(np.abs(mean - mean0) <= 4 * arrays.unit * std + 2 * HALF_ULP["float64"] * np.abs(mean0))
    assert np.all(np.abs(m2 - m20) <= 8 * arrays.unit * m20)


@on_float32
def test_mean_and_var(rng, shape, dtype, offset):
    arrays = Arrays(rng, shape, dtype, offset)
    parts = cupy_ops.bn_stats(*arrays.on_device("x"))
    for out in np.float32, np.float64:
        ours = cupy_ops.mean_and_var(parts, np.dtype(out))
        for a, b in zip(ours, numpy_ops.mean_and_var(to_host(parts), out), strict=True):
            assert a.dtype == out
            np.testing.assert_allclose(to_numpy(a), b, rtol=np.finfo(out).eps + 1e-13)


@on_fused
def test_bn_normalize(rng, shape, dtype, offset, activation, has_residual):
    """Outputs agree to the bit from running statistics; to rounding from moments, whose merged bits may differ."""
    arrays = Arrays(rng, shape, dtype, offset, has_residual, activation)
    x, affine, running, epilogue = arrays.on_device("x", "affine", "running", "epilogue")
    out, y = arrays.empty(), np.empty_like(arrays.x)
    before = bits(*arrays.running[:2])

    statistics = cupy_ops.bn_normalize(x, None, affine, running, epilogue, out)
    numpy_ops.bn_normalize(arrays.x, None, arrays.affine, arrays.running, arrays.epilogue, y)
    np.testing.assert_array_equal(to_numpy(out).astype(np.float64), y.astype(np.float64))
    np.testing.assert_array_equal(to_host(statistics).pairs.T, arrays.running[:2])
    assert bits(*running[:2]) == bits(*arrays.running[:2]) == before

    moments, counter = cupy_ops.bn_stats(x), cp.array(2)
    host = to_host(moments)
    ours = cupy_ops.bn_normalize(x, moments, affine, running._replace(batches=counter), epilogue, out)
    theirs = numpy_ops.bn_normalize(arrays.x, host, arrays.affine, arrays.running, arrays.epilogue, y)
    rtol = 8 * HALF_ULP["float64"]
    np.testing.assert_allclose(to_host(ours.pairs), theirs.pairs, rtol=rtol, atol=0)
    arrays.close(out, y, 4, 4)
    np.testing.assert_allclose(to_numpy(running.mean), arrays.running.mean, rtol=2.0**-23)
    np.testing.assert_allclose(to_numpy(running.var), arrays.running.var, rtol=rtol)
    assert int(counter) == 3


@pytest.mark.parametrize("target", ["x", "residual"])
@on_float32
def test_bn_normalize_in_place(rng, shape, dtype, offset, target):
    arrays = Arrays(rng, shape, dtype, offset, True, "relu")
    x, running, epilogue = arrays.on_device("x", "running", "epilogue")
    out, into = arrays.empty(), {"x": x, "residual": epilogue.residual}[target]
    cupy_ops.bn_normalize(x, None, BARE, running, epilogue, out)
    expected = bits(out)
    cupy_ops.bn_normalize(x, None, BARE, running, epilogue, into)
    assert bits(into) == expected


def close_sums(arrays, ours, theirs):
    """Check sum(dy) and sum(dy * xhat), up to roundings of their terms."""
    g = np.abs(arrays.dy.astype(np.float64))
    mean, var = arrays.statistics.mean, arrays.statistics.var
    xhat = (arrays.x.astype(np.float64) - mean[:, None]) / np.sqrt(var + EPS)[:, None]
    for a, b, terms in zip(ours, theirs, (g, g * np.abs(xhat)), strict=True):
        assert np.all(np.abs(a - b) <= 32 * arrays.unit * terms.sum((0, 2)))


@on_fused
def test_bn_backward_reduce(rng, shape, dtype, offset, activation, has_residual):
    arrays = Arrays(rng, shape, dtype, offset, has_residual, activation)
    ours, theirs = ways_back(arrays)
    sums, expected = to_host(cupy_ops.bn_backward_reduce(*ours)), numpy_ops.bn_backward_reduce(*theirs)
    close_sums(arrays, [a.sum(0) for a in sums], [b[0] for b in expected])


@on_fused
def test_bn_backward_input(rng, shape, dtype, offset, activation, has_residual):
    """Gradients of the same statistics and one part of sums agree to the bit, in training and in eval."""
    arrays = Arrays(rng, shape, dtype, offset, has_residual, activation)
    C = shape[1]
    ours, theirs = ways_back(arrays)
    sums = Sums(*rng.standard_normal((2, 1, C)) * (arrays.x.size / C))
    for inv_count in C / arrays.x.size, 0.0:
        expected, gradients = arrays.gradients(dtype)
        cupy_ops.bn_backward_input(*ours, to_device(sums), inv_count, gradients)
        numpy_ops.bn_backward_input(*theirs, sums, inv_count, expected)
        for a, b in zip(gradients, expected, strict=True):
            np.testing.assert_array_equal(to_numpy(a).astype(np.float64), b.astype(np.float64))


@pytest.fixture
def on_chip(monkeypatch, request):
    """A list of the launches; what fits is kept on chip, by clusters of so many blocks, channels last by one block."""
    chosen = []
    monkeypatch.setattr(geometry, "SOON", 10**9)
    monkeypatch.setattr(resident, "BLOCKS", (request.getfixturevalue("blocks"),))
    monkeypatch.setattr(resident, "LEAST", 10**9)
    original = plans.choose_resident

    def choose(*arguments, **options):
        if plans.properties_of(0).clusters or request.getfixturevalue("blocks") == 1:
            chosen.append(original(*arguments, **options))
            return chosen[-1]
        pytest.skip("a GPU without clusters")

    monkeypatch.setattr(plans, "choose_resident", choose)
    forget_plans()
    yield chosen
    forget_plans()


def check_clusters(chosen, blocks, x):
    """All that fits into so many blocks was kept there; channels last tiles of 32 bytes of each row, by one block."""
    channels_last = x.shape[2] == 1
    fits = x.shape[0] * 32 < 90_000 if channels_last else x.nbytes < 90_000 * blocks
    expected = 1 if channels_last else blocks
    assert chosen
    assert all(plan is not None and plan.geometry.cluster == expected for plan in chosen) or not fits


@on_clusters
def test_bn_forward(rng, shape, dtype, offset, activation, has_residual, blocks, on_chip):
    arrays = Arrays(rng, shape, dtype, offset, has_residual, activation)
    x, affine, running, epilogue = arrays.on_device("x", "affine", "running", "epilogue")
    out, y, counter = arrays.empty(), np.empty_like(arrays.x), cp.array(2)
    ours = to_host(cupy_ops.bn_forward(x, affine, running._replace(batches=counter), epilogue, out))
    theirs = numpy_ops.bn_forward(arrays.x, arrays.affine, arrays.running, arrays.epilogue, y)
    check_clusters(on_chip, blocks, x)
    std = np.sqrt(theirs.var)
    assert np.all(
        np.abs(ours.mean - theirs.mean) <= 4 * arrays.unit * std + 2 * HALF_ULP["float64"] * np.abs(ours.mean)
    )
    np.testing.assert_allclose(ours.var, theirs.var, rtol=8 * arrays.unit)
    size = 1 + np.abs(arrays.affine.weight[:, None])  # an error of the mean is one of the output
    arrays.close(out, y, size, 16)
    np.testing.assert_allclose(to_numpy(running.mean), arrays.running.mean, rtol=8 * arrays.unit, atol=8 * arrays.unit)
    np.testing.assert_allclose(to_numpy(running.var), arrays.running.var, rtol=8 * arrays.unit)
    assert int(counter) == 3


@pytest.mark.parametrize("target", ["x", "residual"])
@pytest.mark.parametrize("blocks", [8])
@on_float32
def test_bn_forward_in_place(rng, shape, dtype, offset, target, blocks, on_chip):
    arrays = Arrays(rng, shape, dtype, offset, True, "relu")
    x, epilogue = arrays.on_device("x", "epilogue")
    out, into = arrays.empty(), {"x": x, "residual": epilogue.residual}[target]
    cupy_ops.bn_forward(x, BARE, Running(), epilogue, out)
    expected = bits(out)
    cupy_ops.bn_forward(x, BARE, Running(), epilogue, into)
    assert bits(into) == expected
    check_clusters(on_chip, blocks, x)


@on_clusters
def test_bn_backward(rng, shape, dtype, offset, activation, has_residual, blocks, on_chip):
    arrays = Arrays(rng, shape, dtype, offset, has_residual, activation)
    C = shape[1]
    ours, theirs = ways_back(arrays)
    for inv_count in C / arrays.x.size, 0.0:
        on_chip.clear()
        expected, gradients = arrays.gradients()
        cupy_ops.bn_backward(*ours, inv_count, gradients)
        check_clusters(on_chip, blocks, ours.x)
        dx, dresidual, dweight, dbias = to_host(gradients)
        numpy_ops.bn_backward(*theirs, inv_count, expected)
        close_sums(arrays, (dbias, dweight), (expected.dbias, expected.dweight))
        np.testing.assert_array_equal(dresidual.astype(np.float64), expected.dresidual.astype(np.float64))
        arrays.close(dx, expected.dx, np.abs(arrays.affine.weight[:, None]) * 8, 32)


@pytest.mark.parametrize("shape", [(4, 5, 40), (40, 5, 1)], ids=str)
def test_sums_of_many_parts(rng, shape):
    """More parts than threads share them: each adds several."""
    arrays = Arrays(rng, shape, np.dtype(np.float32), 0)
    C = shape[1]
    dy, x, statistics = arrays.on_device("dy", "x", "statistics")
    sums = Sums(*rng.standard_normal((2, 1000, C)))
    parts = Moments(rng.integers(1, 9, 1000).astype(float), *rng.uniform(1, 2, (2, 1000, C)))
    theirs, ours = (gradients._replace(dresidual=None) for gradients in arrays.gradients())
    numpy_ops.bn_backward_input(arrays.dy, arrays.x, arrays.statistics, BARE, Epilogue(), sums, 0.01, theirs)
    cupy_ops.bn_backward_input(dy, x, statistics, BARE, Epilogue(), to_device(sums), 0.01, ours)
    np.testing.assert_allclose(to_numpy(ours.dweight), theirs.dweight, rtol=1e-12)
    np.testing.assert_allclose(to_numpy(ours.dbias), theirs.dbias, rtol=1e-12)
    arrays.close(ours.dx, theirs.dx, 4, 4)

    merged = cupy_ops.bn_normalize(x, to_device(parts), BARE, Running(), Epilogue(), ours.dx)
    mirrored = numpy_ops.bn_normalize(arrays.x, parts, BARE, Running(), Epilogue(), theirs.dx)
    np.testing.assert_allclose(to_host(merged.pairs), mirrored.pairs, rtol=1e-12)


def test_rows_that_are_alike_stay_so(rng):
    """Rows that different blocks have get the same bits: parts merge in one order."""
    x = cp.asarray(np.broadcast_to(rng.standard_normal((1, 5, 1)), (8, 5, 1)).copy())
    parts = to_device(Moments(rng.integers(1, 9, 1000).astype(float), *rng.uniform(1, 2, (2, 1000, 5))))
    sums = to_device(Sums(*rng.standard_normal((2, 1000, 5))))
    out, dx = cp.empty_like(x), cp.empty_like(x)
    statistics = cupy_ops.bn_normalize(x, parts, BARE, Running(), Epilogue(), out)
    cupy_ops.bn_backward_input(x, x, statistics, BARE, Epilogue(), sums, 0.01, Gradients(dx))
    for result in out, dx:
        assert bits(*result) == bits(result[0]) * len(result)


@pytest.mark.parametrize("shape", [(64, 16, 34), (2048, 16, 1)], ids=str)
@pytest.mark.parametrize("blocks", [8])
def test_all_blocks_of_a_cluster_have_the_same_statistics_and_sums(rng, shape, blocks, on_chip):
    """Elements that are alike stay so, whichever block keeps them."""
    x = rng.choice(rng.standard_normal(4), shape)
    y, vjp_fn = F.batch_norm_vjp(cp.asarray(x), None, None, training=True)
    dx = vjp_fn(cp.asarray(x**3)).input
    check_clusters(on_chip, blocks, x)
    for result in to_numpy(y), to_numpy(dx):
        for c in range(shape[1]):
            assert np.unique(result[:, c]).size == np.unique(x[:, c]).size


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("dtype", "L"), [("float16", 25), ("float16", 24), ("float32", 64)])
def test_teams_of_a_block_know_nothing_of_each_other(rng, dtype, L):
    """Four teams take as many channels; those for which there is none are idle."""
    x, dy, residual = rng.standard_normal((3, 4, 9, L)).astype(dtype)
    vectors = rng.uniform(0.5, 2, (4, 9)).astype(np.float32)

    def results(channels):
        """All that comes out, channel by channel."""
        arrays = [cp.asarray(np.ascontiguousarray(a[:, channels])) for a in (x, dy, residual)]
        mean, var, weight, bias = (cp.asarray(v[channels]) for v in vectors)
        options = {"training": True, "residual": arrays[2], "activation": "relu"}
        y, vjp_fn = F.batch_norm_vjp(arrays[0], mean, var, weight, bias, **options)
        dx, dweight, dbias, dresidual = vjp_fn(arrays[1])
        of_channels = [to_numpy(a).swapaxes(0, 1) for a in (y, dx, dresidual)]
        of_channels += [to_numpy(a) for a in (dweight, dbias, mean, var)]
        return [bits(*(a[c] for a in of_channels)) for c in range(len(channels))]

    laid = plans.choose("bn_stats", cp.asarray(x)).geometry
    assert laid.threads == 4 * laid.team
    alone = [results([c, 8 - c])[0] for c in range(9)]  # of one channel rows would be one
    for C in 3, 4, 5, 9:
        assert results(list(range(C))) == alone[:C]


# ---------------------------------------------------------------------------------------------------------------------
# The same bits, whatever the index type, the device and the order of threads


def all_results(rng, shape, dtype, offset=0, training=True):
    """The bits of all that comes out of the public functions, forward and backward, with everything fused."""
    arrays = Arrays(rng, shape, np.dtype(dtype), offset, True, "relu")
    x, dy, (weight, bias, _), running, epilogue = arrays.on_device("x", "dy", "affine", "running", "epilogue")
    mean, var = running[:2]
    options = {"residual": epilogue.residual, "activation": epilogue.activation}
    y, vjp_fn = F.batch_norm_vjp(x, mean, var, weight, bias, training, **options)
    return bits(y, mean, var, *vjp_fn(dy), *F.moments(x))


VARIED = pytest.mark.parametrize(
    "shape", [(6, 5, 49), (2, 3, 20010), (1029, 3, 1), (9001, 6, 1), (45, 301, 1)], ids=str
)


@VARIED
@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("dtype", "offset"), [("float32", 0), ("float32", 1), ("float16", 0)])
def test_64_bit_indices(shape, dtype, offset, monkeypatch):
    expected = all_results(np.random.default_rng(0), shape, dtype, offset)
    monkeypatch.setattr(plans, "MOST_INT", 0)
    forget_plans()
    assert all_results(np.random.default_rng(0), shape, dtype, offset) == expected


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        ((2, 10**6, 8), 32),
        ((2, 10**8, 8), 64),
        ((1000, 2 * 10**5, 8), 32),
        ((2080, 10**6, 1), 32),
        ((2140, 10**6, 1), 64),
        ((1, 10**5, 8000), 64),
        ((1, 10**5, 6000), 32),
    ],
    ids=str,
)
def test_strides_over_the_end_count_for_indices(shape, bits):
    """Threads stride over up to 128 rows: beyond 2^31 elements, from arrays that have fewer."""
    if shape[2] == 1:
        plan = plans.streamed_plan("bn_stats", shape, np.dtype(np.float16), 8, None)
    else:
        plan = plans.resident_plan("bn_forward", shape, np.dtype(np.float16), 8, 0)
    assert f"-DINDEX_BITS={bits}" in plan.kernel.options


@pytest.mark.parametrize(("channels", "bits"), [(2**26 + 1, 32), (2**28 + 1, 64)])
def test_rows_of_threads_count_for_indices(channels, bits):
    """Threads of a block lie in eight rows, also where the array has one row."""
    plan = plans.streamed_plan("bn_normalize", (1, channels, 1), np.dtype(np.float16), 1, 132)
    assert f"-DINDEX_BITS={bits}" in plan.kernel.options


@pytest.fixture
def fresh_kernels():
    """Drops the kernels that were made of another source."""
    launcher.kernel.cache_clear()
    forget_plans()
    yield
    launcher.kernel.cache_clear()
    forget_plans()


@only_emulated
@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("shape", [(6, 5, 50), (45, 302, 1)], ids=str)
def test_packs_that_threads_carry_to_shared_memory(shape, monkeypatch):
    """GPUs without copies that go on by themselves let threads carry packs to shared memory, and get the same bits."""
    expected = all_results(np.random.default_rng(0), shape, np.float32)
    condition = "constexpr bool CARRIED = PACK_BYTES < 4;"
    original, seen = sources.source, set()

    def source(name):
        seen.add(name.rpartition("/")[2] if condition in original(name) else None)
        return original(name).replace(condition, "constexpr bool CARRIED = true;")

    monkeypatch.setattr(sources, "source", source)
    launcher.kernel.cache_clear()
    forget_plans()
    assert all_results(np.random.default_rng(0), shape, np.float32) == expected
    assert seen >= {"bn_forward", "bn_backward"}


@only_emulated
@VARIED
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("training", [True, False])
def test_every_device_gets_the_same_bits(shape, training):
    """Sums that are streamed are split alike on all devices."""
    results = []
    for properties in emulator.H200, emulator.T4, emulator.Properties(multiprocessors=1):
        with emulator.pretend(properties):
            forget_plans()
            results.append(all_results(np.random.default_rng(0), shape, np.float32, training=training))
    assert results[0] == results[1] == results[2]


@VARIED
@pytest.mark.usefixtures("streamed")
def test_more_channels_than_a_grid_is_wide(shape, monkeypatch):
    expected = all_results(np.random.default_rng(0), shape, np.float32)
    monkeypatch.setattr(geometry, "MOST_GRID_X", 1)
    forget_plans()
    assert all_results(np.random.default_rng(0), shape, np.float32) == expected


@VARIED
@pytest.mark.usefixtures("either")
def test_every_run_gets_the_same_bits(shape, monkeypatch):
    """The order in which threads and blocks run changes nothing."""
    results = []
    for seed in range(4):
        if emulator is not None:
            monkeypatch.setattr(emulator, "seed", seed)
        results.append(all_results(np.random.default_rng(0), shape, np.float32))
    assert all(result == results[0] for result in results)


# ---------------------------------------------------------------------------------------------------------------------
# Launches and traffic: what the stand-in counts


def record(call):
    with emulator.record() as launches:
        call()
    return launches


LAYOUTS = {  # shape for float64, and as many bytes for the others
    "channels first": ((8, 64, 28, 28), 1),
    "channels last": ((1, 14, 28, 4096), -1),
}
STREAMED = ["bn_stats", "bn_normalize", "bn_backward_reduce", "bn_backward_input"]
ON_CHIP = ["bn_forward", "bn_backward"]


def check_traffic(names, passes, rel, nbytes, call):
    """The result of a call that makes these launches, which move so many times the bytes of the tensor."""
    results = []
    launches = record(lambda: results.append(call()))
    assert [launch.name for launch in launches] == names
    moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
    assert moved == pytest.approx(passes * nbytes, rel=rel), f"{moved / nbytes:.3f} passes"
    return results[0]


@only_emulated
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("dtype", "activation"), [(DTYPES[0], None), (DTYPES[2], None), (DTYPES[2], "relu")], ids=str)
def test_launches_and_traffic_streamed(rng, layout, activation, dtype, monkeypatch):
    """Training forward 2 launches and 3 passes over the tensor, inference 1 and 2, backward 2 and 5; ReLU is free.

    On a device with few multiprocessors: a block reads the parts of its channels, which is little if it is large.
    """
    monkeypatch.setattr(emulator, "devices", [emulator.T4])
    (n, *rest), axis = layout
    shape = (n * 8 // dtype.itemsize, *rest)
    x = cp.asarray(rng.standard_normal(shape).astype(dtype))
    vectors = [cp.ones(shape[axis], np.float32) for _ in range(4)]
    options = {"channel_axis": axis, "activation": activation}
    layer = cupybn.BatchNorm2d(shape[axis], channel_axis=axis, activation=activation, device="cuda:0")

    def check(names, passes, call):
        return check_traffic(names, passes, 0.02, x.nbytes, call)

    training = check(STREAMED[:2], 3, lambda: F.batch_norm_vjp(x, *vectors, True, **options))
    inference = check(STREAMED[1:2], 2, lambda: F.batch_norm_vjp(x, *vectors, False, **options))
    check(STREAMED[:2], 3, lambda: layer(x))
    for _, vjp_fn in training, inference:
        check(STREAMED[2:], 5, lambda vjp_fn=vjp_fn: vjp_fn(x))
    without = F.batch_norm_vjp(x, *vectors[:2], **options)[1]
    check(STREAMED[3:], 3, lambda: without(x))


RESNET50 = {  # C and the side of a plane
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
    (512, 7), (2048, 7),
}  # fmt: skip
TRAFFIC = [  # residual, activation, passes forward and backward, a record byte for each pack apart
    (False, None, 2, 3),
    (False, "relu", 2, 3),
    (True, "relu", 3, 4),
]


@only_emulated
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("axis", [1, -1], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("C", "side"), sorted(RESNET50), ids=str)
def test_launches_and_traffic_on_chip(rng, C, side, dtype, axis, monkeypatch):
    """Every ResNet-50 layer at batch 32 whose channels fit: one launch and 2 passes forward, one and 3 backward.

    Run with few channels on a device that is as much smaller than an H200: each channel, or tile, has the cluster that
    it would have there.
    """
    shape = (32, C, side, side) if axis == 1 else (32, side, side, C)
    N, L = (32, side * side) if axis == 1 else (32 * side * side, 1)
    width = math.gcd(C if axis == -1 else L, 16 // dtype.itemsize)
    whole = {step: plans.resident_plan(step, (N, C, L), dtype, width, 0) for step in ON_CHIP}
    if whole["bn_forward"] is None:
        pytest.skip("does not fit")
    few = 2 if axis == 1 else 128 // dtype.itemsize  # of the channels
    share = -(-few * 132 // C)
    monkeypatch.setattr(emulator, "devices", [replace(emulator.H200, multiprocessors=share)])
    forget_plans()
    shape = tuple(few if size == C and i == (axis % 4) else size for i, size in enumerate(shape))
    x = cp.asarray(rng.standard_normal(shape).astype(dtype))
    residual = cp.asarray(rng.standard_normal(shape).astype(dtype))
    weight, bias = (cp.ones(few, np.float32) for _ in range(2))
    vectors = 8 * few * (2 * 8 + 2 * 4)  # that each block of a cluster reads
    rel = 0.02 + vectors / x.nbytes
    assert width == plans.width_of(x.reshape(N, few, L))
    for has_residual, activation, forward, backward in TRAFFIC:
        options = {"residual": residual if has_residual else None, "activation": activation, "channel_axis": axis}
        passed = has_residual / (width * dtype.itemsize)
        _, vjp_fn = check_traffic(
            ON_CHIP[:1], forward + passed, rel, x.nbytes,
            lambda options=options: F.batch_norm_vjp(x, None, None, weight, bias, True, **options),
        )  # fmt: skip
        if whole["bn_backward"]:
            check_traffic(ON_CHIP[1:], backward + passed, rel, x.nbytes, lambda f=vjp_fn: f(x))
    clusters = {step: plans.resident_plan(step, (N, few, L), dtype, width, 0) for step in ON_CHIP}
    for step in ON_CHIP:
        if whole[step]:
            assert clusters[step].geometry.cluster == whole[step].geometry.cluster


@only_emulated
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda dtype: dtype.name)
def test_traffic_of_channels_last_on_chip(rng, dtype):
    """A few hundred rows fit both ways: 3 passes back as well, and the record is read once."""
    C = 64 // dtype.itemsize  # a tile
    x, residual, dy = cp.asarray(rng.standard_normal((3, 200, C)).astype(dtype))
    vectors = [cp.ones(C, np.float32) for _ in range(2)]
    rel = C * (2 * 8 + 4 * 4) / x.nbytes
    for has_residual, activation, forward, backward in TRAFFIC:
        options = {"residual": residual if has_residual else None, "activation": activation}
        passed = has_residual / 16
        _, vjp_fn = check_traffic(
            ON_CHIP[:1], forward + passed, rel, x.nbytes,
            lambda options=options: F.batch_norm_vjp(x, None, None, *vectors, True, **options),
        )  # fmt: skip
        check_traffic(ON_CHIP[1:], backward + passed, rel / 3, x.nbytes, lambda f=vjp_fn: f(dy))


@only_emulated
def test_a_call_does_not_wait_and_allocates_little(rng):
    """No host synchronisation; beside the output less than 2 % of the input."""
    x = cp.asarray(rng.standard_normal((16, 64, 28, 28)).astype(np.float32))
    layer = cupybn.BatchNorm2d(64, momentum=None, device="cuda:0")
    layer(x)
    emulator.reset_usage(0)
    before = emulator.usage(0).live_bytes
    with emulator.record_syncs() as syncs:
        y, vjp_fn = layer.vjp(x)
        forward = emulator.usage(0).peak_bytes - before
        vjp_fn(y)
    assert syncs == []
    assert forward <= 1.02 * x.nbytes
    assert emulator.usage(0).peak_bytes - before <= 2.02 * x.nbytes + 64 * 8 * 4


@only_emulated
def test_moments_take_two_launches(rng):
    x = cp.asarray(rng.standard_normal((4, 3, 5)))
    assert [launch.name for launch in record(lambda: F.moments(x))] == ["bn_stats", "mean_and_var"]


def test_a_copy_of_what_is_not_dense_alone(rng):
    """Permuted memory is read as it is, a crop through one copy."""
    x = cp.asarray(rng.standard_normal((4, 9, 9, 6)).astype(np.float32))
    for view in (x.transpose(0, 3, 1, 2), x.transpose(3, 0, 2, 1), x.transpose(1, 2, 3, 0)):
        y = F.batch_norm(view, None, None, training=True)
        assert y.strides == view.strides
        expected = F.batch_norm(to_numpy(view), None, None, training=True)
        np.testing.assert_allclose(to_numpy(y), expected, atol=1e-5)
    crop = x[:, 1:-1, ::2].transpose(0, 3, 1, 2)
    y = F.batch_norm(crop, None, None, training=True)
    np.testing.assert_allclose(to_numpy(y), F.batch_norm(to_numpy(crop), None, None, training=True), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Streams, threads, graphs, devices


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_a_graph_of_a_training_step(rng, momentum):
    """The counter, and momentum=None that depends on it, move at every replay."""
    x = cp.asarray(rng.standard_normal((8, 3, 5, 7)).astype(np.float32))
    layer, expected = (cupybn.BatchNorm2d(3, momentum=momentum, device="cuda:0") for _ in range(2))
    with cupybn.no_stats_update():
        y, vjp_fn = layer.vjp(x)  # compiles what the capture must not compile
        vjp_fn(x)
    del y, vjp_fn  # leaves memory in the pool for those of the capture
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        y, vjp_fn = layer.vjp(x)
        grads = vjp_fn(x)
        graph = stream.end_capture()
    assert int(layer.num_batches_tracked) == 0
    for scale in 1, 3, 2:
        x *= scale
        cp.cuda.get_current_stream().synchronize()
        graph.launch(stream)
        stream.synchronize()
        wanted, vjp_fn = expected.vjp(x)
        assert bits(y, *grads[:3]) == bits(wanted, *vjp_fn(x)[:3])
        assert bits(*layer.state_dict().values()) == bits(*expected.state_dict().values())
    assert int(layer.num_batches_tracked) == 3


def test_two_streams_and_two_threads_at_once(rng):
    from concurrent.futures import ThreadPoolExecutor

    xs = [cp.asarray(rng.standard_normal((8, 5, 7, 9)).astype(np.float32)) for _ in range(4)]
    expected = [bits(F.batch_norm(x, None, None, training=True)) for x in xs]
    cp.cuda.get_current_stream().synchronize()

    def work(index):
        stream = cp.cuda.Stream(non_blocking=True)
        with cp.cuda.Device(0), stream:
            results = [F.batch_norm(xs[index], None, None, training=True) for _ in range(5)]
            stream.synchronize()
        return [bits(y) == expected[index] for y in results]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(same) for same in pool.map(work, range(4)))


def test_arrays_of_a_device_that_is_not_current(rng):
    with contextlib.ExitStack() as stack:
        if emulator is not None:
            stack.enter_context(emulator.pretend(emulator.H200, emulator.T4))
            forget_plans()
            stack.callback(forget_plans)
        elif cp.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("needs two GPUs")
        x = rng.standard_normal((8, 3, 5, 7)).astype(np.float32)
        layer = cupybn.BatchNorm2d(3, device="cuda:1")
        with cp.cuda.Device(1):
            on_device = cp.asarray(x)
        y, vjp_fn = layer.vjp(on_device)
        grads = vjp_fn(on_device)
        moments = F.moments(on_device)
        assert {a.device.id for a in (y, *grads[:3], *moments, *layer.state_dict().values())} == {1}
        assert cp.cuda.runtime.getDevice() == 0
        with cp.cuda.Device(1):
            assert bits(y) == bits(cupybn.BatchNorm2d(3, device="cuda:1")(on_device))
        np.testing.assert_allclose(y.get(), F.batch_norm(x, None, None, training=True), atol=1e-5)
        copy_of = pickle.loads(pickle.dumps(layer))
        assert {a.device.id for a in copy_of.state_dict().values()} == {1}
        assert bits(*copy_of.state_dict().values()) == bits(*layer.state_dict().values())
        copy_of.reset_parameters()
        copy_of.load_state_dict(layer.state_dict())
        assert bits(*copy_of.state_dict().values()) == bits(*layer.state_dict().values())
        with pytest.raises(TypeError, match=r"weight.*cuda:1.*cuda:0"):
            F.batch_norm(on_device, None, None, cp.ones(3, np.float32), training=True)
