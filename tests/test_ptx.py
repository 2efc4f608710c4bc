"""What the stand-in never compiles, or compiles as something else: read in the assembler that NVRTC makes of it."""

from __future__ import annotations

import functools
import re

import pytest

from cupybn import _kernels
from cupybn._kernels import kernel_names
from tests import nvrtc

pytestmark = pytest.mark.skipif(nvrtc.find_library() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")

ON_CHIP = [name for name in kernel_names() if name.endswith(("bn_forward", "bn_backward"))]
ELEMENTWISE = [name for name in kernel_names() if name.endswith(("bn_normalize", "bn_backward_input"))]
OVER_ELEMENTS = [name for name in kernel_names() if "/" in name]

ASYNC_COPY = r"cp\.async\.cg\.shared\.global \[\S+\], \[\S+\], 16;"
ASYNC_WAIT = r"cp\.async\.wait_all;"
READ_PACK = r"ld\.shared\.v4\."
CLUSTER = r"barrier\.cluster|mapa|\.reqnctapercluster|shared::cluster"
BARRIER = r"bar\.sync|barrier\.cluster\.wait"
FUSED = r"fma\."
FLOAT64_ARITHMETIC = r"(?:add|sub|mul|fma|div|sqrt|rcp)\.(?:\w+\.)*f64"


@functools.cache
def compiled(name, architecture=90, dtype="float16", vectorized=1, usual=False):
    """The lines of a kernel.

    Parameters
    ----------
    usual : bool
        Without what is there for channels near the limits of float32.
    """
    (instance, *_) = nvrtc.instances(name, architecture)
    text = _kernels.source(name)
    if usual:
        text, count = re.subn(r"if \(channel\.wide\)(?=\n)|any_wide \|= (?=\(unsigned\))", r"if (false)", text)
        assert count == 1
    options = instance._replace(dtype=dtype, vectorized=vectorized).options
    return nvrtc.ptx(text, architecture, options).splitlines()


def places(pattern, lines):
    """The numbers of the lines that have it."""
    return [number for number, line in enumerate(lines) if re.search(pattern, line)]


def after_the_last_barrier(lines):
    """Where the elements are gone through, one by one."""
    return lines[places(BARRIER, lines)[-1] :]


def found(pattern, lines):
    """The lines that have it."""
    return [lines[number].strip() for number in places(pattern, lines)]


@pytest.mark.parametrize("name", ON_CHIP)
@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_packs_are_copied_while_the_thread_goes_on(name, architecture):
    """And read when it has waited, after the last of the copies has begun. GPUs before sm_80 cannot."""
    lines = compiled(name, architecture)
    copies, waits, reads = (places(pattern, lines) for pattern in (ASYNC_COPY, ASYNC_WAIT, READ_PACK))
    assert reads
    if architecture < 80:
        assert not found(r"cp\.async", lines)
        return
    assert len(copies) == (2 if name.endswith("bn_backward") else 1)
    assert len(waits) == 1
    assert len(found(r"cp\.async", lines)) == len(copies) + len(waits)
    assert max(copies) < waits[0] < min(reads)


@pytest.mark.parametrize("name", ON_CHIP)
def test_single_elements_are_copied_by_the_thread(name):
    lines = compiled(name, vectorized=0)
    assert not found(r"cp\.async", lines)
    assert found(r"\.maxntid", lines) == [f".maxntid {nvrtc.instances(name, 90)[0].threads}, 1, 1"]


@pytest.mark.parametrize("name", ON_CHIP)
def test_clusters(name):
    """All that a thread wrote before it arrived is seen by those that have waited: so they do by default."""
    assert not found(CLUSTER, compiled(name, 80))
    lines = compiled(name, 90)
    assert found(r"\.reqnctapercluster", lines) == [".reqnctapercluster 8, 1, 1"]
    arrivals, waits = found(r"barrier\.cluster\.arrive", lines), found(r"barrier\.cluster\.wait", lines)
    assert set(arrivals) == {"barrier.cluster.arrive;"}
    assert set(waits) == {"barrier.cluster.wait;"}
    assert (
        places(r"barrier\.cluster\.arrive", lines)[0] < places(r"ld\.global|cp\.async|barrier\.cluster\.wait", lines)[0]
    )


@pytest.mark.parametrize("name", OVER_ELEMENTS)
def test_float16_is_converted_by_the_hardware(name):
    """To the nearest; without a library's function, and without a shift or two for each element."""
    lines = compiled(name)
    assert len(found(r"cvt\.f32\.f16 ", lines)) >= 8
    to_float16 = {line.split()[0] for line in found(r"\.f16\.f(?:32|64)", lines)}
    writes = not name.endswith(("bn_stats", "bn_backward_reduce"))
    assert to_float16 == ({"cvt.rn.f16.f32"} if writes else set())
    assert len(found(r"cvt\.rn\.f16\.f32", lines)) >= 8 * writes


@pytest.mark.parametrize("name", kernel_names())
def test_what_no_kernel_has(name):
    """Atomics on memory, and loads that need not see what the kernel stores: an output may be an input."""
    lines = compiled(name)
    assert found(r"ld\.(?:shared|global)", lines)
    assert not found(r"\b(?:atom|red|multimem)\.", lines)
    assert not found(r"ld\.global\.nc", lines)
    assert found(r"\.maxntid", lines) == [f".maxntid {nvrtc.instances(name, 90)[0].threads}, 1, 1"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float16") for name in ELEMENTWISE + ON_CHIP), *((name, "float64") for name in ELEMENTWISE)],
)
def test_elements_are_rounded_as_by_numpy(name, dtype):
    """After each operation: a product and a sum are not one."""
    lines = after_the_last_barrier(compiled(name, dtype=dtype))
    assert len(found(r"mul\.rn\.(?:ftz\.f32|f64)", lines)) >= (8 if dtype == "float16" else 2)
    assert not found(FUSED, lines)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_float64_for_channels_that_need_it_alone(name):
    """It is slow. What is there besides are factors that are converted, and a comparison."""
    assert found(FLOAT64_ARITHMETIC, after_the_last_barrier(compiled(name)))
    lines = after_the_last_barrier(compiled(name, usual=True))
    assert found(r"mul\.rn\.(?:ftz\.)?f32", lines)
    assert not found(FLOAT64_ARITHMETIC, lines)


CHANNEL = """
extern "C" __global__ void test(double mean, double var, double eps, Vector weight, Vector bias, double sum_dy,
                                double sum_dy_xhat, double inv_count, Channel* channel, double count, double m2,
                                Vector running_mean, Vector running_var, double momentum, const long long* batches) {
    *channel = make_channel(mean, var, eps, weight, bias, 0);
    set_gradient(*channel, sum_dy, sum_dy_xhat, inv_count);
    update_running({count, mean, m2}, running_mean, running_var, momentum, batches, 0);
}
"""


def test_channels_are_rounded_as_by_numpy():
    """And divisions and roots to the nearest, in float64."""
    text = _kernels._with_headers(_kernels.KERNELS / "running.cuh", set()) + CHANNEL
    macros = "-DDATA_T=float32", "-DVECTORIZED=1", "-DINDEX_BITS=32", "-DTHREADS=256"
    lines = nvrtc.ptx(text, 90, macros).splitlines()
    assert not found(FUSED, lines)
    assert not found(r"\b(?:div|sqrt|rcp|rsqrt)\.(?!rn)", lines)
    assert found(r"sqrt\.rn\.f64", lines)


def test_these_would_be_found():
    """In code like that of which there must be none."""
    text = """
    extern "C" __global__ void test(const float* __restrict__ x, float* y, float a, double* z) {
        y[threadIdx.x] = x[threadIdx.x] * a + a;
        atomicAdd(y, a);
        *z = *z * a + 1;
    }
    """
    lines = nvrtc.ptx(text, 90).splitlines()
    for pattern in FUSED, r"\b(?:atom|red|multimem)\.", r"ld\.global\.nc", FLOAT64_ARITHMETIC:
        assert found(pattern, lines), pattern
