"""The counter of `benchmarks/instructions` on small kernels whose results and counts are known."""

# Functions of a table all have the same parameters, whether they need them or not.
# ruff: noqa: ARG005

from __future__ import annotations

import numpy as np
import pytest

from tests.counting import require

require()

from contact.stages import ncu_work  # noqa: E402
from instructions import hardware, program, report  # noqa: E402
from instructions.cases import Arrays  # noqa: E402
from instructions.cost import count, measure, pipe  # noqa: E402
from instructions.lanes import UnknownInstruction  # noqa: E402
from instructions.launches import execute, pack  # noqa: E402
from instructions.memory import Space, WrongAccess  # noqa: E402

ADDRESS = 1 << 40
ARCHITECTURES = (75, 90, 120)


C_NAMES = {"float32": "float", "float64": "double", "int32": "int", "int64": "long long", "uint16": "unsigned short"}


class Run:
    """A launch of a kernel ``f(data, n0, n1, ...)`` with this body, where `data` is an array and the others are
    integers.

    Attributes
    ----------
    data
        The array as the kernel leaves it.
    """

    def __init__(self, body, data, *numbers, architecture=90, threads=32, blocks=1, cluster=1, head=""):
        clusters = f"__cluster_dims__({cluster}, 1, 1)" if cluster > 1 else ""
        parameters = "".join(f", int n{i}" for i in range(len(numbers)))
        parameters = f"{C_NAMES[data.dtype.name]}* data{parameters}"
        text = f'{head}\nextern "C" __global__ void {clusters} f({parameters}) {{\n{body}\n}}'
        self.program = program.compile_program(text, architecture)
        memory = data.copy().view(np.uint8)
        space = Space(memory, ADDRESS, np.ones(memory.size, np.uint8))
        arguments = pack([np.uint64(ADDRESS), *map(np.int32, numbers)])
        chosen = [(x, 0, 0) for x in range(blocks)]
        self.issued = execute(self.program, (blocks, 1, 1), threads, chosen, arguments, space)
        self.data = memory.view(data.dtype)

    def count(self, *beginnings):
        """How often instructions were issued whose opcode begins with one of these texts."""
        pairs = zip(self.program.instructions, self.issued, strict=True)
        return sum(int(n) for instruction, n in pairs if instruction.opcode.startswith(beginnings))


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_architecture
def test_a_loop_issues_its_body_once_a_trip(architecture):
    body = """
    float x = data[threadIdx.x];
    #pragma unroll 1
    for (int i = 0; i < n0; i++) x = x * x + 0.25f;
    data[threadIdx.x] = x;
    """
    x = np.linspace(0, 0.5, 64, dtype=np.float32)
    few, many = (Run(body, x, trips, architecture=architecture, threads=64) for trips in (3, 10))
    for _ in range(3):
        x = x * x + np.float32(0.25)
    np.testing.assert_allclose(few.data, x, rtol=1e-6)
    # Two warps: each issues an FFMA for each trip of the loop.
    assert (few.count("FFMA"), many.count("FFMA")) == (2 * 3, 2 * 10)
    each, rest = divmod(int(many.issued.sum() - few.issued.sum()), 2 * 7)
    assert rest == 0
    assert 4 <= each <= 6  # FFMA, the counter, the comparison, the branch


@every_architecture
@pytest.mark.parametrize("lanes", [0, 1, 31, 32])
def test_both_sides_of_a_branch_count_where_a_warp_diverges(architecture, lanes):
    body = """
    float x = data[threadIdx.x];
    if (threadIdx.x % 32 < n0)
        for (int i = 0; i < n1; i++) x = rsqrtf(x + 1);
    else
        for (int i = 0; i < n1; i++) x = rsqrtf(x + 2);
    data[threadIdx.x] = x;
    """
    run = Run(body, np.ones(64, np.float32), lanes, 5, architecture=architecture, threads=64)
    x = np.ones(64)
    for _ in range(5):
        x = 1 / np.sqrt(x + np.where(np.arange(64) % 32 < lanes, 1, 2))
    np.testing.assert_allclose(run.data, x, rtol=1e-5)
    assert run.count("MUFU.RSQ") == 2 * 5 * (2 if 0 < lanes < 32 else 1)
    assert run.count("STG") == 2  # one for each warp, whose halves have joined again


