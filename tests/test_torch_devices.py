"""Tensors on CUDA devices: the whole road, with CPU tensors in their place on the stand-in for CuPy, and on a GPU.

What PyTorch says of devices is in one module, `cupybn.torch.devices`. Here its functions say of CPU tensors that they
are on a device of the stand-in, whose memory is that of the host.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cupy as cp  # noqa: E402

import cupybn.torch  # noqa: E402
from cupybn._calls import flow, second  # noqa: E402
from cupybn._calls.call import _cache  # noqa: E402
from cupybn._calls.saved import Saved  # noqa: E402
from cupybn.torch import BatchNorm2d, arrays, batch_norm, devices  # noqa: E402

PRETENDED = hasattr(cp, "emulator")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Pretended:
    """What a pretended PyTorch has been asked for."""

    def __init__(self, index):
        self.index = index
        with cp.cuda.Device(index):
            self.stream = cp.cuda.Stream()
        self.memory = []  # weak references to what was given
        self.exported = []  # addresses of tensors that have gone to CuPy

    def cuda_index(self, tensor):
        assert tensor.device.type == "cpu"
        return self.index

    def current_stream(self, index):
        assert index == self.index
        return self.stream.ptr

    def new_memory(self, nbytes, index):
        assert index == self.index == cp.cuda.runtime.getDevice()
        buffer = np.empty(nbytes, np.uint8)
        self.memory.append(weakref.ref(buffer))
        return torch.from_numpy(buffer)

    def to_dlpack(self, tensor):
        """A capsule that says of host memory that it is the device's."""
        from cupy._dlpack import CUDA, managed_tensor

        capsule = torch.utils.dlpack.to_dlpack(tensor)
        managed = managed_tensor(capsule)
        managed.device_type, managed.device_id = CUDA, self.index
        self.exported.append(tensor.data_ptr())
        return capsule

    def alive(self):
        """Bytes of the memory that is still in use."""
        gc.collect()
        return sum(buffer().nbytes for buffer in self.memory if buffer() is not None)


@pytest.fixture(params=[0, 1])
def pretended(request, monkeypatch):
    """CPU tensors are on a device of the stand-in, which has two."""
    if not PRETENDED:
        pytest.skip("there is a GPU")
    with cp.emulator.pretend(cp.emulator.H200, cp.emulator.H200):
        pretended = Pretended(request.param)
        for name in "cuda_index", "current_stream", "new_memory", "to_dlpack":
            monkeypatch.setattr(devices, name, getattr(pretended, name))
        yield pretended


def network_step(x, residual, layer):
    """Output and gradients of a step, and those of a penalty on the gradient of the input."""
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = layer(x, residual)
    first = torch.autograd.grad((y.double() ** 2).sum(), (x, residual, *layer.parameters()), create_graph=True)
    second = torch.autograd.grad((first[0].double() ** 2).sum(), (x, *layer.parameters()), allow_unused=True)
    return [y, *first, *second[:-1], *layer.buffers()]


@pytest.mark.parametrize("last", [False, True])
def test_the_whole_road(pretended, last):
    """Kernels get tensors' own memory, on the current stream and device, and give what NumPy's road gives.

    The second time launches are played from tapes.
    """
    memory_format = torch.channels_last if last else torch.contiguous_format
    x, residual = (torch.randn(4, 3, 5, 5).to(memory_format=memory_format) for _ in range(2))
    layer = BatchNorm2d(3, activation="relu")
    outside = cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream(), cp.cuda.get_allocator()
    pool = [cp.emulator.usage(index).allocations for index in (0, 1)]
    found = []
    for _ in range(2):
        with cp.emulator.record() as launches, cp.emulator.record_syncs() as syncs:
            found.append(network_step(x, residual, layer))
        assert {launch.device for launch in launches} == {pretended.index}
        assert {launch.stream for launch in launches} == {pretended.stream.ptr}
        assert {launch.name for launch in launches} >= {"bn_double_backward_reduce", "bn_double_backward_input"}
        assert syncs == []
    assert (cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream(), cp.cuda.get_allocator()) == outside
    assert [cp.emulator.usage(index).allocations for index in (0, 1)] == pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cuda_index", lambda _: None)
        other = BatchNorm2d(3, activation="relu")
        expected = [network_step(x, residual, other) for _ in range(2)]
    for mine, theirs in zip(found, expected, strict=True):
        for tensor, reference in zip(mine, theirs, strict=True):
            assert tensor.stride() == reference.stride()
            scale = reference.detach().abs().max().item() if reference.is_floating_point() else 0
            torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-5 * scale)


