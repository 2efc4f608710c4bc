"""Batch norm as autograd sees it: the way forward, the way back, and the way back of that.

Each of these is a function of autograd, and the next one is its way back:

    BatchNorm         -> output
    BatchNormBackward -> gradients of input, weight, bias and residual
    its own way back  -> gradients of these with respect to grad_output, input and weight
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cupybn._calls.call import Call, Caller
from cupybn._calls.flow import Four, backward, forward, forward_and_saved
from cupybn._calls.second import double_backward
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.torch.arrays import OnDevice, OnHost, where
from cupybn.torch.checks import check_mode, check_tensor
from cupybn.torch.saving import Kept, Tensors, keep, rebuilt

Tensor = Any  # torch.Tensor


class Settings(NamedTuple):
    """Arguments of a call that autograd does not follow."""

    running: Running  # of tensors
    training: bool
    eps: float
    activation: str | None
    layer: Caller | None = None

    def call(self, place: OnHost | OnDevice, tensors: Tensors) -> Call:
        """The call on the arrays of these tensors: input, weight, bias and residual."""
        mean, var, momentum, batches, _ = self.running
        arrays = [None if each is None else place.array(each) for each in (*tensors, mean, var, batches)]
        input, weight, bias, residual, mean, var, batches = arrays
        return Call(
            input,
            Affine(weight, bias, self.eps),
            Running(mean, var, momentum, batches),
            Epilogue(residual, self.activation),
            self.training,
            1,
            self.layer,
        )

    def note_moves(self, call: Call) -> None:
        """Tell autograd which tensors a call has moved: whoever saved them before may not use them any more."""
        if call.moves() and call.input.size > 0:
            mean, var, _, batches, _ = self.running
            for buffer in (mean, var, batches):
                if buffer is not None:
                    torch.autograd.graph.increment_version(buffer)


def output_of(tensors: Tensors, settings: Settings) -> Tensor:
    """The output of a call of which nobody will ask for gradients."""
    with where(tensors[0]) as place:
        call = settings.call(place, tensors)
        output = place.tensor(forward(call))
    settings.note_moves(call)
    return output


class BatchNorm(torch.autograd.Function):
    """The output as a function of input, weight, bias and residual."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, settings: Settings
    ) -> Tensor:
        """The output."""
        with where(input) as place:
            call = settings.call(place, (input, weight, bias, residual))
            array, saved = forward_and_saved(call)
            output = place.tensor(array)
            ctx.kept, tensors = keep(saved, call, place, (input, weight, bias))
        settings.note_moves(call)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments; those that nobody asks for are None."""
        if grad_output is None:
            return (None,) * 5
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        check_mode()
        check_tensor("grad_output", grad_output, tensors[0])
        grad_output = grad_output.resolve_neg()
        if not torch.is_grad_enabled():
            return *gradients_of(ctx.kept, wanted, grad_output, tensors), None
        if not ctx.kept.linked:
            raise NotImplementedError(
                "gradients of second order are not implemented for an input, weight or bias that shares memory with "
                "running statistics: use a clone"
            )
        input, weight, bias, pairs, passed = tensors
        return *BatchNormBackward.apply(grad_output, input, weight, bias, pairs, passed, ctx.kept, wanted), None


class BatchNormBackward(torch.autograd.Function):
    """The gradients as a function of grad_output, input, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pairs: Tensor | None,
        passed: Tensor | None,
        kept: Kept,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight, bias and residual, or None for each that is not wanted."""
        tensors = input, weight, bias, pairs, passed
        ctx.kept = kept
        ctx.save_for_backward(grad_output, *tensors)
        ctx.set_materialize_grads(False)
        return gradients_of(kept, wanted, grad_output, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of grad_output, input and weight, from cotangents of the gradients."""
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * 8
        grad_output, *tensors = ctx.saved_tensors
        check_mode()
        names = ("input", "weight", "bias", "residual")
        for name, cotangent in zip(names, cotangents, strict=True):
            if cotangent is not None:
                check_tensor(f"cotangents.{name}", cotangent, grad_output)
        with where(grad_output) as place:
            saved = rebuilt(ctx.kept, place, tuple(tensors))
            four: Four = tuple(None if each is None else place.array(each.resolve_neg()) for each in cotangents)
            found = double_backward(saved, place.array(grad_output), four)
            dgrad, dinput, dweight = (None if array is None else place.tensor(array) for array in found)
        return dgrad, dinput, dweight, None, None, None, None, None


def gradients_of(kept: Kept, wanted: tuple[bool, ...], grad_output: Tensor, tensors: Tensors) -> Tensors:
    """The gradients of input, weight, bias and residual, or None for each that is not wanted."""
    with where(grad_output) as place:
        given = place.array(grad_output)
        found = backward(rebuilt(kept, place, tensors), given)
        return tuple(
            None
            if array is None or not is_wanted
            else grad_output  # a gradient goes through a sum as it is
            if array is given
            else place.tensor(array)
            for array, is_wanted in zip(found, wanted, strict=True)
        )
