"""Compiles kernels with NVRTC, NVIDIA's run-time compiler, without CuPy and without a driver."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cupybn._arrays.dtypes import FLOATS
from cupybn._steps import launcher, sources
from cupybn._steps.cupy_norms import ADDING_THREADS, MOVING_THREADS
from cupybn._steps.geometry import LEAST_THREADS, TEAMS, THREADS, WARP, Geometry
from cupybn._steps.norms_last import AFTER_SUMS, ONLY_SUMS, WHOLE
from cupybn._steps.plans import ON_CHIP, macros_of
from cupybn._steps.resident import BLOCKS
from cupybn._steps.row_geometry import AT_ONCE, ROW_TEAMS
from cupybn._steps.sample_geometry import THREADS as NORM_THREADS

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PACK_BYTES = (16, 8, 4, 2)
"""Sizes of packs, the usual ones first."""
MEMORY = {
    (16, 32): FLOATS,
    (16, 64): ("float16", "float64"),
    (8, 32): ("float16",),
    (4, 32): ("float16", "float32"),
    (2, 32): ("bfloat16",),
    (2, 64): ("bfloat16",),
}
"""The short list of instances to compile: bytes of a pack and bits of an index, with their dtypes. All but the first
are compiled for one architecture alone."""
MASKED = {(16, 32): ("float16", "float32"), (16, 64): ("bfloat16",)}
"""Instances to compile of kernels for masks, for the architectures in MASKED_ON."""
MASKED_ON = (90, 120)
IN_PACKS = ("dropout", "dropout_channels")
"""Kernels that work on packs, though they know no layout."""
WITHOUT_MASKS = (*ON_CHIP, "bn_double_backward_input", "bn_double_backward_reduce")
"""Kernels with a layout that take no mask."""
NORMS_LAST = ("channels_last/norm_backward", "channels_last/norm_forward")
"""Kernels of the norms for channels last, which are compiled for each phase: on chip, or one of two launches."""
NORMS_MEMORY = {(16, 32): FLOATS, (16, 64): ("float16",), (8, 32): ("float16",), (2, 32): ("bfloat16",)}
"""Instances of these kernels to compile; all but the first are compiled for one architecture alone."""
NORMS_FIRST = ("channels_first/norm_backward", "channels_first/norm_forward")
"""Kernels of the norms for channels first, which are compiled for what a row is and what of it is kept on chip."""
ROWS = {"layer": (1, 1), "rms": (0, 1), "groups": (1, 0)}
"""Rows of the norms, by what shows them: whether they are centered, and whether each element has a weight."""
ROWS_MEMORY = [
    *itertools.product(("float16",), (16,), (32,), ROWS, (128,), (1,)),
    *itertools.product(("float32",), (16,), (32,), ROWS, (128,), (1,)),
    ("float16", 16, 64, "layer", 128, 1),
    ("float16", 16, 64, "groups", 128, 1),
    ("float64", 16, 32, "layer", 256, 1),
    ("bfloat16", 16, 32, "groups", 16, 1),
    ("bfloat16", 2, 32, "layer", 4, 1),
    ("bfloat16", 2, 32, "groups", 128, 1),
    ("float16", 16, 32, "layer", 128, 0),
    ("float32", 4, 64, "rms", 256, 0),
]
"""Instances of these kernels to compile: dtype, bytes of a pack, bits of an index, rows, threads of a team, and whether
rows are kept on chip. All but those of the first line are compiled for one architecture alone."""
VECTOR_THREADS = {
    "bn_update_running": THREADS,
    "norm_parameters": ADDING_THREADS,
    "norm_update_running": MOVING_THREADS,
}
"""Threads per block of kernels on vectors of one value per channel, where they are more than a warp."""
STREAMED_TEAMS = (128, 256)
"""Threads of a team where rows are not kept on chip."""
_LIBRARY = "nvrtc64_*_0.dll" if sys.platform == "win32" else "libnvrtc.so.*"
_CUPY_OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""Options that CuPy passes for every kernel, beside its architecture. Without the last one, the compiler of CUDA 13.0
takes a generic lambda for a function of the host."""


# ---------------------------------------------------------------------------------------------------------------------
# Which instances to compile


class OfRows(NamedTuple):
    """Macros of the kernels of the norms for channels first, beside those that other kernels have, in order."""

    centered: int  # whether a row's mean is taken off it
    elementwise: int  # whether each element has a weight of its own
    on_chip: int  # whether rows are kept on chip
    sums_on_chip: int  # whether a team adds up what several rows have at the same place
    rows_at_once: int
    parameter_t: str  # dtype of weight and bias


