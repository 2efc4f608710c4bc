"""Checks of arguments, all of them before any array is touched or any kernel is launched.

A function ``check_...`` raises if its argument is not as it must be. A message names the argument, what was expected
and what was given, in PyTorch's words where it has such an error. It ends with the way out, if there is one: what to
write instead.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from array import array as BuiltinArray
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.dtypes import BITS_OF_BFLOAT16, FLOATS, is_float
from cupybn._arrays.kinds import describe, device_of, from_dlpack, kind, show
from cupybn._steps.bundles import ACTIVATIONS, Running

MOST_FEATURES = 2**60 - 1
"""Most elements that a parameter may have: with more, an int64 could not count the bytes of a float64 vector."""
MOST_NESTED = 64
"""Depth to which lists in lists are looked into: NumPy and CuPy take no more axes than that."""


def check_array(name: str, array: Any, like: Any = None, other: str = "input", masks: bool = True) -> None:
    """Check for an array of a kind and dtype that batch norm takes, on the device of ``like``, named as ``other``.

    A message speaks of masks if the call takes any.
    """
    if kind(array) is None:
        given, way_out = describe(array), _to_array(name, array, like)
        if name == "input" and masks and isinstance(array, np.ma.MaskedArray):
            way_out += ", and mask= to say where there is data"
        raise TypeError(f"expected {name} to be a NumPy or CuPy array (got {given}){way_out}")
    if not is_float(array.dtype):
        way_out = f": use {_new_out(like)}" if name == "out" else _to_float(name, array.dtype, masks)
        raise TypeError(f"expected {name} of dtype {', '.join(FLOATS)} (got {array.dtype.name}){way_out}")
    if like is not None:
        _check_beside(name, array, like, other)


def _check_beside(name: str, array: Any, like: Any, other: str) -> None:
    """Check for an array on the device of ``like``, which is named as ``other``."""
    if device_of(array) != device_of(like):
        ways = [_to_device(name, array, like), _to_device(other, like, array)]
        ways = [_new_out(like)] if name == "out" else sorted(ways, key=lambda way: "asnumpy" in way)  # to a GPU first
        raise TypeError(
            f"expected {name} to be a {describe(like)} like {other} (got a {describe(array)}): all arrays of a call "
            f"are on one device, use {' or '.join(ways)}"
        )


def _to_array(name: str, given: Any, like: Any, dtype: str = "'float32'") -> str:
    """Way out for an argument that is no array: how to make one of this dtype of it. The end of a message."""
    cls = type(given)
    masked = issubclass(cls, np.ma.MaskedArray)
    if not masked:  # the calls that are recommended here make arrays over the same memory
        if issubclass(cls, np.ndarray):
            return f": use numpy.asarray({name})"
        if hasattr(cls, "__dlpack__"):
            return f": use {from_dlpack(name, given)}"
        if hasattr(cls, "__cuda_array_interface__"):
            return f": use cupy.asarray({name})"
    if name == "out":  # the calls below make copies, and the output would be written to a copy
        return f": use {_new_out(like)}"
    if masked:
        return f": use {name}.filled(...)"
    if issubclass(cls, (list, tuple)) and kind(_first(given)) == "cupy":
        return f": use cupy.asarray({name})"
    known = issubclass(cls, (list, tuple, memoryview, BuiltinArray)) or hasattr(cls, "__array__")
    if known and not issubclass(cls, np.generic):  # a scalar would have no axes
        if name == "input" and hasattr(cls, "chunks"):  # of Dask, Zarr, xarray, h5py: may be larger than memory
            return f": use numpy.asarray({name}[i:j], {dtype}), a chunk at a time"
        return f": use numpy.asarray({name}, {dtype})"
    return ""


def _first(given: Any) -> Any:
    """First element of nested lists that is no list itself, down to MOST_NESTED: a list may contain itself."""
    for _ in range(MOST_NESTED):
        if not isinstance(given, (list, tuple)) or not given:
            break
        given = given[0]
    return given


def _to_float(name: str, dtype: np.dtype[Any], masks: bool) -> str:
    """Way out for an array of another dtype: how to make floats of it. The end of a message."""
    if dtype.kind == "c":
        return ": complex numbers are not supported"
    if dtype.kind == "f" and dtype.itemsize > 8:
        return f": use {name}.astype(np.float64)"
    if dtype.type is np.void:  # NumPy's files keep the bits of bfloat16, not its name
        return f": use {name}.view(ml_dtypes.bfloat16)" if dtype == BITS_OF_BFLOAT16 else ""
    if name == "residual" and dtype.kind == "b" and masks:  # the second argument of a layer
        return "; did you mean mask=?"
    if name == "input" and dtype.kind in "iu" and dtype.itemsize >= 4:
        return f": use {name}.astype(np.float32), or np.float64 for numbers beyond 2**24"
    return f": use {name}.astype(np.float32)" if dtype.kind in "fiubOV" else ""  # ml_dtypes has dtypes of kind V


def _to_device(name: str, array: Any, other: Any) -> str:
    """Call that copies an array to the device of another one. Part of a message."""
    device = device_of(other)
    if device == "cpu":
        return f"cupy.asnumpy({name})"
    if device == "cuda:0" and kind(array) == "numpy":
        return f"cupy.asarray({name})"
    return f"cupy.asarray({name}) {_within(device)}"


def _within(device: str) -> str:
    """Context in which CuPy makes arrays on a device. Part of a message."""
    return f"within `with cupy.cuda.Device({device.removeprefix('cuda:')})`"


def _new_out(input: Any) -> str:
    """Call that makes an array for the output. Part of a message."""
    return f"{kind(input)}.empty_like(input)"


def check_like(name: str, array: Any, input: Any, masks: bool = True) -> None:
    """Check for an array of the input's kind, device, dtype and shape."""
    check_array(name, array, input, masks=masks)
    if array.dtype != input.dtype:
        told_by_name = input.dtype.isnative and array.dtype.name != input.dtype.name  # names leave out the byte order
        dtype = repr(input.dtype.name) if told_by_name else "input.dtype"
        way_out = f": use {_new_out(input)}" if name == "out" else f": use {name}.astype({dtype})"
        raise TypeError(f"expected {name} of the input's dtype {input.dtype} (got {array.dtype}){way_out}")
    if array.shape != input.shape:
        way_out = f": use {_new_out(input)}" if name == "out" else _to_shape(name, array, input)
        raise ValueError(f"expected {name} of the input's shape {input.shape} (got {array.shape}){way_out}")


