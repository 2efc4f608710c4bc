"""Batch norm of tensors as a function: gradients of first and second order, memory, what autograd saves, and errors."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import cupybn  # noqa: E402
import cupybn.functional as F  # noqa: E402
from cupybn._calls import flow, second  # noqa: E402
from cupybn.torch import BatchNorm1d, batch_norm  # noqa: E402

SHAPES = {"nc": (5, 3), "ncl": (2, 3, 4), "nchw": (2, 3, 2, 2), "ncdhw": (2, 3, 2, 1, 2)}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def in_format(tensor, last):
    """A leaf of the same values, channels last or contiguous."""
    memory_format = FORMATS[tensor.ndim] if last else torch.contiguous_format
    return tensor.detach().contiguous(memory_format=memory_format).requires_grad_(tensor.requires_grad)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "last"),
    [*((shape, False) for shape in SHAPES.values()), (SHAPES["nchw"], True), (SHAPES["ncdhw"], True)],
    ids=str,
)
def test_gradients_of_first_and_second_order(shape, last, training):
    """What autograd gets is what finite differences say: with all that a call may have, and with nothing."""
    running = (torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5)
    choices = itertools.product((None, "relu"), (True, False), (True, False))
    for activation, has_residual, affine in (
        choices if shape == (5, 3) else ((None, False, False), ("relu", True, True))
    ):
        x, residual = (in_format(leaf(*shape), last) for _ in range(2))
        names = ["input", *(["weight", "bias"] if affine else []), *(["residual"] if has_residual else [])]
        given = {"input": x, "weight": leaf(3), "bias": leaf(3), "residual": residual}
        tensors = [given[name] for name in names]

        def function(*tensors, names=names, activation=activation):
            statistics = dict(zip(("running_mean", "running_var"), (None, None) if training else running, strict=True))
            named = dict(zip(names, tensors, strict=True))
            return batch_norm(**named, **statistics, training=training, activation=activation)

        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_second_order_is_that_of_torch(training, dtype):
    """Gradients of a gradient penalty are those of torch's own way back of the way back, with ReLU behind it."""
    x, residual, weight, bias = leaf(6, 3, 4, 4), leaf(6, 3, 4, 4), leaf(3), leaf(3)
    running = (torch.randn(3).double(), torch.rand(3).double() + 0.5)
    penalties = {}
    for ours in True, False:
        given = [each.detach().to(dtype).requires_grad_() for each in (x, residual, weight, bias)]
        y = output(ours, given, [each.to(dtype) for each in running], training)
        first = torch.autograd.grad((y**3).sum(), given, create_graph=True)
        penalty = sum((grad**2).sum() for grad in first)
        penalties[ours] = torch.autograd.grad(penalty, given)
    for mine, theirs in zip(*penalties.values(), strict=True):
        scale = theirs.abs().max()
        # torch rounds what is between the two orders, and its statistics, to the dtype: some dozens of roundings.
        assert (mine - theirs).abs().max() <= 100 * torch.finfo(dtype).eps * scale


def output(ours, given, running, training):
    x, residual, weight, bias = given
    if ours:
        return batch_norm(x, *running, weight, bias, training, residual=residual, activation="relu")
    y = torch.nn.functional.batch_norm(x, *(each.clone() for each in running), weight, bias, training)
    return torch.relu(y + residual)


def test_only_what_is_asked_for():
    """A gradient that nobody wants is None, whichever it is, in both orders."""
    for wanted in itertools.product((True, False), repeat=4):
        given = [leaf(4, 3), leaf(3), leaf(3), leaf(4, 3)]
        for each, is_wanted in zip(given, wanted, strict=True):
            each.requires_grad_(is_wanted)
        x, weight, bias, residual = given
        y = batch_norm(x, None, None, weight, bias, training=True, residual=residual, activation="relu")
        assert y.requires_grad == any(wanted)
        leaves = [each for each in given if each.requires_grad]
        if leaves:
            first = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
            sum((grad**2).sum() for grad in first).backward()
        assert [each.grad is not None for each in given] == list(wanted)


