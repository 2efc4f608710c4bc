"""Structs that kernels of the stand-in for CuPy take by value: the pointers in them reach as far as their arrays do."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("this is the real CuPy", allow_module_level=True)

from cupy import _memory, emulator  # noqa: E402
from cupy._raw import EmulationError  # noqa: E402
from cupy.cuda.function import CNumpyArray, CPointer  # noqa: E402

TEXT = """
struct Bundle {
    double eps;
    double* x;       // or null
    long long n;
    const double* y;
};
extern "C" __global__ void example(Bundle bundle, double* plain) {
    if (bundle.x) bundle.x[bundle.n] = bundle.eps;
    if (plain) plain[bundle.n] = bundle.eps;
}
"""


def by_value(code, *fields):
    """A struct of some fields, as the launcher hands it to a kernel; `code` is theirs in the module `struct`."""
    data = struct.pack(f"={code}", *fields)
    return np.frombuffer(data, np.dtype((np.void, len(data))))


def write(where, index, *, plain=False, y=0):
    """Write an element of an array, or at an address, given in a struct or as an argument of its own."""
    ptr = getattr(where, "data", where)
    ptr = getattr(ptr, "ptr", ptr)
    bundle = by_value("dQqQ", 0.5, 0 if plain else ptr, index, y)
    cupy.RawKernel(TEXT, "example")((1,), (1,), (bundle, where if plain else None))


@pytest.fixture
def memory():
    return cupy.zeros(16)


VIEWS = {
    "all of it": (slice(None), [0, 15], [-1, 16]),
    "the middle": (slice(4, 8), [0, 3], [-1, 4, -4, 11]),
    "the end": (slice(12, 16), [0, 3], [-1, -12, 4]),
    "every third": (slice(2, 12, 3), [0, 9], [-1, 10]),
    "backwards": (slice(9, 3, -1), [0, -5], [1, -6]),
}


@pytest.mark.parametrize("plain", [True, False], ids=["argument", "field"])
@pytest.mark.parametrize(("key", "inside", "outside"), VIEWS.values(), ids=VIEWS)
def test_a_view_ends_where_it_ends(memory, key, inside, outside, plain):
    """Accesses beyond a view are out of bounds, though the same array has memory before it and after it."""
    view = memory[key]
    for index in inside:
        write(view, index, plain=plain)
    assert (memory.get() == 0.5).sum() == len(inside)
    for index in outside:
        with pytest.raises(EmulationError, match=r"example: out of bounds: 8 bytes written .* argument"):
            write(view, index, plain=plain)
    assert (memory.get() == 0.5).sum() == len(inside)


def test_arrays_that_begin_at_one_address_are_one(memory):
    long, short = memory[4:12], memory[4:6]
    write(short, 7)  # the address is that of the long one, too
    with pytest.raises(EmulationError, match="out of bounds"):
        write(short, 8)
    del long
    with pytest.raises(EmulationError, match="out of bounds"):
        write(short, 7)


def test_an_address_of_no_array_reaches_as_far_as_memory_does(memory):
    ptr = memory.data.ptr + 8 * 5
    for index in (-5, 0, 10):
        write(ptr, index)
    for index in (-6, 11):
        with pytest.raises(EmulationError, match="out of bounds"):
            write(ptr, index)


def test_a_field_that_is_another_array_is_no_excuse(memory):
    """Every pointer of a struct has an end of its own."""
    x, y = memory[1:4], memory[8:]
    write(x, 7, y=y.data.ptr)  # the first element of y
    with pytest.raises(EmulationError, match="out of bounds"):
        write(x, 6, y=y.data.ptr)


def test_a_struct_may_end_in_part_of_a_word():
    text = """#pragma pack(1)
        struct Odd { double* x; int n; };
        #pragma pack()
        extern "C" __global__ void example(Odd odd) { odd.x[odd.n] = 3; }
    """
    kernel = cupy.RawKernel(text, "example")
    x = cupy.zeros(3)
    kernel((1,), (1,), (by_value("Qi", x.data.ptr, 2),))
    assert x.tolist() == [0, 0, 3]


def test_nothing_is_kept_of_arrays_that_are_gone(memory):
    views = [memory[i:] for i in range(16)]
    views += [memory.reshape(4, 4), memory[None]]
    assert len(memory._allocation.arrays) == 1 + len(views)
    del views
    assert len(memory._allocation.arrays) == 1


def test_a_pointer_to_another_device():
    with emulator.pretend(emulator.H200, emulator.H200):
        with cupy.cuda.Device(1):
            x = cupy.zeros(4)
        with pytest.raises(ValueError, match=r"argument 0: expected a pointer on device 0 \(got one on 1\)"):
            write(x, 0)


def test_numbers_are_no_addresses(memory):
    """Doubles, counts and strides are far from where memory lies."""
    for number in (0, 1, -1 % 2**64, 2**31, 2**40, *np.array([0.1, 1e-5, -3e9, np.nan, np.inf]).view(np.uint64)):
        assert _memory.find(int(number)) is None
    assert _memory.find(memory.data.ptr + 8) is memory._allocation
    assert _memory.find(memory.data.ptr + memory.nbytes) is not memory._allocation


@pytest.mark.parametrize("size", [0, 2])
def test_arrays_of_other_sizes_are_refused(size):
    """CuPy passes arrays of one element alone by value."""
    with pytest.raises(TypeError, match="unsupported type"):
        cupy.RawKernel(TEXT, "example")((1,), (1,), (np.zeros(size, "V32"), None))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that a program has wrapped itself


def wrapped(code, *fields):
    """A struct in memory that may be written to, and the same memory as CuPy takes arguments."""
    memory = bytearray(struct.pack(f"={code}", *fields))
    return memory, CNumpyArray(np.frombuffer(memory, np.dtype((np.void, len(memory)))))


def test_what_is_wrapped_is_read_at_the_launch(memory):
    """A wrapper is made once; each launch sees what its memory holds then."""
    written, bundle = wrapped("dQqQ", 0.5, memory.data.ptr, 3, 0)
    kernel = cupy.RawKernel(TEXT, "example")
    kernel((1,), (1,), (bundle, None))
    struct.pack_into("=dQq", written, 0, 1.5, memory.data.ptr + 8, 7)
    kernel((1,), (1,), (bundle, None))
    assert {i: x for i, x in enumerate(memory.tolist()) if x} == {3: 0.5, 8: 1.5}
    assert isinstance(bundle, CPointer)


def test_a_captured_launch_keeps_what_it_was_given(memory):
    written, bundle = wrapped("dQqQ", 0.5, memory.data.ptr, 3, 0)
    kernel = cupy.RawKernel(TEXT, "example")
    kernel.compile()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        kernel((1,), (1,), (bundle, None))
        graph = stream.end_capture()
    struct.pack_into("=d", written, 0, 1.5)
    graph.launch(stream)
    assert memory.tolist()[3] == 0.5


def test_pointers_and_numbers_may_be_wrapped():
    """Whatever a parameter is, its bytes are taken from the memory."""
    text = """extern "C" __global__ void example(double* x, long long n, double value) { x[n] = value; }"""
    x = cupy.zeros(4)
    arguments = [wrapped(code, value)[1] for code, value in (("Q", x.data.ptr), ("q", 2), ("d", 0.25))]
    cupy.RawKernel(text, "example")((1,), (1,), tuple(arguments))
    assert x.tolist() == [0, 0, 0.25, 0]


def test_pointers_that_are_wrapped_end_where_arrays_do(memory):
    _, bundle = wrapped("dQqQ", 0.5, memory[4:8].data.ptr, 4, 0)
    views = memory[4:8]
    with pytest.raises(EmulationError, match="out of bounds"):
        cupy.RawKernel(TEXT, "example")((1,), (1,), (bundle, None))
    assert views.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("code", "fields"), [("dQq", (0.5, 0, 1)), ("dQqQQ", (0.5, 0, 1, 0, 0))], ids=["short", "long"]
)
def test_as_many_bytes_as_the_parameter_has(code, fields):
    """CuPy would read beyond them, or pass a part."""
    with pytest.raises(
        TypeError, match=rf"expected a struct of 32 bytes \(got a struct of {8 * len(fields)} bytes from CN"
    ):
        cupy.RawKernel(TEXT, "example")((1,), (1,), (wrapped(code, *fields)[1], None))


def test_a_wrapped_pointer_to_another_device():
    with emulator.pretend(emulator.H200, emulator.H200):
        with cupy.cuda.Device(1):
            x = cupy.zeros(4)
        _, bundle = wrapped("dQqQ", 0.5, x.data.ptr, 0, 0)
        with pytest.raises(ValueError, match=r"argument 0: expected a pointer on device 0 \(got one on 1\)"):
            cupy.RawKernel(TEXT, "example")((1,), (1,), (bundle, None))


@pytest.mark.parametrize("value", [bytes(32), 3, None, "x"], ids=repr)
def test_nothing_but_arrays_is_wrapped(value):
    with pytest.raises(AttributeError, match="__array_interface__"):
        CNumpyArray(value)
