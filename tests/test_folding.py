"""Folding: a convolution or a linear map with folded weight and bias does what it and the layer after it have done."""

from __future__ import annotations

import itertools
import warnings

import cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupybn
from tests.reference import DTYPES, bits, exactly, to_numpy
from tests.test_derived_arrays import derived

VECTORS = ("weight", "bias", "running_mean", "running_var")


def convolution(x, weight, groups, transpose):
    """A convolution of stride 1, in float64: one product of matrices for each element of the kernel."""
    N, I, *size = x.shape  # noqa: E741
    kernel = weight.shape[2:]
    x = x.reshape(N, groups, I // groups, *size)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    change = 1 if transpose else -1
    y = np.zeros(
        (
            N,
            groups,
            grouped.shape[2 if transpose else 1],
            *[n + change * (k - 1) for n, k in zip(size, kernel, strict=True)],
        )
    )
    for place in itertools.product(*map(range, kernel)):
        w = grouped[(..., *place)]
        if transpose:
            moved = tuple(slice(p, p + n) for p, n in zip(place, size, strict=True))
            y[(..., *moved)] += np.einsum("ngi...,gio->ngo...", x, w)
        else:
            seen = tuple(slice(p, p + n) for p, n in zip(place, y.shape[3:], strict=True))
            y += np.einsum("ngi...,goi->ngo...", x[(..., *seen)], w)
    return y.reshape(N, groups * y.shape[2], *y.shape[3:])


def make_layer(xp, rng, channels, dtype=np.float32, **options):
    """A layer whose arrays all differ from what they start from."""
    device = "cpu" if xp is np else "cuda:0"
    layer = cupybn.BatchNorm2d(channels, **{"device": device, "dtype": dtype, "eps": 1e-3} | options)
    for name, array in layer.state_dict().items():
        if name != "num_batches_tracked":
            array[...] = xp.asarray(rng.uniform(0.5, 2, channels) * (-1 if name == "running_mean" else 1)).astype(dtype)
    return layer


def expected_fold(weight, bias, layer, transpose=False, groups=1):
    """The contract's formula in float64, for one output channel after the other, rounded to the weight's dtype."""
    arrays = {name: getattr(layer, name) for name in VECTORS}
    wide = {name: None if array is None else to_numpy(array).astype(np.float64) for name, array in arrays.items()}
    given, new = to_numpy(weight), np.empty(weight.shape)
    channels, rows = len(wide["running_mean"]), weight.shape[0] // groups
    new_bias = np.empty(channels)
    with np.errstate(all="ignore"):
        for o in range(channels):
            scale = (1 if wide["weight"] is None else wide["weight"][o]) / np.sqrt(wide["running_var"][o] + layer.eps)
            g, place = divmod(o, max(channels // groups, 1))
            where = (slice(g * rows, (g + 1) * rows), place) if transpose else o
            new[where] = given[where].astype(np.float64) * scale
            start = 0 if bias is None else to_numpy(bias)[o].astype(np.float64)
            new_bias[o] = (start - wide["running_mean"][o]) * scale + (0 if wide["bias"] is None else wide["bias"][o])
        return new.astype(weight.dtype), new_bias.astype(weight.dtype)


def check_bits(xp, weight, bias, layer, **options):
    """Check the folded arrays against the formula to the bit, that they are new and dense, and that nothing changed."""
    linear = weight.ndim == 2
    before = bits(weight, bias, *layer.state_dict().values())
    results = (cupybn.fold_linear_bn if linear else cupybn.fold_conv_bn)(weight, bias, layer, **options)
    assert bits(weight, bias, *layer.state_dict().values()) == before
    for ours, theirs in zip(results, expected_fold(weight, bias, layer, **options), strict=True):
        assert type(ours) is xp.ndarray
        assert ours.flags.c_contiguous
        assert ours.dtype == weight.dtype
        np.testing.assert_array_equal(to_numpy(ours), theirs, strict=True)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
def test_the_formula_rounded_once(xp, rng, dtype, vectors):
    layer = make_layer(xp, rng, 6, vectors)
    weight = xp.asarray(rng.normal(size=(6, 2, 3))).astype(dtype)
    for bias in None, xp.asarray(rng.normal(size=6)).astype(vectors):
        check_bits(xp, weight, bias, layer)
        check_bits(xp, weight, bias, layer, groups=3)
        check_bits(xp, weight[:, 0], bias, layer)
        check_bits(
            xp, weight, None if bias is None else bias[:4], make_layer(xp, rng, 4, vectors), transpose=True, groups=2
        )


@given(
    xp=st.sampled_from([np, cupy]),
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(0, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    transpose=st.booleans(),
    has_bias=st.booleans(),
    affine=st.booleans(),
    layer_bias=st.booleans(),
    order=st.sampled_from("CF"),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_folded_convolution_is_both(
    xp, groups, inputs, outputs, kernel, transpose, has_bias, affine, layer_bias, order, seed
):
    """Outputs in float64 differ by rounding alone: in groups, transposed or not, with kernels of any rank."""
    rng = np.random.default_rng(seed)
    layer = make_layer(xp, rng, groups * outputs, np.float64, affine=affine, bias=layer_bias)
    shape = (groups * inputs, outputs) if transpose else (groups * outputs, inputs)
    weight = xp.asarray(rng.normal(size=(*shape, *kernel)), order=order)
    bias = xp.asarray(rng.normal(size=groups * outputs)) if has_bias else None
    options = {"transpose": transpose, "groups": groups}
    new_weight, new_bias = map(to_numpy, check_bits(xp, weight, bias, layer, **options))

    x = rng.normal(size=(2, groups * inputs, *(k + 1 for k in kernel)))

    def column(vector):
        return to_numpy(vector).reshape(-1, *[1] * len(kernel))

    y = convolution(x, to_numpy(weight), groups, transpose)
    if bias is not None:
        y += column(bias)
    y = (y - column(layer.running_mean)) / np.sqrt(column(layer.running_var) + layer.eps)
    if affine:
        y *= column(layer.weight)
    if affine and layer_bias:
        y += column(layer.bias)
    folded = convolution(x, new_weight, groups, transpose) + column(new_bias)
    terms = convolution(abs(x), abs(new_weight), groups, transpose) + abs(column(new_bias)) + 20
    assert y.shape == folded.shape
    assert np.all(abs(y - folded) <= 1e-14 * terms)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_torch(rng, dimensions, transpose, groups):
    """A convolution of torch with strides, padding and dilation, and the folded one, give the same outputs."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch.nn, f"Conv{'Transpose' if transpose else ''}{dimensions}d")
    conv = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, dtype=torch.float64)
    layer = make_layer(np, rng, 6, np.float64)
    norm = getattr(torch.nn, f"BatchNorm{dimensions}d")(6, eps=layer.eps, dtype=torch.float64).eval()
    norm.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    x = torch.from_numpy(rng.normal(size=(2, 4, *[7] * dimensions)))
    with torch.no_grad():
        expected = norm(conv(x))
        given = conv.weight.numpy(), conv.bias.numpy()
        folded = cupybn.fold_conv_bn(*given, layer, transpose=transpose, groups=groups)
        for parameter, array in zip((conv.weight, conv.bias), folded, strict=True):
            parameter.copy_(torch.from_numpy(array))
        ours = conv(x)
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_a_folded_linear_map_is_both(xp, rng):
    layer = make_layer(xp, rng, 3, np.float64, eps=0.0)
    layer = cupybn.SyncBatchNorm.from_batchnorm(layer)
    weight, bias, x = (xp.asarray(rng.normal(size=shape)) for shape in ((3, 5), 3, (4, 5)))
    new_weight, new_bias = cupybn.fold_linear_bn(weight, bias, layer)
    layer.eval()
    np.testing.assert_allclose(
        to_numpy(x @ new_weight.T + new_bias), to_numpy(layer(x @ weight.T + bias)), rtol=1e-12, atol=1e-12
    )


def test_the_mode_and_frozen_statistics_do_not_matter(xp, rng):
    layer = make_layer(xp, rng, 2)
    weight = xp.asarray(rng.normal(size=(2, 1, 1)).astype(np.float32))
    expected = bits(*cupybn.fold_conv_bn(weight, None, layer))
    layer.eval()
    assert bits(*cupybn.fold_conv_bn(weight, None, layer)) == expected
    layer.track_running_stats = False
    assert bits(*cupybn.fold_conv_bn(weight, None, layer.train())) == expected


def test_strided_arrays(xp, rng):
    """Arrays with gaps, or backwards, are folded like others."""
    layer, dense = make_layer(xp, rng, 3), make_layer(xp, rng, 3)
    for name in VECTORS:
        setattr(layer, name, xp.asarray(np.repeat(to_numpy(getattr(dense, name)), 2))[::2])
    weight = xp.asarray(rng.normal(size=(3, 4, 6)).astype(np.float32))[:, ::-1, ::3]
    bias = xp.asarray(rng.normal(size=6).astype(np.float32))[::-2]
    assert bits(*check_bits(xp, weight, bias, layer)) == bits(*check_bits(xp, weight.copy(), bias.copy(), dense))


def test_arrays_of_derived_classes(xp, rng):
    """Classes of the user's have no say in what is computed, and the results are plain arrays."""
    layer = make_layer(xp, rng, 3)
    weight, bias = (xp.asarray(rng.normal(size=shape)) for shape in ((3, 2, 1), 3))
    expected = bits(*check_bits(xp, weight, bias, layer))
    for name in VECTORS:
        setattr(layer, name, derived(xp, getattr(layer, name)))
    results = cupybn.fold_conv_bn(derived(xp, weight), derived(xp, bias), layer)
    assert [type(array) for array in results] == [xp.ndarray] * 2
    assert bits(*results) == expected


def test_numbers_beyond_a_dtype_are_infinite_without_a_warning(xp, rng):
    layer = make_layer(xp, rng, 3, np.float32, eps=0.0)
    layer.running_var[...] = xp.asarray(np.array([0, 1e-20, np.nan], np.float32))
    weight = xp.asarray(np.array([1, 1e4, 1], np.float16).reshape(3, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_weight, new_bias = check_bits(xp, weight, None, layer)
    assert np.isinf(to_numpy(new_weight)[:2]).all()
    assert np.isnan(to_numpy(new_bias)[2])


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def wrong(error, message, weight=(6, 2, 3), bias=None, fold="conv", layer=None, **options):
    return pytest.param(error, message, weight, bias, fold, layer, options, id=message[:70])


FLOATS = "float16, bfloat16, float32, float64"
WRONG = [
    wrong(
        TypeError, "expected weight to be a NumPy or CuPy array (got list): use numpy.asarray(weight, 'float32')", [1.0]
    ),
    wrong(TypeError, f"expected weight of dtype {FLOATS} (got int64): use weight.astype(np.float32)", "int64"),
    wrong(
        ValueError,
        "expected weight of a convolution, with 3 axes or more (got shape (6, 2)): use fold_linear_bn",
        (6, 2),
    ),
    wrong(ValueError, "expected weight of a convolution, with 3 axes or more (got shape (6,))", (6,)),
    wrong(
        ValueError,
        "expected weight of a linear map, with 2 axes (got shape (6, 2, 1)): use fold_conv_bn",
        (6, 2, 1),
        fold="linear",
    ),
    wrong(ValueError, "expected weight of a linear map, with 2 axes (got shape ())", (), fold="linear"),
    wrong(TypeError, "expected groups to be an int (got True)", groups=True),
    wrong(TypeError, "expected groups to be an int (got 2.0): use int(groups)", groups=2.0),
    wrong(TypeError, "expected groups to be an int (got None)", groups=None),
    wrong(ValueError, "expected groups >= 1 (got 0)", groups=0),
    wrong(TypeError, "expected transpose to be a bool (got 1)", transpose=1),
    wrong(ValueError, "expected groups to divide the 6 output channels of weight (got groups=4)", groups=4),
    wrong(
        ValueError,
        "expected groups to divide the 3 input channels of weight (got groups=2)",
        (3, 3, 1),
        transpose=True,
        groups=2,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (O, I / groups, ...) (got 4, in shape "
        "(4, 6, 3)); did you mean transpose=True?",
        (4, 6, 3),
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (O, I / groups, ...) (got 4, in shape "
        "(4, 3, 3)); did you mean transpose=True?",
        (4, 3, 3),
        groups=2,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (O, I / groups, ...) (got 4, in shape "
        "(4, 2, 3))",
        (4, 2, 3),
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (I, O / groups, ...) (got 4, in shape "
        "(6, 4, 3)); did you mean transpose=False?",
        (6, 4, 3),
        transpose=True,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (I, O / groups, ...) (got 8, in shape "
        "(6, 4, 3)); did you mean transpose=False?",
        (6, 4, 3),
        transpose=True,
        groups=2,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (I, O / groups, ...) (got 2, in shape "
        "(9, 2, 3)); did you mean groups=3?",
        (9, 2, 3),
        transpose=True,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (I, O / groups, ...) (got 2, in shape "
        "(10, 2, 3))",
        (10, 2, 3),
        transpose=True,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (I, O / groups, ...) (got 0, in shape "
        "(4, 0, 3))",
        (4, 0, 3),
        transpose=True,
    ),
    wrong(
        ValueError,
        "expected weight with 6 output channels, as layer has, in the layout (O, I) (got 4, in shape (4, 6)): use "
        "weight.T",
        (4, 6),
        fold="linear",
    ),
    wrong(ValueError, "expected bias of shape (6,) (got (2,))", bias=(2,)),
    wrong(ValueError, "expected bias of shape (6,) (got (6, 1))", bias=(6, 1)),
    wrong(TypeError, f"expected bias of dtype {FLOATS} (got int64): use bias.astype(np.float32)", bias="int64"),
    wrong(TypeError, "expected bias to be a NumPy or CuPy array (got int)", bias=0),
    wrong(ValueError, "expected bias of shape (6,) (got (2,))", (6, 2), (2,), fold="linear"),
    wrong(TypeError, "expected layer to be a batch norm layer of cupybn (got NoneType)", layer="missing"),
    wrong(
        ValueError,
        "the activation is not folded: expected a layer without one (got activation='relu'): use twin = "
        "copy.copy(layer), which shares its arrays, with twin.activation = None, and apply the activation to what the "
        "folded weight and bias give",
        layer={"activation": "relu"},
    ),
    wrong(
        ValueError,
        "expected layer to have running statistics (got a BatchNorm2d without): one that takes those of each batch "
        "cannot be folded",
        layer={"track_running_stats": False},
    ),
    wrong(
        ValueError,
        "expected layer to have running statistics (got a BatchNorm2d without arrays, which it makes for its first "
        "input or state dict)",
        layer={"num_features": None},
    ),
    wrong(ValueError, "batch_norm eps must be non-negative, but got -1.0", layer={"eps": -1.0}),
    wrong(ValueError, "layer.bias should contain 6 elements not 5", layer={"of the user": ("bias", np.ones(5, "f4"))}),
    wrong(
        ValueError,
        "layer.running_var should contain 6 elements not 5",
        layer={"of the user": ("running_var", np.ones(5, "f4"))},
    ),
    wrong(
        ValueError,
        "expected layer.running_var of shape (C,) (got (6, 1))",
        layer={"of the user": ("running_var", np.ones((6, 1), "f4"))},
    ),
    wrong(
        TypeError,
        f"expected layer.weight of dtype {FLOATS} (got int64): use layer.weight.astype(np.float32)",
        layer={"of the user": ("weight", np.ones(6, int))},
    ),
    *(
        wrong(
            ValueError,
            "expected layer to have running statistics (got a BatchNorm2d without): one that takes those of each batch "
            "cannot be folded",
            layer={"of the user": (name, None)},
        )
        for name in ("running_mean", "running_var")
    ),
]


def array_of(xp, given, shape):
    """An array of this shape, or of a wrong dtype given by name; other things as they are."""
    if isinstance(given, str):
        return xp.ones(shape, given)
    return xp.ones(given, np.float32) if isinstance(given, tuple) else given


@pytest.mark.parametrize(("error", "message", "weight", "bias", "fold", "layer", "options"), WRONG)
def test_errors(xp, error, message, weight, bias, fold, layer, options):
    norm = None
    if layer != "missing":
        norm = cupybn.BatchNorm2d(
            **{"num_features": 6, "device": "cpu" if xp is np else "cuda:0"}
            | {name: value for name, value in (layer or {}).items() if name != "of the user"}
        )
        name, array = (layer or {}).get("of the user", (None, None))
        if name is not None:
            setattr(norm, name, None if array is None else xp.asarray(array))
    weight, bias = array_of(xp, weight, (6, 2, 3)), array_of(xp, bias, (6,))
    function = cupybn.fold_linear_bn if fold == "linear" else cupybn.fold_conv_bn
    for mode in True, False:  # of which errors depend as little as what is folded
        if norm is not None:
            norm.train(mode)
        with pytest.raises(error, match=exactly(message)):
            function(weight, bias, norm, **options)


def test_arrays_on_other_devices(rng):
    on_host, on_device = make_layer(np, rng, 2), make_layer(cupy, rng, 2)
    weight = np.ones((2, 1, 1), np.float32)
    message = 'expected layer to be on cpu like weight, a NumPy array (got one on cuda:0): use layer.to("cpu")'
    with pytest.raises(TypeError, match=exactly(message)):
        cupybn.fold_conv_bn(weight, None, on_device)
    message = (
        'expected layer to be on cuda:0 like weight, a CuPy array on cuda:0 (got one on cpu): use layer.to("cuda:0")'
    )
    with pytest.raises(TypeError, match=exactly(message)):
        cupybn.fold_conv_bn(cupy.asarray(weight), None, on_host)
    message = (
        "expected bias to be a NumPy array like weight (got a CuPy array on cuda:0): all arrays of a call are on one "
        "device, use cupy.asarray(weight) or cupy.asnumpy(bias)"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        cupybn.fold_conv_bn(weight, cupy.ones(2, np.float32), on_host)


def test_layers_and_tensors_of_torch(rng):
    torch = pytest.importorskip("torch")
    layer, weight = make_layer(np, rng, 2), torch.ones(2, 1, 1)
    message = "expected weight to be a NumPy or CuPy array (got Tensor): use numpy.from_dlpack(weight)"
    with pytest.raises(TypeError, match=exactly(message)):
        cupybn.fold_conv_bn(weight, None, layer)
    message = (
        "expected layer to be a batch norm layer of cupybn (got BatchNorm2d): load its state dict into one, "
        "cupybn.BatchNorm2d(...).load_state_dict(layer.state_dict())"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        cupybn.fold_conv_bn(weight.numpy(), None, torch.nn.BatchNorm2d(2))


def test_the_host_waits_for_nothing(rng):
    if not hasattr(cupy, "emulator"):
        pytest.skip("the stand-in counts how often the host waits")
    layer = make_layer(cupy, rng, 4)
    weight, bias = cupy.ones((4, 2, 3), np.float32), cupy.ones(4, np.float32)
    with cupy.emulator.record_syncs() as syncs:
        cupybn.fold_conv_bn(weight, bias, layer)
        cupybn.fold_conv_bn(weight, bias, layer, transpose=True, groups=2)
        cupybn.fold_linear_bn(weight[:, :, 0], bias, layer)
    assert syncs == []