class Instance(NamedTuple):
    """A kernel and the values of its macros."""

    kernel: str
    dtype: str
    width: int
    index_bits: int
    threads: int = THREADS
    team: int = 0  # threads of a team; 0 for kernels without teams
    cluster: int = 0  # blocks of a cluster; 0 for kernels without clusters
    masked: bool = False  # whether the kernel is compiled for masks
    phase: int = -1  # what a launch does of a step of the norms for channels last; -1 for other kernels
    rows: OfRows | None = None  # what else the norms for channels first are compiled for

    @property
    def pack_bytes(self) -> int:
        """Bytes of a pack, which one load or store moves."""
        return self.width * itemsize(self.dtype)

    @property
    def loader(self) -> launcher.Kernel:
        """The library's own `launcher.Kernel` of the instance."""
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        geometry = Geometry((), {}, threads=self.threads, team=self.team)
        macros = macros_of(dtype, self.width, self.index_bits, geometry)
        if self.cluster:
            macros["CLUSTER_BLOCKS"] = self.cluster
        if self.masked:
            macros["MASKED"] = 1
        if self.phase >= 0:
            macros["PHASE"] = self.phase
        if self.rows:
            macros |= {name.upper(): value for name, value in self.rows._asdict().items()}
        return launcher.Kernel(self.kernel, macros)

    @property
    def options(self) -> tuple[str, ...]:
        """The options of the compiler that set the macros, as the library passes them to CuPy."""
        return self.loader.options


def itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def instances(kernel: str, architecture: int, everything: bool = False) -> list[Instance]:
    """Instances of a kernel to compile, with the largest team that each size of block has.

    Parameters
    ----------
    everything : bool
        Whether to list all packs, dtypes and indices, for blocks of any number of threads, in the smallest clusters as
        well. Else it is a short list for blocks of the fewest threads, in which a thread may use the fewest registers.
    """
    found = [i for i in all_instances(architecture) if i.kernel == kernel]
    if kernel in NORMS_FIRST:
        return _of_rows(found, architecture, everything)
    if everything:
        largest = {i.threads: i.team for i in found}  # later teams of a block are larger, and replace earlier ones
        clusters = 0, BLOCKS[0], _clusters(architecture)[-1]
        return [i for i in found if i.team == largest[i.threads] and i.cluster in clusters]
    if "/" not in kernel and kernel not in IN_PACKS:
        return found
    fewest = min(i.threads for i in found)
    if kernel in NORMS_LAST:
        lasts = {(i.pack_bytes, i.index_bits, i.dtype, i.phase): i for i in found if i.threads == fewest}
        memory = NORMS_MEMORY if architecture == 90 else {(16, 32): FLOATS}
        wanted = [(*packs, dtype) for packs, dtypes in memory.items() for dtype in dtypes]
        return [lasts[(*some, phase)] for some in wanted for phase in range(3)]
    # Later clusters are larger, and replace earlier ones.
    last = {(i.masked, i.pack_bytes, i.index_bits, i.dtype): i for i in found if i.threads == fewest}
    masks = architecture in MASKED_ON and any(i.masked for i in found)
    lists = {False: MEMORY if architecture == 90 else {(16, 32): FLOATS}, True: MASKED if masks else {}}
    return [
        last[masked, pack_bytes, bits, dtype]
        for masked, some in lists.items()
        for (pack_bytes, bits), dtypes in some.items()
        for dtype in dtypes
    ]


def _of_rows(found: list[Instance], architecture: int, everything: bool) -> list[Instance]:
    """Instances of a norm's kernel for channels first that are to be compiled."""
    if everything:
        teams, clusters = (ROW_TEAMS[0], *ROW_TEAMS[-3:]), (BLOCKS[0], _clusters(architecture)[-1])
        found = [i for i in found if i.team in teams and i.cluster in clusters]
        return [i for i in found if (i.pack_bytes, i.index_bits) == (16, 32) or i.rows.parameter_t == "float32"]
    # Later instances replace earlier ones: clusters are larger, and teams take more rows at once.
    names = {row: name for name, row in ROWS.items()}
    last = {
        (i.dtype, i.pack_bytes, i.index_bits, names[i.rows[:2]], i.team, i.rows.on_chip): i
        for i in found
        if i.rows and (i.rows.sums_on_chip or "forward" in i.kernel or not i.rows.elementwise)
    }
    return [last[key] for key in (ROWS_MEMORY if architecture == 90 else ROWS_MEMORY[: len(ROWS)])]


