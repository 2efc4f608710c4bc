"""Masks: what is masked out is as if it were not there, whatever arrays hold there."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import cupybn
import cupybn.functional as F
from cupybn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from cupybn._arrays.devices import copied
from cupybn._calls import layout as _layout
from cupybn._calls.layout import Layout
from tests.masked import (
    check_masked,
    compressed,
    left,
    mask_of,
    masked_arguments,
    spoilt,
    whole,
)
from tests.reference import DTYPES, arguments, assert_close, bits, exactly, in_order, moved, to_numpy
from tests.test_derived_arrays import derived

BOTH_MODES = pytest.mark.parametrize("training", [True, False])
SHAPE = (4, 3, 2, 4)


BAD = np.nan, np.inf, -np.inf, 3e38
"""What may be masked out."""


def run(arguments, dy):
    """The output and gradients of a call."""
    y, vjp_fn = F.batch_norm_vjp(**arguments)
    return y, vjp_fn(dy)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

LAYOUTS = {
    "(N, C)": {"shape": (9, 3)},
    "(N, L, C)": {"shape": (4, 5, 3), "channel_axis": -1},
    "(N, C, L)": {"shape": (4, 3, 8)},
    "NCHW": {"shape": SHAPE},
    "NHWC": {"shape": SHAPE, "order": (0, 2, 3, 1)},
    "backwards": {"shape": SHAPE, "order": (3, 2, 1, 0)},
    "(C, N, ...)": {"shape": (3, 4, 2, 4), "channel_axis": 0},
    "five axes": {"shape": (2, 2, 3, 2, 4), "channel_axis": 2},
    "one channel": {"shape": (4, 1, 8)},
}
EPILOGUES = {
    "": {"residual": None},
    "relu": {"residual": None, "activation": "relu"},
    "residual": {},
    "residual, relu": {"activation": "relu"},
}


@BOTH_MODES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
def test_as_on_what_is_left(xp, rng, layout, epilogue, training):
    """Output, gradients and running statistics are those of what is left, though all else is NaN."""
    given, dy = masked_arguments(xp, rng, **layout)
    given |= epilogue | {"training": training}
    before = {name: to_numpy(given[name]).copy() for name in ("running_mean", "running_var")}
    y, grads = run(given, dy)
    now = {name: given[name] for name in before}
    check_masked(given | before, dy, y, grads)
    assert order_of(y) == order_of(grads.input) == order_of(given["input"])
    assert (grads.residual is None) == (given["residual"] is None)
    if training:
        values = left(given["input"], given["mask"], given["channel_axis"])
        expected = moved(before["running_mean"], before["running_var"], values)
        for array, wanted in zip(now.values(), expected, strict=True):
            assert_close(array, wanted, np.float32, roundings=4)
    else:
        assert bits(*now.values()) == bits(*before.values())
    assert bits(F.batch_norm(**given | before_on(xp, before))) == bits(y)


def order_of(array):
    """Strides of an array along the axes where they mean something."""
    return [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]


def before_on(xp, vectors):
    """Copies of vectors on a device."""
    return {name: xp.asarray(vector.copy()) for name, vector in vectors.items()}


@pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
@pytest.mark.parametrize("layout", ["(N, C)", "NCHW", "NHWC"])
def test_the_same_bits_in_eval_mode(xp, rng, layout, epilogue):
    """Each element has the bits that it has in a call on what is left, forward and back."""
    given, dy = masked_arguments(xp, rng, **LAYOUTS[layout])
    given |= epilogue
    y, grads = run(given, dy)
    alone = {
        name: value if not hasattr(value, "shape") else xp.asarray(value) for name, value in compressed(given).items()
    }
    expected, expected_grads = run(alone, xp.asarray(left(dy, given["mask"], 1)))
    ours, theirs = [y, grads.input, grads.residual], [expected, expected_grads.input, expected_grads.residual]
    for array, wanted in zip(ours, theirs, strict=True):
        if wanted is not None:
            assert bits(left(array, given["mask"], 1)) == bits(wanted)


@BOTH_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_dtypes(rng, dtype, layout, training):
    """Every dtype of tensors and of vectors, and of each vector for itself."""
    names = ("running_mean", "running_var", "weight", "bias")
    for vectors in [*DTYPES, dict(zip(names, DTYPES, strict=True))]:
        given, dy = masked_arguments(np, rng, **LAYOUTS[layout], dtype=dtype, vectors=vectors)
        given |= {"training": training, "activation": "relu", "momentum": 0.0}
        y, grads = run(given, dy)
        check_masked(given, dy, y, grads)
        assert (grads.weight.dtype, grads.bias.dtype) == (given["weight"].dtype, given["bias"].dtype)


@BOTH_MODES
@pytest.mark.parametrize("value", BAD)
def test_nothing_comes_through(xp, rng, value, training):
    """Whatever the elements are that are masked out, all results have the same bits, without a warning."""
    given, dy = masked_arguments(xp, rng, SHAPE, nan=False)
    given |= {"training": training, "activation": "relu", "momentum": 0.0}
    mask = given["mask"]
    y, grads = run(given, dy)
    bad = {name: spoilt(given[name], mask, 1, value) for name in ("input", "residual")}
    for changes, gradient in (bad, dy), ({}, spoilt(dy, mask, 1, value)), (bad, spoilt(dy, mask, 1, value)):
        bad_y, bad_grads = run(given | changes, gradient)
        assert bits(bad_y, *bad_grads) == bits(y, *grads)


@BOTH_MODES
def test_nan_that_is_left_stays_in_its_channel(xp, rng, training):
    given, dy = masked_arguments(xp, rng, SHAPE)
    given |= {"training": training, "momentum": 0.0}
    y, grads = run(given, dy)
    n, *position = np.argwhere(to_numpy(given["mask"]))[0]
    given["input"][(n, 1, *position)] = np.nan
    bad_y, bad_grads = run(given, dy)
    for array, clean in (bad_y, y), (bad_grads.input, grads.input):
        assert bits(array[:, ::2]) == bits(clean[:, ::2])
        assert not to_numpy(array)[~whole(given["mask"], SHAPE, 1)].any()
    assert np.isnan(to_numpy(bad_y)[(n, 1, *position)])


@BOTH_MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_finite_differences(rng, training, with_residual, activation):
    """Each element of each gradient is the slope of sum(dy * y), as finite differences show it: 0 where masked out."""
    step, shape = 1e-5, (4, 3, 2)
    given, dy = masked_arguments(np, rng, shape, nan=False, dtype=np.float64, vectors=np.float64)
    given |= {"training": training, "activation": activation, "momentum": 0.0, "eps": 0.1}
    if not with_residual:
        given["residual"] = None
    mask = whole(given["mask"], shape, 1)
    before_relu = F.batch_norm(**given | {"activation": None})
    assert np.min(np.abs(before_relu[mask])) > 10 * step  # no value changes its sign within a step

    _, grads = run(given, dy)
    for name in ("input", "weight", "bias", "residual"):
        if given[name] is None:
            continue
        slopes = np.empty(given[name].shape)
        for index in np.ndindex(*slopes.shape):
            sums = []
            for sign in (-1, 1):
                shifted = given[name].copy()
                shifted[index] += sign * step
                sums.append(float((dy * F.batch_norm(**given | {name: shifted})).sum()))
            slopes[index] = (sums[1] - sums[0]) / (2 * step)
        # The error is step^2 times a third derivative of size 1 to 10, plus rounding: 2^-52 * 10 / step.
        np.testing.assert_allclose(getattr(grads, name), slopes, rtol=0, atol=2e-8, err_msg=name)
    for name in ("input", "residual"):
        if given[name] is not None:
            assert not getattr(grads, name)[~mask].any()


def test_the_accuracy_of_training(xp, rng):
    """A mean of a million standard deviations, and what is masked out a million times as far away."""
    shape = (8, 4, 64)
    mask = mask_of(xp, rng, shape)
    x = spoilt(xp.asarray(rng.normal(1e6, 1, shape).astype(np.float32)), mask, 1, 1e12)
    running_mean, running_var = xp.zeros(4, np.float64), xp.ones(4, np.float64)
    y = F.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, mask=mask)
    values = left(x, mask, 1).astype(np.longdouble)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    assert np.all(abs(left(y, mask, 1) - expected) <= 1e-6 + 2.0**-22 * abs(expected))
    np.testing.assert_allclose(to_numpy(running_var), values.var(0, ddof=1).astype(float), rtol=1e-6)
    assert np.all(abs(to_numpy(running_mean) - values.mean(0)) <= 1e-7 * values.std(0) + 2.0**-52 * 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# What a mask may be

FORMS = {
    "read-only": lambda mask: read_only(mask),
    "every second": lambda mask: mask.repeat(2, axis=-1)[..., ::2],
    "backwards": lambda mask: mask[::-1].copy()[::-1],
    "another order": lambda mask: in_order(mask, (2, 0, 1)),
    "derived": lambda mask: derived(array_module(mask), mask, ("view",)),
}


def array_module(array):
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy


def read_only(array):
    view = array.view()
    if isinstance(array, np.ndarray):
        view.flags.writeable = False
    return view


@BOTH_MODES
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 1, 3, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_strides(xp, rng, form, order, training):
    """A mask may lie in memory as it likes: results have the same bits, at the first call and at later ones."""
    given, dy = masked_arguments(xp, rng, SHAPE, order=order)
    given |= {"training": training, "activation": "relu", "momentum": 0.0}
    y, grads = run(given, dy)
    mask = form(given["mask"])
    before = bits(mask)
    assert before == bits(given["mask"])
    for _ in range(3):
        other_y, other_grads = run(given | {"mask": mask}, dy)
        assert bits(other_y, *other_grads) == bits(y, *grads)
        assert bits(F.batch_norm(**given | {"mask": mask})) == bits(y)
    assert bits(mask) == before


@BOTH_MODES
@pytest.mark.parametrize("shape", [(4, 1, 1), (4,), (2, 1), (1, 2, 4), (1, 1, 1), (2, 4), ()], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=str)
def test_what_broadcasts(xp, rng, shape, order, training):
    """A mask with fewer axes, or of length 1, is the one that it broadcasts to."""
    given, dy = masked_arguments(xp, rng, SHAPE, order=order, nan=False)
    given |= {"training": training, "activation": "relu", "momentum": 0.0}
    mask = rng.random(shape) < 0.6 if shape else np.ones((), bool)
    given["mask"] = xp.asarray(np.broadcast_to(mask, (4, 2, 4)).copy())
    y, grads = run(given, dy)
    for _ in range(2):
        other_y, other_grads = run(given | {"mask": xp.asarray(mask)}, dy)
        assert bits(other_y, *other_grads) == bits(y, *grads)


@BOTH_MODES
def test_a_mask_that_leaves_everything(xp, rng, training):
    """Results are those without a mask: to the bit in eval mode, within the bounds in training."""
    given, dy = masked_arguments(xp, rng, SHAPE, nan=False)
    given |= {"training": training, "activation": "relu", "momentum": 0.0, "mask": xp.ones((4, 2, 4), bool)}
    y, grads = run(given, dy)
    check_masked(given, dy, y, grads)
    if not training:
        other, other_grads = run(given | {"mask": None}, dy)
        assert bits(y, grads.input, grads.residual) == bits(other, other_grads.input, other_grads.residual)


@pytest.mark.parametrize("what", ["input", "residual"])
def test_tensors_that_are_not_dense(xp, rng, what):
    given, dy = masked_arguments(xp, rng, SHAPE)
    given |= {"training": True, "momentum": 0.0}
    y, grads = run(given, dy)
    wide = xp.zeros((*SHAPE[:-1], 8), np.float32)
    wide[..., ::2] = given[what]
    for gradient in dy, dy[..., ::-1].copy()[..., ::-1]:
        other_y, other_grads = run(given | {what: wide[..., ::2]}, gradient)
        assert bits(other_y, *other_grads) == bits(y, *grads)


COPIED = {
    "broadcasts": lambda xp, mask: xp.asarray(to_numpy(mask)[:, :1]),
    "another order": lambda _, mask: in_order(mask, (2, 0, 1)),
    "in the memory of a buffer": lambda _, mask: mask,
}


@pytest.mark.parametrize(("how", "form"), COPIED.items(), ids=COPIED)
def test_one_copy_at_most(xp, rng, monkeypatch, how, form):
    """A mask that must be copied is copied once: the way back, too, reads this copy."""
    shape, order = (5, 5, 2, 2), (0, 3, 2, 1)
    given, dy = masked_arguments(xp, rng, shape, order=order)
    mask = form(xp, given["mask"])
    if how == "in the memory of a buffer":
        given["running_mean"] = xp.zeros(5, np.float32)
        mask = given["running_mean"].view(np.bool_).reshape(5, 2, 2).transpose(0, 2, 1)
        mask[...] = given["mask"]
    copies, original = [], Layout.copy_mask
    monkeypatch.setattr(Layout, "copy_mask", lambda *given: copies.append(original(*given)) or copies[-1])
    monkeypatch.setattr(_layout, "copied", lambda array: pytest.fail("copied again") if copies else copied(array))
    _, vjp_fn = F.batch_norm_vjp(**given | {"mask": mask, "training": True})
    for _ in range(2):
        vjp_fn(dy)
    assert len(copies) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Less than two values


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=str)
def test_less_than_two_values(xp, rng, count, order):
    """Nothing moves; the output is that of xhat = 0 for one value, and 0 everywhere for none. There is no warning."""
    given, dy = masked_arguments(xp, rng, SHAPE, order=order, nan=False)
    mask = np.zeros((4, 2, 4), bool)
    mask.flat[5 : 5 + count] = True
    given |= {"training": True, "residual": None, "mask": xp.asarray(mask)}
    given["input"] = spoilt(given["input"], mask, 1)
    buffers = given["running_mean"], given["running_var"]
    before = bits(*buffers)
    y, vjp_fn = F.batch_norm_vjp(**given)
    grads = vjp_fn(spoilt(dy, mask, 1))
    assert bits(*buffers) == before
    assert bits(left(y, mask, 1)) == bits(np.tile(to_numpy(given["bias"]), (count, 1)))
    for array in y, grads.input:
        assert not to_numpy(array)[~whole(mask, SHAPE, 1)].any()
    assert not to_numpy(grads.input).any()
    assert not to_numpy(grads.weight).any()
    np.testing.assert_array_equal(to_numpy(grads.bias), left(dy, mask, 1).sum(0))
    if count == 1:
        np.testing.assert_array_equal(to_numpy(vjp_fn.mean), left(given["input"], mask, 1)[0])
        assert not to_numpy(vjp_fn.var).any()
    else:
        assert np.isnan(to_numpy(vjp_fn.mean)).all()
        assert np.isnan(to_numpy(vjp_fn.var)).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_less_than_two_values_in_a_layer(xp, device, rng, momentum):
    layer = BatchNorm2d(3, momentum=momentum, device=device)
    x = xp.asarray(rng.normal(size=SHAPE).astype(np.float32))
    layer(x)
    before = bits(*layer.state_dict().values())
    mask = xp.zeros((4, 2, 4), bool)
    for _ in range(2):
        layer(x, mask=mask)
        layer.vjp(x, mask=mask)
        mask[1, 1, 1] = True
    assert bits(*layer.state_dict().values()) == before
    mask[2, 0, 0] = True
    layer(x, mask=mask)
    assert layer.num_batches_tracked == 2


def test_nothing_is_left_in_eval_mode(xp, rng):
    given, dy = masked_arguments(xp, rng, SHAPE, share=0)
    y, grads = run(given | {"activation": "relu"}, dy)
    for array in (y, *grads):
        assert not to_numpy(array).any()


def test_the_check_of_shapes_stays(xp, device):
    """A batch of one value for each channel is an error by its shape, whatever its mask leaves."""
    x, mask = xp.ones((1, 3), np.float32), xp.zeros(1, bool)
    message = exactly("Expected more than 1 value per channel when training, got input size (1, 3)")
    with pytest.raises(ValueError, match=message):
        F.batch_norm(x, None, None, training=True, mask=mask)
    layer = BatchNorm1d(3, device=device)
    with pytest.raises(ValueError, match=message[:-1]):
        layer(x, mask=mask)
    assert not to_numpy(layer.eval()(x, mask=mask)).any()


@BOTH_MODES
@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 3, 0), (4, 0, 2)], ids=str)
def test_empty_inputs(xp, rng, shape, training):
    """An input without elements is what it is without a mask, and takes masks of its shape and no others."""
    given = arguments(xp, rng, shape) | {"training": training}
    before = bits(given["running_mean"], given["running_var"])
    mask = xp.ones((shape[0], shape[2]), bool)
    y, grads = run(given | {"mask": mask}, given["residual"])
    assert y.shape == grads.input.shape == grads.residual.shape == shape
    assert not to_numpy(grads.weight).any()
    assert bits(given["running_mean"], given["running_var"]) == before
    with pytest.raises(ValueError, match=r"^expected mask of shape"):
        F.batch_norm(**given | {"mask": xp.ones((5, 5), bool)})


# ---------------------------------------------------------------------------------------------------------------------
# Errors


ARRAY = "expected mask to be a NumPy or CuPy array of bool"
DTYPE = "expected mask of dtype bool, True for data"
FITTING = "expected mask of shape (4, 8), the input's without axis 1, or one that broadcasts to it"
ALIKE = ", as all channels share a mask"


def wrong_masks(xp):
    """What is wrong as a mask for an input of shape (4, 3, 8), by name: the mask, the error and the message."""
    good, host, listed = xp.ones((4, 8), bool), np.ones((4, 8), bool), ", bool" if xp is np else ""
    return {
        "list": ([[True] * 8] * 4, TypeError, f"{ARRAY} (got list): use {xp.__name__}.asarray(mask, bool)"),
        "bool": (True, TypeError, f"{ARRAY} (got bool)"),
        "bool of NumPy": (np.True_, TypeError, f"{ARRAY} (got bool)"),
        "text": ("mask", TypeError, f"{ARRAY} (got str)"),
        "list of arrays": ([good[0]] * 4, TypeError, f"{ARRAY} (got list): use {xp.__name__}.asarray(mask{listed})"),
        "noted": (np.ma.ones((4, 8), bool), TypeError, f"{ARRAY} (got MaskedArray): use mask.filled(False)"),
        "matrix": (host.view(np.matrix), TypeError, f"{ARRAY} (got matrix): use numpy.asarray(mask)"),
        "memory": (memoryview(host), TypeError, f"{ARRAY} (got memoryview): use numpy.asarray(mask, bool)"),
        "tensor": (Tensor(host), TypeError, f"{ARRAY} (got Tensor): use numpy.from_dlpack(mask)"),
        "floats": (good.astype(np.float32), TypeError, f"{DTYPE} (got float32): use mask.astype(bool)"),
        "bytes": (good.view(np.uint8), TypeError, f"{DTYPE} (got uint8): use mask.astype(bool)"),
        "other kind": of_the_other_kind(xp),
        "with channels": (xp.ones((4, 3, 8), bool), ValueError, f"{FITTING} (got (4, 3, 8)): use mask.all(1){ALIKE}"),
        "with one channel": (good[:, None], ValueError, f"{FITTING} (got (4, 1, 8)): use mask.squeeze(1)"),
        "more axes": (good[None], ValueError, f"{FITTING} (got (1, 4, 8))"),
        "samples alone": (good[:, 0], ValueError, f"{FITTING} (got (4,)): use mask[..., None]"),
        "too short": (good[:, 1:], ValueError, f"{FITTING} (got (4, 7))"),
        "empty": (good[:0], ValueError, f"{FITTING} (got (0, 8))"),
    }


class Tensor:
    """Array of another library that says by DLPack where it is."""

    def __init__(self, host):
        self._host = host

    def __dlpack__(self, **settings):
        return self._host.__dlpack__(**settings)

    def __dlpack_device__(self):
        return self._host.__dlpack_device__()


def of_the_other_kind(xp):
    """A mask of CuPy's for an input of NumPy's, or the other way round, as in `wrong_masks`."""
    numpy, cupy = "NumPy array", "CuPy array on cuda:0"
    mask, (ours, theirs) = np.ones((4, 8), bool), (cupy, numpy)
    ways = "cupy.asarray(mask) or cupy.asnumpy(input)"
    if xp is np:
        mask, (ours, theirs), ways = as_cupy(mask), (numpy, cupy), "cupy.asarray(input) or cupy.asnumpy(mask)"
    both = f"expected mask to be a {ours} like input (got a {theirs})"
    return mask, TypeError, f"{both}: all arrays of a call are on one device, use {ways}"


def as_cupy(array):
    import cupy

    return cupy.asarray(array)


@BOTH_MODES
def test_wrong_masks(xp, device, rng, training):
    """What is no mask for an input is an error of functions and layers, which changes nothing."""
    given = arguments(xp, rng, (4, 3, 8)) | {"training": training}
    out = xp.zeros((4, 3, 8), np.float32)
    layer = BatchNorm1d(3, device=device, activation="relu").train(training)
    arrays = [value for value in given.values() if hasattr(value, "shape")] + [out, *layer.state_dict().values()]
    before = bits(*arrays)
    for name, (mask, error, message) in wrong_masks(xp).items():
        lazy = BatchNorm1d(None, device=device).train(training)
        for call in (
            lambda mask: F.batch_norm(**given, mask=mask, out=out),
            lambda mask: F.batch_norm_vjp(**given, mask=mask),
            lambda mask: layer(given["input"], mask=mask),
            lambda mask: layer.forward(given["input"], given["residual"], mask),
            lambda mask: layer.vjp(given["input"], None, mask),
            lambda mask, lazy=lazy: lazy(given["input"], mask=mask),
        ):
            for _ in range(2):
                with pytest.raises(error, match=exactly(message)) as raised:
                    call(mask)
                assert raised.type is error, name
        assert lazy.num_features is None
        assert lazy.weight is None
    assert bits(*arrays) == before


def test_a_good_mask_is_not_mistaken_for_a_wrong_one(xp, rng):
    """Calls that differ from a right one in the mask alone are checked for themselves."""
    given = arguments(xp, rng, (4, 3, 8)) | {"training": True}
    mask = mask_of(xp, rng, (4, 3, 8))
    F.batch_norm(**given, mask=mask)
    for wrong, error, _ in wrong_masks(xp).values():
        with pytest.raises(error):
            F.batch_norm(**given, mask=wrong)
        F.batch_norm(**given, mask=mask)


def test_a_mask_is_keyword_only(xp, rng):
    given = arguments(xp, rng, (4, 3, 8))
    positional = [given[name] for name in ("input", "running_mean", "running_var", "weight", "bias")]
    for function in F.batch_norm, F.batch_norm_vjp:
        with pytest.raises(TypeError, match="positional"):
            function(*positional, False, 0.1, 1e-5, mask_of(xp, rng, (4, 3, 8)))


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory, and `out`


@BOTH_MODES
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=str)
def test_out(xp, rng, order, training):
    """The output goes where it is asked to go: a new array, in any order, the input or the residual."""
    given, _ = masked_arguments(xp, rng, SHAPE, order=order)
    given |= {"training": training, "activation": "relu", "momentum": 0.0}
    expected = bits(F.batch_norm(**given))
    for _ in range(2):
        for axes in (0, 1, 2, 3), order, (3, 1, 0, 2):
            out = in_order(xp.full(SHAPE, 7, np.float32), axes)
            assert F.batch_norm(**given, out=out) is out
            assert bits(out) == expected
        for name in "input", "residual":
            copy = in_order(given[name], order)
            assert F.batch_norm(**given | {name: copy}, out=copy) is copy
            assert bits(copy) == expected


@BOTH_MODES
@pytest.mark.parametrize("offset", [0, 36, 100])
def test_an_output_over_its_mask(xp, rng, offset, training):
    """A mask may lie in the memory of the output: it counts as it was when the call began."""
    given, _ = masked_arguments(xp, rng, SHAPE)
    given |= {"training": training, "momentum": 0.0}
    expected = bits(F.batch_norm(**given))
    for _ in range(2):
        memory = xp.zeros(4 * 96, np.uint8)
        mask = memory[offset : offset + 32].view(np.bool_).reshape(4, 2, 4)
        mask[...] = given["mask"]
        out = memory.view(np.float32).reshape(SHAPE)
        F.batch_norm(**given | {"mask": mask}, out=out)
        assert bits(out) == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=str)
def test_a_buffer_over_the_mask(xp, rng, order):
    """A mask may be the memory of a running statistic, which this call moves, and later ones do: nothing follows."""
    shape = (3, 3, 4)
    given, dy = masked_arguments(xp, rng, shape, order=order)
    given |= {"training": True, "activation": "relu", "residual": None}
    numbers = given["mask"].reshape(-1).view(np.float32).copy()  # 12 bools, 3 numbers
    plain = given | {"running_mean": numbers.copy()}
    y, grads = run(plain, dy)
    expected = bits(plain["running_mean"])
    for form in (lambda mask: mask), (lambda mask: mask.reshape(3, 4)[::-1]):
        shared = numbers.copy()
        mask = shared.view(np.bool_).reshape(3, 4)
        if form(mask) is not mask:
            mask[...] = given["mask"][::-1].copy()
            mask, start = mask[::-1], None
        else:
            start = expected
        other_y, vjp_fn = F.batch_norm_vjp(**given | {"running_mean": shared, "mask": mask})
        assert bits(other_y) == bits(y)
        assert start is None or bits(shared) == start
        assert bits(*vjp_fn(dy)) == bits(*grads)
        F.batch_norm(plain["input"], shared, given["running_var"].copy(), training=True)
        assert bits(*vjp_fn(dy)) == bits(*grads)


def test_idle_buffers_over_the_mask(xp, device, rng):
    """A mask in the memory of frozen statistics, which a later call moves: what goes back does not follow."""
    given, dy = masked_arguments(xp, rng, (3, 3, 4))
    layer = BatchNorm1d(3, device=device, momentum=1.0)
    layer.running_mean = given["mask"].reshape(-1).view(np.float32).copy()
    mask = layer.running_mean.view(np.bool_).reshape(3, 4)
    layer.track_running_stats = False
    y, vjp_fn = layer.vjp(given["input"], mask=mask)
    expected = bits(*vjp_fn(dy))
    assert np.isfinite(to_numpy(y)).all()
    layer.track_running_stats = True
    layer(xp.ones((3, 3, 4), np.float32))
    assert bits(*vjp_fn(dy)) == expected


def test_tensors_over_the_mask(xp):
    """An input that is its own mask's memory, both only read."""
    memory = xp.ones(4 * 96, np.bool_)
    memory[::3] = False
    x = memory.view(np.float32).reshape(SHAPE)
    mask = memory[8:40].reshape(4, 2, 4)
    y, grads = run({"input": x, "running_mean": None, "running_var": None, "training": True, "mask": mask}, x)
    apart = {"input": x.copy(), "running_mean": None, "running_var": None, "training": True, "mask": mask.copy()}
    expected, expected_grads = run(apart, x.copy())
    assert bits(y, *grads) == bits(expected, *expected_grads)


