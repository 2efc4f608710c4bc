"""Properties of kernels that the stand-in cannot show, read in the PTX that NVRTC compiles them to."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import pytest

from cupybn._steps import sources
from cupybn._steps.sources import kernel_names
from tests import nvrtc

pytestmark = pytest.mark.skipif(nvrtc.find_library() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")

ON_CHIP = [name for name in kernel_names() if name.endswith(("bn_forward", "bn_backward"))]
ELEMENTWISE = [name for name in kernel_names() if name.endswith(("bn_normalize", "bn_backward_input"))]
OVER_ELEMENTS = [name for name in kernel_names() if "/" in name]

ASYNC_COPY = {
    16: r"cp\.async\.cg\.shared\.global \[\S+\], \[\S+\], 16;",
    8: r"cp\.async\.ca\.shared\.global \[\S+\], \[\S+\], 8;",
    4: r"cp\.async\.ca\.shared\.global \[\S+\], \[\S+\], 4;",
}
ASYNC_GROUP, ASYNC_WAIT = r"cp\.async\.commit_group;", r"cp\.async\.wait_group (\d);"
CLUSTER = r"barrier\.cluster|mapa|\.reqnctapercluster|shared::cluster"
ATOMIC = r"(?<![\w.])(?:atom|red|multimem)\."
FUSED = r"fma\."
FLOAT64_ARITHMETIC = r"(?:add|sub|mul|fma|div|sqrt|rcp)\.(?:\w+\.)*f64"
TO_FLOAT16 = r"cvt\S+\.f16(?:x2)?\.f(?:32|64)"
TO_PAIR = {"float16": r"cvt\.rn\.f16x2\.f32", "bfloat16": r"cvt\.rn\.bf16x2\.f32"}


class Line(NamedTuple):
    """An instruction, and the place in the kernels' source that it comes from."""

    text: str
    file: str
    number: int


def instance_of(name, architecture=90, dtype="float16", pack_bytes=16):
    """The instance of a kernel that is read: the last one that has such packs."""
    every = nvrtc.instances(name, architecture, everything=True)
    same = [i for i in every if (i.dtype, i.index_bits, i.masked) == (dtype, 32, False)] or every
    return [i for i in same if i.pack_bytes == pack_bytes or "/" not in name][-1]


@functools.cache
def compiled(name, architecture=90, dtype="float16", pack_bytes=16, usual=False):
    """The lines of a kernel's PTX.

    Parameters
    ----------
    usual : bool
        Whether to leave out the code for channels near the limits of float32.
    """
    instance, text = instance_of(name, architecture, dtype, pack_bytes), sources.source(name)
    if usual:
        text, count = re.subn(r"sizeof\(acc_t\) < 8 && (?:channels\.any_wide|!all_held)(?=\))", "false", text)
        text, more = re.subn(r"(?<=if \()!missed && !channels\.any_wide(?=\) return)", "true", text)
        assert count + more == {"channels_first/bn_backward": 2, "channels_last/bn_backward": 3}.get(name, 1)
    ptx = nvrtc.ptx(text, architecture, [*instance.options, "-lineinfo"])
    files = {number: path.rpartition("kernels/")[2] for number, path in re.findall(r'(?m)^\t\.file\t(\d+) "(.+)"', ptx)}
    lines, file, number = [], "", 0
    for line in ptx.splitlines():
        place = re.match(r"\t\.loc\t(\d+) (\d+)", line)
        if place:
            file, number = files[place[1]], int(place[2])
        else:
            lines.append(Line(line.strip(), file, number))
    return lines


def places(pattern, lines):
    """The indices of the lines in which the pattern is found."""
    return [number for number, line in enumerate(lines) if re.search(pattern, line.text)]


def found(pattern, lines):
    """The lines in which the pattern is found."""
    return [lines[number].text for number in places(pattern, lines)]


def from_source(lines, file, first, last=None):
    """The lines that come from a part of a source file: from the line with `first`, up to the line with `last`."""
    texts = (sources.KERNELS / file).read_text().splitlines()
    (begin,) = [number for number, text in enumerate(texts, 1) if first in text]
    end = next((number for number, text in enumerate(texts, 1) if number > begin and last and last in text), 1 << 30)
    return [line for line in lines if line.file == file and begin <= line.number < end]


def of_elements(lines):
    """The lines that compute outputs and gradients for each element, without those for sums."""
    return from_source(lines, "elementwise.cuh", "struct Factors", "sum(dy * (x - center) * rstd) of element e")


