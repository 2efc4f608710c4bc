"""What the stand-in for CuPy does with clusters of blocks, and with copies that go on while the kernel does."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest

import cupybn.functional as F
from cupybn._steps import plans, resident, sources
from tests.steps import forget_plans
from tests.test_emulated_kernels import (  # the fixture by its name, too
    INVALID_VALUE,
    CompileException,
    EmulationError,
    cupy,
    emulator,
    fails,
    launch,
    lines_here,
    make,
    numbers,
    refused,
    seeds,  # noqa: F401
)

# ruff: noqa: F811

INVALID_CLUSTER_SIZE = 912

BEFORE = """
template <class T>
__device__ T* of_block(T* p, unsigned rank) { return (T*)__cluster_map_shared_rank(p, rank); }
__device__ unsigned rank() { return __clusterRelativeBlockRank(); }
__device__ unsigned blocks() { return __clusterSizeInBlocks(); }
__device__ void sync_cluster() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}
#line 1 "kernels/example.cu"
"""


def cluster(parameters, body, size=4, before=BEFORE):
    return make(parameters, body, before, f"__cluster_dims__({size}, 1, 1)")


def outputs(seeds, kernel, size, new=cupy.empty, **dims):
    """The integers that a kernel writes to its one argument, once for each order of threads."""
    for _ in seeds():
        out = new(size, np.int32)
        launch(kernel, out, **dims)
        yield out.get()


def fails_somewhere(kernel, *args, match, **dims):
    """The launch is reported, in one of the lines that say "here": which, depends on the order of threads."""
    with pytest.raises(EmulationError, match=match) as caught:
        launch(kernel, *args, **dims)
    place = re.search(r"kernels/example\.cu:(\d+)", str(caught.value))
    assert place, caught.value
    assert int(place[1]) in lines_here(kernel), caught.value


# ---------------------------------------------------------------------------------------------------------------------
# Declarations and launches


@pytest.mark.parametrize(
    ("bounds", "before", "options", "size"),
    [
        ("__cluster_dims__(4, 1, 1)", "", (), 4),
        ("__cluster_dims__(4)", "", (), 4),
        ("__cluster_dims__(2 * 2, 1, 1) __launch_bounds__(64)", "", (), 4),
        ("__launch_bounds__(32 * (1 + 1)) __cluster_dims__((BLOCKS), 1, 1)", "", ("-DBLOCKS=2",), 2),
        ("CLUSTER LAUNCH_BOUNDS", "#define LAUNCH_BOUNDS __launch_bounds__(64)\n", ("-DCLUSTER=",), 1),
        (
            "CLUSTER LAUNCH_BOUNDS",
            "#define CLUSTER __cluster_dims__(BLOCKS, 1, 1)\n#define LAUNCH_BOUNDS\n",
            ("-DBLOCKS=8",),
            8,
        ),
        ("CLUSTER_2", "#define CLUSTER_2 __cluster_dims__(ONE + 1)\nconstexpr int ONE = 1;\n", (), 2),
        ("", "", (), 1),
        ("__cluster_dims__(1, 1, 1)", "", (), 1),
    ],
)
def test_the_size_of_a_cluster_is_declared(bounds, before, options, size):
    out = cupy.empty(16, np.int32)
    body = "if (threadIdx.x == 0) out[blockIdx.x] = 10 * __clusterRelativeBlockRank() + __clusterSizeInBlocks();"
    with emulator.record() as launches:
        launch(make("int* out", body, before, bounds, options), out, grid=16, block=64)
    np.testing.assert_array_equal(out.get(), 10 * (np.arange(16) % size) + size)
    assert launches[0].cluster == size


def test_the_declaration_may_stand_before_void():
    code = 'extern "C" __global__ __cluster_dims__(2, 1, 1) __launch_bounds__(64) void example() {}\n'
    code += 'extern "C" __global__ void other() {}'
    with emulator.record() as launches:
        for name in "example", "other":
            launch(cupy.RawKernel(code, name), grid=4)
    assert [launch.cluster for launch in launches] == [2, 1]


def test_declarations_that_are_refused():
    with pytest.raises(CompileException, match="__cluster_dims__ arguments must be positive integers"):
        launch(cluster("", "", 0))
    for dims in "1, 2, 1", "2, 1, 2", "1, 2":
        with pytest.raises(NotImplementedError, match="along x"):
            launch(make("", "", bounds=f"__cluster_dims__({dims})"))


@pytest.mark.parametrize("size", [1, 2])
def test_old_devices_know_no_clusters(size):
    kernel = cluster("", "sync_cluster();", size)
    launch(kernel, grid=2)
    for device in emulator.A100, emulator.RTX_4090, emulator.T4:
        with emulator.pretend(device):
            for compile_ in kernel.compile, cupy.RawModule(code=kernel.code).compile, lambda: launch(kernel, grid=2):
                with pytest.raises(CompileException, match="__cluster_dims__ is not supported for this GPU arch"):
                    compile_()
    launch(kernel, grid=2)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("__cluster_barrier_arrive();", "__cluster_barrier_arrive"),
        ("__cluster_barrier_arrive_relaxed();", "__cluster_barrier_arrive_relaxed"),
        ("__cluster_barrier_wait();", "__cluster_barrier_wait"),
        ("__shared__ int x;\n__cluster_map_shared_rank(&x, 0);", "__cluster_map_shared_rank"),
        ("__clusterRelativeBlockRank();", "__clusterRelativeBlockRank"),
        ("__clusterSizeInBlocks();", "__clusterSizeInBlocks"),
    ],
)
def test_old_devices_know_no_functions_of_clusters(statement, name):
    with emulator.pretend(emulator.A100):
        fails(make("", f"{statement} // here"), match=f"identifier {name} is undefined")


def test_launches_that_are_refused():
    for size in 9, 16:
        with refused(INVALID_CLUSTER_SIZE, f"{size} blocks"):
            launch(cluster("", "", size), grid=size)
    for grid in 2, 6, (6, 4), (2, 8):
        with refused(INVALID_VALUE, "grid .* clusters of 4"):
            launch(cluster("", ""), grid=grid)
    for size in 3, 8:
        launch(cluster("", "", size), grid=(2 * size, 3, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that are right

SUM = """
    extern __shared__ float of_threads[];
    __shared__ float sum;
    of_threads[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (int i = 0; i < blockDim.x; i++) sum += of_threads[i];
    }
    BARRIER
    if (threadIdx.x == 0) {
        float all = 0;
        for (unsigned r = 0; r < blocks(); r++) all += *of_block(&sum, r);
        out[blockIdx.x] = all;
    }
    LAST_BARRIER"""


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [1, 40, 256])
def test_sums_over_a_cluster(seeds, size, block):
    body = SUM.replace("LAST_BARRIER", "sync_cluster();").replace("BARRIER", "sync_cluster();")
    kernel = cluster("const float* in, float* out", body, size)
    x = numbers(16 * block)
    for _ in seeds():
        out = cupy.empty(16, np.float32)
        launch(kernel, x, out, grid=16, block=block, shared_mem=4 * block)
        expected = np.repeat(x.get().reshape(-1, size * block).sum(1), size)
        np.testing.assert_allclose(out.get(), expected, rtol=1e-5)


def test_clusters_in_three_dimensions(seeds):
    body = """
    __shared__ uint3 x;
    if (threadIdx.x + threadIdx.y == 0) x = blockIdx;
    sync_cluster();
    const uint3 of = *of_block(&x, (rank() + 1) % 2);
    sync_cluster();
    out[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = (of.z * 10 + of.y) * 10 + of.x;"""
    kernel = cluster("int* out", body.replace("out[", "if (threadIdx.x + threadIdx.y == 0) out["), 2)
    z, y, x = np.indices((2, 3, 4))
    for out in outputs(seeds, kernel, (2, 3, 4), grid=(4, 3, 2), block=(8, 5)):
        np.testing.assert_array_equal(out, 100 * z + 10 * y + (x ^ 1))


def test_stores_into_the_memory_of_peers(seeds):
    body = """
    __shared__ int from[4][33];
    sync_cluster();
    for (int round = 0; round < 3; round++) {
        for (int r = 0; r < 4; r++) of_block(from[rank()], (rank() + r) % 4)[threadIdx.x] = 100 * rank() + round;
        sync_cluster();
        int sum = 0;
        for (int r = 0; r < 4; r++) sum += from[r][32 - threadIdx.x];
        out[blockIdx.x * 33 + threadIdx.x] = sum;
        sync_cluster();
    }"""
    for out in outputs(seeds, cluster("int* out", body), 8 * 33, grid=8, block=33):
        assert (out == 600 + 8).all()


def test_atomics_in_the_memory_of_peers(seeds):
    body = """
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    sync_cluster();
    atomicAdd(of_block(&sum, 2), 1);
    sync_cluster();
    if (rank() == 2 && threadIdx.x == 0) *out = sum;"""
    for out in outputs(seeds, cluster("int* out", body), 1, grid=4, block=64):
        assert out == 256


def test_a_block_has_barriers_of_its_own_while_others_wait_for_the_cluster(seeds):
    body = """
    __shared__ int x[64];
    if (rank() == 1) {
        for (int i = 0; i < 5; i++) {
            x[threadIdx.x] = i;
            __syncthreads();
            if (x[63 - threadIdx.x] != i) *out = -1;
            __syncthreads();
            __shfl_xor_sync(~0u, i, 1);
        }
    }
    __cluster_barrier_arrive();
    const int count = __syncthreads_count(1);
    __cluster_barrier_wait();
    if (threadIdx.x == 0 && rank() == 2) *out = count;"""
    for out in outputs(seeds, cluster("int* out", body), 1, cupy.zeros, grid=4, block=64):
        assert out == 64


def test_work_between_arrival_and_wait(seeds):
    body = """
    __shared__ int x, y;
    if (threadIdx.x == 0) x = rank();
    __cluster_barrier_arrive();
    if (threadIdx.x == 0) y = 10 * rank();
    __cluster_barrier_wait();
    if (threadIdx.x == 32) out[blockIdx.x] = *of_block(&x, (rank() + 1) % 4);
    sync_cluster();
    if (threadIdx.x == 32) out[blockIdx.x] += *of_block(&y, (rank() + 1) % 4);
    sync_cluster();"""
    for out in outputs(seeds, cluster("int* out", body), 4, grid=4, block=64):
        np.testing.assert_array_equal(out, [11, 22, 33, 0])


def test_dynamic_shared_memory_of_any_size(seeds):
    body = """
    __shared__ int first;
    extern __shared__ int x[];
    const int n = 200 * 256;
    for (int i = threadIdx.x; i < n; i += 64) x[i] = rank() * n + i;
    if (threadIdx.x == 0) first = n;
    sync_cluster();
    for (int i = threadIdx.x; i < n; i += 64)
        if (of_block(x, 1 - rank())[n - 1 - i] != (int)((2 - rank()) * *of_block(&first, 1 - rank()) - 1 - i)) *out = 1;
    sync_cluster();"""
    kernel = cluster("int* out", body, 2)
    with refused(INVALID_VALUE, "bytes of shared memory in a block"):
        launch(kernel, cupy.zeros(1, np.int32), grid=2, block=64, shared_mem=200 << 10)
    kernel.max_dynamic_shared_size_bytes = 200 << 10
    for out in outputs(seeds, kernel, 1, cupy.zeros, grid=2, block=64, shared_mem=200 << 10):
        assert out == 0


ORDER = """
    if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(counter, 1);
    sync_cluster();
    if (threadIdx.x == 0) out[4 + blockIdx.x] = atomicAdd(counter, 1);"""


def test_blocks_of_a_cluster_take_turns_in_an_order_that_the_seed_decides(seeds):
    def orders():
        found = []
        for _ in seeds():
            counter, out = cupy.zeros(1, np.int32), cupy.empty(8, np.int32)
            launch(cluster("int* counter, int* out", ORDER), counter, out, grid=4)
            assert sorted(out[:4].get()) == [0, 1, 2, 3]
            found.append(tuple(out.get()))
        return found

    first = orders()
    assert first == orders()
    assert len({order[:4] for order in first}) > 2
    assert len({order[4:] for order in first}) > 2
    assert any(tuple(np.array(order[4:]) - 4) != order[:4] for order in first)


def test_clusters_in_graphs():
    kernel, out = cluster("int* out", "if (threadIdx.x == 0) out[blockIdx.x] += blocks();"), cupy.zeros(8, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        launch(kernel, out, grid=8)
        graph = stream.end_capture()
    with emulator.record() as launches:
        graph.launch(stream)
        graph.launch(stream)
    assert [launch.cluster for launch in launches] == [4, 4]
    assert (out.get() == 8).all()


# ---------------------------------------------------------------------------------------------------------------------
# Too early and too late

VISIT = """
    __shared__ int x[32];
    x[threadIdx.x] = 1;
    FIRST
    %s // here
    LAST"""
READ, WRITE = "*out = of_block(x, (rank() + 1) % 4)[5];", "of_block(x, (rank() + 1) % 4)[5] = 2;"


def visit(statement, first, last):
    guarded = "if (rank() == 2 && threadIdx.x == 3) " + statement
    return cluster("int* out", (VISIT % guarded).replace("FIRST", first).replace("LAST", last))


@pytest.mark.parametrize("statement", [READ, WRITE])
def test_peers_may_not_have_started(seeds, statement):
    for _ in seeds():
        out = cupy.empty(1, np.int32)
        launch(visit(statement, "sync_cluster();", "sync_cluster();"), out, grid=4)
        for first in "", "__syncthreads();", "__cluster_barrier_arrive();":
            last = "__cluster_barrier_wait(); sync_cluster();" if "arrive" in first else "sync_cluster();"
            fails(
                visit(statement, first, last),
                out,
                grid=4,
                match=r"too early: a peer's shared memory .* block \(3, 0, 0\) may not have started, in thread 3 of",
            )


@pytest.mark.parametrize("statement", [READ, WRITE])
def test_peers_may_have_left(seeds, statement):
    messages = set()
    for _ in seeds():
        for last in "", "__syncthreads();", "__cluster_barrier_arrive();":
            with pytest.raises(
                EmulationError, match=r"too late: .* has left.*in thread 3 of block \(2, .*:6\b"
            ) as caught:
                launch(visit(statement, "sync_cluster();", last), cupy.empty(1, np.int32), grid=4)
            messages.add(" may have left" in str(caught.value))
        arrive, both = "__cluster_barrier_arrive();", "__cluster_barrier_arrive(); __cluster_barrier_wait();"
        waits_for_none = visit(statement, "sync_cluster();", f"if (rank() == 3) {{ {arrive} }} else {{ {both} }}")
        with pytest.raises(EmulationError, match=r"too late: .* has left"):
            launch(waits_for_none, cupy.empty(1, np.int32), grid=4)
    assert messages == {True, False}


def test_what_was_read_before_a_barrier_is_no_late_visit(seeds):
    leave_early = visit(
        READ, "sync_cluster();", "__cluster_barrier_arrive();\nif (rank() == 3) __cluster_barrier_wait();"
    )
    for _ in seeds():
        launch(leave_early, cupy.empty(1, np.int32), grid=4)


# ---------------------------------------------------------------------------------------------------------------------
# Races


REMOTE = "of_block(x, 1)[threadIdx.x]"


@pytest.mark.parametrize("barrier", ["sync_cluster();", "__syncthreads();", ""])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"if (rank() == 0) {REMOTE} = 5;", "if (rank() == 1) out[threadIdx.x] = x[threadIdx.x];"),
        ("if (rank() == 1) x[threadIdx.x] = 5;", f"if (rank() == 0) out[threadIdx.x] = {REMOTE};"),
        (f"if (rank() == 0) out[threadIdx.x] = {REMOTE};", "if (rank() == 1) x[threadIdx.x] = 5;"),
        (f"if (rank() == 0) {REMOTE} = 5;", f"if (rank() == 2) {REMOTE} = 6;"),
        (f"if (rank() == 0) {REMOTE} = 5;", f"if (rank() == 2) out[threadIdx.x] = {REMOTE};"),
    ],
    ids=["store-read", "write-load", "load-write", "store-store", "store-load"],
)
def test_races_on_the_memory_of_peers(seeds, before, after, barrier):
    body = "__shared__ int x[32];\nx[threadIdx.x] = 1;\nsync_cluster();\n"
    body += f"{before} // here\n{barrier}\n{after} // here\nsync_cluster();"
    kernel = cluster("int* out", body)
    for _ in seeds():
        out = cupy.zeros(32, np.int32)
        if barrier == "sync_cluster();":
            launch(kernel, out, grid=4)
            assert out.get()[7] in (0, 1, 5)
        else:
            fails_somewhere(
                kernel, out, grid=4, match="race on (a peer's )?shared memory: .* no cluster barrier between"
            )


def check_release(seeds, body, writer, reader, right):
    """Check that one block reads the 7 that another one has written, or that this is reported as a race."""
    kernel = cluster("int* out", body.replace("WRITER", str(writer)).replace("READER", str(reader)), 2)
    for _ in seeds():
        out = cupy.empty(1, np.int32)
        if right:
            launch(kernel, out, grid=2, block=64)
            assert out.get() == 7
        else:
            fails_somewhere(kernel, out, grid=2, block=64, match="race on (a peer's )?shared memory")


@pytest.mark.parametrize(("writes", "right"), [("before", True), ("between", False)])
@pytest.mark.parametrize(("writer", "reader"), [(0, 1), (1, 0), (1, 1)])
def test_what_lies_between_arrival_and_wait_is_not_released(seeds, writes, right, writer, reader):
    """Threads of the same block do not see it either: thread 0 writes, thread 40 reads."""
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = 0;
    sync_cluster();
    if (BEFORE && rank() == WRITER && threadIdx.x == 0) *of_block(&x, 1) = 7; // here
    __cluster_barrier_arrive();
    if (!BEFORE && rank() == WRITER && threadIdx.x == 0) *of_block(&x, 1) = 7; // here
    __cluster_barrier_wait();
    if (rank() == READER && threadIdx.x == 40) *out = *of_block(&x, 1); // here
    sync_cluster();"""
    body = body.replace("BEFORE", "true" if writes == "before" else "false")
    check_release(seeds, body, writer, reader, right)


@pytest.mark.parametrize("barrier", ["", "__syncthreads();", "__syncwarp();"])  # while which all others may arrive
def test_what_is_read_between_arrival_and_wait_is_not_acquired(seeds, barrier):
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = 0;
    sync_cluster();
    if (rank() == 0 && threadIdx.x == 0) *of_block(&x, 1) = 7; // here
    __cluster_barrier_arrive();
    BARRIER
    if (rank() == 1 && threadIdx.x == 0) *out = x; // here
    __cluster_barrier_wait();"""
    for _ in seeds():
        fails_somewhere(
            cluster("int* out", body.replace("BARRIER", barrier), 2), cupy.empty(1, np.int32), grid=2, match="race on"
        )


@pytest.mark.parametrize(("barrier", "right"), [("__syncthreads();", True), ("__syncwarp();", True), ("", False)])
def test_what_a_thread_knows_of_others_it_releases(seeds, barrier, right):
    """Thread 1 writes between its arrival and its wait, but before a barrier with thread 0, which arrives later."""
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = 0;
    sync_cluster();
    if (threadIdx.x == 1) __cluster_barrier_arrive();
    if (rank() == 1 && threadIdx.x == 1) x = 7; // here
    BARRIER
    if (threadIdx.x != 1) __cluster_barrier_arrive();
    __cluster_barrier_wait();
    if (rank() == 0 && threadIdx.x == 0) *out = *of_block(&x, 1); // here
    sync_cluster();"""
    kernel = cluster("int* out", body.replace("BARRIER", barrier), 2)
    for _ in seeds():
        if right:
            launch(kernel, cupy.empty(1, np.int32), grid=2)
        else:
            fails_somewhere(kernel, cupy.empty(1, np.int32), grid=2, match="race on")


@pytest.mark.parametrize(("barrier", "right"), [("__syncthreads();", True), ("__syncwarp();", True), ("", False)])
def test_what_a_thread_has_waited_for_it_tells_others(seeds, barrier, right):
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = rank();
    __cluster_barrier_arrive();
    if (threadIdx.x == 1) __cluster_barrier_wait();
    BARRIER
    if (rank() == 0 && threadIdx.x == 0) *out = *of_block(&x, 1);
    if (threadIdx.x != 1) __cluster_barrier_wait();
    sync_cluster();"""
    kernel = cluster("int* out", body.replace("BARRIER", barrier), 2)
    for _ in seeds():
        with contextlib.nullcontext() if right else pytest.raises(EmulationError, match="may not have started"):
            launch(kernel, cupy.empty(1, np.int32), grid=2)


@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("first", ["__cluster_barrier_arrive_relaxed();", "arrive_somehow();"])
def test_a_relaxed_arrival_says_that_the_block_has_started(seeds, first, writer):
    """Whoever has waited may touch the memory of others, also where some of them arrive relaxed."""
    before = BEFORE.replace(
        "__device__ void sync_cluster",
        """__device__ void arrive_somehow() {
    if (threadIdx.x % 2 == rank() % 2) __cluster_barrier_arrive_relaxed();
    else __cluster_barrier_arrive();
}
__device__ void sync_cluster""",
    )
    body = """
    __shared__ int x;
    FIRST
    __cluster_barrier_wait();
    if (rank() == WRITER && threadIdx.x == 0) *of_block(&x, 1 - rank()) = 7;
    sync_cluster();
    if (rank() != WRITER && threadIdx.x == 40) *out = x;"""
    body = body.replace("WRITER", str(writer))
    kernel = cluster("int* out", body.replace("FIRST", first), 2, before)
    for _ in seeds():
        out = cupy.empty(1, np.int32)
        launch(kernel, out, grid=2, block=64)
        assert out.get() == 7
        with pytest.raises(EmulationError, match="may not have started"):
            launch(
                cluster("int* out", body.replace("FIRST", "").replace("__cluster_barrier_wait();", ""), 2), out, grid=2
            )


@pytest.mark.parametrize(
    ("before", "after", "right"),
    [
        ("", "", False),
        ("sync_cluster();", "", True),
        ("", "sync_cluster();", True),
        ("__syncthreads();", "__syncthreads();", False),
        ("__cluster_barrier_arrive_relaxed(); __cluster_barrier_wait();", "", False),
    ],
)
@pytest.mark.parametrize(("writer", "reader"), [(0, 1), (1, 0)])
def test_a_relaxed_arrival_releases_nothing(seeds, before, after, right, writer, reader):
    """What was written before it is read by other blocks after an arrival that is not relaxed, and no sooner."""
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = 0;
    sync_cluster();
    if (rank() == WRITER && threadIdx.x == 0) *of_block(&x, 1) = 7; // here
    EARLIER
    __cluster_barrier_arrive_relaxed();
    __cluster_barrier_wait();
    LATER
    if (rank() == READER && threadIdx.x == 40) *out = *of_block(&x, 1); // here
    sync_cluster();"""
    check_release(seeds, body.replace("EARLIER", before).replace("LATER", after), writer, reader, right)


def test_after_a_relaxed_arrival_a_block_may_have_left(seeds):
    """The memory of the block is read before that arrival, which does not say that the read is over."""
    body = """
    __shared__ int x;
    if (threadIdx.x == 0) x = rank();
    sync_cluster();
    if (rank() == 0 && threadIdx.x == 0) *out = *of_block(&x, 1); // here
    ARRIVE
    __cluster_barrier_wait();"""
    for _ in seeds():
        out = cupy.empty(1, np.int32)
        launch(cluster("int* out", body.replace("ARRIVE", "__cluster_barrier_arrive();"), 2), out, grid=2)
        relaxed = cluster("int* out", body.replace("ARRIVE", "__cluster_barrier_arrive_relaxed();"), 2)
        fails(relaxed, out, grid=2, match="too late: a peer's shared memory")


def test_global_memory_is_shared_by_a_cluster(seeds):
    body = """
    if (rank() == 0) p[blockIdx.x / 4 * 32 + threadIdx.x] = 5; // here
    BARRIER
    if (rank() == 3) out[blockIdx.x / 4 * 32 + threadIdx.x] = p[blockIdx.x / 4 * 32 + 31 - threadIdx.x]; // here"""
    for _ in seeds():
        out = cupy.empty(64, np.int32)
        launch(
            cluster("int* p, int* out", body.replace("BARRIER", "sync_cluster();")), numbers(64, np.int32), out, grid=8
        )
        assert (out.get() == 5).all()
        for barrier in "", "__syncthreads();", "__cluster_barrier_arrive();":
            kernel = cluster("int* p, int* out", body.replace("BARRIER", barrier))
            fails_somewhere(
                kernel, numbers(64, np.int32), out, grid=8, match="race on argument 0: .* no cluster barrier"
            )


def test_the_barrier_of_a_cluster_orders_no_other_clusters(seeds):
    body = """
    if (blockIdx.x == 0) p[threadIdx.x] = 5; // here
    sync_cluster();
    if (blockIdx.x == 7) out[threadIdx.x] = p[threadIdx.x]; // here"""
    for _ in seeds():
        args = numbers(32, np.int32), cupy.empty(32, np.int32)
        fails_somewhere(cluster("int* p, int* out", body), *args, grid=8, match="race on argument 0: .* no barrier")


# ---------------------------------------------------------------------------------------------------------------------
# Bounds and memory that nobody wrote


def test_peers_must_have_written_their_memory(seeds):
    body = """
    __shared__ int x[32];
    if (rank() != 1 || threadIdx.x != 5) x[threadIdx.x] = 1;
    sync_cluster();
    if (threadIdx.x == 5) *(out + blockIdx.x) = of_block(x, 1)[I]; // here
    sync_cluster();"""
    for _ in seeds():
        launch(cluster("int* out", body.replace("I]", "6]")), cupy.empty(8, np.int32), grid=8)
        fails(
            cluster("int* out", body.replace("I]", "5]")),
            cupy.empty(8, np.int32),
            grid=8,
            match="uninitialised: 4 bytes of (a peer's )?shared memory read that nobody has written",
        )


def test_shared_memory_is_new_in_every_cluster(seeds):
    body = """
    __shared__ int x;
    if (rank() == 0 && blockIdx.x / 4 == 1 && threadIdx.x == 0) x = 1;
    sync_cluster();
    if (threadIdx.x == 0 && rank() == 2) out[blockIdx.x / 4] = *of_block(&x, 0); // here
    sync_cluster();"""
    for _ in seeds():
        fails(cluster("int* out", body), cupy.empty(2, np.int32), grid=8, match=r"uninitialised: .* block \(2, 0, 0\)")


@pytest.mark.parametrize("declared", ["extern __shared__ int x[];", "__shared__ int x[32];"])
@pytest.mark.parametrize("store", [False, True])
def test_bounds_of_the_memory_of_peers(seeds, declared, store):
    statement = "of_block(x, 1)[i] = 1;" if store else "out[0] = of_block(x, 1)[i];"
    verb = "written" if store else "read"
    body = f"{declared}\nx[threadIdx.x] = 1;\nsync_cluster();\nif (rank() + threadIdx.x == 0) {statement} // here"
    kernel = cluster("int* out, int i", f"{body}\nsync_cluster();")
    for _ in seeds():
        for i in 0, 31:
            launch(kernel, cupy.empty(1, np.int32), np.int32(i), grid=4, shared_mem=128)
        for i, where in (
            (32, "past the end"),
            (1000 if "extern" in declared else 40, "past the end"),
            (200_000, "past the end|before the begin"),
            (-1, "before the begin"),
            (-10_000, "before the begin"),
        ):
            fails(
                kernel,
                cupy.empty(1, np.int32),
                np.int32(i),
                grid=4,
                shared_mem=128,
                match=f"out of bounds: 4 bytes {verb} ({where}) of a peer's shared memory",
            )


def test_vectors_in_the_memory_of_peers_must_be_aligned():
    body = """
    __shared__ __align__(16) int x[16];
    if (threadIdx.x < 16) x[threadIdx.x] = 1;
    sync_cluster();
    *(uint4*)(of_block(x, 1) + i) = make_uint4(1, 2, 3, 4); // here
    sync_cluster();"""
    kernel = cluster("int i", body.replace("*(uint4*)", "if (rank() + threadIdx.x == 0) *(uint4*)"), 2)
    launch(kernel, np.int32(4), grid=2)
    fails(kernel, np.int32(2), grid=2, match="misaligned: .* no multiple of 16")


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("of_block(&x, 4);", "with rank 4 in a cluster of 4"),
        ("of_block(&x, rank() - 1);", "with rank 4294967295 in a cluster of 4"),
        ("of_block(out, 1);", "of an address that is not in the block's shared memory"),
        ("of_block(of_block(&x, (rank() + 1) % 4), 1);", "of an address that is not in the block's shared memory"),
    ],
)
def test_addresses_that_cannot_be_mapped(seeds, statement, match):
    kernel = cluster("int* out", f"__shared__ int x;\n{statement}")
    for _ in seeds():
        with pytest.raises(EmulationError, match=f"__cluster_map_shared_rank {match}"):
            launch(kernel, cupy.empty(1, np.int32), grid=4)


