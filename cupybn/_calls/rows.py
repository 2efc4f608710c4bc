"""Rows: what shares one mean and one variance in a call of a norm within a sample, and checks that such calls need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cupybn._arrays.kinds import describe, device_of, kind, show
from cupybn._calls import checks
from cupybn._calls.layout import Layout
from cupybn._steps.norm import Norm

Array = Any  # numpy.ndarray or cupy.ndarray


class Rows(NamedTuple):
    """Rows of a call of instance, group, layer or RMS norm. In a row each channel has a weight and a bias."""

    function: str  # name of the function, for messages
    num_groups: int | None = None  # groups of channels, for group norm; None for as many as channels
    normalized_shape: tuple[int, ...] | None = None  # sizes of the last axes, for layer and RMS norm
    batched: bool = True  # whether axis 0 is the batch; else the input is a single sample

    def check_input(self, input: Any, channel_axis: int, ndims: Sequence[int]) -> int:
        """Channel axis counted from the front, 0 for layer and RMS norm; raises unless the input has such rows."""
        checks.check_array("input", input, masks=False)
        if self.normalized_shape is not None:
            return self._check_normalized_shape(input)
        alone = 0 if self.batched else 1  # an unbatched input, and its channel axis, stand for input[None]
        checks.check_ndim(input.ndim, ndims)
        axis = check_channel_axis(channel_axis, input.ndim + alone) - alone
        if self.num_groups is not None:
            check_num_groups(self.num_groups)
            if input.shape[axis] % self.num_groups != 0:
                raise ValueError(
                    "Expected number of channels in input to be divisible by num_groups, but got input of shape "
                    f"{input.shape} and num_groups={self.num_groups}"
                )
        return axis

    def _check_normalized_shape(self, input: Any) -> int:
        """0; raises unless the last axes of the input are the normalized ones."""
        shape = self.normalized_shape
        assert shape is not None
        check_normalized_shape(shape)
        if input.shape[-len(shape) :] != shape:
            expected = ", ".join(["*", *map(str, shape)])
            raise ValueError(
                f"Given normalized_shape={shape}, expected input with shape ({expected}), but got input of size "
                f"{input.shape}"
            )
        return 0

    def check_parameters(self, input: Any, parameters: Mapping[str, Any], layer_device: str | None) -> None:
        """Check for parameters with the normalized shape, of a float dtype and beside the input.

        If they belong to a layer (``layer_device`` is its device), the caller passed the input alone, and so a message
        about devices is about the input.
        """
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            if layer_device is not None and kind(parameter) is not None and device_of(parameter) == layer_device:
                checks.check_beside_layer(input, parameter)
            checks.check_array(name, parameter, input)
            if parameter.shape != self.normalized_shape:
                raise ValueError(
                    f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape "
                    f"{parameter.shape} and normalized_shape = {self.normalized_shape}"
                )

    def check_positions(self, shape: tuple[int, ...], axis: int, way_out: str = "") -> None:
        """Check for two positions or more, where that is a row: the unbiased variance of one value is undefined."""
        if self.function != "instance_norm":
            return
        positions = [n for i, n in enumerate(shape) if i != axis and not (self.batched and i == 0)]
        if all(n == 1 for n in positions):
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {shape}{way_out}")

    def words(self) -> checks.Words:
        """What messages about vectors say of the function or layer."""
        flag = "use_input_stats" if self.function == "instance_norm" else None
        number = "num_features" if self.num_groups is None else "num_channels"
        return checks.Words(flag, number, 1 if self.batched else 0, 0 if self.batched else 1)

    def layout(self, input: Array, axis: int) -> Layout:
        """Layout of an input with this channel axis, as the steps take it."""
        if self.normalized_shape is None:
            return Layout.of_samples(input, (0,) if self.batched else (), (axis,))
        first = input.ndim - len(self.normalized_shape)
        return Layout.of_samples(input, range(first), range(first, input.ndim))

    def norm(self, input: Array, axis: int) -> Norm:
        """What the steps are told of these rows."""
        if self.normalized_shape is not None:
            return Norm(1, self.function != "rms_norm")
        return Norm(input.shape[axis] if self.num_groups is None else self.num_groups)


def check_channel_axis(channel_axis: int, ndim: int) -> int:
    """Channel axis counted from the front; raises unless an array with so many axes has it beside that of the batch."""
    axis = checks.check_channel_axis(channel_axis, ndim)
    if axis == 0:
        raise ValueError(f"expected channel_axis to be another axis than that of the batch, 0 (got {channel_axis})")
    return axis


def check_num_groups(num_groups: int) -> None:
    """Check for one group or more."""
    if num_groups <= 0:
        raise ValueError(f"Expected num groups to be greater than 0, got {show(num_groups)}")


def as_normalized_shape(value: Any) -> tuple[int, ...]:
    """Sizes of the normalized axes as a tuple of ints, from an int or a sequence of ints.

    Raises
    ------
    TypeError
        If this is something else. Arrays are refused, too: their elements may be on a device.
    """
    if type(value) is tuple and {*map(type, value)} == {int}:
        return value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and kind(value) is None:
        return tuple(checks.as_int(f"normalized_shape[{i}]", n) for i, n in enumerate(value))
    if kind(value) is not None and value.ndim > 0:
        raise TypeError(f"expected normalized_shape to be an int or a tuple of ints (got {describe(value)})")
    return (checks.as_int("normalized_shape", value),)


def check_normalized_shape(shape: tuple[int, ...]) -> None:
    """Check for one axis or more, each of a size that an array can have."""
    if not shape:
        raise ValueError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
            f"normalized_shape = {shape}"
        )
    for i, n in enumerate(shape):
        checks.as_size(f"normalized_shape[{i}]", n)
