"""Channel axes, one or several: what shares a place along all of them shares statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cupybn._arrays.kinds import plain, show
from cupybn._calls import checks
from cupybn._calls.layout import Layout

Array = Any  # numpy.ndarray or cupy.ndarray
ChannelAxis = int | tuple[int, ...]
"""Number of the channel axis, or numbers of several axes, counted from either end."""


def as_channel_axis(channel_axis: Any) -> ChannelAxis:
    """A channel axis, or a tuple of different ones, as ints; raises for anything else."""
    if not isinstance(channel_axis, tuple):
        if isinstance(channel_axis, list):
            given = show(channel_axis)
            raise TypeError(
                f"expected channel_axis to be an int or a tuple of ints (got {given}): use tuple(channel_axis)"
            )
        return checks.as_int("channel_axis", channel_axis)
    axes = tuple(checks.as_int(f"channel_axis[{i}]", axis) for i, axis in enumerate(channel_axis))
    if not axes:
        raise ValueError("expected channel_axis to have one axis or more (got ()): use reshape(-1, 1) for one channel")
    _check_different(axes, axes)
    return axes


def check_axes(input: Any, channel_axis: ChannelAxis) -> tuple[int, ...]:
    """Channel axes counted from the front; raises unless this is an array that has them."""
    if not isinstance(channel_axis, tuple):
        return (checks.check_input(input, channel_axis),)
    checks.check_array("input", input)
    ndim = input.ndim
    for axis in channel_axis:
        if not -ndim <= axis < ndim:
            expected = f"axes in [{-ndim}, {ndim}) for {ndim}D input" if ndim else "an input with axes"
            raise ValueError(f"expected channel_axis of {expected} (got {show(channel_axis)})")
    axes = tuple(axis % ndim for axis in channel_axis)
    _check_different(axes, channel_axis)
    return axes


def _check_different(axes: tuple[int, ...], given: tuple[int, ...]) -> None:
    """Check that no axis comes twice; ``given`` is how the user has counted them."""
    if len({*axes}) < len(axes):
        raise ValueError(f"expected channel_axis to have different axes (got {show(given)})")


def sizes_along(input: Array, axes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of an array along these axes: the shape that its statistics have."""
    return tuple(input.shape[axis] for axis in axes)


def view(input: Array, axes: tuple[int, ...], mask: Array | None) -> tuple[Array, Array | None]:
    """An array as (N, C, L), with all channel axes as one, and its mask as (N, L): views of them, or else copies."""
    others = [i for i in range(input.ndim) if i not in axes]
    sizes = *sizes_along(input, others), math.prod(sizes_along(input, axes))
    input = plain(input).transpose([*others, *axes]).reshape(sizes)
    layout = Layout.of(input, len(others))
    x = layout.view(layout.conform(input))
    return x, None if mask is None else layout.view_mask(plain(mask))


def keeping_dims(statistic: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """View of a statistic with axes of length 1 for all that are no channel axes: it broadcasts against the input."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    statistic = statistic.transpose(order)
    sizes = iter(statistic.shape)
    return statistic.reshape([next(sizes) if axis in axes else 1 for axis in range(ndim)])
