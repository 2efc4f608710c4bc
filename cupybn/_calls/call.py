"""The arguments of one call of batch norm, and whether they fit together."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied
from cupybn._arrays.kinds import is_derived, plain
from cupybn._calls import checks
from cupybn._calls.layout import Layout
from cupybn._calls.overlap import Extent, may_overlap, overlapping
from cupybn._calls.tracking import updates_stats
from cupybn._ranks.group import Group
from cupybn._steps.bundles import Affine, Epilogue, Running

Array = Any  # numpy.ndarray or cupy.ndarray

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the arrays that a call may move."""
Written = list[tuple[Array, Array]]
"""Arrays, and the values that they are to get."""


class Caller(NamedTuple):
    """The layer that makes a call."""

    device: str
    ranks: tuple[int, ...] = ()  # of inputs that it takes; none are named where it takes any
    idle: tuple[Array, ...] = ()  # running statistics that it holds and this call does not use
    group: Group | None = None  # ranks that the batch is spread over, in training


class Call(NamedTuple):
    """Arguments that `batch_norm` or a layer was called with."""

    input: Array
    affine: Affine
    running: Running
    epilogue: Epilogue
    training: bool
    channel_axis: int
    layer: Caller | None = None  # None for the functions

    def checked(self, out: Array | None = None) -> Checked:
        """Facts about the arguments, if all is well.

        What is checked does not depend on addresses and elements of arrays: calls that are alike but for these are
        checked once.

        Raises
        ------
        TypeError, ValueError
            See `check`.
        """
        try:
            key = self._key(out)
            checked = _checked.get(key)
        except (AttributeError, TypeError, ValueError):  # an argument that cannot be part of a key
            key = checked = None
        if checked is None:
            layout, moves = Layout.of(self.input, self.check(out)), self._moves()
            arrays = self.arrays(moves) | ({} if out is None else {"out": out})
            classes: set[Any] = {type(array) for array in arrays.values()}
            extents = {name: Extent.of(array) for name, array in arrays.items()}
            checked = Checked(layout, moves, any(map(is_derived, classes)), extents)
            if key is not None:
                if len(_checked) >= MOST_CHECKED:
                    _checked.clear()
                _checked[key] = checked
        return checked

    def _key(self, out: Array | None) -> Hashable:
        """Key of this call among those that were checked: all that `check` looks at."""
        weight, bias, eps = self.affine
        mean, var, _, batches = self.running
        layer = self.layer
        return (
            _form(self.input),
            _form(mean),
            _form(var),
            _form(weight),
            _form(bias),
            _form(self.epilogue.residual),
            _form(batches),
            _form(out),
            self.training,
            type(self.training),
            eps,
            type(eps),
            self.epilogue.activation,
            self.channel_axis,
            type(self.channel_axis),
            None if layer is None else (layer.ranks, layer.group is not None),
            updates_stats(),
        )

    def check(self, out: Array | None = None) -> int:
        """The channel axis counted from the front, if all is well.

        Raises
        ------
        TypeError, ValueError
            What was expected and what was given. Nothing has been changed, and no array on a device has been read.
        """
        input, layer = self.input, self.layer
        axis = checks.check_input(input, self.channel_axis, () if layer is None else layer.ranks)
        checks.check_activation(self.epilogue.activation)
        checks.check_bool("training", self.training)
        checks.check_running(self.running, self.training)
        vectors = {
            "running_mean": self.running.mean,
            "running_var": self.running.var,
            "weight": self.affine.weight,
            "bias": self.affine.bias,
        }
        checks.check_vectors(input, axis, vectors, None if layer is None else layer.device)
        checks.check_eps(self.affine.eps, self.training)
        if self.training and input.size and (layer is None or layer.group is None):
            checks.check_more_than_one_value(input.shape, axis, self._way_to_eval())
        for name, array in ("residual", self.epilogue.residual), ("out", out):
            if array is not None:
                checks.check_like(name, array, input)
        written = {"out": out}
        if self._moves():
            if self.running.batches is not None:
                checks.check_counter(self.running.batches, input)
            written |= dict(zip(BUFFERS, (self.running.mean, self.running.var, self.running.batches), strict=True))
        for name, array in written.items():
            if array is not None:
                checks.check_writeable(name, array)
        return axis

    def _way_to_eval(self) -> str:
        """End of a message: how a layer uses its running statistics instead of the batch's, if it has any."""
        has_buffers = self.running.mean is not None or self.running.batches is not None
        return "; did you mean layer.eval()?" if self.layer is not None and has_buffers else ""

    def _moves(self) -> bool:
        """Whether this call moves the running statistics."""
        return self.training and self.running.mean is not None and updates_stats()

    def arrays(self, moves: bool) -> dict[str, Array]:
        """The arrays of this call by name, but for those that are None; the counter is one where it moves."""
        weight, bias, _ = self.affine
        mean, var, _, batches = self.running
        named = {
            "input": self.input,
            "residual": self.epilogue.residual,
            "weight": weight,
            "bias": bias,
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": batches if moves else None,
        }
        return {name: array for name, array in named.items() if array is not None}

    def plain(self) -> Call:
        """Call with the same arguments, arrays of NumPy's and CuPy's own classes among them."""
        return self._with({name: plain(array) for name, array in self.arrays(True).items()})

    def _with(self, arrays: dict[str, Array]) -> Call:
        """Call with the same arguments but for these arrays."""
        weight, bias, eps = self.affine
        mean, var, momentum, batches = self.running
        residual, activation, mask = self.epilogue
        return self._replace(
            input=arrays.get("input", self.input),
            affine=Affine(arrays.get("weight", weight), arrays.get("bias", bias), eps),
            running=Running(
                arrays.get("running_mean", mean),
                arrays.get("running_var", var),
                momentum,
                arrays.get("num_batches_tracked", batches),
            ),
            epilogue=Epilogue(arrays.get("residual", residual), activation, mask),
        )

    def running_of_steps(self, moves: bool) -> Running:
        """Running statistics for the steps: without arrays in training that does not move them.

        The momentum stays: what depends on it, the choice of launches, is the same with and without an update.
        """
        mean, var, momentum, batches = self.running
        if self.training and not moves:
            return Running(momentum=0.0 if mean is None else momentum)
        return Running(mean, var, momentum, batches if self.training else None)

    def apart(self, checked: Checked, for_vjp: bool) -> tuple[Call, Written]:
        """Call with the same arguments that share no memory, and what is to be written when all else is done.

        Arrays may share memory, as a weight that is also the running variance. Where an array that is read shares some
        with one that moves, the call gets a copy of it: the way back reads after buffers have moved, be it in another
        call. Buffers that share memory with each other are moved as copies, which are written back at the end.
        """
        if not (checked.moves or for_vjp):
            return self, []
        arrays = self.arrays(checked.moves)
        buffers = {name: arrays[name] for name in BUFFERS if name in arrays}
        shared = overlapping(arrays, buffers) if may_overlap(arrays, checked.extents) else []
        if for_vjp and self.layer is not None and self.layer.idle:
            read = {name: array for name, array in arrays.items() if name not in BUFFERS}
            shared += overlapping(read, dict(enumerate(self.layer.idle)))
        if not shared:
            return self, []
        layout = checked.layout
        copies = {
            name: layout.copy(arrays[name]) if name in ("input", "residual") else copied(arrays[name])
            for name in shared
            if checked.moves or name not in BUFFERS
        }
        return self._with(copies), [(arrays[name], copies[name]) for name in buffers if name in copies]

    def shares_with_vectors(self, out: Array, checked: Checked) -> bool:
        """Whether an output has memory in common with a vector of this call."""
        tensors = ("input", "residual", "num_batches_tracked")
        vectors = {name: array for name, array in self.arrays(checked.moves).items() if name not in tensors}
        return may_overlap({"out": out} | vectors, checked.extents) and bool(overlapping({"out": out}, vectors))


class Checked(NamedTuple):
    """Facts about calls whose arguments fit together, and which are alike but for addresses and elements."""

    layout: Layout
    moves: bool  # whether the call moves running statistics
    derived: bool  # whether an array is of a class derived from NumPy's or CuPy's
    extents: dict[str, Extent]  # of the arrays that the call reads, moves or writes, by name


def _form(array: Array | None) -> Hashable:
    """Everything that is to be known about an array but its address and its elements."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return type(array), array.shape, array.strides, array.dtype, array.flags.writeable
    return type(array), array.shape, array.strides, array.dtype, array.data.device_id


MOST_CHECKED = 4096
"""Calls that are remembered, before all are forgotten."""
_checked: dict[Hashable, Checked] = {}
"""Calls that have been checked, by what `Call.check` looks at."""
