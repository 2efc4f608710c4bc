"""What the way back needs, as autograd saves it: tensors, and a form of `Saved` without arrays.

What is saved as a tensor is watched by autograd: if it is changed in place, the way back raises an error. It may be
packed elsewhere in the meantime, by hooks, and come back in another memory order and at any address. Autograd does not
watch ``tensor.data = other``, as ``module.to`` does it: what comes back may be of another shape, dtype or device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cupybn._calls.call import Call
from cupybn._calls.saved import Saved
from cupybn._steps.bundles import Affine, Epilogue
from cupybn.torch.arrays import OnDevice, OnHost

Tensor = Any  # torch.Tensor
Tensors = tuple["Tensor | None", ...]
"""Input, weight, bias, pairs of statistics and record of ReLU: what `Saved` has of these."""
NAMES = ("input", "weight", "bias", "statistics", "record of ReLU")
"""Names of these tensors, for messages."""
Form = tuple[Any, Any, Any, Any]
"""Strides, shape, dtype and device of a tensor."""


class Kept(NamedTuple):
    """What the way back needs beside the tensors."""

    bare: Saved  # all but the arrays
    forms: tuple[Form | None, ...]  # forms of the tensors, in the order of `Tensors`
    linked: bool  # whether input, weight and bias were saved themselves, so that autograd knows where they come from
    wanted: tuple[bool, ...] = (True,) * 4  # whether gradients of input, weight, bias and residual are asked for


def keep(saved: Saved, call: Call, place: OnHost | OnDevice, given: Tensors) -> tuple[Kept, Tensors]:
    """What is kept of a call on these tensors, input, weight and bias, and the tensors to be saved."""
    arrays = saved.input, saved.affine.weight, saved.affine.bias
    originals = call.input, call.affine.weight, call.affine.bias
    # An array that shares memory with running statistics has been copied, as these move: the copy is what is saved.
    same = [array is original for array, original in zip(arrays, originals, strict=True)]
    tensors = [
        tensor if is_same else place.tensor(array) for array, tensor, is_same in zip(arrays, given, same, strict=True)
    ]
    pairs, passed = (None if each is None else place.tensor(each) for each in (saved.pairs, saved.epilogue.passed))
    bare = saved._replace(
        input=None,
        pairs=None,
        affine=Affine(None, None, saved.affine.eps),
        epilogue=Epilogue(None, saved.epilogue.activation),
    )
    kept = *tensors, pairs, passed
    return Kept(bare, _forms(kept), all(same)), kept


def rebuilt(kept: Kept, place: OnHost | OnDevice, tensors: Tensors) -> Saved:
    """`Saved` with the arrays over the memory of the tensors that autograd has unpacked.

    Raises
    ------
    RuntimeError
        If a tensor is not of the shape, dtype and device that it was saved with.
    """
    alike = kept.forms == _forms(tensors)
    if not alike:
        _check_forms(kept.forms, tensors)
    input, weight, bias, pairs, passed = (
        None if tensor is None else place.array(tensor) for tensor in _readable(tensors, alike)
    )
    bare = kept.bare
    saved = bare._replace(
        input=bare.checked.layout.conform(input),
        pairs=pairs,
        affine=bare.affine._replace(weight=weight, bias=bias),
        epilogue=bare.epilogue._replace(passed=passed),
    )
    return saved if alike else saved._replace(tapes=None)  # whose launches were recorded with other strides


def _forms(tensors: Tensors) -> tuple[Form | None, ...]:
    """The form of each tensor, None for None."""
    return tuple([None if each is None else (each.stride(), each.shape, each.dtype, each.device) for each in tensors])


def _check_forms(forms: tuple[Form | None, ...], tensors: Tensors) -> None:
    """Check that tensors are of these forms, but for their strides."""
    for name, expected, found in zip(NAMES, forms, _forms(tensors), strict=True):
        if expected is not None and (found is None or found[1:] != expected[1:]):
            words = [
                "None" if form is None else f"shape {tuple(form[1])}, {form[2]} on {form[3]}"
                for form in (expected, found)
            ]
            raise RuntimeError(
                f"expected the {name} that was saved for the way back, of {words[0]} (got {words[1]}): its data have "
                "been replaced since, as by module.to, or a hook of saved tensors has not brought them back"
            )


def _readable(tensors: Tensors, alike: bool) -> Tensors:
    """The tensors as kernels can read them: what they have made themselves is contiguous, and packs begin where packs
    may, if there is a record of ReLU, which has one for each pack.
    """
    input: Tensor
    input, weight, bias, pairs, passed = tensors
    if not alike:
        pairs, passed = (None if each is None else each.contiguous() for each in (pairs, passed))
    if passed is not None and passed.numel() > 0 and input.data_ptr() % (input.nbytes // passed.numel()) != 0:
        input = input.clone()
    return input, weight, bias, pairs, passed