def test_memory(pretended, monkeypatch):
    """Arrays are at the addresses of tensors, results in memory that PyTorch gave, and the rest is given back."""
    seen = {}

    def noting(module, name):
        def call(*arguments):
            assert cp.cuda.get_current_stream() == pretended.stream
            seen[name] = arguments, function(*arguments)
            return seen[name][1]

        function = getattr(module, name)
        monkeypatch.setattr(module, name, call)

    for module, name in (flow, "forward_and_saved"), (flow, "backward"), (second, "double_backward"):
        noting(module, name)
    x, residual, weight = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.ones(6)[::2]
    mean, var = torch.zeros(3), torch.ones(3)
    for tensor in x, weight:
        tensor.requires_grad_()
    y = batch_norm(x, mean, var, weight, None, True, residual=residual, activation="relu")
    (call,), (array, saved) = seen["forward_and_saved"]
    assert isinstance(saved, Saved)
    given = (call.input, call.affine.weight, call.epilogue.residual, *call.running[:2])
    assert [each.data.ptr for each in given] == [each.data_ptr() for each in (x, weight, residual, mean, var)]
    assert call.affine.weight.strides == (8,)
    assert array.data.ptr == y.data_ptr()
    assert not y._is_view()
    owned = {buffer().ctypes.data for buffer in pretended.memory if buffer() is not None}
    assert y.data_ptr() in owned
    assert y.untyped_storage().data_ptr() == y.data_ptr()

    dy = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (again, grad_output), gradients = seen["backward"]
    assert (again.input.data.ptr, grad_output.data.ptr) == (x.data_ptr(), dy.data_ptr())
    assert again.pairs.data.ptr == saved.pairs.data.ptr
    assert gradients[0].data.ptr == dx.data_ptr()
    results = torch.autograd.grad(dx, (dy, x), torch.randn_like(dx))
    found = seen["double_backward"][1]
    assert [each.data.ptr for each in found[:2]] == [each.data_ptr() for each in results]

    seen.clear()
    del call, array, saved, again, grad_output, gradients, found, given, results, dx
    nbytes = y.nbytes
    y = y.detach()
    assert pretended.alive() == nbytes  # neither scratch nor what was saved
    del y
    assert pretended.alive() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_dtype(pretended, dtype):
    """Tensors become arrays and arrays tensors without a copy, whatever their strides and offsets, also empty ones."""
    for tensor in (
        torch.randn(2, 3, 4).to(dtype),
        torch.randn(4, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(6, 3).to(dtype)[1::2, 1:].requires_grad_(),
        torch.randn(1, 3).to(dtype).expand(4, 3),
    ):
        with arrays.where(tensor) as place:
            array = place.array(tensor)
            assert array.data.ptr == tensor.data_ptr()
            assert array.strides == tuple(stride * tensor.element_size() for stride in tensor.stride())
            assert array.dtype.name == str(dtype).removeprefix("torch.")
            assert array.device.id == pretended.index
            made = cp.empty(array.shape, array.dtype)
            made[...] = array
            found = place.tensor(made)
            part = place.tensor(made[1:])
        assert torch.equal(found, tensor)
        assert torch.equal(part, tensor[1:])
        assert (found.dtype, found.data_ptr(), found._is_view()) == (dtype, made.data.ptr, False)
        assert part.data_ptr() == found[1:].data_ptr()
    for shape in (0, 3), (2, 0, 3):
        empty = torch.empty(shape, dtype=dtype)
        with arrays.where(empty) as place:
            assert place.array(empty).shape == shape
            found = place.tensor(cp.empty(shape, place.array(empty).dtype))
        assert (found.shape, found.dtype) == (shape, dtype)


def test_a_gradient_that_goes_through_a_sum(pretended):
    """The gradient of a residual without ReLU is that of the output itself, whoever owns its memory."""
    x, residual = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 3, 5, 5)
    y = batch_norm(x, None, None, training=True, residual=residual)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    assert dresidual.data_ptr() == dy.data_ptr()
    owned = {buffer().ctypes.data for buffer in pretended.memory if buffer() is not None}
    assert {y.data_ptr(), dx.data_ptr()} <= owned


