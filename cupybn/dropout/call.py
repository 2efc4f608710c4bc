"""The arguments of one call of dropout: whether they fit together, and what follows for the steps."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import full, module_of, on_device_of
from cupybn._arrays.kinds import device_of, is_derived, kind, show
from cupybn._calls import checks
from cupybn._calls.call import MOST_CACHED, Form, form_of
from cupybn._calls.layout import Layout
from cupybn._steps.tape import Tapes
from cupybn.dropout.generator import Generator, defaults

Array = Any  # numpy.ndarray or cupy.ndarray

BATCH_AXIS = 0
"""Number of the axis of samples."""


class Channels(NamedTuple):
    """What is dropped as a whole: channels of inputs that have one of some numbers of axes."""

    ndims: tuple[int, ...]  # the largest is that of batches; with one axis less, an input is a single sample
    channel_axis: Any  # number of the channel axis in a batch, as it was given

    def check(self, input: Any) -> int:
        """Channel axis of an input, counted from the front; raises unless it has one beside the batch axis."""
        checks.check_array("input", input, masks=False)
        checks.check_input(input, 1, self.ndims)
        unbatched: bool = input.ndim < self.ndims[-1]
        return self.axis() - unbatched

    def axis(self) -> int:
        """Channel axis in a batch, counted from the front; raises unless that is an axis beside that of the batch."""
        axis = checks.check_channel_axis(self.channel_axis, self.ndims[-1])
        if axis == BATCH_AXIS:
            raise ValueError(
                f"expected channel_axis to be another axis than that of the batch, 0 (got {show(self.channel_axis)})"
            )
        return axis


class Call(NamedTuple):
    """Arguments that a function or a layer was called with."""

    input: Array
    p: Any
    training: Any
    inplace: Any
    generator: Any
    channels: Channels | None = None  # None: single elements are dropped
    of_layer: bool = False  # whether a layer makes the call, and messages are to speak of it

    def checked(self, out: Array | None = None) -> Checked:
        """Facts about the arguments, if all is well.

        They do not depend on addresses and elements. So calls that are alike are checked once, and the facts are kept.

        Raises
        ------
        TypeError, ValueError
            What was expected and what was given. Nothing has been changed, and no array on a device has been read.
        """
        try:
            key = self._key(out)
            checked = _cache.get(key)
        except (AttributeError, TypeError, ValueError):  # an argument that cannot be part of a key
            key = checked = None
        if checked is None:
            checked = self._check(out)
            if key is not None:
                if len(_cache) >= MOST_CACHED:
                    _cache.clear()
                _cache[key] = checked
        if self.generator is not None:
            self._check_generator(checked.device)
        return checked

    def _key(self, out: Array | None) -> Hashable:
        """Key of this call in the cache: numbers stand there with their types, since True, 1 and 1.0 are equal."""
        input, p, training, inplace, _, channels, _ = self
        return (
            form_of(input),
            None if out is None else form_of(out),
            p,
            type(p),
            training,
            type(training),
            inplace,
            type(inplace),
            channels,
            None if channels is None else type(channels.channel_axis),
        )

    def _check(self, out: Array | None) -> Checked:
        """Facts about the arguments, but for the generator, if all is well."""
        input, axis = self.input, None
        if self.channels is None:
            checks.check_array("input", input, masks=False)
        else:
            axis = self.channels.check(input)
        p = check_p(self.p)
        checks.check_bool("training", self.training)
        checks.check_bool("inplace", self.inplace)
        if self.inplace:
            if out is not None:
                raise ValueError(
                    "expected out=None with inplace=True, which writes to input (got both): use one of them"
                )
            checks.check_writeable("input", input)
            out = input
        if out is not None:
            checks.check_like("out", out, input)
            checks.check_writeable("out", out)
        return Checked.of(self, p, axis, out)

    def _check_generator(self, device: str) -> None:
        """Check for a generator on this device, which is that of the input."""
        generator = self.generator
        if not isinstance(generator, Generator):
            way_out = ""
            if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
                way_out = f"; did you mean cupybn.Generator({generator})?"
            given = show(generator)
            raise TypeError(f"expected generator to be a cupybn.Generator or None (got {given}){way_out}")
        if generator.device != device:
            if self.of_layer:
                checks.check_beside_layer(self.input, generator.state)
            raise TypeError(
                f"expected generator on {device}, as input is (got one on {generator.device}): use "
                f'generator.to("{device}")'
            )

    def state(self, device: str) -> Array:
        """State of the generator that this call draws from, with its input on this device."""
        return (defaults.of(device) if self.generator is None else self.generator).state


class Checked(NamedTuple):
    """Facts about calls whose arguments fit together, and which are alike but for addresses, elements and generator."""

    layout: Layout
    axes: tuple[int, ...] | None  # shape (O, A, M, B, I) of steps that drop channels; None where elements are dropped
    swapped: bool  # whether channels are the axis A of these
    keeps: bool  # whether all elements are kept as they are: in eval mode, and where p is 0
    draws: bool  # whether the call draws random numbers
    threshold: int
    scale: float
    settled: bool  # whether all arrays are of NumPy's or CuPy's own class
    direct: bool  # whether steps can write to `out`
    form: Form | None  # form of the input; None if it is not dense
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: str
    tapes: Tapes | None  # launches of such calls, there and back; None where they are not recorded

    @classmethod
    def of(cls, call: Call, p: float, axis: int | None, out: Array | None) -> Checked:
        """Facts about a call that is right, with its probability, the number of its channel axis, and its `out`."""
        input = call.input
        layout = Layout.of(input, axis)
        dense = layout.matches(input)
        classes: set[Any] = {type(array) for array in (input, out) if array is not None}
        settled = not any(map(is_derived, classes))
        keeps = not call.training or p == 0
        axes, swapped = None, False
        if call.channels is not None:
            axes, swapped = axes_of(layout, batched=input.ndim == call.channels.ndims[-1])
        return cls(
            layout,
            axes,
            swapped,
            keeps,
            not keeps and p < 1 and input.size > 0,
            round(p * 2**32),
            1 / (1 - p) if p < 1 else 0.0,
            settled,
            out is not None and layout.matches(out),
            form_of(input) if dense and settled else None,
            input.shape,
            input.dtype,
            device_of(input),
            Tapes() if dense and kind(input) == "cupy" else None,
        )

    def like_input(self) -> Array:
        """Array of the kind, device, dtype and shape of the input, with memory for one element."""
        element = full((), 0, self.dtype, self.device)
        with on_device_of(element):
            return module_of(element).broadcast_to(element, self.shape)


def axes_of(layout: Layout, batched: bool) -> tuple[tuple[int, ...], bool]:
    """Shape (O, A, M, B, I) of a dense array as `numpy_dropout.dropout_channels` takes it, and whether A is channels.

    A and B are the axes of samples and channels, in whichever order they lie in memory; a single sample has an axis of
    samples in front of the others.
    """
    sizes, c = layout.sizes, layout.axes.index(layout.channel_axis)
    if not batched:
        return (1, 1, math.prod(sizes[:c]), sizes[c], math.prod(sizes[c + 1 :])), False
    a, b = sorted((layout.axes.index(BATCH_AXIS), c))
    shape = math.prod(sizes[:a]), sizes[a], math.prod(sizes[a + 1 : b]), sizes[b], math.prod(sizes[b + 1 :])
    return shape, a == c and sizes[a] > 1 and sizes[b] > 1  # else it makes no difference


def check_p(p: Any) -> float:
    """Check for a number from 0 to 1; returns it as a float."""
    number = checks.as_float("p", p)
    if not 0 <= number <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return number


_cache: dict[Hashable, Checked] = {}
"""Facts about calls that have been checked, by `Call._key`."""