def test_addresses_that_another_block_has_mapped():
    body = """
    __shared__ int x;
    __shared__ int* y;
    if (threadIdx.x == 0) x = 1;
    sync_cluster();
    if (rank() == 0 && threadIdx.x == 0) *of_block(&y, 1) = of_block(&x, 1);
    sync_cluster();
    if (rank() == 1 && threadIdx.x == 0) *y = 2; // here
    sync_cluster();"""
    fails(cluster("", body, 2), grid=2, match="4 bytes of its own shared memory written by the address that a peer has")


# ---------------------------------------------------------------------------------------------------------------------
# Barriers that not all meet


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (
            "if (rank() == 1 && threadIdx.x == 5) return;\n"
            "__cluster_barrier_arrive();\n__cluster_barrier_wait(); // here",
            r"deadlock: of 64 threads of the cluster that begins with block \((0|2), 0, 0\), "
            r"63 wait in __cluster_barrier_wait at .*, 1 have left",
        ),
        (
            "if (rank() == 1) return;\n__cluster_barrier_arrive();\n__cluster_barrier_wait(); // here",
            "deadlock: .* 32 wait in __cluster_barrier_wait at .*, 32 have left",
        ),
        (
            "if (rank() == 1) __syncthreads();\n__cluster_barrier_arrive();\n"
            "if (threadIdx.x == 0) __syncthreads(); // here\n__cluster_barrier_wait();",
            "deadlock: .* 2 wait in __syncthreads at .*, 62 have left",
        ),
        (
            "if (threadIdx.x == 0) __syncthreads(); // here\n"
            "__cluster_barrier_arrive();\n__cluster_barrier_wait(); // here",
            "deadlock: .* 2 wait in __syncthreads at .*, 62 wait in __cluster_barrier_wait",
        ),
        (
            "if (threadIdx.x == 0) __cluster_barrier_wait(); // here",
            "__cluster_barrier_wait with no __cluster_barrier_arrive before",
        ),
        (
            "sync_cluster();\n__cluster_barrier_wait(); // here",
            "__cluster_barrier_wait with no __cluster_barrier_arrive before",
        ),
        (
            "__cluster_barrier_arrive();\nif (threadIdx.x == 3) __cluster_barrier_arrive(); // here",
            "__cluster_barrier_arrive twice with no __cluster_barrier_wait between",
        ),
        (
            "__cluster_barrier_arrive();\n__cluster_barrier_arrive_relaxed(); // here",
            "__cluster_barrier_arrive_relaxed twice with no __cluster_barrier_wait between",
        ),
        (
            "if (rank() == 1 && threadIdx.x == 5) return;\n"
            "__cluster_barrier_arrive_relaxed();\n__cluster_barrier_wait(); // here",
            r"deadlock: .* 63 wait in __cluster_barrier_wait at .*, 1 have left",
        ),
    ],
)
def test_barriers_of_a_cluster_that_not_all_meet(seeds, body, match):
    for _ in seeds():
        fails(cluster("", body, 2), grid=4, match=match)


