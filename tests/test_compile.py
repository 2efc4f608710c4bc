"""Every kernel in every instantiation through the real compiler, for every generation of GPUs, without a GPU."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupybn import _kernels
from tests import nvrtc
from tests.nvrtc import ARCHITECTURES, Instance

pytestmark = pytest.mark.skipif(nvrtc.find_library() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")

SPILLS = {
    (architecture, Instance(kernel, dtype, 1, 32)): reason
    for architecture, kernel, dtype, reason in [
        (90, "channels_first/bn_normalize", "float64", "4 bytes for 48 registers, five blocks; without it 56, four"),
        (120, "channels_first/bn_normalize", "float16", "16 bytes for 64 registers, four blocks; without it 70, three"),
        (
            120,
            "channels_first/bn_normalize",
            "bfloat16",
            "16 bytes for 64 registers, four blocks; without it 70, three",
        ),
        (80, "channels_first/bn_stats", "bfloat16", "28 bytes for 128 registers, two blocks; without it 154, one"),
        (86, "channels_first/bn_stats", "bfloat16", "4 bytes for 128 registers, two blocks; without it 154, one"),
        (89, "channels_first/bn_stats", "bfloat16", "4 bytes for 128 registers, two blocks; without it 154, one"),
        (120, "channels_last/bn_stats", "bfloat16", "4 bytes for 128 registers, two blocks; without it 158, one"),
    ]
}
"""Why registers may go to memory, by architecture and instance; anywhere else it is a failure. Blocks are those that a
multiprocessor holds; `LAUNCH_BOUNDS` with one block would do without the spill."""
MOST_REGISTERS = 255  # of a thread
REGISTERS = 65536  # of a block
STATIC_SHARED = 48 << 10


@pytest.mark.parametrize("kernel", _kernels.kernel_names())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_warnings_and_spills(architecture, kernel):
    instances = nvrtc.instances(kernel, architecture)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda instance: nvrtc.compile_instance(instance, architecture), instances))
    usages = {}
    for instance, (cubin, log) in zip(instances, results, strict=True):
        assert cubin.startswith(b"\x7fELF"), instance
        assert "warning" not in log.lower(), f"{instance}: {log}"
        usages[instance] = usage = nvrtc.usage(log)
        assert usage.registers <= MOST_REGISTERS, f"{instance}: {usage}"
        assert usage.registers * instance.threads <= REGISTERS, f"{instance}: {usage}"
        assert usage.shared <= STATIC_SHARED, f"{instance}: {usage}"
    spilled = {instance: usage for instance, usage in usages.items() if usage.spilled}
    listed = {instance for instance in instances if (architecture, instance) in SPILLS}
    assert spilled.keys() == listed, f"spilled: {spilled}, but listed: {listed}"


def test_listed_spills_are_of_kernels_that_there_are():
    there = {(a, i) for a in ARCHITECTURES for kernel in _kernels.kernel_names() for i in nvrtc.instances(kernel, a)}
    assert SPILLS.keys() <= there


# ---------------------------------------------------------------------------------------------------------------------
# The checks above are worth something


@pytest.mark.parametrize("kernel", _kernels.kernel_names())
def test_errors_name_file_and_line(kernel):
    broken = 'extern "C"'
    lines = (_kernels.KERNELS / f"{kernel}.cu").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.startswith(broken))
    text = _kernels.source(kernel).replace(broken, f"broken {broken}")
    with pytest.raises(nvrtc.CompileError, match=rf"(?m)^{re.escape(f'kernels/{kernel}.cu({line}): error')}"):
        nvrtc.compile_text(text, 90, nvrtc.instances(kernel)[0].options)


def test_errors_in_headers_name_the_header_and_its_line():
    broken = "constexpr unsigned ALL_LANES"
    lines = (_kernels.KERNELS / "types.cuh").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.startswith(broken))
    text = _kernels.source("channels_first/bn_stats").replace(broken, f"broken {broken}")
    with pytest.raises(nvrtc.CompileError, match=rf"(?m)^kernels/types\.cuh\({line}\): error"):
        nvrtc.compile_text(text, 90, nvrtc.instances("channels_first/bn_stats")[0].options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_are_seen(architecture):
    text = """
    extern "C" __global__ void many(float* x) {
        __shared__ float first;
        float values[64];
        for (int i = 0; i < 64; i++) values[i] = x[i * 1024 + threadIdx.x];
        if (threadIdx.x == 0) first = values[0];
        __syncthreads();  // all 64 are read by now
        for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = first + values[63 - i];
    }
    """
    enough = nvrtc.usage(nvrtc.compile_text(text, architecture)[1])
    few = nvrtc.usage(nvrtc.compile_text(text, architecture, ["-maxrregcount=32"])[1])
    assert enough.registers > 64
    assert few.registers == 32
    assert (enough.spilled, few.spilled) == (False, True)
    assert enough.shared >= 4


def test_warnings_are_seen():
    _, log = nvrtc.compile_text('extern "C" __global__ void f() { int unused = 0; }', 90)
    assert "warning" in log.lower()
