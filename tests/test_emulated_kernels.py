"""What the stand-in for CuPy does with kernels: right ones run, each kind of wrong ones is found in its place."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cupybn._steps import launcher, sources
from cupybn._steps.bundles import Moments
from cupybn._steps.geometry import ChannelsFirst

if importlib.util.find_spec("cupy") is None:
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
cupy = pytest.importorskip("cupy")
if not hasattr(cupy, "emulator"):
    pytest.skip("this is the real CuPy", allow_module_level=True)

from cupy import emulator  # noqa: E402
from cupy._compiler import CompileException  # noqa: E402
from cupy._raw import EmulationError  # noqa: E402

SEEDS = range(6)
CUDADriverError = cupy.cuda.driver.CUDADriverError
INVALID_VALUE, NOT_FOUND = 1, 500


def make(parameters, body, before="", bounds="", options=()):
    """A kernel; the first line of the body is line 2 of its file, if there is nothing before it."""
    declaration = f'extern "C" __global__ void {bounds} example({parameters})'
    text = f'#line 1 "kernels/example.cu"\n{before}{declaration} {{\n{body}\n}}\n'
    return cupy.RawKernel(text, "example", options)


@contextlib.contextmanager
def refused(status, detail=""):
    """Inside the block, the driver is to report this error, for this reason."""
    with pytest.raises(CUDADriverError) as error:
        yield
    assert error.value.status == status
    assert re.search(detail, str(error.value.__cause__))


def launch(kernel, *args, grid=1, block=32, shared_mem=0):
    dims = [(size,) if isinstance(size, int) else size for size in (grid, block)]
    kernel(*dims, args, shared_mem=shared_mem)


def lines_here(kernel):
    """The numbers of the lines that say "here"."""
    lines = kernel.code[kernel.code.rindex("#line") :].splitlines()
    return [number for number, line in enumerate(lines) if "// here" in line]


def fails(kernel, *args, match, **dims):
    """The launch is reported, at the line that says "here"."""
    lines = lines_here(kernel)
    with pytest.raises(EmulationError, match=match) as caught:
        launch(kernel, *args, **dims)
    for line in lines:
        assert re.search(rf"kernels/example\.cu:{line}\b", str(caught.value)), caught.value
    assert lines


@pytest.fixture
def seeds(monkeypatch):
    """The seeds, each of which is in force while it is handed out."""

    def every():
        for seed in SEEDS:
            monkeypatch.setattr(emulator, "seed", seed)
            yield seed

    return every


def numbers(n, dtype=np.float32):
    return cupy.asarray(np.arange(1, n + 1).astype(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Races

EXCHANGE = """
    __shared__ float x[64];
    x[threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = in[threadIdx.x]; %(here_write)s
    __syncthreads();
    out[threadIdx.x] = x[63 - threadIdx.x]; %(here_read)s
"""


def exchange(barrier):
    text = EXCHANGE % {"here_write": "", "here_read": ""}
    first, second, third = text.split("__syncthreads();")
    return make("const float* in, float* out", f"{first}__syncthreads();{second}{barrier}{third}")


def test_a_missing_barrier_is_a_race_in_every_order(seeds):
    x, out = numbers(64), cupy.empty(64, np.float32)
    for _ in seeds():
        launch(exchange("__syncthreads();"), x, out, block=64)
        np.testing.assert_array_equal(out.get(), x.get()[::-1])
        with pytest.raises(EmulationError, match=r"race on shared memory: .* at kernels/example\.cu:(6|8)\b"):
            launch(exchange(""), x, out, block=64)
        with pytest.raises(EmulationError, match=r"race on shared memory"):  # of warps with each other
            launch(exchange("__syncwarp();"), x, out, block=64)


def test_without_a_barrier_shared_memory_is_uninitialised_or_raced_for(seeds):
    kernel = make("float* out", "__shared__ int x[32];\nx[threadIdx.x] = 1;\nout[threadIdx.x] = x[31 - threadIdx.x];")
    for _ in seeds():
        with pytest.raises(EmulationError, match=r"race on shared|uninitialised: 4 bytes of shared"):
            launch(kernel, cupy.empty(32, np.float32))


def test_a_second_round_needs_a_barrier_before_it(seeds):
    body = """
    __shared__ int x[64];
    for (int i = 0; i < 2; i++) {
        x[threadIdx.x] = i;
        __syncthreads();
        out[threadIdx.x] = x[63 - threadIdx.x];
        BARRIER
    }"""
    for _ in seeds():
        out = cupy.empty(64, np.int32)
        launch(make("int* out", body.replace("BARRIER", "__syncthreads();")), out, block=64)
        assert (out.get() == 1).all()
        with pytest.raises(EmulationError, match="race on shared memory"):
            launch(make("int* out", body.replace("BARRIER", "")), out, block=64)


def test_the_lanes_of_a_warp_need_a_barrier_too(seeds):
    body = """
    __shared__ int x[64];
    x[threadIdx.x] = 0;
    __syncwarp();
    x[threadIdx.x] = threadIdx.x;
    BARRIER
    out[threadIdx.x] = x[threadIdx.x ^ 1];"""
    for _ in seeds():
        for barrier in "__syncwarp();", "__syncthreads();", "__shfl_xor_sync(~0u, 1, 1);", "__ballot_sync(~0u, 1);":
            out = cupy.empty(64, np.int32)
            launch(make("int* out", body.replace("BARRIER", barrier)), out, block=64)
            np.testing.assert_array_equal(out.get(), np.arange(64) ^ 1)
        with pytest.raises(EmulationError, match=r"race on shared memory.*example\.cu:(6|8)\b"):
            launch(make("int* out", body.replace("BARRIER", "")), out, block=64)


PARTS_OF_WARPS = """
    const bool upper = threadIdx.x >= 16;
    if (threadIdx.x == 0) *out = 0;
    __syncwarp();
    if (WRITES_EARLY) *out = 1;
    if (!upper) for (int i = 0; i < 3; i++) __syncwarp(0x0000ffff);
    BARRIER
    if (READS) out[1] = *out;"""


@pytest.mark.parametrize(("writer", "reader"), [(0, 20), (20, 0)])
def test_barriers_of_parts_of_a_warp_order_these_parts_alone(seeds, writer, reader):
    body = PARTS_OF_WARPS.replace("WRITES_EARLY", f"threadIdx.x == {writer}").replace(
        "READS", f"threadIdx.x == {reader}"
    )
    for _ in seeds():
        out = cupy.empty(2, np.int32)
        launch(make("int* out", body.replace("BARRIER", "__syncwarp();")), out)
        assert out[1].get() == 1
        with pytest.raises(EmulationError, match="race on argument 0"):
            launch(make("int* out", body.replace("BARRIER", "")), out)


def test_what_one_lane_knows_of_another_it_tells_a_third():
    body = """
    if (threadIdx.x == 0) *out = 7;
    if (threadIdx.x < 2) __syncwarp(3);
    if (1 <= threadIdx.x && threadIdx.x < 3) __syncwarp(6);
    if (threadIdx.x == READER) out[1] = *out;"""
    launch(make("int* out", body.replace("READER", "2")), cupy.empty(2, np.int32))
    with pytest.raises(EmulationError, match=r"race on argument 0: .* at kernels/example\.cu:[36]$"):
        launch(make("int* out", body.replace("READER", "3")), numbers(2, np.int32))


@pytest.mark.parametrize("dims", [{"grid": 2, "block": 1}, {"grid": 1, "block": 64}, {"grid": 1, "block": 2}])
@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("*p = 1; // here", "writes what .* has written"),
        ("if (blockIdx.x + threadIdx.x == 0) *p = 1; else out[threadIdx.x] = *p; // here", "(reads|writes) what"),
    ],
)
def test_races_on_global_memory(seeds, dims, body, match):
    for _ in seeds():
        out = cupy.empty(64, np.int32)
        fails(make("int* p, int* out", body), numbers(1, np.int32), out, **dims, match=f"race on argument 0: .*{match}")


def test_a_barrier_does_not_order_blocks(seeds):
    kernel = make("int* p, int* out", "if (blockIdx.x == 0) *p = 1;\n__syncthreads();\nout[blockIdx.x] = *p; // here")
    launch(kernel, numbers(1, np.int32), cupy.empty(1, np.int32), block=1)
    for _ in seeds():
        with pytest.raises(EmulationError, match="race on argument 0"):
            launch(kernel, numbers(1, np.int32), cupy.empty(2, np.int32), block=1, grid=2)


def test_a_read_by_another_block_is_not_forgotten(seeds):
    body = """
    out[blockIdx.x * 32 + threadIdx.x] = *p;
    __syncthreads();
    if (blockIdx.x == 1 && threadIdx.x == 0) *p = 1;"""
    kernel = make("int* p, int* out", body)
    for _ in seeds():
        with pytest.raises(EmulationError, match="race on argument 0"):
            launch(kernel, numbers(1, np.int32), cupy.empty(64, np.int32), grid=2)


def test_atomics_race_with_all_but_atomics():
    sums = cupy.zeros(1, np.int32)
    launch(make("int* sum", "atomicAdd(sum, (int)threadIdx.x);"), sums, grid=3, block=64)
    assert sums.get() == 3 * 63 * 32
    body = "atomicAdd(sum, 1);\nif (threadIdx.x == 0) out[0] = *sum;"
    with pytest.raises(EmulationError, match="race on argument 0"):
        launch(make("int* sum, int* out", body), sums, cupy.empty(1, np.int32))
    launch(make("int* sum, int* out", body.replace("\n", "__syncthreads();")), sums, cupy.empty(1, np.int32))


def test_no_false_alarms(seeds):
    halves = make(
        "unsigned short* out, const unsigned short* in",
        "const int i = blockIdx.x * blockDim.x + threadIdx.x;\nout[i] = in[i] + 1;",
    )
    bytes_ = make(
        "unsigned char* out", "__shared__ bool b[33];\nb[threadIdx.x] = 1;\nout[threadIdx.x] = b[threadIdx.x];"
    )
    for _ in seeds():
        x = numbers(99, np.uint16)
        launch(halves, x, x, grid=3, block=33)  # in place
        np.testing.assert_array_equal(x.get(), np.arange(2, 101))
        both = cupy.empty(128, np.uint16)  # two arrays in one allocation
        both[:64] = 5
        launch(halves, both[64:], both[:64], grid=2)
        np.testing.assert_array_equal(both[64:].get(), 6)
        odd = cupy.zeros(65, np.uint16)[1:]  # no multiple of 4
        launch(halves, odd, odd, grid=2)
        launch(bytes_, cupy.empty(33, np.uint8), block=33)


def test_wide_and_narrow_accesses_of_the_same_memory(seeds):
    body = """
    reinterpret_cast<uint4*>(p)[threadIdx.x] = make_uint4(1, 2, 3, 4);
    BARRIER
    reinterpret_cast<unsigned short*>(p)[threadIdx.x + 32] += 1;"""
    for _ in seeds():
        x = cupy.empty(4 * 32, np.uint32)
        launch(make("unsigned* p", body.replace("BARRIER", "__syncwarp();")), x)
        expected = np.tile(np.arange(1, 5, dtype=np.uint32), 32)
        expected.view(np.uint16)[32:64] += 1
        np.testing.assert_array_equal(x.get(), expected)
        with pytest.raises(EmulationError, match="race on argument 0"):
            launch(make("unsigned* p", body.replace("BARRIER", "")), x)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds and alignment


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("out[threadIdx.x] = in[threadIdx.x + 1];", r"4 bytes read \(4 bytes past the end of argument 1\)"),
        ("out[threadIdx.x + 1] = 0;", r"4 bytes written \(4 bytes past the end of argument 0\)"),
        ("out[threadIdx.x] = in[(int)threadIdx.x - 1];", r"4 bytes read \(4 bytes before the begin of argument 1\)"),
        ("out[(int)threadIdx.x - 2] = 0;", r"4 bytes written \([48] bytes before the begin of argument 0\)"),
        ("out[1 << 28] = 0;", "no argument is near"),
        ("*reinterpret_cast<double*>(out + 30 + threadIdx.x % 2 * 2) = 0;", "8 bytes written"),
    ],
)
def test_out_of_bounds(seeds, statement, match):
    kernel = make("float* out, const float* in", f"{statement} // here")
    for _ in seeds():
        fails(kernel, cupy.empty(32, np.float32), numbers(32), match=f"out of bounds: .*{match}.* in thread ")


def test_a_view_has_bounds_of_its_own():
    whole = numbers(96)
    kernel = make("float* p, int i", "if (threadIdx.x == 0) p[i] = 0; // here")
    for i in 0, 31:
        launch(kernel, whole[32:64], np.int32(i))
    for i in -1, 32, 63, -32:
        fails(kernel, whole[32:64], np.int32(i), match="out of bounds")
    copy = make("float* p, const float* q, int i", "if (threadIdx.x == 0) p[i] = q[i]; // here")
    fails(copy, whole[:32], whole[32:64], np.int32(32), match="out of bounds: 4 bytes (read|written)")
    fails(copy, whole[:32], whole[64:], np.int32(40), match="out of bounds: 4 bytes (read|written)")
    launch(copy, whole[:33], whole[32:64], np.int32(0))  # views that overlap are one piece


def test_shared_memory_has_bounds():
    dynamic = make("int i", "extern __shared__ float x[];\nif (threadIdx.x == 0) x[i] = 0; // here")
    launch(dynamic, np.int32(31), shared_mem=128)
    fails(dynamic, np.int32(32), shared_mem=128, match="out of bounds: 4 bytes written past the end of shared memory")
    fails(dynamic, np.int32(0), match="out of bounds")
    for i in -1, -100:
        fails(dynamic, np.int32(i), shared_mem=128, match="out of bounds")
    static = make("int i", "__shared__ float x[32], y[32];\nx[threadIdx.x] = y[threadIdx.x] = 0;\nx[i] = 1; // here")
    for i in 32, -1, 1000:
        fails(static, np.int32(i), block=1, match=f"out of bounds: index {i} of an array")


def test_static_and_dynamic_shared_memory_lie_side_by_side():
    body = """
    extern __shared__ double dynamic[];
    __shared__ float first[3], second[32];
    second[threadIdx.x] = dynamic[threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) first[0] = 0;
    out[threadIdx.x] = (float)dynamic[threadIdx.x] + second[threadIdx.x];"""
    out = cupy.empty(1, np.float32)
    launch(make("float* out", body), out, block=1, shared_mem=8)
    out = cupy.empty(32, np.float32)
    launch(
        make("float* out", body),
        out,
        shared_mem=256,
    )
    np.testing.assert_array_equal(out.get(), np.arange(32) * 2)
    with pytest.raises(EmulationError, match="out of bounds: 8 bytes written past the end of shared memory"):
        launch(make("float* out", body), out, shared_mem=255)


def test_how_much_shared_memory_there_is():
    static = make("", f"__shared__ char x[{48 << 10}];\nx[threadIdx.x] = 0;")
    launch(static)
    with refused(INVALID_VALUE, "bytes of shared memory in a block"):
        launch(make("", f"__shared__ char x[{(48 << 10) + 64}];\nx[threadIdx.x] = 0;"))
    dynamic = make("", "extern __shared__ char x[];\nx[threadIdx.x] = 0;")
    launch(dynamic, shared_mem=48 << 10)
    with refused(INVALID_VALUE, f"{(48 << 10) + 1} bytes of shared memory"):
        launch(dynamic, shared_mem=(48 << 10) + 1)
    dynamic.max_dynamic_shared_size_bytes = 227 << 10
    launch(dynamic, shared_mem=227 << 10)
    with refused(INVALID_VALUE):
        launch(dynamic, shared_mem=(227 << 10) + 1)
    with emulator.pretend(emulator.T4), refused(INVALID_VALUE):
        launch(dynamic, shared_mem=(64 << 10) + 1)
    with refused(INVALID_VALUE, "bytes of dynamic shared memory"):
        dynamic.max_dynamic_shared_size_bytes = (227 << 10) + 1
    assert dynamic.max_dynamic_shared_size_bytes == 227 << 10
    dynamic.max_dynamic_shared_size_bytes = 100
    launch(dynamic, shared_mem=100)
    with refused(INVALID_VALUE, "101 bytes of shared memory"):
        launch(dynamic, shared_mem=101)
    with pytest.raises(CompileException, match="one extern __shared__ array"):
        launch(make("", "extern __shared__ char x[];\nextern __shared__ int y[];"))


def test_static_and_dynamic_shared_memory_share_what_there_is():
    kernel = make("", "extern __shared__ char x[];\n__shared__ char y[4096];\nx[threadIdx.x] = y[threadIdx.x] = 0;")
    assert kernel.shared_size_bytes == 4096
    assert kernel.max_dynamic_shared_size_bytes == 44 << 10
    launch(kernel, shared_mem=44 << 10)

    def check(too_much, most):
        """48 KiB are there before a kernel asks for more; it may ask for what is left of a block's memory."""
        with refused(INVALID_VALUE, "bytes of shared memory in a block"):
            launch(kernel, shared_mem=(44 << 10) + 1)
        with refused(INVALID_VALUE, "bytes of dynamic shared memory"):
            kernel.max_dynamic_shared_size_bytes = too_much << 10
        kernel.max_dynamic_shared_size_bytes = most << 10
        launch(kernel, shared_mem=most << 10)

    check(227, 223)
    with emulator.pretend(emulator.H200, emulator.A100), cupy.cuda.Device(1):  # a device that knows nothing of it
        check(160, 159)


@pytest.mark.parametrize("vector", ["uint4", "float4"])
@pytest.mark.parametrize(
    "statement", ["*out = *reinterpret_cast<const V*>(p + i);", "*reinterpret_cast<V*>(p + i) = *out;"]
)
@pytest.mark.parametrize("memory", ["global", "shared"])
def test_vectors_must_be_aligned(vector, statement, memory):
    body = "\n".join(
        [
            f"typedef {vector} V;",
            "V value = {}, *out = &value;",
            "__shared__ __align__(16) float x[16];",
            "for (int k = 0; k < 16; k++) x[k] = 0;",
            "float* p = x;" if memory == "shared" else "float* p = q;",
            f"{statement} // here",
            "q[12] += (float)value.x;",
        ]
    )
    kernel = make("float* q, int i", body)
    for i in 0, 4, 12:
        launch(kernel, numbers(16), np.int32(i), block=1)
    for i in 1, 2, 3, 6:
        fails(kernel, numbers(16), np.int32(i), block=1, match="misaligned: address 0x[0-9a-f]* is no multiple of 16")
    fails(
        kernel, numbers(17)[1:], np.int32(4), block=1, match="misaligned|out of bounds"
    ) if memory == "global" else None


def test_scalars_must_be_aligned():
    kernel = make("char* p", "*reinterpret_cast<double*>(p + 4) = 0; // here")
    fails(kernel, cupy.empty(16, np.uint8), block=1, match="misaligned: .* no multiple of 8")


# ---------------------------------------------------------------------------------------------------------------------
# Memory that nobody wrote


def test_uninitialised_memory_is_not_read():
    copy = make("const float* in, float* out, int n", "const int i = threadIdx.x;\nif (i < n) out[i] = in[i]; // here")
    fails(
        copy,
        cupy.empty(32, np.float32),
        cupy.empty(32, np.float32),
        np.int32(32),
        match="uninitialised: 4 bytes of arg",
    )
    out = cupy.empty(32, np.float32)
    launch(copy, numbers(32), out, np.int32(20))
    np.testing.assert_array_equal(out[:20].get(), np.arange(1, 21))
    with pytest.raises(emulator.UninitialisedMemoryError, match="12 of 32"):
        out.get()
    fails(copy, out, cupy.empty(32, np.float32), np.int32(21), match="uninitialised: 4 bytes of argument 0")
    launch(copy, out, cupy.empty(32, np.float32), np.int32(20))
    wide = make("const char* in, unsigned* out", "*out = ((const uint4*)in)->w; // here")
    part = cupy.empty(16, np.uint8)
    part[:15] = 0
    fails(wide, part, cupy.empty(1, np.uint32), block=1, match="uninitialised")


@pytest.mark.parametrize("shared", ["__shared__ float x[32];", "extern __shared__ float x[];"])
@pytest.mark.parametrize("write", ["", "if (threadIdx.x != 3) x[threadIdx.x] = 1;", "x[threadIdx.x / 2 * 2 % 32] = 1;"])
def test_uninitialised_shared_memory_is_not_read(shared, write):
    body = f"{shared}\n{write}\nout[threadIdx.x] = x[threadIdx.x]; // here"
    body = body.replace("x[threadIdx.x / 2 * 2 % 32] = 1;", "if (threadIdx.x % 2) x[threadIdx.x] = 1;")
    kernel = make("float* out", body)
    fails(kernel, cupy.empty(32, np.float32), shared_mem=128, match="uninitialised: 4 bytes of shared memory")


def test_shared_memory_is_new_in_every_block_and_launch():
    body = "__shared__ int x;\nif (blockIdx.x == k && threadIdx.x == 0) x = 1;\n__syncthreads();\n*out = x; // here"
    launch(make("int* out, int k", body), cupy.empty(1, np.int32), np.int32(0), block=1)
    fails(make("int* out, int k", body), cupy.empty(1, np.int32), np.int32(1), block=1, match="uninitialised")
    with pytest.raises(EmulationError, match="uninitialised: 4 bytes of shared memory"):
        launch(make("int* out, int k", body), cupy.empty(1, np.int32), np.int32(0), block=1, grid=2)


def test_atomics_need_initialised_memory():
    fails(make("int* p", "atomicAdd(p, 1); // here"), cupy.empty(1, np.int32), match="uninitialised")
    fails(make("", "__shared__ int x;\natomicAdd(&x, 1); // here"), match="uninitialised")


# ---------------------------------------------------------------------------------------------------------------------
# Barriers that not all meet


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (
            "if (threadIdx.x < 16) __syncthreads(); // here\nelse __shfl_xor_sync(~0u, 1, 1); // here",
            "deadlock: of 32 threads of block .0, 0, 0., 16 wait in __sync.*, 16 wait in __shfl_xor_sync",
        ),
        (
            "if (threadIdx.x >= 20) return;\n__syncthreads(); // here",
            "deadlock: .* 20 wait in __syncthreads at .*, 12 have left",
        ),
        ("if (threadIdx.x < 5) __syncthreads(); // here", "deadlock: .* 5 wait in __syncthreads .*, 27 have left"),
        (
            "if (threadIdx.x % 2)\n  __syncthreads(); // here\nelse\n  __syncthreads(); // here",
            "different barriers: thread 0 waits at .*:5, thread 1 at .*:3",
        ),
        (
            "if (threadIdx.x % 2)\n  __shfl_sync(~0u, 1, 0); // here\nelse\n  __shfl_sync(~0u, 1, 0); // here",
            "lanes disagree: of mask ffffffff, one is in __shfl_sync",
        ),
        (
            "__shfl_xor_sync(threadIdx.x % 2 ? ~0u : ~0u - 1, 1, threadIdx.x ? 1 : 0); // here",
            "__shfl_xor_sync with mask fffffffe, which lacks lane 0|from lane 0, which is not in mask fffffffe",
        ),
        (
            "__syncwarp(threadIdx.x == 7 ? ~0u : ~0u - 1u * (threadIdx.x > 8)); // here",
            "deadlock: .* wait in __syncwarp",
        ),
        (
            "if (threadIdx.x < 16) __ballot_sync(0xfffe, 1); // here",
            "__ballot_sync with mask 0000fffe, which lacks lane 0",
        ),
        ("if (threadIdx.x < 16) __shfl_sync(0xffff, 1, 16); // here", "from lane 16, which is not in mask 0000ffff"),
        ("if (threadIdx.x < 16) __shfl_down_sync(0xffff, 1, 1); // here", "from lane 16, which is not in mask"),
        (
            "if (threadIdx.x == 31) return;\n__shfl_xor_sync(~0u, 1, 1); // here",
            "deadlock: .*31 wait .*, 1 have left",
        ),
        ("if (threadIdx.x == 31) return;\n__syncwarp(); // here", "deadlock: .*31 wait .*, 1 have left"),
        ("if (threadIdx.x < 8) __any_sync(~0u, 1); // here\nelse __all_sync(~0u, 1); // here", "lanes disagree"),
    ],
)
def test_barriers_that_not_all_meet(seeds, body, match):
    for _ in seeds():
        fails(make("", body), match=match)