def test_the_barrier_of_a_cluster_of_one_block(seeds):
    body = """
    __shared__ int x[64];
    x[threadIdx.x] = threadIdx.x;
    BARRIER
    out[threadIdx.x] = *of_block(&x[63 - threadIdx.x], 0);"""
    not_all = "if (threadIdx.x == 9) return; sync_cluster();"
    for _ in seeds():
        out = cupy.empty(64, np.int32)
        launch(make("int* out", body.replace("BARRIER", "sync_cluster();"), BEFORE), out, block=64)
        np.testing.assert_array_equal(out.get(), np.arange(64)[::-1])
        with pytest.raises(EmulationError, match=r"deadlock: of 64 threads of block .0, 0, 0., 63 wait in __cl"):
            launch(make("int* out", body.replace("BARRIER", not_all), BEFORE), out, block=64)
        with pytest.raises(EmulationError, match=r"race on shared|uninitialised"):
            launch(make("int* out", body.replace("BARRIER", "__cluster_barrier_arrive();"), BEFORE), out, block=64)


def test_after_an_error_in_a_cluster_all_is_well():
    right = cluster(
        "const float* in, float* out",
        SUM.replace("LAST_BARRIER", "sync_cluster();").replace("BARRIER", "sync_cluster();"),
    )
    wrong = cluster(
        "const float* in, float* out", SUM.replace("LAST_BARRIER", "").replace("BARRIER", "sync_cluster();")
    )
    x = numbers(8 * 64)
    for _ in range(3):
        out = cupy.empty(8, np.float32)
        with pytest.raises(EmulationError, match="has left"):
            launch(wrong, x, out, grid=8, block=64, shared_mem=256)
        launch(right, x, out, grid=8, block=64, shared_mem=256)
        np.testing.assert_array_equal(out.get(), np.repeat(x.get().reshape(2, -1).sum(1), 4))


