"""The arguments of one call of batch norm, and whether they fit together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied
from cupybn._arrays.kinds import is_derived, plain
from cupybn._calls import checks
from cupybn._calls.layout import Layout
from cupybn._calls.overlap import Extent, may_overlap, overlapping
from cupybn._calls.tracking import updates_stats
from cupybn._ranks.group import Group

Array = Any  # numpy.ndarray or cupy.ndarray


Idle = tuple[Any, ...]


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
    layer_device: str | None = None
    """Device of the layer that is called; None for the functions."""
    group: Group | None = None
    """The ranks that the batch is spread over, in training."""
    idle: Idle = ()
    """The layer's buffers, where this call does not use them."""

    def checked(self, out: Array | None = None) -> Checked:
        """What is to be known of the arguments, if all is well.

        What is checked does not depend on addresses and elements of arrays: calls that are alike but for these are
        checked once.

        Raises
        ------
        TypeError, ValueError
            See `check`.
        """
        key = self._key(out)
        checked = _checked.get(key)
        if checked is None:
            layout = Layout.of(self.input, self.check(out))
            arrays = self._named((*READ, *self._buffers())) | ({} if out is None else {"out": out})
            checked = Checked(layout, {name: Extent.of(array) for name, array in arrays.items()})
            if key is not None:
                if len(_checked) >= MOST_CHECKED:
                    _checked.clear()
                _checked[key] = checked
        return checked

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
                self.training,
                type(self.training),
                self.eps,
                type(self.eps),
                self.activation,
                self.channel_axis,
                type(self.channel_axis),
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
        checks.check_array("input", input)
        axis = checks.check_channel_axis(self.channel_axis, input.ndim)
        checks.check_activation(self.activation)
        checks.check_bool("training", self.training)
        checks.check_both_or_neither(self.running_mean, self.running_var)
        if self.running_mean is None and not self.training:
            raise ValueError(
                "running_mean and running_var must be given when training=False (training defaults to False; "
                "training=True takes the statistics of the batch)"
            )
        checks.check_vectors(
            input,
            axis,
            {
                "running_mean": self.running_mean,
                "running_var": self.running_var,
                "weight": self.weight,
                "bias": self.bias,
            },
            self.layer_device,
        )
        checks.check_eps(self.eps, self.training)
        if self.training and input.size and self.group is None:
            checks.check_more_than_one_value(input.shape, axis, self._way_to_eval())
        for name, array in ("residual", self.residual), ("out", out):
            if array is not None:
                checks.check_like(name, array, input)
        written = {"out": out}
        if self.updates_running():
            if self.num_batches_tracked is not None:
                checks.check_counter(self.num_batches_tracked, input)
            written |= {
                "running_mean": self.running_mean,
                "running_var": self.running_var,
                "num_batches_tracked": self.num_batches_tracked,
            }
        for name, array in written.items():
            if array is not None:
                checks.check_writeable(name, array)
        return axis

    def _way_to_eval(self) -> str:
        """How a layer uses its running statistics instead of the batch's, if it has any: the end of a message."""
        has_buffers = self.running_mean is not None or self.num_batches_tracked is not None
        return "; did you mean layer.eval()?" if self.layer_device is not None and has_buffers else ""

    def plain(self) -> Call:
        """The same with arrays of NumPy's and CuPy's own classes, in the same memory."""
        return Call(*map(plain, self)) if any(map(is_derived, map(type, self))) else self

    def updates_running(self) -> bool:
        """Whether this call moves the running statistics."""
        return self.training and self.running_mean is not None and updates_stats()

    def running(self) -> Running:
        """What `bn_normalize` gets of the running statistics: no arrays in training that does not move them.

        The momentum stays: what depends on it, the choice of launches, is the same with and without an update.
        """
        if self.training and not self.updates_running():
            return Running(None, None, 0.0 if self.running_mean is None else self.momentum, None)
        counter = self.num_batches_tracked if self.training else None
        return Running(self.running_mean, self.running_var, self.momentum, counter)

    def _named(self, names: Iterable[str]) -> dict[str, Array]:
        """Arrays of this call by name, but for those that are None."""
        return {name: array for name in names if (array := getattr(self, name)) is not None}

    def _buffers(self) -> tuple[str, ...]:
        """The names of the buffers; the counter is one where it moves."""
        return BUFFERS if self.updates_running() else BUFFERS[:2]

    def apart(self, checked: Checked, for_vjp: bool) -> tuple[Call, Written]:
        """The same call where nothing that it moves is read later, and what is to be written when all else is done.

        Arrays may share memory, as a weight that is also the running variance: what is read is a copy where it does.
        The way back reads after buffers have moved, be it in another call. Buffers that share memory with each other
        are moved as copies.
        """
        moves = self.updates_running()
        if not (moves or for_vjp):
            return self, []
        names = self._buffers()
        arrays = self._named((*READ, *names))
        shared = overlapping(arrays, self._named(names)) if may_overlap(arrays, checked.extents) else []
        if for_vjp and self.idle:
            shared += overlapping(self._named(READ), dict(enumerate(self.idle)))
        if not shared:
            return self, []
        layout = checked.layout
        copies = {
            name: layout.copy(arrays[name]) if name in ("input", "residual") else copied(arrays[name])
            for name in shared
            if name in READ or moves
        }
        written = [(arrays[name], copies[name]) for name in names if name in copies]
        return self._replace(**copies), written

    def shares_with_vectors(self, out: Array, checked: Checked) -> bool:
        """Whether an output has memory in common with a vector of this call."""
        vectors = self._named(("weight", "bias", *BUFFERS[:2]))
        return may_overlap({"out": out} | vectors, checked.extents) and bool(overlapping({"out": out}, vectors))


READ = ("input", "residual", "weight", "bias")
"""The arrays that a call only reads."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Checked(NamedTuple):
    """What is known of calls whose arguments fit together, and which are alike but for addresses and elements."""

    layout: Layout
    extents: dict[str, Extent]
    """Extents of the arrays that a call reads, moves or writes, by name."""


Written = list[tuple[Array, Array]]
"""Arrays, and the values that they are to get."""


def _form(array: Array | None) -> Hashable:
    """All that there is to know about an array but its address and its elements."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return type(array), array.shape, array.strides, array.dtype, array.flags.writeable
    return type(array), array.shape, array.strides, array.dtype, array.data.device_id


MOST_CHECKED = 4096
"""Calls that are remembered, before all are forgotten."""
_checked: dict[Hashable, Checked] = {}
"""The calls that have been checked, by what `Call.check` looks at."""


class Running(NamedTuple):
    """Running statistics, and how they move."""

    running_mean: Array | None
    running_var: Array | None
    momentum: float | None
    num_batches_tracked: Array | None