# ---------------------------------------------------------------------------------------------------------------------
# The way back


@BOTH_MODES
@pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
def test_going_back_is_pure(xp, rng, epilogue, training):
    """A `vjp_fn` may be called again and changes nothing; what other calls move does not matter to it."""
    given, dy = masked_arguments(xp, rng, SHAPE)
    given |= epilogue | {"training": training}
    _, vjp_fn = F.batch_norm_vjp(**given)
    arrays = [value for value in given.values() if hasattr(value, "shape")] + [dy]
    before = bits(*arrays)
    first = vjp_fn(dy)
    results = bits(*first)
    assert bits(*arrays) == before
    vjp_fn(xp.ones(SHAPE, np.float32))
    F.batch_norm(xp.ones(SHAPE, np.float32), given["running_mean"], given["running_var"], training=True)
    for gradient in dy, in_order(dy, (3, 1, 2, 0)), in_order(dy, (0, 2, 3, 1)):
        assert bits(*vjp_fn(gradient)) == results
    assert bits(*first) == results
    if given["residual"] is not None:
        given["residual"][...] = 0  # of which it has what it needs
        assert bits(*vjp_fn(dy)) == results


@BOTH_MODES
def test_the_mask_is_held_by_reference(xp, rng, training):
    """No copy is made of a mask that lies in memory as the input does."""
    given, dy = masked_arguments(xp, rng, SHAPE, nan=False)
    given |= {"training": training}
    _, vjp_fn = F.batch_norm_vjp(**given)
    assert to_numpy(vjp_fn(dy).input).any()
    given["mask"][...] = False
    for array in vjp_fn(dy)[::3]:
        assert not to_numpy(array).any()


