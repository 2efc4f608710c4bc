"""Everything that can be wrong with the arguments, found before any array is touched or any kernel is launched."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

from cupybn._devices import describe, device_of, kind
from cupybn._dtypes import FLOATS, is_float

ACTIVATIONS = (None, "relu")


def check_array(name: str, array: Any, like: Any = None) -> None:
    """An array of a kind and dtype that batch norm takes, on the device of ``like``."""
    if kind(array) is None:
        raise TypeError(f"expected {name} to be a NumPy or CuPy array (got {describe(array)})")
    if not is_float(array.dtype):
        raise TypeError(f"expected {name} of dtype {', '.join(FLOATS)} (got {array.dtype.name})")
    if like is not None and device_of(array) != device_of(like):
        raise TypeError(f"expected {name} to be a {describe(like)} like input (got a {describe(array)})")


def check_like(name: str, array: Any, input: Any) -> None:
    """An array of the input's kind, device, dtype and shape."""
    check_array(name, array, input)
    if array.dtype != input.dtype:
        raise TypeError(f"expected {name} of the input's dtype {input.dtype} (got {array.dtype})")
    if array.shape != input.shape:
        raise ValueError(f"expected {name} of the input's shape {input.shape} (got {array.shape})")


def check_writeable(name: str, array: Any) -> None:
    """An array that may be written to."""
    if kind(array) == "numpy" and not array.flags.writeable:
        raise ValueError(f"expected {name} to be writeable (got a read-only array)")


def check_counter(counter: Any, like: Any) -> None:
    """A 0-d int64 array, on the device of ``like``: it counts in place."""
    if kind(counter) is None or counter.dtype != "int64" or device_of(counter) != device_of(like):
        given = f"{describe(counter)} of {counter.dtype}" if kind(counter) else describe(counter)
        raise TypeError(f"expected num_batches_tracked to be an int64 array beside input (got {given})")
    if counter.shape != ():
        raise ValueError(f"expected num_batches_tracked of shape () (got {counter.shape})")


def check_channel_axis(channel_axis: int, ndim: int) -> int:
    """The channel axis counted from the front."""
    if ndim < 2:
        raise ValueError(f"expected at least 2D input (got {ndim}D input)")
    axis = operator.index(channel_axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"expected channel_axis in [{-ndim}, {ndim}) for {ndim}D input (got {axis})")
    return axis % ndim


def check_activation(activation: str | None) -> None:
    """One of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")


def as_float(name: str, value: Any) -> float:
    """A number that the host knows, as a float."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a float (got {type(value).__qualname__})")
    return float(value)


def check_eps(eps: float, training: bool) -> None:
    """Positive in training, where a variance may be 0; not negative otherwise."""
    as_float("eps", eps)
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_both_or_neither(running_mean: Any, running_var: Any) -> None:
    """Running statistics come in pairs."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")


def check_vectors(input: Any, axis: int, vectors: Mapping[str, Any], suggest_axis: bool) -> None:
    """Per-channel vectors: kind, device, dtype, and one element for each channel.

    The message may suggest another axis, which a layer can be made for.
    """
    for name, vector in vectors.items():
        if vector is not None:
            check_array(name, vector, input)
    channels = input.shape[axis]
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.ndim != 1:
            raise ValueError(f"expected {name} of shape ({channels},) (got {vector.shape})")
        if vector.size != channels:
            message = f"{name} should contain {channels} elements not {vector.size}"
            if suggest_axis and vector.size in input.shape:
                meant = input.ndim - 1 - input.shape[::-1].index(vector.size)
                message += (
                    f" (axis {axis} of the input of shape {input.shape} has {channels}, axis {meant} has "
                    f"{vector.size}: did you mean channel_axis={meant}?)"
                )
            raise ValueError(message)


def check_more_than_one_value(shape: tuple[int, ...], axis: int) -> None:
    """The unbiased variance of a single value is not defined."""
    if math.prod(shape) == shape[axis]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
