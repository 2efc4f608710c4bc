"""Errors of instance, group, layer and RMS norm: what they say, and that nothing has changed then."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn.functional as F
from cupybn import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm, RMSNorm
from tests.norms import EACH, SHAPE, Case, name_of
from tests.reference import bits, exactly, to_numpy

each = pytest.mark.parametrize("case", EACH, ids=name_of)
by_channels = pytest.mark.parametrize("case", [case for case in EACH if case.by_channels], ids=name_of)


def raises(error, text, *functions):
    """Each function raises this error with this very text."""
    for function in functions:
        with pytest.raises(error, match=exactly(text)):
            function()


def both(case, given, **options):
    """The call, and the one with a way back."""
    yield lambda: case(**given | options)
    if "out" not in options:
        yield lambda: case.vjp(**given | options)


def other_kind(xp, array):
    """The array on another device."""
    return to_numpy(array) if xp is not np else pytest.importorskip("cupy").asarray(array)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@each
@pytest.mark.parametrize("fault", ["list", "None", "int", "float16 as bool", "complex", "masked", "kind"])
def test_arrays_of_another_kind(xp, rng, case, fault):
    given = case.arguments(xp, rng, SHAPE, residual=case.by_channels)
    for name, array in given.items():
        wrong = {
            "list": lambda array=array: array.tolist(),
            "None": lambda: None,
            "int": lambda array=array: array.astype(np.int32),
            "float16 as bool": lambda array=array: array > 0,
            "complex": lambda array=array: array.astype(np.complex64),
            "masked": lambda array=array: np.ma.MaskedArray(to_numpy(array)),
            "kind": lambda array=array: other_kind(xp, array),
        }[fault]()
        if wrong is None and name != "input":
            continue
        before = bits(*given.values())
        for call in both(case, given, **{name: wrong}):
            with pytest.raises(TypeError) as caught:
                call()
            message = str(caught.value)
            assert message.startswith("expected ")
            assert "mask=" not in message  # which these functions have not
        assert bits(*given.values()) == before


@each
def test_residual_and_out_are_like_the_input(xp, rng, case):
    given = case.arguments(xp, rng, SHAPE)
    x = given["input"]
    for name in ("out", "residual") if case.by_channels else ("out",):
        for wrong, error in ((x[:1], ValueError), (x.astype(np.float64), TypeError), (other_kind(xp, x), TypeError)):
            for call in both(case, given, **{name: wrong}):
                with pytest.raises(error, match=rf"^expected {name} "):
                    call()


def test_out_is_written_to_as_a_whole(rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    read_only = x.copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"^expected out to be writeable"):
        F.layer_norm(x, 4, out=read_only)
    with pytest.raises(ValueError, match=r"^expected out to have memory for each element"):
        F.layer_norm(x, 4, out=np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, 4)))


@by_channels
def test_lengths_of_vectors(xp, rng, case):
    given = case.arguments(xp, rng, (2, 4, 3))
    names = [*case.names, *(("running_mean", "running_var") if case.function == "instance_norm" else ())]
    if case.function == "instance_norm":
        given |= {"running_mean": xp.zeros(4, np.float32), "running_var": xp.ones(4, np.float32)}
    for name in names:
        text = f"{name} should contain 4 elements not 6"
        raises(ValueError, text, *both(case, given, **{name: xp.ones(6, np.float32)}))
        wrong = xp.ones((1, 4), np.float32)
        text = f"expected {name} of shape (4,) (got (1, 4)): use {name}.reshape(-1)"
        raises(ValueError, text, *both(case, given, **{name: wrong}))


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_shapes_of_parameters(xp, function):
    case, x = Case(function, normalized_shape=(3,)), xp.zeros((2, 3), np.float32)
    for name in case.names:
        text = (
            f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape (2,) and "
            "normalized_shape = (3,)"
        )
        raises(ValueError, text, *both(case, {"input": x}, **{name: xp.ones(2, np.float32)}))
        text = text.replace("(2,)", "(1, 3)")
        raises(ValueError, text, *both(case, {"input": x}, **{name: xp.ones((1, 3), np.float32)}))


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, axes, groups and shapes


@by_channels
def test_ranks(xp, case):
    x = xp.zeros(4, np.float32)
    raises(ValueError, "expected at least 2D input (got 1D input)", *both(case, {"input": x}))
    raises(ValueError, "expected at least 2D input (got 0D input)", *both(case, {"input": xp.zeros((), np.float32)}))


@by_channels
@pytest.mark.parametrize("axis", [0, -3, 3, -4, 1.0, None, (1,), True], ids=repr)
def test_channel_axis(xp, case, axis):
    case = case._replace(channel_axis=axis)
    error = ValueError if type(axis) is int else TypeError
    for call in both(case, {"input": xp.zeros((2, 4, 3), np.float32)}):
        with pytest.raises(error, match="channel_axis"):
            call()


def test_groups(xp):
    x = xp.zeros((2, 4, 3), np.float32)
    text = (
        "Expected number of channels in input to be divisible by num_groups, but got input of shape (2, 4, 3) and "
        "num_groups=3"
    )
    raises(ValueError, text, *both(Case("group_norm", 3), {"input": x}))
    for n in 0, -1:
        text = f"Expected num groups to be greater than 0, got {n}"
        raises(ValueError, text, *both(Case("group_norm", n), {"input": x}), lambda n=n: GroupNorm(n, 4, device="cpu"))
    for n in 2.0, "2", True, (2,):
        for call in (*both(Case("group_norm", n), {"input": x}), lambda n=n: GroupNorm(n, 4, device="cpu")):
            with pytest.raises(TypeError, match=r"^expected num_groups to be an int"):
                call()
    F.group_norm(x, 2)
    with pytest.raises(TypeError, match=r"^expected num_groups to be an int"):  # also after one that is equal
        F.group_norm(x, 2.0)


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_normalized_shape(xp, function):
    def calls(shape, x):
        return both(Case(function, normalized_shape=shape), {"input": x})

    layer = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}[function]
    x = xp.zeros((2, 3), np.float32)
    text = "Given normalized_shape={}, expected input with shape ({}), but got input of size {}"
    raises(ValueError, text.format("(4,)", "*, 4", "(2, 3)"), *calls((4,), x), *calls(4, x))
    raises(ValueError, text.format("(3, 2)", "*, 3, 2", "(2, 3)"), *calls((3, 2), x))
    raises(ValueError, text.format("(1, 2, 3)", "*, 1, 2, 3", "(2, 3)"), *calls((1, 2, 3), x))
    raises(ValueError, text.format("(1,)", "*, 1", "()"), *calls(1, xp.zeros((), np.float32)))
    text = (
        "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
        "normalized_shape = ()"
    )
    raises(ValueError, text, *calls((), x), *calls([], x), lambda: layer((), device="cpu"))
    for shape in (-1,), (2, -3):
        with pytest.raises(ValueError, match=r"^expected normalized_shape"):
            layer(shape, device="cpu")
        for call in calls(shape, x):
            with pytest.raises(ValueError, match=r"^expected normalized_shape"):
                call()
    for shape in 3.0, "3", None, (3.0,), ("3",), [[3]], True, {3}, np.array([3]), xp.ones(1):
        for call in (*calls(shape, x), lambda shape=shape: layer(shape, device="cpu")):
            with pytest.raises(TypeError, match=r"^expected normalized_shape"):
                call()
    F.layer_norm(x, (3,))
    with pytest.raises(TypeError, match=r"^expected normalized_shape"):  # also after one that is equal
        F.layer_norm(x, (3.0,))


@pytest.mark.parametrize("samples", [1, 2])
def test_one_position(xp, samples):
    for shape, axis in ((samples, 3, 1), 1), ((samples, 3), 1), ((samples, 1, 1, 3), -1):
        text = f"Expected more than 1 spatial element when training, got input size {shape}"
        case = Case("instance_norm", channel_axis=axis)
        raises(ValueError, text, *both(case, {"input": xp.zeros(shape, np.float32)}))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and flags


@each
def test_eps(xp, rng, case):
    given = case.arguments(xp, rng, SHAPE)
    for eps in -1.0, float("nan"), -1:
        text = f"{case.function} eps must be non-negative, but got {eps}"
        raises(ValueError, text, *both(case, given, eps=eps))
    for eps in ("1", 1j, xp.ones(()), *(() if case.function == "rms_norm" else (None,))):
        for call in both(case, given, eps=eps):
            with pytest.raises(TypeError, match=r"^expected eps to be a float"):
                call()


def test_eps_with_running_statistics(xp):
    x, mean, var = xp.zeros((2, 4, 3), np.float32), xp.zeros(4, np.float32), xp.ones(4, np.float32)
    given = {"input": x, "running_mean": mean, "running_var": var, "use_input_stats": False}
    text = "instance_norm eps must be non-negative, but got -1.0"
    raises(ValueError, text, *both(Case("instance_norm"), given, eps=-1.0))
    assert to_numpy(F.instance_norm(**given, eps=0.0)).any() == False  # noqa: E712


def test_running_statistics(xp):
    case, x, vector = Case("instance_norm"), xp.zeros((2, 4, 3), np.float32), xp.ones(4, np.float32)
    text = "running_mean and running_var must either both be None or neither be None"
    for name in "running_mean", "running_var":
        for uses_input in True, False:
            raises(ValueError, text, *both(case, {"input": x}, **{name: vector}, use_input_stats=uses_input))
    text = "running_mean and running_var must be given when use_input_stats=False"
    raises(ValueError, text, *both(case, {"input": x}, use_input_stats=False))
    for momentum in None, "0.1", 1j:
        given = {"input": x, "running_mean": vector, "running_var": vector.copy()}
        for uses_input in True, False:
            for call in both(case, given, momentum=momentum, use_input_stats=uses_input):
                with pytest.raises(TypeError, match=r"^expected momentum to be a float"):
                    call()
    for flag in 1, "no", None:
        for call in both(case, {"input": x}, use_input_stats=flag):
            with pytest.raises(TypeError, match=r"^expected use_input_stats to be a bool"):
                call()


def test_a_flag_in_the_place_of_a_vector(xp):
    x = xp.zeros((2, 4, 3), np.float32)
    with pytest.raises(TypeError, match=r"did you mean use_input_stats=True\?$"):
        F.instance_norm(x, None, None, True)
    with pytest.raises(TypeError, match=r"^expected weight to be a NumPy or CuPy array \(got bool\)$"):
        F.group_norm(x, 2, True)


@by_channels
def test_unknown_activations(xp, case):
    for call in both(case, {"input": xp.zeros((2, 4, 3), np.float32)}, activation="gelu"):
        with pytest.raises(ValueError, match=r"^unknown activation 'gelu': expected one of None, 'relu'$"):
            call()


@pytest.mark.parametrize("fault", ["residual", "weight", "eps", "activation", "out", "one"])
def test_running_statistics_are_as_they_were(xp, rng, fault):
    """An error leaves every array as it was, whichever argument is wrong."""
    case = Case("instance_norm")
    given = case.arguments(xp, rng, (2, 4, 3), residual=True)
    given |= {"running_mean": xp.zeros(4, np.float32), "running_var": xp.ones(4, np.float32)}
    before, arrays = bits(*given.values()), list(given.values())
    out = xp.zeros((2, 4, 3), np.float32)
    case(**given, momentum=0.0, out=out)  # a good call comes before
    before_out = bits(out)
    wrong = {
        "residual": {"residual": given["residual"][:1]},
        "weight": {"weight": xp.ones(5, np.float32)},
        "eps": {"eps": -1.0},
        "activation": {"activation": "tanh"},
        "out": {"out": out[:1]},
        "one": {"input": given["input"][..., :1], "residual": None},
    }[fault]
    with pytest.raises(ValueError, match=r"xpected|eps|activation|weight"):
        case(**{"out": None if fault == "one" else out} | given | wrong)
    assert bits(*arrays) == before
    assert bits(out) == before_out


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize(
    ("cls", "ranks", "text"),
    [
        (InstanceNorm1d, (1, 4), "expected 2D or 3D input (got {}D input)"),
        (InstanceNorm2d, (2, 5), "expected 3D or 4D input (got {}D input)"),
        (InstanceNorm3d, (3, 6), "expected 4D or 5D input (got {}D input)"),
    ],
)
@pytest.mark.parametrize("features", [None, 4])
def test_ranks_of_layers(xp, device, cls, ranks, text, features):
    layer = cls(features, device=device)
    for rank in ranks:
        x = xp.zeros((4,) * rank, np.float32)
        raises(ValueError, text.format(rank), lambda x=x: layer(x), lambda x=x: layer.vjp(x))
    assert layer.num_features is features


def test_channels_of_layers(xp, device):
    x = xp.zeros((2, 5, 4), np.float32)
    text = (
        "expected 4 channels ({}) on axis 1, got 5 (axis 1 of the input of shape (2, 5, 4) has 5, axis 2 has 4: did "
        "you mean channel_axis=2?)"
    )
    raises(ValueError, text.format("num_features"), lambda: InstanceNorm1d(4, affine=True, device=device)(x))
    text = text.replace("5", "6")
    x = xp.zeros((2, 6, 4), np.float32)
    raises(ValueError, text.format("num_channels"), lambda: GroupNorm(2, 4, device=device)(x))
    text = (
        "expected 4 channels (num_features) on axis 0, got 5 (axis 0 of the input of shape (5, 4) has 5, axis 1 has 4: "
        "did you mean channel_axis=2?)"
    )
    x = xp.zeros((5, 4), np.float32)
    raises(ValueError, text, lambda: InstanceNorm1d(4, affine=True, device=device)(x))
    x = xp.zeros((4, 5, 3), np.float32)  # the axis of the samples is none to recommend
    text = "expected 4 channels (num_features) on axis 1, got 5"
    raises(ValueError, text, lambda: InstanceNorm1d(4, affine=True, device=device)(x))


def test_constructors(device):
    text = "num_channels (4) must be divisible by num_groups (3)"
    raises(ValueError, text, lambda: GroupNorm(3, 4, device=device))
    for n, error in (-1, ValueError), (4.0, TypeError), (None, TypeError):
        with pytest.raises(error, match=r"^expected num_channels "):
            GroupNorm(2, n, device=device)
    for make in (
        lambda **given: GroupNorm(2, 4, **given),
        lambda **given: LayerNorm(4, **given),
        lambda **given: RMSNorm(4, **given),
        lambda **given: InstanceNorm2d(4, **given),
    ):
        for eps in "1", 1j, None:
            if eps is None and isinstance(make(device=device), RMSNorm):
                continue
            with pytest.raises(TypeError, match=r"^expected eps to be a float"):
                make(device=device, eps=eps)
        with pytest.raises(ValueError, match=r"^unknown device"):
            make(device="tpu")
        with pytest.raises(TypeError, match=r"^expected dtype to be one of"):
            make(device=device, dtype=np.int32)
    for cls in LayerNorm, RMSNorm:
        with pytest.raises(TypeError, match=r"^expected elementwise_affine to be a bool"):
            cls(4, elementwise_affine=1, device=device)
    with pytest.raises(TypeError, match=r"^expected bias to be a bool"):
        LayerNorm(4, bias=1, device=device)
    for name in "affine", "bias":
        with pytest.raises(TypeError, match=rf"^expected {name} to be a bool"):
            GroupNorm(2, 4, device=device, **{name: 1})
    for make in (lambda **given: GroupNorm(2, 4, **given)), (lambda **given: InstanceNorm1d(4, **given)):
        with pytest.raises(ValueError, match=r"^unknown activation"):
            make(device=device, activation="gelu")
        with pytest.raises(TypeError, match=r"^expected channel_axis to be an int"):
            make(device=device, channel_axis=1.0)
    for axis in 0, -3, 3:
        with pytest.raises(ValueError, match="channel_axis"):
            InstanceNorm1d(4, channel_axis=axis, device=device)


def test_layers_on_another_device(xp, device):
    x = xp.zeros((2, 4, 3), np.float32)
    other = other_kind(xp, x)
    layers = [InstanceNorm1d(4, affine=True, device=device), GroupNorm(2, 4, device=device)]
    layers += [LayerNorm(3, device=device), RMSNorm((4, 3), device=device)]
    for layer in layers:
        with pytest.raises(TypeError, match=rf"as the layer is on {device} \(got a .*: use .*, or layer.to\("):
            layer(other)
        layer(x)


def test_momentum_of_a_layer(xp, device, rng):
    x = xp.asarray(rng.normal(size=(2, 4, 3)).astype(np.float32))
    layer = InstanceNorm1d(4, momentum=None, track_running_stats=True, device=device)
    before = bits(*layer.state_dict().values())
    for call in layer, layer.vjp:
        with pytest.raises(TypeError, match=r"^expected momentum to be a float \(got None\): instance norm counts no"):
            call(x)
    assert bits(*layer.state_dict().values()) == before
    layer.eval()(x)
    layer.train().track_running_stats = False
    layer(x)
    InstanceNorm1d(4, momentum=None, device=device)(x)


def test_one_position_of_a_layer(xp, device):
    x = xp.zeros((2, 4, 1), np.float32)
    text = "Expected more than 1 spatial element when training, got input size (2, 4, 1)"
    raises(ValueError, text, lambda: InstanceNorm1d(4, device=device)(x))
    text = text.replace("(2, 4, 1)", "(4, 1)")
    raises(ValueError, text, lambda: InstanceNorm1d(4, device=device).eval()(x[0]))
    layer = InstanceNorm1d(4, track_running_stats=True, device=device)
    with pytest.raises(ValueError, match=r"^Expected more than 1 spatial element .*; did you mean layer.eval\(\)\?$"):
        layer(x)
    layer.eval()(x)
