"""The arguments of one call, of batch norm or a norm within a sample: whether they fit together, and which of them
share memory.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from cupybn._arrays.devices import copied
from cupybn._arrays.kinds import is_derived, kind, plain
from cupybn._calls import checks
from cupybn._calls.layout import Layout
from cupybn._calls.overlap import Extent, Spans, may_overlap, overlapping
from cupybn._calls.rows import Rows
from cupybn._calls.tracking import updates_stats
from cupybn._ranks.group import Group
from cupybn._steps.arguments import NAN
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn._steps.norm import Norm
from cupybn._steps.observer import Observer
from cupybn._steps.tape import Particulars, Tapes, particulars_of

Array = Any  # numpy.ndarray or cupy.ndarray

VECTORS = ("weight", "bias", "running_mean", "running_var")
"""Names of the arrays with a value for each channel."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the arrays that a call may move, which is to say update: the running statistics and their counter."""
NAMES = ("input", "residual", "mask", *VECTORS, "num_batches_tracked")
"""Names of the arrays that a call reads or moves."""
IN_USE = ("mask", *VECTORS)
"""Names of the arrays that steps read until their output is written."""
WriteBack = list[tuple[Array, Array]]
"""Arrays, and the values that they are to get when all steps are done."""


class Caller(NamedTuple):
    """What a call needs to know of the layer that makes it."""

    device: str
    ndims: tuple[int, ...] = ()  # numbers of axes that its inputs may have; () if any will do
    idle: tuple[Array, ...] = ()  # running statistics that it holds, but does not use in this call
    group: Group | None = None  # processes that the batch is spread over, in training; None for a single one
    observer: Observer | None = None  # what gets the moments of the batch, instead of its running statistics


