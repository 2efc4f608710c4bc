"""The libraries that are compared: how each is called, how its calls become a graph, and its results arrays of CuPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_cudnn
import numpy as np
from gpu_expert import expert_call

from cupybn._arrays.devices import import_cupy
from cupybn._cli.extras import optional
from cupybn._cli.measure import Call, CupyGraph, Graph, TorchGraph
from cupybn._cli.peers import cupybn_call, plain_call, torch_call
from cupybn._cli.problem import Array, Arrays, Operation, Problem

CUPYBN, TORCH, NATIVE = "cupybn", "PyTorch", "PyTorch without cuDNN"
CUDNN, PLAIN, EXPERT = "cuDNN Frontend", "plain CuPy", "expert CuPy"


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


def peers() -> tuple[list[Peer], list[str]]:
    """The peers that can be measured on this machine, and notes on why others cannot."""
    cupy, torch = import_cupy(), optional("torch")

    def with_cupy(
        name: str, call: Callable[..., Call], takes: Callable[[Problem, Operation], bool], **more: Any
    ) -> Peer:
        return Peer(name, call, CupyGraph, lambda _, result: result[0], takes, **more)

    def narrow(problem: Problem, operation: Operation) -> bool:
        bare = operation.training and operation.activation is None
        return bare and problem.dtype.name in ("float32", "float16")

    def everything(_problem: Problem, _operation: Operation) -> bool:
        return True

    def planned(problem: Problem, operation: Operation) -> bool:
        # ReLU without a residual is left out: planning its graph takes longer than measuring it.
        alone = operation.activation is not None and not operation.residual
        return not alone and problem.dtype != np.dtype(np.float64)

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
        found += _torch_peers(torch)
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


def _torch_peers(torch: Any) -> list[Peer]:
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

    def takes(_problem: Problem, _operation: Operation) -> bool:
        return True

    def bare(problem: Problem, operation: Operation) -> bool:
        return operation.activation is None and problem.dtype != np.dtype(np.float64)

    return [
        Peer(TORCH, call, graph, output, takes, lambda: surroundings(True)),
        Peer(NATIVE, call, graph, output, bare, lambda: surroundings(False), everywhere=False),
    ]
