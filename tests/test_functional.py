"""The functional form against the textbook: values, gradients, memory orders, dtypes, special cases, properties."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cupybn
import cupybn.functional as F
from tests.reference import (
    DTYPES,
    ROUNDINGS,
    arguments,
    assert_close,
    assert_gradients,
    assert_output,
    bits,
    expect,
    in_order,
    moved,
    to_numpy,
)

SHAPES = {
    "two-values": (2, 1),
    "odd-nc": (7, 5),
    "one-sample": (1, 3, 4),
    "one-position": (4, 3, 1),
    "nchw": (2, 3, 4, 5),
    "ncdhw": (2, 3, 4, 2, 3),
    "rank-6-with-axes-of-one": (2, 3, 1, 2, 1, 3),
}
LARGE = {"many-blocks-of-n": (300_001, 1), "many-blocks-of-l": (2, 3, 151, 331), "many-channels": (3, 70_001)}
"""Shapes beyond those that a step does in one piece: more than 2^18 elements, or 65535 blocks."""

AXES = [(rank, axis) for rank in range(2, 7) for axis in range(-rank, rank)]
VECTORS = ("running_mean", "running_var", "weight", "bias")


def forward_and_back(kwargs, dy):
    """Compare a call forth and back, and all its results, with the reference."""
    x, expected = kwargs["input"], expect(kwargs, dy)
    y, vjp_fn = F.batch_norm_vjp(**kwargs)
    grads = vjp_fn(dy)
    assert type(y) is type(x)
    assert (y.dtype, grads.input.dtype) == (x.dtype, x.dtype)
    assert_output(y, expected, x.dtype)
    for name in ("weight", "bias", "residual"):
        argument, grad = kwargs.get(name), getattr(grads, name)
        assert (grad is None) == (argument is None)
        assert grad is None or (type(grad) is type(argument) and grad.dtype == argument.dtype)
    assert_gradients(grads, expected, x.dtype)
    return y, grads


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(xp, rng, shape, training):
    full = arguments(xp, rng, shape)
    dy = xp.asarray(rng.normal(size=shape).astype(np.float32))
    for absent in itertools.product(*(([], [name]) for name in ("weight", "bias", "residual"))):
        for activation in (None, "relu"):
            kwargs = full | dict.fromkeys(itertools.chain(*absent)) | {"activation": activation, "training": training}
            y, _ = forward_and_back(kwargs, dy)
            assert bits(F.batch_norm(**kwargs)) == bits(y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large_arrays(xp, rng, shape, training):
    dy = xp.asarray(rng.normal(size=shape).astype(np.float32))
    forward_and_back(arguments(xp, rng, shape) | {"training": training}, dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rank", "axis"), AXES)
def test_channel_axis(xp, rng, rank, axis, training):
    shape = (2, 3, 4, 2, 3, 2)[:rank]
    kwargs = arguments(xp, rng, shape, channel_axis=axis) | {"training": training, "activation": "relu"}
    forward_and_back(kwargs, xp.asarray(rng.normal(size=shape).astype(np.float32)))


def test_arguments_stand_in_the_order_of_torch(xp, rng):
    a = arguments(xp, rng, (6, 3))
    vectors = [a[name] for name in VECTORS]
    by_name = dict(zip(VECTORS, vectors, strict=True))
    for training, eps in (False, 0.5), (True, 0.25):
        y = F.batch_norm(a["input"], *vectors, training, 0.0, eps)
        assert_output(y, expect({"input": a["input"], "training": training, "eps": eps} | by_name), np.float32)
        assert bits(F.batch_norm_vjp(a["input"], *vectors, training, 0.0, eps)[0]) == bits(y)
    with pytest.raises(TypeError):
        F.batch_norm(a["input"], *vectors, True, 0.1, 1e-5, a["residual"])
    with pytest.raises(TypeError):
        F.moments(a["input"], 1)


def test_defaults_are_eval_and_torchs_numbers(xp, rng):
    a = arguments(xp, rng, (6, 3))
    x, before = a["input"], bits(a["running_mean"], a["running_var"])
    y = F.batch_norm(x, a["running_mean"], a["running_var"])
    assert bits(a["running_mean"], a["running_var"]) == before
    assert_output(y, expect({name: a[name] for name in ("input", "running_mean", "running_var")}), np.float32)
    expected = moved(a["running_mean"], a["running_var"], x, momentum=0.1)
    F.batch_norm(x, a["running_mean"], a["running_var"], training=True)
    for running, wanted in zip((a["running_mean"], a["running_var"]), expected, strict=True):
        assert_close(running, wanted, np.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 2.0])
def test_eps(xp, rng, eps, training):
    kwargs = arguments(xp, rng, (5, 3, 4)) | {"eps": eps, "training": training}
    forward_and_back(kwargs, xp.asarray(rng.normal(size=(5, 3, 4)).astype(np.float32)))


def test_eps_zero_in_eval(xp, rng):
    kwargs = arguments(xp, rng, (5, 3, 4)) | {"eps": 0.0}
    forward_and_back(kwargs, xp.asarray(rng.normal(size=(5, 3, 4)).astype(np.float32)))


def test_training_without_buffers(xp, rng):
    kwargs = arguments(xp, rng, (5, 3, 4)) | {"running_mean": None, "running_var": None, "training": True}
    forward_and_back(kwargs, xp.asarray(rng.normal(size=(5, 3, 4)).astype(np.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(xp, rng, dtype):
    kwargs = arguments(xp, rng, (9, 5, 700), dtype=dtype, vectors=dtype) | {"training": True, "activation": "relu"}
    dy = xp.asarray(rng.normal(size=(9, 5, 700)).astype(dtype))
    results = []
    for _ in range(2):
        copies = {name: value.copy() if hasattr(value, "copy") else value for name, value in kwargs.items()}
        y, vjp_fn = F.batch_norm_vjp(**copies)
        results.append(bits(y, *vjp_fn(dy), copies["running_mean"], copies["running_var"]))
    assert results[0] == results[1]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_finite_differences(xp, rng, training, with_residual, activation):
    """Each element of each gradient is the slope of sum(dy * y), as finite differences show it."""
    step, shape = 1e-5, (4, 3, 2)
    kwargs = arguments(xp, rng, shape, dtype=np.float64, vectors=np.float64)
    kwargs |= {"training": training, "activation": activation, "momentum": 0.0, "eps": 0.1}
    if not with_residual:
        kwargs["residual"] = None
    dy = xp.asarray(rng.normal(size=shape))
    before_relu = F.batch_norm(**kwargs | {"activation": None})
    assert np.min(np.abs(to_numpy(before_relu))) > 10 * step  # no value changes its sign within a step

    grads = F.batch_norm_vjp(**kwargs)[1](dy)
    for name in ("input", "weight", "bias", "residual"):
        if kwargs[name] is None:
            continue
        slopes = np.empty(kwargs[name].shape)
        for index in np.ndindex(*slopes.shape):
            sums = []
            for sign in (-1, 1):
                shifted = kwargs[name].copy()
                shifted[index] += sign * step
                sums.append(float((dy * F.batch_norm(**kwargs | {name: shifted})).sum()))
            slopes[index] = (sums[1] - sums[0]) / (2 * step)
        # The error is step^2 times a third derivative of size 1 to 10, plus rounding: 2^-52 * 10 / step.
        np.testing.assert_allclose(to_numpy(getattr(grads, name)), slopes, rtol=0, atol=2e-8, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# ReLU


def test_relu_passes_nan(xp):
    x = xp.asarray(np.array([[np.nan, -1], [2, 3]], np.float32))
    y = F.batch_norm(x, xp.zeros(2, np.float32), xp.ones(2, np.float32), activation="relu", eps=0.0)
    np.testing.assert_array_equal(to_numpy(y), np.array([[np.nan, 0], [2, 3]], np.float32))


def test_relu_has_no_slope_at_zero(xp):
    x = xp.asarray(np.array([[-1.0], [0.0], [1.0]], np.float32))
    ones, zeros = xp.ones(1, np.float32), xp.zeros(1, np.float32)
    _, vjp_fn = F.batch_norm_vjp(x, zeros, ones, ones, zeros, eps=0.0, activation="relu", residual=xp.zeros_like(x))
    grads = vjp_fn(xp.ones_like(x))
    for grad in (grads.input, grads.residual):
        np.testing.assert_array_equal(to_numpy(grad), [[0], [0], [1]])
    assert (float(grads.weight[0]), float(grads.bias[0])) == (1, 1)


def test_relu_looks_at_the_value_before_rounding(xp):
    """ReLU looks at its argument before that is rounded: a quarter of 2^-24, the least float16, rounds to 0 but is
    positive.
    """
    x = xp.asarray(np.array([[2.0**-24], [-(2.0**-24)]], np.float16))
    quarter = xp.asarray(np.array([0.25], np.float32))
    y, vjp_fn = F.batch_norm_vjp(
        x, xp.zeros(1, np.float32), xp.ones(1, np.float32), quarter, eps=0.0, activation="relu"
    )
    np.testing.assert_array_equal(to_numpy(y), [[0], [0]])
    np.testing.assert_array_equal(to_numpy(vjp_fn(xp.ones_like(x)).input), [[0.25], [0]])


# ---------------------------------------------------------------------------------------------------------------------
# Running statistics


@pytest.mark.parametrize("momentum", [0, 0.1, np.float32(0.25), 1, 2.0, -1])
@pytest.mark.parametrize("function", [F.batch_norm, F.batch_norm_vjp])
def test_running_update(xp, rng, function, momentum):
    a = arguments(xp, rng, (5, 3, 4))
    running = a["running_mean"], a["running_var"]
    expected = moved(*running, a["input"], momentum=float(momentum))
    before = bits(*running)
    function(a["input"], *running, training=True, momentum=momentum)
    for now, wanted in zip(running, expected, strict=True):
        assert_close(now, wanted, np.float32, scale=10)
    assert (bits(*running) == before) == (momentum == 0)


def test_running_update_of_views_leaves_what_lies_between(xp, rng):
    a = arguments(xp, rng, (5, 3, 4))
    whole = xp.full((3, 4), 7, np.float32)
    mean, var = whole[:, 1], whole[::-1, 3]
    mean[...], var[...] = a["running_mean"], a["running_var"]
    expected = moved(mean, var, a["input"])
    F.batch_norm(a["input"], mean, var, training=True)
    for now, wanted in zip((whole[:, 1], whole[::-1, 3]), expected, strict=True):
        assert_close(now, wanted, np.float32)
    assert np.all(to_numpy(whole[:, [0, 2]]) == 7)


@pytest.mark.parametrize(("mean_dtype", "var_dtype"), list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_running_update_of_other_dtypes(xp, rng, mean_dtype, var_dtype):
    dtypes = {"running_mean": mean_dtype, "running_var": var_dtype, "weight": np.float32, "bias": np.float32}
    for dtype in (np.float16, np.float64):
        a = arguments(xp, rng, (5, 3, 4), dtype=dtype, vectors=dtypes)
        running = a["running_mean"], a["running_var"]
        expected = moved(*running, a["input"])
        F.batch_norm(a["input"], *running, training=True)
        assert [array.dtype for array in running] == [mean_dtype, var_dtype]
        for now, wanted in zip(running, expected, strict=True):
            assert_close(now, wanted, dtype)


def test_running_variance_too_large_for_its_dtype_is_inf(xp, rng):
    x = xp.asarray((1e4 * rng.normal(size=(50, 2))).astype(np.float32))
    mean, var = xp.zeros(2, np.float16), xp.ones(2, np.float16)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert np.all(to_numpy(var) == np.inf)
    assert_close(mean, moved(mean, mean, x, momentum=1.0)[0], np.float32)


@pytest.mark.parametrize("function", [F.batch_norm, F.batch_norm_vjp])
def test_no_stats_update_holds_for_functions(xp, rng, function):
    a = arguments(xp, rng, (5, 3, 4)) | {"training": True}
    before = bits(a["running_mean"], a["running_var"])
    with cupybn.no_stats_update():
        result = function(**a)
    assert bits(a["running_mean"], a["running_var"]) == before
    assert_output(result[0] if isinstance(result, tuple) else result, expect(a), np.float32)
    function(**a)
    assert bits(a["running_mean"], a["running_var"]) != before


# ---------------------------------------------------------------------------------------------------------------------
# out


OUTS = {
    "fresh": lambda a: a["input"].copy(),
    "input": lambda a: a["input"],
    "residual": lambda a: a["residual"],
    "nhwc": lambda a: in_order(a["input"], (0, 2, 3, 1)),
    "strided": lambda a: a["input"].repeat(3, axis=3)[..., 1::3],
    "backwards": lambda a: a["input"].copy()[::-1, :, ::-1],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("make_out", OUTS.values(), ids=OUTS)
def test_out(xp, rng, make_out, order, dtype, training):
    a = arguments(xp, rng, (2, 3, 4, 5), dtype=dtype)
    a |= {"input": in_order(a["input"], order), "training": training, "activation": "relu"}
    out = make_out(a)
    expected, running = expect(a), (a["running_mean"], a["running_var"])
    wanted = moved(*running, a["input"], momentum=0.1 if training else 0)
    others = [array for array in (a["input"], a["residual"], a["weight"], a["bias"]) if array is not out]
    before = bits(*others)
    assert F.batch_norm(**a, out=out) is out
    assert_output(out, expected, dtype)
    assert bits(*others) == before
    for now, then in zip(running, wanted, strict=True):
        assert_close(now, then, dtype)


def test_out_writes_only_its_own_elements(xp, rng):
    a = arguments(xp, rng, (2, 3, 4))
    whole = xp.full((2, 6, 8), 7, np.float32)
    F.batch_norm(**a, out=whole[:, ::2, 1::2])
    assert_output(whole[:, ::2, 1::2], expect(a), np.float32)
    others = to_numpy(whole).copy()
    others[:, ::2, 1::2] = 7
    assert np.all(others == 7)


# ---------------------------------------------------------------------------------------------------------------------
# Memory orders


DENSE = {
    "c-order": (0, 1, 2, 3),
    "channels-last": (0, 2, 3, 1),
    "channels-first": (1, 0, 2, 3),
    "fortran": (3, 2, 1, 0),
    "h-and-w-swapped": (0, 1, 3, 2),
    "channels-between": (0, 2, 1, 3),
}
SPARSE = {
    "sliced": lambda x: x.repeat(2, axis=3)[..., ::2],
    "cropped": lambda x: x.repeat(3, axis=2)[:, :, 4:8],
    "some-channels": lambda x: x.repeat(2, axis=1)[:, 1:4],
    "backwards": lambda x: x[::-1, :, ::-1],
    "channels-backwards": lambda x: x[:, ::-1],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 2, 1, 4), (1, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_dense_input_keeps_its_memory_order(xp, rng, order, shape, training):
    a = arguments(xp, rng, shape) | {"training": training, "activation": "relu"}
    a["input"] = x = in_order(a["input"], order)
    before = bits(x)
    for dy_order in (order, (0, 1, 2, 3), (3, 1, 2, 0)):
        dy = in_order(xp.asarray(rng.normal(size=shape).astype(np.float32)), dy_order)
        y, grads = forward_and_back(a, dy)
        for array in (y, grads.input, grads.residual, forward_and_back(a | {"activation": None}, dy)[1].residual):
            assert array.transpose(order).flags.c_contiguous
    assert bits(x) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make_view", SPARSE.values(), ids=SPARSE)
def test_views_that_are_not_dense(xp, rng, make_view, training):
    a = arguments(xp, rng, (2, 3, 4, 5)) | {"training": training, "activation": "relu"}
    a["input"], a["residual"] = make_view(a["input"]), make_view(a["residual"])
    forward_and_back(a, make_view(xp.asarray(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))))


def test_broadcast_views(xp, rng):
    """An input or gradient may be a broadcast view, all elements of a channel or of the array being one in memory."""
    a = arguments(xp, rng, (4, 3, 5)) | {"training": True}
    a["input"] = xp.broadcast_to(a["input"][:, :, :1], (4, 3, 5))
    a["residual"] = xp.broadcast_to(a["residual"][:1, :1, :1], (4, 3, 5))
    _, grads = forward_and_back(a, xp.broadcast_to(xp.asarray(np.float32(0.5)), (4, 3, 5)))
    assert to_numpy(grads.input).flags.writeable


def test_vectors_may_be_views(xp, rng):
    kwargs = arguments(xp, rng, (4, 3, 5)) | {"training": True}
    dy = xp.asarray(rng.normal(size=(4, 3, 5)).astype(np.float32))
    for name in VECTORS:
        for view in (kwargs[name].repeat(3)[1::3], kwargs[name][::-1].copy()[::-1]):
            assert_close(view, to_numpy(kwargs[name]), np.float64, scale=0)
            forward_and_back(kwargs | {name: view}, dy)
    forward_and_back(kwargs | {"weight": xp.broadcast_to(kwargs["weight"][:1], (3,))}, dy)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False])
def test_dense_input_is_not_copied(rng, order, training):
    """A dense input is not copied: all allocations together, which NumPy reports, are less than one more input."""
    a = arguments(np, rng, (64, 16, 64, 64))
    a |= {name: in_order(a[name], order) for name in ("input", "residual")} | {"training": training}
    out = np.empty_like(a["input"])
    F.batch_norm(**a, out=out)
    tracemalloc.start()
    try:
        F.batch_norm(**a, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < a["input"].nbytes


# ---------------------------------------------------------------------------------------------------------------------
# dtypes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(xp, rng, dtype, vectors, training):
    shape = (4, 3, 5)
    kwargs = arguments(xp, rng, shape, dtype=dtype, vectors=vectors) | {"training": training}
    dy = xp.asarray(rng.normal(size=shape).astype(dtype))
    for activation in (None, "relu"):
        forward_and_back(kwargs | {"activation": activation}, dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("turn", range(4))
def test_each_vector_may_have_its_own_dtype(xp, rng, turn, training):
    vectors = dict(zip(VECTORS, DTYPES[turn:] + DTYPES[:turn], strict=True))
    for dtype in (np.float16, np.float32, np.float64):
        kwargs = arguments(xp, rng, (4, 3, 5), dtype=dtype, vectors=vectors) | {"training": training}
        forward_and_back(kwargs, xp.asarray(rng.normal(size=(4, 3, 5)).astype(dtype)))


def test_16_bit_data_is_summed_in_more_bits(xp):
    """16-bit data is summed in more bits: 4098 ones and one 2 would sum to 2048 in float16, and to 256 in bfloat16."""
    for dtype in DTYPES[:2]:
        x = np.ones((4099, 1), dtype)
        x[0] = 2
        mean, var = F.moments(xp.asarray(x))
        assert_close(mean, [4100 / 4099], np.float32)
        assert_close(var, [4098 / 4099**2], np.float32, scale=4098 / 4099**2)


# ---------------------------------------------------------------------------------------------------------------------
# vjp_fn


@pytest.mark.parametrize("vectors", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", ""])
def test_vjp_fn_is_pure(xp, rng, with_residual, training, activation, vectors):
    kwargs = arguments(xp, rng, (4, 3, 5), vectors=vectors) | {"training": training, "activation": activation}
    if not with_residual:
        del kwargs["residual"]
    dy, other = (xp.asarray(rng.normal(size=(4, 3, 5)).astype(np.float32)) for _ in range(2))
    expected = expect(kwargs, dy)
    y, vjp_fn = F.batch_norm_vjp(**kwargs)
    arrays = [value for value in kwargs.values() if hasattr(value, "dtype")]
    before = bits(*arrays, dy, other, y)
    first = bits(*vjp_fn(dy))
    assert bits(*vjp_fn(other)) != first
    assert bits(*vjp_fn(dy)) == first
    assert bits(*arrays, dy, other, y) == before

    # Moves the running statistics between forward and back.
    F.batch_norm(**kwargs | {"training": True, "input": 5 * kwargs["input"]})
    y[...] = 0
    grads = vjp_fn(dy)
    assert bits(*grads) == first
    assert_gradients(grads, expected, np.float32)


def test_vjp_fn_is_none_where_there_is_no_argument(xp, rng):
    a = arguments(xp, rng, (4, 3, 5))
    dy = a["input"]
    grads = F.batch_norm_vjp(a["input"], None, None, training=True)[1](dy)
    assert isinstance(grads, cupybn.BatchNormGrads)
    assert grads._fields == ("input", "weight", "bias", "residual")
    assert [grad is None for grad in grads] == [False, True, True, True]
    for name, position in ("weight", 1), ("bias", 2), ("residual", 3):
        grads = F.batch_norm_vjp(a["input"], None, None, training=True, **{name: a[name]})[1](dy)
        assert [i for i, grad in enumerate(grads) if grad is not None] == [0, position]


def test_vjp_updates_running_statistics_as_the_forward_pass(xp, rng):
    a = arguments(xp, rng, (4, 3, 5)) | {"training": True}
    b = a | {name: a[name].copy() for name in ("running_mean", "running_var")}
    y, _ = F.batch_norm_vjp(**a)
    assert bits(y) == bits(F.batch_norm(**b))
    assert bits(a["running_mean"], a["running_var"]) == bits(b["running_mean"], b["running_var"])


# ---------------------------------------------------------------------------------------------------------------------
# Empty arrays; NaN and inf


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0, 0), (2, 3, 0, 4)], ids=str)
def test_empty_input(xp, rng, shape, training, activation):
    kwargs = arguments(xp, rng, shape, dtype=np.float16) | {"training": training, "activation": activation}
    before = bits(*(kwargs[name] for name in VECTORS))
    y, vjp_fn = F.batch_norm_vjp(**kwargs)
    grads = vjp_fn(xp.empty_like(y))
    for array in (y, F.batch_norm(**kwargs), grads.input, grads.residual):
        assert (type(array), array.shape, array.dtype) == (type(kwargs["input"]), shape, np.float16)
    for name in ("weight", "bias"):
        grad = getattr(grads, name)
        assert (grad.shape, grad.dtype) == ((shape[1],), np.float32)
        assert np.all(to_numpy(grad) == 0)
    assert bits(*(kwargs[name] for name in VECTORS)) == before
    out = xp.empty_like(kwargs["input"])
    assert F.batch_norm(**kwargs, out=out) is out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_bad_values_stay_in_their_channel(xp, rng, bad, order, training):
    shape, channel = (3, 4, 5, 6), 2
    clean = arguments(xp, rng, shape) | {"training": training}
    clean["input"] = in_order(clean["input"], order)
    dy = xp.asarray(rng.normal(size=shape).astype(np.float32))
    dirty = clean | {name: clean[name].copy() for name in ("running_mean", "running_var")}
    dirty["input"] = in_order(clean["input"], order)
    dirty["input"][1, channel, 2, 3] = bad
    others = [i for i in range(shape[1]) if i != channel]
    results = []
    for kwargs in (clean, dirty):
        y, vjp_fn = F.batch_norm_vjp(**kwargs)
        grads = vjp_fn(dy)
        vectors = grads.weight, grads.bias, kwargs["running_mean"], kwargs["running_var"]
        results.append(bits(y[:, others], grads.input[:, others], *(vector[others] for vector in vectors)))
    assert results[0] == results[1]
    if training and not np.isfinite(bad):
        assert np.all(np.isnan(to_numpy(y[:, channel])))
        assert np.isnan(float(dirty["running_var"][channel]))


# ---------------------------------------------------------------------------------------------------------------------
# moments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", range(-3, 3))
def test_moments(xp, rng, axis, dtype):
    x = arguments(xp, rng, (4, 3, 5), channel_axis=axis, dtype=dtype)["input"]
    before = bits(x)
    wide = to_numpy(x).astype(np.float64)
    others = tuple(i for i in range(3) if i != axis % 3)
    mean, var = F.moments(x, channel_axis=axis)
    assert type(mean) is type(var) is type(x)
    assert mean.dtype == var.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_close(mean, wide.mean(axis=others), dtype)
    assert_close(var, wide.var(axis=others), dtype)
    assert bits(x) == before


def test_moments_of_one_value_per_channel(xp):
    mean, var = F.moments(xp.asarray(np.array([[1.5, -2.5]], np.float32)))
    np.testing.assert_array_equal(to_numpy(mean), [1.5, -2.5])
    np.testing.assert_array_equal(to_numpy(var), [0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Properties


class View(NamedTuple):
    """A view that NumPy and CuPy make alike: of `whole`, with its axes in memory in `order`, the elements that `steps`
    selects.
    """

    whole: np.ndarray
    order: tuple[int, ...]
    steps: tuple[slice, ...]
    axis: int  # channel axis

    def on(self, xp):
        return in_order(xp.asarray(self.whole), self.order)[self.steps]


@st.composite
def views(draw):
    """Draw a float32 view of any rank, memory order, gaps and directions, with two values per channel at least.

    The values are multiples of 1/16 below 64, so that integers of this size can be added to them exactly.
    """
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if np.prod(shape) == shape[axis]:
        shape[(axis + 1) % len(shape)] = 2
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    order = tuple(draw(st.permutations(range(len(shape)))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = rng.integers(-1024, 1024, [size * abs(step) for size, step in zip(shape, steps, strict=True)]) / 16
    return View(whole.astype(np.float32), order, tuple(slice(None, None, step) for step in steps), axis)


properties = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@properties
@given(view=views(), training=st.booleans())
def test_strides_do_not_matter(xp, view, training):
    x = view.on(xp)
    kwargs = arguments(xp, np.random.default_rng(0), x.shape, channel_axis=view.axis)
    kwargs |= {"training": training, "momentum": 0.0, "activation": "relu"}
    dense = x.copy(order="C")
    forward_and_back(kwargs | {"input": x}, dense)
    forward_and_back(kwargs | {"input": dense, "residual": x}, x)


@properties
@given(view=views(), constant=st.integers(-1000, 1000))
def test_adding_a_constant_changes_nothing(xp, view, constant):
    x, axis = view.on(xp), view.axis
    expected = expect({"input": x, "channel_axis": axis, "training": True})
    assert_output(F.batch_norm(x + constant, None, None, training=True, channel_axis=axis), expected, np.float32)
    mean, var = F.moments(x + constant, channel_axis=axis)
    assert_close(mean, expected.mean + constant, np.float32, expected.terms["mean"])
    assert_close(var, expected.var, np.float32, scale=0)


@properties
@given(view=views())
def test_gradient_of_the_input_sums_to_zero(xp, view):
    """The gradient dx of training sums to 0 over a channel, since adding a constant to it does not move the output."""
    x, axis = view.on(xp), view.axis
    dy = x.copy(order="C") ** 2
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    terms = expect({"input": x, "channel_axis": axis, "training": True}, dy).terms["dx"].ravel()
    dx = F.batch_norm_vjp(x, None, None, training=True, channel_axis=axis)[1](dy).input
    n = x.size // x.shape[axis]
    assert_close(to_numpy(dx).astype(np.float64).sum(axis=others), 0 * terms, np.float32, n * terms, ROUNDINGS["dx"])


@properties
@given(view=views())
def test_a_fresh_layer_in_eval_is_nearly_the_identity(xp, device, view):
    x = view.on(xp)
    layers = {2: cupybn.BatchNorm1d, 3: cupybn.BatchNorm1d, 4: cupybn.BatchNorm2d, 5: cupybn.BatchNorm3d}
    layer = layers[x.ndim](x.shape[view.axis], channel_axis=view.axis, device=device).eval()
    assert_close(layer(x), to_numpy(x) / np.sqrt(1 + 1e-5), np.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((20001, 10), np.float16), ((30001, 9), np.float64), ((8, 5, 3), np.float16)], ids=str
)
def test_the_way_back_changes_no_bits_of_the_output(xp, rng, shape, dtype):
    """A call with a way back gives the same output bits, also in long rows without whole packs, whose passed is set by
    element.
    """
    x, residual = (xp.asarray(rng.normal(size=shape).astype(dtype)) for _ in range(2))
    outputs = []
    for function in F.batch_norm, lambda *args, **kwargs: F.batch_norm_vjp(*args, **kwargs)[0]:
        running = xp.zeros(shape[1]), xp.ones(shape[1])
        y = function(x, *running, training=True, residual=residual, activation="relu")
        outputs.append(bits(y, *running))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("value", [1e200, -1.7e308])
def test_a_constant_channel_of_any_float64(xp, value):
    """A constant channel gives exactly its bias for any float64, even one whose sum float64 does not hold."""
    for shape in (40, 4), (40, 3), (4, 3, 50), (9001, 6):
        x = xp.asarray(np.full(shape, value))
        y = F.batch_norm(x, None, None, None, xp.asarray(np.full(shape[1], 0.5)), training=True)
        assert np.all(to_numpy(y) == 0.5), shape