def all_instances(architecture: int) -> Iterator[Instance]:
    """All instances that the library may ask a GPU for, every size of team, block and cluster; the most used ones
    first.
    """
    # Kernels of the norms for channels first come behind the others: they have more instances than all of these.
    kernels = sorted(sources.kernel_names(), key=lambda kernel: kernel in NORMS_FIRST)
    for masked, index_bits, pack_bytes in itertools.product((False, True), (32, 64), PACK_BYTES):
        for kernel in kernels:
            if kernel in NORMS_LAST:
                if not masked:
                    yield from _norms_last(kernel, pack_bytes, index_bits, architecture)
                continue
            if kernel in NORMS_FIRST:
                if not masked:
                    yield from _norms_first(kernel, pack_bytes, index_bits, architecture)
                continue
            layout, _, step = kernel.rpartition("/")
            if not layout and kernel not in IN_PACKS:  # the kernel works on vectors of one value per channel
                if (masked, pack_bytes, index_bits) == (False, 16, 32):  # such a kernel is listed once
                    threads = VECTOR_THREADS.get(step, WARP)
                    yield from (Instance(kernel, dtype, 1, 32, threads) for dtype in ("float32", "float64"))
                continue
            for dtype, (threads, team) in itertools.product(FLOATS, _teams(layout, step)):
                if pack_bytes < itemsize(dtype) or (masked and (step in WITHOUT_MASKS or not layout)):
                    continue
                clusters = (
                    (0,)
                    if step not in ON_CHIP or layout != "channels_first"
                    else _clusters(architecture)
                    if team in (0, threads)
                    else BLOCKS[:1]
                )
                width = pack_bytes // itemsize(dtype)
                for cluster in clusters:
                    yield Instance(kernel, dtype, width, index_bits, threads, team, cluster, masked)


def _norms_last(kernel: str, pack_bytes: int, index_bits: int, architecture: int) -> Iterator[Instance]:
    """All instances of a norm's kernel for channels last, with such packs and indices."""
    for dtype, threads in itertools.product(FLOATS, NORM_THREADS):
        width = pack_bytes // itemsize(dtype)
        for cluster in _clusters(architecture) if width else ():
            yield Instance(kernel, dtype, width, index_bits, threads, cluster=cluster, phase=WHOLE)
        for phase in (ONLY_SUMS, AFTER_SUMS) if width else ():
            yield Instance(kernel, dtype, width, index_bits, threads, phase=phase)


def _norms_first(kernel: str, pack_bytes: int, index_bits: int, architecture: int) -> Iterator[Instance]:
    """All instances of a norm's kernel for channels first, with such packs and indices."""
    for dtype, (centered, elementwise) in itertools.product(FLOATS, ROWS.values()):
        width = pack_bytes // itemsize(dtype)
        sums = [(0, 1), *((1, n) for n in sorted(AT_ONCE))] if elementwise and "backward" in kernel else [(0, 1)]
        for parameter_t in dict.fromkeys((dtype, "float32")) if width else ():
            for cluster, team, on_chip, (summed, at_once) in _row_cuts(architecture, sums):
                rows = OfRows(centered, elementwise, on_chip, summed, at_once, parameter_t)
                threads = max(team, LEAST_THREADS)
                yield Instance(kernel, dtype, width, index_bits, threads, team, cluster, rows=rows)


def _row_cuts(architecture: int, sums: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Blocks of a cluster, threads of a team, whether rows are on chip, whether sums are, and the rows at once."""
    clusters = _clusters(architecture)
    for cluster, team, some in itertools.product(clusters, ROW_TEAMS, sums):
        if cluster == 1 or team >= LEAST_THREADS:
            yield cluster, team, 1, some
    for team, some in itertools.product(STREAMED_TEAMS, sums):
        if some[1] == 1:
            yield clusters[-1], team, 0, some


def _teams(layout: str, step: str) -> list[tuple[int, int]]:
    """Threads of a block and of a team, for each choice that the kernel has."""
    if layout != "channels_first":
        return [(THREADS, 0)]
    most = TEAMS[-1] if step in ON_CHIP else THREADS
    return [(max(team, LEAST_THREADS), team) for team in TEAMS if team <= most]


def _clusters(architecture: int) -> tuple[int, ...]:
    return BLOCKS if architecture >= 90 else BLOCKS[:1]


# ---------------------------------------------------------------------------------------------------------------------
# The compiler


class CompileError(Exception):
    """An error with the compiler's log."""


class Usage(NamedTuple):
    """Registers and bytes that a thread of a kernel uses, and bytes of shared memory that its block uses."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spilled(self) -> bool:
        """Whether registers were saved to memory and loaded again."""
        return self.spill_stores + self.spill_loads > 0


def find_library() -> Path | None:
    """The path of NVRTC: of the package nvidia-cuda-nvrtc, which CuPy uses as well, else of a CUDA toolkit."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for path in sorted(Path(folder).glob(f"cu*/**/{_LIBRARY}")):
            return path
    toolkits = (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), sys.prefix, "/usr/local/cuda")
    for toolkit, folder in itertools.product(filter(None, toolkits), ("lib64", "lib", "bin/x64", "bin")):
        for path in sorted(Path(toolkit, folder).glob(_LIBRARY)):
            return path
    return None


