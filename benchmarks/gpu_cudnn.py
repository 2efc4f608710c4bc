"""Batch, layer and RMS norm by cuDNN on CuPy arrays, through `nvidia-cudnn-frontend`, as its documentation does it.

It is where CuPy 14 sends users of the cuDNN wrappers that it removed. A graph is planned once for a shape, a dtype and
an operation, and its workspace is allocated then; a call allocates its outputs and executes the plan on the current
stream. cuDNN refuses many graphs: it has no engine for most channel counts that are no multiple of 8, for example.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cudnn_norms import NORMS, draw_norm, draw_norm_backward, saved, vectors

from cupybn._arrays.devices import import_cupy
from cupybn._cli.measure import Call
from cupybn._cli.problem import EPS, MOMENTUM, OPERATIONS, Arrays, Operation, Problem, operation_of

LIBRARY = "cudnn/lib/libcudnn.so.9"
"""Path of libcudnn below the folder `nvidia`, where the packages `nvidia-cudnn-cu12` and `nvidia-cudnn-cu13` put it."""
PLANS = 4
"""Plans that are kept, with their workspaces: a backward pass needs two of them."""


class RefusedError(Exception):
    """An error that says why cuDNN will not do what was asked for."""


def load() -> Any:
    """The frontend's module, once cuDNN is found; an ImportError says what is missing."""
    if importlib.util.find_spec("cudnn") is None:
        raise ImportError("it is not installed")
    _load_library()
    import cudnn

    logging.getLogger("cudnn").setLevel(logging.ERROR)  # silences its warnings: each refusal is an exception as well
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        raise ImportError(f"it finds no cuDNN: {error}") from error
    return cudnn