def test_bfloat16(pretended):
    x = torch.randn(4, 3, 5, 5).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    y = BatchNorm2d(3)(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cuda_index", lambda _: None)
        expected = BatchNorm2d(3)(x)
    assert y.dtype is torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-6)  # a value near the middle of two may go either way
    assert pretended.exported


def test_hooks_that_bring_back_other_strides(pretended):
    """Tapes were recorded with the strides of the way forward: with others, the way back takes its steps anew."""
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6)[::2].detach().requires_grad_()
    gradients = []
    for hooks in (
        None,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.contiguous().clone(), lambda t: t),
    ):
        for _ in range(2):
            with hooks if hooks is not None else torch.enable_grad():
                y = batch_norm(x, None, None, weight, training=True)
            gradients.append(torch.autograd.grad((y**2 * x.detach()).sum(), (x, weight)))
    assert pretended.exported
    for others in gradients[1:]:
        for mine, theirs in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def step_with_record(x, weight, meanwhile=lambda *_: None):
    """Gradients of a step with a record of ReLU, whose packs are of 16 bytes; something happens before the way back."""
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = batch_norm(leaves[0], None, None, leaves[1], training=True, residual=x.flip(0), activation="relu")
    meanwhile(*leaves)
    return torch.autograd.grad(y, leaves, x.flip(1))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("tapes", [False, True])
def test_hooks_that_bring_back_tensors_elsewhere(tapes):
    """Packs that a record is of begin at their multiples, and statistics are contiguous, wherever hooks bring them."""

    def elsewhere(tensor):
        memory = torch.empty(tensor.nbytes + 32, dtype=torch.uint8)
        begin = -memory.data_ptr() % 16 + tensor.element_size()
        moved = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        moved.copy_(tensor)
        assert moved.data_ptr() % 16 != 0
        return moved.t().contiguous().t() if tensor.dtype == torch.float64 else moved

    x, weight = torch.randn(4, 4, 4, 4), torch.randn(4)
    expected = step_with_record(x, weight)
    if not tapes:
        _cache.clear()
    with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda tensor: tensor):
        found = step_with_record(x, weight)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("meanwhile", "words"),
    [
        (lambda x, _: setattr(x, "data", x.data[:1]), r"the input .*shape \(4, 4, 4, 4\), .*got shape \(1, 4, 4, 4\)"),
        (lambda _, weight: setattr(weight, "data", weight.data[:3]), r"the weight .*got shape \(3,\), torch.float32"),
        (lambda _, weight: setattr(weight, "data", weight.data.double()), r"the weight .*\(4,\), torch.float64 on"),
    ],
    ids=["input", "weight", "dtype"],
)
def test_data_that_are_replaced(meanwhile, words):
    """`tensor.data = other` is not seen by autograd. Nothing is launched then that would read beyond the end."""
    x, weight = torch.randn(4, 4, 4, 4), torch.randn(4)
    step_with_record(x, weight)  # records tapes
    found = []

    def replaced(*leaves):
        meanwhile(*leaves)
        found.append(stack.enter_context(cp.emulator.record()))

    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match=words):
        step_with_record(x, weight, replaced)
    assert found == [[]]