def test_third_order_is_an_error():
    """An error comes also where the gradient of the input alone is asked for, and other ways lead there."""
    x = leaf(5, 3)
    y = batch_norm(x, None, None, training=True)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third order of batch norm are not implemented"):
        torch.autograd.grad(second.sum(), x)
    dy = leaf(5, 3)
    (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.randn(5, 3)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third order"):
        torch.autograd.grad(second.sum(), dy, allow_unused=True)


@pytest.mark.parametrize("last", [True, False])
def test_accuracy_at_a_large_mean(last):
    """Outputs and gradients are within the bounds of the library, where torch is far off."""
    x = in_format(torch.randn(8, 4, 16, 16, requires_grad=True) + 1e4, last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dy = torch.randn(x.shape)
    y, expected = (
        batch_norm(x, None, None, training=True),
        torch.nn.functional.batch_norm(exact, None, None, None, None, True),
    )
    y.backward(dy)
    expected.backward(dy.double())
    assert ((y - expected).abs() <= 1e-6 + 2**-22 * expected.abs()).all()
    bound = 3e-6 * torch.maximum(exact.grad.abs(), dy.abs().amax((0, 2, 3), keepdim=True))  # stds are 1
    assert ((x.grad - exact.grad).abs() <= bound).all()
    theirs = torch.nn.functional.batch_norm(x.detach(), None, None, None, None, True)
    assert ((theirs - expected).abs() > 1e-4).any()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_copy_on_the_cpu(dtype, monkeypatch):
    """What the library gets and returns is at the addresses that torch sees, there and back."""
    seen = {}

    def noting(module, name):
        def call(*arguments):
            results = function(*arguments)
            seen[name] = arguments, results
            return results

        function = getattr(module, name)
        monkeypatch.setattr(module, name, call)

    for name in "forward", "forward_and_saved", "backward":
        noting(flow, name)
    noting(second, "double_backward")
    for shape, last in (
        *((shape, False) for shape in SHAPES.values()),
        (SHAPES["nchw"], True),
        (SHAPES["ncdhw"], True),
    ):
        x, residual = (in_format(leaf(*shape, dtype=dtype), last) for _ in range(2))
        vectors = [torch.ones(6, dtype=dtype)[::2].detach() for _ in range(4)]
        mean, var, weight, bias = vectors
        weight.requires_grad_()
        seen.clear()
        y = batch_norm(x, mean, var, weight, bias, training=True, residual=residual, activation="relu")
        ((call,), (array, saved)) = seen["forward_and_saved"]
        given = (x, residual, weight, bias, mean, var)
        arrays = (call.input, call.epilogue.residual, *call.affine[:2], *call.running[:2])
        for tensor, each in zip((*given, y), (*arrays, array), strict=True):
            assert (tensor.data_ptr(), tensor.stride()) == (address(each), strides(each))
        assert saved.input is call.input
        assert saved.affine.weight is call.affine.weight
        assert y.stride() == x.stride()

        dy = in_format(torch.randn(shape, dtype=dtype), last).requires_grad_()
        grads = torch.autograd.grad(y, (x, residual, weight), dy, create_graph=True)
        (again, grad_output), found = seen["backward"]
        assert (address(again.input), address(again.affine.weight)) == (x.data_ptr(), weight.data_ptr())
        assert address(again.pairs) == address(saved.pairs)
        assert address(again.epilogue.passed) == address(saved.epilogue.passed)
        assert address(grad_output) == dy.data_ptr()
        assert [address(found[i]) for i in (0, 3, 1)] == [grad.data_ptr() for grad in grads]
        assert grads[0].stride() == grads[1].stride() == x.stride()

        cotangents = [torch.randn_like(grad) for grad in grads]
        results = torch.autograd.grad(grads, (dy, x, weight), cotangents)
        (again, grad_output, (cdx, cdweight, cdbias, cdresidual)), found = seen["double_backward"]
        assert (address(again.input), address(grad_output)) == (x.data_ptr(), dy.data_ptr())
        assert [address(each) for each in (cdx, cdresidual, cdweight)] == [each.data_ptr() for each in cotangents]
        assert cdbias is None
        assert [address(each) for each in found] == [each.data_ptr() for each in results]
        assert results[0].stride() == results[1].stride() == x.stride()

        with torch.no_grad():
            y = batch_norm(x, mean, var)
        assert address(seen["forward"][1]) == y.data_ptr()


def strides(array):
    return tuple(stride // array.itemsize for stride in array.strides)


def test_an_input_that_is_not_dense_is_copied_once():
    """The copy keeps the order of the axes, as torch's output does, and gradients go back to where the input is."""
    whole = in_format(leaf(2, 6, 3, 3), True)
    x = whole[:, ::2]
    y = batch_norm(x, None, None, training=True)
    theirs = torch.nn.functional.batch_norm(x, None, None, None, None, True)
    assert y.stride() == theirs.stride()
    assert y.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn(y.shape).double()
    grads = [torch.autograd.grad((each * weights).sum(), whole, create_graph=True)[0] for each in (y, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(grads[0][:, 1::2]) == 0
    seconds = [torch.autograd.grad((grad * whole.detach()).sum(), whole)[0] for grad in grads]
    torch.testing.assert_close(*seconds, rtol=1e-12, atol=1e-12)


def test_memory_formats_where_a_channel_has_one_position():
    """Strides of axes of length 1, or of no elements, tell torch the memory format: they stay, too."""
    for shape, last, dtype in itertools.product(
        ((2, 3, 1, 1), (2, 1, 3, 3), (1, 3, 2, 2), (0, 3, 2, 2)), (True, False), (torch.float32, torch.bfloat16)
    ):
        x = in_format(leaf(*shape, dtype=dtype), last)
        y = batch_norm(x, None, None, training=True)
        y.backward(torch.ones_like(y), retain_graph=True)
        assert y.stride() == x.grad.stride() == x.stride()
        dy = torch.ones_like(y, requires_grad=True)
        (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
        for grad in torch.autograd.grad(first, (x, dy), torch.ones_like(x)):
            assert grad.stride() == x.stride()


def test_strides_of_axes_of_length_1_make_no_copy():
    x = torch.randn(4, 3, 2).as_strided((4, 3, 1, 2), (6, 1, 100, 3)).requires_grad_()
    assert not x.is_contiguous()
    y = batch_norm(x, None, None, training=True)
    assert y.stride() == x.stride()
    assert y.grad_fn.saved_tensors[0] is x


def test_what_tensors_may_have_beside_elements():
    """Gradients of a sum have stride 0, and views of complex numbers a bit for their sign: values are what count."""
    x, imaginary = leaf(4, 3), torch.randn(4, 3, dtype=torch.complex128).conj().imag
    assert imaginary.is_neg()
    expected = batch_norm(imaginary.clone(), None, None, training=True)
    torch.testing.assert_close(batch_norm(imaginary, None, None, training=True), expected, rtol=0, atol=0)
    y = batch_norm(x, None, None, training=True, residual=imaginary)
    y.backward(imaginary)
    (theirs,) = torch.autograd.grad(
        torch.nn.functional.batch_norm(x, None, None, None, None, True), x, imaginary.clone()
    )
    torch.testing.assert_close(x.grad, theirs, rtol=1e-12, atol=1e-12)
    y = batch_norm(x, None, None, training=True)
    (first,) = torch.autograd.grad(y, x, imaginary, create_graph=True)
    seconds = [torch.autograd.grad(first, x, each, retain_graph=True)[0] for each in (imaginary, imaginary.clone())]
    assert torch.equal(*seconds)
    vector = leaf(3)
    batch_norm(x, None, None, None, vector, training=True).sum().backward()
    assert vector.grad.tolist() == [4, 4, 4]


def test_an_output_may_be_changed_in_place():
    """An output is no view, and the way back does not need it: `torch.nn.ReLU(inplace=True)` works."""
    for dtype in DTYPES:
        x = leaf(4, 3, dtype=dtype)
        y = batch_norm(x, None, None, training=True)
        assert not y._is_view()
        torch.relu_(y).sum().backward()
        (theirs,) = torch.autograd.grad(batch_norm(x, None, None, training=True, activation="relu").sum(), x)
        assert torch.equal(x.grad, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# What autograd saves


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_what_the_way_back_needs_must_not_change_in_place(name):
    given = {"input": leaf(4, 3), "weight": leaf(3), "bias": leaf(3)}
    y = batch_norm(given["input"], None, None, given["weight"], given["bias"], training=True)
    with torch.no_grad():
        given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_move_before_the_way_back():
    """The statistics that the way back needs are copies; who has saved running statistics hears that they moved."""
    x, mean, var = leaf(4, 3), torch.zeros(3).double(), torch.ones(3).double()
    y = batch_norm(x, mean, var)
    seen_by_others = (leaf(3) * mean).sum()
    versions = mean._version, var._version
    batch_norm(x, mean, var, training=True)
    assert (mean._version, var._version) == (versions[0] + 1, versions[1] + 1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5), rtol=1e-15, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        seen_by_others.backward()


def test_running_statistics_that_move_without_gradients_have_a_new_version():
    """The counter of batches has one, too; and who has saved any of them hears that it moved."""
    layer = BatchNorm1d(3)
    seen_by_others = (leaf(3) * layer.running_var).sum()
    buffers = [*layer.buffers()]
    for context in (torch.no_grad, torch.enable_grad):
        versions = [buffer._version for buffer in buffers]
        with context():
            layer(torch.randn(4, 3))
        assert [buffer._version for buffer in buffers] == [version + 1 for version in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        seen_by_others.backward()


def test_running_statistics_that_do_not_move_keep_their_version():
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    batch_norm(x, mean, var)
    batch_norm(x[:0], mean, var, training=True)
    with cupybn.no_stats_update():
        batch_norm(x, mean, var, training=True)
    batch_norm(x, torch.zeros(1).expand(3), torch.ones(1).expand(3))  # not each element has memory of its own
    with pytest.raises(ValueError, match="eps"):
        batch_norm(x, mean, var, training=True, eps=0.0)
    assert (mean._version, var._version, mean.tolist()) == (0, 0, [0, 0, 0])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_hooks_of_saved_tensors(activation):
    """What hooks pack, and in which memory order they bring it back, does not change the gradients."""
    x, residual = (in_format(leaf(4, 3, 2, 2), True) for _ in range(2))
    weight = torch.randn(6).double()[::2].requires_grad_()
    packed, gradients = [], []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    for hooks in torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), None:
        with hooks if hooks is not None else torch.enable_grad():
            y = batch_norm(x, None, None, weight, None, training=True, residual=residual, activation=activation)
            first = torch.autograd.grad((y**2).sum(), (x, residual, weight), create_graph=True)
        gradients.append([*first, *torch.autograd.grad((first[0] ** 2).sum(), (x, weight))])
    assert any(each is x for each in packed) or any(each.data_ptr() == x.data_ptr() for each in packed)
    for packed_ones, others in zip(*gradients, strict=True):
        assert torch.equal(packed_ones, others)


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # of torch 2.4's own
def test_checkpointing():
    """A call that is computed again on the way back gives the same gradients; statistics move once if one says so."""
    from contextlib import nullcontext

    from torch.utils.checkpoint import checkpoint

    def contexts():
        return nullcontext(), cupybn.no_stats_update()

    x, mean, var = leaf(4, 3), torch.zeros(3).double(), torch.ones(3).double()
    y = checkpoint(lambda x: batch_norm(x, mean, var, training=True), x, use_reentrant=False, context_fn=contexts)
    (y**2 * x.detach()).sum().backward()
    once = mean.clone()
    expected = batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), None, None, True)
    (theirs,) = torch.autograd.grad((expected**2 * x.detach()).sum(), x)
    assert torch.equal(x.grad, theirs)
    torch.testing.assert_close(once, 0.1 * x.detach().mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # of torch 2.4's own
def test_gradients_within_a_checkpoint():
    """What the way back saves for that of second order is unpacked once, as checkpoints ask for."""
    from torch.utils.checkpoint import checkpoint

    x, results = leaf(4, 3), []

    def penalized(x):
        y = batch_norm(x, None, None, training=True, activation="relu")
        return torch.autograd.grad((y**2).sum(), x, create_graph=True)[0]

    for call in penalized, lambda x: checkpoint(penalized, x, use_reentrant=False):
        results += torch.autograd.grad((call(x) ** 2).sum(), x)
    assert torch.equal(*results)


def test_nothing_is_kept_when_the_output_is_gone():
    """Neither memory of the input nor what was saved is held by anything but the graph, in both orders."""
    array = np.random.default_rng(0).normal(size=(4, 3))
    memory, given = weakref.ref(array), torch.from_numpy(array).requires_grad_()
    y = batch_norm(given, None, None, training=True, residual=given, activation="relu")
    (grad,) = torch.autograd.grad((y**2).sum(), given, create_graph=True)
    (grad**2).sum().backward()
    others = [weakref.ref(each) for each in (given, y, grad, y.grad_fn)]
    del array, given, grad
    gc.collect()
    assert memory() is not None
    del y
    gc.collect()
    assert memory() is None
    assert all(each() is None for each in others)
    # What a graph has saved goes when it has been gone through.
    array = np.random.default_rng(0).normal(size=(4, 3))
    memory, x = weakref.ref(array), leaf(4, 3)
    given = torch.from_numpy(array).add_(x)  # no leaf, and in memory that can be watched
    y = batch_norm(given, None, None, training=True)
    del array, given
    gc.collect()
    assert memory() is not None
    y.sum().backward()
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_where_nobody_goes_back(context, monkeypatch):
    monkeypatch.setattr(flow, "forward_and_saved", None)
    x, weight = leaf(4, 3), leaf(3)
    mean, var = torch.zeros(3), torch.ones(3)
    with context():
        y = batch_norm(x, mean, var, weight, training=True)
    assert not y.requires_grad
    assert y.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(mean.double(), 0.1 * x.detach().mean(0), rtol=1e-6, atol=1e-6)
    batch_norm(x.detach(), mean, var, weight.detach(), training=True)


def test_tensors_that_cannot_be_saved():
    """An error comes before running statistics have moved; where nothing is saved, all is well."""
    with torch.inference_mode():
        x = torch.randn(4, 3)
    mean, var, weight = torch.zeros(3), torch.ones(3), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be saved for the way back \(got input\): use input\.clone\(\)"):
        batch_norm(x, mean, var, weight, training=True)
    assert mean.tolist() == [0, 0, 0]
    batch_norm(x, mean, var, training=True)
    assert mean.tolist() != [0, 0, 0]


@pytest.mark.parametrize("which", [0, 1])
def test_running_statistics_of_inference_mode_move_in_it_alone(which):
    """Running statistics of inference mode are for nobody else to update, as PyTorch says; anybody may read them."""
    with torch.inference_mode():
        made = torch.zeros(3), torch.ones(3)
        x = torch.randn(4, 3)
        batch_norm(x, *made, training=True)
    others = torch.zeros(3), torch.ones(3)
    running = [made[i] if i == which else others[i] for i in range(2)]
    before = [buffer.clone() for buffer in running]
    x = torch.randn(4, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be updated in place outside .* use running_"):
        batch_norm(x, *running, training=True)
    assert all(map(torch.equal, running, before))
    assert batch_norm(x, *running).shape == x.shape


def test_memory_that_is_shared_with_running_statistics():
    """Gradients are those of the values before the call; of second order, which would not be seen, there are none."""
    x, var = leaf(4, 3), torch.rand(3).double() + 0.5
    before, weight = var.clone().requires_grad_(), var.detach().requires_grad_()
    y = batch_norm(x, torch.zeros(3).double(), var, weight, training=True)
    assert not torch.equal(var, before)
    expected = batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), before, training=True)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad((y**2).sum(), (x, weight), retain_graph=True)
    for mine, theirs in zip(grads, torch.autograd.grad((expected**2).sum(), (x, before)), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(NotImplementedError, match="shares memory with running statistics: use a clone"):
        torch.autograd.grad((y**2).sum(), x, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_function_of_arrays(dtype):
    """Bits are those of `cupybn.functional.batch_norm`, and dtypes of gradients as well."""
    x, residual, weight = leaf(4, 3, 2, 2, dtype=dtype), leaf(4, 3, 2, 2, dtype=dtype), leaf(3, dtype=torch.float32)
    mean, var = torch.zeros(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32)
    arrays = [numpy_of(each) for each in (x, mean, var, weight)]
    expected, vjp_fn = F.batch_norm_vjp(*arrays, training=True, residual=numpy_of(residual), activation="relu")
    y = batch_norm(x, mean, var, weight, training=True, residual=residual, activation="relu")
    dy = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, (x, weight, residual), dy)
    found = vjp_fn(numpy_of(dy))
    for tensor, array in zip((y, mean, var, *grads), (expected, *arrays[1:3], *found[:2], found[3]), strict=True):
        assert tensor.dtype == getattr(torch, array.dtype.name)
        assert np.array_equal(numpy_of(tensor).view(np.uint8), np.ascontiguousarray(array).view(np.uint8))


def numpy_of(tensor):
    """A copy as a NumPy array."""
    import ml_dtypes

    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy().copy()


def test_nothing_in_nothing_out():
    x, weight = leaf(0, 3, 2), leaf(3)
    y = batch_norm(x, torch.zeros(3), torch.ones(3), weight, training=True)
    assert y.shape == (0, 3, 2)
    grads = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    assert (grads[0].shape, grads[1].tolist()) == ((0, 3, 2), [0, 0, 0])
    assert torch.autograd.grad(grads[0].sum() + grads[1].sum(), weight)[0].tolist() == [0, 0, 0]


def test_subclasses_are_tensors():
    class Named(torch.Tensor):
        pass

    x = torch.randn(4, 3)
    y = batch_norm(x.as_subclass(Named), None, None, torch.nn.Parameter(torch.ones(3)), training=True)
    assert type(y) is torch.Tensor
    assert torch.equal(y, batch_norm(x, None, None, training=True))


# ---------------------------------------------------------------------------------------------------------------------
# Errors

X, V = torch.zeros(4, 3), torch.ones(3)
ERRORS = {
    "array": (TypeError, r"input to be a torch.Tensor \(got NumPy array\): use torch.as_tensor", {"input": X.numpy()}),
    "list": (TypeError, r"weight to be a torch.Tensor \(got list\)$", {"weight": [1.0] * 3}),
    "integers": (TypeError, r"input of dtype float16, .* \(got int64\): use input.float\(\)", {"input": X.long()}),
    "complex": (TypeError, "complex numbers are not supported", {"input": X + 0j}),
    "float8": (TypeError, "got float8_e4m3fn", {"bias": V.to(torch.float8_e4m3fn)}),
    "sparse": (TypeError, r"input to be dense \(got torch.sparse_coo\): use input.to_dense", {"input": X.to_sparse()}),
    "meta": (TypeError, "the CPU or a CUDA device .got a tensor on meta", {"input": X.to("meta")}),
    "device": (TypeError, "weight to be on the CPU or a CUDA device", {"weight": V.to("meta")}),
    "axes": (ValueError, "expected at least 2D input .got 1D", {"input": V}),
    "length": (ValueError, "weight should contain 3 elements not 4", {"weight": torch.ones(4)}),
    "matrix": (ValueError, r"bias of shape \(3,\) .*use bias.reshape\(-1\)", {"bias": V[None]}),
    "residual dtype": (
        TypeError,
        r"residual of the input's dtype float32 \(got float64\): use residual.to\(in",
        {"residual": X.double()},
    ),
    "residual shape": (
        ValueError,
        r"residual of the input's shape \(4, 3\) \(got \(1, 3\)\): use residual.expand",
        {"residual": X[:1]},
    ),
    "other residual": (
        ValueError,
        r"residual of the input's shape \(4, 3\) \(got \(5, 3\)\)$",
        {"residual": torch.zeros(5, 3)},
    ),
    "one value": (ValueError, "Expected more than 1 value per channel when training", {"input": X[:1]}),
    "eps": (ValueError, "eps must be positive during training", {"eps": 0.0}),
    "training": (TypeError, "expected training to be a bool", {"training": 1}),
    "momentum": (TypeError, "expected momentum to be a float", {"momentum": None}),
    "activation": (ValueError, "unknown activation 'gelu'", {"activation": "gelu"}),
    "one buffer": (ValueError, "must either both be None", {"running_var": None}),
    "eval": (
        ValueError,
        "must be given when training=False",
        {"running_mean": None, "running_var": None, "training": False},
    ),
    "expanded": (
        ValueError,
        r"running_var to have memory for each .*use running_var.clone\(\)",
        {"running_var": torch.ones(1).expand(3)},
    ),
    "followed": (ValueError, r"running_mean not to require grad", {"running_mean": torch.zeros(3, requires_grad=True)}),
}


@pytest.mark.parametrize(("error", "message", "wrong"), ERRORS.values(), ids=ERRORS)
def test_errors(error, message, wrong):
    """Errors come before anything has changed."""
    mean, var = torch.zeros(3), torch.ones(3)
    given = {"input": X, "running_mean": mean, "running_var": var, "training": True} | wrong
    with pytest.raises(error, match=message):
        batch_norm(**given)
    assert (mean.tolist(), var.tolist(), mean._version, var._version) == ([0, 0, 0], [1, 1, 1], 0, 0)


def test_devices_are_named():
    class Elsewhere:
        device = torch.device("cuda", 1)

    from cupybn.torch.checks import check_beside

    with pytest.raises(TypeError, match=r"weight to be on cpu like input \(got a tensor on cuda:1\).*input\.to"):
        check_beside("weight", Elsewhere, X, "input")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_nobody_follows_is_an_error():
    """Transforms and traces would take the output for a constant."""
    for call in (
        lambda: torch.func.grad(lambda x: batch_norm(x, None, None, training=True).sum())(X),
        lambda: torch.func.vmap(lambda x: batch_norm(x, None, None, training=True))(torch.zeros(2, 4, 3)),
        lambda: torch.func.jvp(lambda x: batch_norm(x, None, None, training=True), (X,), (X,)),
    ):
        with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
            call()
    with pytest.raises(NotImplementedError, match="cannot be traced"):
        torch.jit.trace(lambda x: batch_norm(x, None, None, training=True), X)
    tracer = make_fx(lambda x: batch_norm(x, None, None, training=True))
    with pytest.raises(NotImplementedError, match="cannot be traced"):
        tracer(X)
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match="memory of its own"):
        batch_norm(torch.zeros(4, 3), None, None, training=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_forward_mode_is_an_error(name):
    """The error comes before running statistics have moved; without tangents a call is one like others."""
    vector, mean, var = torch.ones(3).double(), torch.zeros(3), torch.ones(3)
    tensors = {"input": X, "weight": vector, "bias": vector, "residual": X}
    forward_ad = torch.autograd.forward_ad
    for context in torch.no_grad, torch.enable_grad:
        with forward_ad.dual_level(), context():
            dual = {name: forward_ad.make_dual(tensors[name], tensors[name])}
            with pytest.raises(NotImplementedError, match="gradients in forward mode are not implemented"):
                batch_norm(**tensors | dual, running_mean=mean, running_var=var, training=True)
    assert mean.tolist() == [0, 0, 0]
    with forward_ad.dual_level():
        y = batch_norm(**tensors, running_mean=mean, running_var=var, training=True)
    torch.testing.assert_close(y, batch_norm(**tensors, running_mean=None, running_var=None, training=True))


def test_the_way_back_in_a_transform_is_an_error():
    """Gradients in batches, as for a Jacobian, come as tensors that are no memory."""
    x = leaf(4, 3)
    y = batch_norm(x, None, None, training=True)
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True))(torch.ones(2, 4, 3).double())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, torch.ones(2, 4, 3).double(), is_grads_batched=True)
    (first,) = torch.autograd.grad(y, x, torch.randn(4, 3).double(), create_graph=True)
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        torch.func.vmap(lambda cdx: torch.autograd.grad(first, x, cdx, retain_graph=True))(torch.ones(2, 4, 3).double())