def _load_library() -> None:
    """Load libcudnn from anywhere on Python's path: the frontend looks only beside the interpreter's own packages."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, LIBRARY).exists():
            ctypes.CDLL(str(Path(folder, LIBRARY)), mode=ctypes.RTLD_GLOBAL)
            return


def dims_and_strides(problem: Problem) -> tuple[list[int], list[int]]:
    """The sizes of arrays as (N, C, ...) with at least four axes, and their strides in elements."""
    axes = list(range(len(problem.shape)))
    axes.insert(1, axes.pop(problem.channel_axis))
    strides = [math.prod(problem.shape[axis + 1 :]) for axis in axes]
    missing = max(0, 4 - len(axes))
    innermost = problem.channels if strides[1] == 1 else 1
    return [problem.shape[axis] for axis in axes] + [1] * missing, strides + [innermost] * missing


class Sketch:
    """A graph that is being built, with an input or output for each array.

    Parameters
    ----------
    cudnn : module
        The frontend.
    problem : Problem
    options : dict
        Options of the graph: its handle.
    flat : bool
        Channels-first arrays are described as (N, C, L), the only way in which they are multiplied by a vector.
    """

    def __init__(self, cudnn: Any, problem: Problem, options: dict[str, Any], flat: bool = False) -> None:
        types = cudnn.data_type
        self.float = types.FLOAT
        self.bit = types.BOOLEAN
        self.training = cudnn.norm_forward_phase.TRAINING
        self.dtype = {"float16": types.HALF, "bfloat16": types.BFLOAT16, "float32": types.FLOAT}[problem.dtype.name]
        self.graph = cudnn.pygraph(
            io_data_type=self.dtype, intermediate_data_type=self.float, compute_data_type=self.float, **options
        )
        self.dims, self.strides = dims_and_strides(problem)
        if flat and self.strides[1] != 1:
            self.dims = [*self.dims[:2], math.prod(self.dims[2:])]
            self.strides = [*self.strides[:2], 1]
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def _input(self, name: str, dim: Sequence[int], stride: Sequence[int], dtype: Any, **options: Any) -> Any:
        tensor = self.graph.tensor(name=name, dim=list(dim), stride=list(stride), data_type=dtype, **options)
        self.inputs[name] = tensor
        return tensor

    def image(self, name: str, dtype: Any = None) -> Any:
        """Add an input that has the size of x."""
        return self._input(name, self.dims, self.strides, dtype or self.dtype)

    def vector(self, name: str, dtype: Any = None) -> Any:
        """Add an input with one value for each channel, a float32 by default."""
        channels, others = self.dims[1], len(self.dims) - 2
        dims, strides = [1, channels] + [1] * others, [channels, 1] + [channels] * others
        return self._input(name, dims, strides, dtype or self.float)

    def row(self, name: str) -> Any:
        """Add an input with one float32 for each sample."""
        others = [1] * (len(self.dims) - 1)
        return self._input(name, [self.dims[0], *others], [1, *others], self.float)

    def scalar(self, name: str) -> Any:
        """Add a float32 that lies on the host, and is passed by value."""
        return self._input(name, [1] * len(self.dims), [1] * len(self.dims), self.float, is_pass_by_value=True)

    def image_output(self, name: str, tensor: Any, dtype: Any = None) -> None:
        """Make a tensor an output that has the size of x. Without given strides the frontend assumes channels last for
        some.
        """
        self.outputs[name] = tensor
        tensor.set_output(True).set_data_type(dtype or self.dtype).set_dim(self.dims).set_stride(self.strides)

    def vector_output(self, name: str, tensor: Any, dtype: Any = None) -> None:
        """Make a tensor an output with one value, a float32 by default, for each channel, or for each row."""
        self.outputs[name] = tensor
        tensor.set_output(True).set_data_type(dtype or self.float)


def draw_training(s: Sketch, operation: Operation) -> None:
    """Build the graph of a training pass; with ReLU it also writes the mask for the backward pass."""
    vectors = {name: s.vector(name) for name in ("weight", "bias", "running_mean", "running_var")}
    y, mean, rstd, running_mean, running_var = s.graph.batchnorm(
        input=s.image("x"),
        scale=vectors["weight"],
        bias=vectors["bias"],
        in_running_mean=vectors["running_mean"],
        in_running_var=vectors["running_var"],
        epsilon=s.scalar("eps"),
        momentum=s.scalar("momentum"),
    )
    if operation.residual:
        y = s.graph.add(a=y, b=s.image("residual"))
    if operation.activation:
        y = s.graph.relu(input=y)
        s.image_output("mask", s.graph.cmp_gt(input=y, comparison=s.scalar("zero")), s.bit)
    s.image_output("y", y)
    s.vector_output("mean", mean)
    s.vector_output("rstd", rstd)
    s.vector_output("next_mean", running_mean)
    s.vector_output("next_var", running_var)


def draw_inference(s: Sketch, _operation: Operation) -> None:
    """Build inference by the one operation that cuDNN has for it."""
    vectors = {name: s.vector(name) for name in ("mean", "rstd", "weight", "bias")}
    y = s.graph.batchnorm_inference(
        input=s.image("x"),
        mean=vectors["mean"],
        inv_variance=vectors["rstd"],
        scale=vectors["weight"],
        bias=vectors["bias"],
    )
    s.image_output("y", y)


def draw_elementwise(s: Sketch, _operation: Operation) -> None:
    """Build inference from elementwise operations."""
    y = s.graph.sub(a=s.image("x"), b=s.vector("mean"))
    y = s.graph.mul(a=y, b=s.vector("rstd"))
    y = s.graph.mul(a=y, b=s.vector("weight"))
    s.image_output("y", s.graph.add(a=y, b=s.vector("bias")))


def draw_backward(s: Sketch, operation: Operation) -> None:
    """Build the graph of a backward pass; behind a ReLU it also writes the residual's gradient."""
    dy = s.image("dy")
    if operation.activation:
        dy = s.graph.scale(input=dy, scale=s.image("mask", s.bit))
        dy.set_data_type(s.dtype)
        if operation.residual:
            s.image_output("dresidual", dy)
    vectors = {name: s.vector(name) for name in ("weight", "mean", "rstd")}
    dx, dweight, dbias = s.graph.batchnorm_backward(
        grad=dy, input=s.image("x"), scale=vectors["weight"], mean=vectors["mean"], inv_variance=vectors["rstd"]
    )
    s.image_output("dx", dx)
    s.vector_output("dweight", dweight)
    s.vector_output("dbias", dbias)


Draw = Callable[[Sketch, Operation], None]


@dataclass
class Plan:
    """A graph that is ready to be executed, with its workspace."""

    sketch: Sketch
    workspace: Any