def _to_shape(name: str, array: Any, input: Any) -> str:
    """Way out for an array of another shape, if it broadcasts to the input's. The end of a message."""
    if _broadcasts(array.shape, input.shape):
        return f": use {kind(input)}.broadcast_to({name}, {input.shape})"
    return ""


def check_mask(mask: Any, input: Any, axes: Sequence[int]) -> None:
    """Check for a bool array on the input's device that broadcasts to the input's shape without its channel axes."""
    shape = tuple(n for axis, n in enumerate(input.shape) if axis not in axes)
    if kind(mask) is None:
        if isinstance(mask, np.ma.MaskedArray):
            way_out = ": use mask.filled(False)"
        elif isinstance(mask, (list, tuple)) and kind(_first(mask)) is None:
            way_out = f": use {kind(input)}.asarray(mask, bool)"
        else:
            way_out = _to_array("mask", mask, input, "bool")
        raise TypeError(f"expected mask to be a NumPy or CuPy array of bool (got {describe(mask)}){way_out}")
    if mask.dtype != np.bool_:
        way_out = "mask.astype(bool)"
        if mask.dtype.kind in "iu" and len(shape) == 2 and mask.shape == shape[:1]:
            way_out = f"{kind(mask)}.arange({shape[1]}) < mask[:, None] if these are lengths"
        raise TypeError(f"expected mask of dtype bool, True for data (got {mask.dtype}): use {way_out}")
    _check_beside("mask", mask, input, "input")
    if not _broadcasts(mask.shape, shape):
        without = f"axis {axes[0]}" if len(axes) == 1 else f"axes {tuple(axes)}"
        raise ValueError(
            f"expected mask of shape {shape}, the input's without {without}, or one that broadcasts to it "
            f"(got {mask.shape}){_to_mask(mask, input, axes, shape)}"
        )