# ---------------------------------------------------------------------------------------------------------------------
# Copies that go on while the kernel does

PIPELINE = """
    __shared__ __align__(16) float stages[3][128];
    const int tiles = 5, i = 4 * threadIdx.x;
    float sum = 0;
    for (int next = 0; next < 2; next++) {
        __pipeline_memcpy_async(&stages[next][i], &in[128 * next + i], 16);
        __pipeline_commit();
    }
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 2 < tiles) __pipeline_memcpy_async(&stages[(tile + 2) % 3][i], &in[128 * (tile + 2) + i], 16);
        __pipeline_commit();
        __pipeline_wait_prior(LATEST);
        BARRIER
        for (int k = 0; k < 4; k++) sum += stages[tile % 3][127 - i - k]; // here
        BARRIER
    }
    out[threadIdx.x] = sum;"""


def pipeline(latest, barrier="__syncthreads();"):
    return make("const float* in, float* out", PIPELINE.replace("LATEST", str(latest)).replace("BARRIER", barrier))


def test_copies_in_stages(seeds):
    x = numbers(5 * 128)
    for _ in seeds():
        for latest in 0, 1, 2:
            out = cupy.empty(32, np.float32)
            with emulator.record() as launches:
                launch(pipeline(latest), x, out)
            np.testing.assert_array_equal(out.get(), x.get().reshape(5, 32, 4).sum((0, 2))[::-1])
            assert (launches[0].bytes_read, launches[0].bytes_written) == (x.nbytes, out.nbytes)
        fails(pipeline(3), x, out, match="uninitialised: of shared memory, 4 bytes read while a copy to them is on its")
        with pytest.raises(EmulationError, match=r"race on shared memory|uninitialised"):
            launch(pipeline(2, ""), x, out)


