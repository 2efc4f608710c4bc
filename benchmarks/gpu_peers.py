"""The libraries that are compared: how each is called, how its calls become a graph, and its results arrays of CuPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_cudnn
import numpy as np
from gpu_cudnn_norms import NORMS
from gpu_expert import expert_call

from cupybn._arrays.devices import import_cupy
from cupybn._cli.extras import optional
from cupybn._cli.measure import Call, CupyGraph, Graph, TorchGraph
from cupybn._cli.peers import cupybn_call, torch_call
from cupybn._cli.plain import plain_call
from cupybn._cli.problem import FAMILY, OVER_THE_LAST_AXIS, Array, Arrays, Operation, Problem

CUPYBN, TORCH, NATIVE = "cupybn", "PyTorch", "PyTorch without cuDNN"
CUDNN, PLAIN, EXPERT = "cuDNN Frontend", "plain CuPy", "expert CuPy"
COMPILED, APEX, ENGINE = "torch.compile", "Apex", "Transformer Engine"

MOST_ROWS = 1 << 16
"""Rows up to which PyTorch is asked for the way back of layer and RMS norm: with more it may write out of bounds."""


@dataclass
class Peer:
    """A library, or a way to use one, with its calls."""

    name: str
    call: Callable[[Problem, Operation, Arrays], Call]
    graph: Callable[[Sequence[Call], bool], Graph]
    output: Callable[[Problem, Any], Array]
    """Function that returns the first item of a result as an array of CuPy in the memory order of the problem."""
    takes: Callable[[Problem, Operation], bool]
    surroundings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    everywhere: bool = True
    """Whether the peer takes part in every case; else only in those with `Case.all_peers`."""


def peers(compiled: bool = False) -> tuple[list[Peer], list[str]]:
    """The peers that can be measured on this machine, and notes on why others cannot.

    With `compiled` what `torch.compile` makes of PyTorch's functions is among them, for the family.
    """
    cupy, torch = import_cupy(), optional("torch")

    def with_cupy(
        name: str, call: Callable[..., Call], takes: Callable[[Problem, Operation], bool], **more: Any
    ) -> Peer:
        return Peer(name, call, CupyGraph, lambda _, result: result[0], takes, **more)

    def narrow(problem: Problem, operation: Operation) -> bool:
        bare = operation.training and operation.activation is None
        return operation.op == "batch_norm" and bare and problem.dtype.name in ("float32", "float16")

    def everything(_problem: Problem, _operation: Operation) -> bool:
        return True

    def planned(problem: Problem, operation: Operation) -> bool:
        # ReLU without a residual is left out: planning its graph takes longer than measuring it.
        alone = operation.activation is not None and not operation.residual
        return operation.op in ("batch_norm", *NORMS) and not alone and problem.dtype != np.dtype(np.float64)

    found = [
        with_cupy(CUPYBN, cupybn_call, everything),
        with_cupy(PLAIN, lambda *of: plain_call(cupy, *of), narrow, everywhere=False),
    ]
    notes = ["plain and expert CuPy: training and backward, float32 and float16; their arithmetic knows no bfloat16"]
    if hasattr(cupy, "ElementwiseKernel"):
        found.append(with_cupy(EXPERT, lambda *of: expert_call(cupy, *of), narrow, everywhere=False))
    else:
        notes.append(f"{EXPERT}: not available, this CuPy has no ElementwiseKernel")
    if torch is not None and torch.cuda.is_available():
        found += _torch_peers(torch, compiled, notes)
    else:
        notes.append(f"{TORCH}: not available, {'it finds no GPU' if torch else 'it is not installed'}")
    try:
        frontend = gpu_cudnn.Frontend(gpu_cudnn.load(), notes)
    except (ImportError, RuntimeError) as error:
        notes.append(f"{CUDNN}: not available, {error}")
    else:
        notes.append(f"{CUDNN}: {frontend.version}")
        found.append(with_cupy(CUDNN, frontend.call, planned))
    return found, notes


def _torch_peers(torch: Any, compiled: bool, notes: list[str]) -> list[Peer]:
    stream = torch.cuda.Stream()  # autograd uses the stream of the forward pass, which must be the captured one

    @contextlib.contextmanager
    def surroundings(cudnn: bool) -> Any:
        with torch.cuda.stream(stream), torch.backends.cudnn.flags(enabled=cudnn):
            yield

    def graph(calls: Sequence[Call], keep: bool) -> Graph:
        return TorchGraph(calls, keep, torch, stream)

    def output(problem: Problem, result: Any) -> Array:
        tensor = result[0].detach().movedim(1, problem.channel_axis).contiguous()
        if problem.dtype.name != "bfloat16":
            return import_cupy().from_dlpack(tensor)
        return import_cupy().from_dlpack(tensor.view(torch.int16)).view(problem.dtype)

    def call(problem: Problem, operation: Operation, arrays: Arrays) -> Call:
        return torch_call(torch, problem, operation, arrays)

    def takes(problem: Problem, operation: Operation) -> bool:
        of_rows = operation.op in OVER_THE_LAST_AXIS and operation.backward
        return not of_rows or problem.shape[0] <= MOST_ROWS

    def bare(problem: Problem, operation: Operation) -> bool:
        single = operation.op == "batch_norm" and operation.activation is None
        return single and problem.dtype != np.dtype(np.float64)

    def of_family(name: str, wrapped: Callable[[str], Any], ops: Sequence[str]) -> Peer:
        def call(problem: Problem, operation: Operation, arrays: Arrays) -> Call:
            return torch_call(torch, problem, operation, arrays, lambda _: wrapped(operation.op))

        return Peer(name, call, graph, output, lambda _, operation: operation.op in ops, lambda: surroundings(True))

    found = [
        Peer(TORCH, call, graph, output, takes, lambda: surroundings(True)),
        Peer(NATIVE, call, graph, output, bare, lambda: surroundings(False), everywhere=False),
    ]
    if compiled:
        found.append(of_family(COMPILED, compiled_function, FAMILY))
    notes.append(
        f"{TORCH}: no way back of layer and RMS norm with more than {MOST_ROWS} rows: it may write out of bounds"
    )
    for name, module, make in OTHERS:
        if optional(module) is None:
            notes.append(f"{name}: not available, it is not installed")
        else:
            found.append(of_family(name, make, NORMS))
    return found


@functools.cache
def compiled_function(op: str) -> Any:
    """What `torch.compile` makes of a function of PyTorch, for each shape anew."""
    torch = importlib.import_module("torch")
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(getattr(torch.nn.functional, op), dynamic=False)


def apex_function(op: str) -> Any:
    """Apex's fused layer or RMS norm, with the arguments in PyTorch's order."""
    fused: Any = importlib.import_module("apex.normalization.fused_layer_norm")
    if op == "rms_norm":
        return lambda x, shape, weight, eps: fused.fused_rms_norm_affine(x, weight, shape, eps)
    return lambda x, shape, weight, bias, eps: fused.fused_layer_norm_affine(x, weight, bias, shape, eps)


def engine_function(op: str) -> Any:
    """Transformer Engine's layer or RMS norm, with the arguments in PyTorch's order."""
    engine, torch = importlib.import_module("transformer_engine.pytorch"), importlib.import_module("torch")

    def function(x: Any, shape: tuple[int, ...], *affine: Any) -> Any:
        *vectors, eps = affine
        module = (engine.RMSNorm if op == "rms_norm" else engine.LayerNorm)(shape[0], eps=eps, params_dtype=x.dtype)
        return torch.func.functional_call(module, dict(zip(("weight", "bias"), vectors, strict=False)), (x,))

    return function


OTHERS = ((APEX, "apex", apex_function), (ENGINE, "transformer_engine", engine_function))
"""Libraries on PyTorch's tensors that are measured where they are installed: names, modules, functions."""
