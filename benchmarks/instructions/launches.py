"""Executes the library's own launches: it runs on the stand-in for CuPy, whose kernels are replaced by counting ones.

So the kernels, their macros, the grid and all arguments are those that the library chooses.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy import emulator
from cupy._memory import Allocation
from cupy.cuda.function import CNumpyArray

from cupybn._steps import launcher
from instructions.lanes import WARP, Array
from instructions.machine import Machine
from instructions.memory import Space
from instructions.program import Program, compile_program
from tests.steps import forget_plans

Blocks = list[tuple[int, int, int]]
ALIGNMENT = 512
"""Bytes of which arrays' addresses are a multiple, as in CuPy's memory pool."""
TOGETHER = 8192
"""Most threads that are executed side by side."""
DEVICES = {
    75: emulator.T4,
    80: emulator.A100,
    86: replace(emulator.RTX_4090, compute_capability="86"),
    89: emulator.RTX_4090,
    90: emulator.H200,
    120: replace(emulator.RTX_4090, compute_capability="120"),
}
"""The GPU that the stand-in pretends, by architecture."""


class Launch(NamedTuple):
    """A launch of a kernel, and how often its executed blocks have issued each instruction."""

    kernel: str  # such as "channels_first/bn_stats"
    options: tuple[str, ...]  # options of the compiler, which set the kernel's macros
    grid: tuple[int, int, int]
    threads: int
    program: Program | None = None
    blocks: int = 0  # number of blocks that were executed
    issued: Array = np.zeros(0, np.int64)  # how often each instruction of the program was issued

    @property
    def warps(self) -> int:
        """How many warps were executed."""
        return self.blocks * self.threads // WARP


Choose = Callable[[Launch, Callable[[], Program]], Blocks]
"""Function that chooses the blocks of a launch to execute: whole clusters in a row. It may ask for the compiled
program."""


class Counter:
    """The launches so far, and the device's memory: one piece, out of which all arrays are cut."""

    def __init__(self, size: int) -> None:
        self.launches: list[Launch] = []
        self._piece, self._used = Allocation(-(-size // ALIGNMENT) * ALIGNMENT, 0), 0
        self.space = Space(self._piece.host, self._piece.ptr, self._piece.initialised)

    def alloc(self, size: int) -> Any:
        """Allocate memory, as an allocator of CuPy does."""
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        if self._used > self._piece.nbytes:
            raise MemoryError(f"the arrays of a count take more than {self._piece.nbytes} bytes")
        return cupy.cuda.MemoryPointer(self._piece, start)

    def look(self, array: Any) -> tuple[Array, Array]:
        """The elements of a contiguous array, and which of them were written."""
        start = array.data.ptr - self._piece.ptr
        data, written = (piece[start : start + array.nbytes] for piece in (self._piece.host, self._piece.initialised))
        shape = array.shape
        return data.view(array.dtype).reshape(shape), written.reshape(*shape, array.itemsize).all(-1)


@contextlib.contextmanager
def counted(architecture: int, choose: Choose, memory: int, multiprocessors: int | None = None) -> Iterator[Counter]:
    """A context inside of which kernels are executed here, and their launches counted.

    Parameters
    ----------
    architecture : int
        The GPU's generation, such as 90 for ``sm_90``.
    memory : int
        Bytes that arrays take together; nothing is given back.
    multiprocessors : int, optional
        Multiprocessors of the pretended GPU; by default as many as a real one has.
    """
    counter, device = Counter(memory), DEVICES[architecture]
    allocator, raw_kernel = cupy.cuda.get_allocator(), cupy.RawKernel

    class CountedKernel:
        """A kernel with the part of `cupy.RawKernel` that the library uses."""

        max_dynamic_shared_size_bytes = 0

        def __init__(self, code: str, name: str, options: tuple[str, ...]) -> None:
            self._code, self._options = code, options
            found = re.search(rf'"kernels/(.*\b{name})\.cu"', code)
            self._name = found[1] if found else name

        def __call__(self, grid: tuple[int, ...], block: tuple[int], args: Sequence[Any], shared_mem: int = 0) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            launch = Launch(self._name, self._options, (x, y, z), block[0])
            blocks = choose(launch, self._compile)
            if blocks:  # a launch of which nothing is executed is not compiled either
                program = self._compile()
                issued = execute(program, launch.grid, block[0], blocks, pack(args), counter.space, shared_mem)
                launch = launch._replace(program=program, blocks=len(blocks), issued=issued)
            counter.launches.append(launch)

        def _compile(self) -> Program:
            return compile_program(self._code, architecture, self._options)

    try:
        cupy.cuda.set_allocator(counter.alloc)
        cupy.RawKernel = CountedKernel
        _forget()
        with emulator.pretend(replace(device, multiprocessors=multiprocessors or device.multiprocessors)):
            yield counter
    finally:
        cupy.RawKernel = raw_kernel
        cupy.cuda.set_allocator(allocator)
        _forget()


def _forget() -> None:
    forget_plans()
    launcher.kernel.cache_clear()


def execute(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    blocks: Blocks,
    parameters: bytes,
    space: Space,
    shared: int = 0,
) -> Array:
    """How often the given blocks of a launch issue each instruction; `shared` is bytes of dynamic shared memory of a
    block.
    """
    issued = np.zeros(len(program.instructions), np.int64)
    batch = max(1, TOGETHER // (threads * program.cluster)) * program.cluster
    for start in range(0, len(blocks), batch):
        some = blocks[start : start + batch]
        machine = Machine(program, grid, threads, some, program.cluster, parameters, space, shared + program.shared)
        machine.run()
        issued += machine.issued
    return issued


def pack(args: Sequence[Any]) -> bytes:
    """The arguments as CuPy passes them: each at a multiple of its size, or of 8 bytes if it is a struct of words."""
    data = b""
    for value in args:
        value = value._val if isinstance(value, CNumpyArray) else value
        if value is None or isinstance(value, cupy.ndarray):
            value = np.uint64(0 if value is None else value.data.ptr)
        array = np.asarray(value)
        size = 8 if array.dtype.kind == "V" else array.itemsize
        data += b"\0" * (-len(data) % size) + array.tobytes()
    return data