def test_old_data_are_not_read_while_a_copy_is_on_its_way():
    body = """
    __shared__ int x[64];
    x[threadIdx.x] = 1;
    __syncthreads();
    __pipeline_memcpy_async(&x[threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
    WAIT
    __syncthreads();
    out[threadIdx.x] = x[63 - threadIdx.x]; // here
    __pipeline_wait_prior(0);"""
    x, out = numbers(64, np.int32), cupy.empty(64, np.int32)
    launch(make("const int* in, int* out", body.replace("WAIT", "__pipeline_wait_prior(0);")), x, out, block=64)
    np.testing.assert_array_equal(out.get(), x.get()[::-1])
    for wait in "", "__pipeline_wait_prior(1);":
        kernel = make("const int* in, int* out", body.replace("WAIT", wait))
        fails(kernel, x, out, block=64, match="uninitialised: of shared memory, 4 bytes read while a copy")


def test_groups_of_copies_end_in_their_order():
    body = """
    __shared__ int x[3];
    for (int i = 0; i < 3; i++) {
        __pipeline_memcpy_async(&x[i], &in[i], 4);
        __pipeline_commit();
    }
    __pipeline_wait_prior(LATEST);
    out[0] = x[READ]; // here
    __pipeline_wait_prior(0);"""
    for latest in range(4):
        for read in range(3):
            kernel = make("const int* in, int* out", body.replace("LATEST", str(latest)).replace("READ", str(read)))
            out = cupy.empty(1, np.int32)
            if read < 3 - latest:
                launch(kernel, numbers(3, np.int32), out, block=1)
                assert out.get() == read + 1
            else:
                fails(kernel, numbers(3, np.int32), out, block=1, match="uninitialised: of shared memory, 4 bytes read")


