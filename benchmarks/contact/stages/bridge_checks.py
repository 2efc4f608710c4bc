"""Tries `cupybn.torch` on tensors of a GPU: gradients of both orders, memory, addresses, streams, threads, results."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
from typing import Any

import torch
from torch_measure import memory_format, results_off

import cupybn.torch
from contact.task import Task

TINY, LARGE = (3, 2, 2, 2), (16, 64, 56, 56)
"""Shapes for gradients by differences, and for the rest."""
EDGES = (5, 1, 3, 3), (1, 4, 3, 5), (6, 3, 1, 1), (3, 5, 7, 1), (0, 3, 2, 2)
"""Shapes with axes of length 1, of which DLPack gives other strides than PyTorch, and without elements."""
BESIDE = 1.05
"""Memory that a call takes, in sizes of its output, which is all that is as large: no input is copied."""
OFF = {"float32": 1e-5, "bfloat16": 2.0**-7}
"""Differences from the CPU that are allowed, as shares of the largest element: a few roundings, or one of 16 bits."""
NEAR = 0.05
"""Outputs of ReLU that are nearer to 0 than this may be rounded to it elsewhere."""
NAP = 50_000_000
"""Cycles of a GPU, some hundredths of a second, that a stream is kept busy with."""


def run(task: Task, device: str) -> None:
    """Try all that there is on a device; on the CPU, in a rehearsal, what a CPU has as well."""
    large = TINY if task.rehearse else LARGE
    for training, fused in itertools.product((True, False), repeat=2):
        name = f"gradcheck and gradgradcheck, {'training' if training else 'eval mode'}{', fused' if fused else ''}"
        with task.log.checking(name):
            gradients(device, training, fused)
    with task.log.checking("convert shares parameters and buffers, and they move in place"):
        addresses(device)
    for layout, dtype in itertools.product(("NCHW", "NHWC"), OFF):
        with task.log.checking(f"results as on the CPU, {layout} {dtype}") as details:
            details.append(f"{as_on_the_cpu(device, large, layout, dtype):.2g}")
    with task.log.checking("axes of length 1, no elements, an input that is not dense"):
        edges(device)
    with task.log.checking("the same bits in a thread that is new to the device"):
        new_thread(device, large)
    with task.log.checking("the same bits where what is saved was on the CPU in the meantime"):
        saved_elsewhere(device, large)
    if device == "cuda":
        with task.log.checking("memory is PyTorch's, and no more than the output") as details:
            details.append(f"{memory(large):.3f} of the output")
        with task.log.checking("work goes to PyTorch's current stream"):
            stream(large)
        with task.log.checking("so does that of the way back"):
            stream_of_the_way_back(large)
        with task.log.checking("CuPy's stream, device and allocator are as they were"):
            surroundings()
        with task.log.checking("what a step takes is given back"):
            leaks(large)
    else:
        task.log.skip("memory and streams of PyTorch: no GPU")


def gradients(device: str, training: bool, fused: bool) -> None:
    """Compare gradients of first and second order with differences, in float64."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Any:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device).requires_grad_()

    x, residual, weight, bias = leaf(*TINY), leaf(*TINY), leaf(TINY[1]), leaf(TINY[1])
    mean, var = leaf(TINY[1]).detach(), leaf(TINY[1]).detach() ** 2 + 0.5
    buffers = (None, None) if training else (mean, var)

    def function(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        options: dict[str, Any] = {"residual": residual, "activation": "relu"} if fused else {}
        return cupybn.torch.batch_norm(x, *buffers, weight, bias, training, **options)

    leaves = (x, weight, bias, residual) if fused else (x, weight, bias)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def addresses(device: str) -> None:
    """Check that a converted layer has the memory of the layer that it was, before a step and after it."""
    layer = torch.nn.BatchNorm2d(TINY[1]).to(device)
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    converted = cupybn.torch.convert(torch.nn.Sequential(layer))[0]
    assert type(converted) is cupybn.torch.BatchNorm2d, type(converted)
    converted(torch.randn(TINY, device=device)).sum().backward()
    after = {name: tensor.data_ptr() for name, tensor in converted.state_dict().items()}
    assert after == before, f"{before} became {after}"
    assert int(converted.num_batches_tracked) == 1
    assert bool((converted.running_mean != 0).all()), "running_mean has not moved"
    assert converted.weight.grad is not None


def as_on_the_cpu(device: str, shape: tuple[int, ...], layout: str, dtype: str) -> float:
    """Compare a training step with that of the CPU. Returns the largest difference, relative to the largest element."""
    generator, order = torch.Generator().manual_seed(0), memory_format(layout)
    x, dy = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    layer = cupybn.torch.BatchNorm2d(shape[1], activation="relu")
    found = []
    clear: Any = None
    for where in (device, "cpu"):
        of_side = copy.deepcopy(layer).to(where)
        leaf = x.to(where).contiguous(memory_format=order).requires_grad_()
        y = of_side(leaf, residual=leaf.detach().flip(0).contiguous(memory_format=order))
        if clear is None:  # where the argument of ReLU is near 0, rounding decides: no gradient is sent back there
            clear = (y.detach().cpu() > NEAR).to(y.dtype)
        gradients = torch.autograd.grad(y, (leaf, of_side.weight, of_side.bias), (dy * clear).to(where))
        for tensor in (y, gradients[0]):
            assert tensor.is_contiguous(memory_format=order), f"strides {tensor.stride()}"
            assert tensor.device == leaf.device
        found.append([tensor.cpu() for tensor in (y, *gradients, of_side.running_mean, of_side.running_var)])
    off = results_off(*found)
    assert off <= OFF[dtype], f"off by {off} of the largest element"
    return off


def step(device: str, shape: tuple[int, ...], order: Any = torch.contiguous_format) -> list[Any]:
    """Output and gradients of a fused step, and the gradient of a penalty on the input's: the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, generator=generator).to(device).clone(memory_format=order) for _ in range(3))
    layer = cupybn.torch.BatchNorm2d(shape[1], activation="relu").to(device)
    leaf = x.requires_grad_()
    y = layer(leaf, residual)
    first = torch.autograd.grad(y, (leaf, *layer.parameters()), dy, create_graph=True)
    return [y, *first, *torch.autograd.grad(first[0].square().sum(), leaf), *layer.buffers()]


def same_bits(found: list[Any], expected: list[Any]) -> None:
    """Check that tensors are equal, bit by bit."""
    equal = [torch.equal(*pair) for pair in zip(found, expected, strict=True)]
    assert all(equal), f"equal: {equal}"


def edges(device: str) -> None:
    """Compare results for special shapes with those of the CPU: values and strides."""
    for shape, order in itertools.product(EDGES, (torch.contiguous_format, torch.channels_last)):
        found, expected = step(device, shape, order), step("cpu", shape, order)
        strides = [[tensor.stride() for tensor in of_side] for of_side in (found, expected)]
        assert strides[0] == strides[1], f"{shape}: strides {strides[0]}, on the CPU {strides[1]}"
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    x = torch.randn(4, 3, 5, 7, device=device)
    function = cupybn.torch.batch_norm
    for view in (x[:, :, 1:, ::2], x[:1].expand(4, 3, 5, 7), x.transpose(2, 3)):
        y = function(view, None, None, training=True)
        torch.testing.assert_close(y, function(view.contiguous(), None, None, training=True), rtol=1e-5, atol=1e-5)


def new_thread(device: str, shape: tuple[int, ...]) -> None:
    """Check a step in a thread that has done nothing on the device, though its kernels are loaded."""
    expected = step(device, shape)
    layer = cupybn.torch.BatchNorm2d(shape[1]).to(device)
    x = torch.randn(shape, device=device)
    outputs, found = [layer(x)], []

    def work() -> None:
        outputs.append(layer(x))  # first: a copy to the device would make it known to the thread
        found.extend(step(device, shape))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(outputs) == 2, "an error in the thread, see the output"
    same_bits(outputs[1:], outputs[:1])
    same_bits(found, expected)


def saved_elsewhere(device: str, shape: tuple[int, ...]) -> None:
    """Check a step whose saved tensors come back in new memory."""
    expected = step(device, shape)
    with torch.autograd.graph.save_on_cpu():
        found = step(device, shape)
    same_bits(found, expected)


def memory(shape: tuple[int, ...]) -> float:
    """Check where the memory of a call comes from. Returns how much it is, in sizes of the output."""
    import cupy

    pool = cupy.get_default_memory_pool()
    layer = cupybn.torch.BatchNorm2d(shape[1]).cuda()
    x = torch.randn(shape, device="cuda")
    layer(x)  # compiles the kernels
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    of_cupy, of_torch = pool.total_bytes(), torch.cuda.memory_allocated()
    y = layer(x)
    torch.cuda.synchronize()
    assert pool.total_bytes() == of_cupy, f"CuPy's pool grew by {pool.total_bytes() - of_cupy} bytes"
    taken = torch.cuda.memory_allocated() - of_torch
    assert taken >= y.nbytes, f"PyTorch's allocator has given {taken} bytes for an output of {y.nbytes}"
    most = (torch.cuda.max_memory_allocated() - of_torch) / y.nbytes
    assert most <= BESIDE, f"{most} times the memory of the output"
    return float(most)


def stream(shape: tuple[int, ...]) -> None:
    """Check that a call waits for what was before it on PyTorch's current stream, which is busy."""
    layer = cupybn.torch.BatchNorm2d(shape[1]).cuda().eval()
    old, new = (torch.randn(shape, device="cuda") for _ in range(2))
    expected = layer(new)
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(NAP)
        old.copy_(new)
        y = layer(old)
    busy.synchronize()
    assert torch.equal(y, expected), "the layer did not wait for its input"


def stream_of_the_way_back(shape: tuple[int, ...]) -> None:
    """Check that the way back waits for the gradient of the output, on the stream of the way forward, which is busy."""
    layer = cupybn.torch.BatchNorm2d(shape[1]).cuda()
    x, old, new = (torch.randn(shape, device="cuda") for _ in range(3))
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x), (x, layer.weight), new)
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        y = layer(x)
        torch.cuda._sleep(NAP)
        old.copy_(new)
        found = torch.autograd.grad(y, (x, layer.weight), old)
    busy.synchronize()
    same_bits([*found], [*expected])


def surroundings() -> None:
    """Check that a step leaves what a program has chosen for CuPy, also a stream that is chosen without a context."""
    import cupy

    def chosen() -> tuple[Any, ...]:
        return cupy.cuda.get_current_stream(), cupy.cuda.runtime.getDevice(), cupy.cuda.get_allocator()

    mine, outside = cupy.cuda.Stream(non_blocking=True), cupy.cuda.get_current_stream()
    mine.use()
    try:
        before = chosen()
        step("cuda", TINY)
        assert chosen() == before, f"{before} became {chosen()}"
    finally:
        outside.use()


def leaks(shape: tuple[int, ...]) -> None:
    """Check that nothing of a step stays in memory, without a look for cycles."""
    step("cuda", shape)
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for _ in range(3):
            step("cuda", shape)
        taken = torch.cuda.memory_allocated() - before
    finally:
        gc.enable()
    assert taken == 0, f"{taken} bytes after 3 steps"