class Call(NamedTuple):
    """Arguments that a function or a layer was called with."""

    input: Array
    affine: Affine
    running: Running
    epilogue: Epilogue
    training: bool  # whether the statistics are those of the input
    channel_axis: int
    layer: Caller | None = None  # None for the functions
    rows: Rows | None = None  # what shares statistics in a norm within a sample; None for batch norm

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
            checked = Checked.of(self, out, self.check(out))
            if key is not None:
                if len(_cache) >= MOST_CACHED:
                    _cache.clear()
                _cache[key] = checked
        return checked

    def _key(self, out: Array | None) -> Hashable:
        """Key of this call in the cache: all that `check` looks at.

        Numbers stand there with their types: True, 1 and 1.0 are equal, but not all of them are right. The momentum is
        missing, as whoever makes a call has checked it, and in eval mode so is the counter, which nobody reads. Types
        are asked for by `type`: an object may claim a class in ``__class__`` that it is not of, as proxies do. Types
        and forms stand apart, and all in a row: a call of a function less for each array.
        """
        weight, bias, eps = self.affine
        mean, var, _, batches, skip_nonfinite = self.running
        residual, activation, _, mask = self.epilogue
        layer = self.layer
        form = _numpy_form if isinstance(self.input, np.ndarray) else _cupy_form
        return (
            type(self.input),
            type(mean),
            type(var),
            type(weight),
            type(bias),
            type(residual),
            type(out),
            form(self.input),
            None if mean is None else form(mean),
            None if var is None else form(var),
            None if weight is None else form(weight),
            None if bias is None else form(bias),
            None if residual is None else form(residual),
            None if batches is None or self.training is False else form_of(batches),
            None if out is None else form(out),
            None if mask is None else (type(mask), form(mask)),
            False if skip_nonfinite is False else (type(skip_nonfinite), skip_nonfinite),
            self.training,
            type(self.training),
            eps,
            type(eps),
            activation,
            self.channel_axis,
            type(self.channel_axis),
            None if layer is None else (layer.ndims, layer.group is not None, layer.observer is not None),
            self.rows,
            updates_stats(),
        )

    def check(self, out: Array | None = None) -> int:
        """The channel axis counted from the front, if all is well.

        Raises
        ------
        TypeError, ValueError
            What was expected and what was given. Nothing has been changed, and no array on a device has been read.
        """
        input, layer, rows = self.input, self.layer, self.rows
        ndims, device = (layer.ndims, layer.device) if layer is not None else ((), None)
        function = "batch_norm" if rows is None else rows.function
        check_input = checks.check_input if rows is None else rows.check_input
        axis = check_input(input, self.channel_axis, ndims)
        checks.check_activation(self.epilogue.activation)
        checks.check_bool("training" if rows is None else "use_input_stats", self.training)
        checks.check_bool("skip_nonfinite", self.running.skip_nonfinite)
        checks.check_running(self.running, self.training, function)
        parameters = {"weight": self.affine.weight, "bias": self.affine.bias}
        if rows is not None and rows.normalized_shape is not None:
            rows.check_parameters(input, parameters, device)
        else:
            vectors = {"running_mean": self.running.mean, "running_var": self.running.var, **parameters}
            checks.check_vectors(input, axis, vectors, device, checks.Words() if rows is None else rows.words())
        checks.check_eps(self.affine.eps, self.training, function)
        if self.training and input.size and (layer is None or layer.group is None):
            check_size = checks.check_more_than_one_value if rows is None else rows.check_positions
            check_size(input.shape, axis, self._way_to_eval())
        for name, array in ("residual", self.epilogue.residual), ("out", out):
            if array is not None:
                checks.check_like(name, array, input, masks=rows is None)
        if self.epilogue.mask is not None:
            checks.check_mask(self.epilogue.mask, input, (axis,))
        written = {"out": out}
        if self.moves():
            if self.running.batches is not None:
                checks.check_counter(self.running.batches, input)
            written |= dict(zip(BUFFERS, (self.running.mean, self.running.var, self.running.batches), strict=True))
        for name, array in written.items():
            if array is not None:
                checks.check_writeable(name, array)
        return axis

    def _way_to_eval(self) -> str:
        """Advice for the end of a message: eval mode, where the call comes from a layer with running statistics."""
        if self.layer is not None and self.layer.observer is not None:  # its mode is not the caller's choice
            return "; leave this batch out of update_bn, or join it with another one"
        has_buffers = self.running.mean is not None or self.running.batches is not None
        return "; did you mean layer.eval()?" if self.layer is not None and has_buffers else ""

    def moves(self) -> bool:
        """Whether this call moves the running statistics."""
        observed = self.layer is not None and self.layer.observer is not None
        return self.training and self.running.mean is not None and updates_stats() and not observed

    def arrays(self, with_counter: bool) -> dict[str, Array]:
        """The arrays of this call by name, but for those that are None."""
        return {name: array for name, array in zip(NAMES, self._all(with_counter), strict=True) if array is not None}

    def _all(self, with_counter: bool) -> tuple[Array | None, ...]:
        """The arrays of this call, in the order of NAMES.

        The counter of batches counts as one in calls that move it: others do not even read it.
        """
        weight, bias, _ = self.affine
        mean, var, _, batches, _ = self.running
        residual, _, _, mask = self.epilogue
        return self.input, residual, mask, weight, bias, mean, var, batches if with_counter else None

    def settled(self) -> Call:
        """Call with the same arguments, seen as arrays of NumPy's or CuPy's own class and numbers of Python's."""
        arrays = {name: plain(array) for name, array in self.arrays(with_counter=True).items()}
        affine = self.affine._replace(eps=float(self.affine.eps))
        running = self.running._replace(skip_nonfinite=bool(self.running.skip_nonfinite))
        return self._replace(affine=affine, running=running)._with_arrays(arrays)

    def _with_arrays(self, arrays: dict[str, Array]) -> Call:
        """Call with the same arguments, but with these arrays in the place of those of their names."""
        weight, bias, eps = self.affine
        mean, var, momentum, batches, skip_nonfinite = self.running
        residual, activation, passed, mask = self.epilogue
        return self._replace(
            input=arrays.get("input", self.input),
            affine=Affine(arrays.get("weight", weight), arrays.get("bias", bias), eps),
            running=Running(
                arrays.get("running_mean", mean),
                arrays.get("running_var", var),
                momentum,
                arrays.get("num_batches_tracked", batches),
                skip_nonfinite,
            ),
            epilogue=Epilogue(arrays.get("residual", residual), activation, passed, arrays.get("mask", mask)),
        )

    def conformed(self, checked: Checked) -> Call:
        """Call with the same arguments, but input, residual and mask are copies where they have not the layout."""
        if checked.dense:
            return self
        layout, (residual, _, _, mask) = checked.layout, self.epilogue
        return self._with_arrays(
            {
                "input": layout.conform(self.input),
                "residual": layout.conform(residual),
                "mask": layout.conform_mask(mask),
            }
        )

    def running_for_steps(self, moves: bool) -> Running:
        """Running statistics as the steps take them: only with arrays that are read or moved.

        Where there are running statistics that stay as they are (`no_stats_update`), momentum and skip_nonfinite are
        given all the same: the choice of launches depends on them, so that the same kernels run with and without an
        update.
        """
        mean, var, momentum, _, skip_nonfinite = self.running
        if not self.training:
            return Running(mean, var, momentum)
        if moves:
            return self.running
        return Running() if mean is None else Running(momentum=momentum, skip_nonfinite=skip_nonfinite)

    def _shared(self, checked: Checked, for_vjp: bool) -> list[str]:
        """Names of the arrays that share memory with a buffer which this call moves, or a later one may."""
        if not (checked.moves or for_vjp):
            return []
        idle = self.layer.idle if for_vjp and self.layer is not None else ()
        present = [array for array in self._all(with_counter=checked.moves) if array is not None]
        doubtful = may_overlap(present, (extent for name, extent in checked.extents.items() if name != "out"))
        if not (doubtful or idle):
            return []
        arrays = self.arrays(with_counter=checked.moves)
        shared = overlapping(arrays, {name: arrays[name] for name in BUFFERS if name in arrays}) if doubtful else []
        if idle:
            read = {name: array for name, array in arrays.items() if name not in BUFFERS}
            shared += overlapping(read, dict(enumerate(idle)))
        return shared

    def without_overlap(self, checked: Checked, for_vjp: bool) -> tuple[Call, WriteBack]:
        """Call with the same arguments, where no array that moves shares memory with another one; what to write back.

        Arrays may share memory, as a weight that is also the running variance. An array that is read is replaced by a
        copy if it shares memory with a buffer: ``vjp_fn`` reads it again after this call, or a later one, has moved
        the buffer. Buffers that share memory with each other are moved as copies, which are to be written back.
        """
        shared = self._shared(checked, for_vjp)
        if not shared:
            return self, []
        arrays, layout = self.arrays(with_counter=checked.moves), checked.layout
        ways = {"input": layout.copy, "residual": layout.copy, "mask": layout.copy_mask}
        copies = {name: ways.get(name, copied)(arrays[name]) for name in shared if checked.moves or name not in BUFFERS}
        return self._with_arrays(copies), [(arrays[name], copies[name]) for name in BUFFERS if name in copies]

    def particulars(self, out: Array | None, checked: Checked, for_vjp: bool) -> Particulars | None:
        """What this call does not have in common with others that are alike, for their tapes.

        None if it has to take its steps for itself: where `without_overlap` makes copies, or the output is not written
        to `out` at once.
        """
        if out is not None and not checked.direct:
            return None
        weight, bias, eps = self.affine
        mean, var, momentum, batches, _ = self.running
        tensors: tuple[Array | None, ...] = self.input, self.epilogue.residual, out, self.epilogue.mask
        vectors: tuple[Array | None, ...] = weight, bias, mean, var, batches if checked.moves else None
        if checked.norm is not None:  # whose kernels read weight and bias in packs, too
            tensors, vectors = tensors + vectors[:2], vectors[2:]
        numbers = eps, NAN if momentum is None else momentum
        particulars = particulars_of((for_vjp, momentum is None), tensors, vectors, numbers)
        _, addresses, _ = particulars
        written = checked.moves or for_vjp or out is not None  # now, or by a later call
        idle = self.layer is not None and self.layer.idle
        doubtful = written and (idle or checked.spans.overlap(addresses))
        if doubtful and (self._shared(checked, for_vjp) or (out is not None and self.overwritten(out, checked))):
            return None
        return particulars

    def overwritten(self, out: Array, checked: Checked) -> bool:
        """Whether an output shares memory with a vector or the mask of this call, which are in use until the end."""
        used = {name: array for name, array in self.arrays(with_counter=False).items() if name in IN_USE}
        extents = [checked.extents[name] for name in ("out", *used)]
        return may_overlap([out, *used.values()], extents) and bool(overlapping({"out": out}, used))


