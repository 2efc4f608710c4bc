"""The arguments of one call of batch norm: whether they fit together, and which of them share memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied
from cupybn._arrays.kinds import is_derived, kind, plain
from cupybn._calls import checks
from cupybn._calls.layout import Layout
from cupybn._calls.overlap import Extent, may_overlap, overlapping
from cupybn._calls.tracking import updates_stats
from cupybn._ranks.group import Group
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn._steps.tape import Tapes

Array = Any  # numpy.ndarray or cupy.ndarray

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the arrays that a call may move, which is to say update: the running statistics and their counter."""
WriteBack = list[tuple[Array, Array]]
"""Arrays, and the values that they are to get when all steps are done."""


class Caller(NamedTuple):
    """What a call needs to know of the layer that makes it."""

    device: str
    ndims: tuple[int, ...] = ()  # numbers of axes that its inputs may have; () if any will do
    idle: tuple[Array, ...] = ()  # running statistics that it holds, but does not use in this call
    group: Group | None = None  # processes that the batch is spread over, in training; None for a single one


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

        They do not depend on the addresses and elements of arrays. So calls that are alike but for these are checked
        once, and the facts are kept.

        Raises
        ------
        TypeError, ValueError
            See `check`.
        """
        try:
            key = self._key(out)
            checked = _cache.get(key)
        except (AttributeError, TypeError, ValueError):  # an argument that cannot be part of a key
            key = checked = None
        if checked is None:
            layout, moves = Layout.of(self.input, self.check(out)), self._moves()
            arrays = self.arrays(with_counter=moves) | ({} if out is None else {"out": out})
            classes: set[Any] = {type(array) for array in arrays.values()}
            extents = {name: Extent.of(array) for name, array in arrays.items()}
            checked = Checked(layout, moves, any(map(is_derived, classes)), extents, self._tapes(layout))
            if key is not None:
                if len(_cache) >= MOST_CACHED:
                    _cache.clear()
                _cache[key] = checked
        return checked

    def _key(self, out: Array | None) -> Hashable:
        """Key of this call in the cache: all that `check` looks at.

        Numbers stand there with their types: True, 1 and 1.0 are equal, but not all of them are right. The momentum is
        missing, as whoever makes a call has checked it.
        """
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
            None if layer is None else (layer.ndims, layer.group is not None),
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
        axis = checks.check_input(input, self.channel_axis, () if layer is None else layer.ndims)
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

    def _tapes(self, layout: Layout) -> Tapes | None:
        """Where launches of calls like this one are to be kept; None where those are not alike.

        Ranks have to exchange messages between launches, and what is not dense is copied before them.
        """
        alone = self.layer is None or self.layer.group is None
        residual = self.epilogue.residual
        dense = layout.matches(self.input) and (residual is None or layout.matches(residual))
        return Tapes() if alone and dense and self.input.size and kind(self.input) == "cupy" else None

    def _way_to_eval(self) -> str:
        """Advice for the end of a message: eval mode, where the call comes from a layer with running statistics."""
        has_buffers = self.running.mean is not None or self.running.batches is not None
        return "; did you mean layer.eval()?" if self.layer is not None and has_buffers else ""

    def _moves(self) -> bool:
        """Whether this call moves the running statistics."""
        return self.training and self.running.mean is not None and updates_stats()

    def arrays(self, with_counter: bool) -> dict[str, Array]:
        """The arrays of this call by name, but for those that are None.

        The counter of batches counts as one in calls that move it: others do not even read it.
        """
        weight, bias, _ = self.affine
        mean, var, _, batches = self.running
        named = {
            "input": self.input,
            "residual": self.epilogue.residual,
            "weight": weight,
            "bias": bias,
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": batches if with_counter else None,
        }
        return {name: array for name, array in named.items() if array is not None}

    def plain(self) -> Call:
        """Call with the same arguments, where arrays of derived classes are seen as those of NumPy's or CuPy's own."""
        return self._with_arrays({name: plain(array) for name, array in self.arrays(with_counter=True).items()})

    def _with_arrays(self, arrays: dict[str, Array]) -> Call:
        """Call with the same arguments, but with these arrays in the place of those of their names."""
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

    def running_for_steps(self, moves: bool) -> Running:
        """Running statistics as the steps take them: only with arrays that are read or moved.

        Where there are running statistics that stay as they are (`no_stats_update`), the momentum is given all the
        same: the choice of launches depends on it, so that the same kernels run with and without an update.
        """
        mean, var, momentum, _ = self.running
        if not self.training:
            return Running(mean, var, momentum)
        if moves:
            return self.running
        return Running() if mean is None else Running(momentum=momentum)

    def without_overlap(self, checked: Checked, for_vjp: bool) -> tuple[Call, WriteBack]:
        """Call with the same arguments, where no array that moves shares memory with another one; what to write back.

        Arrays may share memory, as a weight that is also the running variance. An array that is read is replaced by a
        copy if it shares memory with a buffer: ``vjp_fn`` reads it again after this call, or a later one, has moved
        the buffer. Buffers that share memory with each other are moved as copies, which are to be written back.
        """
        if not (checked.moves or for_vjp):
            return self, []
        arrays = self.arrays(with_counter=checked.moves)
        buffers = {name: arrays[name] for name in BUFFERS if name in arrays}
        shared = overlapping(arrays, buffers) if may_overlap(arrays, checked.extents) else []
        if for_vjp and self.layer is not None and self.layer.idle:  # which a later call may move
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
        return self._with_arrays(copies), [(arrays[name], copies[name]) for name in buffers if name in copies]

    def vectors_overlap(self, out: Array, checked: Checked) -> bool:
        """Whether an output shares memory with a vector of this call, which it would overwrite while it is in use."""
        others = ("input", "residual", "num_batches_tracked")
        arrays = self.arrays(with_counter=checked.moves)
        vectors = {name: array for name, array in arrays.items() if name not in others}
        return may_overlap({"out": out} | vectors, checked.extents) and bool(overlapping({"out": out}, vectors))


class Checked(NamedTuple):
    """Facts about calls whose arguments fit together, and which are alike but for addresses and elements."""

    layout: Layout
    moves: bool  # whether the call moves running statistics
    derived: bool  # whether an array is of a class derived from NumPy's or CuPy's
    extents: dict[str, Extent]  # extents of the arrays that the call reads, moves or writes, by name
    tapes: Tapes | None  # launches of such calls, there and back; None where they are not alike


def _form(array: Array | None) -> Hashable:
    """Everything that is to be known about an array but its address and its elements."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return type(array), array.shape, array.strides, array.dtype, array.flags.writeable
    return type(array), array.shape, array.strides, array.dtype, array.data.device_id


MOST_CACHED = 4096
"""Calls that are remembered, before all are forgotten."""
_cache: dict[Hashable, Checked] = {}
"""Facts about calls that have been checked, by `Call._key`."""
