"""PyTorch on the CPU as a second referee: equal arguments give equal numbers, and equal states after every step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from tests.reference import arguments, exactly, in_order, to_numpy

torch = pytest.importorskip("torch", minversion="2.12")  # the version whose layers have the argument bias, and show it

ULPS = 64
"""Units in the last place that torch may be off by, as it rounds statistics to the data's dtype and computes x * a +
b."""

NAMES = ("running_mean", "running_var", "weight", "bias")
SHAPES = {"nc": (6, 3), "ncl": (4, 3, 5), "nchw": (2, 3, 5, 4), "ncdhw": (2, 3, 2, 3, 4), "rank 6": (2, 3, 2, 1, 2, 3)}
LAYERS = {"nc": "BatchNorm1d", "ncl": "BatchNorm1d", "nchw": "BatchNorm2d", "ncdhw": "BatchNorm3d"}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)


def to_torch(array, *, grad=False):
    """A tensor of its own memory with the array's strides."""
    if array is None:
        return None
    array = to_numpy(array)
    strides = [stride // array.itemsize for stride in array.strides]
    tensor = torch.empty_strided(array.shape, strides, dtype=torch_dtype(array.dtype))
    return tensor.copy_(torch.from_numpy(array)).requires_grad_(grad)


def torch_dtype(dtype):
    return getattr(torch, np.dtype(dtype).name)


def assert_agree(ours, theirs):
    """Compare up to rounding errors, relative to the largest element."""
    ours, theirs = to_numpy(ours), theirs.detach().numpy()
    assert ours.dtype == theirs.dtype
    bound = ULPS * np.finfo(ours.dtype).eps * max(1, np.max(np.abs(theirs), initial=0))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def assert_same_state(ours, theirs):
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, array in ours.state_dict().items():
        if name == "num_batches_tracked":
            assert int(array) == int(state[name])
        else:
            assert_agree(array, state[name])


def pair(kind, device, dtype=np.float32, features=3, **options):
    """Two layers that are alike, ours and torch's, with weights that differ by channel."""
    ours = getattr(cupybn, LAYERS[kind])(features, device=device, dtype=dtype, **options)
    theirs = getattr(torch.nn, LAYERS[kind])(features, dtype=torch_dtype(dtype), **options)
    with torch.no_grad():
        for start, parameter in enumerate(theirs.parameters()):
            parameter.copy_(torch.linspace(start - 0.5, start + 1.5, features))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------------
# Functional


@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_functional(xp, rng, shape, training, dtype):
    """Functions agree: forward, backward and running statistics, with every combination of vectors."""
    for weight, bias, buffers in itertools.product([True, False], repeat=3):
        if not (training or buffers):
            continue
        given = arguments(xp, rng, shape, dtype=dtype, vectors=dtype)
        has = {"weight": weight, "bias": bias, "running_mean": buffers, "running_var": buffers}
        ours = {name: given[name] if has[name] else None for name in NAMES}
        theirs = {name: to_torch(array, grad=name in ("weight", "bias")) for name, array in ours.items()}
        x, dy = to_torch(given["input"], grad=True), to_torch(given["residual"])
        options = {"training": training, "momentum": 0.3, "eps": 1e-3}

        expected = torch.nn.functional.batch_norm(x, **theirs, **options)
        expected.backward(dy)
        y, vjp_fn = F.batch_norm_vjp(given["input"], **ours, **options)
        grads = vjp_fn(given["residual"])

        assert_agree(y, expected)
        assert_agree(grads.input, x.grad)
        for name in ("weight", "bias"):
            if has[name]:
                assert_agree(getattr(grads, name), theirs[name].grad)
        for name in ("running_mean", "running_var"):
            if has[name]:
                assert_agree(ours[name], theirs[name])


@DTYPES
@pytest.mark.parametrize("training", [True, False])
def test_functional_with_residual_and_relu(xp, rng, training, dtype):
    given = arguments(xp, rng, (4, 3, 5), dtype=dtype, vectors=dtype)
    tensors = {
        name: to_torch(given[name], grad=not name.startswith("running")) for name in ("input", "residual", *NAMES)
    }
    dy = rng.normal(size=(4, 3, 5)).astype(dtype)

    batch = {name: tensor for name, tensor in tensors.items() if name != "residual"}
    expected = torch.relu(torch.nn.functional.batch_norm(**batch, training=training) + tensors["residual"])
    expected.backward(to_torch(dy))
    y, vjp_fn = F.batch_norm_vjp(**given, training=training, activation="relu")

    assert_agree(y, expected)
    for name, grad in vjp_fn(xp.asarray(dy))._asdict().items():
        assert_agree(grad, tensors[name].grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["contiguous", "channels_last"])
def test_memory_format(xp, rng, order, training):
    given = arguments(xp, rng, (2, 3, 5, 4))
    x = in_order(given["input"], order)
    theirs = to_torch(in_order(to_numpy(given["input"]), order), grad=True)
    assert theirs.is_contiguous(memory_format=torch.contiguous_format if order[1] == 1 else torch.channels_last)
    vectors = [given[name] for name in NAMES]
    expected = torch.nn.functional.batch_norm(theirs, *map(to_torch, vectors), training=training)
    expected.backward(to_torch(in_order(to_numpy(given["residual"]), order)))
    y, vjp_fn = F.batch_norm_vjp(x, *vectors, training)
    dx = vjp_fn(given["residual"]).input
    for ours, wanted in (y, expected), (dx, theirs.grad):
        assert_agree(ours, wanted)
        assert [stride // ours.itemsize for stride in ours.strides] == list(wanted.stride())


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@DTYPES
@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("kind", LAYERS)
def test_training(xp, device, rng, kind, momentum, dtype):
    """Layers agree in steps of gradient descent, on batches of several sizes, with an evaluation between them."""
    ours, theirs = pair(kind, device, dtype, momentum=momentum)
    for step, n in enumerate((2, 5, 3, 4, 2, 6)):
        given = arguments(xp, rng, (n, *SHAPES[kind][1:]), dtype=dtype)
        x, dy = given["input"], given["residual"]
        mode = step != 3
        tensor = to_torch(x, grad=True)
        expected = theirs.train(mode)(tensor)
        theirs.zero_grad()
        expected.backward(to_torch(dy))
        y, vjp_fn = ours.train(mode).vjp(x)
        grads = vjp_fn(dy)

        assert_agree(y, expected)
        assert_agree(grads.input, tensor.grad)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= 0.05 * parameter.grad
        for name, parameter in ours.named_parameters():
            parameter -= 0.05 * getattr(grads, name)
        assert_same_state(ours, theirs)
    assert ours.num_batches_tracked == 5
    x = arguments(xp, rng, SHAPES[kind], dtype=dtype)["input"]
    assert_agree(ours.eval()(x), theirs.eval()(to_torch(x)))


FLAGS = list(itertools.product([True, False], repeat=3))


@pytest.mark.parametrize(("affine", "bias", "track_running_stats"), FLAGS)
def test_decision_table(xp, device, rng, affine, bias, track_running_stats):
    """Layers agree for every setting of mode and flag, in turn, with and without buffers."""
    ours, theirs = pair("ncl", device, affine=affine, bias=bias, track_running_stats=track_running_stats)
    assert repr(ours) == repr(theirs)
    for tracks, training in [(True, True), (False, True), (False, False), (True, False), (True, True), (True, False)]:
        for layer in (ours, theirs):
            layer.track_running_stats = tracks
            layer.train(training)
        x = arguments(xp, rng, SHAPES["ncl"])["input"]
        assert_agree(ours(x), theirs(to_torch(x)))
        assert_same_state(ours, theirs)


def test_reset(xp, device, rng):
    ours, theirs = pair("nc", device)
    for method in ("reset_running_stats", "reset_parameters"):
        x = arguments(xp, rng, SHAPES["nc"])["input"]
        ours(x), theirs(to_torch(x))
        assert_same_state(ours, theirs)
        getattr(ours, method)(), getattr(theirs, method)()
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_counter(xp, device, rng, momentum):
    ours, theirs = pair("nc", device, momentum=momentum)
    ours.num_batches_tracked = theirs.num_batches_tracked = None
    for _ in range(2):
        x = arguments(xp, rng, SHAPES["nc"])["input"]
        assert_agree(ours(x), theirs(to_torch(x)))
        assert_same_state(ours, theirs)


def test_lazy(xp, device, rng):
    ours, theirs = cupybn.BatchNorm2d(None, device=device), torch.nn.LazyBatchNorm2d()
    x = arguments(xp, rng, SHAPES["nchw"])["input"]
    assert_agree(ours(x), theirs(to_torch(x)))
    assert_same_state(ours, theirs)
    assert repr(ours) == repr(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("shape", "vectors", "options"),
    [
        ((1, 10), {}, {"training": True}),
        ((4, 10), {}, {"training": True, "eps": 0.0}),
        ((4, 10), {}, {"eps": -1.0}),
        ((4, 10), {"running_mean": 9}, {}),
        ((4, 10), {"running_var": 11}, {"training": True}),
        ((4, 10), {"weight": 9}, {}),
        ((4, 10), {"bias": 1}, {"training": True}),
        ((4, 10), {"running_var": None}, {"training": True}),
    ],
    ids=str,
)
def test_messages(xp, rng, shape, vectors, options):
    """Messages are torch's, where the contract gives those."""
    given = arguments(xp, rng, shape)
    given |= {name: length if length is None else xp.ones(length, np.float32) for name, length in vectors.items()}
    given = {name: given[name] for name in ("input", *NAMES)}
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.nn.functional.batch_norm(**{name: to_torch(array) for name, array in given.items()}, **options)
    text = str(theirs.value).replace("torch.Size([1, 10])", "(1, 10)")
    with pytest.raises(ValueError, match=exactly(text)):
        F.batch_norm(**given, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_messages_of_wrong_ranks(xp, device, kind):
    ours, theirs = pair(kind, device)
    for rank in range(1, 7):
        if rank in ({2, 3} if kind in ("nc", "ncl") else {len(SHAPES[kind])}):
            continue
        with pytest.raises(ValueError, match="expected") as wanted:
            theirs(torch.ones((3,) * rank))
        with pytest.raises(ValueError, match=exactly(str(wanted.value))):
            ours(xp.ones((3,) * rank, np.float32))


@pytest.mark.parametrize("kind", LAYERS)
def test_synchronized_layers_of_one_process(xp, device, rng, kind):
    """Layers agree with torch's SyncBatchNorm without a process group: text, keys, numbers, errors."""
    options = {"eps": 1e-3, "momentum": 0.3}
    ours, theirs = cupybn.SyncBatchNorm(3, device=device, **options), torch.nn.SyncBatchNorm(3, **options)
    assert repr(ours) == repr(theirs)
    x = rng.normal(3, 2, SHAPES[kind]).astype(np.float32)
    for training in True, True, False:
        ours.train(training)
        theirs.train(training)
        assert_agree(ours(xp.asarray(x)), theirs(to_torch(x)))
        assert_same_state(ours, theirs)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is compared
        theirs(torch.ones(3))
    with pytest.raises(ValueError, match=exactly(str(error.value))):
        ours(xp.ones(3))


def test_converted_layers_share_their_arrays(device):
    """Layers that are converted share their arrays and keep their mode, as torch's do."""
    plain, theirs = cupybn.BatchNorm2d(3, device=device).eval(), torch.nn.BatchNorm2d(3).eval()
    ours, converted = cupybn.SyncBatchNorm.from_batchnorm(plain), torch.nn.SyncBatchNorm.convert_sync_batchnorm(theirs)
    assert ours.training == converted.training
    assert ours.weight is plain.weight
    assert converted.weight is theirs.weight
    assert repr(ours) == repr(converted)
