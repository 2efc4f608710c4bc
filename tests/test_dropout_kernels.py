"""The steps of dropout: kernels against mirrors, to the bit, and the words of both against known answers."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn._steps import cupy_dropout, numpy_dropout, sources
from cupybn._steps.bundles import Drops
from cupybn._steps.geometry import THREADS
from tests import philox
from tests.reference import DTYPES, to_numpy
from tests.steps import to_device

cp = pytest.importorskip("cupy")
emulator = getattr(cp, "emulator", None)
only_emulated = pytest.mark.skipif(emulator is None, reason="a GPU neither counts nor runs single blocks")

SEED, CALL = 0x123456789ABCDEF0, 0x0FEDCBA987654321
THRESHOLD = round(0.3 * 2**32)
THRESHOLDS = (0, 1, 3 << 30, 2**32 - 1, 2**32)


def drops(threshold=THRESHOLD, scale=1 / 0.7):
    """What a call has drawn, on the host."""
    return Drops(np.array([SEED, CALL], np.uint64), threshold, scale)


def values(rng, shape, dtype):
    """Random numbers, and some that are no numbers. No result is subnormal, which a GPU would flush to 0."""
    x = rng.standard_normal(shape).astype(dtype)
    flat = x.reshape(-1)
    for i, value in enumerate((np.nan, np.inf, -np.inf, -0.0, 0.0)):
        flat[i + 1 :: 17] = value
    return x


def same(ours, theirs):
    """Whether two arrays have the same bits, but for those of NaN, of which any will do."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    nan = np.isnan(theirs.astype(np.float64))
    word = f"u{theirs.itemsize}"
    np.testing.assert_array_equal(np.isnan(ours.astype(np.float64)), nan)
    np.testing.assert_array_equal(ours.view(word)[~nan], theirs.view(word)[~nan])


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(("counter", "key", "output"), philox.KNOWN)
def test_known_answers(counter, key, output):
    """Answers that Random123 has, by the mirror, by the text of the kernels, and by the reference of these tests."""
    low, high, call_low, call_high = counter
    number, call, seed = low | high << 32, call_low | call_high << 32, key[0] | key[1] << 32
    assert philox.block(number, call, seed) == output
    mirrored = numpy_dropout._philox(np.array([number], np.uint64), call, seed)
    assert [int(words[0]) for words in mirrored] == [*output]
    text = (
        sources._with_headers(sources.KERNELS / "philox.cuh", set())
        + """
extern "C" __global__ void words(const unsigned long long* drawn, const unsigned long long* number, unsigned* out) {
    const Block block = Philox(drawn)(*number);
    for (unsigned i = 0; i < 4; i++) out[i] = block.word(i);
    out[4] = block.a;
}
"""
    )
    options = ("-DDATA_T=float32", "-DWIDTH=1", "-DINDEX_BITS=32", "-DTHREADS=32")
    out = cp.empty(5, np.uint32)
    kernel = cp.RawKernel(text, "words", options)
    kernel((1,), (1,), (cp.asarray(np.array([seed, call], np.uint64)), cp.asarray(np.array([number], np.uint64)), out))
    assert to_numpy(out).tolist() == [*output, output[0]]


def test_words_of_the_mirror_are_those_of_the_formula():
    """Wherever a range begins: at 0, and where the number of the block has more than 32 bits."""
    for first in 0, 1 << 18, (1 << 34) - 8, 1 << 34, (1 << 40) + 4:
        for count in 1, 4, 37:
            for threshold in THRESHOLDS:
                found = numpy_dropout._dropped(drops(threshold), slice(first, first + count))
                wanted = [philox.word(first + i, CALL, SEED) < threshold for i in range(count)]
                assert found.tolist() == wanted


