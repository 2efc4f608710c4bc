"""Writing into the arrays of layers: all that is to be written, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cupybn._arrays import devices, kinds
from cupybn._calls import checks

Array = Any  # numpy.ndarray or cupy.ndarray
Layer = Any  # `cupybn.layers.layer.Layer`, whose module imports this one

T = TypeVar("T")


def check_array(name: str, array: Any) -> None:
    """Check for an array of NumPy or CuPy in the place of one of a layer. The name is for messages.

    Raises
    ------
    TypeError
        If this is something else.
    """
    if kinds.kind(array) is None:
        raise TypeError(f"expected {name} to be an array (got {kinds.describe(array)})")


def check_target(name: str, array: Any, shape: tuple[int | None, ...] | None = None) -> None:
    """Check for an array that values, or those of an array of this shape, can be written into.

    The name is for messages.

    Raises
    ------
    TypeError
        If this is no array of NumPy or CuPy.
    ValueError
        If it may not be written to, or has another shape.
    """
    check_array(name, array)
    checks.check_writeable(name, array)
    if shape is not None and array.shape != shape:
        raise ValueError(f"expected {name} of the layer to have the shape {shape} (got {array.shape})")


def write(values: Sequence[tuple[Layer, Mapping[str, Any]]], result: T) -> T:
    """Write values into the arrays of layers, by their names, and return the result that is given.

    A layer without arrays takes the values as its attributes. An error or Ctrl-C, at whatever moment, leaves all layers
    as they were. So that none can come after everything is written, callers do nothing more than return.
    """
    before: list[tuple[Array, Array]] = []
    without = [layer for layer, _ in values if layer._shape is None]
    try:
        for layer, given in values:
            if layer in without:
                layer.__dict__.update(given)
                continue
            for name, value in given.items():
                array = kinds.plain(getattr(layer, name))
                with devices.on_device_of(array):
                    before.append((array, devices.copied(array)))
                    array[...] = value
        return result
    except BaseException:
        for layer in without:
            layer._release()
        for array, value in reversed(before):
            with devices.on_device_of(array):
                array[...] = value
        raise