def test_barriers_that_all_meet(seeds):
    body = """
    int x = threadIdx.x;
    if (x < 16) x = __shfl_xor_sync(0xffff, x, 1);
    __syncthreads();
    if (x % 2) __syncwarp(); else __syncwarp();
    if (x >= 16) for (int i = 0; i < 3; i++) x = __shfl_xor_sync(0xffff0000, x, 1);
    x = __shfl_xor_sync(~0u, x, 2);
    out[threadIdx.x] = __shfl_xor_sync(~0u, x, 16);"""
    for _ in seeds():
        out = cupy.empty(32, np.int32)
        launch(make("int* out", body), out)
        np.testing.assert_array_equal(out.get(), np.arange(32) ^ 1 ^ 2 ^ 16)


def test_shuffles_in_the_last_warp_of_a_block():
    body = "out[threadIdx.x] = __shfl_down_sync(~0u, (int)threadIdx.x, 1); // here"
    fails(
        make("int* out", body),
        cupy.empty(40, np.int32),
        block=40,
        match="from lane 8, which is not in mask|has no lane",
    )
    out = cupy.empty(40, np.int32)
    launch(make("int* out", body.replace("down", "xor")), out, block=40)
    np.testing.assert_array_equal(out.get(), np.arange(40) ^ 1)


