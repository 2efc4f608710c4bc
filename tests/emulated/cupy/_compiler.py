"""Compiles kernels with g++: the text that NVRTC would get, instrumented so that the runtime sees every access to
memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
DEVICE = '#include "device.h"'
BOUNDS = (
    r"(?:(?:__(?:launch_bounds|cluster_dims)__|[A-Z_][A-Z_0-9]*)\s*\((?:[^()]|\([^()]*\))*\)\s*|[A-Z_][A-Z_0-9]*\s+)*"
)
GLOBAL = re.compile(rf'extern\s+"C"\s+__global__\s+({BOUNDS})void\s+({BOUNDS})(\w+)\s*\(')
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([\w:][\w: ]*?)\s+(\w+)\s*\[\s*\]\s*;")
MOST_SHARED = 227 << 10

CHECKS = (
    "alignment",
    "bool",
    "bounds",
    "integer-divide-by-zero",
    "null",
    "return",
    "shift",
    "signed-integer-overflow",
    "unreachable",
)
FLAGS = (
    "-std=c++17",
    "-Og",
    "-g1",
    "-gdwarf-4",  # with version 5, some versions of addr2line name the wrong file
    "-fno-var-tracking",  # debug information has lines alone, no variables
    "-fno-exceptions",
    "-fno-asynchronous-unwind-tables",  # nobody unwinds a stack, so tables for that are not needed
    "-w",
    "-fPIC",
    "-fno-gnu-unique",  # each module has its own copy of the variables that are shared memory
    "-fvisibility=hidden",
    "-fno-tree-vectorize",  # each access is as wide as the kernel wrote it
    "-ffp-contract=off",
    "-fsanitize=thread," + ",".join(CHECKS),
    "-fno-sanitize-recover=" + ",".join(CHECKS),  # the runtime's handlers of faults do not return
)
# Leaves out the sanitizers' libraries, whose functions the runtime defines, and the start-up files of C++: then all
# zeroed memory of the module is the kernels' shared memory.
LINK_FLAGS = ("-shared", "-nostdlib", "-Wl,-Bsymbolic", "-lm", "-lc", "-lgcc")


class CompileException(Exception):  # noqa: N818 - its name in CuPy
    """An error with the compiler's messages."""


