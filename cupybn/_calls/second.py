"""The way back of second order: from cotangents of the gradients that the way back returns to what these depend on.

    grad_output -> bn_double_backward_reduce -> five sums of each channel
    cotangents  -> bn_double_backward_input  -> gradients of grad_output, input and weight

Each of these is there twice: `numpy_double_backward` computes, `cupy_double_backward` launches a kernel. The sums
are left out where nothing asks for them: in eval mode without a cotangent of the input's gradient or a weight, and in
training where neither that gradient nor that of weight has a cotangent.
"""

from __future__ import annotations

from typing import Any

from cupybn._arrays.devices import empty_like, on_device_of, zeros_like
from cupybn._arrays.kinds import describe, plain
from cupybn._calls import checks
from cupybn._calls.call import has_form
from cupybn._calls.flow import Four
from cupybn._calls.saved import Saved
from cupybn._ranks.synchronized import Synchronized
from cupybn._steps.bundles import Epilogue, Incoming, SecondGradients, Statistics
from cupybn._steps.launcher import unheard
from cupybn._steps.ops import double_backward_for
from cupybn._steps.tape import Particulars, particulars_of

Array = Any  # numpy.ndarray or cupy.ndarray

NAMES = ("input", "weight", "bias", "residual")
"""Names of the arguments whose gradients have cotangents, in the order of these."""


def check_second_order(saved: Saved) -> None:
    """Check for a call whose way back has a second order."""
    if saved.epilogue.mask is not None:
        raise NotImplementedError(
            "gradients of second order (vjp_fn.vjp) are not implemented under a mask: call batch norm with the "
            "positions that it leaves, as an array of shape (positions, channels)"
        )
    if isinstance(saved.ops, Synchronized):
        raise NotImplementedError(
            "gradients of second order (vjp_fn.vjp) are not implemented for a SyncBatchNorm of several ranks in "
            "training: use layer.to_batchnorm(), which has the statistics of this rank alone, or layer.eval()"
        )


def double_backward(saved: Saved, grad_output: Array, cotangents: Four) -> tuple[Array, Array, Array | None]:
    """The gradients of grad_output, input and weight, from cotangents of the gradients that `backward` returns for it.

    Cotangents are those of the gradients of input, weight, bias and residual; None stands for zeros. The gradient of
    weight is None where there is none.

    Raises
    ------
    TypeError, ValueError
        If grad_output is not like the input, or a cotangent not like its gradient.
    """
    _check(saved, grad_output, cotangents)
    cdx, cdweight, cdbias, cdresidual = cotangents
    conform = saved.checked.layout.conform
    with on_device_of(saved.input):
        tensors = [array if array is None else conform(plain(array)) for array in (grad_output, cdx, cdresidual)]
        vectors = [array if array is None else plain(array) for array in (cdweight, cdbias)]
        return _double_backward(saved, Incoming(*tensors, *vectors))


def _check(saved: Saved, grad_output: Array, cotangents: Four) -> None:
    """Check that `double_backward` can take these arrays."""
    if not isinstance(cotangents, tuple):
        raise TypeError(
            f"expected cotangents to be a BatchNormGrads or a tuple in its order: {', '.join(NAMES)} "
            f"(got {describe(cotangents)}){_to_cotangents(cotangents)}"
        )
    if len(cotangents) != len(NAMES):
        raise ValueError(
            f"expected cotangents of {len(NAMES)} gradients: {', '.join(NAMES)} (got {len(cotangents)}): use None for "
            "what has none"
        )
    input, checked, (weight, bias, _) = saved.input, saved.checked, saved.affine
    there = True, weight is not None, bias is not None, checked.has_residual
    given = {name: array for name, array in zip(NAMES, cotangents, strict=True) if array is not None}
    for name, is_there in zip(NAMES, there, strict=True):
        if name in given and not is_there:
            raise ValueError(
                f"expected cotangents.{name} to be None, as the call had no {name} (got {describe(given[name])})"
            )
    axis = checked.layout.channel_axis
    assert axis is not None
    tensors = {"grad_output": grad_output}
    for name, array in given.items():
        if name in ("weight", "bias"):
            checks.check_vectors(input, axis, {f"cotangents.{name}": array}, None, _WORDS)
        else:
            tensors[f"cotangents.{name}"] = array
    for name, array in tensors.items():
        if not has_form(array, checked.form):
            checks.check_like(name, array, input)


