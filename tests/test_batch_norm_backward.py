"""The statistics of a `vjp_fn`, and the way back from statistics that somebody has kept."""

from __future__ import annotations

import copy
import re
import weakref

import ml_dtypes
import numpy as np
import pytest

import cupybn.functional as F
from cupybn import BatchNorm1d, BatchNorm2d
from tests.reference import DTYPES, arguments, bits, expect, in_order, to_numpy

FORMS = {
    "(N, C)": ((64, 5), 1, (0, 1)),
    "(N, C, L)": ((6, 5, 7), 1, (0, 1, 2)),
    "NCHW": ((4, 5, 3, 8), 1, (0, 1, 2, 3)),
    "NHWC": ((4, 5, 3, 8), 1, (0, 2, 3, 1)),
    "channels last": ((4, 3, 8, 5), -1, (0, 1, 2, 3)),
}
"""Shape, channel axis and memory order of inputs, by name."""


def vectors_of(call):
    return {name: call[name] for name in ("weight", "bias")}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def make(xp, rng, form, dtype=np.float32):
    """The arguments of a call without a residual, and the gradient of its output."""
    shape, axis, order = form
    call = arguments(xp, rng, shape, channel_axis=axis, dtype=dtype)
    del call["residual"]
    call["input"] = in_order(call["input"], order)
    return call, in_order(xp.asarray(rng.normal(size=shape).astype(dtype)), order)


