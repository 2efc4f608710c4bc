"""The layers of `cupybn.torch` beside those of `torch.nn`: states, modes, text, autocast, training, compilation."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle

import pytest

torch = pytest.importorskip("torch")

import cupybn  # noqa: E402
import cupybn.torch  # noqa: E402
from cupybn._calls import flow  # noqa: E402
from cupybn.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert  # noqa: E402

LAYERS = {BatchNorm1d: torch.nn.BatchNorm1d, BatchNorm2d: torch.nn.BatchNorm2d, BatchNorm3d: torch.nn.BatchNorm3d}
SHAPES = {BatchNorm1d: (6, 3, 4), BatchNorm2d: (4, 3, 3, 2), BatchNorm3d: (2, 3, 2, 3, 2)}
TINY = 1e-12  # what float64 rounds in sums of some dozens of numbers near 1, with a margin


@pytest.fixture(autouse=True)
def seeded():
    """Numbers are the same each time, and there is a single thread: on tiny arrays several wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_state(ours, theirs):
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=TINY, atol=TINY)


# ---------------------------------------------------------------------------------------------------------------------
# Beside torch.nn


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers_agree(layer):
    """Outputs, gradients and states agree with every combination of flags, in both modes, through three batches."""
    flags = itertools.product((True, False), (True, False), (0.1, None), (True, False))
    for affine, tracks, momentum, training in flags:
        options = {"affine": affine, "track_running_stats": tracks, "momentum": momentum, "dtype": torch.float64}
        ours, theirs = layer(3, **options), LAYERS[layer](3, **options)
        for module in ours, theirs:
            module.train(training)
        assert_same_state(ours, theirs)
        for _ in range(3):
            x = torch.randn(SHAPES[layer], dtype=torch.float64)
            dy, found = torch.randn_like(x), []
            for module in ours, theirs:
                given = x.clone().requires_grad_()
                y = module(given)
                found.append((y, *torch.autograd.grad(y, (given, *module.parameters()), dy)))
            for mine, other in zip(*found, strict=True):
                torch.testing.assert_close(mine, other, rtol=TINY, atol=TINY)
            assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("has", [True, False])
def test_flags_that_are_set_later(has, tracks, training):
    """Statistics are used and moved as torch chooses."""
    ours, theirs = (layer(3, track_running_stats=has).double() for layer in (BatchNorm1d, torch.nn.BatchNorm1d))
    x = torch.randn(5, 3, dtype=torch.float64)
    outputs = []
    for module in ours, theirs:
        module(x + 1)
        module.train(training).track_running_stats = tracks
        outputs.append(module(x))
    torch.testing.assert_close(*outputs, rtol=TINY, atol=TINY)
    assert_same_state(ours, theirs)


def test_statistics_that_do_not_move():
    """No counter, an empty batch, `no_stats_update`, and errors: all is as it was."""
    x = torch.randn(5, 3)
    layer = BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = None
    layer(x)
    assert layer.running_mean.tolist() == [0, 0, 0]
    layer = BatchNorm1d(3)
    layer(x[:0])
    with cupybn.no_stats_update():
        layer(x)
    for wrong, error in (x[:1], ValueError), (x[:, :2], ValueError), (x.long(), TypeError), (x[None, None], ValueError):
        with pytest.raises(error):
            layer(wrong)
    assert (layer.num_batches_tracked.item(), layer.running_mean.tolist()) == (0, [0, 0, 0])
    layer.num_batches_tracked = torch.tensor(0.0)  # which matters only where it is increased
    layer.eval()(x)
    layer.train().num_batches_tracked = None
    layer(x)
    assert layer.running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    "counter", [None, 0, torch.zeros(1), torch.zeros((), dtype=torch.int64, device="meta")], ids=str
)
def test_counters_that_nobody_reads(counter):
    """The counter may be anything and anywhere in eval mode, as for PyTorch's layers."""
    ours, theirs = BatchNorm1d(3).eval(), torch.nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    for layer in ours, theirs:
        del layer.num_batches_tracked
        layer.num_batches_tracked = counter
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    assert ours.num_batches_tracked is counter


def test_fused_residual_and_activation():
    """relu(batch norm + residual), also through the gradients of all arguments."""
    x, residual = (torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = BatchNorm2d(3, activation="relu").double(), torch.nn.BatchNorm2d(3).double()
    y, expected = ours(x, residual), torch.relu(theirs(x) + residual)
    torch.testing.assert_close(y, expected, rtol=TINY, atol=TINY)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, residual, *ours.parameters()), dy)
    for mine, other in zip(grads, torch.autograd.grad(expected, (x, residual, *theirs.parameters()), dy), strict=True):
        torch.testing.assert_close(mine, other, rtol=TINY, atol=TINY)
    assert torch.equal(torch.relu(theirs.eval()(x)), ours.eval()(x)) or torch.allclose(ours(x), torch.relu(theirs(x)))