def copy(arguments, before="", after="__pipeline_commit();\n__pipeline_wait_prior(0);"):
    body = f"__shared__ __align__(16) int x[64];\n{before}\n__pipeline_memcpy_async({arguments}); // here\n{after}"
    return make("int* in", body)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("&x[0], &in[0], 12", "a copy of 12 bytes: expected 4, 8 or 16"),
        ("&x[0], &in[0], 1", "a copy of 1 bytes"),
        ("&x[0], &in[0], 4, 5", "a copy of 4 bytes: expected"),
        ("&x[1], &in[0], 8", "misaligned: a copy of 8 bytes"),
        ("&x[0], &in[1], 8", "misaligned: a copy of 8 bytes"),
        ("&x[2], &in[4], 16", "misaligned: a copy of 16 bytes"),
        ("&x[4], &in[2], 16", "misaligned: a copy of 16 bytes"),
        ("&in[0], &in[4], 16", "not in the block's shared memory"),
        ("&x[0], &x[4], 16", "a copy from an address that is not in global memory"),
        ("&x[0], &in[32], 4", r"out of bounds: 4 bytes read \(4 bytes past the end of argument 0\)"),
        ("&x[0], &in[-4], 16", "out of bounds: 16 bytes read"),
        ("&x[64], &in[0], 16", "out of bounds|not in the block's shared memory"),
    ],
)
def test_copies_that_are_wrong(arguments, match):
    fails(copy(arguments), numbers(32, np.int32), block=1, match=match)


