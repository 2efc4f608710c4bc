"""Any dense array becomes (N, C, L) without a copy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cupybn._calls.layout import Layout
from tests.reference import bits


def dense(shape, order):
    """An array of this shape whose axes lie in memory in the given order, slowest first."""
    return np.arange(np.prod(shape)).reshape([shape[i] for i in order]).transpose(np.argsort(order))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("axis", range(4))
def test_every_dense_permutation_is_a_view(order, axis):
    x = dense((2, 3, 4, 5), order)
    layout = Layout.of(x, axis)
    view = layout.view(x)
    assert layout.matches(x)
    assert np.shares_memory(view, x)
    assert view.flags.c_contiguous
    assert np.array_equal(np.sort(view, axis=None), np.sort(x, axis=None))
    for c in range(x.shape[axis]):
        assert set(view[:, c].ravel()) == set(x.take(c, axis).ravel())
    assert layout.back(layout.empty(x)).strides == x.strides


@pytest.mark.parametrize(
    ("shape", "order", "axis", "expected"),
    [
        ((2, 3, 4, 5), (0, 1, 2, 3), 1, (2, 3, 20)),  # NCHW
        ((2, 3, 4, 5), (0, 2, 3, 1), 1, (40, 3, 1)),  # channels-last memory
        ((2, 4, 5, 3), (0, 1, 2, 3), 3, (40, 3, 1)),  # NHWC
        ((2, 3, 4, 5), (1, 0, 2, 3), 1, (1, 3, 40)),  # channels slowest
        ((6, 3), (0, 1), 1, (6, 3, 1)),
        ((6, 1, 7), (0, 1, 2), 1, (1, 1, 42)),  # a single channel is one row
        ((1, 3, 1, 5), (0, 1, 2, 3), 1, (1, 3, 5)),
        ((0, 3, 5), (0, 1, 2), 1, (0, 3, 5)),
    ],
)
def test_shapes(shape, order, axis, expected):
    x = dense(shape, order)
    assert Layout.of(x, axis).shape == expected
    assert Layout.of(x, axis).view(x).shape == expected


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[:, :, 1:],
        lambda x: x[::2],
        lambda x: x[:, :, ::-1],
        lambda x: x[:, :2],
        lambda x: np.broadcast_to(x[:1], x.shape),
    ],
)
def test_what_is_not_dense_is_copied_once_in_the_same_order(take):
    x = take(dense((4, 3, 5), (0, 2, 1)))
    layout = Layout.of(x, 1)
    view = layout.view(layout.conform(x))
    assert not layout.matches(x)
    assert not np.shares_memory(view, x)
    assert view.flags.c_contiguous
    assert np.array_equal(layout.conform(x), x)
    assert layout.matches(layout.conform(x))


def test_conform_copies_only_another_order():
    x, other = dense((4, 3, 5), (0, 1, 2)), dense((4, 3, 5), (0, 2, 1))
    layout = Layout.of(x, 1)
    assert layout.conform(x) is x
    assert np.array_equal(layout.conform(other), other)
    assert layout.conform(other).strides == x.strides


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 4, 1), (2, 3, 1, 5), (1, 3, 1, 1), (2, 3, 1)], ids=str)
def test_axes_of_length_1(shape):
    """Axes of length 1 have the strides of a contiguous array in the output, whatever they have in the input."""
    x = dense(shape, range(len(shape)))
    layout = Layout.of(x, 1)
    assert layout.shape == (shape[0], 3, np.prod(shape[2:]))
    assert layout.back(layout.empty(x)).strides == x.strides
    for stride in 0, 8, -8, 1000:
        strides = [stride if n == 1 else s for n, s in zip(shape, x.strides, strict=True)]
        odd = np.lib.stride_tricks.as_strided(x, strides=strides)
        assert Layout.of(odd, 1).shape == layout.shape
        assert Layout.of(odd, 1).matches(odd)
        assert np.array_equal(Layout.of(odd, 1).view(odd), layout.view(x))
        assert np.shares_memory(Layout.of(odd, 1).view(odd), x)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_flipped_axes_keep_their_order(order):
    """The copy of an array that runs backwards has its axes in the array's order."""
    x = dense((4, 3, 5), order)
    for flipped in x[::-1], x[:, ::-1], x[..., ::-1], x[::-1, ::-1, ::-1]:
        assert Layout.of(flipped, 1) == Layout.of(x, 1)
        assert Layout.of(flipped, 1).conform(flipped).strides == x.strides


@pytest.mark.parametrize("offset", [0, 2, 4, 8, 12])
@pytest.mark.parametrize("alignment", [1, 4, 8, 16])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=str)
def test_new_arrays_begin_where_they_should(order, alignment, offset):
    """Whatever memory an allocator hands out, as one that a program has set may."""
    cp = pytest.importorskip("cupy")
    x = cp.asarray(dense((2, 3, 4, 5), order).astype(np.float16))
    before = cp.cuda.get_allocator()
    layout = Layout.of(x, 1)
    cp.cuda.set_allocator(lambda size: cp.cuda.MemoryPointer(before(size + 16).mem, offset))
    try:
        new = layout.empty(x, alignment)
    finally:
        cp.cuda.set_allocator(before)
    assert new.data.ptr % alignment == 0
    assert new.flags.c_contiguous
    assert (new.shape, new.dtype) == (layout.sizes, x.dtype)
    new[...] = 1
    assert bits(new) == bits(np.ones(layout.sizes, np.float16))
