"""Layouts: dense arrays of any rank and memory order seen as (N, C, L), without a copy."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from cupybn._arrays.devices import copied, empty, module_of
from cupybn._arrays.kinds import kind

Array = Any  # numpy.ndarray or cupy.ndarray

_COUNT = tuple(range(64))
"""The axes 0, 1, 2, ... of an array whose axes are in the order of memory; NumPy and CuPy take no more than these."""


class Layout(NamedTuple):
    """Order of an array's axes in memory, and the shape (N, C, L) that this gives it.

    Sort the axes by their order in memory: those before the channel axis collapse into N, those after it into L. So
    contiguous NCHW is (N, C, H*W), channels-last data is (N*H*W, C, 1), and every other dense permutation has such a
    form.
    """

    axes: tuple[int, ...]  # numbers of the axes in the order of memory, slowest first
    sizes: tuple[int, ...]  # sizes of these axes, in the same order
    shape: tuple[int, int, int]  # N, C, L
    channel_axis: int | None  # number of the channel axis; None where there is none, and the whole array is one channel

    @classmethod
    def of(cls, array: Array, channel_axis: int | None) -> Layout:
        """Layout of an array. One that is not dense gets that of a dense array with its axes in the same order."""
        # The strides of axes of length 1 mean nothing; but wherever such axes are sorted to, N and L stay the same. If
        # the channel axis is one of them, it goes to the front: the whole array is one channel, (1, 1, L).
        axes = sorted(range(array.ndim), key=lambda i: (-abs(array.strides[i]), i))
        if channel_axis is not None and array.shape[channel_axis] == 1:
            axes.remove(channel_axis)
            axes.insert(0, channel_axis)
        sizes = tuple(array.shape[i] for i in axes)
        if channel_axis is None:
            return cls(tuple(axes), sizes, (1, 1, math.prod(sizes)), None)
        c = axes.index(channel_axis)
        return cls(tuple(axes), sizes, (math.prod(sizes[:c]), sizes[c], math.prod(sizes[c + 1 :])), channel_axis)

    def matches(self, array: Array) -> bool:
        """Whether an array is dense and has this layout, which was made of an array of the same shape."""
        return _is_dense(self.axes, array.shape, array.strides, array.itemsize)

    def conform(self, array: Array | None) -> Array | None:
        """The array itself if it has this layout, else a copy that does; None for None."""
        return array if array is None or self.matches(array) else self.copy(array)

    def copy(self, array: Array) -> Array:
        """Copy of an array in this layout."""
        copy = self.back(self.empty(array))
        copy[...] = array
        return copy

    def view(self, array: Array | None) -> Array | None:
        """View, as (N, C, L), of an array that has this layout; None for None."""
        if array is None:
            return None
        return self._in_order(array).reshape(self.shape)

    def view_mask(self, mask: Array) -> Array:
        """A mask as a contiguous (N, L) array: a view of it, or a copy where it is not dense or in another order.

        It broadcasts to the shape that arrays of this layout have without their channel axis.
        """
        N, _, L = self.shape
        ordered = self._mask_in_order(mask)
        return (ordered if ordered.flags.c_contiguous else copied(ordered)).reshape(N, L)

    def matches_mask(self, mask: Array) -> bool:
        """Whether `view_mask` makes a view of this mask."""
        ordered: bool = self._mask_in_order(mask).flags.c_contiguous
        return ordered

    def conform_mask(self, mask: Array | None) -> Array | None:
        """The mask itself if `view_mask` makes a view of it, else a copy; None for None."""
        return mask if mask is None or self.matches_mask(mask) else self.copy_mask(mask)

    def copy_mask(self, mask: Array) -> Array:
        """Copy of a mask, of which `view_mask` makes a view."""
        order = self._axes_of_masks()
        return copied(self._mask_in_order(mask)).transpose([order.index(i) for i in range(len(order))])

    def _axes_of_masks(self) -> list[int]:
        """Axes of masks in the order of memory of this layout, numbered without the channel axis."""
        c = self.channel_axis
        return [i - (c is not None and i > c) for i in self.axes if i != c]

    def _mask_in_order(self, mask: Array) -> Array:
        """A mask in the shape of this layout without the channel axis, with its axes in the order of memory."""
        shape = [n for i, n in sorted(zip(self.axes, self.sizes, strict=True)) if i != self.channel_axis]
        return module_of(mask).broadcast_to(mask, shape).transpose(self._axes_of_masks())

    def empty(self, like: Array, alignment: int = 1) -> Array:
        """New array, uninitialised, of the kind and dtype of the given one, with its axes in the order of memory.

        Its address is a multiple of the alignment, in bytes, also where a program has set an allocator that hands out
        memory of less; NumPy's arrays are where they are.
        """
        array = empty(self.sizes, like)
        if alignment == 1 or kind(array) == "numpy" or array.data.ptr % alignment == 0:
            return array
        memory = empty((array.size + alignment // array.itemsize,), like)
        begin = -memory.data.ptr % alignment // array.itemsize
        return memory[begin : begin + array.size].reshape(self.sizes)

    def _in_order(self, array: Array) -> Array:
        """View of an array with its axes in the order of memory."""
        return array if self.axes == _COUNT[: len(self.axes)] else array.transpose(self.axes)

    def back(self, array: Array) -> Array:
        """View of an array with its axes in the order of memory: in their own order again."""
        if self.axes == _COUNT[: len(self.axes)]:
            return array
        return array.transpose([self.axes.index(i) for i in range(len(self.axes))])


@functools.lru_cache(maxsize=4096)
def _is_dense(axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether these strides are those of a contiguous array with its axes in this order."""
    expected = itemsize
    for i in reversed(axes):
        if shape[i] != 1 and strides[i] != expected:
            return 0 in shape
        expected *= shape[i]
    return True