def test_copies_of_memory_that_nobody_wrote():
    fails(copy("x, in, 16"), cupy.empty(4, np.int32), block=1, match="uninitialised: 16 bytes of argument 0")


def test_copies_with_zeros():
    body = """
    __shared__ __align__(16) int x[32][4];
    const int i = 4 * threadIdx.x, rest = max(0, min(4, n - i));
    __pipeline_memcpy_async(x[threadIdx.x], in + i, 16, 4 * (4 - rest));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    for (int k = 0; k < 4; k++) out[i + k] = x[threadIdx.x][k];"""
    out = cupy.empty(128, np.int32)
    with emulator.record() as launches:
        launch(make("const int* in, int* out, int n", body), numbers(50, np.int32), out, np.int32(50))
    np.testing.assert_array_equal(out.get(), np.where(np.arange(128) < 50, np.arange(1, 129), 0))
    assert launches[0].bytes_read == 200


@pytest.mark.parametrize("after", ["", "__pipeline_commit();", "__pipeline_commit();\n__pipeline_wait_prior(1);"])
def test_copies_do_not_outlive_their_thread(after):
    launch(copy("x, in, 16"), numbers(4, np.int32), block=1)
    fails(copy("x, in, 16", after=after), numbers(4, np.int32), block=1, match="copies are still on their way")


