"""The loader and launcher: sources found and joined, signatures read, arguments checked before anything is launched."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from cupybn._steps import launcher
from cupybn._steps.launcher import Kernel, kernel, kernel_names, signature, source

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


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A kernel of its own folder, for float32 data."""
    (tmp_path / "deeper").mkdir()
    for name, text in {"example.cu": EXAMPLE, "helper.cuh": HELPER, "deeper/more.cuh": MORE}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(launcher, "KERNELS", tmp_path)
    monkeypatch.setattr(launcher, "signature", signature.__wrapped__)
    monkeypatch.setattr(launcher, "source", source.__wrapped__)
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


@pytest.mark.usefixtures("example")
def test_source_has_each_header_once_and_says_where_lines_come_from():
    text = launcher.source("example")
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
    assert [p.name for p in launcher.signature("example")] == ["x", "a", "v", "b", "y", "size"]
    assert [p.type for p in launcher.signature("example")] == [
        "data_t*", "double*", "Vector", "double", "data_t*", "long long",
    ]  # fmt: skip
    assert [p.section for p in launcher.signature("example")] == ["inputs"] * 4 + ["outputs", "sizes"]
    assert [p.nullable for p in launcher.signature("example")] == [False, True, True, False, False, False]


@pytest.mark.parametrize("name", kernel_names())
def test_every_kernel_has_a_source_and_a_signature(name):
    assert source(name).count("__global__") == 1
    assert len(signature(name)) > 5
    assert {p.type for p in signature(name)} <= {
        "data_t*",
        "double*",
        "long long*",
        "mask_t*",
        "double",
        "long long",
        "Vector",
    }


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
    vectors = {name: cp.zeros(1) for name in ("statistics_mean", "statistics_var")}
    sums = {name: cp.zeros((1, 1)) for name in ("sums_dy", "sums_dy_xhat")}
    numbers = {"eps": 1, "activation": 1, "N": 1, "C": 1, "L": 8, "packs_per_share": 8 // width}
    arguments = {"dy": x, "x": x, "weight": None, "bias": None, **vectors, **sums, **numbers}
    loaded.launch((1, 1, 1), 128, arguments | {"mask": cp.zeros(8 // width, dtype)})
    with pytest.raises(
        TypeError, match=rf"mask: expected a C-contiguous array of {np.dtype(dtype)} \(got .*{np.dtype(other)}"
    ):
        loaded.launch((1, 1, 1), 128, arguments | {"mask": cp.zeros(8 // width, other)})