class Checked(NamedTuple):
    """Facts about calls whose arguments fit together, and which are alike but for addresses and elements."""

    layout: Layout
    moves: bool  # whether the call moves running statistics
    training: bool
    has_residual: bool
    norm: Norm | None  # what the steps of a norm within a sample are told; None for those of batch norm
    settled: bool  # whether all arrays are of NumPy's or CuPy's own class, and eps and skip_nonfinite Python's
    dense: bool  # whether input, residual and mask have the layout
    direct: bool  # whether `out` has it
    extents: dict[str, Extent]  # extents of the arrays that the call reads, moves or writes, by name
    spans: Spans  # beginnings and lengths of the same memory, in the order of `Call.particulars`
    form: Form | None  # form of the input; None if it is not dense
    tapes: Tapes | None  # launches of such calls, there and back; None where they are not recorded

    @classmethod
    def of(cls, call: Call, out: Array | None, axis: int) -> Checked:
        """Facts about a call that is right, with the number of its channel axis."""
        # Instance norm with running statistics is batch norm in eval mode: both have them for each channel.
        rows, moves, (residual, _, _, mask) = call.rows if call.training else None, call.moves(), call.epilogue
        layout = Layout.of(call.input, axis) if rows is None else rows.layout(call.input, axis)
        arrays = call.arrays(with_counter=moves)
        if out is not None:
            arrays["out"] = out
        classes: set[Any] = {type(array) for array in arrays.values()}
        ordered = "input", "residual", "out", "mask", *VECTORS, "num_batches_tracked"  # as `particulars` has them
        extents = {name: Extent.of(arrays[name]) for name in ordered if name in arrays}
        dense = layout.matches(call.input) and (residual is None or layout.matches(residual))
        dense = dense and (mask is None or layout.matches_mask(plain(mask)))
        # Not where ranks exchange messages between launches, an observer keeps what it is given, or arrays are copied.
        alone = call.layer is None or (call.layer.group is None and call.layer.observer is None)
        recorded = alone and dense and call.input.size > 0 and kind(call.input) == "cupy"
        numbers_settled = type(call.affine.eps) is float and type(call.running.skip_nonfinite) is bool
        settled = numbers_settled and not any(map(is_derived, classes))
        direct = out is not None and layout.matches(out)
        return cls(
            layout,
            moves,
            call.training,
            residual is not None,
            None if rows is None else rows.norm(call.input, axis),
            settled,
            dense,
            direct,
            extents,
            Spans.of(extents.values()),
            form_of(plain(call.input)) if layout.matches(call.input) else None,
            Tapes() if recorded else None,
        )


_numpy_form = operator.attrgetter("shape", "strides", "dtype", "flags.writeable")
"""Everything that is to be known about a NumPy array but its class, its address and its elements."""
_cupy_form = operator.attrgetter("shape", "strides", "dtype", "data.device_id")
"""Everything that is to be known about a CuPy array but its class, its address and its elements."""
Form = tuple[type, Hashable]
"""Everything that is to be known about an array but its address and its elements: its class, and the rest."""


def form_of(array: Array) -> Form:
    """The form of an array."""
    return type(array), _numpy_form(array) if isinstance(array, np.ndarray) else _cupy_form(array)


def has_form(given: Any, form: Form | None) -> bool:
    """Whether something is an array of this form. Of what is of another class, nothing else is read."""
    return form is not None and type(given) is form[0] and form_of(given) == form


MOST_CACHED = 4096
"""Calls that are remembered, before all are forgotten."""
_cache: dict[Hashable, Checked] = {}
"""Facts about calls that have been checked, by `Call._key`."""