def test_statistics_that_went_into_a_call(xp, rng):
    given, _ = masked_arguments(xp, rng, SHAPE)
    values = left(given["input"], given["mask"], 1).astype(np.float64)
    _, vjp_fn = F.batch_norm_vjp(**given, training=True)
    assert_close(vjp_fn.mean, values.mean(0), np.float32, values.std(0))
    assert_close(vjp_fn.var, values.var(0), np.float32)
    given["running_mean"] += 1
    _, vjp_fn = F.batch_norm_vjp(**given)
    np.testing.assert_array_equal(to_numpy(vjp_fn.mean), to_numpy(given["running_mean"]))


# ---------------------------------------------------------------------------------------------------------------------
# Layers

LAYERS = {
    "1d": (BatchNorm1d, (9, 3), 1),
    "1d of sequences": (BatchNorm1d, (4, 3, 8), 1),
    "2d": (BatchNorm2d, SHAPE, 1),
    "2d, channels last": (BatchNorm2d, (4, 2, 4, 3), -1),
    "3d": (BatchNorm3d, (2, 3, 2, 2, 4), 1),
    "synchronized": (SyncBatchNorm, SHAPE, 1),
}


@pytest.mark.parametrize(("kind", "shape", "axis"), LAYERS.values(), ids=LAYERS)
def test_layers(xp, device, rng, kind, shape, axis):
    """A layer makes the call of the function, in both modes, and counts."""
    given, dy = masked_arguments(xp, rng, shape, channel_axis=axis)
    residual, mask = given["residual"], given["mask"]
    layer = kind(None, channel_axis=axis, activation="relu", device=device)  # which takes its features from the input
    for training in True, False:
        layer.train(training)
        state = {name: None if layer.weight is None else array.copy() for name, array in layer.state_dict().items()}
        state = state or fresh(xp)
        state.pop("num_batches_tracked", None)
        options = {"training": training, "activation": "relu", "channel_axis": axis, "residual": residual}
        expected, expected_vjp_fn = F.batch_norm_vjp(given["input"], **state, **options, mask=mask)
        y, vjp_fn = layer.vjp(given["input"], residual, mask)
        assert bits(y, *vjp_fn(dy)) == bits(expected, *expected_vjp_fn(dy))
        assert bits(layer.running_mean, layer.running_var) == bits(state["running_mean"], state["running_var"])
        assert layer.num_batches_tracked == 1
        with cupybn.no_stats_update():
            for other in layer(given["input"], residual, mask), layer(given["input"], residual=residual, mask=mask):
                assert bits(other) == bits(y)
        assert layer.num_batches_tracked == 1