def test_a_loop_without_end_ends():
    kernel = make("const int* flag", "while (!*(volatile const int*)flag) {} // here")
    launch(kernel, numbers(1, np.int32), block=1)
    fails(kernel, cupy.zeros(1, np.int32), block=1, match="endless loop")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("declared", "right", "wrong"),
    [
        ("double", [1.0, np.float64(1)], [np.float32(1), 1, np.int64(1), None]),
        ("float", [np.float32(1)], [1.0, 1, np.float64(1), np.float16(1), np.int32(1)]),
        ("long long", [1, np.int64(1), np.uint64(1)], [np.int32(1), True, 1.0, np.float64(1)]),
        ("int", [np.int32(1), np.uint32(1)], [1, np.int64(1), np.int16(1), np.float32(1)]),
        ("bool", [True, np.bool_(True)], [1, np.int32(1)]),
        ("float*", [lambda: numbers(4), None, lambda: numbers(4)[2:]], [1, 1.0, np.float32(1)]),
        ("float*", [], [lambda: numbers(4, np.float64), lambda: numbers(4, np.int32), lambda: numbers(4, np.float16)]),
        ("int*", [lambda: numbers(4, np.int32), lambda: numbers(4, np.uint32)], [lambda: numbers(4)]),
        ("void*", [lambda: numbers(4), lambda: numbers(4, np.uint8)], [1]),
        ("int", [], [lambda: numbers(1, np.int32), None]),
    ],
)
def test_arguments_have_the_types_that_are_declared(declared, right, wrong):
    kernel = make(f"{declared} x", "")
    for x in right:
        launch(kernel, x() if callable(x) else x)
    for x in wrong:
        with pytest.raises(TypeError, match=r"^example: argument 0: expected "):
            launch(kernel, x() if callable(x) else x)
    with pytest.raises(TypeError, match="example: argument 0: unsupported type"):
        launch(kernel, "text")