def test_text():
    """torch's, and the activation where there is one."""
    for layer, other in LAYERS.items():
        assert repr(layer(3, eps=1e-3)) == repr(other(3, eps=1e-3))
    text = repr(torch.nn.BatchNorm2d(3, momentum=None))
    assert repr(BatchNorm2d(3, momentum=None, activation="relu")) == f"{text[:-1]}, activation='relu')"


def test_arguments():
    """All of torch's under the same names, in the same order, and `bias` where this torch has it."""
    theirs = list(inspect.signature(torch.nn.BatchNorm2d.__init__).parameters.values())
    ours = list(inspect.signature(BatchNorm2d.__init__).parameters.values())
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [p.default for p in ours][: len(positional)] == [p.default for p in theirs][: len(positional)]
    if any(p.name == "bias" for p in theirs):
        layer = BatchNorm2d(3, bias=False)
        assert layer.bias is None
        assert layer(torch.randn(2, 3, 2, 2)).shape == (2, 3, 2, 2)
    else:
        with pytest.raises(TypeError, match="bias"):
            BatchNorm2d(3, bias=False)
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        BatchNorm2d(3, activation="gelu")
    assert BatchNorm2d(3, dtype=torch.float64, device="meta").weight.dtype is torch.float64


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (torch.zeros(4, 3, 5), ValueError, r"expected 4D input \(got 3D input\)"),
        (
            torch.zeros(4, 5, 2, 3),
            ValueError,
            r"expected 3 channels \(num_features\) on axis 1, got 5: axis 3 has 3",
        ),
        (torch.zeros(4, 5, 2, 2), ValueError, r"expected 3 channels \(num_features\) on axis 1, got 5$"),
        (torch.zeros(1, 3, 1, 1), ValueError, "Expected more than 1 value per channel.*did you mean layer.eval"),
        (torch.zeros(4, 3, 2, 2).numpy(), TypeError, "expected input to be a torch.Tensor"),
        (torch.zeros(4, 3, 2, 2, device="meta"), TypeError, "got a tensor on meta"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.int32), TypeError, "got int32"),
    ],
    ids=["rank", "axis", "channels", "one value", "array", "meta", "dtype"],
)
def test_errors_of_inputs(input, error, message):
    with pytest.raises(error, match=message):
        BatchNorm2d(3)(input)


def test_errors_of_layers():
    x = torch.zeros(4, 3)
    for name, value, error in (
        ("training", 1, "expected training to be a bool"),
        ("track_running_stats", None, "expected track_running_stats to be a bool"),
        ("num_batches_tracked", torch.tensor(0.0), "num_batches_tracked to be an int64 tensor"),
        ("momentum", "0.1", "expected momentum to be a float"),
    ):
        layer = BatchNorm1d(3)
        if name == "num_batches_tracked":
            layer._buffers[name] = value
        else:
            setattr(layer, name, value)
        with pytest.raises(TypeError, match=error):
            layer(x)
    layer = BatchNorm1d(3)
    layer.num_batches_tracked = torch.tensor(0, device="meta")
    with pytest.raises(TypeError, match=r"num_batches_tracked to be an int64 tensor beside input .*on meta"):
        layer(x)
    layer.num_batches_tracked = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_batches_tracked of shape \(\)"):
        layer(x)
    with pytest.raises(TypeError, match=r"expected input on meta, as the layer is .*: use input\.to"):
        BatchNorm1d(3, device="meta")(x)
    with pytest.raises(ValueError, match=r"expected 2 channels \(num_features\) on axis 1, got 3"):
        BatchNorm1d(2, affine=False)(x)
    layer = BatchNorm1d(3)
    layer.running_var = None
    for mode, tracks in itertools.product((True, False), repeat=2):
        layer.track_running_stats = tracks
        with pytest.raises(ValueError, match="must either both be None"):
            layer.train(mode)(x)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast and dtypes