def cache_folder() -> Path:
    """The folder where compiled kernels are kept from run to run."""
    folder = Path(os.environ.get("CUPY_EMULATOR_CACHE", Path.home() / ".cupy" / "emulator_cache"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def compiler() -> tuple[str, str]:
    """The path of g++ and its version."""
    path = os.environ.get("CXX") or shutil.which("g++")
    if path is None:
        raise CompileException("expected g++ in PATH: the stand-in for CuPy compiles kernels with it")
    return path, _run([path, "--version"])


def _garbage() -> tuple[str, ...]:
    """Options that fill local variables with garbage, if g++ can: unwritten ones may look right by chance."""
    major = re.search(r"\b(\d+)\.\d+\.\d+", compiler()[1])
    return ("-ftrivial-auto-var-init=pattern",) if major and int(major[1]) >= 12 else ()


def _run(command: Sequence[str | Path]) -> str:
    # Runs in the root folder: #line names files relative to the folder where g++ runs.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode != 0:
        raise CompileException(done.stderr)
    return done.stdout


def _cached(ending: str, text: str, options: Sequence[str], more: Sequence[str | Path] = ()) -> Path:
    """The file that g++ makes of a text, from the cache if it is there.

    Parameters
    ----------
    ending : str
        The end of the file's name. A compiled header is alone in its folder, where g++ finds it.
    more
        Options that are paths of headers. The key has the headers' text instead, so that checkouts share the cache.
    """
    path, version = compiler()
    key = hashlib.sha256("\0".join((text, version, _surroundings(), *options)).encode()).hexdigest()[:32]
    result = cache_folder() / f"{key}{ending}"
    if not result.exists():
        result.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            source, made = Path(folder) / "kernel.cpp", Path(folder) / "made"
            source.write_text(text)
            language = ("-x", "c++-header") if ending.endswith(".gch") else ()
            _run([path, *language, source, *options, *more, "-o", made])
            made.replace(result)  # atomic: other processes may make the same file
    return result


@functools.cache
def _surroundings() -> str:
    """The text of the runtime, which kernels include."""
    return "".join(path.read_text() for path in sorted(RUNTIME.iterdir()) if path.is_file())


@functools.cache
def _headers() -> tuple[str, ...]:
    """Options with the folders of ``device.h``, that of its compiled form first: it is longer than most kernels."""
    precompiled = _cached("/device.h.gch", DEVICE, (*FLAGS, *_garbage()), (f"-I{RUNTIME}",))
    return f"-I{precompiled.parent}", f"-I{RUNTIME}"


@functools.cache
def runtime() -> ctypes.CDLL:
    """The library that runs kernels; it is loaded so that compiled kernels find its functions."""
    text = (RUNTIME / "runtime.cpp").read_text()
    options = ("-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-shared", "-ldl")
    return ctypes.CDLL(str(_cached(".so", text, options, (f"-I{RUNTIME}",))), mode=ctypes.RTLD_GLOBAL)


class Parameter(ctypes.Structure):
    """A parameter of a kernel as the compiler saw it: the struct of the same shape in ``device.h``."""

    _fields_ = (
        ("size", ctypes.c_int),
        ("kind", ctypes.c_char),
        ("pointee", ctypes.c_char),
        ("pointee_size", ctypes.c_int),
    )


class Module:
    """The kernels of a text, compiled and loaded."""

    def __init__(self, code: str, options: Sequence[str]) -> None:
        bounds = {name: f"{before} {after}" for before, after, name in GLOBAL.findall(code)}
        self.names = list(bounds)
        dynamic = sorted({name for _, name in DYNAMIC.findall(code)})
        if len(dynamic) > 1:
            raise CompileException("the stand-in for CuPy knows one extern __shared__ array")
        self.dynamic = dynamic[0] if dynamic else None
        definitions = [  # in assembler, because the C++ text declares the arrays in its own ways
            rf'asm(".pushsection .bss\n.balign 32\n.globl {name}\n.type {name}, %object\n'
            rf'.size {name}, {MOST_SHARED}\n{name}: .zero {MOST_SHARED}\n.popsection");'
            for name in dynamic
        ]
        text = "\n".join(
            [
                DEVICE,
                '#line 1 "kernel.cu"',
                re.sub(r"extern\s+__shared__", "extern __dynamic_shared__", code),
                '#line 1 "entry.cpp"',
                *definitions,
                *(f"EMULATED_ENTRY({name})" for name in self.names),
                "#undef __cluster_dims__",
                "#define __cluster_dims__ EMULATED_CLUSTER_DIMS",
                *(f"EMULATED_CLUSTER({name}, {text})" for name, text in bounds.items()),
                "EMULATED_MODULE",
            ]
        )
        runtime()
        flags = (*FLAGS, *_garbage(), *_translate(options), *LINK_FLAGS)
        self.path = _cached(".so", text, flags, _headers())
        self.binary = ctypes.CDLL(str(self.path))
        begin, end = ctypes.c_void_p(), ctypes.c_void_p()
        self.binary.emulated_shared(ctypes.byref(begin), ctypes.byref(end))
        # Without shared memory the linker may place the end before the beginning.
        self.shared = min(begin.value or 0, end.value or 0), end.value or 0
        self.devices: set[int] = set()  # numbers of the devices on which it has been loaded
        self.clusters = {name: self._cluster(name) for name in self.names}

    def _cluster(self, name: str) -> int:
        """How many blocks the kernel declares a cluster to have; 0 if it declares nothing."""
        dims = (ctypes.c_int * 3)()
        getattr(self.binary, f"emulated_cluster_{name}")(dims)
        x, y, z = dims
        if (x, y, z) == (0, 0, 0):
            return 0
        if min(x, y, z) < 1:
            raise CompileException("__cluster_dims__ arguments must be positive integers")
        if (y, z) != (1, 1):
            raise NotImplementedError("the stand-in for CuPy has clusters along x only")
        return int(x)

    def entry(self, name: str) -> ctypes._CFuncPtr:
        """The function that calls a kernel; it takes an array of the addresses of the arguments."""
        function: ctypes._CFuncPtr = getattr(self.binary, f"emulated_entry_{name}")
        return function

    def parameters(self, name: str) -> list[Parameter]:
        """The parameters of a kernel."""
        describe = getattr(self.binary, f"emulated_parameters_{name}")
        describe.restype = ctypes.POINTER(Parameter)
        count = ctypes.c_int()
        first = describe(ctypes.byref(count))
        return [first[i] for i in range(count.value)]

    def dynamic_shared(self) -> int:
        """The address of dynamic shared memory; 0 if no kernel has any."""
        if self.dynamic is None:
            return 0
        return ctypes.addressof(ctypes.c_char.in_dll(self.binary, self.dynamic))

    def static_shared(self) -> int:
        """Bytes of static shared memory, of all kernels of the module together; rounded down, as alignment takes up to
        32.
        """
        begin, end = self.shared
        return (end - begin - (0 if self.dynamic is None else MOST_SHARED)) // 32 * 32

    def place(self, pc: int) -> str:
        """File and line of a code address, the innermost function first."""
        find = runtime().emulated_offset
        find.restype, find.argtypes = ctypes.c_uint64, [ctypes.c_void_p]
        offset = find(pc)
        tool = shutil.which("addr2line")
        if not offset or tool is None:
            return "?"
        lines = _run([tool, "-i", "-e", self.path, hex(offset - 1)]).split("\n")
        return ", inlined at ".join(line.partition(" (")[0].lstrip("/") for line in lines if line)


def _translate(options: Sequence[str]) -> list[str]:
    """The options for g++ that mean the same as some of NVRTC's."""
    known = []
    for option in options:
        if option.startswith(("-D", "-U")):
            known.append(option)
        elif not option.startswith(("--std", "-std", "-ftz", "--use_fast_math", "-lineinfo")):
            raise CompileException(f"the stand-in for CuPy does not know the option {option}")
    return known