def test_arguments_must_be_as_many_as_are_declared():
    kernel = make("int x, float* y", "")
    for args in (), (np.int32(1),), (np.int32(1), None, None):
        with pytest.raises(TypeError, match=rf"example: expected 2 arguments \(got {len(args)}\)"):
            launch(kernel, *args)
    launch(kernel, np.int32(1), None)


def test_arrays_must_be_on_the_current_device():
    kernel = make("float* x", "*x = 1;")
    with emulator.pretend(emulator.H200, emulator.T4):
        with cupy.cuda.Device(1):
            x = cupy.zeros(1, np.float32)
            launch(kernel, x, block=1)
        with pytest.raises(ValueError, match=r"argument 0: expected an array on device 0 \(got one on 1\)"):
            launch(kernel, x, block=1)


def test_structs_by_value():
    before = "struct Pair { double* p; long long n; };\n"
    kernel = make("Pair pair, long long i", "pair.p[pair.n] = (double)i;", before)
    pair = np.dtype([("p", np.uint64), ("n", np.int64)])
    x = cupy.zeros(4)
    launch(kernel, np.array((x.data.ptr, 2), pair), 7, block=1)
    np.testing.assert_array_equal(x.get(), [0, 0, 7, 0])
    with pytest.raises(EmulationError, match=r"out of bounds: 8 bytes written \(8 bytes past the end of argument 0\)"):
        launch(kernel, np.array((x.data.ptr, 4), pair), 7, block=1)
    for wrong in np.zeros((), np.dtype([("p", np.uint64)])), np.zeros((), np.int64), 1, x:
        with pytest.raises(TypeError, match="argument 0: expected a struct of 16 bytes"):
            launch(kernel, wrong, 7, block=1)
    with pytest.raises(TypeError):
        launch(kernel, np.zeros(2, pair), 7, block=1)