def fresh(xp):
    """The arrays that a new layer with three features has."""
    return {name: (xp.ones if one else xp.zeros)(3, np.float32)
            for name, one in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))}  # fmt: skip


def test_derived_layers_that_know_of_no_mask(xp, device, rng):
    """A class with a `forward` of its own, which takes no mask, goes on to work without one."""

    class Doubled(BatchNorm1d):
        def forward(self, input, residual=None):
            return super().forward(2 * input, residual)

    x, mask = xp.asarray(rng.normal(0, 1, (4, 3)).astype(np.float32)), xp.ones(4, bool)
    layer = Doubled(3, device=device)
    assert bits(layer(x), layer(x, x)) == bits(*(BatchNorm1d(3, device=device)(2 * x, r) for r in (None, x)))
    with pytest.raises(TypeError, match="forward"):
        layer(x, mask=mask)


def test_the_mean_over_all_batches(xp, device, rng):
    """Batches count each as one, however much of them a mask leaves."""
    layer = BatchNorm1d(3, momentum=None, device=device)
    means = []
    for _ in range(3):
        given, _ = masked_arguments(xp, rng, (4, 3, 8))
        layer(given["input"], mask=given["mask"])
        means.append(left(given["input"], given["mask"], 1).astype(np.float64).mean(0))
    np.testing.assert_allclose(to_numpy(layer.running_mean), np.mean(means, 0), rtol=1e-6)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("frozen", ["no_stats_update", "track_running_stats"])