def _to_mask(mask: Any, input: Any, axes: Sequence[int], shape: tuple[int, ...]) -> str:
    """Way out for a mask that does not broadcast to this shape. The end of a message."""
    along = axes[0] if len(axes) == 1 else tuple(axes)
    if mask.ndim == input.ndim and _broadcasts(mask.shape, input.shape):
        alike = all(mask.shape[axis] == 1 for axis in axes)
        return f": use mask.squeeze({along})" if alike else f": use mask.all({along}), as all channels share a mask"
    missing = len(shape) - mask.ndim
    if missing > 0 and _broadcasts((*mask.shape, *missing * (1,)), shape):
        return f": use mask[...{missing * ', None'}]"
    return ""


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another one."""
    with contextlib.suppress(ValueError):
        return np.broadcast_shapes(shape, to) == to
    return False


def check_writeable(name: str, array: Any) -> None:
    """Check for an array that may be written to, each element for itself."""
    if kind(array) == "numpy" and not array.flags.writeable:
        raise ValueError(f"expected {name} to be writeable (got a read-only array): use a writeable one")
    repeated = any(stride == 0 and n > 1 for n, stride in zip(array.shape, array.strides, strict=True))
    if repeated and array.size > 0:  # as of broadcast_to; empty arrays have such strides, too
        given = f"strides {array.strides} for shape {array.shape}"
        raise ValueError(f"expected {name} to have memory for each element (got {given}): use {name}.copy()")


def check_counter(counter: Any, like: Any) -> None:
    """Check for a 0-d int64 array on the device of ``like``: a counter that is increased in place."""
    way_out = f": use layer.num_batches_tracked = {kind(like)}.asarray(n, 'int64')"
    if device_of(like) not in ("cpu", "cuda:0"):
        way_out += f" {_within(device_of(like))}"
    if kind(counter) is None or counter.dtype != "int64" or device_of(counter) != device_of(like):
        given = f"{describe(counter)} of {counter.dtype}" if kind(counter) else describe(counter)
        raise TypeError(f"expected num_batches_tracked to be an int64 array beside input (got {given}){way_out}")
    if counter.shape != ():
        raise ValueError(f"expected num_batches_tracked of shape () (got {counter.shape}){way_out}")


def check_input(input: Any, channel_axis: int, ndims: Sequence[int] = ()) -> int:
    """Channel axis counted from the front; raises unless this is an array, with one of these ndims if any are given."""
    check_array("input", input)
    check_ndim(input.ndim, ndims)
    return check_channel_axis(channel_axis, input.ndim)


def check_ndim(ndim: int, ndims: Sequence[int]) -> None:
    """Check for one of these numbers of axes, if any are given."""
    if ndims and ndim not in ndims:
        expected = " or ".join(f"{each}D" for each in ndims)
        raise ValueError(f"expected {expected} input (got {ndim}D input)")


def check_channel_axis(channel_axis: int, ndim: int) -> int:
    """Channel axis counted from the front; raises unless an array with so many axes has it."""
    if ndim < 2:
        raise ValueError(f"expected at least 2D input (got {ndim}D input)")
    axis = as_int("channel_axis", channel_axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"expected channel_axis in [{-ndim}, {ndim}) for {ndim}D input (got {show(axis)})")
    return axis % ndim


def as_size(name: str, value: Any) -> int:
    """Number of channels or elements as an int; raises unless an array can have as many."""
    size = as_int(name, value)
    if size < 0:
        raise ValueError(f"expected {name} >= 0 (got {show(size)})")
    if size > MOST_FEATURES:
        raise ValueError(f"expected {name} < 2**60 (got {show(size)})")
    return size


def check_activation(activation: str | None) -> None:
    """Check for one of ``ACTIVATIONS``."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"unknown activation {show(activation)}: expected one of {', '.join(map(repr, ACTIVATIONS))}")


def check_bool(name: str, value: bool, way_out: str = "") -> None:
    """Check for a bool of Python or NumPy. Anything else is true or false as well, but seldom what was meant."""
    if value is True or value is False:
        return
    if not isinstance(value, np.bool_):
        raise TypeError(f"expected {name} to be a bool (got {show(value)}){way_out}")


def check_str(name: str, value: str) -> None:
    """Check for a str."""
    if not isinstance(value, str):
        raise TypeError(f"expected {name} to be a str (got {show(value)})")


def as_int(name: str, value: Any) -> int:
    """Whole number as an int; raises for anything but integers, and for a bool, which is seldom what was meant."""
    if not isinstance(value, bool) and kind(value) != "cupy":  # `operator.index` would read an array on a device
        with contextlib.suppress(TypeError):
            return operator.index(value)
    way_out = ""
    if isinstance(value, (list, tuple)) and name == "channel_axis":
        way_out = ": make these axes one, use input.transpose(...).reshape(...)"
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1:
        way_out = f": use int({name})"
    raise TypeError(f"expected {name} to be an int (got {show(value)}){way_out}")