def test_none_is_a_null_pointer():
    kernel = make("float* x, int* out", "out[threadIdx.x] = x == nullptr;\nif (out[0] == 5) *x = 1;")
    out = cupy.empty(1, np.int32)
    launch(kernel, None, out, block=1)
    assert out.get() == 1
    fails(make("float* x", "*x = 1; // here"), None, block=1, match="null pointer|out of bounds")
    fails(make("const float* x, float* y", "*y = x[3]; // here"), None, numbers(1), block=1, match="null|out of bounds")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("a * a", "integer overflow in a multiplication"),
        ("a + b", "integer overflow in an addition"),
        ("-a - b", "integer overflow in a subtraction"),
        ("a / (b - b)", "integer division by zero"),
        ("a % (b - b)", "integer division by zero"),
        ("a << (b / 1000000)", "shift out of bounds"),
    ],
)
def test_undefined_arithmetic(expression, match):
    a, b = np.int32(2**31 - 2), np.int32(2**31 - 1)
    body = f"*out = {expression}; // here"
    fails(make("int a, int b, int* out", body), a, b, cupy.empty(1, np.int32), block=1, match=match)
    wide = make("long long a, long long b, long long* out", "*out = a * 2 + b;")
    launch(wide, int(a), int(b), cupy.empty(1, np.int64), block=1)


def test_local_variables_that_nobody_set_hold_garbage():
    kernel = make("float* out, int n", "float sum;\nfor (int i = 0; i < n; i++) sum += 1;\n*out = sum;")
    out = cupy.zeros(1, np.float32)
    launch(kernel, out, np.int32(3), block=1)
    assert out.get()[0] != 3


TINY = 2.0**-1030  # subnormal in float64
OF_FLOAT32 = [  # expression, its operands a and b, and the result
    ("a + b", 2.0**-130, 0, 0),
    ("a * b", 2.0**-70, -(2.0**-70), -0.0),
    ("a / b", 2.0**-120, 2.0**20, 0),
    ("a - b", 2.0**-126, 1.5 * 2.0**-126, -0.0),
    ("a > b", 2.0**-130, 0, 0),
    ("sqrtf(a)", 2.0**-130, 0, 0),
    ("fmaf(a, b, 0.0f)", 2.0**-70, 2.0**-70, 0),
    ("(double)a * 1e300", 2.0**-130, 0, 0),
    ("a * b", 2.0**-63, 2.0**-63, 2.0**-126),
]
OF_FLOAT64 = [
    ("a + b", TINY, 0, TINY),
    ("a * b", 2.0**-500, -(2.0**-530), -TINY),
    ("a / b", 2.0**-1000, 2.0**30, TINY),
    ("a - b", 2.0**-1022, 1.5 * 2.0**-1022, -0.5 * 2.0**-1022),
    ("a > b", TINY, 0, 1),
    ("sqrt(a)", TINY, 0, 2.0**-515),
    ("fma(a, b, 0.0)", 2.0**-500, 2.0**-530, TINY),
    ("__float_as_uint((float)a)", 2.0**-140, 0, 0),
    ("(float)a * 1e30f", TINY, 0, 0),
    ("(float)a", -TINY, 0, -0.0),
]


@pytest.mark.parametrize(("name", "cases"), [("float", OF_FLOAT32), ("double", OF_FLOAT64)], ids=["float32", "float64"])
def test_subnormals_are_zeros_in_float32_alone(name, cases):
    body = "\n".join(f"out[{i}] = of{i}(x[{i}], y[{i}]);" for i in range(len(cases)))
    functions = "\n".join(
        f"__device__ __noinline__ double of{i}({name} a, {name} b) {{ return {expression}; }}"
        for i, (expression, *_) in enumerate(cases)
    )
    kernel = make(f"const {name}* x, const {name}* y, double* out", body, before=f"{functions}\n")
    x, y = (cupy.asarray([case[i] for case in cases], "f4" if name == "float" else "f8") for i in (1, 2))
    out = cupy.empty(len(cases), float)
    launch(kernel, x, y, out, block=1)
    assert list(map(float.hex, out.tolist())) == [float(case[3]).hex() for case in cases]
    assert np.float64(TINY) * 2 > 0  # the host is as it was


def test_many_subnormals():
    """Subnormal numbers stand among others, with registers and memory of all kinds in use."""
    body = """
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float f = x[i];
    double d = x[i];
    for (int k = 0; k < 3; k++) f *= 0x1p-20f, d *= 0x1p-20, d += 0x1p-1060;
    y[i] = f;
    z[i] = d;"""
    x = np.ldexp(np.random.default_rng(0).uniform(1, 2, 256), np.arange(256) % 128 - 126).astype(np.float32)
    y, z = cupy.empty(256, np.float32), cupy.empty(256, float)
    launch(make("const float* x, float* y, double* z", body), cupy.asarray(x), y, z, grid=2, block=128)
    f, d = x, x.astype(float)
    for _ in range(3):
        f, d = f * np.float32(2**-20), d * 2**-20 + 2.0**-1060
        f[np.abs(f) < 2.0**-126] = 0
    np.testing.assert_array_equal(y.get(), f)
    np.testing.assert_array_equal(z.get(), d)


def test_float32_is_not_fused_and_subnormals_are_zeros():
    out = cupy.empty(2, np.float32)
    x, y = np.float32(1 + 2**-12), np.float32(-(1 + 2**-11))
    launch(make("float x, float y, float* out", "out[0] = x * x + y;\nout[1] = x * 1e-39f;"), x, y, out, block=1)
    np.testing.assert_array_equal(out.get(), [0, 0])
    assert np.float32(1e-39) * x > 0  # the host is as it was


# ---------------------------------------------------------------------------------------------------------------------
# Traffic


@pytest.mark.parametrize("n", [1, 31, 32, 33, 127, 128, 1000])
def test_traffic_of_a_scalar_copy(n):
    body = """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = in[i];"""
    for dtype, name in (
        (np.uint8, "unsigned char"),
        (np.uint16, "unsigned short"),
        (np.float32, "float"),
        (float, "double"),
    ):
        x = cupy.asarray((np.arange(n) % 100).astype(dtype))
        y = cupy.empty(n, dtype)
        with emulator.record() as launches:
            launch(make(f"const {name}* in, {name}* out, int n", body), x, y, np.int32(n), grid=3)
        np.testing.assert_array_equal(x.get(), y.get())
        assert (launches[0].bytes_read, launches[0].bytes_written) == (x.nbytes, x.nbytes)


