"""Layouts: dense arrays of any rank and memory order as steps take them, (N, C, L) or (N, A, C, B), without a copy."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupybn._arrays.devices import copied, empty, module_of
from cupybn._arrays.kinds import kind

Array = Any  # numpy.ndarray or cupy.ndarray

_COUNT = tuple(range(64))
"""The axes 0, 1, 2, ... of an array whose axes are in the order of memory; NumPy and CuPy take no more than these."""


class Layout(NamedTuple):
    """Order of an array's axes in memory, and the shape that this gives it for the steps.

    For batch norm that is (N, C, L). Sort the axes by their order in memory: those before the channel axis collapse
    into N, those after it into L. So contiguous NCHW is (N, C, H*W), channels-last data is (N*H*W, C, 1), and every
    other dense permutation has such a form.

    For norms within a sample it is (N, A, C, B): the axes of the samples come first, and collapse into N. Those of the
    positions before the channel axis collapse into A, those after it into B. An array whose samples do not come first
    in memory has not its own layout, and is copied; outputs go back to its order.
    """

    axes: tuple[int, ...]  # numbers of the axes in the order of memory, slowest first
    sizes: tuple[int, ...]  # sizes of these axes, in the same order
    shape: tuple[int, ...]  # shape that steps see
    channel_axis: int | None  # number of the channel axis; None where there is none, and the whole array is one channel
    order: tuple[int, ...] | None = None  # axes in the order of memory that outputs get, where it is another one

    @classmethod
    def of(cls, array: Array, channel_axis: int | None) -> Layout:
        """Layout of an array. One that is not dense gets that of a dense array with its axes in the same order."""
        # The strides of axes of length 1 mean nothing; but wherever such axes are sorted to, N and L stay the same. If
        # the channel axis is one of them, it goes to the front: the whole array is one channel, (1, 1, L).
        axes = _in_memory(array)
        if channel_axis is not None and array.shape[channel_axis] == 1:
            axes.remove(channel_axis)
            axes.insert(0, channel_axis)
        sizes = tuple(array.shape[i] for i in axes)
        if channel_axis is None:
            return cls(tuple(axes), sizes, (1, 1, math.prod(sizes)), None)
        c = axes.index(channel_axis)
        return cls(tuple(axes), sizes, (math.prod(sizes[:c]), sizes[c], math.prod(sizes[c + 1 :])), channel_axis)

    @classmethod
    def of_samples(cls, array: Array, samples: Sequence[int], channels: Sequence[int]) -> Layout:
        """Layout for norms within a sample of an array with these axes of samples and channels; others are positions.

        Several channel axes stand for one, and come in their own order.
        """
        order = _in_memory(array)
        first = [i for i in order if i in samples]
        positions = [i for i in order if i not in samples and i not in channels]
        before = [i for i in positions if order.index(i) < order.index(channels[0])]
        after = [i for i in positions if i not in before]

        def product(axes: Sequence[int]) -> int:
            return math.prod(array.shape[i] for i in axes)

        scattered = product(before) > 1 and product(after) > 1 and kind(array) == "cupy"  # which no kernel takes
        if scattered or product(channels) == 1:
            before, after = [], positions
        axes = (*first, *before, *channels, *after)
        shape = product(first), product(before), product(channels), product(after)
        sizes = tuple(array.shape[i] for i in axes)
        own = [i for i in order if array.shape[i] != 1]  # of the others the strides mean nothing
        moved = own != [i for i in axes if array.shape[i] != 1] and _is_dense(
            tuple(order), array.shape, array.strides, array.itemsize
        )
        return cls(axes, sizes, shape, channels[0], tuple(order) if moved else None)

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
        """View, in the shape that steps see, of an array that has this layout; None for None."""
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

    def ordered(self, array: Array) -> Array:
        """Copy of an array in the memory order of outputs, where that is another one than this layout's."""
        assert self.order is not None
        copy = empty(tuple(array.shape[i] for i in self.order), array)
        copy = copy.transpose([self.order.index(i) for i in range(len(self.order))])
        copy[...] = array
        return copy


def _in_memory(array: Array) -> list[int]:
    """Numbers of an array's axes in the order of memory, slowest first."""
    return sorted(range(array.ndim), key=lambda i: (-abs(array.strides[i]), i))


@functools.lru_cache(maxsize=4096)
def _is_dense(axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether these strides are those of a contiguous array with its axes in this order."""
    expected = itemsize
    for i in reversed(axes):
        if shape[i] != 1 and strides[i] != expected:
            return 0 in shape
        expected *= shape[i]
    return True