def test_tiles_begin_with_a_block():
    assert numpy_dropout.TILE % numpy_dropout.WORDS == 0


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def test_a_draw_copies_the_state_and_counts_the_call():
    for seed, call in (7, 0), (2**64 - 1, 5), (0, 2**32 - 1), (3, 2**64 - 1):
        host = np.array([seed, call], np.uint64)
        device = cp.asarray(host)
        for ops, state in (numpy_dropout, host), (cupy_dropout, device):
            drawn = ops.dropout_draw(state)
            assert drawn.dtype == np.uint64
            assert to_numpy(drawn).tolist() == [seed, call]
            assert to_numpy(state).tolist() == [seed, (call + 1) % 2**64]
            state[0] = 1
            assert to_numpy(drawn).tolist() == [seed, call]  # a copy


# ---------------------------------------------------------------------------------------------------------------------
# Elements


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_dropout(rng, dtype):
    """Kernel, mirror and formula have the same bits: whole packs and what is left over, at any address."""
    for size, offset in itertools.product((1, 3, 8, 1001, 5000), (0, 1, 2, 4)):
        x = values(rng, size, dtype)
        y = np.empty_like(x)
        numpy_dropout.dropout(x, drops(), y)
        same(y, philox.expected(x, np.arange(size), 0.3, CALL, SEED))
        on_device, out = to_device(x, offset), to_device(np.full_like(x, 7), offset)
        cupy_dropout.dropout(on_device, to_device(drops()), out)
        same(out, y)
        same(on_device, x)
        cupy_dropout.dropout(on_device, to_device(drops()), on_device)
        numpy_dropout.dropout(x, drops(), x)
        same(on_device, y)
        same(x, y)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_any_threshold(rng, threshold):
    """None is below 0, all are below 2^32; what is dropped is +0."""
    x = values(rng, 1003, np.dtype(np.float32))
    y, out = np.empty_like(x), cp.empty(x.shape, x.dtype)
    numpy_dropout.dropout(x, drops(threshold, 2.0), y)
    cupy_dropout.dropout(to_device(x), to_device(drops(threshold, 2.0)), out)
    same(out, y)
    wanted = np.array([philox.word(i, CALL, SEED) < threshold for i in range(x.size)])
    assert wanted.all() or threshold < 2**32 - 1
    assert not wanted.any() or threshold > 1
    assert not y[wanted].view(np.uint32).any()
    same(y[~wanted], (x * np.float32(2))[~wanted])


@only_emulated
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_threads_take_several_packs(rng, dtype):
    """Blocks go over the array several times on a small device; grids of any size give the same bits."""
    x = values(rng, 70003, np.dtype(dtype))
    y = np.empty_like(x)
    numpy_dropout.dropout(x, drops(), y)
    for multiprocessors in 1, 3:
        with emulator.pretend(replace(emulator.T4, multiprocessors=multiprocessors)):
            cupy_dropout.plans.properties_of.cache_clear()
            for offset in 0, 1:
                out = to_device(np.zeros_like(x), offset)
                with emulator.record() as launches:
                    cupy_dropout.dropout(to_device(x, offset), to_device(drops()), out)
                assert launches[0].grid[0] == multiprocessors * cupy_dropout.BLOCKS
                same(out, y)
    cupy_dropout.plans.properties_of.cache_clear()


