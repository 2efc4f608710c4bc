"""The flow of a call: from its arguments to the steps, and from the gradient of its output back to theirs.

`forward_and_saved` and `backward` are its two halves:

    arguments   -> Call.checked  -> the layout, by which the input is seen in the shape that steps take
    input       -> forward steps -> output, running statistics, what is saved for the way back
    grad_output -> backward steps -> gradients

Which steps these are, two modules say: `across` for statistics across samples, which batch norm has, and `within` for
those within a sample. Each step is there twice: one module computes it in NumPy, another one launches a kernel. What
steps take together is a bundle (`cupybn._steps.bundles`).

Calls that are alike, on CuPy arrays, launch the same kernels. So the first one is recorded while it takes its steps,
and later ones play its launches without taking them again (`cupybn._steps.tape`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cupybn._arrays.devices import on_device_of, write_at_once
from cupybn._arrays.kinds import plain
from cupybn._calls import across, checks, within
from cupybn._calls.call import Call, has_form
from cupybn._calls.saved import Saved
from cupybn._steps.bundles import Epilogue
from cupybn._steps.launcher import unheard
from cupybn._steps.tape import particulars_of

if TYPE_CHECKING:
    from typing_extensions import Self

Array = Any  # numpy.ndarray or cupy.ndarray
Four = tuple[Array, Array | None, Array | None, Array | None]
"""Gradients of input, weight, bias and residual; None for what was not an argument."""


def forward(call: Call, out: Array | None = None) -> Array:
    """The output of a call, which is `out` where that is given."""
    output, _ = _forward(call, out, for_vjp=False)
    return output if out is None else out  # the very array that was given, of whatever class it is


def forward_and_saved(call: Call) -> tuple[Array, Saved]:
    """The output of a call, and what the way back needs."""
    output, saved = _forward(call, None, for_vjp=True)
    assert saved is not None
    return output, saved


def _forward(call: Call, out: Array | None, for_vjp: bool) -> tuple[Array, Saved | None]:
    """The output and, if there will be a way back, what that needs."""
    checked = call.checked(out)
    if not checked.settled:
        call, out = call.settled(), plain(out)
    layout, tapes = checked.layout, checked.tapes
    way: Any = across if checked.norm is None else within
    ops: Any = way.RECORDED if tapes is not None else way.ops_for_call(call)
    with on_device_of(call.input):
        particulars = None if tapes is None else call.particulars(out, checked, for_vjp)
        if tapes is not None and particulars is not None:
            results = tapes.play(particulars)
            if results is None:
                with tapes.recorder(particulars) as recorder:
                    results = recorder.results = way.forward_steps(ops, call, out, checked, for_vjp)
            made, pairs, passed, count_left = results
            output = out if made is None else layout.back(made)
        else:
            tapes = None
            # Steps write to `out` itself where that is safe; else to a new array, which is copied in the end.
            direct = checked.direct and not call.overwritten(out, checked)
            call, write_back = call.without_overlap(checked, for_vjp)
            call = call.conformed(checked)
            with unheard():
                target = out if direct else None
                made, pairs, passed, count_left = way.forward_steps(ops, call, target, checked, for_vjp)
            output = out if made is None else layout.back(made)
            if layout.order is not None and out is None:
                output = layout.ordered(output)
            if out is not None and not direct:
                write_back.append((out, output))  # the last: it is right, whatever it shares with the buffers
            if write_back and ops is not None:
                write_at_once(write_back)
    if not for_vjp:
        return output, None
    _, activation, _, mask = call.epilogue
    way_back = Epilogue(None, activation, passed, mask)
    return output, Saved(ops, checked, tapes, call.input, pairs, call.affine, way_back, count_left)


class WayBack:
    """Function that goes back, as from the gradient of a call's output to those of its arguments.

    Pure: it may be called again and changes nothing.
    """

    __slots__ = ("__weakref__", "_saved")

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def __copy__(self) -> Self:
        """Return this one: it is pure, and a copy of a function is the function itself."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


def backward(saved: Saved, grad_output: Array) -> Four:
    """The gradients of the arguments, from that of the output; raises unless this is like the input."""
    checked = saved.checked
    same_form = has_form(grad_output, checked.form)
    if not same_form:
        checks.check_like("grad_output", grad_output, saved.input)
    with on_device_of(saved.input):
        return _backward(saved, grad_output if same_form else checked.layout.conform(plain(grad_output)))


def _backward(saved: Saved, grad_output: Array) -> Four:
    """The gradients of the arguments, from that of the output, which has the layout of the input."""
    _, checked, tapes, input, pairs, affine, epilogue, count_left = saved
    way: Any = across if checked.norm is None else within
    results: list[Array | None] | None
    if tapes is None:
        with unheard():
            results = way.backward_steps(saved, grad_output)
    else:
        (weight, bias, eps), (_, _, passed, mask) = affine, epilogue
        packs = None if passed is None else passed.size
        tensors: tuple[Array | None, ...]
        others: tuple[Array | None, ...]
        if checked.norm is None:
            tensors, others = (grad_output, input, mask), (pairs, passed, weight, bias, count_left)
        else:  # whose kernels read weight and bias in packs, too
            tensors, others = (grad_output, input, weight, bias), (pairs, passed)
        particulars = particulars_of(("back", packs), tensors, others, (eps, 0.0))
        results = tapes.play(particulars)
        if results is None:
            with tapes.recorder(particulars) as recorder:
                results = recorder.results = way.backward_steps(saved, grad_output)
    dx, dresidual, dweight, dbias = results
    layout = checked.layout
    dx = layout.back(dx)
    if dresidual is not None:
        dresidual = layout.back(dresidual)
    elif checked.has_residual:  # through a sum a gradient goes as it is, where neither ReLU nor a mask stops it
        dresidual = grad_output
    if layout.order is not None:
        dx, dresidual = layout.ordered(dx), None if dresidual is None else layout.ordered(dresidual)
    return dx, dweight, dbias, dresidual