_WORDS = checks.Words(flag=None)


def _to_cotangents(given: Any) -> str:
    """Way out for what is no tuple. The end of a message."""
    if isinstance(given, list):
        return ": use tuple(cotangents)"
    return ": use (cotangents, None, None, None)" if hasattr(type(given), "shape") else ""


def _double_backward(saved: Saved, incoming: Incoming) -> tuple[Array, Array, Array | None]:
    """`double_backward` of arrays that have the layout of the input."""
    layout, tapes = saved.checked.layout, saved.tapes
    results: list[Array | None] | None
    if tapes is None:
        with unheard():
            results = _steps(saved, incoming)
    else:
        particulars = _particulars(saved, incoming)
        results = tapes.play(particulars)
        if results is None:
            with tapes.recorder(particulars) as recorder:
                results = recorder.results = _steps(saved, incoming)
    ddy, dx, dweight = results
    return layout.back(ddy), layout.back(dx), dweight


def _particulars(saved: Saved, incoming: Incoming) -> Particulars:
    """What this way back does not have in common with others of calls that are alike, for their tapes.

    The forms of vectors of cotangents are part of the key: they are the caller's choice, at each time another one.
    """
    dy, cdx, cdresidual, cdweight, cdbias = incoming
    (weight, bias, eps), passed = saved.affine, saved.epilogue.passed
    kind = (
        "second",
        None if passed is None else passed.size,  # packs
        cdx is not None,
        cdresidual is not None,
        *[None if vector is None else (vector.dtype, vector.strides) for vector in (cdweight, cdbias)],
    )
    tensors = dy, saved.input, cdx, cdresidual
    others = saved.pairs, passed, weight, bias, cdweight, cdbias
    return particulars_of(kind, tensors, others, (eps, 0.0))


def _steps(saved: Saved, incoming: Incoming) -> list[Array | None]:
    """Gradients of grad_output, input and weight: new arrays, those of the first two in the order of memory."""
    checked, input, passed, weight = saved.checked, saved.input, saved.epilogue.passed, saved.affine.weight
    layout, training = checked.layout, checked.training
    alignment = input.nbytes // passed.size if passed is not None and passed.size else 1  # bytes of a pack
    ddy, dx = layout.empty(input, alignment), layout.empty(input, alignment)
    if input.size == 0:
        return [ddy, dx, None if weight is None else zeros_like(weight)]
    dweight = None if weight is None else empty_like(weight)
    ops = double_backward_for(input)
    x, shape = layout.view(input), layout.shape
    incoming = incoming._replace(
        dy=layout.view(incoming.dy), cdx=layout.view(incoming.cdx), cdresidual=layout.view(incoming.cdresidual)
    )
    statistics, epilogue = Statistics(saved.pairs), Epilogue(None, saved.epilogue.activation, passed)
    # Whether anything depends on statistics that depend on x.
    depends = training and (incoming.cdx is not None or incoming.cdweight is not None)
    sums = None
    if depends or (weight is not None and incoming.cdx is not None):
        sums = ops.bn_double_backward_reduce(incoming, x, statistics, saved.affine, epilogue)
    inv_count = shape[1] / input.size if depends else 0.0
    gradients = SecondGradients(ddy.reshape(shape), dx.reshape(shape), dweight)
    ops.bn_double_backward_input(incoming, x, statistics, saved.affine, epilogue, sums, inv_count, gradients)
    return [ddy, dx, dweight]