@pytest.mark.parametrize("name", ON_CHIP)
@pytest.mark.parametrize(("architecture", "pack_bytes"), [(75, 16), (80, 16), (90, 16), (90, 8), (90, 4)])
def test_packs_are_copied_while_the_thread_goes_on(name, architecture, pack_bytes):
    """Packs are copied by cp.async and read after a wait that follows the last copy; GPUs before sm_80 have no such
    copies.
    """
    lines = compiled(name, architecture, pack_bytes=pack_bytes)
    reads = [line for line in from_source(lines, "batches.cuh", "return own[i * TEAM]", "put(") if "ld." in line.text]
    assert reads
    assert all(line.text.startswith("ld.shared.") for line in reads)
    if architecture < 80:
        assert not found(r"cp\.async", lines)
        assert carries(lines)
        return
    copies, groups, waits = (places(p, lines) for p in (ASYNC_COPY[pack_bytes], ASYNC_GROUP, ASYNC_WAIT))
    assert len(copies) == (2 if name.endswith("bn_backward") else 1)
    assert len(groups) == 1
    assert len(found(r"cp\.async", lines)) == len(copies) + len(groups) + len(waits)
    assert {re.search(ASYNC_WAIT, lines[i].text)[1] for i in waits} == {"0", "1", "2", "3"}
    assert max(copies) < groups[0] < waits[0] < min(lines.index(line) for line in reads)
    assert not carries(lines)


@pytest.mark.parametrize("name", ON_CHIP)
def test_two_bytes_are_carried_by_the_thread(name):
    lines = compiled(name, dtype="bfloat16", pack_bytes=2)
    assert not found(r"cp\.async\.(?!wait_group)", lines)
    assert {line.text.split()[0] for line in carries(lines)} == {"st.shared.u16"}


def carries(lines):
    """The stores into shared memory of packs that the thread has loaded itself."""
    (number,) = [
        number
        for number, text in enumerate((sources.KERNELS / "batches.cuh").read_text().splitlines(), 1)
        if "= raw[k][u];" in text
    ]
    return [line for line in lines if (line.file, line.number) == ("batches.cuh", number) and "st." in line.text]


@pytest.mark.parametrize("name", [name for name in ON_CHIP if name.startswith("channels_first")])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_clusters(name, dtype):
    """Arriving at a cluster's barrier publishes what a block wrote; the first arrival, before any write, publishes
    nothing.
    """
    assert not found(CLUSTER, compiled(name, 80, dtype))
    lines = compiled(name, 90, dtype)
    assert found(r"\.reqnctapercluster", lines) == [".reqnctapercluster 8, 1, 1"]
    arrivals, waits = found(r"barrier\.cluster\.arrive", lines), found(r"barrier\.cluster\.wait", lines)
    assert arrivals[0] == "barrier.cluster.arrive.relaxed;"
    assert set(arrivals[1:]) == {"barrier.cluster.arrive;"}
    assert waits == ["barrier.cluster.wait;"] * len(arrivals)
    first = places(r"barrier\.cluster\.arrive", lines)[0]
    assert first < places(r"ld\.global|st\.|cp\.async|barrier\.cluster\.wait", lines)[0]


@pytest.mark.parametrize("name", OVER_ELEMENTS)
@pytest.mark.parametrize("pack_bytes", [16, 2])
def test_float16_is_converted_by_the_hardware(name, pack_bytes):
    """Float16 is converted by instructions, rounded to nearest: no library function, no shifts."""
    lines, width = compiled(name, pack_bytes=pack_bytes), pack_bytes // 2
    assert len(found(r"cvt\.f32\.f16 ", lines)) >= width
    to_float16 = {line.split()[0] for line in found(TO_FLOAT16, lines)}
    writes = not name.endswith(("bn_stats", "backward_reduce"))
    pairs = {"cvt.rn.f16x2.f32"} if width > 1 else set()
    assert to_float16 == ({"cvt.rn.f16.f32"} | pairs if writes else set())


@pytest.mark.parametrize("name", ELEMENTWISE + ON_CHIP)
@pytest.mark.parametrize(("dtype", "architecture"), [("float16", 90), ("bfloat16", 80)])
def test_elements_are_converted_in_pairs(name, dtype, architecture):
    """Elements are converted in pairs from sm_80 on; single conversions remain for vectors of channels, and wide
    channels.
    """
    lines = compiled(name, architecture, dtype, usual=True)
    assert len(found(TO_PAIR[dtype], from_source(lines, "types.cuh", f"narrow_pair<{dtype}, float>"))) >= 4
    assert len(found(r"cvt\.rn\.f16\.f32", lines)) <= 2  # those of vectors
    lines = compiled(name, 75)
    assert not found(TO_PAIR[dtype], lines)
    assert len(found(r"cvt\.rn\.f16\.f32", lines)) >= 8