def test_a_thread_that_is_new_to_cuda(pretended, monkeypatch):
    """A new thread has no context of CUDA, not even of device 0, which is its current one: a call makes one first."""
    chosen = []
    original = cp.cuda.runtime.setDevice
    monkeypatch.setattr(cp.cuda.runtime, "setDevice", lambda index: (chosen.append(index), original(index)))

    def enter():
        with arrays.where(torch.zeros(3)):
            assert chosen[-1:] == [pretended.index]
            entered.append(True)

    entered = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


@pytest.mark.parametrize("by", ["use", "with"])
def test_streams_that_a_program_has_chosen_for_cupy(pretended, by):
    """A stream and a device that were chosen stay, by whichever of CuPy's two ways that was."""
    with cp.cuda.Device(pretended.index), contextlib.ExitStack() as stack:
        mine, before = cp.cuda.Stream(), cp.cuda.get_current_stream()
        stack.callback(before.use)
        if by == "use":
            mine.use()
        else:
            stack.enter_context(mine)
        for x in torch.randn(4, 3), torch.randn(4, 3, requires_grad=True):
            with cp.emulator.record() as launches:
                y = batch_norm(x, None, None, training=True)
                if y.requires_grad:
                    y.sum().backward()
            assert {launch.stream for launch in launches} == {pretended.stream.ptr}
            assert cp.cuda.get_current_stream() is mine


def test_errors_leave_streams_and_allocators(pretended):
    outside = cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream(), cp.cuda.get_allocator()
    with pytest.raises(ValueError, match="weight should contain 3 elements"):
        batch_norm(torch.zeros(4, 3), None, None, torch.ones(2), training=True)
    assert (cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream(), cp.cuda.get_allocator()) == outside
    assert pretended.alive() == 0


def test_threads(pretended):
    """Each thread has its own stream and allocator: calls on several do not meet."""
    x = torch.randn(4, 3, 5, 5)
    expected = batch_norm(x, None, None, training=True)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(batch_norm(x, None, None, training=True))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(y, expected) for y in found)
    assert pretended.exported


def test_without_cupy(pretended, monkeypatch):
    monkeypatch.setattr(arrays, "cuda_missing", lambda: "CuPy cannot be imported")
    with pytest.raises(RuntimeError, match=rf"on cuda:{pretended.index} need CuPy, too: CuPy cannot be imported"):
        batch_norm(torch.zeros(4, 3), None, None, training=True)


def test_what_the_stand_in_takes():
    """DLPack on the stand-in is as CuPy has it: a capsule of CPU memory is refused, one is taken once."""
    if not PRETENDED:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="CuPy is built against CUDA"):
        cp.from_dlpack(torch.utils.dlpack.to_dlpack(torch.zeros(3)))
    with pytest.raises(TypeError, match="CPU arrays cannot be directly imported to CuPy"):
        cp.from_dlpack(np.zeros(3))
    with pytest.raises(TypeError, match="does not implement the CUDA stream protocol"):
        cp.cuda.Stream.from_external(object())
    with pytest.raises(RuntimeError, match="requires explicit device ID"):
        cp.cuda.UnownedMemory(0, 0, None)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