def assert_statistics(vjp_fn, expected, xp, dtype):
    for statistic in vjp_fn.mean, vjp_fn.var:
        assert type(statistic) is xp.ndarray
        assert statistic.dtype == np.float64
        assert statistic.shape == expected.mean.shape
    loose = 1 if dtype == np.float64 else 2.0**29  # float32 sums, float64 sums
    error = np.abs(to_numpy(vjp_fn.mean) - expected.mean)
    assert np.all(error <= 2.0**-52 * (np.abs(expected.mean) + 8 * loose * np.sqrt(expected.var)))
    np.testing.assert_allclose(to_numpy(vjp_fn.var), expected.var.astype(np.float64), rtol=16 * loose * 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_the_batch(xp, rng, form, dtype):
    call, _ = make(xp, rng, form, dtype)
    expected = expect(call | {"training": True})
    for _ in range(2):  # the second time, on CuPy arrays, from the tape
        y, vjp_fn = F.batch_norm_vjp(**call, training=True)
        assert y.dtype == dtype
        assert_statistics(vjp_fn, expected, xp, dtype)


def test_statistics_are_those_of_the_contract(way, rng):
    """Errors at a mean of a million standard deviations: var to 1e-6, mean to 1e-7 std and float64's rounding."""
    x = rng.normal(1e6, 1, (32, 3, 40)).astype(np.float32)
    exact = x.astype(np.float64)
    _, vjp_fn = F.batch_norm_vjp(way.asarray(x), None, None, training=True)
    assert np.all(np.abs(to_numpy(vjp_fn.mean) - exact.mean((0, 2))) <= 1e-7 + 2.0**-52 * 1e6)
    np.testing.assert_allclose(to_numpy(vjp_fn.var), exact.var((0, 2)), rtol=1e-6)


@pytest.mark.parametrize("vectors", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_statistics_of_eval_mode_are_the_running_ones_of_then(xp, rng, form, vectors):
    """Exactly these, as float64, also when the buffers have moved since."""
    shape, axis, _ = form
    call = arguments(xp, rng, shape, channel_axis=axis, vectors=vectors)
    for _ in range(2):
        then = [to_numpy(call[name]).astype(np.float64) for name in ("running_mean", "running_var")]
        _, vjp_fn = F.batch_norm_vjp(**call)
        call["running_mean"] += 1
        call["running_var"] *= 2
        assert bits(vjp_fn.mean, vjp_fn.var) == bits(*then)


def test_statistics_are_copies(xp, rng):
    """Whoever changes them changes neither the buffers nor what the way back returns, and gets them anew."""
    call, dy = make(xp, rng, FORMS["NCHW"])
    for training in True, False:
        _, vjp_fn = F.batch_norm_vjp(**call, training=training)
        state = bits(*vjp_fn(dy)), bits(call["running_mean"], call["running_var"]), bits(vjp_fn.mean, vjp_fn.var)
        mean, var = vjp_fn.mean, vjp_fn.var
        mean += 100
        var += 100
        assert state == (
            bits(*vjp_fn(dy)),
            bits(call["running_mean"], call["running_var"]),
            bits(vjp_fn.mean, vjp_fn.var),
        )
        assert vjp_fn.mean.flags.c_contiguous
        if xp is np:
            assert vjp_fn.mean.base is None


def test_copies_of_a_vjp_fn_are_itself(xp, rng):
    """Copies are made as of any function: whoever copies a structure that holds one has it there, too."""
    call, _ = make(xp, rng, FORMS["NCHW"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    assert copy.deepcopy({"vjp_fn": [vjp_fn]})["vjp_fn"][0] is vjp_fn
    assert copy.copy(vjp_fn) is vjp_fn


def test_a_function_that_goes_back_may_be_referred_to_weakly(xp, rng):
    """A weak reference can be made, as of any function."""
    call, _ = make(xp, rng, FORMS["(N, C)"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    assert weakref.ref(vjp_fn)() is vjp_fn


def test_statistics_of_a_layer(xp, device, rng):
    layer = BatchNorm2d(5, activation="relu", device=device)
    x = make(xp, rng, FORMS["NHWC"])[0]["input"]
    for mode in True, False:
        y, vjp_fn = layer.train(mode).vjp(x, residual=x)
        again = (to_numpy(x) - to_numpy(vjp_fn.mean)[:, None, None]) / np.sqrt(to_numpy(vjp_fn.var) + 1e-5)[
            :, None, None
        ]
        np.testing.assert_allclose(to_numpy(y), np.maximum(again + to_numpy(x), 0), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 2, 2), (4, 0)])
def test_statistics_without_elements(xp, rng, shape):
    """The running ones in eval mode; a batch has none, and so NaN."""
    call, C = arguments(xp, rng, shape), shape[1]
    then = [to_numpy(call[name]).astype(np.float64) for name in ("running_mean", "running_var")]
    _, vjp_fn = F.batch_norm_vjp(**call)
    assert bits(vjp_fn.mean, vjp_fn.var) == bits(*then)
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    for statistic in vjp_fn.mean, vjp_fn.var:
        assert statistic.dtype == np.float64
        assert np.isnan(to_numpy(statistic)).tolist() == [True] * C
    x = call["input"]
    grads = F.batch_norm_backward(x, x, vjp_fn.mean, vjp_fn.var, call["weight"])
    assert grads.input.shape == shape
    assert to_numpy(grads.weight).tolist() == [0] * C
    assert grads.bias is None


# ---------------------------------------------------------------------------------------------------------------------
# batch_norm_backward


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_vjp_fn(xp, rng, form, dtype, training, activation):
    call, dy = make(xp, rng, form, dtype)
    _, vjp_fn = F.batch_norm_vjp(**call, training=training, activation=activation, eps=1e-3)
    options = {"activation": activation, "channel_axis": call["channel_axis"]}
    for given in {}, {"weight": call["weight"]}, vectors_of(call):
        _, vjp_fn = F.batch_norm_vjp(
            **{**call, "weight": None, "bias": None, **given}, training=training, activation=activation, eps=1e-3
        )
        before = bits(*given.values(), call["input"], dy)
        for _ in range(2):
            grads = F.batch_norm_backward(
                dy, call["input"], vjp_fn.mean, vjp_fn.var, **given, training=training, eps=1e-3, **options
            )
            assert type(grads) is F.BatchNormGrads
            assert bits(*grads) == bits(*vjp_fn(dy))
            assert grads.residual is None
            assert grads.input.strides == call["input"].strides
        assert bits(*given.values(), call["input"], dy) == before


def test_both_families_of_kernels(either, rng):  # noqa: ARG001
    import cupy

    call, dy = make(cupy, rng, FORMS["NCHW"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True, activation="relu")
    grads = F.batch_norm_backward(dy, call["input"], vjp_fn.mean, vjp_fn.var, **vectors_of(call), activation="relu")
    assert bits(*grads) == bits(*vjp_fn(dy))


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(">f4"), np.dtype(">f8")], ids=str)
def test_statistics_of_any_dtype(rng, dtype):
    """Statistics count as the float64 numbers that they are."""
    call, dy = make(np, rng, FORMS["NCHW"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    mean, var = vjp_fn.mean.astype(dtype), vjp_fn.var.astype(dtype)
    given = vectors_of(call)
    rounded = F.batch_norm_backward(dy, call["input"], mean, var, **given)
    exact = F.batch_norm_backward(dy, call["input"], mean.astype(np.float64), var.astype(np.float64), **given)
    assert bits(*rounded) == bits(*exact)
    strided = np.zeros((5, 2)), np.zeros((5, 2))
    strided[0][:, 1], strided[1][:, 1] = mean, var
    views = [array[:, 1] for array in strided]
    assert bits(*F.batch_norm_backward(dy, call["input"], *views, **given)) == bits(*exact)


def test_inputs_that_are_not_dense_and_classes_derived(xp, rng):
    call, dy = make(xp, rng, FORMS["NCHW"])
    x, given = call["input"], vectors_of(call)
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    expected = bits(*vjp_fn(dy))
    wide = xp.zeros((4, 5, 3, 16), np.float32)
    wide[..., ::2] = x
    assert bits(*F.batch_norm_backward(dy, wide[..., ::2], vjp_fn.mean, vjp_fn.var, **given)) == expected
    strided = xp.zeros((4, 5, 3, 16), np.float32)
    strided[..., ::2] = dy
    assert bits(*F.batch_norm_backward(strided[..., ::2], x, vjp_fn.mean, vjp_fn.var, **given)) == expected
    if xp is np:

        class Derived(np.ndarray):
            pass

        derived = [array.view(Derived) for array in (dy, x, vjp_fn.mean, vjp_fn.var)]
        grads = F.batch_norm_backward(*derived, *given.values())
        assert bits(*grads) == expected
        assert type(grads.input) is np.ndarray


@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_may_not_be_written_to(xp, rng, training):
    """Statistics are only read, in training as well, where those of a forward pass would move."""
    call, dy = make(xp, rng, FORMS["(N, C)"])
    mean = call["running_mean"]
    expected = F.batch_norm_backward(dy, call["input"], mean, mean.copy(), training=training)
    assert bits(F.batch_norm_backward(dy, call["input"], mean, mean, training=training).input) == bits(expected.input)
    if xp is np:
        mean.flags.writeable = False
        grads = F.batch_norm_backward(dy, call["input"], mean, mean.copy(), training=training)
        assert bits(grads.input) == bits(expected.input)


def test_gradients_by_finite_differences(rng):
    """The gradients are the slopes of a loss whose statistics are those of the batch, or constants."""
    x, dy, w = rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), rng.normal(size=2)
    step = 1e-6 * rng.normal(size=x.shape)
    mean, var = x.mean(0), x.var(0)
    for training in True, False:

        def loss(x, training=training):
            statistics = (x.mean(0), x.var(0)) if training else (mean, var)
            return (((x - statistics[0]) / np.sqrt(statistics[1] + 1e-5) * w) * dy).sum()

        grads = F.batch_norm_backward(dy, x, mean, var, w, training=training)
        assert (grads.input * step).sum() == pytest.approx((loss(x + step) - loss(x - step)) / 2, rel=1e-6)


def test_nothing_moves_and_nothing_is_shared(xp, rng):
    """Arrays that are given are left alone, and gradients share no memory with them."""
    call, dy = make(xp, rng, FORMS["NCHW"])
    mean, var, given = call["running_mean"], call["running_var"], vectors_of(call)
    for training in True, False:
        before = bits(*call.values(), dy)
        grads = F.batch_norm_backward(dy, call["input"], mean, var, **given, training=training)
        assert bits(*call.values(), dy) == before
        kept = bits(*grads)
        for array in mean, var, *given.values():
            array *= 2
        assert bits(*grads) == kept


WRONG = {
    "grad_output is a list": ({"grad_output": [1.0]}, TypeError, "expected grad_output to be a NumPy or CuPy array"),
    "shape of grad_output": (
        {"grad_output": np.zeros((4, 3, 1), np.float32)},
        ValueError,
        r"expected grad_output of the input's shape \(4, 3, 5\) \(got \(4, 3, 1\)\): use numpy.broadcast_to",
    ),
    "dtype of grad_output": (
        {"grad_output": np.zeros((4, 3, 5))},
        TypeError,
        "expected grad_output of the input's dtype",
    ),
    "input is None": ({"input": None}, TypeError, "expected input to be a NumPy or CuPy array"),
    "whole numbers": ({"input": np.ones((4, 3, 5), int)}, TypeError, "expected input .*int64"),
    "no mean": ({"mean": None}, TypeError, r"expected mean to be a NumPy or CuPy array \(got NoneType\)"),
    "no var": ({"var": None}, TypeError, r"expected var to be a NumPy or CuPy array \(got NoneType\)"),
    "mean of whole numbers": ({"mean": np.ones(3, int)}, TypeError, "expected mean .*int64"),
    "channels of mean": ({"mean": np.ones(4)}, ValueError, "mean should contain 3 elements not 4"),
    "channels of var": ({"var": np.ones(2)}, ValueError, "var should contain 3 elements not 2"),
    "shape of var": ({"var": np.ones((1, 3, 1))}, ValueError, r"expected var of shape \(3,\) \(got \(1, 3, 1\)\)"),
    "weight": ({"weight": np.ones(4)}, ValueError, "weight should contain 3 elements not 4"),
    "bias": ({"bias": 1.0}, TypeError, "expected bias to be a NumPy or CuPy array"),
    "training": ({"training": 1}, TypeError, "expected training to be a bool"),
    "training is an array": ({"training": np.ones(3)}, TypeError, "expected training to be a bool"),
    "eps in training": ({"eps": 0.0}, ValueError, "batch_norm eps must be positive during training, but got 0.0"),
    "eps in eval mode": (
        {"eps": -1.0, "training": False},
        ValueError,
        "batch_norm eps must be non-negative, but got -1.0",
    ),
    "eps is text": ({"eps": "1"}, TypeError, "expected eps to be a float"),
    "activation": ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'"),
    "channel_axis": ({"channel_axis": 3}, ValueError, r"expected channel_axis in \[-3, 3\)"),
    "one value for each channel": (
        {"input": np.ones((1, 3), np.float32), "grad_output": np.ones((1, 3), np.float32)},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size \(1, 3\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    """Twice, and after a call that was right: nothing of it is taken for granted."""
    changed, error, message = WRONG[name]
    right = {
        "grad_output": np.ones((4, 3, 5), np.float32),
        "input": np.ones((4, 3, 5), np.float32),
        "mean": np.ones(3),
        "var": np.ones(3),
    }
    F.batch_norm_backward(**right)
    before = bits(*right.values())
    for _ in range(2):
        with pytest.raises(error, match=message):
            F.batch_norm_backward(**right | changed)
    assert bits(*right.values()) == before


def test_kinds_are_not_mixed(rng):
    import cupy

    call, dy = make(np, rng, FORMS["NCHW"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    given = {"grad_output": dy, "input": call["input"], "mean": vjp_fn.mean, "var": vjp_fn.var} | vectors_of(call)
    for name, array in given.items():
        with pytest.raises(TypeError, match=re.escape("on one device, use")):
            F.batch_norm_backward(**given | {name: cupy.asarray(array)})


def test_order_of_the_arguments(rng):
    call, dy = make(np, rng, FORMS["NCHW"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=False, eps=1e-3)
    named = F.batch_norm_backward(
        dy, call["input"], mean=vjp_fn.mean, var=vjp_fn.var, **vectors_of(call), training=False, eps=1e-3
    )
    placed = F.batch_norm_backward(
        dy, call["input"], vjp_fn.mean, vjp_fn.var, call["weight"], call["bias"], False, 1e-3
    )
    assert bits(*placed) == bits(*named) == bits(*vjp_fn(dy))
    with pytest.raises(TypeError, match="positional"):
        F.batch_norm_backward(dy, call["input"], vjp_fn.mean, vjp_fn.var, None, None, True, 1e-5, "relu")


def test_bfloat16_of_statistics_on_cupy(rng):
    import cupy

    call, dy = make(cupy, rng, FORMS["(N, C)"])
    _, vjp_fn = F.batch_norm_vjp(**call, training=True)
    mean, var = vjp_fn.mean.astype(ml_dtypes.bfloat16), vjp_fn.var.astype(ml_dtypes.bfloat16)
    rounded = F.batch_norm_backward(dy, call["input"], mean, var)
    exact = F.batch_norm_backward(dy, call["input"], mean.astype(np.float64), var.astype(np.float64))
    assert bits(*rounded) == bits(*exact)


def test_no_wait_for_the_host_and_no_other_launches(rng):
    """A call on CuPy arrays launches the kernels that `vjp_fn` does. Nothing waits for the host."""
    import cupy

    if not hasattr(cupy, "emulator"):
        pytest.skip("only the stand-in counts launches and waits")
    call, dy = make(cupy, rng, FORMS["NCHW"])
    with cupy.emulator.record_syncs() as waits:
        _, vjp_fn = F.batch_norm_vjp(**call, training=True)
        mean, var = vjp_fn.mean, vjp_fn.var
        with cupy.emulator.record() as launches:
            vjp_fn(dy)
        with cupy.emulator.record() as ours:
            F.batch_norm_backward(dy, call["input"], mean, var, **vectors_of(call))
    assert waits == []
    assert [(launch.name, launch.grid) for launch in ours] == [(launch.name, launch.grid) for launch in launches]
    assert len(ours) in (1, 2)


def test_a_lone_sample_in_a_layer_of_eval_mode(rng):
    layer = BatchNorm1d(3, device="cpu").eval()
    x = rng.normal(size=(1, 3)).astype(np.float32)
    y, vjp_fn = layer.vjp(x)
    grads = F.batch_norm_backward(y, x, vjp_fn.mean, vjp_fn.var, layer.weight, layer.bias, False)
    assert bits(*grads) == bits(*vjp_fn(y))