class Frontend:
    """cuDNN on the current device, through its frontend.

    Parameters
    ----------
    cudnn : module
        The frontend, as `load` gives it.
    notes : list of str
        List to which a note is added when cuDNN refuses an operation that can be built another way.
    """

    def __init__(self, cudnn: Any, notes: list[str]) -> None:
        self._cudnn, self._notes = cudnn, notes
        self._cupy = import_cupy()
        self._handle = cudnn.create_handle()
        scalars = {"eps": EPS, "momentum": MOMENTUM, "zero": 0}
        self._scalars = {name: np.full(1, value, np.float32) for name, value in scalars.items()}
        self._plan = functools.lru_cache(PLANS)(self._make_plan)

    @property
    def version(self) -> str:
        """The versions of the frontend and of cuDNN."""
        return f"{self._cudnn.__version__}, with cuDNN {self._cudnn.backend_version_string()}"

    def call(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        """A call like those in `cupybn._cli.peers`; raises `RefusedError` where there is no plan."""
        if operation.op in NORMS:
            return (self._norm_backward if operation.backward else self._norm)(problem, operation, a)
        if operation.backward:
            return self._backward(problem, operation, a)
        return self._training(problem, operation, a) if operation.training else self._inference(problem, operation, a)

    def _training(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        plan = self._plan(draw_training, problem, operation)
        inputs = a._asdict()

        def call() -> tuple[Any, ...]:
            outputs = {"y": self._cupy.empty_like(a.x), "next_mean": a.running_mean, "next_var": a.running_var}
            outputs |= self._vectors(problem, "mean", "rstd")
            if operation.activation:
                outputs["mask"] = self._cupy.empty(a.x.size, np.uint8)  # cuDNN decides whether it holds bits or bytes
            self._execute(plan, inputs, outputs)
            return outputs["y"], outputs["mean"], outputs["rstd"], outputs.get("mask")

        return call

    def _inference(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        try:
            plan = self._plan(draw_inference, problem, operation)
        except RefusedError as refusal:
            note = f"cuDNN refuses batchnorm_inference ({refusal}); its inference is four elementwise operations"
            if note not in self._notes:
                self._notes.append(note)
            plan = self._plan(draw_elementwise, problem, operation)
        rstd = 1 / self._cupy.sqrt(a.running_var + np.float32(EPS))  # computed once, as a program does for many batches
        inputs = a._asdict() | {"mean": a.running_mean, "rstd": rstd}

        def call() -> tuple[Any, ...]:
            outputs = {"y": self._cupy.empty_like(a.x)}
            self._execute(plan, inputs, outputs)
            return (outputs["y"],)

        return call

    def _backward(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        forward = OPERATIONS[operation.name.replace("backward", "training")]
        _, mean, rstd, mask = self._training(problem, forward, a)()
        plan = self._plan(draw_backward, problem, operation)
        inputs = a._asdict() | {"mean": mean, "rstd": rstd, "mask": mask}

        def call() -> tuple[Any, ...]:
            outputs = {"dx": self._cupy.empty_like(a.x), **self._vectors(problem, "dweight", "dbias")}
            if operation.residual:
                outputs["dresidual"] = self._cupy.empty_like(a.x)
            self._execute(plan, inputs, outputs)
            return tuple(outputs.values())

        return call

    def _norm(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        plan = self._plan(draw_norm, problem, operation)
        inputs = a._asdict()

        def call() -> tuple[Any, ...]:
            rows = {name: self._cupy.empty(problem.shape[0], np.float32) for name in saved(operation)}
            outputs = {"y": self._cupy.empty_like(a.x), **rows}
            self._execute(plan, inputs, outputs)
            return tuple(outputs.values())

        return call

    def _norm_backward(self, problem: Problem, operation: Operation, a: Arrays) -> Call:
        forward = operation_of(operation.op, "forward")
        rows = self._norm(problem, forward, a)()[1:]
        plan = self._plan(draw_norm_backward, problem, operation)
        inputs = a._asdict() | dict(zip(saved(operation), rows, strict=True))

        def call() -> tuple[Any, ...]:
            outputs = {"dx": self._cupy.empty_like(a.x)}
            outputs |= {f"d{name}": self._cupy.empty_like(getattr(a, name)) for name in vectors(operation)}
            self._execute(plan, inputs, outputs)
            return tuple(outputs.values())

        return call

    def _vectors(self, problem: Problem, *names: str) -> dict[str, Any]:
        return {name: self._cupy.empty(problem.channels, np.float32) for name in names}

    def _make_plan(self, draw: Draw, problem: Problem, operation: Operation) -> Plan:
        sketch = Sketch(self._cudnn, problem, {"handle": self._handle}, flat=draw is draw_elementwise)
        modes = self._cudnn.heur_mode
        try:
            draw(sketch, operation)
            sketch.graph.validate()
            sketch.graph.build_operation_graph()
            sketch.graph.create_execution_plans([modes.A, modes.FALLBACK])
            sketch.graph.check_support()
            sketch.graph.build_plans()
        except (self._cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise RefusedError(reason(error)) from error
        return Plan(sketch, self._cupy.empty(max(1, sketch.graph.get_workspace_size()), np.uint8))

    def _execute(self, plan: Plan, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        self._cudnn.set_stream(handle=self._handle, stream=self._cupy.cuda.get_current_stream().ptr)
        # addresses, because the frontend does not take NumPy arrays: they cannot be exported to a stream.
        arrays = inputs | {name: array.ctypes.data for name, array in self._scalars.items()}
        pack = {tensor: arrays[name] for name, tensor in plan.sketch.inputs.items()}
        pack |= {tensor: outputs[name] for name, tensor in plan.sketch.outputs.items()}
        plan.sketch.graph.execute(pack, plan.workspace, handle=self._handle)


def reason(error: Exception) -> str:
    """The message of the frontend, without the list of engines that follows."""
    text = str(error).partition("\n")[0].strip(" _").removesuffix(" for") or type(error).__name__
    return text.rpartition("the backend declined: ")[2][:160]
