"""Calls with masks, and what they must be like: the same calls on the positions that a mask leaves, alone."""

from __future__ import annotations

import numpy as np

from tests.reference import ROUNDINGS, arguments, assert_close, expect, in_order, to_numpy

GRADS = ("dx", "dweight", "dbias", "dresidual")
"""Names of gradients in the reference, in the order of `BatchNormGrads`."""


def mask_of(xp, rng, shape, channel_axis=1, share=0.6):
    """A mask for an input of this shape, which leaves about this share of the positions."""
    shape = np.delete(shape, channel_axis)
    return xp.asarray(rng.random(shape) < share)


def whole(mask, shape, channel_axis):
    """The mask of an input of this shape, on the host: with a place for each of its elements."""
    mask = np.broadcast_to(to_numpy(mask), np.delete(shape, channel_axis))
    return np.broadcast_to(np.expand_dims(mask, channel_axis % len(shape)), shape)


def spoilt(array, mask, channel_axis, value=np.nan):
    """A copy of an array, in its memory order, that has a value wherever the mask leaves nothing."""
    copy = array.copy(order="K") if isinstance(array, np.ndarray) else in_order(array, axes_of(array))
    copy[copy_to(array, ~whole(mask, array.shape, channel_axis))] = value
    return copy


def axes_of(array):
    """Axes of an array in the order of memory, slowest first."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def copy_to(array, value):
    """A NumPy array as one of the kind of another array."""
    if isinstance(array, np.ndarray):
        return value
    import cupy

    return cupy.asarray(value)


def left(array, mask, channel_axis):
    """The positions of an array that a mask leaves, on the host: (P, C)."""
    rows = np.moveaxis(to_numpy(array), channel_axis, -1)
    return rows[np.broadcast_to(to_numpy(mask), rows.shape[:-1])]


def masked_arguments(xp, rng, shape, *, order=None, nan=True, share=0.6, **options):
    """Arguments of a call with a mask, and a gradient of its output; both have NaN wherever the mask leaves nothing.

    Tensors have their axes in this order of memory.
    """
    given = arguments(xp, rng, shape, **options)
    axis = given["channel_axis"]
    mask = mask_of(xp, rng, shape, axis, share)
    tensors = {name: given[name] for name in ("input", "residual")}
    tensors["dy"] = xp.asarray(rng.normal(size=shape).astype(given["input"].dtype))
    for name, array in tensors.items():
        array = array if order is None else in_order(array, order)
        tensors[name] = spoilt(array, mask, axis) if nan else array
    dy = tensors.pop("dy")
    return given | tensors | {"mask": mask}, dy


def compressed(arguments):
    """The arguments of the same call on what the mask leaves, as (P, C) arrays on the host."""
    given = {name: to_numpy(value) if hasattr(value, "shape") else value for name, value in arguments.items()}
    mask, axis = given.pop("mask"), given.pop("channel_axis")
    for name in "input", "residual":
        if given.get(name) is not None:
            given[name] = left(given[name], mask, axis)
    return given


def check_masked(arguments, dy, y, grads, scale=1):
    """Compare results of a masked call with the reference for what the mask leaves; all else must be 0."""
    mask, axis = arguments["mask"], arguments["channel_axis"]
    expected = expect(compressed(arguments), left(dy, mask, axis))
    dtype = arguments["input"].dtype
    out = ~whole(mask, y.shape, axis)
    for name, array in ("y", y), ("dx", grads.input), ("dresidual", grads.residual):
        if array is not None:
            assert array.shape == arguments["input"].shape
            assert array.dtype == dtype
            assert not to_numpy(array)[out].astype(np.float64).any(), name
            terms = np.broadcast_to(expected.terms[name], getattr(expected, name).shape)
            assert_close(left(array, mask, axis), getattr(expected, name), dtype, terms * scale, ROUNDINGS[name])
    for name, array in ("dweight", grads.weight), ("dbias", grads.bias):
        if array is not None:
            assert_close(array, getattr(expected, name), dtype, expected.terms[name] * scale, ROUNDINGS[name])
    return expected