@functools.cache
def _library_path() -> Path:
    path = find_library()
    assert path is not None
    return path


@functools.cache
def _load() -> ctypes.CDLL:
    path = _library_path()
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))  # finds the second library, which the first one loads by name
    # NVRTC of CUDA 13.0 does not find its library of built-in functions unless that is loaded already.
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def version() -> str:
    """The version of NVRTC, such as "12.9"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_text(text: str, architecture: int, options: Iterable[str] = ()) -> tuple[bytes, str]:
    """Machine code and log of a text. May be called from several threads at once.

    Parameters
    ----------
    architecture : int
        The GPU's generation, such as 90 for ``sm_90``.
    options : iterable of str
        Options of the compiler, beside those that CuPy passes by itself.

    Raises
    ------
    CompileError
        If the text does not compile; it has the log.
    """
    return _compile(text, [*options, f"-arch=sm_{architecture}", "--ptxas-options=-v"], "CUBIN")


def ptx(text: str, architecture: int, options: Iterable[str] = ()) -> str:
    """The PTX of a text: assembler with an unlimited number of registers."""
    return _compile(text, [*options, f"-arch=compute_{architecture}"], "PTX")[0].decode()


def _compile(text: str, options: list[str], result: str) -> tuple[bytes, str]:
    """What NVRTC makes of a text, and its log, from the cache if they are there: the same text gives the same."""
    flags = [*_CUPY_OPTIONS, *options]
    of_library = version(), str(_library_path().stat().st_size)
    key = hashlib.sha256("\0".join((*of_library, result, *flags, text)).encode()).hexdigest()[:32]
    kept = _cache_folder() / f"{key}.{result.lower()}"
    if not kept.exists():
        code, log = _compiled(text, flags, result)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(zlib.compress(json.dumps(log).encode() + b"\n" + code))
        Path(file.name).replace(kept)  # atomic: other processes may make the same file
    log, _, code = zlib.decompress(kept.read_bytes()).partition(b"\n")
    return code, json.loads(log)


def _cache_folder() -> Path:
    """The folder where results are kept from run to run."""
    folder = Path(os.environ.get("CUPYBN_NVRTC_CACHE", Path.home() / ".cupy" / "nvrtc_cache"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compiled(text: str, flags: list[str], result: str) -> tuple[bytes, str]:
    """What NVRTC makes of a text, and its log."""
    nvrtc = _load()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"text.cu", 0, None, None):
        raise CompileError("NVRTC cannot be set up")
    try:
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), array)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if failed:
            raise CompileError(log.value.decode())
        getattr(nvrtc, f"nvrtcGet{result}Size")(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{result}")(program, code)
        return code.raw, log.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compile_instance(instance: Instance, architecture: int) -> tuple[bytes, str]:
    """Machine code and log of an instance of a kernel."""
    return compile_text(sources.source(instance.kernel), architecture, instance.options)


def usage(log: str) -> Usage:
    """The usage that a kernel's log reports, with spills and stacks of its functions that were not inlined."""
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert memory, f"no report of memory in {log!r}"
    assert len(registers) == 1, f"not the report of one kernel: {log!r}"
    stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
    shared = re.search(r"(\d+) bytes smem", log)
    return Usage(int(registers[0]), stack, stores, loads, int(shared[1]) if shared else 0)


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a file of machine code, without what the file says of them."""
    (table,), (size, count, of_names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    names = sections[of_names][1]
    code = [cubin[start : start + n] for name, start, n in sections if cubin.startswith(b".text.", names + name)]
    assert code, "no section with instructions"
    return b"".join(code)