def test_statistics_that_stay(xp, device, rng, frozen):
    given, _ = masked_arguments(xp, rng, (4, 3, 8))
    layer = BatchNorm1d(3, device=device)
    before = bits(*layer.state_dict().values())
    moving = BatchNorm1d(3, device=device)
    if frozen == "track_running_stats":
        layer.track_running_stats = False
    with cupybn.no_stats_update() if frozen == "no_stats_update" else contextlib.nullcontext():
        y = layer(given["input"], mask=given["mask"])
    assert bits(y) == bits(moving(given["input"], mask=given["mask"]))
    assert bits(*layer.state_dict().values()) == before
    assert moving.num_batches_tracked == 1


def test_recalibration(xp, device, rng):
    """New statistics are those of all that masks have left; a batch with less than two values left does not count."""
    layer = BatchNorm1d(3, device=device, dtype=np.float64)
    batches, values = [], []
    for share in (0.6, 0.2, 0, 0.9):
        given, _ = masked_arguments(xp, rng, (4, 3, 8), share=share)
        batches.append((given["input"], given["mask"]))
        values.append(left(given["input"], given["mask"], 1).astype(np.float64))
    one = xp.zeros((4, 8), bool)
    one[2, 3] = True
    batches.append((xp.ones((4, 3, 8), np.float32), one))
    cupybn.update_bn([layer], batches, lambda batch: layer(batch[0], mask=batch[1]))
    together = np.concatenate(values)
    np.testing.assert_allclose(to_numpy(layer.running_mean), together.mean(0), rtol=1e-7)
    np.testing.assert_allclose(to_numpy(layer.running_var), together.var(0, ddof=1), rtol=1e-6)
    assert layer.num_batches_tracked == 3


