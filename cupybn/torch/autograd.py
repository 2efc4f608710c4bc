"""Batch norm as autograd sees it: the way forward, the way back, and the way back of that.

Each of these is a function of autograd, and the next one is its way back:

    BatchNorm               -> output
    BatchNormBackward       -> gradients of input, weight, bias and residual
    BatchNormDoubleBackward -> gradients of grad_output, input and weight, from cotangents of these
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cupybn._calls import flow, second
from cupybn._calls.call import Call, Caller
from cupybn._steps.bundles import Affine, Epilogue, Running
from cupybn.torch.arrays import OnDevice, OnHost, where
from cupybn.torch.checks import check_mode, check_tensor
from cupybn.torch.saving import Kept, Tensors, keep, rebuilt

Tensor = Any  # torch.Tensor


class Settings(NamedTuple):
    """Arguments of a call that autograd does not follow."""

    running: Running  # holds tensors
    training: bool
    eps: float
    activation: str | None
    layer: Caller | None = None

    def call(self, place: OnHost | OnDevice, tensors: Tensors) -> Call:
        """The call on the arrays of these tensors: input, weight, bias and residual."""
        mean, var, momentum, batches, _ = self.running
        batches = batches if self.training else None  # which is not read otherwise, wherever and whatever it is
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
        output = place.tensor(flow.forward(call), tensors[0])
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
            array, saved = flow.forward_and_saved(call)
            output = place.tensor(array, input)
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
        tensors, kept = ctx.saved_tensors, ctx.kept._replace(wanted=ctx.needs_input_grad[:4])
        check_mode()
        check_tensor("grad_output", grad_output, tensors[0])
        grad_output = grad_output.resolve_neg()
        if not torch.is_grad_enabled():
            return *gradients_of(kept, grad_output, tensors), None
        if not kept.linked:
            raise NotImplementedError(
                "gradients of second order are not implemented for an input, weight or bias that shares memory with "
                "running statistics: use a clone"
            )
        input, weight, bias, pairs, passed = tensors
        return *BatchNormBackward.apply(grad_output, input, weight, bias, pairs, passed, kept), None


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
    ) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight, bias and residual, or None for each that is not wanted."""
        tensors = input, weight, bias, pairs, passed
        ctx.kept = kept
        ctx.save_for_backward(grad_output, *tensors)
        ctx.set_materialize_grads(False)
        return gradients_of(kept, grad_output, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of grad_output, input and weight, from cotangents of the gradients."""
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * 7
        check_mode()
        tensors = ctx.saved_tensors  # once: this unpacks them, and what packs may allow no more
        for name, cotangent in zip(second.NAMES, cotangents, strict=True):
            if cotangent is not None:
                check_tensor(f"cotangents.{name}", cotangent, tensors[0])
        resolved = [None if cotangent is None else cotangent.resolve_neg() for cotangent in cotangents]
        found = BatchNormDoubleBackward.apply(*resolved, *tensors, ctx.kept)
        return *found, None, None, None, None


class BatchNormDoubleBackward(torch.autograd.Function):
    """The gradients of second order, of which there are no further ones.

    `torch.autograd.function.once_differentiable` is not enough: its error stands beside the way to the input, and who
    asks for the gradient of the input alone would not meet it, but get a sum that lacks terms.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        """The gradients of grad_output, input and weight."""
        *cotangents, grad_output, input, weight, bias, pairs, passed, kept = arguments
        with where(grad_output) as place:
            saved = rebuilt(kept, place, (input, weight, bias, pairs, passed))
            four: Any = tuple(None if each is None else place.array(each) for each in cotangents)
            found = second.double_backward(saved, place.array(grad_output), four)
            likes = input, input, weight
            return tuple(
                None if array is None else place.tensor(array, like) for array, like in zip(found, likes, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Raise an error, whatever is asked for."""
        raise NotImplementedError("gradients of third order of batch norm are not implemented")


def gradients_of(kept: Kept, grad_output: Tensor, tensors: Tensors) -> Tensors:
    """The gradients of input, weight, bias and residual, or None for each that is not wanted."""
    with where(grad_output) as place:
        given = place.array(grad_output)
        found = flow.backward(rebuilt(kept, place, tensors), given)
        input, weight, bias, _, _ = tensors
        results: list[Tensor | None] = []
        for array, is_wanted, like in zip(found, kept.wanted, (input, weight, bias, input), strict=True):
            if array is None or not is_wanted:
                results.append(None)
            else:  # through a sum a gradient goes as it is
                results.append(grad_output if array is given else place.tensor(array, like))
        return tuple(results)