@pytest.mark.parametrize("name", kernel_names())
def test_what_no_kernel_has(name):
    """No kernel has atomics on memory, local memory, or loads that may miss its stores (an output may be an input)."""
    lines = compiled(name)
    assert found(r"ld\.(?:shared|global)", lines)
    assert not found(ATOMIC, lines)
    assert not found(r"ld\.global\.nc", lines)
    assert not found(r"\.local\b", lines)
    assert found(r"\.maxntid", lines) == [f".maxntid {instance_of(name).threads}, 1, 1"]


@pytest.mark.parametrize("name", ELEMENTWISE + ON_CHIP)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_elements_are_rounded_as_by_numpy(name, dtype):
    """Elements are rounded after each operation, as by NumPy: no product and sum become one instruction."""
    lines = of_elements(compiled(name, dtype=dtype))
    width = 16 // nvrtc.itemsize(dtype)
    assert len(found(r"mul\.rn\.(?:ftz\.f32|f64)", lines)) >= width
    assert not found(FUSED, lines)


@pytest.mark.parametrize("name", [name for name in kernel_names() if name.endswith("bn_double_backward_input")])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_elements_of_second_order_have_the_same_bits_in_all_code(name, dtype):
    """The compiler does not choose which products and sums become one instruction: for a tile with a wide channel it
    might choose otherwise, and so change the other channels.
    """
    lines = compiled(name, dtype=dtype)
    own = from_source(lines, "double_backward.cuh", "const SecondElement<A>& at", "// Packs of the arrays")
    assert found(r"(?:add|sub)\.(?:ftz\.f32|f64)", own)
    assert not found(rf"mul\.|{FUSED}", own)
    assert found(FUSED, from_source(lines, "elementwise.cuh", "DEVICE float multiply_add", "// The dtype"))


@pytest.mark.parametrize("name", ELEMENTWISE + ON_CHIP)
def test_float64_for_channels_that_need_it_alone(name):
    """Arithmetic in float64, which is slow, is done for channels that need it alone."""
    assert found(FLOAT64_ARITHMETIC, of_elements(compiled(name)))
    lines = of_elements(compiled(name, usual=True))
    assert found(r"mul\.rn\.(?:ftz\.)?f32", lines)
    assert not found(FLOAT64_ARITHMETIC, lines)


CHANNEL = """
extern "C" __global__ void test(double mean, double var, Affine affine, double sum_dy, double sum_dy_xhat,
                                double inv_count, Channel* channel, double count, double m2, Running running,
                                const long long* batches) {
    *channel = make_channel(mean, var, affine, read_affine(affine, 0));
    set_gradient(*channel, {sum_dy, sum_dy_xhat}, inv_count);
    const ChannelRunning before = read_running(running, 0);
    update_running({count, mean, m2}, before, running, batches, 0);
}
"""


def test_channels_are_rounded_as_by_numpy():
    """Values of channels are rounded to nearest after each operation, as by NumPy, divisions and roots included."""
    text = sources._with_headers(sources.KERNELS / "running.cuh", set()) + CHANNEL
    macros = "-DDATA_T=float32", "-DWIDTH=4", "-DINDEX_BITS=32", "-DTHREADS=256"
    lines = [Line(line, "", 0) for line in nvrtc.ptx(text, 90, macros).splitlines()]
    assert not found(FUSED, lines)
    assert not found(r"\b(?:div|sqrt|rcp|rsqrt)\.(?!rn)", lines)
    assert found(r"sqrt\.rn\.f64", lines)


def test_these_would_be_found():
    """The patterns of this file find what they look for, in code that has it."""
    text = """
    extern "C" __global__ void test(const float* __restrict__ x, float* y, float a, double* z) {
        y[threadIdx.x] = x[threadIdx.x] * a + a;
        atomicAdd(y, a);
        *z = *z * a + 1;
    }
    """
    lines = [Line(line, "", 0) for line in nvrtc.ptx(text, 90).splitlines()]
    for pattern in FUSED, ATOMIC, r"ld\.global\.nc", FLOAT64_ARITHMETIC:
        assert found(pattern, lines), pattern