@pytest.mark.parametrize("last", [False, True])
def test_autocast(last):
    """Data are bfloat16, parameters and statistics float32; a residual of float32 is cast, but only there."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), BatchNorm2d(4)).to(memory_format=memory_format)
    x = torch.randn(4, 3, 3, 3).to(memory_format=memory_format).requires_grad_()
    residual = torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inner = model[0](x)
        y, added = model[1](inner), model[1](inner, residual)
    assert inner.dtype == y.dtype == added.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=memory_format)
    layer = copy.deepcopy(model[1])
    exact = layer(inner.detach().double()).bfloat16()
    assert torch.equal(y, exact)  # rounded once, from what float32 or better has
    (y + added).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert x.grad.isfinite().all()
    assert model[1].running_mean.dtype is torch.float32
    with pytest.raises(TypeError, match="residual of the input's dtype bfloat16"):
        model[1](inner, residual)


def test_dtypes_of_a_model():
    """`half` and `bfloat16` change what the layer holds; each works with data of its own dtype, and of another."""
    for dtype in torch.float16, torch.bfloat16, torch.float64:
        layer = BatchNorm1d(3).to(dtype)
        assert layer.num_batches_tracked.dtype is torch.int64
        for data in dtype, torch.float32:
            x = torch.randn(5, 3).to(data).requires_grad_()
            y = layer(x)
            y.sum().backward()
            assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (data, data, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Copies, files, calls of torch's


def test_copies_and_files():
    layer = BatchNorm2d(3, activation="relu", eps=1e-3)
    x = torch.randn(4, 3, 2, 2)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False):
        assert repr(other) == repr(layer)
        assert_same_state(other, layer)
        assert other.weight is not layer.weight
        assert torch.equal(other.eval()(x), layer.eval()(x))
        layer.train()


def test_state_dicts_go_to_torch_and_back():
    ours, theirs = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    ours(torch.randn(4, 3, 2, 2))
    theirs.load_state_dict(ours.state_dict())
    assert_same_state(ours, theirs)
    theirs(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)
    old = theirs.state_dict()
    del old["num_batches_tracked"]  # as in checkpoints of old versions
    old._metadata[""]["version"] = 1
    BatchNorm2d(3).load_state_dict(old)


def test_functional_call():
    layer, x = BatchNorm1d(3), torch.randn(5, 3)
    other = {"weight": torch.full((3,), 2.0, requires_grad=True), "bias": torch.ones(3)}
    y = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(y, 2 * layer(x) + 1)
    y.sum().backward()
    assert other["weight"].grad is not None
    assert layer.weight.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Training


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv2d(4, 4, 3, stride=2),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 3),
        torch.nn.BatchNorm1d(3),
    ).double()


def trained(model, steps=20):
    """A model after some steps, and its losses."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (16,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, torch.stack(losses)


@pytest.mark.parametrize("last", [False, True])
def test_training_goes_the_same_way(last):
    """What 20 steps make of other roundings is no more than what they make of a last place of the weights."""
    models = [network(), convert(network()), network()]
    with torch.no_grad():
        for parameter in models[2].parameters():
            parameter.mul_(1 + 8 * torch.finfo(torch.float64).eps)
    if last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
    (theirs, losses), (ours, found), (_, moved) = map(trained, models)
    assert losses[-1] < losses[0] / 2
    assert (found - losses).abs().max() <= 100 * (moved - losses).abs().max() < 1e-9
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-9, atol=1e-9)
    assert type(ours[1]) is BatchNorm2d
    assert ours[1].num_batches_tracked == 20


def test_a_gradient_penalty():
    """A step whose loss has the norm of a gradient in it, as a critic's: the same gradients as torch's."""
    found = []
    for model in network(), convert(network()):
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
        weights = torch.linspace(-1, 2, 8, dtype=torch.float64)  # a plain sum over a batch would be a constant
        (grad,) = torch.autograd.grad((model(x)[:, 0] * weights).sum(), x, create_graph=True)
        ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 5
    assert all(grad.abs().max() > 1e-3 for grad in found[0] if grad.ndim > 1)
    largest = max(float(grad.abs().max()) for grad in found[0])  # that of a bias before batch norm is 0
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * largest)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    """The layers are breaks of the graph, and give the results and the statistics that they give without it."""
    torch._dynamo.reset()
    model, expected = convert(network()), convert(network())
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    for _ in range(2):
        outputs = [each(x) for each in (compiled, expected)]
        torch.testing.assert_close(*outputs, rtol=TINY, atol=TINY)
        for y in outputs:
            (y**2).sum().backward()
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert_same_state(model, expected)
    assert model[1].num_batches_tracked == 2
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert sum(breaks.values()) >= 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
def test_a_compiled_function_with_batch_norm(monkeypatch):
    """The function is a break of the graph, too: arrays are never traced."""
    torch._dynamo.reset()
    calls = []
    original = flow.forward_and_saved
    monkeypatch.setattr(flow, "forward_and_saved", lambda call: calls.append(call) or original(call))

    def function(x):
        return cupybn.torch.batch_norm(x * 2, None, None, training=True).sin()

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(x), function(x), rtol=TINY, atol=TINY)
    assert len(calls) == 2
    torch._dynamo.reset()