def test_two_halves_of_a_warp_in_the_same_function_count_twice():
    head = "__device__ __noinline__ float f(float x) { return rsqrtf(x) + 1; }"
    body = "data[threadIdx.x] = threadIdx.x < n0 ? f(data[threadIdx.x]) * 2 : f(data[threadIdx.x] + 3) * 5;"
    whole, halves = (Run(body, np.ones(32, np.float32), lanes, head=head) for lanes in (32, 16))
    assert halves.data.tolist() == [4.0] * 16 + [7.5] * 16
    assert (whole.count("MUFU.RSQ"), halves.count("MUFU.RSQ")) == (1, 2)
    assert (whole.count("STG"), halves.count("STG")) == (1, 1)


@every_architecture
def test_lanes_wait_for_one_that_goes_a_long_way_round(architecture):
    data = np.full(64, 3.0)
    data[5] = 3e-310  # takes the branch for reciprocals of subnormal numbers
    run = Run("data[threadIdx.x] = 1 / data[threadIdx.x];", data, architecture=architecture, threads=64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(run.data, 1 / data, rtol=1e-15)
    assert run.count("CALL") == 1
    assert run.count("STG") == 2


@every_architecture
def test_a_warp_loops_as_long_as_its_slowest_lane_and_is_whole_afterwards(architecture):
    body = """
    float x = data[threadIdx.x];
    #pragma unroll 1
    for (int i = 0; i < (int)threadIdx.x % 32; i++) x *= 1.5f;
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    data[threadIdx.x] = x;
    """
    run = Run(body, np.ones(64, np.float32), architecture=architecture, threads=64)
    np.testing.assert_allclose(run.data, (1.5 ** np.arange(32)).sum(), rtol=1e-5)
    assert run.count("FMUL") == 2 * 31
    assert run.count("SHFL") == 2 * 5


@every_architecture
def test_lanes_that_leave_a_loop_in_several_ways_are_waited_for(architecture):
    body = """
    int n = 0;
    #pragma unroll 1
    for (int i = threadIdx.x;; i += 32) {
        if (data[i] == 0) break;
        n += data[i];
        if (n > n0) {
            n = -n;
            if (n % 2) break;
        }
    }
    for (int d = 16; d; d /= 2) n += __shfl_down_sync(0xffffffffu, n, d);
    if (threadIdx.x == 0) data[0] = n;
    """
    data = np.random.default_rng(0).integers(0, 9, (64, 32)).astype(np.int32)
    data[-1] = 0
    run = Run(body, data.reshape(-1), 9, architecture=architecture)
    expected = 0
    for column in data.T:
        n = 0
        for value in column:
            if value == 0:
                break
            n += int(value)
            if n > 9:
                n = -n
                if n % 2:
                    break
        expected += n
    assert run.data[0] == expected
    assert run.count("SHFL") == 5


@every_architecture
def test_shared_memory_and_barriers(architecture):
    body = """
    __shared__ double sums[4];
    double x = data[blockIdx.x * blockDim.x + threadIdx.x];
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) data[blockIdx.x] = 1 / (sums[0] + sums[1] + sums[2] + sums[3]);
    """
    data = np.random.default_rng(0).uniform(1, 2, 3 * 128)
    run = Run(body, data, architecture=architecture, threads=128, blocks=3)
    np.testing.assert_allclose(run.data[:3], 1 / data.reshape(3, 128).sum(1), rtol=1e-15)
    assert run.count("STS") == 3 * 4
    assert run.count("BAR") == 3 * 4
    assert run.count("SHFL") == 3 * 4 * 5 * 2  # two for each shuffle, as a double is moved in two halves
    assert run.count("DADD") == 3 * (4 * 5 + 3)


@every_architecture
def test_a_switch_whose_cases_a_warp_all_takes(architecture):
    cases = "".join(f"case {n}: x = x * {n + 2}.0f + sqrtf(x); break;\n" for n in range(8))
    switch = f"switch (threadIdx.x % n0) {{ {cases} default: x = -x; }}"
    body = f"float x = data[threadIdx.x]; {switch} data[threadIdx.x] = x;"
    x = np.linspace(1, 2, 32, dtype=np.float32)
    run = Run(body, x, 10, architecture=architecture)
    way = np.arange(32) % 10
    np.testing.assert_allclose(run.data, np.where(way < 8, x * (way + 2) + np.sqrt(x), -x), rtol=1e-6)
    assert run.count("MUFU.RSQ") == 8
    assert run.count("STG") == 1


@every_architecture
def test_parts_of_a_warp_that_shuffle_by_themselves(architecture):
    body = """
    int x = data[threadIdx.x];
    const unsigned part = threadIdx.x < 8 ? 0xffu : 0xffffff00u;
    if (threadIdx.x < 8)
        for (int d = 4; d; d /= 2) x += __shfl_xor_sync(part, x, d, 8);
    else
        x = __shfl_sync(part, x, 9) + 100 * __shfl_up_sync(part, x, 1);
    __syncwarp();
    data[threadIdx.x] = x + 1000 * __shfl_down_sync(0xffffffffu, (int)threadIdx.x, 3, 16);
    """
    run = Run(body, np.arange(32, dtype=np.int32), architecture=architecture)
    lane = np.arange(32)
    inner = np.where(lane < 8, 28, 9 + 100 * (lane - 1))
    valid = lane != 8  # the lane that it takes the value from is elsewhere
    assert run.data[valid].tolist() == (inner + 1000 * np.where(lane % 16 < 13, lane + 3, lane))[valid].tolist()


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_sums_of_a_warp_in_one_instruction(architecture):
    body = """
    const int x = data[threadIdx.x];
    data[threadIdx.x] = __reduce_add_sync(0xffffffffu, x) + 1000 * __reduce_min_sync(0xffffffffu, x);
    data[threadIdx.x + 64] = __popc(__match_any_sync(0xffffffffu, x % 3));
    """
    x = np.random.default_rng(0).integers(-50, 50, 64).astype(np.int32)
    run = Run(body, np.concatenate([x, x]), architecture=architecture, threads=64)
    warps = x.reshape(2, 32)
    assert run.data[:64].tolist() == np.repeat(warps.sum(1) + 1000 * warps.min(1), 32).tolist()
    rest = np.fmod(warps, 3)
    assert run.data[64:].tolist() == (rest[:, :, None] == rest[:, None]).sum(2).reshape(-1).tolist()


@every_architecture
def test_threads_that_have_left_are_not_waited_for(architecture):
    body = """
    __shared__ int seen[64];
    seen[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x % 3 == 0 || threadIdx.x < 32) return;
    seen[threadIdx.x] = threadIdx.x;
    __syncthreads();
    data[threadIdx.x] = seen[63 - threadIdx.x % 2] + seen[threadIdx.x];
    """
    run = Run(body, np.full(64, -1, np.int32), architecture=architecture, threads=64)
    n = np.arange(64)
    expected = np.where((n % 3 == 0) | (n < 32), -1, np.where(n % 2, 62, 0) + n)
    assert run.data.tolist() == expected.tolist()


@every_architecture
def test_a_lane_that_leaves_while_others_wait_for_it(architecture):
    body = """
    double x = data[threadIdx.x];
    if (x < 1) {
        x = 1 / x;
        if (x > 1e300) return;
    }
    data[threadIdx.x] = x + 1;
    """
    data = np.full(64, 3.0)
    data[5] = 3e-310
    run = Run(body, data, architecture=architecture, threads=64)
    assert run.data.tolist() == [4.0] * 5 + [3e-310] + [4.0] * 58
    assert run.count("STG") == 2


def test_barriers_that_count_and_named_ones():
    body = """
    const int some = __syncthreads_count(data[threadIdx.x] > 0), all = __syncthreads_and(data[threadIdx.x] > -9);
    const int any = __syncthreads_or(data[threadIdx.x] > 99);
    if (threadIdx.x < 64) asm volatile("bar.sync 1, 64;");
    __syncthreads();
    data[threadIdx.x] = some + 1000 * all + 2000 * any;
    """
    data = np.arange(-4, 92, dtype=np.int32)
    assert set(Run(body, data, threads=96).data) == {91 + 1000}


@every_architecture
def test_votes(architecture):
    body = """
    const unsigned negative = __ballot_sync(0xffffffffu, data[threadIdx.x] < 0);
    data[threadIdx.x] = negative == 0 ? 99 : __ffs(negative) + 100 * __popc(negative) + 10000 * __clz(negative);
    """
    data = np.ones(64, np.int32)
    data[[40, 41, 50]] = -1
    run = Run(body, data, architecture=architecture, threads=64)
    assert run.data.tolist() == [99] * 32 + [9 + 300 + 10000 * 13] * 32


INTEGERS = {  # computed with Python's integers
    "a / b": lambda a, b: abs(a) // abs(b) * (1 if a * b > 0 else -1),
    "(unsigned)a % 1000": lambda a, b: a % 2**32 % 1000,
    "(int)((long long)a * b >> 20)": lambda a, b: a * b >> 20,
    "(int)((unsigned long long)(unsigned)a * (unsigned)b >> 32)": lambda a, b: (a % 2**32) * (b % 2**32) >> 32,
    "(int)(((long long)a << 13) - b >> 7)": lambda a, b: (a << 13) - b >> 7,
    "(int)(((long long)a << 32 | (unsigned)b) / 1000003)": lambda a, b: (
        abs(w := (a << 32) + b % 2**32) // 1000003 * (1 if w > 0 else -1)
    ),
    "max(a, b) - min(a + 5, b)": lambda a, b: max(a, b) - min(a + 5, b),
    "(a & b) | (a ^ ~b) & 0xff00ff": lambda a, b: (a & b) | (a ^ ~b) & 0xFF00FF,
    "a >> (b & 31) ^ (unsigned)b >> 3": lambda a, b: (a >> (b & 31)) ^ (b % 2**32 >> 3),
    "(int)__brev(a) + abs(b)": lambda a, b: int(f"{a % 2**32:032b}"[::-1], 2) + abs(b),
    "(int)__byte_perm(a, b, 0x3715)": lambda a, b: sum(
        (((b % 2**32) << 32 | a % 2**32) >> 8 * k & 255) << 8 * n for n, k in enumerate((5, 1, 7, 3))
    ),
}


@every_architecture
def test_integers(architecture):
    lines = [f"data[{256 + 128 * i} + threadIdx.x] = {expression};" for i, expression in enumerate(INTEGERS)]
    body = "const int a = data[threadIdx.x], b = data[threadIdx.x + 128];\n" + "\n".join(lines)
    rng = np.random.default_rng(0)
    numbers = (rng.integers(-(2**31) + 1, 2**31, 256) >> rng.integers(0, 30, 256)).astype(np.int32)
    numbers[numbers == 0] = 1
    memory = np.concatenate([numbers, np.zeros(128 * len(INTEGERS), np.int32)])
    found = Run(body, memory, architecture=architecture, threads=128).data[256:].reshape(-1, 128)
    pairs = list(zip(*numbers.reshape(2, 128).tolist(), strict=True))
    for (expression, function), ours in zip(INTEGERS.items(), found, strict=True):
        assert ours.astype(np.uint32).tolist() == [function(a, b) % 2**32 for a, b in pairs], expression


FLOATS = {
    "x / y": np.divide,
    "sqrt(fabs(x))": lambda x, y: np.sqrt(np.abs(x)),
    "fma(x, y, 1.0)": lambda x, y: x * y + 1,
    "(float)x * (float)y": lambda x, y: np.float64(x.astype(np.float32) * y.astype(np.float32)),
    "x < y || !(y > 1) ? x : -y": lambda x, y: np.where((x < y) | ~(y > 1), x, -y),
    "fminf(x, fmaxf(y, 0.5f))": lambda x, y: np.fmin(x.astype(np.float32), np.fmax(y.astype(np.float32), 0.5)),
    "(long long)(int)x + (unsigned)fabs(y)": lambda x, y: np.trunc(x) + np.trunc(np.abs(y)),
    "half(x)": lambda x, y: np.float64(x.astype(np.float32).astype(np.float16)),
    "x != x ? 1 : 2": lambda x, y: np.where(np.isnan(x), 1, 2),
}
HALF = """
__device__ double half(double x) {
    float wide = (float)x;
    unsigned short narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(wide));
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(narrow));
    return wide;
}
"""


@every_architecture
def test_floats(architecture):
    lines = [f"data[{256 + 128 * i} + threadIdx.x] = {expression};" for i, expression in enumerate(FLOATS)]
    body = "const double x = data[threadIdx.x], y = data[threadIdx.x + 128];\n" + "\n".join(lines)
    x, y = np.random.default_rng(0).standard_normal((2, 128)) * 10
    x[7] = np.nan
    memory = np.concatenate([x, y, np.zeros(128 * len(FLOATS))])
    run = Run(body, memory, architecture=architecture, threads=128, head=HALF)
    for (expression, function), ours in zip(FLOATS.items(), run.data[256:].reshape(-1, 128), strict=True):
        valid = np.arange(128) != 7 if "(int)" in expression else slice(None)
        np.testing.assert_allclose(ours[valid], function(x, y)[valid], rtol=1e-14, err_msg=expression)


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_copies_into_shared_memory(architecture):
    body = """
    __shared__ __align__(16) float staged[256];
    float* const own = staged + 4 * threadIdx.x;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(own)),
                 "l"(data + 4 * threadIdx.x) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int i = 0; i < 4; i++) data[4 * threadIdx.x + i] = own[3 - i];
    """
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    run = Run(body, x, architecture=architecture, threads=64)
    assert np.array_equal(run.data, x.reshape(-1, 4)[:, ::-1].reshape(-1))
    assert run.count("LDGSTS") == 2
    assert (run.count("LDS.128"), run.count("STG")) == (2, 8)


@pytest.mark.parametrize("architecture", [90, 120])
def test_blocks_of_a_cluster_write_into_each_others_shared_memory(architecture):
    body = """
    __shared__ double given[2];
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    const double own = 1 / data[blockIdx.x];
    if (threadIdx.x == 0)
        for (int rank = 0; rank < 2; rank++)
            *static_cast<double*>(__cluster_map_shared_rank(&given[blockIdx.x % 2], rank)) = own;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    if (threadIdx.x < 2) data[4 + 2 * blockIdx.x + threadIdx.x] = given[threadIdx.x];
    """
    # The reciprocal of 1e-308 takes a branch of its own, so that its lane comes late.
    data = np.array([2, 1e-308, 4, 8, *[0] * 8])
    run = Run(body, data, architecture=architecture, threads=64, blocks=4, cluster=2)
    np.testing.assert_allclose(run.data[4:], [0.5, 1e308] * 2 + [0.25, 0.125] * 2, rtol=1e-15)


def test_pipelines():
    names = {
        "fma": ("FFMA.FTZ", "IMAD.MOV.U32", "HADD2.F32"),
        "alu": ("IADD3.X", "LOP3.LUT", "F2FP.BF16.F32.PACK_AB", "ISETP.GE.AND", "SEL"),
        "fp64": ("DFMA", "F2F.F64.F32", "F2F.F32.F64", "I2F.F64"),
        "xu": ("MUFU.RCP", "F2F.F16.F32", "I2F.RP"),
        "lsu": ("LDG.E.128", "STS.64", "LDGSTS.E.BYPASS.128", "SHFL.BFLY"),
        "uniform": ("UIADD3", "ULDC.64", "R2UR"),
        "control": ("BRA", "BSYNC", "BAR.SYNC.DEFER_BLOCKING"),
    }
    assert {name: pipe(name) for names_ in names.values() for name in names_} == {
        name: kind for kind, names_ in names.items() for name in names_
    }


def test_spilled_registers_go_to_local_memory():
    body = """
    float values[40];
    for (int i = 0; i < 40; i++) values[i] = data[i] + 100 * threadIdx.x;
    for (int i = 0; i < 40; i++) data[40 + 40 * threadIdx.x + i] = values[(i * n0) % 40];
    """
    run = Run(body, np.arange(40 * 33, dtype=np.float32), 7)
    thread, i = np.mgrid[:32, :40]
    assert np.array_equal(run.data[40:].reshape(32, 40), i * 7 % 40 + 100 * thread)
    assert run.count("STL") > 0
    assert run.count("LDL") > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("((double*)data)[0] = fmax(((double*)data)[1], 2.0);", r"unknown comparison: DSETP\.MAX"),
        ("atomicAdd(data, 1);", r"unknown instruction: (RED|ATOM)\S* .* at 0x"),
        ("data[1 << 20] = 1;", r"an access beyond all memory: STG\S* .* at 0x"),
        ("*(int*)((char*)data + 2) = 1;", "4 bytes at a crooked address: STG"),
    ],
)
def test_what_is_not_known_or_wrong_is_named(body, message):
    with pytest.raises((UnknownInstruction, WrongAccess), match=message):
        Run(body, np.zeros(64, np.int32))