def as_float(name: str, value: Any) -> float:
    """Real number as a float; raises for anything else, arrays included: their value may be on a device."""
    if type(value) is float:
        return value
    if not isinstance(value, numbers.Real):
        way_out = f": use float({name})" if getattr(value, "shape", None) == () else ""
        if value is None and name == "momentum":  # layers take None, functions do not
            way_out = ": layers count their batches, functions do not; 1 / n with the n-th batch is the mean over n"
        raise TypeError(f"expected {name} to be a float (got {show(value)}){way_out}")
    try:
        return float(value)
    except OverflowError:
        raise OverflowError(f"expected {name} to be a float (got a number beyond float64)") from None


def check_timeout(timeout: float | None) -> None:
    """Check for a number of seconds that a rank waits for the others, or None."""
    if timeout is not None and not as_float("timeout", timeout) > 0:
        raise ValueError(f"expected timeout > 0 or None (got {timeout})")


def check_eps(eps: float, training: bool, function: str = "batch_norm") -> None:
    """Check for an eps that is not negative and, in training of batch norm, not 0 either: a variance may be 0."""
    as_float("eps", eps)
    if training and function == "batch_norm" and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"{function} eps must be non-negative, but got {eps}")


def check_running(running: Running, training: bool, function: str = "batch_norm") -> None:
    """Check that both running statistics are given, or neither in training, where the input has its own."""
    if (running.mean is None) != (running.var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running.mean is None and not training:
        if function == "instance_norm":
            raise ValueError("running_mean and running_var must be given when use_input_stats=False")
        raise ValueError(
            "running_mean and running_var must be given when training=False (training defaults to False; "
            "training=True takes the statistics of the batch)"
        )


class Words(NamedTuple):
    """What messages say of the function or layer that vectors are given to."""

    flag: str | None = "training"  # argument of the function that is a bool, if there is one
    number: str = "num_features"  # argument of the layer that is the number of channels
    first_axis: int = 0  # first axis of the input that may be that of the channels
    missing: int = 0  # axes that a layer puts before those of the input


_BATCH_NORM = Words()


def check_vectors(
    input: Any, axis: int, vectors: Mapping[str, Any], layer_device: str | None, words: Words = _BATCH_NORM
) -> None:
    """Check that vectors have the input's kind and device, a float dtype, and one element per channel.

    If the vectors belong to a layer (``layer_device`` is its device), the caller passed the input alone, and so the
    message is about the input.
    """
    vectors = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, vector in vectors.items():
        if layer_device is not None and kind(vector) is not None and device_of(vector) == layer_device:
            check_beside_layer(input, vector)
        if (
            layer_device is None and words.flag and isinstance(vector, (bool, np.bool_))
        ):  # it stands in a vector's place
            given = f"{name} to be a NumPy or CuPy array (got {describe(vector)})"
            raise TypeError(f"expected {given}; did you mean {words.flag}={bool(vector)}?")
        check_array(name, vector, input)
    channels = input.shape[axis]
    sizes = {vector.size for vector in vectors.values() if vector.ndim == 1}
    for name, vector in vectors.items():
        if vector.ndim != 1:
            spread = vector.size == channels and channels in vector.shape  # the only axis that is not 1 long
            way_out = f": use {name}.reshape(-1)" if spread else ""
            raise ValueError(f"expected {name} of shape ({channels},) (got {vector.shape}){way_out}")
        if vector.size != channels:
            message = f"expected {vector.size} channels ({words.number}) on axis {axis}, got {channels}"
            if layer_device is None or len(sizes) > 1:
                message = f"{name} should contain {channels} elements not {vector.size}"
            if layer_device is not None and vector.size in input.shape and vector.size and len(sizes) == 1:
                meant = input.ndim - 1 - input.shape[::-1].index(vector.size)
                if meant >= words.first_axis:
                    message += (
                        f" (axis {axis} of the input of shape {input.shape} has {channels}, axis {meant} has "
                        f"{vector.size}: did you mean channel_axis={meant + words.missing}?)"
                    )
            raise ValueError(message)


def check_beside_layer(input: Any, vector: Any) -> None:
    """Check that the input is on the device of a layer, which is that of its vectors."""
    if device_of(input) != device_of(vector):
        raise TypeError(
            f"expected input to be a {describe(vector)}, as the layer is on {device_of(vector)} (got a "
            f'{describe(input)}): use {_to_device("input", input, vector)}, or layer.to("{device_of(input)}")'
        )


def check_more_than_one_value(shape: tuple[int, ...], axis: int, way_out: str = "") -> None:
    """Check for two values per channel or more: the unbiased variance of a single one is undefined."""
    if math.prod(shape) == shape[axis]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}{way_out}")