def test_on_another_device(rng):
    """A mask is read and copied on the device of the input, whichever is the current one."""
    cp = pytest.importorskip("cupy")
    emulator = getattr(cp, "emulator", None)
    with emulator.pretend(emulator.H200, emulator.H200) if emulator else contextlib.nullcontext():
        if cp.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("needs two devices")
        given, dy = masked_arguments(np, rng, SHAPE)
        given |= {"training": True, "skip_nonfinite": True, "activation": "relu"}
        for mask in given["mask"], given["mask"][:1], given["mask"].transpose(0, 2, 1).copy().transpose(0, 2, 1):
            results = []
            for number in 0, 1:
                with cp.cuda.Device(number):
                    there = {name: to_device(cp, value) for name, value in (given | {"mask": mask}).items()}
                    gradient = cp.asarray(dy)
                for _ in range(2):
                    y, vjp_fn = F.batch_norm_vjp(**there)
                    arrays = [y, *vjp_fn(gradient)]
                    assert {array.device.id for array in arrays} == {number}
                results.append(bits(*arrays, there["running_mean"]))
            assert results[0] == results[1]
        layer = BatchNorm2d(3, device="cuda:1", skip_nonfinite=True)
        cupybn.update_bn([layer], [there["input"]], lambda x: layer(x, mask=there["mask"]))
        assert to_numpy(layer.num_batches_tracked) == 1


def to_device(cp, value):
    """An array of NumPy's on the current device, in the order of memory that it has; other values as they are."""
    if not isinstance(value, np.ndarray):
        return value
    order = sorted(range(value.ndim), key=lambda axis: -value.strides[axis])
    return cp.asarray(value.transpose(order)).transpose(np.argsort(order).tolist())