def test_a_group_that_is_not_committed_is_not_waited_for():
    kernel = copy("x, in, 16", after="__pipeline_wait_prior(0);")
    fails(kernel, numbers(4, np.int32), block=1, match="copies are still on their way")


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("", "x[0] = 1;", "race on shared memory: 4 bytes written while a copy to them is on its way"),
        ("", "__pipeline_memcpy_async(x, in, 4);", "race on shared memory: 4 bytes written while a copy"),
        ("", "in[1] = 100;", "race: what a copy reads was written while the copy was on its way"),
        ("if (threadIdx.x == 1) x[3] = 1;", "", "race on shared memory"),
        (
            "",
            "__pipeline_commit(); __pipeline_wait_prior(0);\nif (threadIdx.x == 1) x[3] = 1;",
            "race on shared memory",
        ),
    ],
)
def test_races_with_copies(seeds, before, after, match):
    body = f"""
    __shared__ __align__(16) int x[4];
    {before}
    if (threadIdx.x == 0) __pipeline_memcpy_async(x, in, 16);
    {after}
    __pipeline_commit();
    __pipeline_wait_prior(0);"""
    block = 2 if "threadIdx" in before + after else 1
    for _ in seeds():
        with pytest.raises(EmulationError, match=match):
            launch(make("int* in", body), numbers(4, np.int32), block=block)


def test_copies_into_shared_memory_that_peers_read(seeds):
    body = """
    __shared__ int x[32];
    __pipeline_memcpy_async(&x[threadIdx.x], &in[blockIdx.x * 32 + threadIdx.x], 4);
    __pipeline_commit();
    WAIT
    sync_cluster();
    out[blockIdx.x * 32 + threadIdx.x] = of_block(x, (rank() + 1) % 4)[threadIdx.x]; // here
    sync_cluster();
    __pipeline_wait_prior(0);"""
    x = numbers(256, np.int32)
    for _ in seeds():
        out = cupy.empty(256, np.int32)
        launch(cluster("const int* in, int* out", body.replace("WAIT", "__pipeline_wait_prior(0);")), x, out, grid=8)
        np.testing.assert_array_equal(out.get().reshape(2, 4, 32), np.roll(x.get().reshape(2, 4, 32), -1, 1))
        kernel = cluster("const int* in, int* out", body.replace("WAIT", ""))
        fails(kernel, x, out, grid=8, match="uninitialised: of a peer's shared memory, 4 bytes read while a copy")


# ---------------------------------------------------------------------------------------------------------------------
# Faults in the clusters of the library's kernels

SHAPE = 8, 2, 34
FAULTS = {
    "no release": ("{ __cluster_barrier_arrive(); }", "{ __cluster_barrier_arrive_relaxed(); }"),
    "no start": ("cluster_wait();  // all blocks have started", ""),
}


@pytest.mark.parametrize(("text", "fault"), FAULTS.values(), ids=FAULTS)
def test_faults_in_clusters_of_the_library_are_found(seeds, monkeypatch, text, fault):
    """Faults in bn_forward, where eight blocks add their sums."""
    source = sources.source("channels_first/bn_forward")
    assert source.count(text) == 1
    x = cupy.asarray(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    monkeypatch.setattr(resident, "BLOCKS", (8,))
    try:
        for code, right in (source, True), (source.replace(text, fault), False):
            forget_plans()
            plan = plans.choose_resident("bn_forward", x)
            assert plan.geometry.cluster == 8
            monkeypatch.setattr(plan.kernel, "raw", cupy.RawKernel(code, "bn_forward", plan.kernel.options))
            for _ in seeds():
                if right:
                    F.batch_norm(x, None, None, training=True)
                    continue
                with pytest.raises(EmulationError, match=r"race on|too late|twice"):
                    F.batch_norm(x, None, None, training=True)
    finally:
        forget_plans()
