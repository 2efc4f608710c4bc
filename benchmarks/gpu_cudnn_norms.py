"""Layer and RMS norm as graphs of cuDNN, drawn like those of batch norm in `gpu_cudnn.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupybn._cli.problem import Operation

if TYPE_CHECKING:
    from gpu_cudnn import Sketch

NORMS = ("layer_norm", "rms_norm")
"""Functions that cuDNN has operations for."""


def vectors(operation: Operation) -> tuple[str, ...]:
    """The names of the vectors of channels; their gradients have a d before them."""
    return ("weight",) if operation.op == "rms_norm" else ("weight", "bias")


def saved(operation: Operation) -> tuple[str, ...]:
    """The names of what a forward pass leaves for the way back, a float32 for each row."""
    return ("rstd",) if operation.op == "rms_norm" else ("mean", "rstd")


def draw_norm(s: Sketch, operation: Operation) -> None:
    """Build the graph of a forward pass in training."""
    norm = s.graph.rmsnorm if operation.op == "rms_norm" else s.graph.layernorm
    names = dict(zip(("scale", "bias"), vectors(operation), strict=False))
    y, *rows = norm(
        norm_forward_phase=s.training,
        input=s.image("x"),
        epsilon=s.scalar("eps"),
        **{name: s.vector(vector, s.dtype) for name, vector in names.items()},
    )
    s.image_output("y", y)
    for name, row in zip(saved(operation), rows, strict=True):
        s.vector_output(name, row)


def draw_norm_backward(s: Sketch, operation: Operation) -> None:
    """Build the graph of a backward pass."""
    given = {"grad": s.image("dy"), "input": s.image("x"), "scale": s.vector("weight", s.dtype)}
    rows = dict(zip(("mean", "inv_variance")[-len(saved(operation)) :], saved(operation), strict=True))
    given |= {name: s.row(row) for name, row in rows.items()}
    if operation.op == "rms_norm":
        dx, *gradients = s.graph.rmsnorm_backward(has_dbias=False, **given)
    else:
        dx, *gradients = s.graph.layernorm_backward(**given)
    s.image_output("dx", dx)
    for name, gradient in zip(vectors(operation), gradients, strict=False):
        s.vector_output(f"d{name}", gradient, s.dtype)