@pytest.mark.parametrize("n", [0, 3, 4, 64, 65, 127, 1001])
def test_traffic_of_a_vector_copy_with_a_tail(n):
    body = """
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i + 4 <= n)
        reinterpret_cast<float4*>(out)[i] = __ldg(reinterpret_cast<const float4*>(in) + i);
    else
        for (int k = 4 * i; k < n; k++) out[k] = in[k];"""
    x, y = numbers(n + 1), cupy.zeros(n + 1, np.float32)
    with emulator.record() as launches:
        launch(make("const float* in, float* out, int n", body), x, y, np.int32(n), grid=n // 128 + 1)
    assert (launches[0].bytes_read, launches[0].bytes_written) == (4 * n, 4 * n)
    np.testing.assert_array_equal(y.get(), [*range(1, n + 1), 0])


LOADS, STORES = ("__ldg", "__ldca", "__ldcg", "__ldcs", "__ldcv", "__ldlu"), ("__stcg", "__stcs", "__stwb", "__stwt")


@pytest.mark.parametrize("vector", ["uint4", "float4", "uint2", "float", "unsigned short"])
def test_traffic_of_loads_and_stores_with_hints(vector):
    x, width = numbers(64), {"uint4": 16, "float4": 16, "uint2": 8, "float": 4, "unsigned short": 2}[vector]
    member = ".x" if width > 4 else ""
    for load in LOADS:  # as wide as they are, even if little is used
        with emulator.record() as launches:
            kernel = make(
                "const float* in, float* out", f"out[threadIdx.x] = (float){load}((const {vector}*)in){member};"
            )
            launch(kernel, x, cupy.empty(2, np.float32), block=2)
        assert (launches[0].bytes_read, launches[0].bytes_written) == (2 * width, 8)
    for store in STORES:
        out = cupy.empty(64, np.float32)
        body = f"typedef {vector} V;\n{store}((V*)out + threadIdx.x, ((const V*)in)[threadIdx.x]);"
        with emulator.record() as launches:
            launch(make("const float* in, float* out", body), x, out, block=4)
        assert (launches[0].bytes_read, launches[0].bytes_written) == (4 * width, 4 * width)
        np.testing.assert_array_equal(out[:width].get(), x[:width].get())


@pytest.mark.parametrize(
    "statement", ["*(uint4*)q = __ldcs((const uint4*)(p + i));", "__stcs((uint4*)(p + i), *(const uint4*)q);"]
)
def test_loads_and_stores_with_hints_are_watched(statement):
    kernel = make("unsigned* p, unsigned* q, int i", f"{statement} // here")
    p, q, nobody_wrote = numbers(8, np.uint32), numbers(4, np.uint32), cupy.empty(4, np.uint32)
    launch(kernel, p, q, np.int32(4), block=1)
    fails(kernel, p, q, np.int32(2), block=1, match=r"misaligned: .* no multiple of 16")
    fails(kernel, p, q, np.int32(8), block=1, match="out of bounds: 16 bytes (read|written)")
    source = (nobody_wrote, q) if "ldcs" in statement else (p, nobody_wrote)
    fails(kernel, *source, np.int32(0), block=1, match="uninitialised: 16 bytes of argument")


def test_traffic_of_the_kernel_alone():
    body = """
    __shared__ double x[32];
    x[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < 32; i++) sum += x[i];
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (threadIdx.x == 0) atomicAdd(out, (int)sum);"""
    out = cupy.zeros(1, np.int32)
    with emulator.record() as launches:
        launch(make("const double* in, int* out", body), numbers(32, np.float64), out)
    assert (launches[0].bytes_read, launches[0].bytes_written) == (32 * 8 + 4, 4)
    assert out.get() == 32 * 33 * 16


# ---------------------------------------------------------------------------------------------------------------------
# What CUDA has


def lanes(body, n=64, dtype=np.int32):
    """What each thread of two warps puts in `result`."""
    out = cupy.empty(n, dtype)
    name = {np.int32: "int", np.float64: "double", np.uint32: "unsigned"}[dtype]
    launch(make(f"{name}* out", f"const int i = threadIdx.x;\n{name} {body}\nout[i] = result;"), out, block=n)
    return out.get()


def test_shuffles(seeds):
    body = """
    const int i = threadIdx.x;
    out[i] = __shfl_sync(~0u, i, k, width);
    out[64 + i] = __shfl_down_sync(~0u, i, k, width);
    out[128 + i] = __shfl_up_sync(~0u, i, k, width);
    out[192 + i] = __shfl_xor_sync(~0u, i, k, width);
    out[256 + i] = (int)(7 * __shfl_xor_sync(~0u, i / 7.0, k) + 0.5);"""
    kernel, i = make("int* out, int k, int width", body), np.arange(64)
    for _ in seeds():
        for width in 1, 2, 8, 32:
            for k in 0, 1, 3, 7, 16, 31:
                out = cupy.empty((5, 64), np.int32)
                launch(kernel, out, np.int32(k), np.int32(width), block=64)
                idx, down, up, xor, of_doubles = out.get()
                np.testing.assert_array_equal(idx, i // width * width + k % width)
                np.testing.assert_array_equal(down, np.where(i % width + k < width, i + k, i))
                np.testing.assert_array_equal(up, np.where(i % width >= k, i - k, i))
                np.testing.assert_array_equal(xor, np.where((i ^ k) // width <= i // width, i ^ k, i))
                np.testing.assert_array_equal(of_doubles, i ^ k)


def test_votes(seeds):
    i = np.arange(64)
    for _ in seeds():
        ballot = lanes("result = __ballot_sync(~0u, i % 3 == 0);", dtype=np.uint32)
        for warp in 0, 1:
            bits = sum(1 << lane for lane in range(32) if (32 * warp + lane) % 3 == 0)
            np.testing.assert_array_equal(ballot[32 * warp : 32 * warp + 32], bits)
        np.testing.assert_array_equal(lanes("result = __any_sync(~0u, i == 40);"), i >= 32)
        np.testing.assert_array_equal(lanes("result = __all_sync(~0u, i != 40);"), i < 32)
        half = lanes("result = 9; if (i % 32 < 4) result = __ballot_sync(0xf, i % 2);")
        np.testing.assert_array_equal(half, np.where(i % 32 < 4, 0b1010, 9))
        np.testing.assert_array_equal(
            lanes("result = __ballot_sync(~0u, 1);", 40, np.uint32)[[31, 32]], [2**32 - 1, 255]
        )
        np.testing.assert_array_equal(lanes("result = __syncthreads_count(i % 4 == 0);"), 16)
        np.testing.assert_array_equal(lanes("result = __syncthreads_and(i < 64) + 10 * __syncthreads_and(i < 63);"), 1)
        np.testing.assert_array_equal(lanes("result = __syncthreads_or(i > 64) + 10 * __syncthreads_or(i > 62);"), 10)


def test_indices_in_three_dimensions(seeds):
    body = """
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = ((threadIdx.z * 10 + threadIdx.y) * 10 + threadIdx.x) +
        1000 * ((blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x);"""
    kernel = make("int* out", body)
    for _ in seeds():
        for grid, block in ((2, 3, 4), (5, 2, 3)), ((3, 1, 2), (7, 3)), ((4,), (2, 2, 2)), ((2, 3), (33,)):
            out = cupy.empty(int(np.prod(grid) * np.prod(block)), np.int32)
            launch(kernel, out, grid=grid, block=block)
            (tx, ty, tz), (bx, by, bz) = (*block, 1, 1)[:3], (*grid, 1, 1)[:3]
            z, y, x = np.indices((tz, ty, tx)).reshape(3, 1, -1)
            w, v, u = np.indices((bz, by, bx)).reshape(3, -1, 1)
            expected = (z * 10 + y) * 10 + x + 1000 * ((w * 10 + v) * 10 + u)
            np.testing.assert_array_equal(out.get(), expected.ravel())


def test_a_warp_is_made_of_neighbours_in_x_first():
    out = cupy.empty(64, np.int32)
    body = "const int i = threadIdx.y * 16 + threadIdx.x;\nout[i] = __shfl_sync(~0u, i, 0);"
    launch(make("int* out", body), out, block=(16, 4))
    np.testing.assert_array_equal(out.get(), np.repeat([0, 32], 32))


def test_intrinsics():
    body = """
    out[0] = __float_as_uint(-2.5f) == 0xc0200000u && __uint_as_float(0x3fc00000u) == 1.5f;
    out[1] = __float_as_int(-0.0f) == (int)0x80000000 && __int_as_float(0x40000000) == 2;
    out[2] = __hiloint2double(__double2hiint(x), __double2loint(x)) == x;
    out[3] = __longlong_as_double(__double_as_longlong(x)) == x;
    out[4] = __fmul_rn(1.5f, 3) == 4.5f && __fadd_rn(1, 2) == 3 && __fdiv_rn(1, 4) == 0.25f && __fsqrt_rn(9) == 3;
    out[5] = __dmul_rn(1.5, 3) == 4.5 && __dadd_rn(1, 2) == 3 && rsqrt(4.0) == 0.5 && rsqrtf(16) == 0.25f;
    out[6] = __popc(0xf0u) == 4 && __ffs(8) == 4 && __clz(1) == 31 && __clz(0) == 32;
    out[7] = min(2, 3) == 2 && max(2, 3) == 3 && max(-1.5, 2.0) == 2 && min(1.f, 2.f) == 1 && warpSize == 32;
    const uint4 u = make_uint4(1, 2, 3, 4);
    const float4 f = *reinterpret_cast<const float4*>(in);
    out[8] = u.x + u.y + u.z + u.w == 10 && f.x == 1 && f.w == 4 && sizeof(double4) == 32 && alignof(float4) == 16;
    out[9] = table[x > 0 ? 2 : 1] == 30 && isnan(x - x + __int_as_float(0x7fc00000)) && fma(2.0, 3.0, 1.0) == 7;"""
    out = cupy.empty(10, np.int32)
    constant = '__constant__ int table[] = {10, 20, 30};\n#line 1 "kernels/example.cu"\n'
    launch(make("int* out, double x, const float* in", body, constant), out, np.pi, numbers(4), block=1)
    np.testing.assert_array_equal(out.get(), 1)


def test_templates_and_device_functions_share_memory():
    before = """
    template <int N>
    __device__ __forceinline__ int rotated(int value) {
        __shared__ int x[N];
        x[threadIdx.x] = value;
        __syncthreads();
        const int result = x[(threadIdx.x + 1) % N];
        __syncthreads();
        return result;
    }
    """
    out = cupy.empty(64, np.int32)
    launch(make("int* out", "out[threadIdx.x] = rotated<64>(rotated<64>(threadIdx.x));", before), out, block=64, grid=1)
    np.testing.assert_array_equal(out.get(), (np.arange(64) + 2) % 64)


def test_large_grids_and_odd_blocks():
    body = "const int i = blockIdx.x * blockDim.x + threadIdx.x;\nif (i < n) out[i] = i;"
    for n, block in (200_000, 3), (100_003, 96), (5000, 1000), (1025, 1024):
        out = cupy.empty(n, np.int32)
        launch(make("int* out, int n", body), out, np.int32(n), block=block, grid=-(-n // block))
        np.testing.assert_array_equal(out.get(), np.arange(n))


@pytest.mark.parametrize(
    ("grid", "block"),
    [(1, 1025), ((1, 65536), 1), ((1, 1, 65536), 1), (2**31, 1), (1, (1, 1, 65)), (1, (32, 33))],
)
def test_limits_of_grids_and_blocks(grid, block):
    with refused(INVALID_VALUE, "grid|block"):
        launch(make("", ""), grid=grid, block=block)


def test_sizes_as_cupy_passes_them_on():
    """CuPy takes 0 and less for 1, forgets a fourth size, and accepts tuples alone."""
    kernel = make("", "")
    with emulator.record() as launches:
        launch(kernel, grid=(0, -3), block=(2, 0, 1, 7))
    assert launches[0][1:3] == ((1, 1, 1), (2, 1, 1))
    for grid, block in ([1], (1,)), ((1,), [1]):
        with pytest.raises(TypeError, match="expected tuple"):
            kernel(grid, block, ())
    with pytest.raises(TypeError, match="expected tuple"):
        cupy.RawKernel("", "example", ["-DVALUE=7"])
    with pytest.raises(TypeError, match="expected tuple"):
        cupy.RawModule(code="", options=["-DVALUE=7"])


def test_grids_beyond_what_the_stand_in_counts():
    with pytest.raises(NotImplementedError, match="fewer than"):
        launch(make("", ""), grid=(2**20, 2**10), block=1)


# ---------------------------------------------------------------------------------------------------------------------
# The order of threads

ORDER = "const int i = blockIdx.x * blockDim.x + threadIdx.x;\nout[i] = atomicAdd(counter, 1);"


def order_of_threads(grid, block):
    counter, out = cupy.zeros(1, np.int32), cupy.empty(grid * block, np.int32)
    launch(make("int* out, int* counter", ORDER), out, counter, grid=grid, block=block)
    assert sorted(out.get()) == list(range(grid * block))
    return tuple(out.get())


@pytest.mark.parametrize(("grid", "block"), [(1, 32), (1, 256), (32, 1)])
def test_threads_and_blocks_run_in_an_order_that_the_seed_decides(seeds, grid, block):
    first = [order_of_threads(grid, block) for _ in seeds()]
    assert len(set(first)) == len(SEEDS)
    assert first == [order_of_threads(grid, block) for _ in seeds()]


def test_a_sum_in_a_fixed_order_has_the_same_bits_for_every_seed(seeds):
    body = """
    float sum = in[threadIdx.x];
    for (int i = 16; i > 0; i /= 2) sum += __shfl_down_sync(~0u, sum, i);
    __shared__ float x[8];
    if (threadIdx.x % 32 == 0) x[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < 8; i++) sum += x[i];
    out[threadIdx.x] = sum;"""
    values = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    sums = set()
    for _ in seeds():
        out = cupy.empty(256, np.float32)
        launch(make("const float* in, float* out", body), cupy.asarray(values), out, block=256)
        sums |= set(out.get().tolist())
    assert len(sums) == 1
    np.testing.assert_allclose(sums.pop(), values.sum(dtype=np.float64), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def test_launches_are_recorded():
    kernel = make("float* x", "*x = 1;")
    with emulator.record() as launches:
        launch(kernel, cupy.empty(1, np.float32), block=(1, 1), shared_mem=100)
        with pytest.raises(TypeError):
            launch(kernel, 1)
        with pytest.raises(EmulationError):
            launch(kernel, None, block=1)
    assert launches == [("example", (1, 1, 1), (1, 1, 1), 100, 0, 0, 0, 4, 1)]


def test_graphs_replay_launches():
    kernel, x = make("int* x", "x[threadIdx.x] += 1;"), cupy.zeros(32, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with emulator.record() as launches:
            launch(kernel, x)
            launch(kernel, x)
        graph = stream.end_capture()
    assert launches == []
    assert (x.get() == 0).all()
    with emulator.record() as launches:
        for _ in range(3):
            graph.launch(stream)
    assert len(launches) == 6
    assert (x.get() == 6).all()


def test_errors_of_the_compiler_name_the_place():
    kernel = make("float* x", "*x = 1;\n*x = nothing_of_this_name;")
    for _ in range(2):
        with pytest.raises(CompileException, match=r"kernels/example\.cu:3:.*nothing_of_this_name"):
            launch(kernel, None)


def test_kernels_are_found_by_their_names():
    code = make("", "").code + 'extern "C" __global__ void __launch_bounds__(64) other(float* x) { *x = 2; }\n'
    module = cupy.RawModule(code=code)
    x = cupy.empty(1, np.float32)
    module.get_function("other")((1,), (1,), (x,))
    assert x.get() == 2
    for get in lambda: module.get_function("another"), lambda: cupy.RawKernel(code, "another")((1,), (1,), ()):
        with refused(NOT_FOUND, "another"):
            get()


def test_options_are_macros():
    out = cupy.empty(1, np.int32)
    code = 'extern "C" __global__ void example(int* out) { *out = VALUE; }'
    cupy.RawKernel(code, "example", ("-DVALUE=7", "--std=c++17"))((1,), (1,), (out,))
    assert out.get() == 7
    with pytest.raises(CompileException, match="--unknown"):
        cupy.RawKernel(code, "example", ("--unknown",))((1,), (1,), (out,))


def test_after_an_error_all_is_well():
    bad = make(
        "float* x", "__shared__ int s[64];\ns[threadIdx.x] = 0;\nif (threadIdx.x == 5) x[99] = 0;\n__syncthreads();"
    )
    good = exchange("__syncthreads();")
    x = numbers(64)
    for _ in range(3):
        with pytest.raises(EmulationError, match="out of bounds"):
            launch(bad, x, block=64)
        out = cupy.empty(64, np.float32)
        launch(good, x, out, block=64)
        np.testing.assert_array_equal(out.get(), x.get()[::-1])


def test_threads_of_the_host_launch_at_once():
    kernel, errors = exchange("__syncthreads();"), []

    def work(k):
        try:
            for i in range(20):
                x, out = numbers(64) * (k + i), cupy.empty(64, np.float32)
                launch(kernel, x, out, block=64)
                np.testing.assert_array_equal(out.get(), np.arange(64, 0, -1) * (k + i))
                with pytest.raises(EmulationError):
                    launch(kernel, x, cupy.empty(63, np.float32), block=64)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# ---------------------------------------------------------------------------------------------------------------------
# Faults in a kernel of the library

N, C, L, WIDTH = 5, 3, 602, 2
PARTS, THREADS, TEAM = 2, 128, 64
"""Blocks have two teams, one of the last block is idle. Threads take eleven or twelve packs: a chunk and some more."""


def bn_stats(text, x):
    """Count, mean and m2 of each channel, in its parts."""
    macros = {"DATA_T": x.dtype, "WIDTH": WIDTH, "INDEX_BITS": 32, "THREADS": THREADS, "TEAM": TEAM}
    kernel = launcher.Kernel("channels_first/bn_stats", macros)
    kernel.raw = cupy.RawKernel(text, "bn_stats", kernel.options)
    moments = Moments(*(cupy.empty(shape) for shape in ((PARTS,), (PARTS, C), (PARTS, C))))
    sizes = ChannelsFirst(N, C, L, packs=-(-N * L // WIDTH // PARTS))
    arguments = {"x": cupy.asarray(x), "batches": None, "mask": None, "moments": moments, "sizes": sizes}
    kernel.launch((2, PARTS), THREADS, arguments)
    return [array.get() for array in moments[:3]]


def is_right(text):
    x = np.random.default_rng(0).standard_normal((N, C, L)).astype(np.float32) + 3
    count, mean, m2 = bn_stats(text, x)
    total = (count[:, None] * mean).sum(0) / count.sum()
    spread = (m2 + count[:, None] * (mean - total) ** 2).sum(0)
    wide = x.astype(np.float64)
    return (
        count.sum() == N * L
        and np.allclose(total, wide.mean((0, 2)), rtol=1e-6)
        and np.allclose(spread, wide.var((0, 2)) * N * L, rtol=1e-5)
    )


def source():
    return sources.source("channels_first/bn_stats")


def test_the_kernel_of_the_library_is_right(seeds):
    for _ in seeds():
        assert is_right(source())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("(double)((place.end - place.begin) * WIDTH)", "(double)((place.end - place.begin) * WIDTH + 1)"),
        ("(double)((place.end - place.begin) * WIDTH)", "(double)(place.end - place.begin)"),
        ("j >= row_packs", "j > row_packs"),
        ("wrap = (C - 1) * L", "wrap = C * L"),
        ("row_packs = L / WIDTH", "row_packs = L / WIDTH + 1"),
        ("row_packs = L / WIDTH", "row_packs = L / WIDTH - 1"),
        ("step * WIDTH", "step"),
        ("(place.end - first + TEAM - 1) / TEAM", "(place.end - first) / TEAM"),
        ("(place.end - first + TEAM - 1) / TEAM", "(place.end - first + TEAM) / TEAM"),
        ("(index_t)(sizes.N * sizes.L / WIDTH));", "(index_t)(sizes.N * sizes.L / WIDTH) - 1);"),
        ("begin + (index_t)sizes.packs", "begin + (index_t)sizes.packs + 1"),
        ("(n * C + (index_t)place.c) * L", "(n * C + (index_t)place.c + 1) * L"),
        ("* TEAMS + team()", "* TEAMS"),
        ("threadIdx.x % TEAM", "threadIdx.x"),
        ("distance = LANES / 2; distance > 0", "distance = LANES / 2; distance > 1"),
        ("team() * TEAM_WARPS + lane % TEAM_WARPS", "lane % TEAM_WARPS"),
        ("if (lane == 0)", ""),
        ("if (member() > 0 || place.idle) return;", "if (place.idle) return;"),
        ("if (member() > 0 || place.idle) return;", "if (member() > 0) return;"),
        ("__shfl_xor_sync(ALL_LANES, ", "__shfl_xor_sync(0xffffu, "),
        ("moments.mean[part * C + c] =", "moments.mean[part * C + c + 1] ="),
        ("moments.m2[part * C + c] = own.m2;", ""),
        ("else if (there(i)) sums[i % SUMS] += d[i]", "else sums[i % SUMS] += d[i]"),
        ("count * (chunk.base - pivot) + chunk.sum", "count * (chunk.base - pivot)"),
        ("(part - count * away)) * away + chunk.m2", "(part - count * away))"),
        ("squares - sum * off", "squares"),
        ("body(No(), i, packs - i)", "body(Yes(), i, AT_ONCE)"),
    ],
)
def test_seeded_faults_are_found(text, fault):
    assert text in source()
    try:
        right = is_right(source().replace(text, fault))
    except (EmulationError, emulator.UninitialisedMemoryError, RuntimeWarning):
        right = False  # it was stopped, or counted nothing, by which the check would divide
    assert not right


def test_a_missing_barrier_of_the_kernel_is_found(seeds):
    barrier = """            for (int k = 0; k < K; k++) of_warps[k][warp] = values[k];
        __syncthreads();
"""
    assert source().count(barrier) == 1
    text = source().replace(barrier, barrier.replace("__syncthreads();", ""))
    for _ in seeds():
        with pytest.raises(EmulationError, match=r"(race on|uninitialised: 8 bytes of) shared memory.* at kernels/"):
            is_right(text)