GPU = pytest.mark.skipif(PRETENDED or not torch.cuda.is_available(), reason="needs a GPU that PyTorch and CuPy can use")


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_cuda_tensors(dtype, last):
    """Outputs, gradients and statistics are those of the CPU, within roundings of the dtype."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    x, residual = (torch.randn(8, 16, 9, 9).to(dtype).to(memory_format=memory_format) for _ in range(2))
    found, expected = (
        network_step(x.to(device), residual.to(device), BatchNorm2d(16, activation="relu").to(device))
        for device in ("cuda", "cpu")
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device.type == "cuda"
        assert mine.stride() == theirs.stride()
        scale = theirs.detach().abs().max().item() if theirs.is_floating_point() else 0
        eps = max(torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=64 * eps * scale)


@GPU
def test_cuda_memory_is_torchs(monkeypatch):
    """Arrays are at tensors' addresses, and CuPy's pool gives nothing."""
    seen = []
    original = flow.forward_and_saved
    monkeypatch.setattr(flow, "forward_and_saved", lambda call: seen.append(call) or original(call))
    x = torch.randn(8, 16, 9, 9, device="cuda", requires_grad=True)
    batch_norm(x, None, None, training=True).sum().backward()  # what is allocated once, is allocated now
    pool = cp.get_default_memory_pool().used_bytes()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = batch_norm(x, None, None, training=True)
    assert seen[-1].input.data.ptr == x.data_ptr()
    assert y.nbytes <= torch.cuda.memory_allocated() - before < y.nbytes + (1 << 16)
    y.sum().backward()
    del y
    seen.clear()
    assert torch.cuda.memory_allocated() == before
    assert cp.get_default_memory_pool().used_bytes() == pool


@GPU
def test_cuda_streams():
    """Work is on torch's current stream, in its order, in both directions, without a wait of the host."""
    stream = torch.cuda.Stream()
    x = torch.randn(64, 64, 56, 56, device="cuda")
    expected = batch_norm(x * 2 + 1, None, None, training=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(10):
            late = x.clone()
            torch.cuda._sleep(1_000_000)
            late.mul_(2).add_(1).requires_grad_()
            y = batch_norm(late, None, None, training=True)
            y.sum().backward()
            result, gradient = y.detach() + 0, late.grad + 0
            del y, late
    stream.synchronize()
    torch.testing.assert_close(result, expected)
    assert gradient.isfinite().all()
    assert cp.cuda.get_current_stream() == cp.cuda.Stream.null


@GPU
def test_cuda_outputs_know_their_streams():
    """`record_stream` holds the memory of an output back until another stream is done with it."""
    stream = torch.cuda.Stream()
    x = torch.randn(64, 64, 56, 56, device="cuda")
    y = batch_norm(x, None, None, training=True)
    expected, address = y.clone(), y.data_ptr()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copied = y.clone()
    y.record_stream(stream)
    del y
    other = torch.zeros_like(x)
    assert other.data_ptr() != address
    torch.cuda.synchronize()
    assert torch.equal(copied, expected)


@GPU
def test_cuda_gradients():
    for activation in None, "relu":
        x, weight, bias, residual = (
            torch.randn(shape, dtype=torch.float64, device="cuda", requires_grad=True)
            for shape in ((4, 3, 2, 2), (3,), (3,), (4, 3, 2, 2))
        )

        def function(x, weight, bias, residual, activation=activation):
            return batch_norm(x, None, None, weight, bias, True, residual=residual, activation=activation)

        assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
        assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


@GPU
def test_cuda_autocast_and_compilation():
    layers = (torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(inplace=True))
    model = cupybn.torch.convert(torch.nn.Sequential(*layers)).cuda()
    x = torch.randn(8, 3, 16, 16, device="cuda")
    for dtype in torch.float16, torch.bfloat16:
        for each in model, torch.compile(model):
            with torch.autocast("cuda", dtype):
                y = each(x)
            assert y.dtype is dtype
            y.float().pow(2).sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())


@GPU
def test_cuda_and_cpu_tensors_do_not_mix():
    with pytest.raises(TypeError, match=r"weight to be on cuda:0 like input \(got a tensor on cpu\)"):
        batch_norm(torch.zeros(4, 3, device="cuda"), None, None, torch.ones(3), training=True)
    with pytest.raises(TypeError, match=r"expected input on cuda:0, as the layer is"):
        BatchNorm2d(3).cuda()(torch.zeros(4, 3, 2, 2))
