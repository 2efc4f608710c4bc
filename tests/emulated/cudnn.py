"""A stand-in for NVIDIA's cudnn-frontend on the stand-in for CuPy: the part that `benchmarks/gpu_cudnn.py` uses, by
NumPy.

Tensors are read and written by the strides that the graph gives them. It refuses what cuDNN 9.19 refuses for an H200:
inference as an operation of its own, 35 channels, and channels-first images times a vector. Where one forgets the
strides of a gradient are left out it takes those of channels-last memory, as the frontend does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from cupy._run import run

__version__ = "0 (stand-in)"
data_type = SimpleNamespace(HALF="float16", BFLOAT16="bfloat16", FLOAT="float32", BOOLEAN="uint8")
norm_forward_phase = SimpleNamespace(TRAINING="TRAINING")
heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
REFUSED_OPERATION, REFUSED_CHANNELS = "batchnorm_inference", 35
Arrays = dict["Tensor", Any]


class cudnnGraphNotSupportedError(RuntimeError):  # noqa: N801
    """An error: cuDNN has no engine for the graph."""


class Handle:
    """A handle of cuDNN; graphs run on its `stream`, the one that was set last."""

    stream = 0


def backend_version() -> int:
    return 0


def backend_version_string() -> str:
    return "0 (stand-in)"


def create_handle() -> Handle:
    return Handle()


def set_stream(handle: Handle, stream: int) -> None:
    handle.stream = stream


class Tensor:
    """A tensor of a graph, and the function that computes it from the inputs."""

    def __init__(self, graph: pygraph, value: Callable[[Arrays], Any] | None) -> None:
        self._graph, self.value = graph, value
        self.dim: list[int] = []
        self.stride: list[int] = []
        self.dtype = graph.io_data_type
        self.by_value = False

    def set_output(self, is_output: bool) -> Tensor:
        assert is_output
        self._graph.outputs.append(self)
        return self

    def set_data_type(self, dtype: str) -> Tensor:
        self.dtype = dtype
        return self

    def set_dim(self, dim: Sequence[int]) -> Tensor:
        self.dim = list(dim)
        return self

    def set_stride(self, stride: Sequence[int]) -> Tensor:
        self.stride = list(stride)
        return self

    def view(self, array: Any) -> Any:
        """The elements of an array in the order of the graph."""
        assert array.dtype.name == self.dtype
        flat = array.reshape(-1)
        reach = 1 + sum((size - 1) * step for size, step in zip(self.dim, self.stride, strict=True))
        assert reach <= flat.size, f"{self.dim} with strides {self.stride} reaches over {flat.size} elements"
        return np.lib.stride_tricks.as_strided(flat, self.dim, [step * flat.itemsize for step in self.stride])


class pygraph:  # noqa: N801
    """A graph of operations on float64."""

    def __init__(
        self, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Handle | None = None
    ) -> None:
        assert intermediate_data_type == compute_data_type == data_type.FLOAT
        self.io_data_type, self._handle = io_data_type, handle
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._operations: list[str] = []
        self._built = False

    def tensor(
        self, name: str, dim: Sequence[int], stride: Sequence[int], data_type: str, is_pass_by_value: bool = False
    ) -> Tensor:
        assert name
        tensor = Tensor(self, None).set_dim(dim).set_stride(stride).set_data_type(data_type)
        tensor.value = lambda arrays: arrays[tensor]
        tensor.by_value = is_pass_by_value
        self.inputs.append(tensor)
        return tensor

    def _operation(self, name: str, like: Tensor, value: Callable[[Arrays], Any]) -> Tensor:
        self._operations.append(name)
        return Tensor(self, value).set_dim(like.dim).set_stride(like.stride)

    def _vector(self, like: Tensor, value: Callable[[Arrays], Any]) -> Tensor:
        channels, others = like.dim[1], len(like.dim) - 2
        return Tensor(self, value).set_dim([1, channels] + [1] * others).set_stride([channels, 1] + [channels] * others)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._operation("add", a, lambda arrays: a.value(arrays) + b.value(arrays))

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return self._operation("sub", a, lambda arrays: a.value(arrays) - b.value(arrays))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._operation("mul", a, lambda arrays: a.value(arrays) * b.value(arrays))

    def scale(self, input: Tensor, scale: Tensor) -> Tensor:
        return self._operation("scale", input, lambda arrays: input.value(arrays) * scale.value(arrays))

    def relu(self, input: Tensor) -> Tensor:
        return self._operation("relu", input, lambda arrays: np.maximum(input.value(arrays), 0))

    def cmp_gt(self, input: Tensor, comparison: Tensor) -> Tensor:
        return self._operation("cmp_gt", input, lambda arrays: input.value(arrays) > comparison.value(arrays))

    def batchnorm(
        self,
        input: Tensor,
        scale: Tensor,
        bias: Tensor,
        in_running_mean: Tensor,
        in_running_var: Tensor,
        epsilon: Tensor,
        momentum: Tensor,
    ) -> list[Tensor]:
        def moments(arrays: Arrays) -> tuple[Any, Any]:
            x = input.value(arrays)
            return x.mean(_others(x), keepdims=True), x.var(_others(x), keepdims=True)

        def rstd(arrays: Arrays) -> Any:
            return 1 / np.sqrt(moments(arrays)[1] + epsilon.value(arrays))

        def y(arrays: Arrays) -> Any:
            xhat = (input.value(arrays) - moments(arrays)[0]) * rstd(arrays)
            return xhat * scale.value(arrays) + bias.value(arrays)

        def moved(old: Tensor, new: Callable[[Arrays], Any]) -> Tensor:
            def value(arrays: Arrays) -> Any:
                share = momentum.value(arrays)
                return old.value(arrays) * (1 - share) + new(arrays) * share

            return self._vector(input, value)

        def unbiased(arrays: Arrays) -> Any:
            count = input.value(arrays).size / input.dim[1]
            return moments(arrays)[1] * count / (count - 1)

        return [
            self._operation("batchnorm", input, y),
            self._vector(input, lambda arrays: moments(arrays)[0]),
            self._vector(input, rstd),
            moved(in_running_mean, lambda arrays: moments(arrays)[0]),
            moved(in_running_var, unbiased),
        ]

    def batchnorm_inference(
        self, input: Tensor, mean: Tensor, inv_variance: Tensor, scale: Tensor, bias: Tensor
    ) -> Tensor:
        def y(arrays: Arrays) -> Any:
            xhat = (input.value(arrays) - mean.value(arrays)) * inv_variance.value(arrays)
            return xhat * scale.value(arrays) + bias.value(arrays)

        return self._operation("batchnorm_inference", input, y)

    def batchnorm_backward(
        self, grad: Tensor, input: Tensor, scale: Tensor, mean: Tensor, inv_variance: Tensor
    ) -> list[Tensor]:
        def xhat(arrays: Arrays) -> Any:
            return (input.value(arrays) - mean.value(arrays)) * inv_variance.value(arrays)

        def dbias(arrays: Arrays) -> Any:
            dy = grad.value(arrays)
            return dy.sum(_others(dy), keepdims=True)

        def dweight(arrays: Arrays) -> Any:
            dy = grad.value(arrays)
            return (dy * xhat(arrays)).sum(_others(dy), keepdims=True)

        def dx(arrays: Arrays) -> Any:
            count = input.value(arrays).size / input.dim[1]
            centred = grad.value(arrays) - (dbias(arrays) + xhat(arrays) * dweight(arrays)) / count
            return centred * scale.value(arrays) * inv_variance.value(arrays)

        gradient = self._operation("batchnorm_backward", input, dx)
        _, channels, *sizes = gradient.dim
        steps = [channels * int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
        gradient.set_stride([channels * int(np.prod(sizes)), 1, *steps])
        return [gradient, self._vector(input, dweight), self._vector(input, dbias)]

    def _row(self, like: Tensor, value: Callable[[Arrays], Any]) -> Tensor:
        others = [1] * (len(like.dim) - 1)
        return Tensor(self, value).set_dim([like.dim[0], *others]).set_stride([1, *others])

    def _norm(
        self, input: Tensor, scale: Tensor, bias: Tensor | None, epsilon: Tensor, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        def mean(arrays: Arrays) -> Any:
            x = input.value(arrays)
            return x.mean((1, 2, 3), keepdims=True) * centred

        def rstd(arrays: Arrays) -> Any:
            squares = (input.value(arrays) - mean(arrays)) ** 2
            return 1 / np.sqrt(squares.mean((1, 2, 3), keepdims=True) + epsilon.value(arrays))

        def y(arrays: Arrays) -> Any:
            scaled = (input.value(arrays) - mean(arrays)) * rstd(arrays) * scale.value(arrays)
            return scaled if bias is None else scaled + bias.value(arrays)

        return self._operation("norm", input, y), self._row(input, mean), self._row(input, rstd)

    def layernorm(
        self, norm_forward_phase: str, input: Tensor, scale: Tensor, bias: Tensor, epsilon: Tensor
    ) -> list[Tensor]:
        assert norm_forward_phase == "TRAINING"
        return list(self._norm(input, scale, bias, epsilon, centred=True))

    def rmsnorm(self, norm_forward_phase: str, input: Tensor, scale: Tensor, epsilon: Tensor) -> list[Tensor]:
        assert norm_forward_phase == "TRAINING"
        y, _, rstd = self._norm(input, scale, None, epsilon, centred=False)
        return [y, rstd]

    def layernorm_backward(
        self, grad: Tensor, input: Tensor, scale: Tensor, mean: Tensor | None, inv_variance: Tensor
    ) -> list[Tensor]:
        def xhat(arrays: Arrays) -> Any:
            centred = input.value(arrays) - (0 if mean is None else mean.value(arrays))
            return centred * inv_variance.value(arrays)

        def dx(arrays: Arrays) -> Any:
            g = grad.value(arrays) * scale.value(arrays)
            of_xhat = xhat(arrays) * (g * xhat(arrays)).mean((1, 2, 3), keepdims=True)
            of_mean = 0 if mean is None else g.mean((1, 2, 3), keepdims=True)
            return (g - of_mean - of_xhat) * inv_variance.value(arrays)

        return [
            self._operation("norm backward", input, dx),
            self._vector(input, lambda arrays: (grad.value(arrays) * xhat(arrays)).sum(0, keepdims=True)),
            self._vector(input, lambda arrays: grad.value(arrays).sum(0, keepdims=True)),
        ]

    def rmsnorm_backward(
        self, grad: Tensor, input: Tensor, scale: Tensor, inv_variance: Tensor, has_dbias: bool
    ) -> list[Tensor | None]:
        assert not has_dbias
        dx, dscale, _ = self.layernorm_backward(grad, input, scale, None, inv_variance)
        return [dx, dscale, None]

    def validate(self) -> None:
        assert self._operations
        assert self.outputs

    def build_operation_graph(self) -> None: ...

    def create_execution_plans(self, modes: Sequence[str]) -> None:
        assert modes
        norms = [name for name in self._operations if name.startswith("batchnorm")]
        last = self.outputs[-1]
        by_rows = len(last.dim) > 3 and last.stride[1] != 1
        if REFUSED_OPERATION in norms or (last.dim[1] == REFUSED_CHANNELS if norms else by_rows):
            raise cudnnGraphNotSupportedError(
                "no engine proposed a plan for this graph (the backend declined: No valid engine configs for _\n{}\n)"
            )

    def check_support(self) -> None: ...

    def build_plans(self) -> None:
        self._built = True

    def get_workspace_size(self) -> int:
        assert self._built
        return 0

    def execute(self, pack: dict[Tensor, Any], workspace: Any, handle: Handle) -> None:
        import cupy

        assert handle is self._handle
        assert handle.stream == cupy.cuda.get_current_stream().ptr
        assert workspace.dtype == np.uint8
        assert pack.keys() == {*self.inputs, *self.outputs}
        scalars = {t: ctypes.c_float.from_address(pack[t]).value for t in self.inputs if t.by_value}
        names = [t for t in self.inputs if not t.by_value]

        def work(*arrays: Any, out: tuple[Any, ...]) -> None:
            values = {t: t.view(array).astype(np.float64) for t, array in zip(names, arrays, strict=True)}
            values |= scalars
            found = [tensor.value(values) for tensor in self.outputs]
            for tensor, array, value in zip(self.outputs, out, found, strict=True):
                tensor.view(array)[...] = value

        run(work, tuple(pack[t] for t in names), {"out": tuple(pack[t] for t in self.outputs)})


def _others(x: Any) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))
