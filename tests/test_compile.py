"""Every instance of every kernel compiles with NVRTC for every generation of GPUs, within its registers. No GPU is
needed.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupybn._steps import row_geometry, sample_geometry, sources
from cupybn._steps.geometry import CHANNELS_FIRST_OWN, CHANNELS_LAST_OWN, WARP
from tests import nvrtc
from tests.nvrtc import ARCHITECTURES

pytestmark = pytest.mark.skipif(nvrtc.find_library() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")

EVERYTHING = os.environ.get("CUPYBN_COMPILE_ALL") == "1"
MOST_REGISTERS = 128  # a thread's limit
REGISTERS = 65536  # registers that a multiprocessor has
BLOCKS = 16  # blocks that fit on a multiprocessor of every GPU
TOGETHER = 8  # registers of a thread are allotted in multiples of this
STATIC_SHARED = 48 << 10
SAME_CODE = {89: 86}
"""Architectures for which the compiler makes the same machine code as for another one."""


def kernels_and_architectures():
    """Each kernel with each architecture that has machine code of its own, those of the norms for channels last with
    two of them.
    """
    for architecture in ARCHITECTURES if EVERYTHING else (a for a in ARCHITECTURES if a not in SAME_CODE):
        for kernel in sources.kernel_names():
            if EVERYTHING or kernel not in nvrtc.NORMS_LAST or architecture in nvrtc.MASKED_ON:
                yield architecture, kernel


@pytest.mark.parametrize(("architecture", "kernel"), list(kernels_and_architectures()))
def test_kernels_compile_without_warnings_and_local_memory(architecture, kernel):
    instances = nvrtc.instances(kernel, architecture, EVERYTHING)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda instance: nvrtc.compile_instance(instance, architecture), instances))
    for instance, (cubin, log) in zip(instances, results, strict=True):
        assert cubin.startswith(b"\x7fELF"), instance
        assert "warning" not in log.lower(), f"{instance}: {log}"
        usage = nvrtc.usage(log)
        assert usage.registers <= most_registers(instance, architecture), f"{instance}: {usage}"
        assert usage.shared <= own_shared(instance), f"{instance}: {usage}"
        assert not usage.spilled, f"{instance}: {usage}"
        assert usage.stack == 0, f"{instance}: {usage}"


@pytest.mark.parametrize(("architecture", "other"), SAME_CODE.items())
def test_architectures_that_have_the_same_machine_code(architecture, other):
    """What another architecture's code shows holds for them: kernels with and without packs, teams, barriers, and
    division in float64.
    """
    for kernel in "bn_update_running", "channels_first/bn_stats", "channels_last/bn_forward", "dropout":
        instance = nvrtc.instances(kernel, architecture)[0]
        codes = [nvrtc.machine_code(nvrtc.compile_instance(instance, a)[0]) for a in (architecture, other)]
        assert codes[0] == codes[1], instance


def own_shared(instance):
    """Most bytes of a kernel's own variables in shared memory."""
    if not instance.cluster:
        return STATIC_SHARED
    if instance.phase >= 0:
        return sample_geometry.OWN
    if instance.rows:
        known = max(instance.threads // instance.team, instance.threads // WARP) * instance.rows.rows_at_once
        return row_geometry.ROW_OWN + row_geometry.KNOWN * known
    return CHANNELS_FIRST_OWN if "first" in instance.kernel else CHANNELS_LAST_OWN


def most_registers(instance, architecture):
    """Most registers of a thread with which as many blocks fit on a multiprocessor as the kernel's source promises."""
    promised = promised_registers(instance, architecture)
    assert promised <= MOST_REGISTERS
    blocks = min(BLOCKS, max(1, REGISTERS // (promised * instance.threads)))
    return min(MOST_REGISTERS, REGISTERS // (blocks * instance.threads) // TOGETHER * TOGETHER)


def promised_registers(instance, architecture):
    """Most registers of a thread by the macro in the kernel's source: a number, or a choice between two by other
    macros and by constants of the kernel.
    """
    head = r'extern "C" __global__ void (?:CLUSTER )?REGISTERS\(([^)]+)\)'
    (text,) = re.findall(head, sources.source(instance.kernel))
    condition, _, numbers = text.rpartition(" ? ")
    if not condition:
        return int(text)
    names = {"INDEX_BITS": instance.index_bits, "WIDTH": instance.width, "MASKED": instance.masked}
    names["PACK_BYTES"] = instance.pack_bytes
    names |= {"ARCHITECTURE": 10 * architecture, "ELEMENTWISE": instance.rows and instance.rows.elementwise}
    own = (sources.KERNELS / f"{instance.kernel}.cu").read_text()
    for name, value in [*re.findall(r"^constexpr bool (\w+) = (.+);", own, re.MULTILINE), ("chosen", condition)]:
        names[name] = eval(value.replace("||", "or").replace("&&", "and"), names)
    chosen = names["chosen"]
    return int(numbers.split(" : ")[0 if chosen else 1])


def test_what_was_compiled_is_compiled_no_second_time(tmp_path, monkeypatch):
    """Results of the same text with the same options, by the same compiler, for the same architecture and kind."""
    monkeypatch.setenv("CUPYBN_NVRTC_CACHE", str(tmp_path))
    made, compiled = [], nvrtc._compiled

    def count(*arguments):
        made.append(arguments)
        return compiled(*arguments)

    monkeypatch.setattr(nvrtc, "_compiled", count)
    text = 'extern "C" __global__ void f(int* x) { int unused; *x = 3; }'
    first = nvrtc.compile_text(text, 90)
    assert "unused" in first[1]
    assert nvrtc.compile_text(text, 90) == first
    assert len(made) == 1
    nvrtc.compile_text(text.replace("3", "4"), 90)
    nvrtc.compile_text(text, 80)
    nvrtc.compile_text(text, 90, ["-DONE=1"])
    nvrtc.ptx(text, 90)
    assert len(made) == 5
    monkeypatch.setattr(nvrtc, "version", lambda: "13.99")
    nvrtc.compile_text(text, 90)
    assert len(made) == 6
    with pytest.raises(nvrtc.CompileError):
        nvrtc.compile_text("an error", 90)
    assert len(list(tmp_path.iterdir())) == 6  # errors are not kept


def test_blocks_have_as_many_registers_as_there_are():
    def most(kernel, threads, width=4, index_bits=32, architecture=90):
        return most_registers(nvrtc.Instance(kernel, "float32", width, index_bits, threads), architecture)

    assert most("channels_first/bn_normalize", 256) == 80
    assert most("channels_first/bn_normalize", 128) == 72
    assert most("channels_first/bn_normalize", 128, width=1) == 80
    assert most("channels_first/bn_normalize", 128, index_bits=64) == 80
    assert most("channels_first/bn_backward", 128) == 96
    assert most("channels_first/bn_backward", 512) == 128
    assert most("mean_and_var", 32) == 128
    assert [most("channels_last/bn_backward_input", 256, 8, 32, a) for a in (75, 80, 90, 100)] == [128, 80, 80, 128]
    assert [most("channels_last/bn_double_backward_input", 256, width) for width in (4, 2)] == [128, 80]


# ---------------------------------------------------------------------------------------------------------------------
# Tests of the checks above


@pytest.mark.parametrize("kernel", sources.kernel_names())
def test_errors_name_file_and_line(kernel):
    broken = 'extern "C"'
    lines = (sources.KERNELS / f"{kernel}.cu").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.startswith(broken))
    text = sources.source(kernel).replace(broken, f"broken {broken}")
    with pytest.raises(nvrtc.CompileError, match=rf"(?m)^{re.escape(f'kernels/{kernel}.cu({line}): error')}"):
        nvrtc.compile_text(text, 90, nvrtc.instances(kernel, 90)[0].options)


def test_errors_in_headers_name_the_header_and_its_line():
    broken = "constexpr unsigned ALL_LANES"
    lines = (sources.KERNELS / "types.cuh").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.startswith(broken))
    text = sources.source("channels_first/bn_stats").replace(broken, f"broken {broken}")
    with pytest.raises(nvrtc.CompileError, match=rf"(?m)^kernels/types\.cuh\({line}\): error"):
        nvrtc.compile_text(text, 90, nvrtc.instances("channels_first/bn_stats", 90)[0].options)


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


def test_functions_belong_to_the_device_as_with_cupy():
    """Functions without `__host__` or `__device__` are functions of the device, as with CuPy; so are lambdas."""
    text = """
    int twice(int x) { return 2 * x; }
    extern "C" __global__ void f(int* x) {
        auto call = [](const auto& function, int x) { return function(x); };
        *x = call([](int x) { return twice(x); }, *x);
    }
    """
    assert nvrtc.compile_text(text, 90)[0].startswith(b"\x7fELF")
