"""The mechanisms of CUDA and CuPy that all kernels rest on, each tried by itself; a part of the stage environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from contact.task import Task

TAKE = r"""
struct Vector { char* data; long long stride; long long dtype; };
enum Activation : long long { NONE, RELU };
struct Bundle { Vector v; const float* x; Activation activation; double d; float* none; };
extern "C" __global__ void take(const float* x, Bundle b, double d, long long n, float* none, double* out) {
    const Vector v = b.v;
    out[0] = x[0]; out[1] = (double)(unsigned long long)v.data; out[2] = (double)v.stride; out[3] = (double)v.dtype;
    out[4] = d; out[5] = (double)n; out[6] = none ? 1 : 0; out[7] = *(const float*)(v.data + v.stride);
    out[8] = b.x[1]; out[9] = b.activation == RELU; out[10] = b.d; out[11] = b.none ? 1 : 0;
}
"""
STRUCTS = r"""
struct Bundle { long long words[7]; };
extern "C" __global__ void structs(Bundle a, Bundle b, Bundle c, Bundle d, void* e, void* f) {}
"""
CLUSTER = r"""
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) ranks(unsigned* out, int words) {
    extern __shared__ __align__(16) unsigned memory[];
    __cluster_barrier_arrive();
    if (threadIdx.x == 0) memory[words - 1] = 7u;
    __cluster_barrier_wait();
    __syncthreads();
    const unsigned rank = blockIdx.x % BLOCKS, next = (rank + 1) % BLOCKS;
    if (threadIdx.x == 0) *(unsigned*)__cluster_map_shared_rank(memory, next) = blockIdx.x + 1;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    if (threadIdx.x == 0) out[blockIdx.x] = memory[0] * (memory[words - 1] == 7u);
}
"""
"""Source of a kernel whose blocks write into the next block's shared memory, and into the end of their own."""
CALLS = 100


def run(task: Task) -> None:
    """Try all mechanisms."""
    log = task.log
    with log.checking("arguments by value: a struct of 56 bytes, double, long long, None"):
        arguments_by_value()
    with log.checking("host time of a launch, by how its arguments are given"):
        for how, us in host_times(3 if task.rehearse else 15).items():
            log.fact(f"us of the host for a launch with 2 pointers and {how}", us)
    for blocks, kib in product((2, 4, 8), (1, 110, 0)):
        with log.checking(f"cluster of {blocks} blocks, {kib or 'as many as there are'} KiB each") as detail:
            detail.append(cluster(blocks, kib << 10, 2 if task.rehearse else 40))
    with log.checking("bfloat16 arrays: asarray, copy, fill, get, view") as detail:
        detail.append(bfloat16())
    with log.checking("transposed views, reshape without a copy, arrays of no and of one element"):
        views()


def arguments_by_value() -> None:
    """Check that a kernel gets what is in a frame when it is launched, for arguments of every kind."""
    import cupy

    from contact.insides import Frame

    kernel, frame = cupy.RawKernel(TAKE, "take"), Frame([(0, 1), (1, 8), (8, 9), (9, 10), (10, 11), (11, 12)])
    for first in 2.5, -1.0:
        x, out = cupy.asarray(np.array([first, 3.5], np.float32)), cupy.zeros(12)
        ptr = x.data.ptr
        for word, value in enumerate([ptr, ptr, 4, 2, ptr, 1, 0, 0, 0, 2**40 + 1, 0, out.data.ptr]):
            frame.words[word] = value
        frame.doubles[6], frame.doubles[8] = np.inf, 0.25
        kernel((1,), (1,), frame.arguments, shared_mem=0)
        for word in range(len(frame.words)):
            frame.words[word] = 0  # a launch has copied what it was given
        found = out.get().tolist()
        assert found == [first, float(ptr), 4, 2, 0.25, 2**40 + 1, 0, 3.5, 3.5, 1, np.inf, 0], found


def host_times(rounds: int) -> dict[str, float]:
    """Microseconds of a launch for each way to pass structs; empty on the stand-in."""
    import cupy

    from contact.insides import Frame, is_stand_in

    if is_stand_in():
        return {}
    kernel, frame = cupy.RawKernel(STRUCTS, "structs"), Frame([(0, 7), (7, 14), (14, 21), (21, 28), (28, 29), (29, 30)])
    once = np.zeros(1, "V56")
    named = once.view([(f"word{i}", np.int64) for i in range(7)])
    ways: dict[str, Callable[[], Any]] = {
        "4 structs, packed each time": lambda: [*(np.frombuffer(bytes(56), "V56") for _ in range(4)), None, None],
        "4 structs, packed once": lambda: [once] * 4 + [None] * 2,
        "4 structs with names of fields": lambda: [named] * 4 + [None] * 2,
        "a frame": lambda: frame.arguments,
    }
    times: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(rounds):
        for how, arguments in ways.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                kernel((1,), (32,), arguments())
            times[how].append((time.perf_counter() - start) * 1e6 / CALLS)
            cupy.cuda.Device().synchronize()
    return {how: round(median(values), 2) for how, values in times.items()}


def cluster(blocks: int, nbytes: int, clusters: int) -> str:
    """Check that blocks reach each other's dynamic shared memory and the end of their own; 0 bytes: all there is."""
    import cupy

    from contact.insides import has_clusters

    if not has_clusters():
        return "this device has none"
    runtime = cupy.cuda.runtime
    nbytes = nbytes or runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) - 1024
    kernel = cupy.RawKernel(CLUSTER, "ranks", (f"-DBLOCKS={blocks}",))
    kernel.max_dynamic_shared_size_bytes = nbytes
    out = cupy.zeros(blocks * clusters, np.uint32)
    kernel((out.size,), (128,), (out, np.int32(nbytes // 4)), shared_mem=nbytes)
    i = np.arange(out.size)
    expected = i - i % blocks + (i - 1) % blocks + 1  # number of the block that wrote here: the one before, in a ring
    assert (out.get() == expected).all(), out.get()[:16]
    return f"{nbytes >> 10} KiB"


def bfloat16() -> str:
    """Check that CuPy carries bfloat16, which is no dtype of its own; returns the name that CuPy gives it."""
    import cupy
    import ml_dtypes

    host = np.array([1.5, -2, np.nan, np.inf, 1e-40], ml_dtypes.bfloat16)
    array = cupy.asarray(host)
    assert array.dtype.name == "bfloat16", array.dtype
    copy = cupy.empty_like(array)
    copy[...] = array
    assert copy.get().tobytes() == host.tobytes(), copy.get()
    assert cupy.asarray(host.view(np.int16)).view(host.dtype).get().tobytes() == host.tobytes()
    copy.fill(0)
    assert not copy.get().any()
    return str(array.dtype.str)


def views() -> None:
    """Check that arrays share memory where the library counts on it."""
    import cupy

    a = cupy.zeros((2, 3, 4, 5), np.float32)
    view = a.transpose(0, 2, 3, 1)
    assert view.transpose(0, 3, 1, 2).reshape(2, 3, 20).data.ptr == a.data.ptr
    assert cupy.empty((0, 3), np.float32).data.device_id == 0
    counter = cupy.asarray(np.asarray(5, np.int64))
    counter[...] = 7
    assert int(counter) == 7
