"""Instance, group, layer and RMS norm as functions: results, memory, and what must not change."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from tests.norms import CASES, EACH, SHAPE, Case, name_of
from tests.reference import DTYPES, assert_close, assert_gradients, assert_output, bits, in_order, to_numpy

cases = pytest.mark.parametrize("case", CASES, ids=name_of)
each = pytest.mark.parametrize("case", EACH, ids=name_of)

FIELDS = {
    "instance_norm": ("input", "weight", "bias", "residual"),
    "group_norm": ("input", "weight", "bias", "residual"),
    "layer_norm": ("input", "weight", "bias"),
    "rms_norm": ("input", "weight"),
}
"""Names of the gradients that each function has."""


def check(case, given, dy, computed_in=np.float32, **options):
    """Compare a call, and its way back, with the textbook. Returns output and gradients."""
    expected = case.expect(**given, **options, dy=dy)
    y, vjp_fn = case.vjp(**given, **options)
    grads = vjp_fn(dy)
    assert grads._fields == FIELDS[case.function]
    assert type(grads).__name__.lower() == f"{case.function}grads".replace("_", "")
    assert_output(y, expected, computed_in)
    assert_gradients((*grads, None, None)[:4], expected, computed_in)
    assert bits(case(**given, **options)) == bits(y)
    return y, grads


def gradient_like(xp, rng, x):
    """A gradient of an output like this input."""
    return xp.asarray(rng.normal(size=x.shape).astype(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Results


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(xp, rng, case, dtype):
    given = case.arguments(xp, rng, SHAPE, dtype, ml_dtypes.bfloat16)
    dy = gradient_like(xp, rng, given["input"])
    y, grads = check(case, given, dy, dtype)
    assert y.dtype == grads.input.dtype == dtype
    assert all(grads[i].dtype == ml_dtypes.bfloat16 for i in range(1, 1 + len(case.names)))


@cases
@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_parameters_may_be_missing(xp, rng, case, present):
    if not set(present) <= set(case.names):
        pytest.skip("RMS norm has no bias")
    given = case.arguments(xp, rng, SHAPE)
    given = {name: array for name, array in given.items() if name in ("input", *present)}
    _, grads = check(case, given, gradient_like(xp, rng, given["input"]))
    assert [name for name in grads._fields[1:] if getattr(grads, name) is not None] == list(present)


@pytest.mark.parametrize("case", [case for case in CASES if case.by_channels], ids=name_of)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_and_activation(xp, rng, case, activation, residual):
    given = case.arguments(xp, rng, SHAPE, residual=residual)
    dy = gradient_like(xp, rng, given["input"])
    _, grads = check(case, given, dy, activation=activation)
    assert (grads.residual is not None) == residual


@each
@pytest.mark.parametrize("eps", [0, 0.5, np.float32(0.25), True])
def test_eps(xp, rng, case, eps):
    given = case.arguments(xp, rng, SHAPE)
    check(case, given, gradient_like(xp, rng, given["input"]), eps=eps)


def test_eps_of_rms_norm_is_that_of_what_is_computed_in(xp):
    for dtype in DTYPES:
        tiny = xp.full((1, 4), 2.0**-12, dtype)
        eps = 2.0**-52 if dtype == np.float64 else 2.0**-23
        expected = 2.0**-12 / np.sqrt(2.0**-24 + eps)
        assert_close(F.rms_norm(tiny, 4), np.full((1, 4), expected), dtype, 1.0)


@pytest.mark.parametrize("shape", [4, [4], np.int64(4), (np.int32(4),)], ids=repr)
@pytest.mark.parametrize("function", [F.layer_norm, F.rms_norm])
def test_normalized_shape_is_an_int_or_a_sequence(xp, rng, function, shape):
    x = xp.asarray(rng.normal(size=(3, 4)).astype(np.float32))
    assert bits(function(x, shape)) == bits(function(x, (4,)))


@pytest.mark.parametrize("function", [F.layer_norm, F.rms_norm])
def test_an_array_may_be_one_row(xp, rng, function):
    x = xp.asarray(rng.normal(size=6).astype(np.float32))
    assert bits(function(x, 6)) == bits(function(x[None], 6)[0])


@pytest.mark.parametrize("case", [Case("instance_norm"), Case("group_norm", 2)], ids=name_of)
@pytest.mark.parametrize("rank", [2, 3, 5, 6])
def test_every_rank(xp, rng, case, rank):
    if rank == 2 and case.function == "instance_norm":
        pytest.skip("which has no positions")
    shape = (2, 4, 3, 2, 3, 2)[:rank]
    given = case.arguments(xp, rng, shape)
    check(case, given, gradient_like(xp, rng, given["input"]))


@each
def test_finite_differences(rng, case):
    """Gradients are what the output changes by."""
    shape = (2, 4, 4, 6)
    given = case.arguments(np, rng, shape, np.float64, np.float64, residual=case.by_channels)
    options = {"activation": "relu", "eps": 0.1} if case.by_channels else {"eps": 0.1}
    _, vjp_fn = case.vjp(**given, **options)
    dy = rng.normal(size=shape)
    grads = dict(zip(FIELDS[case.function], vjp_fn(dy), strict=True))
    for name, array in given.items():
        direction = rng.normal(size=array.shape)
        step = 1e-5
        up, down = (
            float((case(**given | {name: array + sign * step * direction}, **options) * dy).sum()) for sign in (1, -1)
        )
        slope = (up - down) / (2 * step)
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=1e-5, abs=1e-5)


@cases
def test_pytorch_agrees(rng, case):
    torch = pytest.importorskip("torch")
    given = case.arguments(np, rng, SHAPE, np.float64, np.float64)
    axis = case.channel_axis
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in given.items()}
    options = {"num_groups": case.num_groups, "normalized_shape": case.normalized_shape}
    options = {name: value for name, value in options.items() if value is not None}
    x = tensors.pop("input")
    theirs = getattr(torch.nn.functional, case.function)(x.movedim(axis, 1), **options, **tensors).movedim(1, axis)
    y, vjp_fn = case.vjp(**given)
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=1e-12, atol=1e-12)
    dy = rng.normal(size=SHAPE)
    expected = torch.autograd.grad(theirs, [x, *tensors.values()], torch.tensor(dy))
    for ours, tensor in zip(vjp_fn(dy), expected, strict=False):
        np.testing.assert_allclose(ours, tensor.numpy(), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("case", [Case("group_norm", 4), Case("layer_norm", normalized_shape=(1, 1))], ids=name_of)
@pytest.mark.parametrize("value", [0.0, 7.0, 1e30])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_row_of_one_value_is_exactly_bias(xp, rng, case, value, samples):
    given = case.arguments(xp, rng, (samples, 4, 1, 1))
    given["input"] = xp.full((samples, 4, 1, 1), value, np.float32)
    y = to_numpy(case(**given))
    assert (y == to_numpy(given["bias"]).reshape(1, -1, 1, 1)).all()


@each
def test_a_constant_row_without_eps_is_nan(xp, rng, case):
    given = case.arguments(xp, rng, SHAPE)
    given["input"][...] = 0
    assert np.isnan(to_numpy(case(**given, eps=0.0))).all()


@each
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(xp, rng, case, value):
    given = case.arguments(xp, rng, SHAPE)
    dy = gradient_like(xp, rng, given["input"])
    y, vjp_fn = case.vjp(**given)
    dx = vjp_fn(dy).input
    rows, back, _ = case._rows(SHAPE)
    spoiled = rows(np.zeros(SHAPE, bool))
    spoiled[(1,) + (0,) * (spoiled.ndim - 2)] = True
    spoiled = back(spoiled)
    place = tuple(int(i[0]) for i in spoiled.nonzero())
    given["input"] = given["input"].copy()
    given["input"][place] = value
    other, vjp_fn = case.vjp(**given)
    for before, after in (y, other), (dx, vjp_fn(dy).input):
        before, after = to_numpy(before), to_numpy(after)
        assert bits(before[~spoiled]) == bits(after[~spoiled])
        assert np.isnan(after[place])


@pytest.mark.parametrize("function", [F.layer_norm, F.rms_norm])
def test_a_row_does_not_depend_on_others(xp, rng, function):
    x = xp.asarray(rng.normal(size=(9, 40)).astype(np.float32))
    whole = function(x, 40)
    assert [bits(function(x[:k].copy(), 40)) for k in range(1, 9)] == [bits(whole[:k]) for k in range(1, 9)]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@each
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("axes", ["0123", "0231"])
def test_large_means(xp, rng, case, ratio, axes):
    """Errors stay below 1e-6 + 2^-22 abs(y) at any mean, and those of gradients below 3e-6 of the largest term."""
    x = (ratio + rng.normal(size=SHAPE)).astype(np.float32)
    x[0, 0, 0, 0] = 3 * ratio
    dy = rng.normal(size=SHAPE).astype(np.float32)
    expected = case.expect(x, dy=dy)
    axes = [int(axis) for axis in axes]
    y, vjp_fn = case.vjp(in_order(xp.asarray(x), axes))
    error = np.abs(to_numpy(y) - expected.y)
    assert (error <= 1e-6 + 2.0**-22 * np.abs(expected.y)).all()
    assert (np.abs(to_numpy(vjp_fn(xp.asarray(dy)).input) - expected.dx) <= 3e-6 * expected.terms["dx"] + 1e-30).all()


@each
@pytest.mark.parametrize("value", [7.0, 1e4, 1e8, 1e30])
def test_constant_rows_are_exactly_bias(xp, rng, case, value):
    if case.function == "rms_norm":
        pytest.skip("whose rows are not centered")
    given = case.arguments(xp, rng, SHAPE)
    given["input"] = xp.full(SHAPE, value, np.float32)
    bias = to_numpy(given["bias"])
    column = [-1 if axis == 1 else 1 for axis in range(4)] if case.by_channels else bias.shape
    assert (to_numpy(case(**given)) == bias.reshape(column)).all()


@each
@pytest.mark.parametrize("scale", [1e19, 1e25, 1e30])
def test_large_numbers(xp, rng, case, scale):
    x = xp.asarray((scale * rng.normal(size=SHAPE)).astype(np.float32))
    assert_output(case(x), case.expect(x), np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Running statistics


def running(xp, channels=4, dtype=np.float32):
    """Running statistics that have started."""
    return xp.zeros(channels, dtype), xp.ones(channels, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_follow(xp, rng, dtype):
    x = xp.asarray((3 + 2 * rng.normal(size=SHAPE)).astype(np.float32))
    mean, var = running(xp, dtype=dtype)
    y = F.instance_norm(x, mean, var, momentum=0.25)
    assert bits(y) == bits(F.instance_norm(x))
    exact = to_numpy(x).astype(np.float64)
    assert_close(mean, 0.25 * exact.mean(axis=(0, 2, 3)), np.float32)
    assert_close(var, 0.75 + 0.25 * exact.var(axis=(2, 3), ddof=1).mean(axis=0), np.float32)


def test_running_statistics_are_those_of_pytorch(xp, rng):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=SHAPE)
    ours, theirs = running(xp, dtype=np.float64), [torch.zeros(4).double(), torch.ones(4).double()]
    for uses_input in True, True, False:
        y = F.instance_norm(xp.asarray(x), *ours, use_input_stats=uses_input)
        expected = torch.nn.functional.instance_norm(torch.tensor(x), *theirs, use_input_stats=uses_input)
        np.testing.assert_allclose(to_numpy(y), expected.numpy(), rtol=1e-12, atol=1e-12)
        for mine, tensor in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(to_numpy(mine), tensor.numpy(), rtol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
def test_with_running_statistics_it_is_batch_norm_in_eval_mode(xp, rng, axis):
    x, residual, dy = (xp.asarray(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(3))
    vectors = [xp.asarray(rng.uniform(0.5, 2, SHAPE[axis]).astype(np.float32)) for _ in range(4)]
    options = {"residual": residual, "activation": "relu", "channel_axis": axis, "eps": 0.0}
    before = bits(*vectors)
    y, vjp_fn = F.instance_norm_vjp(x, *vectors, use_input_stats=False, **options)
    expected, expected_vjp_fn = F.batch_norm_vjp(x, *vectors, training=False, **options)
    assert bits(y, *vjp_fn(dy)) == bits(expected, *expected_vjp_fn(dy))
    assert type(vjp_fn(dy)) is F.InstanceNormGrads
    assert bits(*vectors) == before
    one = x[:1, :1, :1, :] if axis == -1 else x[:1, :, :1, :1]  # a single position is enough
    y = F.instance_norm(one, *vectors, use_input_stats=np.False_, channel_axis=axis)
    assert bits(y) == bits(F.batch_norm(one, *vectors, channel_axis=axis))


def test_nothing_moves_within_no_stats_update(xp, rng):
    x = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    mean, var = running(xp)
    with cupybn.no_stats_update():
        y = F.instance_norm(x, mean, var)
    assert bits(mean, var) == bits(*running(xp))
    assert bits(F.instance_norm(x, mean, var)) == bits(y)
    assert bits(mean, var) != bits(*running(xp))


def test_the_way_back_is_right_when_statistics_have_moved(xp, rng):
    x, dy = (xp.asarray(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    mean, var = running(xp)
    for uses_input in True, False:
        _, vjp_fn = F.instance_norm_vjp(x, mean, var, use_input_stats=uses_input)
        expected = bits(vjp_fn(dy).input)
        F.instance_norm(x, mean, var)
        assert bits(vjp_fn(dy).input) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@each
@pytest.mark.parametrize("axes", ["0123", "0231", "0213", "0321", "1023", "2301", "3210"])
def test_memory_order_is_kept(xp, rng, case, axes):
    given = case.arguments(xp, rng, SHAPE, residual=case.by_channels)
    dy = gradient_like(xp, rng, given["input"])
    options = {"activation": "relu"} if case.by_channels else {}
    axes = [int(axis) for axis in axes]
    given = {name: in_order(array, axes) if array.shape == SHAPE else array for name, array in given.items()}
    y, grads = check(case, given, dy, **options)
    for array in (y, grads.input, *((grads.residual,) if case.by_channels else ())):
        assert array.strides == given["input"].strides
    if case.by_channels:
        assert case.vjp(**given)[1](dy).residual.strides in (dy.strides, given["input"].strides)


@each
def test_other_memory_of_all_arrays(xp, rng, case):
    """Arrays that are not dense, in any order and direction, are like their copies."""
    given = case.arguments(xp, rng, SHAPE, residual=case.by_channels)
    dy = gradient_like(xp, rng, given["input"])
    y, vjp_fn = case.vjp(**given)
    expected = [to_numpy(array) for array in (y, *vjp_fn(dy)) if array is not None]

    def strided(array):
        wide = xp.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]

    def backwards(array):
        return array[..., ::-1].copy()[..., ::-1]

    for other in strided, backwards, lambda array: in_order(array, range(array.ndim)[::-1]):
        y, vjp_fn = case.vjp(**{name: other(array) for name, array in given.items()})
        for array, like in zip(
            (array for array in (y, *vjp_fn(other(dy))) if array is not None), expected, strict=True
        ):
            np.testing.assert_allclose(to_numpy(array), like, rtol=1e-5, atol=1e-5)  # the order of sums may differ


@each
def test_out(xp, rng, case):
    given = case.arguments(xp, rng, SHAPE, residual=case.by_channels)
    expected = to_numpy(case(**given))
    for out in (
        xp.zeros(SHAPE, np.float32),
        in_order(xp.zeros(SHAPE, np.float32), (0, 2, 3, 1)),
        in_order(xp.zeros(SHAPE, np.float32), (3, 2, 1, 0)),
        xp.zeros((*SHAPE, 2), np.float32)[..., 1],
    ):
        assert case(**given, out=out) is out
        assert (to_numpy(out) == expected).all()


@each
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("role", ["input", "residual"])
def test_out_may_be_the_input_or_the_residual(xp, rng, case, axes, role):
    if role == "residual" and not case.by_channels:
        pytest.skip("no residual")
    given = case.arguments(xp, rng, SHAPE, residual=case.by_channels)
    given = {name: in_order(array, axes) if array.shape == SHAPE else array for name, array in given.items()}
    expected = to_numpy(case(**given))
    assert case(**given, out=given[role]) is given[role]
    assert (to_numpy(given[role]) == expected).all()


@each
def test_out_may_share_memory_with_parameters(xp, rng, case):
    """The output is that of the values that all arrays had when the call began."""
    for name in case.names:
        given = case.arguments(xp, rng, SHAPE)
        expected = to_numpy(case(**given))
        shape = given[name].shape
        out = xp.zeros(SHAPE, np.float32)
        shared = out.reshape(-1)[: given[name].size].reshape(shape)
        shared[...] = given[name]
        case(**given | {name: shared}, out=out)
        assert (to_numpy(out) == expected).all()


def test_vectors_may_be_running_statistics(xp, rng):
    """What moves is not seen by what reads."""
    x, dy = (xp.asarray(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    mean, var = running(xp)
    y, vjp_fn = F.instance_norm_vjp(x, mean, var, weight=var.copy(), bias=mean.copy())
    expected, moved = bits(y, *vjp_fn(dy)), bits(mean, var)
    mean, var = running(xp)
    y, vjp_fn = F.instance_norm_vjp(x, mean, var, weight=var, bias=mean)
    assert bits(mean, var) == moved
    assert bits(y, *vjp_fn(dy)) == expected
    F.instance_norm(x, mean, var)
    assert bits(y, *vjp_fn(dy)) == expected


def test_running_statistics_may_share_memory(xp, rng):
    x = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    one = xp.ones(4, np.float32)
    mean, var = xp.ones(4, np.float32), xp.ones(4, np.float32)
    expected = bits(F.instance_norm(x, mean, var))
    assert bits(F.instance_norm(x, one, one)) == expected
    assert bits(one) == bits(var)  # which is written last
    own = x.copy()
    inside = own.reshape(-1)[:4]
    inside_mean, inside_var = inside.copy(), xp.ones(4, np.float32)
    expected, dx = F.instance_norm_vjp(x, inside_mean, inside_var)
    y, vjp_fn = F.instance_norm_vjp(own, inside, xp.ones(4, np.float32))
    assert bits(y, inside, vjp_fn(x).input) == bits(expected, inside_mean, dx(x).input)


@each
def test_the_residual_may_be_overwritten(xp, rng, case):
    if not case.by_channels:
        pytest.skip("no residual")
    given = case.arguments(xp, rng, SHAPE, residual=True)
    dy = gradient_like(xp, rng, given["input"])
    _, vjp_fn = case.vjp(**given, activation="relu")
    expected = bits(*vjp_fn(dy))
    given["residual"][...] = np.nan
    assert bits(*vjp_fn(dy)) == expected


@each
def test_the_way_back_is_pure(xp, rng, case):
    given = case.arguments(xp, rng, SHAPE)
    dy = gradient_like(xp, rng, given["input"])
    _, vjp_fn = case.vjp(**given)
    before = bits(*given.values(), dy)
    first = vjp_fn(dy)
    assert bits(*vjp_fn(dy)) == bits(*first)
    assert bits(*given.values(), dy) == before
    assert copy.copy(vjp_fn) is vjp_fn
    assert copy.deepcopy(vjp_fn) is vjp_fn


@each
def test_input_and_weight_are_held_by_reference(xp, rng, case):
    """The way back takes their values as they are when it goes: nothing of their size is kept."""
    given = case.arguments(xp, rng, SHAPE)
    dy = gradient_like(xp, rng, given["input"])
    _, vjp_fn = case.vjp(**given)
    saved = vjp_fn._saved
    assert saved.input is given["input"]
    assert saved.affine.weight is given["weight"]
    kept = [saved.pairs, saved.epilogue.passed, saved.count_left]
    rows = case.expect(**given).mean.size
    assert sum(array.nbytes for array in kept if array is not None) == 16 * rows  # mean and variance
    given["weight"][...] = 0
    assert not to_numpy(vjp_fn(dy).input).any()


@each
@pytest.mark.parametrize("fault", ["shape", "dtype", "kind", "class"])
def test_a_gradient_that_is_not_like_the_input(xp, rng, case, fault):
    given = case.arguments(xp, rng, SHAPE)
    dy = gradient_like(xp, rng, given["input"])
    _, vjp_fn = case.vjp(**given)
    wrong = {
        "shape": lambda: dy[:1],
        "dtype": lambda: dy.astype(np.float64),
        "kind": lambda: to_numpy(dy) if xp is not np else pytest.importorskip("cupy").asarray(dy),
        "class": lambda: dy.tolist(),
    }[fault]()
    with pytest.raises(ValueError if fault == "shape" else TypeError, match=r"^expected grad_output "):
        vjp_fn(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays without elements

EMPTY = (
    (Case("instance_norm"), (0, 4, 3)),
    (Case("instance_norm"), (2, 0, 3)),
    (Case("instance_norm"), (2, 4, 0)),
    (Case("group_norm", 2), (0, 4, 3)),
    (Case("group_norm", 2), (2, 0, 3)),
    (Case("group_norm", 2), (2, 4, 0)),
    (Case("layer_norm", normalized_shape=(4, 3)), (0, 4, 3)),
    (Case("layer_norm", normalized_shape=(0,)), (2, 4, 0)),
    (Case("rms_norm", normalized_shape=(3,)), (2, 0, 3)),
    (Case("rms_norm", normalized_shape=(0, 3)), (2, 0, 3)),
)


@pytest.mark.parametrize(("case", "shape"), EMPTY, ids=str)
def test_without_elements_there_are_zero_gradients(xp, rng, case, shape):
    given = case.arguments(xp, rng, shape, residual=case.by_channels)
    options = {"activation": "relu"} if case.by_channels else {}
    y, vjp_fn = case.vjp(**given, **options)
    grads = vjp_fn(xp.zeros(shape, np.float32))
    assert y.shape == grads.input.shape == shape
    for name in case.names:
        assert getattr(grads, name).shape == given[name].shape
        assert not to_numpy(getattr(grads, name)).any()
    out = xp.empty(shape, np.float32)
    assert case(**given, out=out) is out
    if case.function == "instance_norm":
        mean, var = running(xp, shape[1])
        case(**given, running_mean=mean, running_var=var)
        assert bits(mean, var) == bits(*running(xp, shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# What calls cost the host


@each
def test_calls_that_are_alike_are_checked_once(xp, rng, case, monkeypatch):
    given = case.arguments(xp, rng, SHAPE)
    dy = gradient_like(xp, rng, given["input"])
    case(**given)
    case.vjp(**given)
    from cupybn._calls.call import Call

    monkeypatch.setattr(Call, "check", lambda *_: pytest.fail("checked again"))
    again = {name: array.copy() for name, array in given.items()}
    case(**again)
    case.vjp(**again)[1](dy)


def test_functions_are_told_apart(xp, rng):
    """A call is not taken for one of another function, or with other groups, that came before."""
    x = xp.asarray(rng.normal(size=(2, 4, 4)).astype(np.float32))
    calls = [
        lambda: F.batch_norm(x, None, None, training=True),
        lambda: F.instance_norm(x),
        *(lambda n=n: F.group_norm(x, n) for n in (1, 2, 4)),
        *(lambda shape=shape: F.layer_norm(x, shape) for shape in ((4,), (4, 4), (2, 4, 4))),
        *(lambda shape=shape: F.rms_norm(x, shape, eps=1e-5) for shape in ((4,), (4, 4))),
    ]
    first = [bits(call()) for call in calls]
    assert [bits(call()) for call in reversed(calls)] == first[::-1]
    # Instance norm may be as four groups and as the last axis, one group as the last two axes.
    assert len({text for (text,) in first}) >= len(calls) - 3


@each
def test_launches_are_recorded(rng, case, plays):
    """Calls on a GPU that are alike play the launches of the first one, there and back."""
    cupy = pytest.importorskip("cupy")
    given = case.arguments(cupy, rng, SHAPE, residual=case.by_channels)
    options = {"activation": "relu"} if case.by_channels else {}
    dy = gradient_like(cupy, rng, given["input"])
    results = []
    for repetition in range(3):
        again = {name: array.copy() for name, array in given.items()}
        y, vjp_fn = case.vjp(**again, **options)
        results.append(bits(y, *vjp_fn(dy)))
        assert len(plays) == 2 * repetition
    assert results[0] == results[1] == results[2]


@each
@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (2, 3)], ids=str)
def test_arrays_that_begin_elsewhere_are_told_apart(rng, case, offsets):
    """A tape of calls whose arrays begin at a pack is not played for others, of which weight and bias are some."""
    cupy = pytest.importorskip("cupy")
    case = case if case.by_channels else case._replace(normalized_shape=(8,))
    given = case.arguments(cupy, rng, (2, 4, 4, 8))
    dy = gradient_like(cupy, rng, given["input"])
    y, vjp_fn = case.vjp(**given)
    expected = [to_numpy(array) for array in (y, *vjp_fn(dy)) if array is not None]

    def shifted(array, offset):
        memory = cupy.zeros(array.size + 4, array.dtype)
        view = memory[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        return view

    of_input, of_parameters = offsets
    again = {name: shifted(a, of_input if name == "input" else of_parameters) for name, a in given.items()}
    for _ in range(2):
        y, vjp_fn = case.vjp(**again)
        results = [array for array in (y, *vjp_fn(shifted(dy, of_input))) if array is not None]
        for array, like in zip(results, expected, strict=True):
            np.testing.assert_allclose(to_numpy(array), like, rtol=1e-5, atol=1e-5)


def test_running_statistics_move_from_tapes(rng, plays):
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(rng.normal(size=SHAPE).astype(np.float32))
    mean, var = running(cupy)
    expected = running(np)
    for momentum in 0.1, 0.2, 0.5:
        F.instance_norm(x, mean, var, momentum=momentum)
        F.instance_norm(to_numpy(x), *expected, momentum=momentum)
    assert len(plays) == 2
    for ours, theirs in zip((mean, var), expected, strict=True):
        assert_close(ours, theirs, np.float32)