def test_loads_of_what_nobody_has_written_are_wrong():
    memory = np.zeros(256, np.uint8)
    text = 'extern "C" __global__ void f(int* data) { data[threadIdx.x] = data[threadIdx.x + 32]; }'
    with pytest.raises(WrongAccess, match="a load of what nobody has written: LDG"):
        execute(
            program.compile_program(text, 90),
            (1, 1, 1),
            32,
            [(0, 0, 0)],
            pack([np.uint64(ADDRESS)]),
            Space(memory, ADDRESS, np.zeros(256, np.uint8)),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launches of the library


def test_a_line_through_two_counts():
    cost = measure(report.case("bn_normalize", "float16", 3136))
    smaller, larger = cost.smaller, cost.larger
    each, once = sum(cost.each().values()), cost.once()
    assert each > 8  # at least one conversion for each element
    assert once > 0
    assert larger.packs > smaller.packs
    for found in (smaller, larger):
        assert found.launch.issued.sum() == pytest.approx(found.packs * each / 32 + found.launch.warps * once)
    row = report.tables([cost]).splitlines()[-1]
    assert row.startswith(f"| bn_normalize | float16 | plain | {each:.0f} | ")


@pytest.mark.parametrize("step", ["bn_normalize", "bn_backward_input", "bn_double_backward_input"])
def test_wrong_arrays_are_noticed(monkeypatch, step):
    expected = Arrays._expected
    monkeypatch.setattr(Arrays, "_expected", lambda self, name: expected(self, name) + 1e-3 * (self._x > 3))
    with pytest.raises(AssertionError, match="of what was written is wrong"):
        count(report.case(step, "float32", 1, 256))


@pytest.mark.parametrize(
    ("step", "name"),
    [("bn_stats", "_var"), ("bn_backward_reduce", "_xhat"), ("bn_double_backward_reduce", "_cdx")],
)
def test_wrong_sums_are_noticed(monkeypatch, step, name):
    run = Arrays.run

    def run_and_forget(self):
        result = run(self)
        setattr(self, name, getattr(self, name) * 1.001)
        return result

    monkeypatch.setattr(Arrays, "run", run_and_forget)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        count(report.case(step, "float32", 1, 256))


def test_the_prediction_for_hardware_is_of_all_blocks():
    launches = hardware.predict(90, ncu_work.TINY[:1])
    assert [launch.kernel for launch in launches] == ["channels_first/bn_forward", "channels_first/bn_backward"]
    for launch in launches:
        assert launch.blocks == np.prod(launch.grid)
        assert launch.issued[0] == launch.warps  # each warp issues the first instruction once
