"""The loader and launcher: sources found and joined, signatures read, arguments checked before anything is launched."""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from cupybn._steps import bundles as real_bundles
from cupybn._steps import geometry, sources
from cupybn._steps.launcher import Frame, Hearing, Kernel, kernel, listening, unheard
from cupybn._steps.sources import kernel_names, signature, source

cp = pytest.importorskip("cupy")

EXAMPLE = """// example: y = a * x + b + v
#include "helper.cuh"
#include "deeper/more.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) example(
    const data_t* x,             // [size]
    const double* a,             // [] or null
    Vector v,                    // [size] or null
    double b,
    // outputs
    data_t* y,                   // [size]
    // sizes
    long long size) {
    const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (i < size) y[i] = (a ? *a : 1) * twice(x[i]) / 2 + b + (v.data ? v.get(i) : 0);
}
"""
HELPER = """#pragma once
#include "deeper/more.cuh"
__device__ inline double twice(double x) { return 2 * x; }
"""
MORE = """#pragma once
typedef float float32;
typedef double float64;
typedef DATA_T data_t;
struct Vector {
    const char* data;
    long long stride, dtype;
    __device__ double get(long long i) const {
        const char* at = data + i * stride;
        return dtype == 3 ? *(double*)at : *(float*)at;
    }
};
"""
BUNDLED = """// bundled: all that it is given, in float64
#include "deeper/more.cuh"

enum Activation : long long { NONE, RELU };

struct Affine {
    Vector weight;  // [C] or null
    double eps;

    __device__ double at(long long c) const { return weight.data ? weight.get(c) : 1; }
};

struct State {
    data_t* last;              // [size]
    const long long* batches;  // [] or null
    Activation activation;
    double momentum;           // or null: there is none
    Vector rest;               // [C]; never null
};

struct Sizes {
    long long N;
    long long C;
};

extern "C" __global__ void bundled(
    const data_t* x,           // [size]
    Affine affine,
    State state,               // or null: what is said here is seen as well
    // outputs
    double* out,               // [12]
    // sizes
    Sizes sizes) {
    const double found[] = {
        x[0], affine.at(sizes.C - 1), affine.eps, (double)(state.last != nullptr),
        state.last ? state.last[sizes.N] : -1., state.batches ? (double)*state.batches : -1.,
        (double)state.activation, state.momentum, (double)(state.rest.data != nullptr),
        state.rest.data ? state.rest.get(sizes.C - 1) : -1., (double)sizes.N, (double)sizes.C,
    };
    for (int i = 0; i < 12; i++) out[i] = found[i];
}
"""


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A kernel in a folder made for the test, for float32 data."""
    (tmp_path / "deeper").mkdir()
    texts = {"example.cu": EXAMPLE, "bundled.cu": BUNDLED, "helper.cuh": HELPER, "deeper/more.cuh": MORE}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "KERNELS", tmp_path)
    monkeypatch.setattr(sources, "signature", signature.__wrapped__)
    monkeypatch.setattr(sources, "source", source.__wrapped__)
    return Kernel("example", {"DATA_T": np.dtype(np.float32), "THREADS": 64})


@pytest.fixture
def arguments(rng):
    def draw(dtype, size=100):
        return cp.asarray(rng.standard_normal(size).astype(dtype))

    return {
        "x": draw(np.float32),
        "a": draw(np.float64, ()),
        "v": draw(np.float32),
        "b": 0.25,
        "y": cp.zeros(100, np.float32),
        "size": 100,
    }


def expected(arguments):
    given = {name: value.get() if hasattr(value, "get") else value for name, value in arguments.items()}
    a, v = (default if given[name] is None else given[name] for name, default in (("a", 1), ("v", 0)))
    return (given["x"].astype(np.float64) * a + given["b"] + v).astype(np.float32)


def launch(kernel, arguments):
    kernel.launch((2,), 64, arguments)
    np.testing.assert_allclose(arguments["y"].get(), expected(arguments), rtol=1e-6)


def test_launch(example, arguments):
    launch(example, arguments)


@pytest.mark.parametrize("name", ["a", "v"])
def test_none_where_the_source_says_so(example, arguments, name):
    launch(example, arguments | {name: None})


def test_vectors_of_any_float_dtype_and_stride(example, arguments):
    wide = cp.arange(300, dtype=np.float64)
    for vector in (wide[:100], wide[::3], wide[99::-1], wide.astype(np.float32)[1:200:2][:100]):
        launch(example, arguments | {"v": vector})


def test_python_scalars_become_what_is_declared(example, arguments):
    launch(example, arguments | {"b": 2, "size": np.int32(100)})
    launch(example, arguments | {"b": np.float32(0.5)})


def test_a_bool_is_as_wide_as_other_integers(example, arguments):
    """CuPy passes a bool as one byte, where the kernel reads eight."""
    example.launch((2,), 64, arguments | {"size": True})
    written = arguments["y"].get()
    assert written[0] == expected(arguments)[0]
    assert not written[1:].any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros(100, np.float64), r"x: expected a C-contiguous array of float32 \(got .*float64\)"),
        ("x", np.zeros(200, np.float32)[::2], r"x: expected a C-contiguous array of float32 \(got .*strides \(8,\)"),
        ("a", np.zeros((), np.float32), r"a: expected .* float64 \(got .*float32\)"),
        ("x", None, r"x: expected .* \(got NoneType\)"),
        ("y", None, r"y: expected .* \(got NoneType\)"),
        ("x", 3.0, r"x: expected .* \(got float\)"),
        ("v", np.zeros((10, 10), np.float32), r"v: expected a 1-D array .* \(got shape \(10, 10\)"),
        ("v", np.zeros(100, np.int64), r"v: expected a 1-D array of float16.* \(got .*int64\)"),
        ("v", 1.0, r"v: expected a 1-D array .* \(got float\)"),
    ],
)
def test_wrong_arguments_are_not_launched(example, arguments, name, value, message):
    if isinstance(value, np.ndarray):
        strided = value.ndim == 1 and not value.flags.c_contiguous
        value = cp.asarray(np.zeros(200, np.float32))[::2] if strided else cp.asarray(value)
    with pytest.raises(TypeError, match=f"^example: {message}"):
        example.launch((2,), 64, arguments | {name: value})
    assert not arguments["y"].get().any()


def test_missing_and_unknown_names(example, arguments):
    del arguments["a"]
    with pytest.raises(TypeError, match=r"^example: expected x, a, v, b, y, size \(missing or unknown: a, c\)$"):
        example.launch((2,), 64, arguments | {"c": 1})


def test_one_name_too_many_or_too_few(example, arguments):
    with pytest.raises(TypeError, match=r"\(missing or unknown: c\)$"):
        example.launch((2,), 64, arguments | {"c": 1})
    for name in arguments:
        fewer = {other: value for other, value in arguments.items() if other != name}
        with pytest.raises(TypeError, match=rf"\(missing or unknown: {name}\)$"):
            example.launch((2,), 64, fewer)
    assert not arguments["y"].get().any()


def test_arrays_on_another_device(example, arguments):
    if not hasattr(cp, "emulator"):
        pytest.skip("needs two GPUs")
    with cp.emulator.pretend(cp.emulator.H200, cp.emulator.H200):
        with cp.cuda.Device(1):
            other = cp.zeros(100, np.float32)
        with pytest.raises(ValueError, match=r"example: expected x on device 0 \(got 1\)"):
            example.launch((2,), 64, arguments | {"x": other})


# ---------------------------------------------------------------------------------------------------------------------
# Bundles


class Affine(NamedTuple):
    weight: object
    eps: object


class State(NamedTuple):
    last: object
    batches: object
    activation: object
    momentum: object
    rest: object


class Sizes(NamedTuple):
    N: object
    C: object


@pytest.fixture
def bundled(example):
    return Kernel("bundled", dict(option[2:].split("=") for option in example.options) | {"DATA_T": np.dtype("f4")})


@pytest.fixture
def bundles():
    return {
        "x": cp.full(1, 7, np.float32),
        "affine": Affine(cp.asarray(np.array([1.5, 2.5], np.float32)), 1e-3),
        "state": State(
            cp.asarray(np.array([3, 4, 5], np.float32)), cp.asarray(9), "relu", 0.125, cp.asarray(np.array([6, 6.5]))
        ),
        "out": cp.zeros(12),
        "sizes": Sizes(2, 2),
    }


def seen(kernel, bundles):
    """The values that a kernel finds in its bundles, by name."""
    kernel.launch((1,), 1, bundles)
    names = [
        "x",
        "weight",
        "eps",
        "has_last",
        "last",
        "batches",
        "activation",
        "momentum",
        "has_rest",
        "rest",
        "N",
        "C",
    ]
    return dict(zip(names, bundles["out"].tolist(), strict=True))


def changed(bundles, path, value):
    """Arguments with another value for one of them, or for a field of one."""
    name, _, field = path.partition(".")
    return bundles | {name: bundles[name]._replace(**{field: value}) if field else value}


def test_fields_land_in_the_struct(bundled, bundles):
    assert seen(bundled, bundles) == {
        "x": 7, "weight": 2.5, "eps": 1e-3, "has_last": 1, "last": 5, "batches": 9, "activation": 1,
        "momentum": 0.125, "has_rest": 1, "rest": 6.5, "N": 2, "C": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "name", "found"),
    [
        ("affine.weight", None, "weight", 1),
        ("state.batches", None, "batches", -1),
        ("state.momentum", None, "momentum", np.nan),
        ("state.activation", None, "activation", 0),
        ("affine.eps", np.float32(0.5), "eps", 0.5),
        ("affine.eps", 2, "eps", 2),
        ("sizes", Sizes(np.int32(1), 1), "last", 4),
        ("sizes", Sizes(0, np.int64(1)), "rest", 6),
    ],
)
def test_fields_of_other_values(bundled, bundles, path, value, name, found):
    np.testing.assert_equal(seen(bundled, changed(bundles, path, value))[name], found)


def test_vectors_in_structs_have_any_float_dtype_and_stride(bundled, bundles):
    wide = cp.asarray(np.array([0.5, 1.5, 2.5, 3.5]))
    for vector, found in ((wide, 1.5), (wide[::2], 2.5), (wide[::-1], 2.5), (wide.astype(np.float32)[2:], 3.5)):
        assert seen(bundled, changed(bundles, "affine.weight", vector))["weight"] == found


def test_zeros_in_structs_keep_their_sign(bundled, bundles):
    """A cache takes both zeros for the same key."""
    for eps in (0.0, -0.0, 0.0):
        found = seen(bundled, changed(bundles, "affine.eps", eps))["eps"]
        assert (found, np.signbit(found)) == (0, np.signbit(eps))


def test_a_whole_bundle_may_be_none_where_the_source_says_so(bundled, bundles):
    found = seen(bundled, bundles | {"state": None})
    assert (found["has_last"], found["batches"], found["activation"], found["has_rest"]) == (0, -1, 0, 0)
    assert (found["weight"], found["C"]) == (2.5, 2)


def refused(kernel, arguments, error, message):
    """Check that a launch with these arguments raises this error, and that nothing is launched."""
    with pytest.raises(error, match=f"^bundled: {message}"):
        kernel.launch((1,), 1, arguments)
    assert not arguments["out"].get().any()


ARRAY = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("affine.weight", ARRAY.astype(np.int32), r"expected a 1-D array of float16, .* \(got shape \(4,\), .* int32"),
        ("affine.weight", ARRAY.reshape(2, 2), r"expected a 1-D array of float16, .* \(got shape \(2, 2\)"),
        ("affine.weight", 1.0, r"expected a 1-D array of float16, .* \(got float\)"),
        ("state.rest", None, r"expected a 1-D array of float16, .* \(got NoneType\)"),
        ("affine.eps", None, r"expected a number \(got NoneType\)"),
        ("affine.eps", ARRAY, r"expected a number \(got shape"),
        ("state.last", None, r"expected a C-contiguous array of float32 \(got NoneType\)"),
        ("state.last", ARRAY.astype(np.float64), r"expected a C-contiguous array of float32 \(got .* float64"),
        ("state.last", "strided", r"expected a C-contiguous array of float32 \(got .*strides \(8,\)"),
        ("state.last", 3, r"expected a C-contiguous array of float32 \(got int\)"),
        ("state.batches", ARRAY, r"expected a C-contiguous array of int64 \(got .* float32"),
        ("state.activation", "gelu", r"expected one of None, 'relu' \(got str\)"),
        ("state.activation", 1, r"expected one of None, 'relu' \(got int\)"),
        ("sizes.C", None, r"expected an integer \(got NoneType\)"),
        ("sizes.N", 2.5, r"expected an integer \(got float\)"),
    ],
)
def test_wrong_fields_are_named_and_not_launched(bundled, bundles, path, value, message):
    if isinstance(value, np.ndarray):
        value = cp.asarray(value)
    elif isinstance(value, str) and value == "strided":
        value = cp.zeros(8, np.float32)[::2]
    refused(bundled, changed(bundles, path, value), TypeError, rf"{re.escape(path)}: {message}")


class Other(NamedTuple):
    weight: object
    epsilon: object


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("affine", None, "NoneType"),
        ("affine", (None, 1e-3), "tuple"),
        ("affine", {"weight": None, "eps": 1e-3}, "dict"),
        ("affine", Other(None, 1e-3), "Other"),
        ("affine", 1e-3, "float"),
        ("state", "array", "shape .*"),
        ("sizes", None, "NoneType"),
        ("sizes", (2, 2), "tuple"),
        ("sizes", Other(2, 2), "Other"),
    ],
)
def test_what_is_no_bundle_is_not_launched(bundled, bundles, name, value, given):
    """A value that is no bundle is refused, even after a launch with a bundle of the same values."""
    bundled.launch((1,), 1, bundles)
    bundles["out"].fill(0)
    value = cp.zeros(5, np.float32) if isinstance(value, str) else value
    fields = ", ".join(bundles[name]._fields)
    refused(bundled, bundles | {name: value}, TypeError, rf"{name}: expected a NamedTuple of {fields} \(got {given}\)$")


def test_fields_on_another_device(bundled, bundles):
    if not hasattr(cp, "emulator"):
        pytest.skip("needs two GPUs")
    with cp.emulator.pretend(cp.emulator.H200, cp.emulator.H200):
        with cp.cuda.Device(1):
            arrays = {
                "affine.weight": cp.zeros(2, np.float32),
                "state.last": cp.zeros(3, np.float32),
                "state.batches": cp.zeros((), np.int64),
            }
        for path, array in arrays.items():
            message = rf"expected {re.escape(path)} on device 0 \(got 1\)$"
            refused(bundled, changed(bundles, path, array), ValueError, message)


# ---------------------------------------------------------------------------------------------------------------------
# Frames and listeners


def test_a_frame_is_seen_as_it_is_at_the_launch(bundled, bundles):
    """Arguments are made once; a launch sees the words that are in the frame then, and keeps none."""
    seen(bundled, bundles)
    (frame,) = bundled._frames
    words = frame.words.tolist()
    assert len(words) == bundled.arguments.ranges[-1][1] == len(frame.doubles)
    arguments = frame.arguments
    assert [by_value.__class__ for by_value in arguments] == [cp.cuda.function.CNumpyArray] * len(bundles)
    taken = bundled.frame()
    assert taken is frame
    assert bundled._frames == []
    taken.doubles[bundled.arguments.places["affine.eps"]] = 7.5
    bundled.run((1,), 1, taken, 0)
    assert taken.arguments is arguments
    assert bundled._frames == [taken]
    assert bundles["out"].tolist()[2] == 7.5
    taken.words[:] = memoryview(np.array(words, np.uint64)).cast("B").cast("Q")
    assert seen(bundled, bundles)["eps"] == 1e-3


def test_a_frame_belongs_to_one_launch_at_a_time(example):
    frames = [example.frame() for _ in range(3)]
    assert len({id(frame) for frame in frames}) == 3
    for frame in frames:
        frame.words[:] = memoryview(np.full(len(frame.words), id(frame), np.uint64)).cast("B").cast("Q")
    assert all(set(frame.words.tolist()) == {id(frame)} for frame in frames)
    assert all(isinstance(frame, Frame) for frame in frames)


def test_words_are_where_parameters_begin(example, bundled):
    assert example.arguments.ranges == [(0, 1), (1, 2), (2, 5), (5, 6), (6, 7), (7, 8)]
    assert example.arguments.places == {"x": 0, "a": 1, "v": 2, "b": 5, "y": 6, "size": 7}
    assert bundled.arguments.ranges == [(0, 1), (1, 5), (5, 12), (12, 13), (13, 15)]
    assert bundled.arguments.places == {
        "x": 0, "affine.weight": 1, "affine.eps": 4, "state.last": 5, "state.batches": 6, "state.activation": 7,
        "state.momentum": 8, "state.rest": 9, "out": 12, "sizes.N": 13, "sizes.C": 14,
    }  # fmt: skip


def test_arrays_of_a_launch_by_their_words(bundled, bundles):
    listed = bundled.arguments.listed(bundles)
    state = bundles["state"]
    assert sorted((word, id(array)) for word, array in bundled.arguments.arrays(listed)) == [
        (word, id(array))
        for word, array in (
            (0, bundles["x"]), (1, bundles["affine"].weight), (5, state.last), (6, state.batches), (9, state.rest),
            (12, bundles["out"]),
        )
    ]  # fmt: skip
    fewer = bundles | {"affine": Affine(None, 1e-3), "state": None}
    listed = bundled.arguments.listed(fewer)
    assert [word for word, _ in bundled.arguments.arrays(listed)] == [0, 12]


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.launches = []

    def launched(self, *what):
        self.launches.append(what)

    def made(self, _array):
        raise AssertionError("no array is made here")


def test_a_listener_is_told_of_launches_that_were_made(example, arguments):
    heard = Heard()
    with Hearing(heard):
        launch(example, arguments)
        with unheard():
            launch(example, arguments)
        with pytest.raises(TypeError):
            example.launch((2,), 64, arguments | {"x": None})
    launch(example, arguments)
    ((kernel, grid, block, shared, values, words),) = heard.launches
    assert (kernel, grid, block, shared) == (example, (2,), 64, 0)
    assert values == list(arguments.values())
    assert words.tolist()[0] == arguments["x"].data.ptr
    assert words.tolist()[7] == 100
    assert listening.listener is None


@pytest.mark.usefixtures("example")
def test_signature_of_structs():
    parameters = {p.name: p for p in sources.signature("bundled")}
    assert [(p.name, p.type, p.section, p.nullable) for p in parameters.values()] == [
        ("x", "data_t*", "inputs", False),
        ("affine", "Affine", "inputs", False),
        ("state", "State", "inputs", True),
        ("out", "double*", "outputs", False),
        ("sizes", "Sizes", "sizes", False),
    ]
    assert [(f.name, f.type, f.nullable, f.fields) for f in parameters["affine"].fields] == [
        ("weight", "Vector", True, ()),
        ("eps", "double", False, ()),
    ]
    assert [(f.name, f.type, f.nullable) for f in parameters["state"].fields] == [
        ("last", "data_t*", False),
        ("batches", "long long*", True),
        ("activation", "Activation", False),
        ("momentum", "double", True),
        ("rest", "Vector", False),
    ]
    assert [(f.name, f.type, f.section) for f in parameters["sizes"].fields] == [
        ("N", "long long", "sizes"),
        ("C", "long long", "sizes"),
    ]
    assert parameters["x"].fields == parameters["out"].fields == ()


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.usefixtures("example")
def test_source_has_each_header_once_and_says_where_lines_come_from():
    text = sources.source("example")
    assert "#include" not in text
    assert "#pragma once" not in text
    assert text.count("struct Vector") == text.count("twice(double x)") == 1
    lines = text.splitlines()
    for label, original in (("example.cu", EXAMPLE), ("helper.cuh", HELPER), ("deeper/more.cuh", MORE)):
        place = None
        for line in lines:
            marker = re.fullmatch(r'#line (\d+) "(.+)"', line)
            if marker:
                place = int(marker[1]) if marker[2] == f"kernels/{label}" else None
            elif place is not None:
                wanted = original.splitlines()[place - 1]
                assert line == ("" if wanted.startswith(("#pragma once", "#include")) else wanted)
                place += 1


@pytest.mark.usefixtures("example")
def test_signature():
    assert [p.name for p in sources.signature("example")] == ["x", "a", "v", "b", "y", "size"]
    assert [p.type for p in sources.signature("example")] == [
        "data_t*", "double*", "Vector", "double", "data_t*", "long long",
    ]  # fmt: skip
    assert [p.section for p in sources.signature("example")] == ["inputs"] * 4 + ["outputs", "sizes"]
    assert [p.nullable for p in sources.signature("example")] == [False, True, True, False, False, False]


@pytest.mark.parametrize("name", kernel_names())
def test_every_kernel_has_a_source_and_a_signature(name):
    assert source(name).count("__global__") == 1
    assert len(signature(name)) > 1
    bundles = {name for name, bundle in vars(real_bundles).items() if hasattr(bundle, "_fields")}
    for parameter in signature(name):
        simple = {"data_t*", "bool*", "double*", "long long*", "double", "long long", "Vector", "unsigned long long*"}
        structs = bundles if parameter.section != "sizes" else {"ChannelsFirst", "ChannelsLast", "Rows", "Samples"}
        assert parameter.type in simple | structs
        assert bool(parameter.fields) == (parameter.type in structs)


def test_a_kernel_is_made_and_compiled_once():
    macros = {"DATA_T": np.dtype(ml_dtypes.bfloat16), "WIDTH": 8, "INDEX_BITS": 32, "THREADS": 256}
    first = kernel("channels_first/bn_stats", **macros)
    assert kernel("channels_first/bn_stats", **macros) is first
    assert first.raw is first.raw
    assert first.options == ("-DDATA_T=bfloat16", "-DWIDTH=8", "-DINDEX_BITS=32", "-DTHREADS=256")
    assert kernel("channels_first/bn_stats", **macros | {"WIDTH": 4}) is not first


@pytest.mark.parametrize(
    ("width", "dtype", "other"), [(1, np.bool_, np.uint8), (2, np.uint8, np.bool_), (8, np.uint8, np.bool_)]
)
def test_a_mask_of_packs_has_bytes_and_one_of_elements_is_bool(width, dtype, other):
    macros = {"DATA_T": np.dtype(np.float16), "WIDTH": width, "INDEX_BITS": 32, "THREADS": 128, "TEAM": 32}
    loaded = kernel("channels_first/bn_backward_reduce", **macros)
    x = cp.zeros((1, 1, 8), np.float16)
    arguments = {
        "dy": x,
        "x": x,
        "statistics": real_bundles.Statistics.of(cp.zeros(1), cp.zeros(1)),
        "affine": real_bundles.Affine(None, None, 1),
        "sums": real_bundles.Sums(cp.zeros((1, 1)), cp.zeros((1, 1))),
        "sizes": geometry.ChannelsFirst(1, 1, 8, 8 // width),
    }

    def noted(dtype):
        return arguments | {"epilogue": real_bundles.Epilogue(None, "relu", cp.zeros(8 // width, dtype))}

    loaded.launch((1, 1, 1), 128, noted(dtype))
    message = rf"epilogue.passed: expected a C-contiguous array of {np.dtype(dtype)} \(got .*{np.dtype(other)}"
    with pytest.raises(TypeError, match=message):
        loaded.launch((1, 1, 1), 128, noted(other))
