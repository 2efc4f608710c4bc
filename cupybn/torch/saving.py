"""What the way back needs, as autograd saves it: tensors, and a form of `Saved` without arrays.

What is saved as a tensor is watched by autograd: if it is changed in place, the way back raises an error. It may be
packed elsewhere in the meantime, by hooks, and come back in another memory order.
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


class Kept(NamedTuple):
    """What the way back needs beside the tensors."""

    bare: Saved  # all but the arrays
    strides: tuple[Any, ...]  # strides of input, weight and bias
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
    strides = tuple(None if tensor is None else tensor.stride() for tensor in tensors)
    pairs, passed = (None if each is None else place.tensor(each) for each in (saved.pairs, saved.epilogue.passed))
    bare = saved._replace(
        input=None,
        pairs=None,
        affine=Affine(None, None, saved.affine.eps),
        epilogue=Epilogue(None, saved.epilogue.activation),
    )
    return Kept(bare, strides, all(same)), (*tensors, pairs, passed)


def rebuilt(kept: Kept, place: OnHost | OnDevice, tensors: Tensors) -> Saved:
    """`Saved` with the arrays over the memory of the tensors that autograd has unpacked."""
    input, weight, bias, pairs, passed = (None if tensor is None else place.array(tensor) for tensor in tensors)
    bare = kept.bare
    saved = bare._replace(
        input=bare.checked.layout.conform(input),
        pairs=pairs,
        affine=bare.affine._replace(weight=weight, bias=bias),
        epilogue=bare.epilogue._replace(passed=passed),
    )
    if kept.strides == tuple(None if tensor is None else tensor.stride() for tensor in tensors[:3]):
        return saved
    return saved._replace(tapes=None)  # whose launches were recorded with other strides
