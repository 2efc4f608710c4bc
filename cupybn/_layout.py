"""Any dense array, of any rank and memory order, as (N, C, L) without a copy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cupybn._devices import empty

Array = Any  # numpy.ndarray or cupy.ndarray


class Layout(NamedTuple):
    """How the elements of an array lie in memory around its channel axis.

    With the axes in the order of memory, those before the channel axis collapse into N and those after it into L. So
    contiguous NCHW is (N, C, H*W), channels-last data (N*H*W, C, 1), and every other dense permutation has such a form.
    """

    axes: tuple[int, ...]  # in the order of memory, slowest first
    sizes: tuple[int, ...]  # of these axes
    shape: tuple[int, int, int]  # N, C, L

    @classmethod
    def of(cls, array: Array, channel_axis: int) -> Layout:
        """The layout of an array; for one that is not dense, that of a dense array with its axes in the same order."""
        # Strides of axes of length 1 mean nothing: such axes go to the front. If the channel axis is one of them, all
        # the array is one channel, (1, 1, L).
        axes = sorted(range(array.ndim), key=lambda i: (array.shape[i] != 1, -abs(array.strides[i]), i))
        if array.shape[channel_axis] == 1:
            axes.remove(channel_axis)
            axes.insert(0, channel_axis)
        sizes = tuple(array.shape[i] for i in axes)
        c = axes.index(channel_axis)
        return cls(tuple(axes), sizes, (math.prod(sizes[:c]), sizes[c], math.prod(sizes[c + 1 :])))

    def matches(self, array: Array) -> bool:
        """Whether an array of the same shape has this layout and is dense."""
        return bool(array.transpose(self.axes).flags.c_contiguous)

    def conform(self, array: Array | None) -> Array | None:
        """The array itself if it has this layout, else a copy that has; None for None."""
        if array is None or self.matches(array):
            return array
        copy = self.empty_like(array)
        copy[...] = array
        return copy

    def view(self, array: Array | None) -> Array | None:
        """An array of this layout as (N, C, L); None for None."""
        return None if array is None else array.transpose(self.axes).reshape(self.shape)

    def empty_like(self, array: Array) -> Array:
        """A new array of this layout, of the kind and dtype of the other one."""
        return empty(self.sizes, array).transpose([self.axes.index(i) for i in range(len(self.axes))])
