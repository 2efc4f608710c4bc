"""The arguments of one call of batch norm, and whether they fit together."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from cupybn import _checks
from cupybn._devices import copied, kind
from cupybn._group import Group
from cupybn._layout import Layout
from cupybn._overlap import overlapping
from cupybn._tracking import updates_stats

Array = Any  # numpy.ndarray or cupy.ndarray


class Call(NamedTuple):
    """What `batch_norm` and the layers were called with."""

    input: Array
    running_mean: Array | None
    running_var: Array | None
    weight: Array | None
    bias: Array | None
    training: bool
    momentum: float | None
    """None is for layers: 1 / num_batches_tracked."""
    eps: float
    residual: Array | None
    activation: str | None
    channel_axis: int
    num_batches_tracked: Array | None = None
    of_layer: bool = False
    group: Group | None = None
    """The ranks that the batch is spread over, in training."""

    def checked_layout(self, out: Array | None = None) -> Layout:
        """How the input lies in memory, if all is well.

        What is checked does not depend on the elements of arrays: calls that are alike but for these are checked once.

        Raises
        ------
        TypeError, ValueError
            See `check`.
        """
        key = self._key(out)
        layout = _layouts.get(key)
        if layout is None:
            layout = Layout.of(self.input, self.check(out))
            if key is not None:
                if len(_layouts) >= MOST_LAYOUTS:
                    _layouts.clear()
                _layouts[key] = layout
        return layout

    def _key(self, out: Array | None) -> Hashable:
        """All that `check` looks at; None for what cannot be an argument."""
        try:
            key = (
                _form(self.input),
                _form(self.running_mean),
                _form(self.running_var),
                _form(self.weight),
                _form(self.bias),
                _form(self.residual),
                _form(self.num_batches_tracked),
                _form(out),
                bool(self.training),
                self.eps,
                type(self.eps),
                self.activation,
                self.channel_axis,
                type(self.channel_axis),
                self.of_layer,
                self.group is not None,
                updates_stats(),
            )
            hash(key)
        except (AttributeError, TypeError, ValueError):
            return None
        return key

    def check(self, out: Array | None = None) -> int:
        """The channel axis counted from the front, if all is well.

        Raises
        ------
        TypeError, ValueError
            What was expected and what was given. Nothing has been changed, and no array on a device has been read.
        """
        input = self.input
        _checks.check_array("input", input)
        axis = _checks.check_channel_axis(self.channel_axis, input.ndim)
        _checks.check_activation(self.activation)
        _checks.check_both_or_neither(self.running_mean, self.running_var)
        if self.running_mean is None and not self.training:
            raise ValueError("running_mean and running_var must be given when training=False")
        _checks.check_vectors(
            input,
            axis,
            {
                "running_mean": self.running_mean,
                "running_var": self.running_var,
                "weight": self.weight,
                "bias": self.bias,
            },
            suggest_axis=self.of_layer,
        )
        _checks.check_eps(self.eps, self.training)
        if self.training and input.size and self.group is None:
            _checks.check_more_than_one_value(input.shape, axis)
        for name, array in ("residual", self.residual), ("out", out):
            if array is not None:
                _checks.check_like(name, array, input)
        written = {"out": out}
        if self.updates_running():
            if self.num_batches_tracked is not None:
                _checks.check_counter(self.num_batches_tracked, input)
            written |= {
                "running_mean": self.running_mean,
                "running_var": self.running_var,
                "num_batches_tracked": self.num_batches_tracked,
            }
        for name, array in written.items():
            if array is not None:
                _checks.check_writeable(name, array)
        return axis

    def updates_running(self) -> bool:
        """Whether this call moves the running statistics."""
        return self.training and self.running_mean is not None and updates_stats()

    def running(self) -> Running:
        """What `bn_normalize` gets of the running statistics: nothing in training that does not move them."""
        if self.training and not self.updates_running():
            return Running(None, None, None, None)
        counter = self.num_batches_tracked if self.training else None
        return Running(self.running_mean, self.running_var, self.momentum, counter)

    def apart(self, layout: Layout, for_vjp: bool) -> tuple[Call, Written]:
        """The same call where nothing that it moves is read later, and what is to be written when all else is done.

        Arrays may share memory, as a weight that is also the running variance: what is read is a copy where it does.
        The way back reads after buffers have moved, be it in another call. Buffers that share memory with each other
        are moved as copies; so are all on NumPy, where an interrupt may come in the middle of a step.
        """
        moves = self.updates_running()
        if self.running_mean is None or not (moves or for_vjp):
            return self, []
        buffers = {"running_mean": self.running_mean, "running_var": self.running_var}
        if moves:
            buffers["num_batches_tracked"] = self.num_batches_tracked
        read = {"input": self.input, "residual": self.residual, "weight": self.weight, "bias": self.bias}
        shared = overlapping(read | buffers, buffers)
        copies = {
            name: layout.copy(read[name]) if name in ("input", "residual") else copied(read[name])
            for name in shared
            if name in read
        }
        written: Written = []
        if moves:
            for name, buffer in buffers.items():
                if buffer is not None and (name in shared or kind(buffer) == "numpy"):
                    copies[name] = copied(buffer)
                    written.append((buffer, copies[name]))
        return (self._replace(**copies) if copies else self), written

    def shares_with_vectors(self, out: Array) -> bool:
        """Whether an output has memory in common with a vector of this call."""
        vectors = {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "weight": self.weight,
            "bias": self.bias,
        }
        return bool(overlapping({"out": out}, vectors))


Written = list[tuple[Array, Array]]
"""Arrays, and the values that they are to get."""


def _form(array: Array | None) -> Hashable:
    """All that there is to know about an array but its address and its elements."""
    if array is None:
        return None
    if type(array) is np.ndarray:
        return array.shape, array.strides, array.dtype, array.flags.writeable
    return type(array), array.shape, array.strides, array.dtype, array.data.device_id


MOST_LAYOUTS = 4096
_layouts: dict[Hashable, Layout] = {}
"""Of calls that have been checked."""


class Running(NamedTuple):
    """Running statistics, and how they move."""

    running_mean: Array | None
    running_var: Array | None
    momentum: float | None
    num_batches_tracked: Array | None