def test_tiles_of_the_mirror(rng, monkeypatch):
    """Tiles and threads of any number give the same bits."""
    x = values(rng, 5003, np.dtype(np.float32))
    y = philox.expected(x, np.arange(x.size), 0.3, CALL, SEED)
    batch, wanted = x[:5000].reshape(1, 5, 4, 50, 5), np.empty((1, 5, 4, 50, 5), np.float32)
    numpy_dropout.dropout_channels(batch, drops(), False, wanted)
    monkeypatch.setattr(numpy_dropout, "TILE", 64)
    monkeypatch.setattr(numpy_dropout, "SMALL", 0)
    for threads in "1", "3":
        monkeypatch.setenv("CUPYBN_NUM_THREADS", threads)
        out = np.empty_like(x)
        numpy_dropout.dropout(x, drops(), out)
        same(out, y)
        out = np.empty_like(wanted)
        numpy_dropout.dropout_channels(batch, drops(), False, out)
        same(out, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Channels

AXES = {  # shape (O, A, M, B, I), and whether the channels are A
    "rows of packs": ((1, 3, 1, 5, 32), False),
    "odd rows": ((1, 3, 1, 7, 49), False),
    "rows of the size of a pack and one more": ((1, 2, 1, 9, 9), False),
    "rows of two and three": ((1, 2, 1, 9, 3), False),
    "pairs": ((1, 2, 1, 9, 2), False),
    "neighbouring channels": ((1, 3, 10, 16, 1), False),
    "pairs of channels": ((1, 3, 10, 6, 1), False),
    "odd channels": ((1, 3, 10, 5, 1), False),
    "channels of a matrix": ((1, 9, 1, 24, 1), False),
    "something before": ((3, 2, 1, 5, 12), False),
    "something before and between": ((3, 4, 2, 8, 1), False),
    "something everywhere": ((2, 3, 2, 5, 7), False),
    "channels outside": ((1, 3, 1, 5, 12), True),
    "channels outside of all else": ((1, 3, 4, 5, 1), True),
    "channels outside, something everywhere": ((2, 3, 2, 5, 9), True),
    "one sample": ((1, 1, 4, 8, 3), False),
}


@pytest.mark.parametrize("case", AXES.values(), ids=AXES)
def test_dropout_channels(rng, case):
    """Kernel, mirror and formula have the same bits, in any order of memory, with packs of any width."""
    shape, swapped = case
    _, A, _, B, _ = shape
    numbers = (np.arange(B)[None, :] * A + np.arange(A)[:, None]) if swapped else np.arange(A * B).reshape(A, B)
    numbers = numbers[None, :, None, :, None]
    for dtype, offset in (np.float32, 0), (np.float16, 0), (ml_dtypes.bfloat16, 1), (np.float64, 0), (np.float32, 2):
        x = values(rng, shape, np.dtype(dtype))
        y = np.empty_like(x)
        numpy_dropout.dropout_channels(x, drops(), swapped, y)
        same(y, philox.expected(x, numbers, 0.3, CALL, SEED))
        out = to_device(np.full_like(x, 7), offset)
        cupy_dropout.dropout_channels(to_device(x, offset), to_device(drops()), swapped, out)
        same(out, y)


@only_emulated
@pytest.mark.parametrize(
    ("shape", "swapped", "dtype", "width"),
    [
        ((1, 3, 1, 5, 49), False, np.float32, 4),
        ((1, 3, 1, 5, 49), False, np.float16, 8),
        ((1, 3, 1, 5, 7), False, np.float16, 4),
        ((1, 3, 1, 5, 3), False, np.float32, 2),
        ((1, 3, 9, 16, 1), False, np.float16, 8),
        ((1, 3, 9, 6, 1), False, np.float32, 2),
        ((1, 3, 9, 16, 1), True, np.float32, 1),
    ],
    ids=str,
)
def test_packs_are_as_wide_as_can_be(shape, swapped, dtype, width, monkeypatch):
    x, widths, plan = cp.ones(shape, dtype), [], cupy_dropout._plan

    def spy(*given):
        widths.append(given[3])
        return plan(*given)

    monkeypatch.setattr(cupy_dropout, "_plan", spy)
    cupy_dropout.dropout_channels(x, to_device(drops()), swapped, x)
    assert widths == [width]


# ---------------------------------------------------------------------------------------------------------------------
# Large arrays


LARGE = {  # elements, and how many of them lie before an array behind an aligned address
    "indices of 32 bits": (2**31 - 2**30, 0),
    "single elements": (2**31 + 1805, 1),
    "more than 2^32 words": (2**32 + 1805, 0),
    "more than 2^32 blocks of words": (2**34 + 1805, 0),
}


@contextlib.contextmanager
def single_packs():
    """A context with a device so large that no thread takes two packs."""
    with emulator.pretend(replace(emulator.H200, multiprocessors=1 << 26)):
        cupy_dropout.plans.properties_of.cache_clear()
        yield
    cupy_dropout.plans.properties_of.cache_clear()


@only_emulated
@pytest.mark.parametrize(("size", "offset"), LARGE.values(), ids=LARGE)
def test_numbers_of_more_than_32_bits(size, offset):
    """The last block of a large array, and what is left over behind its last pack, which the first block takes."""
    from tests.partial import fill, sparse

    width = 1 if offset else 8
    packs = size // width
    blocks = -(-packs // THREADS)
    x = fill(sparse((size,), np.float16, [(0, 3000), (size - 3000, size)], offset), lambda n: np.ones(n, np.float16))
    out = sparse((size,), np.float16, [(0, 3000), (size - 3000, size)], offset)
    with single_packs(), emulator.run_only((0, 0, 0), (blocks - 1, 0, 0)):
        cupy_dropout.dropout(x, to_device(drops(1 << 31, 2.0)), out)
    for begin, end in (0, THREADS * width), ((blocks - 1) * THREADS * width, size):
        wanted = [philox.word(i, CALL, SEED) < 1 << 31 for i in range(begin, end)]
        assert (out._host[begin:end] == 0).tolist() == wanted


@only_emulated
@pytest.mark.parametrize(
    ("shape", "dtype", "width"),
    [((1, 2**16, 1, 2**10, 4 * 17), np.float32, 4), ((1, 2**14, 2**4, 2**14 + 8, 1), np.float16, 8)],
    ids=["rows", "neighbouring channels"],
)
def test_channels_of_large_arrays(shape, dtype, width):
    """The last block of an array of more than 2^32 elements."""
    from tests.partial import fill, sparse

    _, A, M, B, behind = shape
    size = math.prod(shape)
    first = size - THREADS * width
    x = fill(sparse(shape, dtype, [(first, size)]), lambda n: np.ones(n, dtype))
    out = sparse(shape, dtype, [(first, size)])
    with single_packs(), emulator.run_only((size // width // THREADS - 1, 0, 0)):
        cupy_dropout.dropout_channels(x, to_device(drops(1 << 31, 2.0)), False, out)
    numbers = [at // (M * B * behind) % A * B + at // behind % B for at in range(first, size)]
    assert max(numbers) == A * B - 1
    assert (out._host.reshape(-1)[first:] == 0).tolist() == [philox.word(i, CALL, SEED) < 1 << 31 for i in numbers]


# ---------------------------------------------------------------------------------------------------------------------
# Launches and traffic


@only_emulated
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("axis", [None, 1, -1], ids=["elements", "channels first", "channels last"])
def test_launches_and_traffic(rng, axis, dtype, monkeypatch):
    """Two passes over the tensor each way, by one launch and a draw; between them two numbers are kept.

    On a device with one multiprocessor: each thread reads the two numbers, which is little if it takes many packs.
    """
    monkeypatch.setattr(emulator, "devices", [replace(emulator.T4, multiprocessors=1)])
    x = cp.asarray(rng.standard_normal((6, 64, 28, 32)).astype(dtype))
    generator, options = cupybn.Generator(7, device="cuda:0"), {} if axis is None else {"channel_axis": axis}
    function = F.dropout_vjp if axis is None else F.dropout2d_vjp
    function(x, generator=generator, **options)
    for _ in "a", "b":  # the first of them is not recorded any more
        before = emulator.usage(0).live_bytes
        with emulator.record_syncs() as syncs, emulator.record() as launches:
            y, vjp_fn = function(x, generator=generator, **options)
            held = emulator.usage(0).live_bytes - before
            dx = vjp_fn(x).input
        assert held <= y.nbytes + 1024
        step = "dropout" if axis is None else "dropout_channels"
        assert [launch.name for launch in launches] == ["dropout_draw", step, step]
        assert not syncs
        for launch in launches[1:]:
            moved = launch.bytes_read + launch.bytes_written
            assert moved == pytest.approx(2 * x.nbytes, rel=2e-2), f"{moved / x.nbytes:.3f} passes"
        del y, vjp_fn, dx
